"""Acquisition and Shell: what they refuse at birth, and the equations they hold to."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.errors import DataError

AXES = np.eye(3)


def unit(rng, n):
    g = rng.normal(size=(n, 3))
    return g / np.linalg.norm(g, axis=1, keepdims=True)


@pytest.mark.parametrize(("bvals", "bvecs", "b_delta", "message"), [
    ([], np.zeros((0, 3)), None, "one number per volume"),
    ([[0, 1]], AXES, None, "one number per volume"),
    ([0, 1000], AXES, None, "there are 2 b-values"),
    ([0, 1000, 1000], AXES, [1, 1], "one b_delta per volume"),
    ([0, -5, 1000], AXES, None, "b-value -5 of volume 1"),
    ([0, 1000, np.nan], AXES, None, "b-value nan of volume 2"),
    ([0, 1000, 100_001], AXES, None, "b-value 100001 of volume 2 is above 100,000.*divide"),
    ([0, 1000, 1000], AXES, [1, 1.2, 1], "b_delta 1.2 of volume 1"),
    ([0, 1000, 1000], AXES, [1, -0.7, 1], "b_delta -0.7 of volume 1"),
    ([0, 1000, 1000], [[0, 0, 0], [1, 0, np.inf], [0, 0, 1]], None, "volume 1 is not finite"),
    ([0, 1000, 1000], [[0, 0, 0], [1, 0, 0], [0, 0, 0]], None, "volume 2 .* is zero"),
    ([0, 1000, 1000], [[0, 0, 0], [0.9, 0, 0], [0, 0, 1]], None, "volume 1 has length 0.9"),
])
def test_refuses_bad_state(bvals, bvecs, b_delta, message):
    with pytest.raises(DataError, match=message):
        Acquisition(np.array(bvals), np.array(bvecs), b_delta)


def test_spherical_encoding_and_b0_need_no_direction():
    acq = Acquisition(np.array([0, 5, 1000]), np.zeros((3, 3)), np.array([1, 1, 0]))
    np.testing.assert_allclose(acq.btensors[2], 1000 / 3 * np.eye(3))


def test_is_frozen_and_normalised(rng):
    bvals = np.array([0.0, 1000, 1000])
    acq = Acquisition(bvals, 1.01 * AXES)
    bvals[1] = 7
    assert acq.bvals[1] == 1000
    np.testing.assert_allclose(np.linalg.norm(acq.bvecs, axis=1), 1)
    for array in (acq.bvals, acq.bvecs, acq.b_delta):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@given(b=st.floats(50, 5000), s=st.floats(-0.5, 1), seed=st.integers(0, 1000))
def test_btensor_has_trace_b_and_the_eigenvalues_of_its_shape(b, s, seed):
    """b (1 + 2 b_Δ)/3 along n, b (1 − b_Δ)/3 across."""
    n = unit(np.random.default_rng(seed), 1)
    tensor = Acquisition(np.array([b]), n, np.array([s])).btensors[0]
    assert np.trace(tensor) == pytest.approx(b)
    np.testing.assert_allclose(tensor @ n[0], b * (1 + 2 * s) / 3 * n[0], atol=1e-9 * b)
    expected = sorted([b * (1 + 2 * s) / 3, b * (1 - s) / 3, b * (1 - s) / 3])
    np.testing.assert_allclose(np.linalg.eigvalsh(tensor), expected, atol=1e-9 * b)


@given(st.permutations(list(range(40))))
def test_shells_do_not_depend_on_order(order):
    rng = np.random.default_rng(1)
    b = np.r_[np.zeros(4), rng.uniform(690, 710, 10), rng.uniform(1980, 2020, 16), np.full(10, 2e3)]
    s = np.r_[np.ones(30), np.full(10, -0.5)]
    acq = Acquisition(b, unit(rng, 40), s)[np.array(order)]
    shells = acq.shells
    assert [(len(x), round(x.b_delta, 2)) for x in shells] in (
        [(10, 1.0), (16, 1.0), (10, -0.5)], [(10, 1.0), (10, -0.5), (16, 1.0)])
    members = np.concatenate([x.indices for x in shells])
    np.testing.assert_array_equal(np.sort(members), np.flatnonzero(~acq.b0))
    for shell in shells:
        assert shell.b == pytest.approx(acq.bvals[shell.indices].mean())
        assert (np.diff(shell.indices) > 0).all()


@pytest.mark.parametrize(("values", "count"), [
    ([1000, 1055], 1), ([1000, 1105], 2), ([300, 355], 1), ([300, 365], 2), ([2000, 2190], 1),
    ([2000, 2210], 2), ([940, 990, 1040, 1090], 1)])
def test_shell_gap(values, count):
    """A step above max(60 s/mm², 10 % of b) starts a shell; chains of small steps do not."""
    acq = Acquisition(np.array(values, float), np.tile(AXES[:1], (len(values), 1)))
    assert len(acq.shells) == count


def test_b0_is_below_50():
    acq = Acquisition(np.array([0, 49.9, 50, 1000]), np.tile(AXES[:1], (4, 1)))
    np.testing.assert_array_equal(acq.b0, [1, 1, 0, 0])


def test_rotation_turns_tensors(rng):
    acq = Acquisition(np.full(9, 1500.0), unit(rng, 9), rng.uniform(-0.5, 1, 9))
    r = Rotation.random(random_state=3).as_matrix()
    np.testing.assert_allclose(acq.rotated(r).btensors, r @ acq.btensors @ r.T, atol=1e-9)
    with pytest.raises(ValueError, match="orthogonal"):
        acq.rotated(2 * r)


def test_rotation_per_measurement(rng):
    acq = Acquisition(np.full(9, 1500.0), unit(rng, 9), rng.uniform(-0.5, 1, 9))
    r = Rotation.random(9, random_state=3).as_matrix()
    np.testing.assert_allclose(acq.rotated(r).btensors,
                               r @ acq.btensors @ np.swapaxes(r, 1, 2), atol=1e-9)
    with pytest.raises(ValueError, match="one per measurement"):
        acq.rotated(r[:8])


def test_indexing_keeps_tables_aligned(rng):
    acq = Acquisition(rng.uniform(100, 3000, 8), unit(rng, 8), rng.uniform(-0.5, 1, 8),
                      echo_time=0.08)
    for index in (slice(2, 7), np.array([5, 0, 3]), np.arange(8) % 2 == 0):
        np.testing.assert_array_equal(acq[index].btensors, acq.btensors[index])
    assert len(acq[3]) == 1
    assert acq[1:4].echo_time == 0.08


def test_concatenation_undoes_splitting(rng):
    acq = Acquisition(rng.uniform(100, 3000, 8), AXES[rng.integers(0, 3, 8)],
                      rng.uniform(-0.5, 1, 8), echo_time=0.08)
    assert concatenate([acq[:3], acq[3:]]) == acq
    assert acq != acq[::-1]
    other = Acquisition(acq.bvals, acq.bvecs, acq.b_delta, echo_time=0.09)
    assert concatenate([acq, other]).echo_time is None
    assert acq != other


def test_dipy_sees_the_same_table(rng):
    linear = Acquisition(np.r_[0, rng.uniform(500, 3000, 7)], unit(rng, 8))
    table = linear.to_dipy()
    np.testing.assert_allclose(table.bvals, linear.bvals)
    np.testing.assert_allclose(table.bvecs[1:], linear.bvecs[1:])
    np.testing.assert_array_equal(table.b0s_mask, linear.b0)
    shaped = Acquisition(linear.bvals, linear.bvecs, np.r_[1, np.full(7, -0.5)])
    np.testing.assert_allclose(shaped.to_dipy().btens, shaped.btensors, atol=1e-6)
