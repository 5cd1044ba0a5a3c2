"""Motion, eddy currents and outlier slices of a series that is computed at displaced points."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp.acquisition import Acquisition, PhaseEncoding
from bidsapp.preprocess import motion
from bidsapp.preprocess.model import resample
from bidsapp.registration.geometry import world_points

SHAPE, AFFINE = (30, 34, 26), np.diag([-4.0, 4, 4, 1])
AFFINE[:3, 3] = 58, -66, -50
SEMI_AXES = np.array([48.0, 56, 42])
ENCODING = PhaseEncoding(1, -1, 0.05)
PER_HERTZ = np.array([0, -0.05 * 4, 0])  # mm


def blobs():
    """Centres, widths, signals and diffusion tensors: of white matter, grey matter and CSF."""
    rng = np.random.default_rng(7)
    centres = rng.uniform(-0.75, 0.75, (80, 3)) * SEMI_AXES
    axes = rng.standard_normal((80, 3))
    axes /= np.linalg.norm(axes, axis=1, keepdims=True)
    tensors = 0.4e-3 * np.eye(3) + 1.2e-3 * axes[:, :, None] * axes[:, None]
    tensors[40:60], tensors[60:] = 0.8e-3 * np.eye(3), 2.5e-3 * np.eye(3)
    return centres, rng.uniform(4, 8, 80), np.repeat([50, 75, 150], [40, 20, 20]), tensors


def head(points, btensor):
    """Noise-free signal: blobs in an ellipsoid of 100 with a soft edge."""
    rho = np.linalg.norm(points / SEMI_AXES, axis=-1)
    edge = 0.5 - 0.5 * np.tanh((rho - 1) * 16)
    total = 60 * np.exp(-np.trace(btensor) * 0.8e-3)
    for centre, width, amplitude, tensor in zip(*blobs(), strict=True):
        blob = np.exp(-np.sum((points - centre)**2, -1) / (2 * width**2))
        total = total + amplitude * blob * np.exp(-np.sum(btensor * tensor))
    return edge * total


def susceptibility(points):
    return 25 * np.exp(-np.sum((points - np.array([0, 40, -20]))**2, -1) / 800)


def mask():
    return np.linalg.norm(world_points(SHAPE, AFFINE) / SEMI_AXES, axis=-1) < 1.03


@dataclass
class Scan:
    """A series with its truth."""

    volumes: list
    acquisition: Acquisition
    rotation: np.ndarray
    translation: np.ndarray
    eddy: np.ndarray
    with_field: bool

    def forward(self, v, x):
        y = x @ self.rotation[v].T + self.translation[v]
        return y + self.hertz(v, x, y)[..., None] * PER_HERTZ

    def hertz(self, v, x, y):
        a, b, c = np.moveaxis(y - (AFFINE[:3, :3] @ ((np.array(SHAPE) - 1) / 2) + AFFINE[:3, 3]),
                              -1, 0) / 100
        terms = [1, a, b, c, a * a, b * b, c * c, a * b, a * c, b * c]
        return sum(e * t for e, t in zip(self.eddy[v], terms, strict=True)) \
            + (susceptibility(x) if self.with_field else 0)

    def displacement_error(self, geometry):
        """RMS over voxels of the mask and volumes, mm."""
        x = world_points(SHAPE, AFFINE)[mask()][::7]
        return np.sqrt(np.mean([
            np.sum((geometry.coordinates(v, x)[0] @ AFFINE[:3, :3].T + AFFINE[:3, 3]
                    - self.forward(v, x))**2, -1) for v in range(len(self.volumes))]))


def directions(n):
    """(n, 3) over the whole sphere (golden spiral)."""
    z = 1 - (2 * np.arange(n) + 1) / n
    phi = np.arange(n) * np.pi * (3 - np.sqrt(5))
    return np.stack([np.sqrt(1 - z**2) * np.cos(phi), np.sqrt(1 - z**2) * np.sin(phi), z], -1)


def scan(bvals, b_delta=None, *, move=2.0, eddy=1.0, offset=0, field=False, noise=1.5, lost=(),
         seed=1, drift=0.0):
    """Simulate a scan. offset: SD (Hz) of a constant field in weighted volumes that is not linear
    in the gradient; lost: (slice, volume) of which half of the signal is lost; drift: along the
    phase encoding over the scan, mm."""
    rng = np.random.default_rng(seed)
    bvals, n = np.asarray(bvals, float), len(bvals)
    vectors = np.zeros((n, 3))
    vectors[bvals > 0] = rng.permutation(directions(int((bvals > 0).sum())))
    acquisition = Acquisition(bvals, vectors, b_delta)
    walk = np.cumsum(rng.standard_normal((n, 6)), 0)
    walk = (walk - walk[0]) * move / max(np.abs(walk - walk[0]).max(), 1e-9)
    walk[:, 4] += np.linspace(0, drift, n)
    size = np.array([8] + [12] * 3 + [10] * 6)
    q = np.sqrt(bvals / 1000)[:, None] * vectors
    truth = Scan([], acquisition, Rotation.from_rotvec(walk[:, :3], degrees=True).as_matrix(),
                 walk[:, 3:], eddy * q @ (size * rng.standard_normal((3, 10))), field)
    truth.eddy[:, 0] += offset * rng.standard_normal(n) * (bvals > 0)
    grid = world_points(SHAPE, AFFINE)
    for v in range(n):
        y, step = grid, 1e-3
        for _ in range(12):  # invert the displacement along the phase encoding
            x = (y - truth.translation[v]) @ truth.rotation[v]
            y = grid - truth.hertz(v, x, y)[..., None] * PER_HERTZ
        h = np.array([0, step, 0])
        x, ahead, behind = ((p - truth.translation[v]) @ truth.rotation[v]
                            for p in (y, y + h, y - h))
        slope = (truth.hertz(v, ahead, y + h) - truth.hertz(v, behind, y - h)) / (2 * step)
        btensor = truth.rotation[v].T @ acquisition.btensors[v] @ truth.rotation[v]
        clean = head(x, btensor) / (1 + PER_HERTZ[1] * slope)
        for k, _ in (slot for slot in lost if slot[1] == v):
            clean[:, :, k] *= 0.5
        real, imaginary = noise * rng.standard_normal((2, *SHAPE))
        truth.volumes.append(np.hypot(clean + real, imaginary).astype(np.float32))
    return truth


def estimate(truth, **more):
    given = {"encodings": [ENCODING] * len(truth.volumes), "mask": mask()} | more
    return motion.estimate(truth.volumes, truth.acquisition, given.pop("encodings"), AFFINE,
                           given.pop("mask"), **given)


def corrected(truth, estimated):
    """The series at rest, without outlier slices."""
    return resample(motion.replace_outliers(truth.volumes, estimated)[0], estimated.geometry, SHAPE,
                    AFFINE)


def nothing(truth):
    return motion.Geometry.static(AFFINE, SHAPE, [ENCODING] * len(truth.volumes))


TWO_SHELLS = [0, *[1000] * 7, 0, *[2500] * 8, 0, *[1000] * 7, *[2500] * 8, 0]
LOST = ((9, 3), (14, 12), (18, 27))


@pytest.fixture(scope="module")
def two_shells():
    truth = scan(TWO_SHELLS, lost=LOST)
    return truth, estimate(truth)


@pytest.mark.slow
def test_motion_and_eddy_currents(two_shells):
    truth, estimated = two_shells
    assert truth.displacement_error(nothing(truth)) > 1.5
    assert truth.displacement_error(estimated.geometry) < 0.6  # 4 mm voxels, 30 directions
    angle = Rotation.from_matrix(estimated.geometry.rotations
                                 @ np.swapaxes(truth.rotation, 1, 2)).magnitude()
    assert np.degrees(angle.mean()) < 0.6
    np.testing.assert_allclose(estimated.geometry.rotations[0], np.eye(3), atol=1e-12)
    np.testing.assert_allclose(
        estimated.acquisition.bvecs,
        np.einsum("nji,nj->ni", estimated.geometry.rotations, truth.acquisition.bvecs))
    assert estimated.notices == ()


@pytest.mark.slow
def test_outlier_slices_are_found_and_replaced(two_shells):
    truth, estimated = two_shells
    assert set(zip(*np.nonzero(estimated.outliers), strict=True)) == set(LOST)
    replaced, where = motion.replace_outliers(truth.volumes, estimated)
    np.testing.assert_array_equal(where, estimated.outliers)
    clean = scan(TWO_SHELLS, noise=0)
    for k, v in LOST:
        brain = mask()[:, :, k]
        error, before = (np.linalg.norm((x[v] - clean.volumes[v])[:, :, k][brain])
                         for x in (replaced, truth.volumes))
        assert error < 0.3 * before
        other = np.arange(SHAPE[2]) != k
        np.testing.assert_array_equal(replaced[v][:, :, other], truth.volumes[v][:, :, other])
    untouched = [v for v in range(len(TWO_SHELLS)) if v not in {v for _, v in LOST}]
    assert all(replaced[v] is truth.volumes[v] for v in untouched)


def test_small_slices():
    """A lost slice of 3500 mm² is found whatever the size of its voxels; one that is too small to
    be assessed does not make its neighbour an outlier."""
    truth = scan([0, *[1000] * 9], move=1.5, eddy=0)
    area = 16 * mask().sum((0, 1))
    found, small = (int(np.argmax(area > least)) for least in (2600, 1200))
    assert area[found] < 3500 and area[small] < motion.MIN_AREA < area[found]
    truth.volumes[4][:, :, found] *= 0.05
    truth.volumes[7][:, :, small] *= 0.05
    estimated = estimate(truth, smoothing=(5.0, 0.0))
    assert np.argwhere(estimated.outliers).tolist() == [[found, 4]]
    assert np.isnan(estimated.z[small]).all()


@pytest.mark.slow
def test_corrected_series_shows_the_head_at_rest(two_shells):
    truth, estimated = two_shells
    volumes = corrected(truth, estimated)
    points = world_points(SHAPE, AFFINE)
    squares = np.zeros(2)
    for v, volume in enumerate(volumes):
        still = head(points, truth.rotation[v].T @ truth.acquisition.btensors[v]
                     @ truth.rotation[v])
        squares += [np.sum((x - still)[mask()]**2) for x in (volume, truth.volumes[v])]
    assert squares[0] < 0.25 * squares[1]


@pytest.mark.slow
def test_the_field_moves_with_the_head():
    truth = scan([0, *[1200] * 9, 0, *[1200] * 9], field=True)
    field = susceptibility(world_points(SHAPE, AFFINE)).astype(np.float32)
    with_field = truth.displacement_error(estimate(truth, field=field).geometry)
    assert with_field < 0.6
    assert truth.displacement_error(estimate(truth).geometry) > with_field


@pytest.mark.slow
@pytest.mark.parametrize("bvals,b_delta", [
    ([0, *[1000] * 6], None),                                    # six directions, one b0
    ([1000] * 14, None),                                         # no b0
])
def test_tables(bvals, b_delta):
    """Without eddy currents all of these tables carry the motion."""
    truth = scan(bvals, b_delta, eddy=0)
    before = truth.displacement_error(nothing(truth))
    assert truth.displacement_error(estimate(truth).geometry) < 0.4 * before


@pytest.mark.parametrize("move", [0.3, 1, 3])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_b0_volumes(count, move):
    """Registrations of a few b0 volumes are exact to a tenth of a voxel, also where the first is
    brighter, as before the steady state."""
    truth = scan([0] * count, move=move)
    truth.volumes[0] = 1.15 * truth.volumes[0]
    estimated = estimate(truth)
    assert truth.displacement_error(estimated.geometry) < min(0.4, 0.7 * truth.displacement_error(
        nothing(truth)))


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3, 4])
def test_few_b0_volumes_among_weighted_ones(count):
    truth = scan(np.insert([1000.0] * 18, np.linspace(0, 18, count).astype(int), 0), eddy=0,
                 move=3)
    truth.volumes[0] = 1.15 * truth.volumes[0]
    assert truth.displacement_error(estimate(truth).geometry) < 0.6


@pytest.mark.slow
@pytest.mark.parametrize("bvals,b_delta", [
    ([0, 0, *np.linspace(200, 3000, 12).round()], None),           # no shells
    ([0, *[1500] * 6, *[1500] * 6], [1, *[1] * 6, *[-0.5] * 6]),   # linear and planar
])
def test_still_head_stays_nearly_still(bvals, b_delta):
    truth = scan(bvals, b_delta, eddy=0, move=0)
    assert truth.displacement_error(estimate(truth).geometry) < 1


@pytest.mark.slow
@pytest.mark.parametrize("move", [0, 2])
def test_field_is_not_motion(move):
    """An irregular constant of the field, 0.8 mm (SD), does not count as motion of a still head;
    motion along the phase encoding still does."""
    truth = scan([0, *[1500] * 16], move=move, offset=4, noise=1)
    geometry = estimate(truth).geometry
    centre = geometry.centre
    y, true = ((r @ centre + t - centre)[1:, 1] for r, t in (
        (geometry.rotations, geometry.translations), (truth.rotation, truth.translation)))
    assert np.std(truth.eddy[1:, 0] * PER_HERTZ[1]) > 0.5
    assert np.std(y - true) < 0.25
    assert not move or np.std(true) > 0.4


def positions(kind, deviation, rng, count=25):
    """Positions (mm) along the phase encoding of one b0 and weighted volumes, with the arguments of
    `_split_series` and the truth: field of 5 Hz linear in the gradient, independent deviations
    (Hz), an error of 0.3 mm of the registration of b0 to weighted volumes, noise of 0.03 mm."""
    b0, unit = np.arange(count) == 0, rng.standard_normal((count, 3))
    walk = rng.normal(0, 0.25, (count, 6)).cumsum(0) if kind == "walk" else np.zeros((count, 6))
    u = walk[:, 0] + {"drift": np.linspace(0, 3, count),
                      "step": 2.0 * (np.arange(count) > count // 2)}.get(kind, 0)
    u -= u[0]
    others = walk[:, 1:] + rng.normal(0, 0.05, (count, 5)) * ~b0[:, None]
    q = unit / np.linalg.norm(unit, axis=1, keepdims=True) * ~b0[:, None]
    shared, s = rng.normal(0, 0.3), np.full(count, PER_HERTZ[1])
    field = q @ rng.normal(0, 5, 3) + rng.normal(0, deviation, count)
    position = u + (s * field + shared + rng.normal(0, 0.03, count)) * ~b0
    return (position, s, q, (np.diff(others, axis=0)**2).mean(1), b0), u, shared


@pytest.mark.parametrize("kind,deviation,error,largest", [
    ("still", 0.5, 0.1, 0.1), ("still", 2.5, 0.2, 0.2), ("still", 8, 0.3, 0.2),
    ("drift", 0.5, 0.25, 0.3), ("drift", 2.5, 0.35, 0.45), ("step", 2.5, 0.3, 0.5),
    ("walk", 2.5, 0.3, 0.4), ("walk", 8, 0.35, 0.55)])
def test_series_from_one_b0(kind, deviation, error, largest):
    """The order of the scan leads the weighted volumes nearer to the b0 than the images put them,
    and at most a tenth further away."""
    squares = np.zeros((20, 3))
    for seed in range(20):
        given, u, shared = positions(kind, deviation, np.random.default_rng(seed))
        head, offset = motion._split_series(*given)
        squares[seed] = (offset - shared)**2, np.mean((head - u)[1:]**2), shared**2
        assert abs(head[0] - u[0]) < 0.01
    shared, head, images = np.sqrt(squares.mean(0))
    assert shared < min(error, 1.1 * images) and head < largest


def test_without_b0_there_is_no_shared_error():
    (position, s, q, squares, b0), u, _ = positions("walk", 0.5, np.random.default_rng(0))
    head, offset = motion._split_series(position[1:], s[1:], q[1:], squares[1:], b0[1:])
    assert offset == 0 and np.std(head - u[1:]) < 0.3
    far, _ = motion._split_series(position[1:] + 40, s[1:], q[1:], squares[1:], b0[1:])
    np.testing.assert_allclose(far, head + 40, atol=0.02)


@pytest.mark.slow
def test_a_drift_does_not_put_weighted_volumes_off_the_only_b0():
    """3 mm along the phase encoding, beside independent deviations of the field of 0.5 mm."""
    truth = scan([0, *[1000] * 20], move=0, offset=2.5, noise=1, drift=3)
    assert truth.displacement_error(estimate(truth).geometry) < 0.4


@pytest.fixture(scope="module")
def still():
    """A head at rest, its volumes loaded, and the estimation's state before any step."""
    truth = scan([0, *[1000] * 6], move=0, eddy=0)
    state = motion._Head(truth.volumes, truth.acquisition, (ENCODING,) * 7, AFFINE, mask(), None,
                         "cpu", 2)
    state.load(np.arange(7), 5.0)
    return state


@pytest.mark.parametrize("terms,along", [((), 0.3), ((1, 2, 3), 0.6)])
def test_images_and_order_of_the_scan_count_by_their_errors(still, monkeypatch, terms, along):
    """Equal errors: half each. Along the phase encoding `separate` weighs them, if there is a
    field."""
    shift, b0, weighted = np.full(3, 0.6), np.arange(1), np.arange(1, 7)
    monkeypatch.setattr(still, "shift", np.zeros((7, 3)))
    monkeypatch.setattr(still, "rotation", np.tile(np.eye(3), (7, 1, 1)))
    monkeypatch.setattr(still, "_match_b0", lambda *a: (np.array([0.01, 0, 0]), shift))
    monkeypatch.setattr(still, "_follow_b0", lambda *a: (
        np.zeros(3), np.zeros(3), motion.CONTRAST_ANGLE, motion.CONTRAST_SHIFT))
    still.anchor(b0, weighted, np.array(terms, int))
    turn = Rotation.from_matrix(still.rotation[1:])
    np.testing.assert_allclose(turn.as_rotvec(), [[-0.005, 0, 0]] * 6, atol=1e-9)
    np.testing.assert_allclose(still.shift[1:], turn.apply([[-0.3, -along, -0.3]] * 6), atol=1e-9)
    assert not still.shift[0].any()


def test_residuals_that_are_alike_within_blocks_tell_less(still):
    """The precision of a step is lower if neighbouring residuals are correlated."""
    rng = np.random.default_rng(0)
    sampled = still.sample(np.arange(1, 7))
    predicted, slope = sampled.signal.mean(0), sampled.gradient.mean(0)
    size = slope[0].abs() / slope[0].abs().mean()
    signs = torch.from_numpy(rng.choice([-1.0, 1.0], still.n_blocks).astype(np.float32))
    white = torch.from_numpy(rng.choice([-1.0, 1.0], len(size)).astype(np.float32))
    precision = [still._normal(1, predicted + 2 * size * sign, predicted, slope,
                               torch.ones_like(predicted), np.zeros(0, int))[0]
                 for sign in (signs[still.blocks] * slope[0].sign(), white)]
    assert precision[0][0, 0] < 0.2 * precision[1][0, 0]


def test_a_part_of_the_misalignment_of_the_predictions_is_taken_back(still):
    """If the predictions share a misalignment u by a factor w, the steps show (1 − w) u."""
    index, w, u = np.arange(1, 7), 0.8, np.array([1.0, -1, 1, -1, 1, -1])
    shared = w * np.outer(u, u) / 6
    normal = np.tile(1e6 * np.eye(6), (6, 1, 1))
    right = 1e6 * (1 - w) * u[:, None] * np.eye(6)[0]
    steps = still._solve(index, normal, right, shared, np.zeros(0, int))[:, 0] / u
    assert np.all(steps > 1.2 * (1 - w)) and np.all(steps < 0.5)


@pytest.mark.slow
def test_slab():
    truth = scan([0, *[1000] * 12], eddy=0.5, move=1.5)
    slab = mask()
    slab[:, :, :9] = slab[:, :, 17:] = False
    truth.volumes = [v[:, :, 8:18] for v in truth.volumes]
    affine = AFFINE.copy()
    affine[2, 3] += 8 * 4
    estimated = motion.estimate(truth.volumes, truth.acquisition, [ENCODING] * 13, affine,
                                slab[:, :, 8:18])
    x = world_points(SHAPE, AFFINE)[slab]
    after, before = (np.mean([np.sum(
        (geometry.coordinates(v, x)[0] @ affine[:3, :3].T + affine[:3, 3]
         - truth.forward(v, x))**2, -1) for v in range(13)])
        for geometry in (estimated.geometry,
                         motion.Geometry.static(affine, (30, 34, 10), [ENCODING] * 13)))
    assert after < 0.25 * before


def test_without_phase_encoding_eddy_currents_are_left_out():
    truth = scan([0, *[1000] * 6], move=1)
    for encodings in ([None] * 7, [PhaseEncoding(1, 1)] * 7):
        estimated = estimate(truth, encodings=encodings, smoothing=(5.0,))
        assert not estimated.geometry.eddy.any()
        assert "readout time is unknown" in estimated.notices[0]
        assert estimated.eddy_terms == 0


def test_complex_volumes(rng):
    truth = scan([0, *[1000] * 6], move=1, lost=[(12, 4)])
    waves = np.exp(1j * rng.uniform(0, 6, (7, 1, 1, 1)) * np.ones(SHAPE))
    magnitude = estimate(truth, smoothing=(5.0,))
    truth.volumes = [v * w for v, w in zip(truth.volumes, waves, strict=True)]
    estimated = estimate(truth, smoothing=(5.0,))
    np.testing.assert_allclose(estimated.geometry.translations, magnitude.geometry.translations,
                               atol=1e-3)
    for v, volume in enumerate(corrected(truth, estimated)):
        assert volume.dtype == np.complex64
        np.testing.assert_allclose(np.angle(volume / waves[v])[mask()], 0, atol=1e-4)


def test_replaced_slices_of_signed_data_have_no_bias(rng):
    """Noise about 0 outside of the head keeps its mean, as the rest of a real part has it."""
    truth = scan([0, *[1000] * 6], move=0)
    estimated = estimate(truth, smoothing=(5.0,))
    lost = np.zeros_like(estimated.outliers)
    lost[13, 3] = True
    volumes = [5 * rng.standard_normal(SHAPE).astype(np.float32) for _ in truth.volumes]
    replaced, _ = motion.replace_outliers(volumes, replace(estimated, outliers=lost))
    values = replaced[3][:, :, 13]
    assert not np.array_equal(values, volumes[3][:, :, 13]) and values.min() < 0
    assert abs(values.mean()) < 0.3 * values.std()


def test_a_slice_that_no_other_volume_shows_is_not_replaced():
    truth = scan([0, *[1000] * 6], move=0)
    estimated = estimate(truth, smoothing=(5.0,))
    lost = np.zeros_like(estimated.outliers)
    lost[13, 1:] = True
    volumes, replaced = motion.replace_outliers(truth.volumes, replace(estimated, outliers=lost))
    assert not replaced.any()
    assert all(a is b for a, b in zip(volumes, truth.volumes, strict=True))


def test_one_weighted_volume_and_refusals():
    truth = scan([0, 0, 1000], move=1)
    assert "only weighted volume" in estimate(truth, smoothing=(5.0,)).notices[1]
    with pytest.raises(ValueError, match="2 encodings"):
        estimate(truth, encodings=[None] * 2)
    with pytest.raises(ValueError, match="0 voxels"):
        estimate(truth, mask=np.zeros(SHAPE, bool))
