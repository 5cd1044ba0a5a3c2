"""Noise laws against their closed forms. Means and variances must lie within 4 standard errors:
a right law fails one check in 16 000, and a mean off by 6 standard errors is missed in 2 % of
cases (at 400 000 samples, an error of 1 % of σ). Distributions by Kolmogorov–Smirnov, p > 1e-4."""

import numpy as np
import pytest
import torch
from dipy.sims.voxel import add_noise
from mpmath import mp
from scipy import stats

from bidsapp.simulate import noise

N = 400_000
KS = 40_000


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def flat(value, n=N):
    return torch.full((n, 1), float(value), dtype=torch.float64)


def close(values, mean, variance):
    """Mean and variance within 4 standard errors, the fourth moment taken from the sample."""
    n, centred = len(values), values - mean
    assert abs(values.mean() - mean) < 4 * (variance / n) ** 0.5
    assert abs((centred**2).mean() - variance) < 4 * ((centred**2).std() / n**0.5)


@pytest.mark.parametrize("signal", [0.0, 0.7, 5.0])
def test_gaussian(signal):
    values = noise.gaussian(flat(signal), 0.4, seeded()).numpy().ravel()
    close(values, signal, 0.16)
    assert stats.kstest(values[:KS], stats.norm(signal, 0.4).cdf).pvalue > 1e-4


@pytest.mark.parametrize("signal", [0.0, 0.3, 1.0, 8.0])
def test_rician(signal):
    sigma = 0.4
    values = noise.rician(flat(signal), sigma, seeded()).numpy().ravel()
    mean = noise.mean(signal, sigma)
    close(values, mean, signal**2 + 2 * sigma**2 - mean**2)
    law = stats.rice(signal / sigma, scale=sigma)
    assert mean == pytest.approx(law.mean(), rel=1e-6)
    assert stats.kstest(values[:KS], law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("signal", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("coils", [1, 4, 12])
def test_noncentral_chi(signal, coils):
    sigma = 0.5
    values = noise.noncentral_chi(flat(signal), sigma, coils, seeded()).numpy().ravel()
    mean = noise.mean(signal, sigma, coils)
    close(values, mean, signal**2 + 2 * coils * sigma**2 - mean**2)
    law = (stats.ncx2(2 * coils, (signal / sigma) ** 2) if signal else stats.chi2(2 * coils))
    assert stats.kstest((values[:KS] / sigma) ** 2, law.cdf).pvalue > 1e-4


@pytest.mark.parametrize("coils", [1, 4, 32])
def test_mean_in_higher_precision(coils):
    x = np.array([0, 0.1, 1, 5, 30, 300])
    with mp.workdps(40):
        expected = [float(mp.sqrt(2) * mp.gamma(coils + mp.mpf(1) / 2) / mp.gamma(coils)
                          * mp.hyp1f1(-0.5, coils, -mp.mpf(v) ** 2 / 2)) for v in x]
    np.testing.assert_allclose(noise.mean(2 * x, 2.0, coils), 2 * np.array(expected), rtol=1e-9)


@pytest.mark.parametrize("law", ["gaussian", "rician"])
def test_same_law_as_dipy(rng, law):
    ours = getattr(noise, law)(flat(0.5, KS), 0.25, seeded()).numpy().ravel()
    theirs = add_noise(np.full(KS, 0.5), 4.0, 1.0, noise_type=law, rng=rng)
    assert stats.ks_2samp(ours, theirs).pvalue > 1e-4


def test_noise_that_varies_in_space():
    """A σ per voxel: each voxel's SD is its own, and a voxel with σ = 0 stays clean."""
    sigma = torch.linspace(0, 2, 8, dtype=torch.float64)[:, None]
    values = noise.gaussian(torch.full((8, N // 8), 3.0, dtype=torch.float64), sigma, seeded())
    n = N // 8
    assert (values[0] == 3).all()
    ratio = values[1:].var(1).numpy() / sigma[1:, 0].numpy() ** 2
    np.testing.assert_allclose(ratio, 1, atol=4 * (2 / n) ** 0.5)


def test_complex_noise_has_its_phase_and_a_rician_magnitude():
    phase = torch.linspace(-3, 3, 8, dtype=torch.float64)[:, None]
    signal = torch.full((8, KS), 0.9, dtype=torch.float64)
    values = noise.complex_noise(signal, phase, 0.4, seeded())
    error = (values - torch.polar(signal, phase.expand(8, KS))).numpy()
    for part in (error.real, error.imag):
        close(part.ravel(), 0, 0.16)
    assert abs((error.real * error.imag).mean()) < 4 * 0.16 / error.size**0.5
    for row in values.abs().numpy():
        assert stats.kstest(row, stats.rice(0.9 / 0.4, scale=0.4).cdf).pvalue > 1e-4
    assert torch.equal(noise.complex_noise(signal, phase, 0.0, seeded()),
                       torch.complex(signal * torch.cos(phase), signal * torch.sin(phase)))


def grid():
    axes = [torch.linspace(-1, 1, n, dtype=torch.float64) for n in (7, 8, 9)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


@pytest.mark.parametrize("order", [1, 3])
def test_smooth_fields_are_polynomials_of_their_order(order):
    """All powers up to the order explain a field; those up to the order before do not."""
    field = noise.smooth_field(grid(), order, 4, seeded()).numpy()
    np.testing.assert_allclose(np.abs(field).max(0), 1)

    def unexplained(degree):
        powers = [(i, j, k) for i in range(degree + 1) for j in range(degree + 1)
                  for k in range(degree + 1) if i + j + k <= degree]
        design = np.stack([np.prod(grid().numpy() ** p, axis=1) for p in powers], 1)
        return np.abs(field - design @ np.linalg.lstsq(design, field, rcond=None)[0]).max()

    assert unexplained(order) < 1e-12
    assert unexplained(order - 1) > 1e-3


def test_phase_of_a_shot_is_a_plane_and_new_for_every_shot():
    position = grid()
    shot = torch.arange(len(position)) % 9  # z runs fastest: one shot per slice
    phase = noise.shot_phase(position, shot, 5, seeded(), offset=2.0, gradient=0.5)
    fits = []
    for i in range(9):
        rows = shot == i
        design = torch.cat([torch.ones(int(rows.sum()), 1), position[rows][:, :2]], 1).double()
        fit = torch.linalg.lstsq(design, phase[rows]).solution
        np.testing.assert_allclose(design @ fit, phase[rows], atol=1e-12)
        fits.append(fit)
    slopes = torch.stack(fits)[:, 1:]
    assert len(torch.unique(slopes)) == slopes.numel()
    many = noise.shot_phase(position[:1] * 0 + torch.tensor([1.0, 0, 0]), torch.zeros(1).long(), N,
                            seeded(), offset=2.0, gradient=0.5).numpy().ravel()
    close(many, 0, 2.0**2 / 3 + 0.25)


def test_the_generator_alone_decides():
    clean, position = flat(1.0, 99), grid()
    laws = [lambda g: noise.gaussian(clean, 0.1, g), lambda g: noise.rician(clean, 0.1, g),
            lambda g: noise.noncentral_chi(clean, 0.1, 4, g),
            lambda g: noise.complex_noise(clean, clean, 0.1, g),
            lambda g: noise.smooth_field(position, 2, 3, g),
            lambda g: noise.shot_phase(position, torch.zeros(len(position)).long(), 3, g)]
    for law in laws:
        first = law(seeded(1))
        torch.manual_seed(0)
        assert torch.equal(first, law(seeded(1)))
        assert not torch.equal(first, law(seeded(2)))
    assert (clean == 1).all()
