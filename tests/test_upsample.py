"""Directions: known optima of charges. The round trip: an upsampler whose error is known."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.kinds import Predicted, Upsampler
from bidsapp.upsample import (
    ErrorCurve,
    assign_folds,
    determines,
    distinct,
    energy,
    round_trip,
    sample_voxels,
    spread,
    subset,
)

NOTHING = np.zeros((0, 3))
THOMSON = {3: 9.985281374, 6: 49.165253058, 16: 412.261274651}
"""Lowest energy of 6, 12 and 32 charges: octahedron, icosahedron and pentakis dodecahedron, which
are antipodal (Thomson problem; Wales and Ulker 2006, doi:10.1103/PhysRevB.74.212101)."""


def unit(rng, n):
    v = rng.standard_normal((n, 3))
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def icosahedron():
    golden = (1 + 5**0.5) / 2
    axes = [np.roll([0, 1, s * golden], k) for s in (1, -1) for k in range(3)]
    return np.array(axes) / np.hypot(1, golden)


@pytest.mark.parametrize("axes", THOMSON)
def test_spread_finds_known_optima(axes):
    x = spread(NOTHING, axes)
    # each of 2n charges repels its antipode too, at distance 2, and E counts half of the others
    assert 2 * energy(x) + axes / 2 == pytest.approx(THOMSON[axes], rel=1e-8)


def test_spread_completes_a_known_optimum():
    given = icosahedron()
    for k in (1, 3, 5):
        np.testing.assert_allclose(energy(np.vstack([given[:k], spread(given[:k], 6 - k)])),
                                   energy(given), rtol=1e-8)
    assert abs(spread(given[:5], 1)[0] @ given[5]) == pytest.approx(1)


def test_spread_is_near_a_free_spread_and_far_from_random(rng):
    given = spread(NOTHING, 30)
    new = spread(given, 60)
    assert new.shape == (60, 3) and new.dtype == np.float64
    np.testing.assert_allclose(np.linalg.norm(new, axis=1), 1)
    free, at_random = energy(spread(NOTHING, 90)), energy(np.vstack([given, unit(rng, 60)]))
    assert free < energy(np.vstack([given, new])) < free + 0.01 * (at_random - free)


def test_spread_is_deterministic_and_leaves_its_input(rng):
    given = unit(rng, 7)
    before = given.copy()
    np.testing.assert_array_equal(spread(given, 5, seed=3), spread(given, 5, seed=3))
    np.testing.assert_array_equal(given, before)
    assert spread(given, 0).shape == (0, 3)


def test_spread_ignores_the_sign_of_measured_directions(rng):
    given = unit(rng, 12)
    signs = rng.choice([-1, 1], (12, 1))
    both = [energy(np.vstack([given, spread(g, 10)])) for g in (given, signs * given)]
    assert both[0] == pytest.approx(both[1], rel=1e-9)


def test_subset_is_spread_nested_and_turns_with_the_directions(rng):
    x = spread(NOTHING, 90)
    few = subset(x, 30)
    assert len(set(few.tolist())) == 30
    np.testing.assert_array_equal(few[:10], subset(x, 10))
    assert energy(x[few]) < min(energy(x[rng.permutation(90)[:30]]) for _ in range(1000))
    turn = Rotation.random(random_state=1).as_matrix()
    np.testing.assert_array_equal(few, subset(-x @ turn.T, 30))
    with pytest.raises(ValueError, match="there are 90"):
        subset(x, 91)


def test_repeated_directions_are_selected_last():
    x = np.repeat(icosahedron(), 2, axis=0)
    assert set(subset(x, 6) // 2) == set(range(6))


def test_distinct_directions_are_axes():
    given = icosahedron()
    assert distinct(np.vstack([given[:4], -given[:3], given])).tolist() == [0, 1, 2, 3, 11, 12]


def test_directions_in_a_plane_or_a_cap_determine_no_tensor(rng):
    x = spread(NOTHING, 30)
    assert determines(2, x) and determines(4, x) and not determines(6, x[:20])
    flat, free = x * [1, 1, 0], unit(rng, 1000)
    assert not determines(2, flat / np.linalg.norm(flat, axis=1, keepdims=True))
    assert not determines(2, free[np.abs(free[:, 2]) > np.cos(np.radians(40))])


def test_a_sample_has_no_bad_values(rng):
    signal = rng.uniform(0.5, 1.5, (50_000, 6)).astype(np.float32)
    signal[::100, 3] = 100
    sample, notices = sample_voxels(signal, np.array([3, 4]))
    assert sample.max() < 2 and 20_000 <= len(sample) <= 25_000 and sample.shape[1] == 2
    assert "500 of 25000 voxels" in notices[0]
    assert not sample_voxels(signal[1:90], np.arange(6))[1]


def brain(rng, shells=((1000, 12), (2000, 25)), shape=(6, 5, 9)):
    mask = rng.random(shape) < 0.7
    mask[:, :, 0] = False
    acquisition = Acquisition(
        np.repeat([0, *(b for b, _ in shells)], [2, *(n for _, n in shells)]).astype(float),
        np.vstack([np.zeros((2, 3)), *(unit(rng, n) for _, n in shells)]))
    signal = rng.uniform(0.5, 1.5, (mask.sum(), len(acquisition))).astype(np.float32)
    return Dwi(signal, mask, np.eye(4), acquisition, 0.1,
               noise_gain=np.linspace(1, 2, len(acquisition)))


def test_folds_share_each_shell_and_are_spread(rng):
    dwi = brain(rng, ((1000, 12), (2000, 60)))
    fold = assign_folds(dwi, 10)
    assert (fold[:2] == -1).all()
    for shell, sizes in zip(dwi.acquisition.shells, ({1, 2}, {6}), strict=True):
        counts = np.bincount(fold[shell.indices], minlength=10)
        assert counts.sum() == len(shell) and set(counts) == sizes
    x, folds = dwi.acquisition.bvecs[14:], fold[14:]

    def mean(folds):
        return np.mean([energy(x[folds == f]) for f in range(10)])

    assert mean(folds) < min(mean(folds[rng.permutation(60)]) for _ in range(200))


def test_slab_is_of_whole_slices_in_the_middle(rng):
    dwi = brain(rng)
    counts = dwi.mask.sum((0, 1))
    for voxels in (1, 50, 90, 10_000):
        slab = dwi.middle_slab(voxels)
        kept = np.flatnonzero(slab.mask.any((0, 1)))
        np.testing.assert_array_equal(kept, np.arange(kept[0], kept[-1] + 1))
        np.testing.assert_array_equal(slab.mask, dwi.mask & slab.mask.any((0, 1)))
        np.testing.assert_array_equal(slab.unmask(slab.signal),
                                      dwi.unmask(dwi.signal) * slab.mask[..., None])
        half = np.searchsorted(np.cumsum(counts), counts.sum() / 2)
        assert half in kept
        assert len(slab.signal) <= voxels or len(kept) == 1
    assert len(dwi.middle_slab(10_000).signal) == len(dwi.signal)


class Offset(Upsampler):
    """Returns the truth plus an error of known SD, and says so; refuses fewer than `needs`."""

    truth, needs, error, noise, known = None, 0, 0.03, None, True

    def check(self, acquisition):
        if (~acquisition.b0).sum() < self.needs:
            raise Refusal("more are needed")

    def predict(self, dwi, target, device, seed=0):
        self.check(dwi.acquisition)
        shared = (np.round(a.bvecs, 9).tolist() for a in (dwi.acquisition[~dwi.acquisition.b0],
                                                          target))
        assert not set(map(tuple, next(shared))) & set(map(tuple, next(shared)))
        rows = [int(np.argmin(np.abs(self.truth.acquisition.bvecs - g).sum(1)))
                for g in target.bvecs]
        rng = np.random.default_rng(seed + rows[0])
        clean = self.truth.signal[:len(dwi.signal), rows]
        made = (clean + 0.01 + rng.normal(0, self.error, clean.shape)).astype(np.float32)
        return Predicted(made, np.full_like(made, self.error) if self.known else None)


def trip(rng, **settings):
    truth = brain(rng, ((1000, 8), (2000, 11)), (40, 40, 9))
    truth = replace(truth, noise_gain=None)
    noisy = truth.signal + rng.normal(0, 0.1, truth.signal.shape)
    method = Offset()
    method.truth = truth
    for name, value in settings.items():
        setattr(method, name, value)
    return method, replace(truth, signal=noisy.astype(np.float32))


def test_round_trip_finds_the_errors_of_a_method(rng):
    method, dwi = trip(rng)
    rows = round_trip(method, dwi, "cpu", 0, voxels=20_000)
    assert rows["volume"].tolist() == list(range(2, 21))
    np.testing.assert_array_equal(rows["b"], dwi.acquisition.bvals[2:])
    np.testing.assert_allclose(rows["rmse"], np.sqrt(0.03**2 + 0.1**2 + 0.01**2), rtol=0.05)
    np.testing.assert_allclose(rows["mean_error"], 0.01, atol=0.005)
    np.testing.assert_allclose(rows["coverage"], 0.9, atol=0.02)
    # of uniform signals of SD 1/√12 and the errors of both
    expected = (1 / 12) / np.sqrt((1 / 12 + 0.1**2) * (1 / 12 + 0.03**2))
    np.testing.assert_allclose(rows["correlation"], expected, atol=0.01)


def test_round_trip_without_intervals_and_with_too_few(rng):
    method, dwi = trip(rng, known=False)
    assert round_trip(method, dwi, "cpu", 0)["coverage"].isna().all()
    method, dwi = trip(rng, needs=19)
    with pytest.raises(Refusal):
        round_trip(method, dwi, "cpu", 0)


def test_parts_of_a_run_keep_their_noise(rng):
    dwi = brain(rng)
    part = dwi.select_volumes(np.array([5, 3]))
    np.testing.assert_array_equal(part.signal, dwi.signal[:, [5, 3]])
    np.testing.assert_array_equal(part.noise_gain, dwi.noise_gain[[5, 3]])


def test_error_curve_follows_the_anisotropy(rng):
    anisotropy = rng.exponential(size=40_000)
    square = (1 + anisotropy) * rng.chisquare(4, 40_000) / 4
    curve = ErrorCurve.fit(anisotropy, square)
    at = torch.tensor([0.0, 0.5, 1.0, 2.0, 100.0])
    found = curve(at)
    np.testing.assert_allclose(found[:4], 1 + at[:4], rtol=0.06)
    assert found[4] == curve.square[-1]
    order = rng.permutation(40_000)
    np.testing.assert_allclose(ErrorCurve.fit(anisotropy[order], square[order])(at), found,
                               rtol=1e-5)
    few = ErrorCurve.fit(anisotropy[:50], square[:50])
    np.testing.assert_allclose(few(at), square[:50].mean(), rtol=1e-5)
