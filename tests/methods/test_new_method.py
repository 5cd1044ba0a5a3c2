"""A method is a folder: one that nobody knew is found, applied and written, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

import bidsapp

PACKAGE = Path(bidsapp.__file__).parent

METHOD = '''
"""Every weighted volume once more with its direction reversed, which measures the same."""

from dataclasses import replace

import numpy as np

from bidsapp.acquisition import Acquisition
from bidsapp.errors import Refusal
from bidsapp.kinds import Upsampled, Upsampler


class Toy(Upsampler):
    """Antipodes."""

    def check(self, acquisition):
        if len(acquisition) > 200:
            raise Refusal("more than 200 volumes are enough.")

    def apply(self, dwi, device, seed=0):
        table = dwi.acquisition
        more = np.flatnonzero(~table.b0)
        whole = Acquisition(np.r_[table.bvals, table.bvals[more]],
                            np.r_[table.bvecs, -table.bvecs[more]])
        signal = np.concatenate([dwi.signal, dwi.signal[:, more]], axis=1)
        return Upsampled(replace(dwi, signal=signal, acquisition=whole),
                         range(len(table), len(whole)),
                         no_intervals="the volumes that were computed measure nothing new")
'''

OUTPUTS = {"model": {"name": "toy", "Description": "Antipodes (Doe 2020)",
                     "URL": "https://doi.org/10.1000/toy"},
           "signal": {"Description": "Signal with antipodes", "Units": "as the input"}, "maps": {}}


@pytest.fixture
def package(tmp_path):
    """A folder with a copy of the package to which one folder was added."""
    copy = tmp_path / "package/bidsapp"
    copy.mkdir(parents=True)
    for path in PACKAGE.iterdir():  # links, but for methods/, where the new one goes
        if path.name not in ("methods", "__pycache__"):
            (copy / path.name).symlink_to(path)
    (copy / "methods").mkdir()
    for path in (PACKAGE / "methods").iterdir():
        (copy / "methods" / path.name).symlink_to(path)
    folder = copy / "methods/upsample_toy"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "method.py").write_text(METHOD)
    (folder / "outputs.json").write_text(json.dumps(OUTPUTS))
    (folder / "README.md").write_text("# upsample_toy\n\nAntipodes, doi:10.1000/toy.\n")
    return copy.parent


@pytest.mark.slow
def test_a_folder_is_all_that_a_new_upsampler_needs(package, bids_tree, tmp_path):
    """The tensor of all measurements twice is that of each once; a second run changes nothing, and
    an estimate that is added reads the upsampled signal back."""
    bids, out = bids_tree(("01",)), tmp_path / "out"

    def qsphere(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "bidsapp", bids, out, "participant", "--preprocess", "none",
             *argv], cwd=package,
            env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert "upsample_toy of the measured signal" in qsphere("--upsample", "toy", "--dry-run")
    qsphere("--upsample", "toy", "--estimate", "dti")
    stem = f"{out}/sub-01/dwi/sub-01"
    n = nib.load(bids / "sub-01/dwi/sub-01_dwi.nii.gz").shape[3]
    image = nib.load(f"{stem}_desc-upsampled_dwi.nii.gz")
    bvals = np.loadtxt(f"{stem}_desc-upsampled_dwi.bval")
    assert image.shape[3] == len(bvals) == n + (bvals[:n] > 0).sum()
    about = json.loads(Path(f"{stem}_desc-upsampled_dwi.json").read_text())
    assert about["SynthesizedVolumes"] == list(range(n, len(bvals)))

    def fa(desc=""):
        return np.asarray(nib.load(f"{stem}_model-tensor_param-fa{desc}_dwimap.nii.gz").dataobj)

    np.testing.assert_allclose(fa("_desc-upsampled"), fa(), atol=2e-5)
    assert not Path(f"{stem}_model-tensor_param-fa_stat-std_desc-upsampled_dwimap.nii.gz").exists()
    assert "skipped" in qsphere("--upsample", "toy", "--estimate", "dti")
    text = qsphere("--upsample", "toy", "--estimate", "dti", "smt")
    assert "upsampled_estimate_smt on" in text and "estimate_dti on" not in text
    assert Path(f"{stem}_model-smt_param-neuritefraction_desc-upsampled_dwimap.nii.gz").exists()
    assert "Antipodes" in (out / "logs/CITATION.md").read_text()
    assert "Antipodes" in (out / "sub-01.html").read_text()
