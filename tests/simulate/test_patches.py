"""Patches of random tissue: signals against their equations, noise against its moments."""

import math

import numpy as np
import pytest
import torch

from bidsapp import sh
from bidsapp.simulate import forward, noise, patches, protocols


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_positions_are_centred():
    x = patches.positions(3)
    np.testing.assert_array_equal(x[13], [0, 0, 0])
    np.testing.assert_array_equal(x[0], [-1, -1, -1])
    np.testing.assert_array_equal(x[1], [-1, -1, 0])  # C order


def test_signals_are_those_of_the_equation(monkeypatch):
    """Zeppelins without dispersion: S(g) = S0 Σ_k u_k Σ_f share_f exp(−b g·D g), at low b, where
    the degrees above L_MAX are below 1e-6."""
    monkeypatch.setattr(patches, "CONTRAST", (1.0, 1.0))
    count, materials, bundles = 3, patches.MATERIALS, patches.BUNDLES
    rng = np.random.default_rng(1)
    axes = rng.normal(size=(count, materials * bundles, patches.SIZE**3, 3))
    axes /= np.linalg.norm(axes, axis=-1, keepdims=True)
    share = rng.dirichlet(np.ones(materials), (count, patches.SIZE**3)).transpose(0, 2, 1)
    parts = rng.dirichlet(np.ones(bundles + 1), (count, materials, patches.SIZE**3)).transpose(
        0, 1, 3, 2)
    diffusivities = rng.uniform(1, 2, (2, count * materials))
    put = {"_axes": axes, "_material_shares": share,
           "_zonal": np.ones((count, materials, bundles, patches.L_MAX // 2 + 1))}
    for name, value in put.items():
        monkeypatch.setattr(patches, name, lambda *_, value=value: torch.tensor(value).float())
    monkeypatch.setattr(patches, "_bundle_shares", lambda *_: (
        torch.tensor(parts[:, :, :bundles]).float(), torch.tensor(parts[:, :, bundles]).float()))
    monkeypatch.setattr(patches, "_compartments", lambda *_: [forward.zeppelin(
        torch.ones(count * materials), *torch.tensor(diffusivities).float())])
    b = torch.tensor([[0.0, 0.6]] * count)
    drawn = patches.draw(b, 1, generator())
    g = rng.normal(size=(20, 3))
    g /= np.linalg.norm(g, axis=1, keepdims=True)
    found = drawn.coefficients[:, 0, :, 1].numpy() @ sh.basis(patches.L_MAX, g).T
    cosine = (axes @ g.T).reshape(count, materials, bundles, -1, len(g))
    a, r = (v.reshape(count, materials, 1, 1, 1) for v in diffusivities)
    fibre = np.exp(-0.6 * (r + (a - r) * cosine**2))
    # the mean over directions of a zeppelin: ∫ exp(−b (r + (a − r) t²)) dt
    t, w = np.polynomial.legendre.leggauss(40)
    mean = (np.exp(-0.6 * (r + (a - r) * t**2)) * w / 2).sum(-1, keepdims=True)[:, :, 0]
    attenuation = ((parts[:, :, :bundles, :, None] * fibre).sum(2)
                   + parts[:, :, bundles, :, None] * mean)
    # all materials have the same S0, which varies from voxel to voxel
    expected = drawn.s0[:, 0, :, None].numpy() * (share[..., None] * attenuation).sum(1)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(drawn.coefficients[:, 0, :, 0, 0] / math.sqrt(4 * math.pi),
                               drawn.s0[:, 0], rtol=1e-5)


def test_expected_magnitude_is_that_of_rician_noise():
    signal, sigma = torch.linspace(0, 1, 30).double(), torch.full((30,), 0.08, dtype=torch.float64)
    np.testing.assert_allclose(patches.expected_magnitude(signal, sigma),
                               noise.mean(signal.numpy(), 0.08), rtol=1e-10)


def test_patches_are_of_every_kind():
    """Some are homogeneous, some have sharp borders; signals lie between 0 and S0."""
    drawn = patches.draw(torch.tensor([[1.0, 3.0]] * 4), 50, generator(2))
    assert drawn.coefficients.shape == (4, 50, 64, 2, sh.size(patches.L_MAX))
    g = protocols.spread(30)
    s = (drawn.coefficients @ torch.from_numpy(sh.basis(patches.L_MAX, g).T).float()) / drawn.s0[
        ..., None, None]
    assert s.min() > -0.02 and s.max() < 1.02
    assert (s[..., 1, :].mean(-1) <= s[..., 0, :].mean(-1) + 1e-5).all()
    spread = drawn.s0.std(-1) / drawn.s0.mean(-1)
    assert (spread < 0.05).float().mean() > 0.15 and (spread > 0.2).float().mean() > 0.15


@pytest.mark.parametrize("magnitude", [True, False])
def test_noise_has_its_moments(magnitude, monkeypatch):
    """Mean and SD over many patches of the same signal; the noise of neighbours is correlated."""
    for name, value in {"CORRELATED": 1.1, "LOCAL_NOISE": 0.0, "RESIDUAL": 0.0,
                        "BAD": 0.0}.items():
        monkeypatch.setattr(patches, name, value)
    groups, count, sigma = 6, 200, 0.2
    stack = protocols.draw(groups, generator(3), l_max=patches.L_MAX, shells=(1, 1),
                           directions=(6, 6), b0=(4, 4), s0_known=0.0)
    flat = torch.zeros(groups, count, 64, 2, sh.size(patches.L_MAX))
    flat[..., 0] = 0.5 * math.sqrt(4 * math.pi)
    signal, b0 = patches.measure(
        patches.Patches(torch.ones(groups, count, 64), flat), stack, torch.full((groups,), sigma),
        torch.full((groups,), magnitude), generator(4))
    signal = signal[:, :, :, 0].numpy()
    expected = noise.mean(0.5, sigma) if magnitude else 0.5
    assert signal.mean() == pytest.approx(expected, abs=2e-3)
    second = 0.25 + (2 if magnitude else 1) * sigma**2
    assert np.square(signal).mean() == pytest.approx(second, rel=5e-3)
    assert b0.std().item() == pytest.approx(sigma / 2, rel=0.02)
    deviation = b0 - b0.mean()
    volume = deviation.view(groups, count, 4, 4, 4)
    rho = torch.stack([
        (volume.narrow(axis, 0, 3) * volume.narrow(axis, 1, 3)).mean((1, 2, 3, 4))
        for axis in (2, 3, 4)]) / volume.square().mean((1, 2, 3, 4))
    assert -0.03 < rho.min() < 0.2 and 0.3 < rho.max() < patches.CORRELATION + 0.03


def test_correlation_of_noise_falls_with_the_distance(monkeypatch):
    """Along each axis it is ρ^k at the distance k, and the product of those of the axes elsewhere;
    the variance is 1."""
    monkeypatch.setattr(patches, "CORRELATED", 1.1)
    mixing = patches._noise_mixing(5, generator(6))
    found = (mixing @ mixing.mT).reshape(5, 4, 4, 4, 4, 4, 4)
    rho = torch.stack([found[:, 0, 0, 0, 1, 0, 0], found[:, 0, 0, 0, 0, 1, 0],
                       found[:, 0, 0, 0, 0, 0, 1]], 1)
    assert rho.min() >= 0 and 0.3 < rho.max() < patches.CORRELATION
    lag = (patches.positions()[:, None] - patches.positions()).abs()
    expected = (rho[:, None, None] ** lag).prod(-1)
    torch.testing.assert_close(found.reshape(5, 64, 64), expected, rtol=1e-4, atol=1e-6)


def test_volumes_have_gains_and_displacements(monkeypatch):
    """A ramp along the first axis shows both: the changes of a volume are linear in the position,
    and of mean 0 over volumes."""
    for name, value in {"RESIDUAL": 1.1, "GAIN": 0.05}.items():
        monkeypatch.setattr(patches, name, value)
    ramp = 1 + 0.1 * patches.positions()[:, 0]
    clean = ramp[:, None, None].expand(8, 50, 64, 1, 20)
    change = (patches._add_residual(clean, generator(5)) - clean)[..., 0, :].movedim(2, 3)
    design = torch.stack([ramp, torch.full_like(ramp, 0.1)], 1)
    found = torch.linalg.lstsq(design, change.flatten(0, 2).T).solution  # gain, displacement
    np.testing.assert_allclose(design @ found, change.flatten(0, 2).T, atol=1e-6)
    for values, high in zip(found, (patches.GAIN, patches.SHIFT), strict=True):
        sd = values.view(8, -1).std(1)
        assert 0.2 * high < sd.max() < 1.05 * high
        assert values.mean().abs() < 0.1 * high
