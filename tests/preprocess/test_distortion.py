"""Fields from pairs, gradient-echo maps and T1w images, against formulas of a simulated head.

The simulation moves the signal of eight points per voxel to where the field puts it and sums it per
voxel, so that it uses nothing of the correction, which interpolates.
"""

from functools import cache

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import PhaseEncoding
from bidsapp.errors import DataError
from bidsapp.preprocess.distortion import (
    field_from_gre,
    field_from_pair,
    field_from_t1w,
    undistort,
)

SHAPE, SIZE, READOUT, FINE = (40, 44, 32), 4.5, 0.05, 8
FORWARD, BACKWARD = PhaseEncoding(1, 1, READOUT), PhaseEncoding(1, -1, READOUT)
AFFINE = np.diag([-SIZE, SIZE, SIZE, 1.0])
AFFINE[:3, 3] = -AFFINE[:3, :3] @ (np.array(SHAPE) - 1) / 2


def step(distance):
    return 1 / (1 + np.exp(-(distance / 2).clip(-40, 40)))


def tissue(x):
    """b0 of an ellipsoid with ventricles, nuclei and waves; white matter is 1."""
    a, b, c = np.moveaxis(x, -1, 0)
    r = np.sqrt((a / 64) ** 2 + (b / 78) ** 2 + (c / 56) ** 2)
    waves = np.sin(0.2 * a + 1) * np.sin(0.17 * b) + np.sin(0.21 * c) * np.cos(0.19 * a)
    ventricles = step((1 - np.hypot(np.hypot((abs(a) - 14) / 9, b / 32), (c - 8) / 14)) * 9)
    nuclei = step((1 - np.hypot(np.hypot((abs(a) - 30) / 9, (b - 20) / 20), (c + 10) / 12)) * 9)
    return step((1 - r) * 62) * (1.1 + 0.3 * waves + 1.2 * ventricles - 0.4 * nuclei)


def field(x):
    """Hz: a dipole in front of and below the head, and a shim."""
    d = x - np.array([5.0, 74.0, -52.0])
    r = np.sqrt((d**2).sum(-1)).clip(22)
    return 6 + 0.1 * x[..., 1] - 0.08 * x[..., 0] + 60 * (22 / r) ** 3 * (3 * (d[..., 2] / r) ** 2
                                                                         - 1)


def world(affine=AFFINE, shape=SHAPE, axis=0, fine=1):
    index = [np.arange(n, dtype=float) for n in shape]
    index[axis] = (np.arange(shape[axis] * fine) + 0.5) / fine - 0.5
    return np.stack(np.meshgrid(*index, indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


def acquire(encoding, affine=AFFINE, shape=SHAPE, move=None, sd=0.0, seed=0):
    axis, n = encoding.axis, shape[encoding.axis]
    x = world(affine, shape, axis, FINE)
    if move is not None:
        back = np.linalg.inv(move)
        x = x @ back[:3, :3].T + back[:3, 3]
    shift = encoding.sign * encoding.readout * field(x)
    mass = np.moveaxis(tissue(x), axis, -1).reshape(-1, n * FINE) / FINE
    to = np.moveaxis(shift, axis, -1).reshape(mass.shape) + (np.arange(n * FINE) + 0.5) / FINE - 0.5
    # a point is a box of its own width, shared by the two voxels that it touches
    low = np.floor(to + 0.5 - 0.5 / FINE).astype(int)
    over = ((to + 0.5 + 0.5 / FINE - (low + 1)) * FINE).clip(0, 1)
    out = np.zeros((len(to), n + 2))
    for cell, part in ((low, 1 - over), (low + 1, over)):
        np.add.at(out, (np.arange(len(to))[:, None], (cell + 1).clip(0, n + 1)), mass * part)
    rest = [m for a, m in enumerate(shape) if a != axis]
    image = np.moveaxis(out[:, 1:-1].reshape(*rest, n), -1, axis)
    noise = np.random.default_rng(seed).normal(0, 1, (2, *shape)) * sd
    return np.hypot(image + noise[0], noise[1]).astype(np.float32)


@cache
def pair(sd=0.03):
    return acquire(FORWARD, sd=sd), acquire(BACKWARD, sd=sd, seed=1)


BRAIN = tissue(world()) > 0.5


def shift_error(hz, affine=AFFINE, brain=BRAIN):
    """RMS error of the displacement in the brain, voxels, and that of no correction."""
    truth = field(world(affine, hz.shape))
    return [READOUT * float(np.sqrt(((h - truth)[brain] ** 2).mean())) for h in (hz, 0 * hz)]


def test_the_true_field_undoes_the_distortion():
    """undistort has the model's sign and intensity: both directions give the tissue back."""
    truth = field(world()).astype(np.float32)
    still = acquire(PhaseEncoding(1, 1, 1e-9))
    gentle = BRAIN & (np.abs(np.gradient(READOUT * truth, axis=1)) < 0.3)
    assert gentle.sum() > 0.95 * BRAIN.sum()
    for encoding, image in zip((FORWARD, BACKWARD), pair(0.0), strict=True):
        restored = undistort(image, truth, AFFINE, encoding)
        dense = restored / (1 + encoding.sign * np.gradient(READOUT * truth, axis=1))
        wrong, shifted, right = (((i - still)[gentle] ** 2).mean()
                                 for i in (image, dense, restored))
        assert right < 0.05 * wrong and right < 0.5 * shifted


def test_pair_finds_the_field():
    first, second = pair()
    copies = first.copy(), second.copy()
    result = field_from_pair(first, second, AFFINE, FORWARD, BACKWARD)
    assert all(map(np.array_equal, copies, (first, second)))
    error, nothing = shift_error(result.hz)
    assert error < 0.12 < 0.4 < nothing
    assert result.before < 0.95 and result.after > 0.99
    assert result.hz.dtype == np.float32 and result.hz.shape == SHAPE
    assert 0 < result.jacobian[0] < 1 < result.jacobian[1] < 2
    move = result.move - np.eye(4)
    assert np.abs(move[:3, 3]).max() < 0.2 and np.abs(move[:3, :3]).max() < np.radians(0.2)


def test_a_larger_readout_is_a_smaller_field():
    """The displacement stays, so that the field in Hz is inverse to the readout time."""
    slow = [PhaseEncoding(1, s, 2 * READOUT) for s in (1, -1)]
    usual = field_from_pair(*pair(), AFFINE, FORWARD, BACKWARD)
    assert np.allclose(2 * field_from_pair(*pair(), AFFINE, *slow).hz, usual.hz, atol=1e-3)


def test_readout_times_may_differ():
    fast = PhaseEncoding(1, -1, 0.6 * READOUT)
    result = field_from_pair(pair()[0], acquire(fast, sd=0.03, seed=1), AFFINE, FORWARD, fast)
    assert shift_error(result.hz)[0] < 0.12


@pytest.mark.parametrize("axis", [0, 2])
def test_any_axis(axis):
    """The head lies as before, and the image's axes are permuted."""
    order = [1, 0, 2] if axis == 0 else [0, 2, 1]
    affine = AFFINE[:, [*order, 3]]
    encodings = [PhaseEncoding(axis, s, READOUT) for s in (1, -1)]
    images = [i.transpose(order) for i in pair()]
    result = field_from_pair(*images, affine, *encodings)
    usual = field_from_pair(*pair(), AFFINE, FORWARD, BACKWARD)
    # the levels of a grid do not depend on its order, but the search order of sums does
    assert np.abs(result.hz.transpose(order) - usual.hz)[BRAIN].max() * READOUT < 0.05


def test_either_may_be_first():
    forth = field_from_pair(*pair(), AFFINE, FORWARD, BACKWARD).hz
    back = field_from_pair(*pair()[::-1], AFFINE, BACKWARD, FORWARD).hz
    assert READOUT * np.sqrt(((forth - back)[BRAIN] ** 2).mean()) < 0.05


def test_motion_between_the_images_is_found():
    """The head moved by 2° about each axis and up to 3 mm across the phase axis."""
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", (2, -2, 2), degrees=True).as_matrix()
    move[:3, 3] = 2, 0, -3
    second = acquire(BACKWARD, move=move, sd=0.03, seed=1)
    result = field_from_pair(pair()[0], second, AFFINE, FORWARD, BACKWARD)
    apart = Rotation.from_matrix(result.move[:3, :3].T @ move[:3, :3]).magnitude()
    assert np.degrees(apart) < 0.5
    assert np.abs((result.move - move)[[0, 2], 3]).max() < 0.5
    assert shift_error(result.hz)[0] < 0.2
    assert result.after > 0.98


def test_a_second_grid_is_resampled():
    """Images of one shape whose affines differ: the second field of view was shifted by 2 mm."""
    affine = AFFINE.copy()
    affine[:3, 3] += 2, 0, 2
    second = acquire(BACKWARD, affine, sd=0.03, seed=1)
    result = field_from_pair(pair()[0], second, AFFINE, FORWARD, BACKWARD, second_affine=affine)
    assert shift_error(result.hz)[0] < 0.12
    assert np.abs(result.move[[0, 2], 3]).max() < 0.3


def test_a_pair_without_distortion_gets_no_field():
    image = tissue(world())
    noise = np.random.default_rng(0).normal(0, 0.03, (2, *SHAPE))
    result = field_from_pair(*np.abs(image + noise), AFFINE, FORWARD, BACKWARD)
    assert READOUT * np.sqrt((result.hz[BRAIN] ** 2).mean()) < 0.1


def test_noise_does_not_fold():
    noise = np.random.default_rng(0).random((2, 24, 24, 12))
    result = field_from_pair(*noise, np.diag([3, 3, 3, 1.0]), FORWARD, BACKWARD)
    assert np.isfinite(result.hz).all() and result.jacobian[0] > 0


def test_one_slice_and_missing_values():
    images = [i[:, :, 12:13].copy() for i in pair()]
    images[0][3, 4] = np.nan
    result = field_from_pair(*images, AFFINE, FORWARD, BACKWARD)
    assert np.isfinite(result.hz).all() and result.after > result.before


def test_images_of_different_heads_are_told():
    other = pair()[1][::-1, :, ::-1]
    result = field_from_pair(pair()[0], other, AFFINE, FORWARD, BACKWARD)
    assert result.after < 0.9 and f"{result.after:.2f}" in result.notices[0]
    assert field_from_pair(*pair(), AFFINE, FORWARD, BACKWARD).notices == ()


@pytest.mark.parametrize("change,message", [
    ({"first": np.ones((9, 7, 9)), "second": np.ones((9, 7, 9))}, "7 voxels along the phase axis"),
    ({"second_encoding": FORWARD}, "j and j"),
    ({"second_encoding": PhaseEncoding(0, -1, READOUT)}, "j and i-"),
    ({"second_encoding": PhaseEncoding(1, -1)}, "readout time is unknown"),
    ({"second": np.zeros(SHAPE)}, "second image of the pair holds no signal"),
    ({"second": np.ones((4, 5, 6))}, "shapes"),
    ({"first": np.full(SHAPE, np.nan)}, "first image of the pair holds no signal"),
])
def test_pairs_that_are_refused(change, message):
    given = {"first": pair()[0], "second": pair()[1], "affine": AFFINE, "first_encoding": FORWARD,
             "second_encoding": BACKWARD, **change}
    with pytest.raises(DataError, match=message):
        field_from_pair(**given)


GRE_AFFINE = np.diag([-5.0, 5.0, 5.0, 1.0])
GRE_SHAPE = (36, 40, 30)
GRE_AFFINE[:3, 3] = -GRE_AFFINE[:3, :3] @ (np.array(GRE_SHAPE) - 1) / 2
TIMES = (0.005, 0.015)


def phase_of(time):
    """Phase of an echo, (−π, π]: it wraps at ±50 Hz for the difference of TIMES."""
    return np.angle(np.exp(2j * np.pi * time * field(world(GRE_AFFINE, GRE_SHAPE))))


def magnitude():
    """Gradient echo of the head, whose ventricles are dark."""
    signal = tissue(world(GRE_AFFINE, GRE_SHAPE))
    return np.where(signal > 0.3, 2.6 - signal, 0.0)


def noise():
    """Phases of the air in two echoes."""
    return np.random.default_rng(0).uniform(-np.pi, np.pi, (2, *GRE_SHAPE))


@pytest.mark.parametrize("kind,images,units", [
    ("phasediff", lambda: [phase_of(TIMES[1] - TIMES[0])], "rad"),
    ("phasediff", lambda: [np.round(phase_of(TIMES[1] - TIMES[0]) * 4095 / np.pi)], None),
    ("phasediff", lambda: [np.round((phase_of(TIMES[1] - TIMES[0]) / np.pi + 1) * 2047.5)],
     "arbitrary"),
    ("phasediff", lambda: [np.round(phase_of(TIMES[1] - TIMES[0]) * 2047 / np.pi)], None),
    ("phasediff", lambda: [np.round(phase_of(TIMES[1] - TIMES[0]) * 1000)], "arbitrary"),
    ("phases", lambda: [np.round(1000 * np.where(magnitude() > 0, phase_of(t), air))
                        for t, air in zip(TIMES, noise(), strict=True)], None),
    ("phases", lambda: [phase_of(t) for t in TIMES], "rad"),
    ("fieldmap", lambda: [field(world(GRE_AFFINE, GRE_SHAPE))], "Hz"),
    ("fieldmap", lambda: [2 * np.pi * field(world(GRE_AFFINE, GRE_SHAPE))], "rad/s"),
    ("fieldmap", lambda: [field(world(GRE_AFFINE, GRE_SHAPE)) / 42.577e6], "T"),
])
def test_field_maps_of_every_kind_and_unit(kind, images, units):
    result = field_from_gre(kind, images(), magnitude(), GRE_AFFINE, pair()[0], AFFINE, FORWARD,
                            echo_times=TIMES, units=units)
    inner = tissue(world()) > 0.9
    error = (result.hz - field(world()))[inner]
    assert np.abs(field(world(GRE_AFFINE, GRE_SHAPE))[magnitude() > 0]).max() > 60
    assert np.sqrt((error**2).mean()) < 1.0 and abs(np.median(error)) < 0.2
    assert np.array_equal(result.move, np.eye(4))


def test_a_field_map_of_a_moved_head_is_placed():
    move = np.eye(4)
    move[:3, :3] = Rotation.from_euler("xyz", (4, 0, -5), degrees=True).as_matrix()
    move[:3, 3] = 5, 0, -6
    hz = field(world(GRE_AFFINE, GRE_SHAPE))
    result = field_from_gre("fieldmap", [hz], magnitude(), move @ GRE_AFFINE, pair()[0], AFFINE,
                            FORWARD, units="Hz")
    apart = Rotation.from_matrix(result.move[:3, :3].T @ move[:3, :3]).magnitude()
    assert np.degrees(apart) < 1.5
    assert np.abs((result.move - move)[:3, 3]).max() < 1.5


def test_a_field_map_for_a_slab():
    """Two slices of the b0 get their part of the field."""
    affine = AFFINE.copy()
    affine[2, 3] += 15 * SIZE
    result = field_from_gre("fieldmap", [field(world(GRE_AFFINE, GRE_SHAPE))], magnitude(),
                            GRE_AFFINE, pair()[0][:, :, 15:17].copy(), affine, FORWARD, units="Hz")
    inner = tissue(world())[:, :, 15:17] > 0.9
    assert np.abs((result.hz - field(world())[:, :, 15:17])[inner]).max() < 1.5


@pytest.mark.parametrize("change,message", [
    ({"images": [np.linspace(0, 77, 43200).reshape(GRE_SHAPE)]}, "from 0 to 77"),
    ({"images": [np.zeros(GRE_SHAPE)]}, "holds no values but 0"),
    ({"kind": "fieldmap", "units": "Gauss"}, "Gauss"),
    ({"echo_times": None}, "echo times"),
    ({"echo_times": (0.01, 0.01)}, "echo times"),
    ({"images": [np.ones((3, 3, 3))]}, "shape"),
    ({"magnitude": np.zeros(GRE_SHAPE)}, "magnitude of the field map holds no signal"),
    ({"encoding": PhaseEncoding(1, 1)}, "readout time is unknown"),
])
def test_field_maps_that_are_refused(change, message):
    given = {"kind": "phasediff", "images": [phase_of(0.005)], "magnitude": magnitude(),
             "affine": GRE_AFFINE, "b0": pair()[0], "b0_affine": AFFINE, "encoding": FORWARD,
             "echo_times": TIMES, **change}
    with pytest.raises(DataError, match=message):
        field_from_gre(**given)


def test_t1w_lowers_the_error():
    """The T1w has the reverse contrast. It is not asked for the constant part of the field."""
    t1w = np.where(BRAIN, 3.0 - tissue(world()), 0)
    result = field_from_t1w(pair()[0], AFFINE, FORWARD, t1w, AFFINE)
    truth = field(world())[BRAIN]
    assert np.std(result.hz[BRAIN] - truth) < np.std(truth)
    assert np.corrcoef(result.hz[BRAIN], truth)[0, 1] > 0.4
    assert abs(np.median(result.hz[BRAIN])) < 1
    assert result.jacobian[0] > 0 and "least exact" in result.notices[0]


def test_a_t1w_elsewhere_is_refused():
    affine = AFFINE.copy()
    affine[:3, 3] += 100
    with pytest.raises(DataError, match="at least half"):
        field_from_t1w(pair()[0], AFFINE, FORWARD, np.where(BRAIN, 1.0, 0), affine)
