"""Rigid registration of heads with folds, and the T1w image of someone else."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from bidsapp.registration import rigid
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import sample

SHAPE, SIZE = (44, 50, 40), 4.0
TURN, SHIFT = (5.0, -4.0, 8.0), np.array([6.0, -5.0, 8.0])


def affine():
    out = np.diag([-SIZE, SIZE, SIZE, 1])
    out[:3, 3] = -out[:3, :3] @ (np.array(SHAPE) - 1) / 2
    return out


def white(seed, symmetric=False):
    """(x, y, z) share of white matter, folded like nobody else's, and the brain mask."""
    points = world_points(SHAPE, affine())
    mask = (points**2 / np.array([66.0, 80, 60]) ** 2).sum(-1) < 1
    folds = gaussian_filter(np.random.default_rng(seed).standard_normal(SHAPE), 2)
    if symmetric:
        folds = folds + folds[::-1]
    depth = 0.6 - (points**2 / np.array([66.0, 80, 60]) ** 2).sum(-1)
    return 1 / (1 + np.exp(-6 * (depth + 0.7 * folds / folds.std()))) * mask, mask


def pose():
    """World of the diffusion images → world of the T1w image."""
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = Rotation.from_rotvec(TURN, degrees=True).as_matrix(), SHIFT
    return out


def t1w(share, mask, rng):
    """The head's T1w image in the other pose, on the same grid."""
    points = transform_points(np.linalg.inv(pose()), world_points(SHAPE, affine()))
    inside = sample(mask.astype(float), affine(), points) > 0.5
    image = 600 + 400 * sample(share, affine(), points) + 40 * rng.standard_normal(SHAPE)
    return np.where(inside, image, 0)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["same", "other", "symmetric"])
def test_a_head_is_told_from_its_mirror_image(rng, case):
    """The ratio is high for the same head only; a symmetric head says that it is one."""
    share, mask = white(1, case == "symmetric")
    fixed = np.where(mask, 0.5 - 0.25 * share + 0.03 * rng.standard_normal(SHAPE), 0).clip(0, 1)
    image = t1w(white(2)[0] if case == "other" else share, mask, rng)
    found = rigid.register(fixed, mask, affine(), image, affine())
    if case != "other":
        corners = np.array([[60.0, 0, 0], [-60, 0, 0], [0, 70, 20], [0, -70, 20], [0, 0, -50]])
        error = transform_points(found, corners) - transform_points(pose(), corners)
        assert np.linalg.norm(error, axis=1).max() < 1
    match = rigid.compare_to_mirror(fixed, mask, affine(), image, affine(), found)
    if case == "symmetric":
        assert match.ratio == pytest.approx(1, abs=0.1)
    else:
        assert (match.ratio > 1.3) if case == "same" else (match.ratio < 1.1)
    assert (match.symmetry > 0.9) == (case == "symmetric")
