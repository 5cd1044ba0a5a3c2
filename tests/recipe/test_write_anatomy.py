"""anat/ holds the brain and the tissues of each T1w image, once for all runs."""

import json
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest

from bidsapp.anatomy import t1w
from bidsapp.bids.writer import Dataset
from bidsapp.errors import DataError
from bidsapp.recipe.anatomy import write_anatomy

NAMES = [f"sub-01_ses-a_{name}.nii.gz" for name in (
    "desc-brain_mask", "label-GM_probseg", "label-WM_probseg", "label-CSF_probseg")]


@pytest.fixture
def described(monkeypatch):
    """Stand in for networks and Atropos, and list the images that they get."""
    seen = []

    def describe(image, device, work_dir):
        seen.append(image.name)
        if "broken" in image.name:
            raise DataError("no brain was found in the T1w image.")
        inside = np.zeros((4, 5, 6), bool)
        inside[1:3] = True
        return inside, [inside * np.float32(p) for p in (0.5, 0.3, 0.2)]

    monkeypatch.setattr(t1w, "describe", describe)
    return seen


def contexts(folder, *names, corrections=("motion",)):
    images = []
    for name in names:
        images.append(folder / f"sub-01/ses-a/anat/{name}")
        images[-1].parent.mkdir(parents=True, exist_ok=True)
        if not images[-1].exists():
            nib.save(nib.Nifti1Image(np.ones((4, 5, 6), np.float32), np.diag([2, 2, 2, 1])),
                     images[-1])
    dataset = Dataset(folder / "out", {"raw": folder})
    dataset.claim()
    return [SimpleNamespace(run=SimpleNamespace(t1w=image), corrections=corrections,
                            dataset=dataset, device="cpu", options=SimpleNamespace(work_dir=None))
            for image in images]


def test_runs_share_what_is_written_once(described, tmp_path):
    both = contexts(tmp_path, "sub-01_ses-a_T1w.nii.gz", "sub-01_ses-a_T1w.nii.gz")
    write_anatomy(both)
    write_anatomy(both)
    assert described == ["sub-01_ses-a_T1w.nii.gz"]
    folder = tmp_path / "out/sub-01/ses-a/anat"
    assert sorted(p.name for p in folder.glob("*.nii.gz")) == sorted(NAMES)
    mask, *tissues = (np.asarray(nib.load(folder / name).dataobj) for name in NAMES)
    np.testing.assert_allclose(sum(tissues), mask, atol=1e-6)
    about = json.loads((folder / NAMES[1].replace("nii.gz", "json")).read_text())
    assert about["Sources"] == ["bids:raw:sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz",
                                f"bids::sub-01/ses-a/anat/{NAMES[0]}"]
    image = tmp_path / "sub-01/ses-a/anat/sub-01_ses-a_T1w.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((4, 5, 6), np.float32), np.eye(4)), image)
    write_anatomy(both)
    assert len(described) == 2  # the image was replaced


def test_an_image_without_brain_costs_its_own_files_alone(described, tmp_path, caplog):
    write_anatomy(contexts(tmp_path, "sub-01_ses-a_acq-broken_T1w.nii.gz",
                           "sub-01_ses-a_T1w.nii.gz"))
    assert len(list((tmp_path / "out/sub-01/ses-a/anat").glob("*.nii.gz"))) == 4
    assert "acq-broken" in caplog.text and "no brain was found" in caplog.text


def test_nothing_is_written_where_images_are_not_corrected(described, tmp_path):
    write_anatomy(contexts(tmp_path, "sub-01_ses-a_T1w.nii.gz", corrections=()))
    assert not described and not (tmp_path / "out/sub-01").exists()
