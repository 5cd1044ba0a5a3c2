"""Complex series: units of phase images, and signals without the phase of shots."""

import numpy as np
import pytest
import torch

from bidsapp.errors import DataError
from bidsapp.preprocess.phase import from_parts, from_polar, remove_phase, to_radians
from bidsapp.simulate import noise


@pytest.mark.parametrize("low,high,factor,offset", [
    (0, 4095, np.pi / 2048, -np.pi), (-4096, 4095, np.pi / 4096, 0),
    (-3141, 3141, 1e-3, 0), (-3.14, 3.14, 1, 0), (0.0, 6.28, 1, 0),
    (-2048, 2047, np.pi / 2048, 0),
    # not filled: masked, on one side
    (0, 3800, np.pi / 2048, -np.pi), (-300, 3800, np.pi / 4096, 0), (-1.0, 3.0, 1, 0)])
def test_scales_of_scanners(rng, low, high, factor, offset):
    stored = rng.uniform(low, high, (8, 8, 4, 3)).astype(np.float32)
    stored[0, 0, 0, 0], stored[1, 0, 0, 0] = low, high
    phase = to_radians(stored, "arbitrary")
    assert phase.dtype == np.float32
    np.testing.assert_allclose(phase, stored * factor + offset, atol=1e-5)


def test_radians_stay():
    phase = np.linspace(-0.1, 0.2, 8, dtype=np.float32).reshape(2, 2, 2)
    np.testing.assert_array_equal(to_radians(phase, "rad"), phase)


@pytest.mark.parametrize("factor,reach", [
    (1e3, 1.85), (1e3, 2.05), (1e3, 2.09),               # milliradians, within ±2048
    (4096 / np.pi, 2.2), (4096 / np.pi, 2.45),           # ±4096, within ±3142
    (4096 / np.pi, 1.42), (4096 / np.pi, 1.6),           # ±4096, within ±2048
    (2048 / np.pi, 2.9)])
@pytest.mark.parametrize("air", [True, False])
def test_masked_phases_of_several_possible_scales_are_refused(rng, factor, reach, air):
    phase = rng.uniform(-reach, reach * 0.9, (12, 12, 8))
    phase[0, 0, 0] = -reach
    if air:
        phase[4:] = 0
    stored = np.round(phase * factor)
    with pytest.raises(DataError, match=r'may be .*"mrad"'):
        to_radians(stored, "arbitrary")
    in_units = to_radians(phase * 1e3, "mrad")
    np.testing.assert_allclose(in_units, phase, atol=1e-5)


@pytest.mark.parametrize("low,high,factor", [
    (-2048, 2047, np.pi / 2048), (-4096, 4095, np.pi / 4096), (-3142, 3142, 1e-3),
    (-3141, 3141, 1e-3)])
def test_masked_phases_that_wrap_have_the_ends_of_their_scale(rng, low, high, factor):
    stored = rng.integers(low, high + 1, (12, 12, 8)).astype(np.float32)
    stored[0, 0, :2] = low, high
    stored[4:] = 0
    np.testing.assert_allclose(to_radians(stored), stored * factor, atol=1e-5)


@pytest.mark.parametrize("values,units,words", [
    ((0, 1000), None, "0 to 1000"), ((0, 0), None, "0 to 0"), ((-2500, 2500), None, "-2500"),
    ((-3400, 3400), "arbitrary", "-3400"), ((-1500, 1000), None, "-1500"), ((-1, 1), None, "-1"),
    ((-0.1, 0.2), "arbitrary", "-0.1"),
    ((-4096, 4095), "rad", '"Units": "rad"'), ((-8000, 4095), "mrad", '"Units": "mrad"')])
def test_unknown_units_are_refused(values, units, words):
    phase = np.linspace(*values, 8).reshape(2, 2, 2)
    with pytest.raises(DataError, match=words):
        to_radians(phase, units)


def test_complex_numbers_of_either_pair(rng):
    z = (rng.normal(size=(3, 3, 2, 2)) + 1j * rng.normal(size=(3, 3, 2, 2)))
    for made in (from_parts(z.real, z.imag), from_polar(np.abs(z), np.angle(z))):
        assert made.dtype == np.complex64
        np.testing.assert_allclose(made, z, atol=1e-6)


def series(signal, sigma, seed=0, order=4):
    """Complex series (x, y, z, n) of a signal with background, shot phase and noise."""
    x, y, z, n = signal.shape
    position = torch.as_tensor(np.stack(np.meshgrid(
        *(np.linspace(-1, 1, size) for size in (x, y, z)), indexing="ij"), -1).reshape(-1, 3),
        dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    shot = torch.arange(z).repeat(x * y)
    phase = np.pi * noise.smooth_field(position, order, 1, generator) + noise.shot_phase(
        position, shot, n, generator)
    out = noise.complex_noise(torch.as_tensor(signal.reshape(-1, n), dtype=torch.float32), phase,
                              sigma, generator)
    return out.numpy().reshape(signal.shape)


def head(n=12, size=48):
    """(x, y, z, n) signal of a ball with a dark core."""
    u, v, w = np.meshgrid(*(np.linspace(-1, 1, s) for s in (size, size, 3)), indexing="ij")
    radius = np.sqrt(u**2 + v**2 + 0.1 * w**2)
    level = 1.0 * (radius < 0.75) - 0.95 * (radius < 0.2)
    return level[..., None] * np.linspace(1, 0.5, n), radius


def test_signal_becomes_real():
    signal, radius = head()
    inside = radius < 0.7
    volumes = series(signal, 0.0)
    before = volumes.copy()
    turned = remove_phase(volumes)
    np.testing.assert_array_equal(volumes, before)
    assert turned.dtype == np.complex64
    np.testing.assert_allclose(np.abs(turned), np.abs(volumes), atol=1e-5)
    error = np.abs(turned - signal)[inside] / signal[inside]
    assert np.median(error) < 0.05 and np.quantile(error, 0.99) < 0.3
    assert np.abs(volumes.real - signal)[inside].mean() > 0.5


def test_floor_of_noise_is_removed():
    """In the dark the mean of the real part is near the signal, that of the magnitude is not."""
    signal, radius = head(n=30)
    sigma = 0.2
    volumes = series(signal, sigma, seed=3)
    dark = radius < 0.12
    truth = signal[dark].mean()
    floor = np.abs(volumes)[dark].mean() - truth
    np.testing.assert_allclose(floor + truth, noise.mean(signal[dark], sigma).mean(), rtol=0.02)
    bias = remove_phase(volumes).real[dark].mean() - truth
    assert abs(bias) < 0.2 * floor


def test_slices_of_any_axis():
    volumes = series(head()[0], 0.1)
    straight = remove_phase(volumes)
    turned = remove_phase(np.ascontiguousarray(volumes.transpose(2, 0, 1, 3)), (1, 2))
    np.testing.assert_allclose(turned, straight.transpose(2, 0, 1, 3), atol=1e-6)
    volumes[0, 0, 0, 0] = np.nan  # in another slice
    one = remove_phase(volumes[:, :, 1:2])
    np.testing.assert_array_equal(np.isfinite(remove_phase(volumes)), True)
    np.testing.assert_allclose(one, straight[:, :, 1:2], atol=1e-6)
