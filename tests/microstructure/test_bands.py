"""Estimates hold in bands of dispersion, SNR and acquisition, not only on average."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from bidsapp import methods, selection, sh
from bidsapp.microstructure import learn, maps
from bidsapp.networks.scnn import Estimate
from bidsapp.simulate import odf
from bidsapp.simulate.bands import ACQUISITIONS, Band, bands, other_bands
from bidsapp.simulate.tissue import TWO_COMPARTMENTS


def estimate_of(error, sd, density):
    return Estimate(error, torch.log(sd), density)


def test_mean_errors_of_opposite_bands_do_not_cancel_in_the_loss():
    """+1 SD where fibres are coherent and −1 SD where they are not: 0 on average, 1 in each band
    and parameter, so that the term is its weight times 2."""
    recipe = replace(methods.get("estimate_scnn2").recipe(), beta=0.0, unbiased=3.0)
    density = odf.watson(torch.eye(3)[[0, 1, 2, 0]], torch.tensor([0.5, 0.5, 60, 60]), 8)
    noise, sd = torch.full((4, 2), 0.02), torch.full((4, 2), 0.1)
    truth = torch.full((4, 2), 0.5)
    sign = torch.tensor([-1.0, -1, 1, 1])[:, None]

    def loss(error, unbiased):
        own = replace(recipe, unbiased=unbiased)
        return float(learn.compute_loss(own, estimate_of(truth + error, sd, density), truth,
                                        density, noise))

    assert loss(0.1 * sign, 3.0) - loss(0.1 * sign, 0.0) == pytest.approx(6.0, rel=1e-4)
    mixed = 0.1 * torch.tensor([-1.0, 1, -1, 1])[:, None]
    assert loss(mixed, 3.0) == pytest.approx(loss(mixed, 0.0), abs=1e-5)


def test_loss_is_least_where_the_sd_is_that_of_the_error():
    recipe = replace(methods.get("estimate_scnn2").recipe(), beta=0.0, unbiased=0.0, density=0.0)
    density = odf.watson(torch.eye(3)[:2], torch.tensor([4.0, 4.0]), 8)
    truth, error = torch.full((2, 2), 0.5), 0.1 * torch.tensor([[1.0], [-1.0]])

    def loss(sd):
        found = estimate_of(truth + error, torch.full((2, 2), sd), density)
        return float(learn.compute_loss(recipe, found, truth, density, torch.full((2, 2), 0.02)))

    assert loss(0.1) < min(loss(0.09), loss(0.11))


def test_intervals_are_calibrated_where_a_network_is_too_sure():
    """SDs that are right on average and half of what they should be for coherent fibres at low
    noise: after calibration 90 % are covered there, too. 3 points are four standard errors."""
    generator = torch.Generator().manual_seed(0)
    n = 80_000
    kappa = 0.5 * 400 ** torch.rand(n, generator=generator)
    density = odf.watson(torch.eye(3)[[0]].expand(n, 3), kappa, 8)
    noise = 0.01 * 10 ** torch.rand(n, generator=generator)
    where = maps.coherence(density) > 0.9
    true_sd = torch.where(where & (noise < 0.03), 0.2, 0.1)
    error = true_sd[:, None] * torch.randn(n, 2, generator=generator)
    found = estimate_of(0.5 + error, torch.full((n, 2), 0.1), density)
    score = error.abs() / 0.1 / maps.QUANTILE
    constants = {"sd": {}, "sd_where": {}}
    for i, name in enumerate(TWO_COMPARTMENTS.names):
        constants["sd"][name] = learn._in_bands(torch.full((n,), 0.1), score[:, i], 0.9, 4)
        constants["sd_where"][name] = learn._in_cells(
            maps.coherence(density), noise,
            score[:, i] / maps.interpolate(constants["sd"][name], torch.full((n,), 0.1)))
    sd = maps.calibrate_sd(TWO_COMPARTMENTS, found, torch.stack([noise, noise], 1), constants)
    inside = error.abs() <= maps.QUANTILE * sd
    for cell in (where & (noise < 0.022), where & (noise > 0.045), maps.coherence(density) < 0.7):
        np.testing.assert_allclose(inside[cell].float().mean(0), 0.9, atol=0.03)


def test_a_band_is_what_it_says():
    band = Band(1, (12.0, 32.0), 20.0, next(iter(ACQUISITIONS)))
    dwi, truth = band.simulate(TWO_COMPARTMENTS, 400, seed=3)
    assert dwi.signal.shape == (400, len(ACQUISITIONS[band.acquisition]))
    assert truth.shape == (400, 2)
    assert float(dwi.signal[:, dwi.acquisition.b0].std()) == pytest.approx(1 / 20, rel=0.1)
    other = band.simulate(TWO_COMPARTMENTS, 400, seed=4)[0]
    assert not np.array_equal(other.signal, dwi.signal)


def test_bands_beside_bundles(rng):
    """Densities of half the power of degree 2 and less beside an isotropic part, none without
    direction; a fan is not symmetric about its main axis."""
    found = {b.label: maps.coherence(b._densities(400, torch.Generator().manual_seed(0)))
             for b in other_bands()}
    alone = maps.coherence(Band(1, (12.0, 32.0), 20.0, "")._densities(
        400, torch.Generator().manual_seed(0)))
    mixed = found["1, 12–32 + 20–60 % isotropic"] / alone
    assert 0.39 < mixed.min() < 0.45 and 0.75 < mixed.max() < 0.81
    assert found["isotropic"].max() == 0
    fan = next(b for b in other_bands() if not b.bundles)
    second = fan._densities(400, torch.Generator().manual_seed(0))[:, 1:6].numpy()
    points, weights = sh.quadrature(8)
    tensors = np.einsum("vp,pi,pj,p->vij", second @ sh.basis(2, points)[:, 1:].T, points, points,
                        weights)
    low, middle, high = np.linalg.eigvalsh(tensors).T
    assert np.mean(middle - low > 0.1 * (high - low)) > 0.2, "of a bundle both are alike"


@pytest.mark.slow
def test_weights_that_ship_hold_in_every_band():
    """500 voxels a band. Asked of each are coverage of 0.85–0.95, a mean error below 0.25 SD and a
    mean square error up to 1.05 times that of smt's posterior mean. No interval covers less than
    asked (3.5 standard errors allowed for, of 288 tests), those of sharp single bundles cover more.
    The other two are missed in some bands, which benchmarks/README.md names: four in five hold, and
    none misses by more than 0.5 SD, or 1.35 times."""
    method, smt, n = methods.get("estimate_scnn2"), methods.get("estimate_smt"), 500
    checkpoint, rows = selection.bundled_weights(method.name), []
    for band in bands():
        dwi, truth = band.simulate(TWO_COMPARTMENTS, n, seed=2026)
        found = maps.estimate(checkpoint, TWO_COMPARTMENTS, dwi, "cpu")[0]
        peer = smt.apply(dwi, "cpu").maps
        for i, name in enumerate(TWO_COMPARTMENTS.names):
            error, sd = found[name] - truth[:, i], found[f"{name}_std"]
            rows.append((np.mean(abs(error) <= maps.QUANTILE * sd), abs(error.mean()) / sd.mean(),
                         np.mean(error**2) / np.mean((peer[name] - truth[:, i]) ** 2)))
    covered, bias, ratio = np.array(rows).T
    chance = math.sqrt(0.09 / n)
    assert covered.min() > 0.85 - 3.5 * chance
    assert covered.mean() == pytest.approx(0.91, abs=0.02)
    assert bias.max() < 0.5 + 3 / math.sqrt(n)
    assert (bias < 0.25).mean() > 0.8
    assert ratio.max() < 1.35
    assert (ratio < 1.05).mean() > 0.9
