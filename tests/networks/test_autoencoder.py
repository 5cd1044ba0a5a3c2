"""Layers of the denoising autoencoder: what they compute, and how far rotations pass through."""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import sh, training
from bidsapp.networks import autoencoder
from bidsapp.networks.autoencoder import LocalConvolution, TableConvolution, ring_samples
from bidsapp.networks.builder import build_network

L = 8
COMBINATIONS = [(layer, f, space) for layer, f, space in itertools.product(
    autoencoder.LAYERS, autoencoder.NONLINEARITIES, autoencoder.SPACES)
    if space == "signal" or not autoencoder.needs_table(layer)]


def directions(n, seed=0):
    points = np.random.default_rng(seed).normal(size=(n, 3))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def example(network_shells, axes, coefficients, noise=0.02):
    """Inputs of a network for functions (voxel, shell, coefficient) along axes (n, 3)."""
    basis = torch.from_numpy(sh.basis(L, axes)).float()
    fit = torch.linalg.pinv(basis)  # without smoothing, which would depend on the directions
    signal = coefficients @ basis.T
    voxels = len(signal)
    shells = torch.tensor([[b, 1.0, len(axes)**-0.5] for b in (1.0, 2.5)[:network_shells]])
    return (signal, torch.full((voxels, 2), noise), shells[None],
            fit.expand(1, network_shells, -1, -1), basis.expand(1, network_shells, -1, -1))


def smooth_functions(voxels, shells, seed=1):
    """Coefficients like those of signals of crossing fibres: all degrees, mean 0.4."""
    rng = np.random.default_rng(seed)
    l = sh.degrees(L)
    c = rng.normal(size=(voxels, shells, len(l))) * 0.25 * np.exp(-0.5 * l)
    c[..., 0] = 0.4 * math.sqrt(4 * math.pi)
    return torch.from_numpy(c).float()


def build(layer, function, space, axes, shells=2, grid=21, shortcut=False):
    with training.seeded(3):
        network = build_network({
            "architecture": "autoencoder", "layer": layer, "nonlinearity": function,
            "space": space, "widths": [8, 4, 8], "shells": shells, "grid": grid,
            "shortcut": shortcut, "directions": len(axes)})
        for p in network.parameters():  # biases start at 0, where they could not be wrong
            p.data += 0.1 * torch.randn(p.shape)
    return network.eval()


def rotation_error(layer, function, space, shells=2, grid=21, shortcut=False):
    """Largest ‖rotated back − not rotated‖ / ‖not rotated‖ of degrees 2–8 of the output, over
    rotations of the object."""
    axes = np.concatenate([directions(40), sh.half_grid(17)[0]])
    network = build(layer, function, space, axes, shells, grid, shortcut)
    c = smooth_functions(16, 2)
    inputs = example(2, axes, c)
    turns = Rotation.random(3, rng=np.random.default_rng(4)).as_matrix()
    with torch.no_grad():
        fit = inputs[3][0, 0]
        plain = network(*inputs) @ fit.T
        errors = []
        for turn in turns:
            rotated = network(*example(2, axes, sh.rotate(c, torch.from_numpy(turn)))) @ fit.T
            back = sh.rotate(rotated, torch.from_numpy(turn.T))
            errors.append(float((back - plain)[..., 1:].norm() / plain[..., 1:].norm()))
    return max(errors)


@pytest.mark.parametrize("layer,function,space", COMBINATIONS)
def test_shape_and_gradient(layer, function, space):
    axes = directions(30)
    network = build(layer, function, space, axes).train()
    out = network(*example(2, axes, smooth_functions(6, 2)))
    assert out.shape == (6, 2, 30) and torch.isfinite(out).all()
    out.square().sum().backward()
    for name, p in network.named_parameters():
        assert p.grad is not None and torch.isfinite(p.grad).all(), name
        assert p.grad.any() or function == "relu", name  # it may cut off all channels of a layer


@pytest.mark.parametrize("layer", ["zonal", "local"])
def test_any_shells(layer):
    """Two tables of one and two shells; a padded shell and padded directions change nothing."""
    axes = directions(30)
    network = build(layer, "relu", "signal", axes, shells=0)
    c = smooth_functions(4, 2)
    one = example(1, axes, c[:, :1])
    out = network(*one)
    pad = [(0, 3, 0, 1), None, (0, 0, 0, 1), (0, 3, 0, 0, 0, 1), (0, 0, 0, 3, 0, 1)]
    padded = [x if p is None else torch.nn.functional.pad(x, p)
              for x, p in zip(one, pad, strict=True)]
    again = network(*padded)
    torch.testing.assert_close(again[:, :1, :30], out, atol=1e-5, rtol=1e-5)
    assert not again[:, :, 30:].any() and not again[:, 1:].any()
    other = network(*example(2, axes, c))[:, 0]
    assert (other - out[:, 0]).abs().max() > 1e-2 * out.abs().max()


@pytest.mark.parametrize("shells", [2, 0])
@pytest.mark.parametrize("function", autoencoder.NONLINEARITIES)
def test_zonal_layers_are_equivariant(function, shells):
    """Up to the aliasing of the nonlinearity, which falls with the points of the grid."""
    assert autoencoder.is_equivariant("zonal", "signal")
    fine = rotation_error("zonal", function, "signal", shells, grid=95)
    assert fine < 0.01
    assert rotation_error("zonal", function, "signal", shells, grid=95, shortcut=True) < 0.01
    if function == "relu":  # the others are smooth, and near rounding
        assert rotation_error("zonal", function, "signal", shells, grid=47) > 3 * fine


@pytest.mark.parametrize("layer,function,space",
                         [c for c in COMBINATIONS if not autoencoder.is_equivariant(c[0], c[2])
                          and c[1] != "sigmoid"])
def test_other_layers_claim_nothing(layer, function, space):
    assert rotation_error(layer, function, space, grid=95) > 0.05


def test_bias_at_degree_0_only():
    """The layers that claim equivariance map the constant function to constant functions."""
    axes = sh.half_grid(17)[0]
    network = build("zonal", "relu", "signal", axes)
    c = smooth_functions(3, 2)
    c[..., 1:] = 0
    with torch.no_grad():
        out = network(*example(2, axes, c))
    assert (out - out[..., :1]).abs().max() < 1e-5


def test_shortcut_adds_shares_of_the_fit_and_of_its_residual():
    """Share 1 of all: what the network adds to the measured signal itself."""
    axes = directions(30)
    basis = torch.from_numpy(sh.basis(L, axes)).float()
    signal, noise, shells, _, _ = example(2, axes, smooth_functions(3, 2))
    fit = torch.from_numpy(sh.smooth_fit(L, axes, autoencoder.SMOOTHING)).float()
    inputs = (signal, noise, shells, fit.expand(1, 2, -1, -1), basis.expand(1, 2, -1, -1))
    network = build("zonal", "relu", "signal", axes, shortcut=True)
    last = network.shares[-1]

    def output(*shares):
        with torch.no_grad():
            last.weight.zero_()
            last.bias[:] = torch.logit(torch.tensor(shares), eps=1e-7)
            return network(*inputs)

    none = output(*[0.0] * 6)
    torch.testing.assert_close(output(*[1.0] * 6) - none, signal, atol=1e-5, rtol=1e-5)
    x = signal @ fit.T
    residual = signal - x @ basis.T
    torch.testing.assert_close(output(0, 0, 0, 0, 0, 0.5) - none, residual / 2, atol=1e-5,
                               rtol=1e-5)
    second = x[..., 1:6] @ basis[:, 1:6].T
    torch.testing.assert_close(output(0, 0.5, 0, 0, 0, 0) - none, second / 2, atol=1e-5,
                               rtol=1e-5)


def test_ring():
    points = torch.from_numpy(np.concatenate([directions(20), np.eye(3)]))
    samples = ring_samples(points)
    assert samples.shape == (6, 23, 3)
    torch.testing.assert_close(samples[0], points)
    torch.testing.assert_close(samples.norm(dim=2), torch.ones(6, 23, dtype=torch.float64))
    cosine = (samples[1:] * points).sum(2)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(math.pi / 10)))
    # five samples, evenly spaced: their mean lies on the axis
    mean = samples[1:].mean(0)
    torch.testing.assert_close(mean, math.cos(math.pi / 10) * points)


@pytest.mark.parametrize("channels", [(1, 1), (2, 3), (3, 2)])
def test_local_convolution_is_its_formula(channels):
    """a_d(n) = Σ_c w_0,cd f_c(n) + Σ_k w_k,cd f_c(n_k) + bias_d, and the fit of a."""
    channels_in, channels_out = channels
    layer = LocalConvolution(channels_in, channels_out, 2, grid=9)
    layer.bias.data += torch.arange(1.0, 1 + channels_out)
    c = torch.randn(6, 4, channels_in, generator=torch.Generator().manual_seed(0))
    points, weights = sh.half_grid(9)
    samples = ring_samples(torch.tensor(points)).numpy()
    f = np.stack([np.einsum("nk,kvc->nvc", sh.basis(2, s), c.numpy()) for s in samples])
    w = layer.weight.detach().numpy().reshape(6, channels_in, channels_out)
    a = np.einsum("knvc,kcd->nvd", f, w) + layer.bias.detach().numpy()
    penalty = 0.006 * (sh.degrees(2) * (sh.degrees(2) + 1.0)) ** 2
    evenly = len(points) / (4 * math.pi)  # B'B of points that are spread evenly
    back = evenly * sh.basis(2, points).T * weights / (evenly + penalty)[:, None]
    np.testing.assert_allclose(layer(c).detach(), np.einsum("kn,nvd->kvd", back, a), atol=1e-5)


def test_local_convolution_with_equal_weights_is_nearly_zonal():
    """Only the first sample of the ring breaks the symmetry; with equal weights on five samples
    functions up to degree 4 are averaged as on the whole ring."""
    layer = LocalConvolution(1, 1, 4, grid=21)
    with torch.no_grad():
        layer.weight[:] = torch.tensor([0.3, *[0.2] * 5])[:, None]
        turn = torch.from_numpy(Rotation.from_euler("xyz", [1, 2, 3]).as_matrix())
        c = torch.randn(15, 1, 1, generator=torch.Generator().manual_seed(0))
        one = sh.rotate(layer(c)[:, 0, 0], turn)
        other = layer(sh.rotate(c[:, 0, 0], turn)[:, None, None])[:, 0, 0]
        assert (one - other).norm() < 2e-3 * one.norm()
        layer.weight[:, 0] = torch.tensor([0.3, 0.6, 0, 0.2, 0.2, 0])
        one = sh.rotate(layer(c)[:, 0, 0], turn)
        other = layer(sh.rotate(c[:, 0, 0], turn)[:, None, None])[:, 0, 0]
        assert (one - other).norm() > 2e-2 * one.norm()


def test_table_convolution_is_circular():
    layer = TableConvolution(2, 3)
    x = torch.randn(4, 2, 12, generator=torch.Generator().manual_seed(0))
    out = layer(x)
    assert out.shape == (4, 3, 12)
    torch.testing.assert_close(layer(x.roll(5, 2)), out.roll(5, 2))


@pytest.mark.parametrize("arguments", [
    {"layer": "conv"}, {"nonlinearity": "gelu"}, {"space": "fourier"},
    {"layer": "signal", "space": "coefficient", "shells": 2}, {"layer": "connected"}])
def test_refuses_what_there_is_not(arguments):
    with pytest.raises(ValueError, match="layer"):
        build_network({"architecture": "autoencoder", **arguments})
