"""ACPC: the brain of MNI152, turned, moved and scaled, against what was done to it."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bidsapp.registration import acpc
from bidsapp.registration.geometry import world_points
from bidsapp.registration.image import Image


@pytest.mark.slow
@pytest.mark.parametrize("turn,shift,scale", [
    ((12, -8, 15), (8, -14, 20), (1, 1, 1)),
    ((-10, 6, -12), (-5, 10, -15), (1.06, 0.94, 1.03)),
])
def test_the_pose_is_found(turn, shift, scale):
    """Within 1° and 1 mm; the size of the head is not changed."""
    whole = acpc.template()
    rotation = Rotation.from_rotvec(turn, degrees=True).as_matrix()
    affine, shape = np.diag([-2.2, 2.4, 2.6, 1]), (100, 110, 92)
    affine[:3, 3] = -affine[:3, :3] @ (np.array(shape) - 1) / 2 + shift + np.array([0, -15, 5])
    points = (world_points(shape, affine) - shift) @ rotation / scale
    rng = np.random.default_rng(3)
    brain = Image(whole.at(points) ** 1.5 * (1 + 0.05 * rng.standard_normal(shape)), affine)
    found = acpc.align(brain, whole)
    np.testing.assert_allclose(found[:3, :3] @ found[:3, :3].T, np.eye(3), atol=1e-9)
    assert np.linalg.det(found[:3, :3]) == pytest.approx(1)
    error = Rotation.from_matrix(found[:3, :3].T @ rotation).magnitude()
    assert np.degrees(error) < 1
    assert np.linalg.norm(found[:3, 3] - shift) < 1


def test_the_grid_holds_the_template():
    shape, affine = acpc.grid()
    whole = acpc.template()
    first, last = (whole.affine @ [*np.argwhere(whole.values > 0).T[:, i], 1] for i in (0, -1))
    for point in (first, last):
        index = np.linalg.inv(affine) @ point
        assert np.all(index[:3] >= 0) and np.all(index[:3] < shape)
    np.testing.assert_allclose(whole.affine[:3, 3], affine[:3, 3])
