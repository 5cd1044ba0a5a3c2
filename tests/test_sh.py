"""Spherical harmonics against dipy's and against integrals over the sphere."""

import numpy as np
import pytest
import torch
from dipy.reconst.shm import smooth_pinv
from scipy.spatial.transform import Rotation

from bidsapp import sh


def directions(n, rng):
    g = rng.normal(size=(n, 3))
    return g / np.linalg.norm(g, axis=1, keepdims=True)


@pytest.mark.parametrize("l_max", [0, 2, 8, 16])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-13), (torch.float32, 5e-6)])
def test_evaluate_is_dipys_basis(rng, l_max, dtype, error):
    g = np.concatenate([directions(50, rng), np.eye(3), -np.eye(3)])
    ours = sh.evaluate(l_max, torch.tensor(g, dtype=dtype)).numpy()
    np.testing.assert_allclose(ours, sh.basis(l_max, g), atol=error)


def test_evaluate_is_differentiable(rng):
    g = torch.tensor(directions(4, rng), requires_grad=True)
    assert torch.autograd.gradcheck(lambda n: sh.evaluate(4, n), g)


@pytest.mark.parametrize("degree", [4, 9, 16, 32])
def test_quadrature_is_exact_up_to_its_degree(degree):
    """The integral of x^a y^b z^c over the sphere, by its formula in Gamma functions."""
    from scipy.special import gamma

    points, weights = sh.quadrature(degree)
    assert (points[:, 2] >= 0).all()
    for a in range(0, degree + 1, 2):
        for b in range(0, degree - a + 1, 2):
            c = (degree - a - b) // 2 * 2
            half = (np.array([a, b, c]) + 1) / 2
            np.testing.assert_allclose(weights @ np.prod(points ** [a, b, c], axis=1),
                                       2 * np.prod(gamma(half)) / gamma(half.sum()), atol=1e-12)


def test_orthonormal():
    points, weights = sh.quadrature(16)
    b = sh.basis(8, points)
    np.testing.assert_allclose(b.T @ (b * weights[:, None]), np.eye(45), atol=1e-13)


@pytest.mark.parametrize("l_max", [2, 8, 12])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_rotated_function_is_the_function_at_turned_directions(rng, l_max, dtype, error):
    """(R f)(n) = f(R⁻¹ n), with dipy's basis, for one rotation of all and for one of each."""
    c, g = rng.normal(size=(7, sh.size(l_max))), directions(40, rng)
    turns = Rotation.random(7, random_state=3).as_matrix()
    as_tensor = torch.tensor(c, dtype=dtype)
    each = sh.rotate(as_tensor, torch.tensor(turns)).numpy()
    for i, turn in enumerate(turns):
        expected = sh.basis(l_max, g @ turn) @ c.T  # rows of g @ R are R⁻¹ n
        np.testing.assert_allclose(sh.basis(l_max, g) @ each[i], expected[:, i],
                                   atol=error * np.abs(expected).max())
        every = sh.rotate(as_tensor, torch.tensor(turn)).numpy()
        np.testing.assert_allclose(sh.basis(l_max, g) @ every.T, expected,
                                   atol=error * np.abs(expected).max())


def test_rotation_keeps_the_power_of_each_degree_and_composes(rng):
    c = torch.tensor(rng.normal(size=(5, 45)))
    a, b = torch.tensor(Rotation.random(2, random_state=1).as_matrix())
    np.testing.assert_allclose(sh.rotate(sh.rotate(c, a), b), sh.rotate(c, b @ a), atol=1e-12)
    for l in range(0, 9, 2):
        part = torch.as_tensor(sh.degrees(8) == l)
        np.testing.assert_allclose((sh.rotate(c, a)[:, part] ** 2).sum(1),
                                   (c[:, part] ** 2).sum(1), rtol=1e-12)


def test_one_value_per_degree_becomes_one_per_coefficient():
    values = torch.arange(10.0).reshape(2, 5)
    np.testing.assert_array_equal(sh.per_coefficient(values), values[:, sh.degrees(8) // 2])


@pytest.mark.parametrize("smoothing", [0.0, 0.006])
def test_fit_is_least_squares_with_laplace_beltrami(rng, smoothing):
    """Coefficients come back from noise-free samples; with a penalty, dipy's pseudo-inverse."""
    g = directions(60, rng)
    ours = sh.smooth_fit(6, g, smoothing)
    l = sh.degrees(6)
    theirs = smooth_pinv(sh.basis(6, g), np.sqrt(smoothing) * l * (l + 1))
    np.testing.assert_allclose(ours, theirs, atol=1e-9)
    if not smoothing:
        c = rng.normal(size=28)
        np.testing.assert_allclose(ours @ sh.basis(6, g) @ c, c, atol=1e-10)


def test_refusals(rng):
    with pytest.raises(ValueError, match="20 directions do not determine 28"):
        sh.smooth_fit(6, directions(20, rng))
    with pytest.raises(ValueError, match="no even degree has 44 coefficients"):
        sh.l_max_of(44)
    assert [sh.l_max_of(sh.size(l)) for l in (0, 2, 8, 16)] == [0, 2, 8, 16]
