"""Noise and intervals after a signal was harmonized."""

from dataclasses import replace

import numpy as np
import pytest

from bidsapp import dwi as measured
from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.harmonization import harmonizer
from bidsapp.kinds import Derived, Harmonized
from bidsapp.methods.estimate_smt.method import powder_mean
from bidsapp.simulate import site

SD, S0 = 25.0, 1000.0
SHAPE = (10, 15, 20)
GAIN = (0.5, 0.7)


def scan(rng, b0=1):
    """Sticks in zeppelins in the powder average (no fibres), of smt's own prior, with noise."""
    table = site.gradient_table((1000.0, 2200.0), 60)
    weighted = ~table.b0
    acquisition = Acquisition(np.append(np.zeros(b0), table.bvals[weighted]),
                              np.concatenate([np.zeros((b0, 3)), table.bvecs[weighted]]))
    n = int(np.prod(SHAPE))
    d, f = rng.uniform(0, 3, n), rng.uniform(0, 1, n)
    clean = S0 * powder_mean(d[:, None], f[:, None], acquisition.bvals[None] / 1000, 1.0)[0]
    return Dwi(clean.astype(np.float32), np.ones(SHAPE, bool), np.eye(4), acquisition, SD), d, f


def noisy(dwi, rng):
    noise = SD * rng.standard_normal((2, *dwi.signal.shape))
    return replace(dwi, signal=np.hypot(dwi.signal + noise[0], noise[1]).astype(np.float32))


def scaled(dwi):
    """Every shell times a number: what a harmonizer may do at its simplest."""
    signal = dwi.signal.copy()
    for shell, gain in zip(dwi.acquisition.shells, GAIN, strict=True):
        signal[:, shell.indices] *= gain
    return signal


def series(dwi):
    """Every shell as its SH series."""
    signal = dwi.signal.copy()
    for shell in dwi.acquisition.shells:
        basis = sh.basis(4, dwi.acquisition.bvecs[shell.indices])
        signal[:, shell.indices] = signal[:, shell.indices] @ (basis @ np.linalg.pinv(basis)).T
    return signal


def test_noise_of_the_b0_volumes_is_not_that_of_a_shell(rng):
    """A map that adds a b0 volume to the weighted ones leaves their own noise as it is."""
    dwi = noisy(scan(rng)[0], rng)

    def raised(other):
        signal = other.signal.copy()
        signal[:, 1:] += signal[:, :1]
        return signal

    gain = harmonizer.noise_gain(dwi, Harmonized(raised(dwi), raised, errors=[0.0]))
    np.testing.assert_allclose(gain, 1, rtol=1e-4)


@pytest.mark.parametrize("b0", [1, 7])
def test_gain_of_a_map_that_is_known(rng, b0):
    dwi = noisy(scan(rng, b0)[0], rng)
    gain = harmonizer.noise_gain(dwi, Harmonized(scaled(dwi), scaled, errors=[0.0]))
    for shell, wanted in zip(dwi.acquisition.shells, GAIN, strict=True):
        np.testing.assert_allclose(gain[shell.indices], wanted, rtol=1e-4)
    np.testing.assert_array_equal(gain[dwi.acquisition.b0], 1)
    # of one harmonization after another
    twice = replace(dwi, noise_gain=gain)
    again = harmonizer.noise_gain(twice, Harmonized(scaled(dwi), scaled, errors=[0.0]))
    np.testing.assert_allclose(again, gain**2, rtol=1e-4)
    second = dwi.acquisition.shells[1]  # a shell alone keeps its own gain
    alone = twice.select_shell(second)
    assert alone.noise_of(alone.acquisition.shells[0].indices) == twice.noise_of(second.indices)


def test_a_series_keeps_the_noise_of_means_over_directions(rng):
    """And has no residual from which the level could be measured."""
    dwi = noisy(scan(rng)[0], rng)
    made = Harmonized(series(dwi), series, errors=[0.0])
    np.testing.assert_allclose(harmonizer.noise_gain(dwi, made), 1, rtol=0.01)
    assert measured.noise_sd(replace(dwi, signal=made.signal)) < 0.01 * SD


@pytest.mark.parametrize("b0", [1, 7])
def test_intervals_cover_after_harmonization(rng, b0):
    """The scanner scales its shells. Intervals cover 90 % of the truths; with one noise level for
    all shells they cover far fewer or more."""
    clean, d, f = scan(rng, b0)
    there = replace(clean, signal=scaled(clean))  # the scanner divides what the map multiplies
    dwi = noisy(there, rng)

    def back(other):
        signal = other.signal.copy()
        for shell, gain in zip(other.acquisition.shells, GAIN, strict=True):
            signal[:, shell.indices] /= gain
        return signal

    made = Harmonized(back(dwi), back, errors=[0.0])
    new = replace(dwi, signal=made.signal, noise_gain=harmonizer.noise_gain(dwi, made))
    covered = {}
    for name, one in (("travels", new), ("of the scan", replace(new, noise_gain=None))):
        maps = methods.get("estimate_smt").apply(one, "cpu").maps
        covered[name] = [(np.abs(maps[key] - truth) <= 1.645 * maps[f"{key}_std"]).mean()
                         for key, truth in (("diffusivity", d), ("neuritefraction", f))]
    assert all(0.85 < share < 0.95 for share in covered["travels"]), covered
    assert all(share < 0.85 for share in covered["of the scan"]), covered


def test_networks_are_told_the_noise_of_the_shells(rng):
    """Twice the noise gives wider intervals; shells alike, the gain is that of the level."""
    dwi = noisy(scan(rng, 7)[0], rng)
    few = np.zeros(SHAPE, bool)
    few[0] = True
    dwi = Dwi(dwi.signal[:few.sum()], few, np.eye(4), dwi.acquisition, SD)
    gain = np.where(dwi.acquisition.b0, 1.0, 2.0)
    scnn = methods.get("estimate_scnn2")
    before, wider, all_alike, level = (scnn.apply(one, "cpu") for one in (
        dwi, replace(dwi, noise_gain=gain), replace(dwi, noise_gain=0 * gain + 2),
        replace(dwi, noise_sd=2 * SD)))
    assert (wider.maps["diffusivity_std"].mean() > 1.1 * before.maps["diffusivity_std"].mean())
    assert wider.parameters["NoiseSD"] == pytest.approx(2 * SD)
    for key, values in all_alike.maps.items():
        np.testing.assert_allclose(values, level.maps[key], rtol=1e-3, atol=1e-4, err_msg=key)


def test_own_errors_widen_intervals(rng):
    """√(1 + e²/ν²), ν the noise of the mean over directions relative to it."""
    dwi, _, _ = scan(rng)
    flat = replace(dwi, signal=np.full_like(dwi.signal, 500))
    noise = SD / 500 / 60**0.5
    assert harmonizer.widening(flat, [noise, noise]) == pytest.approx(2**0.5)
    assert harmonizer.widening(flat, [0, 0]) == 1
    assert harmonizer.widening(replace(flat, noise_sd=None), [1, 1]) == 1
    derived = Derived({"fa": np.ones(3, np.float32), "fa_std": np.ones(3, np.float32)})
    for range_, sd in (((0, None), 1.5), ((0, 1.25), 1.25)):
        wide = derived.widen_intervals(1.5, {"fa_std": range_})
        assert wide.maps["fa_std"].tolist() == [sd] * 3 and wide.maps["fa"].tolist() == [1] * 3
    none = derived.without_intervals("nobody knows")
    assert list(none.maps) == ["fa"] and "nobody knows" in none.parameters["Uncertainty"]


def test_a_harmonizer_says_by_what_it_errs_or_why_it_cannot(rng):
    dwi, _, _ = scan(rng)
    with pytest.raises(ValueError, match="own error of every shell, or a reason"):
        Harmonized(dwi.signal, lambda other: other.signal)
