"""More directions by the spherical network: contract, refusals, and what it adds to few directions.

Truth comes from the forward models on slabs of tissue that the training did not draw.
"""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import blocks, checkpoint, kinds, methods, sh, training, upsample
from bidsapp.acquisition import Acquisition, concatenate
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.methods.upsample_scnn import learn, shells
from bidsapp.methods.upsample_scnn import method as module
from bidsapp.networks.upsampling import CENTRE, Coefficients
from bidsapp.simulate import forward, noise, odf, patches, protocols

SHAPE = (7, 8, 6)


def acquisition(n=20, b=(2000.0,), b0=2, seed=0):
    turn = Rotation.random(len(b), random_state=seed)
    g = [r.apply(protocols.spread(n)) for r in turn]
    return Acquisition(np.r_[np.zeros(b0), np.repeat(b, n)],
                       np.concatenate([np.zeros((b0, 3)), *g]))


def target(m=40, b=2000.0, seed=9):
    g = Rotation.random(random_state=seed).apply(protocols.spread(m))
    return Acquisition(np.full(m, b), g)


def tissue(acq, turn=None, lesion=False):
    """Noise-free signal (x, y, z, n): a bundle that bends along x, beside grey matter along y with
    a gradual border. lesion: a ball in the bundle with less of neurites and free water."""
    x, y, z = (v.ravel() for v in np.indices(SHAPE))
    angle = np.radians(4) * x
    axis = torch.tensor(np.stack([np.cos(angle), np.sin(angle), 0.3 + 0 * angle], 1)).float()
    axis = torch.nn.functional.normalize(axis, dim=1)
    if turn is not None:
        axis = axis @ torch.from_numpy(turn).float().T
    kappa = torch.full((len(x),), 10.0)
    ball = ((x - 3)**2 + (y - 2)**2 + (z - 3)**2 < 5) if lesion else np.zeros(len(x), bool)
    f = torch.from_numpy(np.where(ball, 0.3, 0.6)).float()
    d = torch.full((len(x),), 1.9)
    free = torch.from_numpy(np.where(ball, 0.3, 0.0)).float()
    parts = [forward.Compartment(p.fraction * (1 - free), p.axial, p.radial)
             for p in forward.two_compartments(d, f)] + [forward.ball(free, 3 + 0 * d)]
    simulator = forward.Protocol(acq, 12, torch.zeros(()))
    white = simulator.signal(odf.watson(axis, kappa, 12), parts).numpy()
    grey = simulator.signal(odf.watson(axis, 0 * kappa + 0.5, 12), forward.two_compartments(
        torch.full((len(x),), 1.2), torch.full((len(x),), 0.4))).numpy()
    share = 1 / (1 + np.exp(3 * (y - 4.5)))[:, None]
    return ((share * white + 1.2 * (1 - share) * grey).reshape(*SHAPE, -1),
            ball.reshape(SHAPE))


def scan(acq, sigma=0.04, turn=None, lesion=False, seed=1, mask=None):
    """The Dwi of `tissue` with Rician noise and an S0 of 300."""
    signal, _ = tissue(acq, turn, lesion)
    rng = np.random.default_rng(seed)
    signal = 300 * np.hypot(signal + sigma * rng.normal(size=signal.shape),
                            sigma * rng.normal(size=signal.shape))
    mask = np.ones(SHAPE, bool) if mask is None else mask
    return Dwi(signal[mask].astype(np.float32), mask, np.diag([2.0, 2.0, 4.0, 1.0]), acq,
               300 * sigma)


@pytest.fixture(scope="module")
def method():
    return methods.get("upsample_scnn")


def close(a, b, scale=300):
    np.testing.assert_allclose(b / scale, a / scale, atol=2e-4)


def test_predicts_and_leaves_its_input_unchanged(method):
    dwi = scan(acquisition())
    before = dwi.signal.copy()
    found = method.predict(dwi, target(), "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    assert found.signal.shape == found.sd.shape == (len(before), 40)
    assert found.signal.dtype == found.sd.dtype == np.float32
    assert np.isfinite(found.signal).all() and np.isfinite(found.sd).all()
    assert (found.signal >= 0).all() and (found.sd > 0).all()
    json.dumps([dict(found.counts), dict(found.parameters)])


def test_strange_voxels_are_finite(method):
    dwi = scan(acquisition())
    signal = dwi.signal.copy()
    signal[3], signal[11, 4], signal[17, :2] = 0, -2, 0
    signal[23] = np.linspace(5, 3000, signal.shape[1])
    signal[40, :2] = 1e-3
    found = method.predict(replace(dwi, signal=signal), target(), "cpu")
    assert np.isfinite(found.signal).all() and np.isfinite(found.sd).all()
    for empty in (3, 17):
        assert not found.signal[empty].any() and not found.sd[empty].any()
    assert found.counts["upsample_voxels_without_b0"] == 2
    # voxels without b0 count as outside of the mask; far ones do not matter at all
    whole = method.predict(dwi, target(), "cpu").signal
    far = np.indices(SHAPE)[0].ravel() == 6
    np.testing.assert_allclose(found.signal[far], whole[far], rtol=1e-4)


def test_order_of_the_axes_of_the_grid_does_not_matter(method):
    """The result depends on neighbourhood only, not on the order of voxels."""
    mask = np.ones(SHAPE, bool)
    mask[0, :3], mask[4, 4, 4] = False, False
    dwi = scan(acquisition(), mask=mask)
    row = np.cumsum(mask.ravel()) - 1
    order = np.arange(mask.size).reshape(SHAPE)[::-1].transpose(2, 0, 1)
    turned = mask[::-1].transpose(2, 0, 1)
    rows = row[order[turned]]
    other = Dwi(dwi.signal[rows], turned, np.eye(4), dwi.acquisition, dwi.noise_sd)
    one, found = (method.predict(d, target(), "cpu") for d in (dwi, other))
    close(one.signal[rows], found.signal)
    close(one.sd[rows], found.sd)


def test_blocks_do_not_matter(method, monkeypatch):
    dwi = scan(acquisition(b=(1000.0, 2000.0)))
    one = method.predict(dwi, target(), "cpu")
    monkeypatch.setattr(module, "map_voxels", lambda function, rows, device, block:
                        blocks.map_voxels(function, rows, device, 5))
    found = method.predict(dwi, target(), "cpu")
    close(one.signal, found.signal)
    close(one.sd, found.sd)


def test_neighbours_without_b0_signal_are_not_used(method):
    """Voxels whose b0 is 0 are as if they were outside of the mask, whatever they show."""
    hole = np.zeros(SHAPE, bool)
    hole[3, 3, 3], hole[4, 6, 1] = True, True
    dwi, to = scan(acquisition()), target(6)
    signal = dwi.signal.copy()
    signal[hole.ravel()] = np.where(dwi.acquisition.b0, 0, 900)
    found = method.predict(replace(dwi, signal=signal), to, "cpu")
    outside = method.predict(replace(dwi, signal=dwi.signal[~hole.ravel()], mask=~hole), to, "cpu")
    close(outside.signal, found.signal[~hole.ravel()])
    close(outside.sd, found.sd[~hole.ravel()])


def test_the_four_nearest_shells_are_used(method):
    """In log b, 1500, 2500, 1000 and 4000 s/mm² are nearer to 1800 than 600 s/mm² is."""
    b = (600.0, 1000.0, 1500.0, 2500.0, 4000.0)
    mask = np.zeros(SHAPE, bool)
    mask[2:5, 3:6, 1:4] = True
    dwi, to = scan(acquisition(8, b), mask=mask), target(6, 1800.0)
    one = method.predict(dwi, to, "cpu").signal
    changes = []
    for shell in dwi.acquisition.shells:
        signal = dwi.signal.copy()
        signal[:, shell.indices] *= 1.3
        found = method.predict(replace(dwi, signal=signal), to, "cpu").signal
        changes.append(np.abs(found - one).mean() / 300)
    assert changes[0] == 0
    assert min(changes[1:]) > 2e-4


class Recorder(torch.nn.Module):
    """A network that keeps its inputs and predicts 0 with an SD of 0.05 S0."""

    def forward(self, *inputs):
        self.inputs = inputs
        count = len(inputs[3].rows)
        log_sd = torch.zeros(15, count)
        log_sd[0] = np.log(0.05) * np.sqrt(4 * np.pi)
        return Coefficients(torch.zeros(45, count), log_sd)


@pytest.fixture
def recorder(method, monkeypatch):
    """The network of `method`; its SD is not calibrated."""
    recorder = Recorder()
    monkeypatch.setattr(method, "network", recorder)
    monkeypatch.setattr(learn, "log_factor", lambda features, _: torch.zeros_like(features[..., 0]))
    return recorder


def test_sd_is_relative_to_the_s0_of_each_voxel(method, recorder, rng):
    """S0 from a third to three times the median: SD is 0.05 of each, and σ/S0 is told of each."""
    dwi = scan(acquisition())
    dwi = replace(dwi, signal=dwi.signal * np.float32(3) ** rng.uniform(
        -1, 1, (len(dwi.signal), 1)).astype(np.float32))
    found = method.predict(dwi, target(5), "cpu")
    np.testing.assert_allclose(found.sd, 0.05 * dwi.mean_b0[:, None] * np.ones(5), rtol=1e-4)
    _, told, log_s0, around, _ = recorder.inputs
    centre = around.rows[:, CENTRE]
    np.testing.assert_allclose(log_s0[centre].exp(), dwi.mean_b0, rtol=1e-4)
    np.testing.assert_allclose(told[centre, 0], dwi.noise_sd / dwi.mean_b0, rtol=1e-4)


@pytest.mark.parametrize(("count", "known"), [(1, False), (9, False), (4, True)])
def test_noise_of_the_mean_b0_is_told(method, recorder, count, known):
    """The mean of n volumes has the noise σ/√n; an S0 that is known has none."""
    dwi = replace(scan(acquisition(b0=count)), s0_known=known)
    method.predict(dwi, target(5), "cpu")
    _, told, _, around, _ = recorder.inputs
    expected = 0 if known else dwi.noise_sd / np.sqrt(count) / dwi.mean_b0
    np.testing.assert_allclose(told[around.rows[:, CENTRE], 1], expected, rtol=1e-4)


def test_voxels_outside_of_the_mask_are_not_used(method):
    """Voxels outside of the mask have no influence, and those at its edge are predicted."""
    mask = np.zeros(SHAPE, bool)
    mask[1:6, 1:7, 1:5] = True
    alone = np.zeros(SHAPE, bool)
    alone[3, 3, 3] = True
    acq = acquisition()
    inside = method.predict(scan(acq, mask=mask), target(), "cpu")
    assert np.isfinite(inside.signal).all()
    dwi = scan(acq, mask=alone)
    single = method.predict(dwi, target(), "cpu")
    pair = np.zeros(SHAPE, bool)
    pair[3, 3, 3], pair[6, 7, 5] = True, True
    both = replace(dwi, mask=pair, signal=np.repeat(dwi.signal, 2, axis=0))
    for signal in method.predict(both, target(), "cpu").signal:
        close(single.signal[0], signal)
    # with neighbours the SD is smaller
    at = (np.argwhere(mask) == [3, 3, 3]).all(1).argmax()
    assert inside.sd[at].mean() < 0.8 * single.sd[0].mean()


def test_turns_with_the_head(method):
    """The same noise on turned tissue and turned tables: the same prediction at turned targets."""
    turn = Rotation.from_euler("zyx", [40, -25, 70], degrees=True).as_matrix()
    acq, to = acquisition(b=(1000.0, 2000.0)), target()
    one = method.predict(scan(acq), to, "cpu")
    other = method.predict(scan(acq.rotated(turn), turn=turn), to.rotated(turn), "cpu")
    close(one.signal, other.signal)
    close(one.sd, other.sd)


def test_order_of_measurements_does_not_matter(method, rng):
    acq = acquisition(b=(1000.0, 2000.0))
    dwi, order, to = scan(acq), rng.permutation(len(acq)), target()
    shuffled = replace(dwi, signal=dwi.signal[:, order], acquisition=acq[order])
    back = rng.permutation(len(to))
    close(method.predict(dwi, to, "cpu").signal[:, back],
          method.predict(shuffled, to[back], "cpu").signal)


@pytest.mark.parametrize("n,b", [(20, 2000.0), (12, 1000.0), (30, 1000.0), (6, 1000.0)])
def test_is_better_than_spherical_harmonics(method, n, b):
    """Error of S/S0 against the expected magnitude, for tissue and noise that were not drawn in
    training; the SD covers it."""
    acq, to = acquisition(n, (b,)), target(b=b)
    dwi = scan(acq)
    truth = 300 * noise.mean(tissue(to)[0].reshape(-1, len(to)), 0.04)
    found = method.predict(dwi, to, "cpu")
    degree = sh.degree_for(n)
    fit = sh.smooth_fit(degree, acq.bvecs[2:], 0.006)
    plain = dwi.signal[:, 2:] @ (sh.basis(degree, to.bvecs) @ fit).T
    error, other = (np.sqrt(np.mean((v - truth) ** 2)) for v in (found.signal, plain))
    assert error < 0.75 * other
    covered = (np.abs(found.signal - truth) <= 1.645 * found.sd).mean()
    assert 0.8 < covered <= 1.0


def test_a_lesion_keeps_its_contrast(method):
    """A lesion is like nothing around it; its mean signal against the bundle stays within 10 %."""
    acq, to = acquisition(30, (1000.0,)), target(b=1000.0)
    clean, ball = tissue(to, lesion=True)
    healthy = tissue(to)[0]
    dwi = scan(acq, lesion=True, sigma=0.03)
    found = dwi.unmask(method.predict(dwi, to, "cpu").signal) / 300
    truth = (clean - healthy)[ball].mean()
    assert abs(truth) > 0.05
    assert (found - healthy)[ball].mean() == pytest.approx(truth, rel=0.1)


def test_sd_widens_with_noise_and_with_less_data(method):
    few, many = acquisition(8), acquisition(45)
    to = target()

    def sd(acq, sigma):
        return method.predict(scan(acq, sigma), to, "cpu").sd.mean()

    assert sd(few, 0.04) > 1.2 * sd(many, 0.04)
    assert sd(many, 0.1) > 1.5 * sd(many, 0.02)
    other = method.predict(scan(many), target(b=3500.0), "cpu").sd.mean()
    assert other > 1.5 * sd(many, 0.04)


def test_sd_widens_outside_of_the_training():
    method = methods.get("upsample_scnn", context=kinds.MethodContext(allow_extrapolation=True))
    inside = method.predict(scan(acquisition(b=(5000.0,))), target(b=5000.0), "cpu")
    outside = method.predict(scan(acquisition(b=(7000.0,))), target(b=7000.0), "cpu")
    assert outside.sd.mean() > 1.5 * inside.sd.mean()
    truth = 300 * noise.mean(tissue(target(b=7000.0))[0].reshape(-1, 40), 0.04)
    assert (np.abs(outside.signal - truth) <= 1.645 * outside.sd).mean() > 0.88


@pytest.mark.parametrize(("measured", "wanted"), [
    (2000.0, 3000.0), (3000.0, 1000.0), (8000.0, 4000.0), (4000.0, 8000.0), (1000.0, 300.0)])
def test_intervals_hold_at_another_b_in_tissue_unlike_the_training(measured, wanted):
    """A bending bundle of Gaussian diffusion: its signal falls faster with b than that of the
    training, so that errors are systematic and grow with the distance in b."""
    method = methods.get("upsample_scnn", context=kinds.MethodContext(allow_extrapolation=True))
    acq, to = acquisition(45, (measured,)), target(b=wanted)
    x = np.indices(SHAPE)[0].ravel()
    axis = np.stack([np.cos(x / 8), np.sin(x / 8), 0 * x], 1)

    def clean(table):
        return np.exp(-table.bvals / 1000 * (0.35 + 1.35 * (axis @ table.bvecs.T) ** 2))

    rng = np.random.default_rng(4)
    real, imaginary = 0.04 * rng.normal(size=(2, len(x), len(acq)))
    dwi = Dwi((300 * np.hypot(clean(acq) + real, imaginary)).astype(np.float32),
              np.ones(SHAPE, bool), np.eye(4), acq, 12.0)
    found = method.predict(dwi, to, "cpu")
    error = found.signal - 300 * noise.mean(clean(to), 0.04)
    assert (np.abs(error) <= 1.645 * found.sd).mean() > 0.7
    same = method.predict(dwi, target(b=measured), "cpu")
    assert found.sd.mean() > 1.5 * same.sd.mean()


def test_noise_without_a_floor(method):
    """For a real-valued signal the prediction has no noise floor, unlike for a magnitude."""
    acq, to = acquisition(b=(4000.0,)), target(b=4000.0)
    clean = tissue(acq)[0]
    rng = np.random.default_rng(3)
    signal = (300 * (clean + 0.1 * rng.normal(size=clean.shape))).reshape(-1, len(acq))
    dwi = Dwi(signal.astype(np.float32), np.ones(SHAPE, bool), np.eye(4), acq, 30.0,
              magnitude=False)
    truth = tissue(to)[0].reshape(-1, len(to))
    bias = (method.predict(dwi, to, "cpu").signal / 300 - truth).mean()
    magnitude = scan(acq, 0.1)
    floor = noise.mean(truth, 0.1)
    other = (method.predict(magnitude, to, "cpu").signal / 300 - floor).mean()
    assert (floor - truth).mean() > 0.03
    assert abs(bias) < 0.01 and abs(other) < 0.01


def test_refusals(method):
    acq = acquisition()
    with pytest.raises(Refusal, match="Needed is a b0"):
        method.check(acq[2:])
    for n in (5, 7):
        with pytest.raises(Refusal, match="8 or more directions"):
            method.check(acquisition(n))
    planar = replace(acq, b_delta=np.where(acq.b0, 1.0, -0.5))
    with pytest.raises(Refusal, match="linear encoding"):
        method.check(planar)
    dwi = scan(acq)
    with pytest.raises(Refusal, match="only linear encoding"):
        method.predict(dwi, replace(target(), b_delta=np.zeros(40)), "cpu")
    with pytest.raises(Refusal, match=r"b 7000 .*--allow-extrapolation"):
        method.predict(dwi, target(b=7000.0), "cpu")
    with pytest.raises(Refusal, match="6 or more directions"):
        method.predict(scan(acquisition(5)), target(), "cpu")


def test_few_directions_serve_the_round_trip_and_are_refused_else(method):
    """Eight are filled, and seven of them predict the eighth; a shell of six is left as it is."""
    few = acquisition(8)
    method.check(few)
    assert upsample.round_trip(method, scan(few), "cpu", 0)["rmse"].notna().all()
    both = concatenate([acquisition(20), target(6, 1000.0)])
    assert [shell.b for shell in method.shells(both)] == [2000]
    allowed = methods.get("upsample_scnn", context=kinds.MethodContext(allow_extrapolation=True))
    allowed.check(acquisition(6))
    (six,) = allowed.violations(acquisition(6), target())
    assert "6 directions, 8 are needed" in six and not allowed.violations(few, target())


def test_warnings_of_few_directions_and_of_strange_noise(method):
    def warned(acq, sigma=0.04, known=True):
        dwi = scan(acq, sigma)
        return method.predict(dwi if known else replace(dwi, noise_sd=None), target(),
                              "cpu").warnings

    assert warned(acquisition(20)) == []
    (few,) = warned(acquisition(19))
    assert "19 directions" in few and "FA" in few
    (loud,) = warned(acquisition(20), 0.5)
    assert "SNR is 2" in loud and "5–60" in loud
    (unknown,) = warned(acquisition(20), known=False)
    assert "SNR of 20 was assumed" in unknown


def test_violations(method):
    acq = acquisition()
    assert method.violations(acq, target()) == []
    (outside,) = method.violations(acq, target(b=300.0))
    assert "300" in outside and "500–5000" in outside
    assert method.violations(acquisition(b=(7000.0,)), target())
    # a shell of b-tensors beside one that serves is left out
    both = concatenate([acq, replace(target(), b_delta=np.zeros(40))])
    assert method.violations(both, target()) == []


def test_shells_of_other_tensors_are_left_out(method):
    acq = acquisition()
    extra = replace(target(30, seed=4), b_delta=np.zeros(30))
    dwi = scan(acq)
    more = Dwi(np.concatenate([dwi.signal, np.full((len(dwi.signal), 30), 1e4, np.float32)], 1),
               dwi.mask, dwi.affine, concatenate([acq, extra]), dwi.noise_sd)
    close(method.predict(dwi, target(), "cpu").signal, method.predict(more, target(), "cpu").signal)


def test_card(method):
    card = method.weights.card
    assert card.trained_for.shells[0].directions == (6, 90)
    assert card.intended_use == method.intended_use
    assert dict(card.network) == dict(method.recipe().network)
    assert 0.88 < card.metrics["coverage90"] < 0.92
    for name, bands in card.metrics["coverage90_in_bands"].items():
        assert all(0.87 < covered < 0.93 for _, covered in bands), name


def test_fit_is_the_posterior_mean():
    """Against Bayes' rule with matrices of the measurements: P Bᵀ (B P Bᵀ + σ² I)⁻¹ y."""
    acq = acquisition(14)
    stack = protocols.from_acquisition(acq, acq.shells, 8)
    b, sigma = torch.tensor([2.0]).double(), torch.tensor([0.08]).double()
    fits = shells.fit_shells(stack, b, sigma, torch.tensor([True]))
    size = np.repeat(shells.power(b)[0].numpy(), [1, 5, 9, 13, 17])
    assert (sigma**2 / shells.FEWER / size[-1] > shells.MIN_PRIOR * 14 / (4 * np.pi)).all()
    floored = np.minimum(size, float(sigma)**2 / shells.FEWER
                         / (shells.MIN_PRIOR * 14 / (4 * np.pi)))
    floored[0] = 1e5  # as good as no prior
    basis = sh.basis(8, acq.bvecs[2:])
    expected = floored[:, None] * basis.T @ np.linalg.inv(
        basis @ np.diag(floored) @ basis.T + float(sigma)**2 / shells.FEWER * np.eye(14))
    np.testing.assert_allclose(fits.matrix[0, 0].numpy() * np.sqrt(size)[:, None], expected,
                               atol=1e-6)
    np.testing.assert_allclose(fits.scale[0], np.sqrt(size), rtol=1e-6)
    noise_ = np.random.default_rng(0).normal(size=(14, 40_000))
    square = np.square(fits.matrix[0, 0].numpy() @ noise_).mean(1)
    found = [part.sum() for part in np.split(square, np.cumsum([1, 5, 9, 13]))]
    np.testing.assert_allclose(fits.shells.variance[0, 0], found, rtol=0.03)
    left = fits.remainder[0, 0].numpy() @ noise_
    assert np.square(left).sum(0).mean() == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("magnitude", [True, False])
@pytest.mark.parametrize("level", [0.0, 0.3])
def test_training_teaches_the_expected_measurement(monkeypatch, magnitude, level):
    """A signal S with σ 0.2: the truth is the mean of Rician noise about S, σ √(π/2) for S = 0, or
    S itself if the noise is Gaussian; both over the measured S0."""
    monkeypatch.setattr(learn, "GAUSSIAN", -1.0 if magnitude else 2.0)

    def draw(b, count, _):
        coefficients = torch.zeros(*b.shape[:1], count, patches.SIZE**3, b.shape[1],
                                   sh.size(patches.L_MAX))
        coefficients[..., 0] = level * np.sqrt(4 * np.pi)
        return patches.Patches(torch.ones(coefficients.shape[:3]), coefficients)

    monkeypatch.setattr(patches, "draw", draw)
    recipe = methods.get("upsample_scnn", context=kinds.MethodContext(sloppy=True)).recipe()
    minibatch = learn.Simulator(recipe)(torch.Generator().manual_seed(2), snr=(5.0, 5.0))
    _, _, log_s0, around, _ = minibatch.inputs
    signal = minibatch.truth * log_s0[around.rows[:, CENTRE], None].exp()
    expected = noise.mean(level, 0.2) if magnitude else level
    assert level or not magnitude or expected == pytest.approx(0.2 * np.sqrt(np.pi / 2))
    np.testing.assert_allclose(signal, expected, atol=1e-5)


def test_calibration_covers_nine_in_ten():
    """Errors whose SD is wrong by a factor that depends on the features; others are covered."""
    generator = torch.Generator().manual_seed(0)

    def draw(n):
        features = torch.rand(n, len(learn.FEATURES), generator=generator)
        wrong = features[:, 1] - 2 * features[:, 3]**2
        return learn.Predictions(torch.randn(n, generator=generator) * torch.exp(wrong),
                                 torch.zeros(n), features)

    factors = learn.calibrate(draw(100_000))
    metrics = learn.measure(draw(50_000), json.loads(json.dumps(factors)))
    assert metrics["coverage90"] == pytest.approx(0.9, abs=0.005)
    for bands in metrics["coverage90_in_bands"].values():
        assert all(0.88 < covered < 0.92 for _, covered in bands)


def test_training_resumes_and_round_trips(tmp_path):
    """A training that was interrupted gives the weights of one that was not."""
    recipe = methods.get("upsample_scnn", context=kinds.MethodContext(sloppy=True)).recipe()
    recipe = replace(recipe, network={**recipe.network, "channels": 4, "hidden": 8,
                                      "attention": 4, "grid": 11},
                     schedule=replace(recipe.schedule, steps=4, validate_every=2,
                                      decay="constant"))
    whole = learn.train("upsample_scnn", recipe, seed=3, device="cpu")
    saved = tmp_path / "state.ckpt"
    half = replace(recipe, schedule=replace(recipe.schedule, steps=2))
    learn.train("upsample_scnn", half, seed=3, device="cpu", saved=saved)
    resumed = learn.train("upsample_scnn", recipe, seed=3, device="cpu", saved=saved)
    for name, value in whole.tensors.items():
        assert torch.equal(value, resumed.tensors[name]), name
    for name, content in checkpoint.pack(whole).items():
        (tmp_path / name).write_bytes(content)
    again = checkpoint.load(tmp_path, "upsample_scnn")
    assert again.card.constants == json.loads(json.dumps(dict(whole.card.constants)))
    assert again.into(learn.build(again.card.network)).training is False


def test_loss_falls():
    """A few steps on the same minibatches lower the loss."""
    recipe = methods.get("upsample_scnn", context=kinds.MethodContext(sloppy=True)).recipe()
    with training.seeded(0):
        network = learn.build(recipe.network)
    minibatch = learn.Simulator(recipe)(torch.Generator().manual_seed(5))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    losses = []
    for _ in range(15):
        loss = learn.compute_loss(network, minibatch, 0.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.2


def test_directions_in_a_plane_are_refused(method):
    angle = np.linspace(0, np.pi, 30, endpoint=False)
    plane = np.column_stack([np.cos(angle), np.sin(angle), 0 * angle])
    table = Acquisition(np.r_[0, np.full(30, 1000.0)], np.vstack([np.zeros((1, 3)), plane]))
    with pytest.raises(Refusal, match="spread over the sphere"):
        method.check(table)
