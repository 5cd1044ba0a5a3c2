"""Corruption for pretraining: each artifact against its equation, and what is drawn at random."""

import re

import numpy as np
import pytest
import torch

from bidsapp.errors import UsageError
from bidsapp.volumetric import corruption
from bidsapp.volumetric.corruption import (
    ARTIFACTS,
    KINDS,
    SHEAR,
    SHIFT,
    STRETCH,
    Corruption,
    add_artifact,
    distort,
    draw_cubes,
)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth(shape, measurements=3):
    """(measurement, *shape) tensor between 0.1 and 0.9, bright at the centre."""
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    blob = np.exp(-2 * sum(a**2 for a in axes))
    scale = np.linspace(0.8, 0.4, measurements)
    return torch.as_tensor(0.1 + scale[:, None, None, None] * blob, dtype=torch.float32)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_distortion_of_a_linear_image(axis, rng):
    """Linear interpolation of a linear image is exact, so that the equation is the truth."""
    shape, n = (9, 11, 8), 4
    slopes, stretch = rng.normal(size=(n, 3)), rng.uniform(0.8, 1.2, n)
    shear, shift = rng.uniform(-0.3, 0.3, (n, 2)), rng.uniform(-2, 2, n)
    centred = np.meshgrid(*(np.arange(k) - (k - 1) / 2 for k in shape), indexing="ij")
    image = np.einsum("ni,ixyz->nxyz", slopes, centred)
    u, w = (c for i, c in enumerate(centred) if i != axis)
    edge = (shape[axis] - 1) / 2
    moved = [(centred[axis] - shear[i, 0] * u - shear[i, 1] * w - shift[i]) / stretch[i]
             for i in range(n)]
    truth = np.stack([sum(slopes[i, j] * (np.clip(moved[i], -edge, edge) if j == axis else c)
                          for j, c in enumerate(centred)) / stretch[i] for i in range(n)])
    tensors = (torch.as_tensor(a) for a in (stretch, shear, shift))
    names = ("stretch", "shear", "shift")
    result = distort(torch.as_tensor(image), axis, **dict(zip(names, tensors, strict=True)))
    np.testing.assert_allclose(result, truth, atol=1e-12)


@pytest.mark.parametrize("stretch", [0.9, 1.1])
def test_distortion_moves_a_point_and_keeps_its_signal(stretch):
    shape, at = (20, 41, 22), np.array([4.0, 5.0, -3.0])
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in shape), indexing="ij")
    point = np.exp(-sum((a - p) ** 2 for a, p in zip(axes, at, strict=True)) / 4)
    shear, shift = np.array([[0.1, -0.05]]), np.array([1.5])
    result = distort(torch.as_tensor(point[None]), 1, stretch=torch.tensor([stretch]).double(),
                     shear=torch.as_tensor(shear), shift=torch.as_tensor(shift)).numpy()[0]
    assert result.sum() == pytest.approx(point.sum(), rel=0.015)  # not exact: interpolation
    centre = [(a * result).sum() / result.sum() for a in axes]
    expected = stretch * 5 + 0.1 * 4 - 0.05 * -3 + 1.5
    assert centre[1] == pytest.approx(expected, abs=0.05)
    # the shear moves the lines of a point along themselves only
    np.testing.assert_allclose([centre[0], centre[2]], at[[0, 2]], atol=0.05)


def test_ghosts_are_half_the_field_of_view_away():
    """Every second line of k-space times 1 − i: 1 − i/2 of the image stays, i/2 is its ghost."""
    shape, axes = (16, 18, 20), set()
    image = torch.zeros(2, *shape)
    image[:, 3, 5, 7] = torch.tensor([1.0, 0.5])
    for seed in range(12):
        result = add_artifact(image, "ghosting", 2.0, seed)
        torch.testing.assert_close(result[1], result[0] / 2)
        main, ghost = result[0].abs().reshape(-1).topk(2)[1].tolist()
        places = [np.array(np.unravel_index(i, shape)) for i in (main, ghost)]
        away = np.abs(places[1] - places[0])
        axis = int(away.argmax())
        axes.add(axis)
        assert away[axis] == shape[axis] // 2 and away.sum() == away[axis]
        values = result[0].abs().reshape(-1)[[main, ghost]]
        # the restored central line adds at most 1/n to each
        tolerance = 2 / shape[axis]
        assert float(values.sum()) == pytest.approx(1, abs=tolerance)
        assert 0.25 - tolerance <= float(values[1]) <= 0.5 + tolerance
    assert axes == {0, 1, 2}


@pytest.mark.parametrize("shape", [(12, 14, 16), (11, 13, 9)])
def test_bias_is_the_exponential_of_a_polynomial(shape):
    image = smooth(shape)
    field = (add_artifact(image, "bias", 2.0, 5) / image).double()
    torch.testing.assert_close(field, field[:1].expand_as(field), rtol=1e-5, atol=0)
    assert field.min() > 0 and field.max() / field.min() > 1.5
    for axis in range(3):  # of degree 3: its fourth differences are 0
        logarithm = field[0].log()
        assert logarithm.diff(dim=axis).abs().max() > 0.01
        assert logarithm.diff(n=4, dim=axis).abs().max() < 1e-4


def test_noise_is_gaussian_and_independent():
    image, sds = torch.full((3, 20, 21, 22), 0.5), []
    for seed in range(40):
        noise = (add_artifact(image, "noise", 2.0, seed) - image).double().reshape(3, -1)
        sds.append(float(noise.std()))
        n = noise.shape[1]
        assert np.abs(np.corrcoef(noise) - np.eye(3)).max() < 5 / np.sqrt(n)
        np.testing.assert_allclose(noise.std(1), sds[-1], rtol=5 / np.sqrt(2 * n))
        assert noise.mean(1).abs().max() < 5 * sds[-1] / np.sqrt(n)
        kurtosis = float((noise**4).mean() / noise.var() ** 2)
        assert kurtosis == pytest.approx(3, abs=0.2)
    # TorchIO's SD is uniform between 0 and 0.25
    assert max(sds) < 0.26 and np.mean(sds) == pytest.approx(0.125, abs=4 * 0.25 / np.sqrt(12 * 40))


def test_motion_is_in_millimetres():
    """A ball at the centre of rotation does not change, and 10 mm are little in large voxels."""
    axes = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in (20, 21, 22)), indexing="ij")
    ball = np.exp(-sum(a**2 for a in axes) / 18)
    image = torch.as_tensor(np.stack([ball, ball / 2]), dtype=torch.float32)
    small, large = (add_artifact(image, "motion", voxel, 3) for voxel in (2.0, 200.0))
    torch.testing.assert_close(small[1], small[0] / 2, atol=1e-5, rtol=0)
    assert (small - image).abs().max() > 0.1
    assert (large - image).abs().max() < 0.02


def test_draws(monkeypatch):
    """The ranges of the eddy currents and their units, and how often each artifact is drawn."""
    draws, names, seeds = [], [], set()

    def record(image, phase_axis, **parameters):
        draws.append([parameters["stretch"] - 1, *parameters["shear"].T, parameters["shift"]])
        assert phase_axis == 2
        return image

    def name_it(image, name, voxel, seed):
        assert voxel == 2.5
        names.append(name)
        seeds.add(seed)
        return image

    monkeypatch.setattr(corruption, "distort", record)
    monkeypatch.setattr(corruption, "add_artifact", name_it)
    corrupt, source = Corruption("artifacts", 2.5, phase_axis=2), generator()
    for _ in range(200):
        corrupt(smooth((3, 4, 5), 30), source)
    draws = np.array([np.stack(d) for d in draws])  # volume, parameter, measurement
    limits = np.array([STRETCH, SHEAR, SHEAR, SHIFT / 2.5])
    assert (STRETCH, SHIFT) == (0.1, 8.5)
    for sign in (1, -1):
        extremes = (sign * draws).max((0, 2))
        assert (extremes <= limits * 1.0001).all() and (extremes > 0.99 * limits).all()
    flat = draws.transpose(1, 0, 2).reshape(4, -1)
    assert np.abs(np.corrcoef(flat) - np.eye(4)).max() < 0.05
    assert draws.std(2).min() > 0  # each measurement has its own
    counts = [names.count(name) for name in ARTIFACTS]
    assert min(counts) > 30 and sum(counts) == len(seeds) == 200


def test_noise_is_added_after_the_distortion_and_before_the_magnitude(monkeypatch):
    monkeypatch.setattr(corruption, "distort", lambda image, *_, **__: image / 2)
    monkeypatch.setattr(corruption, "add_artifact", lambda image, *_: image - 0.5)
    image = torch.tensor([0.2, 1.0]).reshape(2, 1, 1, 1)
    corrupted, _ = Corruption("artifacts", 2.0)(image, generator())
    torch.testing.assert_close(corrupted, torch.tensor([0.4, 0.0]).reshape(2, 1, 1, 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 12, 14, 10), (4, 11, 9, 13)])
def test_corruption_is_reproducible_and_in_range(kind, shape):
    image = smooth(shape[1:], shape[0])
    before, state, results = image.clone(), torch.get_rng_state(), []
    corrupt = Corruption(kind, 3.0, edge=4)
    for seed in range(8):
        corrupted, counted = corrupt(image, generator(seed))
        torch.manual_seed(seed + 1)  # the global generator has no say
        again, counted_again = corrupt(image, generator(seed))
        torch.set_rng_state(state)
        assert torch.equal(corrupted, again) and torch.equal(counted, counted_again)
        assert corrupted.shape == shape and counted.shape == shape[1:]
        assert corrupted.dtype == torch.float32 and counted.dtype == torch.bool
        assert torch.isfinite(corrupted).all()
        assert corrupted.min() >= 0 and corrupted.max() <= 1
        assert counted.all() == (kind != "mask")
        results.append(corrupted)
    assert torch.equal(image, before)
    assert torch.equal(torch.get_rng_state(), state)
    same = [torch.equal(a, b) for i, a in enumerate(results) for b in results[:i]]
    assert all(same) if kind == "none" else not any(same)
    assert all(torch.equal(r, image) == (kind == "none") for r in results)
    results[0][:] = 7
    assert torch.equal(image, before)


def test_the_global_generator_is_left_alone():
    state = torch.get_rng_state()
    Corruption("artifacts", 3.0)(smooth((8, 8, 8)), generator())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_measurements_are_distorted_differently():
    image = smooth((16, 18, 17), 1).expand(3, -1, -1, -1)
    for seed in range(4):
        result, _ = Corruption("artifacts", 3.0)(image, generator(seed))
        assert (result[0] - result[1]).abs().max() > 0.01


@pytest.mark.parametrize("shape", [(12, 16, 8), (11, 13, 9)])
def test_masked_cubes(shape):
    image = smooth(shape)
    corrupted, masked = Corruption("mask", 3.0, edge=4, share=0.5)(image, generator())
    assert (corrupted[:, masked] == 0).all()
    assert torch.equal(corrupted[:, ~masked], image[:, ~masked])
    corners = masked[::4, ::4, ::4]
    assert int(corners.sum()) == round(0.5 * corners.numel())
    for x in range(shape[0]):
        for y in range(shape[1]):
            for z in range(shape[2]):
                assert masked[x, y, z] == corners[x // 4, y // 4, z // 4]


def test_all_cubes_are_masked_equally_often():
    source = generator()
    often = sum(draw_cubes((6, 4, 4), 2, 0.25, source).double() for _ in range(2000)) / 2000
    assert (often - 0.25).abs().max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


@pytest.mark.parametrize(("settings", "words"), [
    ({"kind": "blur"}, "'blur'. It must be one of artifacts, none, mask"),
    ({"voxel": 0.0}, "voxel 0.0"), ({"voxel": float("nan")}, "voxel nan"),
    ({"phase_axis": 3}, "phase_axis 3"), ({"edge": 0}, "cubes of 0 voxels"),
    ({"share": 1.0}, "a share of 1.0"), ({"share": 0.0}, "a share of 0.0")])
def test_refuses_impossible_settings(settings, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        Corruption(**{"kind": "mask", "voxel": 2.0} | settings)


def test_refuses_a_volume_of_too_few_cubes():
    with pytest.raises(UsageError, match=r"3 × 4 × 2 voxels has 1 cube\(s\) of 4 voxels"):
        Corruption("mask", 2.0)(smooth((3, 4, 2)), generator())
