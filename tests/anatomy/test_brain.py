"""The brain in a T1w image by deepbet's networks, and the mask that it gives diffusion images."""

import nibabel as nib
import numpy as np
import pytest
from scipy.ndimage import label
from scipy.spatial.transform import Rotation

from bidsapp.anatomy import deepbet, n4, t1w
from bidsapp.anatomy.mask import median_otsu
from bidsapp.errors import DataError
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import sample
from support import synthetic_head as head

installed = pytest.mark.skipif(not deepbet.is_installed(), reason="deepbet is not installed")


def move():
    out = np.eye(4)
    out[:3, :3] = Rotation.from_rotvec([6, -4, 9], degrees=True).as_matrix()
    out[:3, 3] = 5, -7, 4
    return out


def moved_brain():
    """The head's brain on a finer grid, in another pose: (mask, affine)."""
    affine, shape = np.diag([1.8, 1.9, 1.7, 1]), (80, 92, 76)
    centre = transform_points(move() @ head.affine(), (np.array(head.SHAPE) - 1) / 2)
    affine[:3, 3] = centre - affine[:3, :3] @ (np.array(shape) - 1) / 2
    points = transform_points(np.linalg.inv(move()), world_points(shape, affine))
    return sample((head.tissues() > 0).astype(float), head.affine(), points) > 0.5, affine


def test_the_mask_comes_to_the_diffusion_images():
    """Through the transform, onto another grid: as the head was drawn there."""
    brain, affine = moved_brain()
    anatomy = t1w.Anatomy(brain.astype(np.float32), affine, move(), brain)
    truth = head.tissues() > 0
    mask = t1w.mask_from_t1w(anatomy, truth, head.affine())
    assert mask.shape == truth.shape and mask.dtype == bool
    dice = 2 * (mask & truth).sum() / (mask.sum() + truth.sum())
    assert dice > 0.985
    still = t1w.mask_from_t1w(anatomy._replace(transform=np.eye(4)), truth, head.affine())
    assert 2 * (still & truth).sum() / (still.sum() + truth.sum()) < 0.9


def test_without_a_brain_the_reason_is_said():
    brain, affine = moved_brain()
    anatomy = t1w.Anatomy(brain.astype(np.float32), affine, move(), None, "no deepbet here.")
    with pytest.raises(DataError, match="no deepbet here"):
        t1w.mask_from_t1w(anatomy, head.tissues() > 0, head.affine())


@pytest.mark.slow
@pytest.mark.parametrize("case", ["right", "missing", "wrong"])
def test_the_brain_is_used_where_it_agrees(tmp_path, monkeypatch, case):
    """Else the whole image is registered, and a notice says why."""
    brain, affine = moved_brain()
    dwi, _, _ = head.participant()
    path = tmp_path / "sub-01_T1w.nii.gz"
    points = transform_points(np.linalg.inv(move()), world_points(brain.shape, affine))
    tissue = np.rint(sample(head.tissues().astype(float), head.affine(), points)).astype(int)
    image = np.array([20.0, 600, 250, 1000, 1000])[tissue]
    nib.save(nib.Nifti1Image(image.astype(np.float32), affine), path)
    found = np.roll(brain, 35, axis=1) if case == "wrong" else brain
    monkeypatch.setattr(deepbet, "extract", lambda *_: found)
    monkeypatch.setattr(deepbet, "is_installed", lambda: case != "missing")
    anatomy = t1w.register(dwi, path)
    assert (anatomy.brain is None) == (case != "right")
    words = {"right": "", "missing": "is not installed", "wrong": "overlap by 0."}[case]
    assert (words in anatomy.notice) and bool(words) == bool(anatomy.notice)
    error = transform_points(anatomy.transform @ np.linalg.inv(move()), points[brain])
    assert np.linalg.norm(error - points[brain], axis=1).max() < 4


@pytest.mark.slow
def test_tissues_on_the_grid_of_the_t1w():
    """Each is where the head has it."""
    brain, affine = moved_brain()
    dwi, _, _ = head.participant()
    points = transform_points(np.linalg.inv(move()), world_points(brain.shape, affine))
    index = np.rint(transform_points(np.linalg.inv(head.affine()), points)).astype(int)
    tissue = head.tissues()[tuple(index.clip(0, np.array(head.SHAPE) - 1).reshape(-1, 3).T)]
    tissue = tissue.reshape(brain.shape) * brain
    image = np.array([20.0, 600, 250, 1000, 1000])[tissue]
    image += np.random.default_rng(1).normal(0, 20, brain.shape)
    found = t1w.segment(dwi, t1w.Anatomy(image.astype(np.float32), affine, move(), brain))
    for values, labels in zip(found, ([1], [3, 4], [2]), strict=True):  # GM, WM, CSF
        truth = np.isin(tissue, labels)
        assert values.shape == brain.shape and values.dtype == np.float32
        sure = (values > 0.5) & (tissue > 0)  # air in the rim of the mask is dark as CSF
        assert 2 * (sure & truth).sum() / (sure.sum() + truth.sum()) > 0.9


@pytest.mark.slow
def test_a_fine_image_is_described_on_its_own_grid(tmp_path, monkeypatch):
    """Voxels of 1.2 mm, which are enlarged for the networks and for Atropos: a bright ball (white
    matter) in a grey one, in dark."""
    x = (np.stack(np.indices((56, 56, 56)), -1) - 27.5) * 1.2
    r = np.linalg.norm(x, axis=-1)
    image = np.select([r < 16, r < 24, r < 29], [1000.0, 600, 250], 20)
    image += np.random.default_rng(1).normal(0, 15, image.shape)
    path = tmp_path / "sub-01_T1w.nii.gz"
    nib.save(nib.Nifti1Image(image.astype(np.float32), np.diag([1.2, 1.2, 1.2, 1])), path)

    def extract(head, affine, device):
        centre = transform_points(np.linalg.inv(affine), np.full(3, 33.0))
        at = (np.stack(np.indices(head.shape), -1) - centre) * np.abs(np.diag(affine)[:3])
        return np.linalg.norm(at, axis=-1) < 29

    monkeypatch.setattr(deepbet, "extract", extract)
    monkeypatch.setattr(deepbet, "is_installed", lambda: True)
    brain, (gm, wm, csf) = t1w.describe(path)
    assert brain.shape == image.shape
    for found, truth in ((brain, r < 29), (gm > 0.5, (r >= 16) & (r < 24)), (wm > 0.5, r < 16),
                         (csf > 0.5, (r >= 24) & (r < 29))):
        assert 2 * (found & truth).sum() / (found.sum() + truth.sum()) > 0.93


def test_the_brain_of_an_image_is_found_once(tmp_path, monkeypatch):
    calls = []

    def extract(head, affine, device):
        calls.append(head)
        return head > 1

    monkeypatch.setattr(deepbet, "extract", extract)
    monkeypatch.setattr(deepbet, "is_installed", lambda: True)
    monkeypatch.setattr(n4, "bias_field", lambda image, *_: np.ones_like(image))
    monkeypatch.setattr(t1w, "_atropos", lambda image, *_: [image] * 3)
    path = tmp_path / "sub-01_T1w.nii.gz"
    for content in (np.eye(12), 1 - np.eye(12)):
        image = np.stack([content.astype(np.float32) * 2] * 12, -1)
        nib.save(nib.Nifti1Image(image, np.diag([2, 2, 2, 1])), path)
        for _ in range(2):
            np.testing.assert_array_equal(t1w.describe(path)[0], image > 1)
    assert len(calls) == 2


@installed
@pytest.mark.slow
@pytest.mark.parametrize("name,part", [("siemens_xa30", "sub-01/anat/sub-01_T1w.nii.gz"),
                                       ("uih_dti16", "sub-02/anat/sub-02_T1w.nii.gz")])
def test_real_brains(test_data, name, part):
    """A brain of a plausible volume, in one piece without holes, wherever the voxels start."""
    image, affine = t1w.read(test_data(name) / part)
    brain = deepbet.extract(image, affine)
    volume = brain.sum() * abs(np.linalg.det(affine[:3, :3])) / 1000
    assert 1200 < volume < 1900
    assert label(np.pad(~brain, 1, constant_values=True))[1] == 1
    assert label(brain, np.ones((3, 3, 3)))[1] == 1
    flipped, to = np.ascontiguousarray(image[::-1].transpose(1, 0, 2)), np.eye(4)
    to[:2, :2], to[:3, 3] = [[0, -1], [1, 0]], [len(image) - 1, 0, 0]
    again = deepbet.extract(flipped, affine @ to)
    np.testing.assert_array_equal(again.transpose(1, 0, 2)[::-1], brain)


@installed
def test_an_image_without_a_brain_is_refused():
    with pytest.raises(DataError, match="no contrast"):
        deepbet.extract(np.ones((20, 20, 20), np.float32), np.eye(4))


@installed
@pytest.mark.slow
def test_the_mask_of_real_images_agrees_with_that_of_the_b0(test_data):
    folder = test_data("uih_dti16") / "sub-02"
    image = nib.load(folder / "dwi/sub-02_acq-ortho_dir-PA_dwi.nii.gz")
    signal = np.asarray(image.dataobj, np.float32)
    b0, weighted = signal[..., 0], signal[..., 1:].mean(axis=-1)
    mask = median_otsu(b0)
    ratio = np.where(mask, (weighted / np.where(b0 > 0, b0, np.inf)).clip(0, 1), 0)
    anatomy = t1w.align(ratio, mask, image.affine, folder / "anat/sub-02_T1w.nii.gz")
    found = t1w.mask_from_t1w(anatomy, mask, image.affine)
    assert 2 * (found & mask).sum() / (found.sum() + mask.sum()) > 0.93
