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
"""The signal along any direction is that of the nearest measured one."""

import numpy as np

from bidsapp.errors import Refusal
from bidsapp.kinds import Predicted, Upsampler


class Toy(Upsampler):
    """Nearest neighbours."""

    def check(self, acquisition):
        if len(acquisition) > 200:
            raise Refusal("more than 200 volumes are enough.")

    def predict(self, dwi, target, device, seed=0):
        weighted = np.flatnonzero(~dwi.acquisition.b0)
        nearest = np.abs(target.bvecs @ dwi.acquisition.bvecs[weighted].T).argmax(1)
        signal = dwi.signal[:, weighted[nearest]]
        return Predicted(signal, 0.5 * signal)
'''

OUTPUTS = {"model": {"name": "toy", "Description": "Nearest neighbours (Doe 2020)",
                     "URL": "https://doi.org/10.1000/toy"},
           "signal": {"Description": "Signal with its nearest neighbours", "Units": "as the input"},
           "maps": {}}


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
    (folder / "README.md").write_text("# upsample_toy\n\nNearest neighbours, doi:10.1000/toy.\n")
    return copy.parent


@pytest.mark.slow
def test_a_folder_is_all_that_a_new_upsampler_needs(package, bids_tree, tmp_path):
    """Measured volumes come first and untouched; a second run changes nothing, and an estimate that
    is added reads the upsampled signal back."""
    bids, out = bids_tree(("01",)), tmp_path / "out"

    def qsphere(*argv):
        done = subprocess.run(
            [sys.executable, "-m", "bidsapp", bids, out, "participant", "--preprocess", "none",
             *argv], cwd=package,
            env={"PYTHONPATH": str(package), "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
            capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    toy = ("--upsample", "toy", "--target-directions", "20")
    assert "upsample_toy of the measured signal, adds 8 × b 1000, 4 × b 2000" in qsphere(
        *toy, "--dry-run")
    qsphere(*toy, "--estimate", "dti")
    stem = f"{out}/sub-01/dwi/sub-01"
    measured = nib.load(bids / "sub-01/dwi/sub-01_dwi.nii.gz").get_fdata()
    mask = np.asarray(nib.load(f"{stem}_desc-brain_mask.nii.gz").dataobj) > 0
    volumes = nib.load(f"{stem}_desc-upsampled_dwi.nii.gz").get_fdata()
    n, bvals = measured.shape[3], np.loadtxt(f"{stem}_desc-upsampled_dwi.bval")
    assert volumes.shape[3] == len(bvals) == n + 12
    np.testing.assert_array_equal(volumes[mask][:, :n], measured[mask].astype(np.float32))
    same = (volumes[mask][:, n:, None] == volumes[mask][:, None, :n]).all(0)
    assert same.any(1).all()  # each new volume is a measured one
    sd = nib.load(f"{stem}_model-toy_stat-std_desc-upsampled_dwimap.nii.gz")
    np.testing.assert_array_equal(sd.get_fdata()[mask], 0.5 * volumes[mask][:, n:])
    about = json.loads(Path(f"{stem}_desc-upsampled_dwi.json").read_text())
    assert about["SynthesizedVolumes"] == list(range(n, n + 12))
    assert json.loads(Path(f"{stem}_model-toy_stat-std_desc-upsampled_dwimap.json").read_text())[
        "Volumes"] == list(range(n, n + 12))
    assert not Path(f"{stem}_model-tensor_param-fa_stat-std_desc-upsampled_dwimap.nii.gz").exists()
    assert "skipped" in qsphere(*toy, "--estimate", "dti")
    text = qsphere(*toy, "--estimate", "dti", "smt")
    assert "upsampled_estimate_smt on" in text and "estimate_dti on" not in text
    assert Path(f"{stem}_model-smt_param-neuritefraction_desc-upsampled_dwimap.nii.gz").exists()
    assert "Nearest neighbours" in (out / "logs/CITATION.md").read_text()
    assert "Nearest neighbours" in (out / "sub-01.html").read_text()
