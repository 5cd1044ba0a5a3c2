"""Upsampling by spherical harmonics: the degree, what is refused, and its SD against truth."""

from dataclasses import replace

import numpy as np
import pytest

from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.errors import Refusal
from bidsapp.methods.upsample_sh.method import degree
from bidsapp.simulate.protocols import spread
from support import crossing_tensors


@pytest.fixture(scope="module")
def method():
    return methods.get("upsample_sh")


def table(*shells):
    """Two b0 volumes and (b, directions) shells."""
    return Acquisition(np.r_[0.0, 0.0, np.concatenate([np.full(n, float(b)) for b, n in shells])],
                       np.vstack([np.zeros((2, 3)), *(spread(n) for _, n in shells)]))


@pytest.mark.parametrize("directions,expected",
                         [(5, 0), (6, 2), (19, 2), (20, 4), (36, 4), (37, 6), (58, 6), (59, 8),
                          (200, 8)])
def test_degree_by_the_number_of_directions(directions, expected):
    acquisition = table((1000, directions))
    assert degree(acquisition, acquisition.shells[0]) == expected


def test_degree_by_the_condition_of_the_table(rng):
    """Directions near a plane, and a few directions repeated, determine less."""
    flat = rng.standard_normal((40, 3)) * [1, 1, 0.25]
    repeated = np.repeat(spread(7), 6, axis=0)
    for directions, highest in ((flat, 6), (repeated, 2), (flat * [1, 1, 0], 0)):
        directions = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        acquisition = Acquisition(np.full(len(directions), 1000.0), directions)
        found = degree(acquisition, acquisition.shells[0])
        assert found < 6 and found <= highest
        if found:
            basis = sh.basis(found, directions)
            assert np.linalg.cond(basis.T @ basis) <= 30


def test_predicts_a_signal_of_low_degree_but_for_shrinkage(method, rng):
    """Without noise a signal of degree 2 is shrunk by 1 / (1 + λ 36 · 4π/n) and nothing else."""
    acquisition, target = table((1000, 60)), table((1000, 45))[2:]
    coefficients = rng.standard_normal((50, 6)) + [10, 0, 0, 0, 0, 0]
    values = np.c_[np.full((50, 2), 20.0), coefficients @ sh.basis(2, acquisition.bvecs[2:]).T]
    dwi = replace(crossing_tensors.dwi_of(values, acquisition), noise_sd=None)
    made = method.predict(dwi, target, "cpu")
    shrunk = coefficients / np.r_[1, np.full(5, 1 + 0.006 * 36 * 4 * np.pi / 60)]
    # 60 directions integrate degree 2 only nearly
    np.testing.assert_allclose(made.signal, shrunk @ sh.basis(2, target.bvecs).T, atol=0.02)
    assert made.sd is None and "unknown" in made.parameters["Uncertainty"]


@pytest.mark.parametrize("target,b_delta", [(1100.0, 1.0), (500.0, 1.0), (1000.0, -0.5)])
def test_refuses_targets_off_the_shells(method, rng, target, b_delta):
    acquisition = table((1000, 30), (2000, 5))
    dwi = crossing_tensors.dwi_of(rng.uniform(1, 2, (10, len(acquisition))), acquisition)
    with pytest.raises(Refusal, match=r"(?s)cannot predict.*30 × b 1000"):
        method.predict(dwi, Acquisition([target], [[0, 0, 1]], [b_delta]), "cpu")
    method.predict(dwi, Acquisition([1040.0], [[0, 0, 1]]), "cpu")
    with pytest.raises(Refusal, match="b = 2000"):  # a shell of five directions
        method.predict(dwi, Acquisition([2000.0], [[0, 0, 1]]), "cpu")


def test_refuses_a_table_without_shells(method, rng):
    b = np.linspace(300, 3000, 60)
    with pytest.raises(Refusal, match="upsample_gp"):
        method.check(Acquisition(b, spread(60)))


def test_shells_do_not_mix(method, rng):
    """The prediction of one shell does not depend on the other, whose table differs."""
    acquisition = table((1000, 30), (2500, 45))
    values, _ = crossing_tensors.simulate(rng, acquisition, 40, 0.02)
    target = Acquisition(np.repeat([2500.0, 1000.0], 10), np.tile(spread(10), (2, 1)))
    dwi = crossing_tensors.dwi_of(values, acquisition)
    both = method.predict(dwi, target, "cpu")
    alone = method.predict(dwi.select_volumes(np.arange(32)), target[10:], "cpu")
    np.testing.assert_allclose(both.signal[:, 10:], alone.signal, atol=1e-6)


@pytest.mark.parametrize("directions", [12, 30, 60])
@pytest.mark.parametrize("sd", [0.02, 0.05])
def test_sd_is_that_of_the_error(method, rng, directions, sd):
    """Over all voxels, and in the less and the more anisotropic half of them."""
    acquisition, target = table((1500, directions)), table((1500, 41))[2:]
    both = Acquisition(np.r_[acquisition.bvals, target.bvals],
                       np.vstack([acquisition.bvecs, target.bvecs]))
    noisy, clean = crossing_tensors.simulate(rng, both, 6000, sd)
    n = len(acquisition)
    made = method.predict(crossing_tensors.dwi_of(noisy[:, :n], acquisition), target, "cpu")
    error = made.signal - clean[:, n:]
    order = np.argsort(clean[:, n:].std(1))
    for part in (order, order[:3000], order[3000:]):
        ratio = np.mean(error[part]**2) / np.mean(made.sd[part].astype(float)**2)
        assert 0.7 < ratio < 1.2
        covered = np.abs(made.signal - noisy[:, n:])[part] < 1.645 * np.hypot(made.sd[part], sd)
        assert 0.87 < covered.mean() < 0.94
