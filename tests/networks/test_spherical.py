"""Layers on the sphere: equivariance over random rotations, exactness, aliasing as stated."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.networks import spherical
from bidsapp.simulate import forward, odf

LEAKY = torch.nn.LeakyReLU(0.1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request):
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


def rotations(n, seed=0):
    return torch.tensor(Rotation.random(n, random_state=seed).as_matrix())


def turn(x, r):
    """Coefficients (coef, voxel, channel) of every function turned by r."""
    return sh.rotate(x.permute(1, 2, 0), r).permute(2, 0, 1)


def functions(l_max, voxels=7, channels=3, seed=1):
    """Random functions whose power falls with the degree as that of signals."""
    x = torch.randn(sh.size(l_max), voxels, channels,
                    generator=torch.Generator().manual_seed(seed))
    return x * torch.from_numpy(np.exp(-sh.degrees(l_max) / 3.0)).to(x.dtype)[:, None, None]


def departure(layer, x, r):
    """RMS of layer(R x) − R layer(x) relative to that of layer(x)."""
    with torch.no_grad():
        expected = layer(x)
        difference = layer(turn(x, r)) - turn(expected, r)
    return float(difference.square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.parametrize("degree", [8, 17, 23, 30, 59, 95])
def test_half_grid_integrates_products(degree):
    """Y_lm Y_l'm' over the sphere is 1 or 0 up to l + l' = degree; weights are positive."""
    points, weights = sh.half_grid(degree)
    np.testing.assert_allclose(np.linalg.norm(points, axis=1), 1, atol=1e-12)
    assert (weights > 0).all()
    assert weights.sum() == pytest.approx(4 * np.pi, rel=1e-12)
    low = sh.basis(degree // 4 * 2, points)
    np.testing.assert_allclose(low.T @ (weights[:, None] * low), np.eye(low.shape[1]), atol=1e-11)
    signs = points @ points.T
    assert (signs > -1 + 1e-9).all(), "a point and its antipode"


def test_half_grid_ends_somewhere():
    with pytest.raises(ValueError, match="95 is the highest"):
        sh.half_grid(96)


@pytest.mark.parametrize("r", rotations(3), ids=str)
def test_layers_are_equivariant(dtype, r):
    limit = 2e-6 if dtype == torch.float32 else 1e-13
    x = functions(8)
    convolution = spherical.ZonalConvolution(3, 5, 6)
    torch.nn.init.normal_(convolution.bias)
    assert departure(convolution, x, r) < limit
    assert departure(lambda x: spherical.truncate(x, 4), x, r) < limit
    quadratic = spherical.Pointwise(8, 8, function=torch.square)
    assert departure(quadratic, x, r) < limit
    for invariant in (spherical.mean, spherical.power):
        np.testing.assert_allclose(invariant(turn(x, r)), invariant(x), atol=10 * limit)


def test_grid_in_parts_gives_what_the_whole_does(monkeypatch):
    layer, x = spherical.Pointwise(8, 8, grid=23).double(), functions(8).double()
    whole = layer(x)
    monkeypatch.setattr(spherical, "CACHE", 5 * len(layer.to_grid))  # 21 columns by five
    torch.testing.assert_close(layer(x), whole)


def test_only_the_mean_may_carry_a_bias():
    """The same bias on every coefficient is caught by the test above."""
    x, r = functions(4), rotations(1)[0]
    assert departure(lambda x: x + 0.1, x, r) > 1e-2


def test_zonal_convolution_is_the_integral(rng):
    """Against ∫ h(n·n') f(n') dn' on a dense grid, with h = Σ (2l+1)/(4π) w_l P_l."""
    torch.set_default_dtype(torch.float64)
    x = functions(8, 1, 1)
    layer = spherical.ZonalConvolution(1, 1, 8, bias=False, scale=torch.ones(5))
    points, weights = sh.quadrature(40)
    legendre = np.zeros(9)
    legendre[::2] = (2 * np.arange(0, 9, 2) + 1) / (4 * np.pi) * (
        layer.weight.detach().numpy()[:, 0, 0])
    n = points[:5]
    h = np.polynomial.legendre.legval(n @ points.T, legendre)
    expected = h @ (weights * (sh.basis(8, points) @ x[:, 0, 0].numpy()))
    found = sh.basis(8, n) @ layer(x).detach().numpy()[:, 0, 0]
    torch.set_default_dtype(torch.float32)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_power_is_the_mean_square():
    """Σ_l (2l+1) power_l / 4π is the mean of f² over the sphere."""
    x = functions(6, 4, 1).double()
    points, weights = sh.quadrature(24)
    values = sh.basis(6, points) @ x[:, :, 0].numpy()
    by_degree = torch.einsum("dvc,d->v", spherical.power(x), torch.tensor([5.0, 9, 13]).double())
    total = by_degree + 4 * np.pi * spherical.mean(x)[:, 0] ** 2
    np.testing.assert_allclose(total, weights @ values**2, rtol=1e-12)


@pytest.mark.parametrize(("function", "degree", "points", "low", "high"), [
    (torch.nn.functional.silu, 17, 55, 8e-3, 1e-2),
    (torch.nn.functional.silu, 23, 97, 1.5e-4, 3e-4),
    (torch.nn.functional.silu, 29, 151, 0.7e-5, 1.3e-5),
    (torch.nn.functional.silu, 47, 385, 5e-10, 1e-9),
    (LEAKY, 17, 55, 2.5e-2, 4e-2), (LEAKY, 23, 97, 1e-2, 1.6e-2), (LEAKY, 29, 151, 5e-3, 9e-3),
    (LEAKY, 47, 385, 1.5e-3, 2.5e-3)])
def test_aliasing_is_what_the_docstring_says(function, degree, points, low, high):
    torch.set_default_dtype(torch.float64)
    layer = spherical.Pointwise(8, 8, grid=degree, function=function)
    torch.set_default_dtype(torch.float32)
    axes = rotations(100, 5)[:, :, :2].mT
    fibres = odf.watson(axes, torch.full((100, 2), 16.0).double(), 8).sum(1) / 2
    acquisition = Acquisition([0, 2200], [[0, 0, 0], [0, 0, 1]])
    like = torch.full((100,), 1.0).double()
    s = forward.Protocol(acquisition, 8, like).coefficients(
        fibres, forward.two_compartments(1.7 * like, 0.5 * like))[:, 0].T[:, :, None].clone()
    s[0] = 0
    s = s / (s.square().sum(0) / (4 * np.pi)).sqrt()
    turned = torch.stack([turn(layer(turn(s, r)), r.T) for r in rotations(30)])
    assert len(layer.to_grid) == points
    spread = turned.std(0).square().sum() / turned.mean(0).square().sum()
    assert low < float(spread.sqrt()) < high
