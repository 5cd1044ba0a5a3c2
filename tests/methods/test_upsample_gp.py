"""Upsampling by a Gaussian process: any b-tensors, what is outside, and its SD against truth."""

from dataclasses import replace

import numpy as np
import pytest

from bidsapp import methods
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.errors import Refusal
from bidsapp.simulate.protocols import spread
from support import crossing_tensors


@pytest.fixture(scope="module")
def method():
    return methods.get("upsample_gp")


def shells(*parts):
    """(b, directions, b_delta) shells."""
    return Acquisition(np.concatenate([np.full(n, float(b)) for b, n, _ in parts]),
                       np.vstack([spread(max(n, 2))[:n] for _, n, _ in parts]),
                       np.concatenate([np.full(n, float(s)) for _, n, s in parts]))


TABLES = {
    "one shell": (shells((0, 3, 1), (1000, 30, 1)), shells((1000, 39, 1))),
    "two shells": (shells((0, 3, 1), (1000, 30, 1), (2500, 60, 1)),
                   shells((1000, 39, 1), (2500, 39, 1))),
    "b-tensors": (shells((0, 3, 1), (1500, 30, 1), (1500, 8, 0), (1500, 24, -0.5)),
                  shells((1500, 39, 1), (1500, 39, -0.5))),
    "free": (Acquisition(np.linspace(200, 2500, 80)[np.random.default_rng(1).permutation(80)],
                         spread(80)),
             Acquisition(np.linspace(500, 2200, 41), spread(41))),
}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("sd", [0.02, 0.05])
def test_sd_is_that_of_the_error(method, rng, name, sd):
    """On every shell, over all voxels, and in the less and the more anisotropic half of them."""
    acquisition, target = TABLES[name]
    noisy, clean = crossing_tensors.simulate(rng, concatenate([acquisition, target]), 6000, sd)
    n = len(acquisition)
    made = method.predict(crossing_tensors.dwi_of(noisy[:, :n], acquisition), target, "cpu")
    error, sds = made.signal - clean[:, n:], made.sd.astype(float)
    for shell in target.shells:
        k = shell.indices
        order = np.argsort(clean[:, n + k].std(1))
        for part in (order, order[:3000], order[3000:]):
            rows = np.ix_(part, k)
            assert 0.6 < np.mean(error[rows]**2) / np.mean(sds[rows]**2) < 1.4
            covered = np.abs(made.signal - noisy[:, n:])[rows] < 1.645 * np.hypot(sds[rows], sd)
            assert 0.87 < covered.mean() < 0.93


def test_sd_is_at_least_the_noise_of_the_average(method, rng):
    """Isotropic signals are predicted with less error than the noise that is told. A prediction
    that keeps a constant has weights whose sum is 1, and any such weights of n measurements leave a
    noise of σ/√n or more."""
    acquisition, target = TABLES["one shell"]
    sigma, told = 0.02, 0.05
    signal = np.where(acquisition.b0, 1.0, 0.4) + rng.normal(0, sigma, (1000, len(acquisition)))
    dwi = replace(crossing_tensors.dwi_of(signal, acquisition), noise_sd=told)
    made = method.predict(dwi, target, "cpu")
    assert made.signal.mean() == pytest.approx(0.4, rel=0.01)
    assert made.sd.min() > 0.95 * told / np.sqrt(30)


def test_prediction_is_better_than_the_nearest_measurement_and_the_mean(method, rng):
    acquisition, target = TABLES["two shells"]
    noisy, clean = crossing_tensors.simulate(rng, concatenate([acquisition, target]), 3000, 0.03)
    n = len(acquisition)
    made = method.predict(crossing_tensors.dwi_of(noisy[:, :n], acquisition), target, "cpu").signal
    for shell, source in zip(target.shells, acquisition.shells, strict=True):
        truth = clean[:, n + shell.indices]
        cosine = np.abs(target.bvecs[shell.indices] @ acquisition.bvecs[source.indices].T)
        measured = noisy[:, source.indices]
        error, nearest, mean = (np.sqrt(np.mean((x - truth)**2)) for x in (
            made[:, shell.indices], measured[:, cosine.argmax(1)], measured.mean(1, keepdims=True)))
        assert error < 0.7 * nearest and error < 0.7 * mean
        assert error < 0.03


def test_says_what_was_not_measured(method):
    acquisition = shells((0, 3, 1), (1000, 30, 1), (2500, 60, 1))
    assert method.violations(acquisition, shells((1000, 6, 1), (1800, 6, 1), (2600, 6, 1))) == []
    (high,) = method.violations(acquisition, shells((3000, 6, 1)))
    assert "b = 3000" in high and "1000 to 2500" in high
    (shape,) = method.violations(acquisition, shells((1000, 6, -0.5)))
    assert "b_delta = -0.5" in shape


def test_noise_that_is_unknown_is_the_one_of_the_process(method, rng):
    acquisition, target = TABLES["one shell"]
    noisy, _ = crossing_tensors.simulate(rng, acquisition, 3000, 0.04)
    dwi = crossing_tensors.dwi_of(noisy, acquisition)
    known, unknown = (method.predict(d, target, "cpu").sd
                      for d in (dwi, replace(dwi, noise_sd=None)))
    np.testing.assert_allclose(np.median(unknown), np.median(known), rtol=0.15)


def test_one_bad_value_spoils_no_other_voxel(method, rng):
    """The covariance is one of mean squares over voxels, which one value could govern."""
    acquisition, target = TABLES["one shell"]
    noisy, clean = crossing_tensors.simulate(rng, concatenate([acquisition, target]), 2000, 0.03)
    n = len(acquisition)
    signal = noisy[:, :n].copy()
    before = method.predict(crossing_tensors.dwi_of(signal, acquisition), target, "cpu")
    signal[5, 7] = 1000 * np.median(signal[:, 0])
    after = method.predict(crossing_tensors.dwi_of(signal, acquisition), target, "cpu")
    rest = np.arange(len(signal)) != 5
    errors = [np.sqrt(np.mean((made.signal - clean[:, n:])[rest]**2)) for made in (before, after)]
    assert errors[1] < 1.02 * errors[0]
    assert not before.notices and after.notices[0].startswith("1 of 2000 voxels")


def test_directions_from_which_it_cannot_learn_are_refused(method):
    """All angles alike (an icosahedron), or all directions in a plane."""
    golden = (1 + 5**0.5) / 2
    axes = np.array([np.roll([0, 1, s * golden], k) for s in (1, -1) for k in range(3)])
    axes /= np.hypot(1, golden)
    edges = np.array([np.roll([0, 1, s], k) for s in (1, -1) for k in range(3)]) / 2**0.5

    def table(*bvecs):
        bvecs = np.vstack([np.zeros((1, 3)), *bvecs])
        return Acquisition(np.r_[0, np.full(len(bvecs) - 1, 1000.0)], bvecs)

    with pytest.raises(Refusal, match=r"angles from 63° to 63°.*range of 15°"):
        method.check(table(axes))
    method.check(table(edges))
    method.check(table(axes, edges[:1]))
    method.check(table(axes, axes))  # repeats show the noise
    angle = np.linspace(0, np.pi, 30, endpoint=False)
    with pytest.raises(Refusal, match="do not span the sphere"):
        method.check(table(np.column_stack([np.cos(angle), np.sin(angle), 0 * angle])))
