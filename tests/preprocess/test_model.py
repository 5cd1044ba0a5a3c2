"""Geometry and resample against volumes that are computed from equations alone."""

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import PhaseEncoding
from bidsapp.preprocess.model import Geometry, eddy_basis, eddy_basis_along, resample
from bidsapp.registration.geometry import world_points

SHAPE = (30, 32, 28)
EDDY = np.array([9.0, -12, 8, 10, 6, -7, 5, 8, -6, 7])


def oblique_affine():
    affine = np.eye(4)
    affine[:3, :3] = (Rotation.from_euler("xyz", (8, -5, 12), degrees=True).as_matrix()
                      * [-2.4, 2.2, 2.6])
    affine[:3, 3] = 31, -40, -28
    return affine


def head(points):
    """A smooth analytic image around (-6, -4, 8)."""
    a, b, c = np.moveaxis(points - np.array([-6.0, -4, 8]), -1, 0)
    return (80 * np.exp(-(a**2 + b**2 / 1.5 + c**2) / 500)
            + 30 * np.exp(-((a - 9)**2 + (b + 7)**2 + (c - 4)**2) / 120))


def susceptibility(points):
    """A smooth analytic field, Hz."""
    a, b, c = np.moveaxis(points - np.array([-2.0, 6, 4]), -1, 0)
    return 45 * np.exp(-(a**2 + b**2 + c**2) / 500) - 12


def forward(points, rotation, translation, shift, centre, eddy, field):
    """φ of some points, from the equation."""
    y = points @ rotation.T + translation
    hertz = eddy_basis(y, centre) @ eddy + (susceptibility(points) if field else 0)
    return y + hertz[..., None] * shift


def jacobian(function, points, step=1e-4):
    """∂φ/∂x of some points by central differences, (…, 3, 3)."""
    return np.stack([(function(points + d) - function(points - d)) / (2 * step)
                     for d in step * np.eye(3)], -1)


def scan(affine, shape, rotation, translation, shift, eddy, field):
    """Simulate a volume: at each voxel invert φ by Newton's method, and divide by det ∂φ/∂x."""
    centre = affine[:3, :3] @ ((np.array(shape) - 1) / 2) + affine[:3, 3]

    def phi(x):
        return forward(x, rotation, translation, shift, centre, eddy, field)

    target = world_points(shape, affine)
    x = (target - translation) @ rotation
    for _ in range(10):
        x = x - np.linalg.solve(jacobian(phi, x), (phi(x) - target)[..., None])[..., 0]
    assert np.abs(phi(x) - target).max() < 1e-8
    return head(x) / np.linalg.det(jacobian(phi, x))


@pytest.mark.parametrize("axis,sign", [(1, -1), (0, 1)])
def test_resample_inverts_the_acquisition(axis, sign):
    """A volume that was moved and distorted becomes the reference again."""
    affine, encoding = oblique_affine(), PhaseEncoding(axis, sign, 0.05)
    rotation = Rotation.from_rotvec([4, -3, 5], degrees=True).as_matrix()
    translation = np.array([2.0, -1.5, 1.2])
    shift = sign * 0.05 * affine[:3, axis]
    volume = scan(affine, SHAPE, rotation, translation, shift, EDDY, True)
    field = susceptibility(world_points(SHAPE, affine)).astype(np.float32)
    geometry = Geometry(affine, SHAPE, (encoding,), rotation[None], translation[None], EDDY[None],
                        field)
    truth = head(world_points(SHAPE, affine))
    (out,) = resample([volume.astype(np.float32)], geometry, SHAPE, affine)
    inner = (slice(5, -5),) * 3
    assert np.abs(volume - truth)[inner].max() > 15  # there is something to correct
    assert np.abs(out - truth)[inner].max() < 0.35
    assert np.sqrt(np.mean((out - truth)[inner]**2)) < 0.06

    # To another space and another grid in the same call. Between voxels the error of ∂h is that of
    # central differences and of linear interpolation, (1/6 + 3/8) (2.4 mm)² |h'''| T s S < 0.6.
    to_reference = np.eye(4)
    to_reference[:3, :3] = Rotation.from_rotvec([20, 10, -30], degrees=True).as_matrix()
    to_reference[:3, 3] = 3, 2, -4
    grid = np.diag([3.1, 2.9, 3.0, 1])
    grid[:3, 3] = -24, -20, -10
    points = world_points((12, 13, 11), grid) @ to_reference[:3, :3].T + to_reference[:3, 3]
    for mapping in (to_reference, lambda p: p @ to_reference[:3, :3].T + to_reference[:3, 3]):
        (out,) = resample([volume], geometry, (12, 13, 11), grid, to_reference=mapping)
        at, _ = geometry.coordinates(0, points)
        inner = np.all((at > 4) & (at < np.array(SHAPE) - 5), axis=-1)
        assert inner.sum() > 500
        assert np.abs(out - head(points))[inner].max() < 0.6
        assert np.sqrt(np.mean((out - head(points))[inner]**2)) < 0.2


def test_intensity_factor_is_the_determinant(rng):
    affine, rotation = oblique_affine(), Rotation.from_rotvec([0.1, 0.2, -0.15]).as_matrix()
    field = susceptibility(world_points(SHAPE, affine)).astype(np.float32)
    geometry = Geometry(affine, SHAPE, (PhaseEncoding(1, 1, 0.04),), rotation[None],
                        np.array([[1.0, 2, 3]]), EDDY[None], field)
    points = world_points(SHAPE, affine)[8:-8, 8:-8, 8:-8].reshape(-1, 3)
    shift = 0.04 * affine[:3, 1]
    determinant = np.linalg.det(jacobian(
        lambda x: forward(x, rotation, [1, 2, 3], shift, geometry.centre, EDDY, True), points))
    _, factor = geometry.coordinates(0, points)
    assert np.ptp(determinant) > 0.15
    # central differences of a field on a grid of 2.4 mm
    np.testing.assert_allclose(factor, determinant, atol=0.012)

    at, _ = geometry.coordinates(0, points)
    world = at @ affine[:3, :3].T + affine[:3, 3]
    np.testing.assert_allclose(geometry.reference_points(0, world), points, atol=1e-3)


def test_eddy_derivatives(rng):
    points, centre, direction = rng.normal(size=(50, 3)) * 60, np.ones(3), np.array([0.6, 0, 0.8])
    h = 1e-3
    difference = (eddy_basis(points + h * direction, centre)
                  - eddy_basis(points - h * direction, centre)) / (2 * h)
    np.testing.assert_allclose(eddy_basis_along(points, centre, direction), difference, atol=1e-9)


def test_positive_field_moves_signal_along_the_encoding():
    """BIDS: with j a positive field of 1 / T Hz moves signal to the next higher index."""
    volume = np.zeros((5, 9, 5), np.float32)
    volume[2, 5, 2] = 7
    affine = np.diag([2.0, 3, 2, 1])
    for sign, index in ((1, 4), (-1, 6)):
        geometry = Geometry.static(affine, volume.shape, [PhaseEncoding(1, sign, 0.04)],
                                   np.full(volume.shape, 25, np.float32))
        (out,) = resample([volume], geometry, volume.shape, affine)
        assert np.unravel_index(out.argmax(), out.shape) == (2, index, 2)
        assert out.max() == pytest.approx(7)


def test_identity_edges_and_complex(rng):
    volume = rng.random((6, 7, 5)).astype(np.float32) + 1
    phase = np.exp(1j * rng.random(volume.shape)).astype(np.complex64)
    affine = oblique_affine()
    geometry = Geometry.static(affine, volume.shape, [None, None])
    same, twisted = resample([volume, volume * phase], geometry, volume.shape, affine)
    np.testing.assert_allclose(same, volume, atol=1e-5)
    np.testing.assert_allclose(twisted, volume * phase, atol=1e-5)

    moved = affine.copy()
    moved[:3, 3] = affine[:3, :3] @ [-0.4, 0, 0] + affine[:3, 3]
    kept = next(resample([volume, volume], geometry, volume.shape, moved))
    np.testing.assert_allclose(kept[0], volume[0], atol=1e-5)  # the edge, continued
    moved[:3, 3] = affine[:3, :3] @ [-0.6, 0, 0] + affine[:3, 3]
    assert (next(resample([volume, volume], geometry, volume.shape, moved))[0] == 0).all()


def test_negative_values_belong_to_real_signals_only(rng):
    impulse = np.zeros((9, 9, 9), np.float32)
    impulse[4, 4, 4] = 1
    half = np.eye(4)
    half[:3, 3] = 0.5
    geometry = Geometry.static(np.eye(4), impulse.shape, [None, None])
    magnitude, real = resample([impulse, impulse - 1e-6], geometry, impulse.shape, half)
    assert magnitude.min() == 0
    assert real.min() < -0.01


@pytest.mark.parametrize("change,message", [
    ({"rotations": 2 * np.eye(3)[None]}, "orthogonal"),
    ({"rotations": -np.eye(3)[None]}, "proper"),
    ({"translations": np.zeros((2, 3))}, "translations"),
    ({"eddy": np.full((1, 10), np.nan)}, "eddy must be finite"),
    ({"eddy": np.ones((1, 10)), "encodings": (None,)}, "readout time is unknown"),
    ({"field": np.zeros((3, 3, 3)), "encodings": (PhaseEncoding(1, 1),)}, "readout time"),
    ({"field": np.zeros((3, 3, 2))}, "field must be"),
])
def test_refuses(change, message):
    given = {"affine": np.eye(4), "shape": (3, 3, 3), "encodings": (PhaseEncoding(1, 1, 0.05),),
             "rotations": np.eye(3)[None], "translations": np.zeros((1, 3)),
             "eddy": np.zeros((1, 10))} | change
    with pytest.raises(ValueError, match=message):
        Geometry(**given)


def test_refuses_other_volumes():
    geometry = Geometry.static(np.eye(4), (3, 3, 3), [None])
    with pytest.raises(ValueError, match="shape"):
        list(resample([np.zeros((3, 3, 2))], geometry, (3, 3, 3), np.eye(4)))
    with pytest.raises(ValueError, match="longer"):
        list(resample([np.zeros((3, 3, 3))] * 2, geometry, (3, 3, 3), np.eye(4)))
