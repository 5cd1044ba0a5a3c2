"""Denoising by an autoencoder: data of the training, selection of weights, and what it achieves."""

import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import checkpoint, kinds, methods, sh
from bidsapp.acquisition import Acquisition
from bidsapp.domain import ShellRange
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.methods.denoise_spherical import learn
from bidsapp.methods.denoise_spherical import method as module
from bidsapp.methods.denoise_spherical.method import apply_network, direction_difference
from bidsapp.networks.builder import build_network
from bidsapp.simulate.protocols import spread

NAME = "denoise_spherical"
SD = 0.05


def table(n=30, b=(1000, 2500), b0=2, turn=0.0):
    c, s = math.cos(turn), math.sin(turn)
    axes = spread(n) @ np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]).T
    return Acquisition(np.r_[np.zeros(b0), np.repeat(b, n)],
                       np.r_[np.zeros((b0, 3)), np.tile(axes, (len(b), 1))])


def clean_signal(acq, voxels, rng):
    """S/S0 of one or two fibre bundles: tensors with axial 1.7 and radial 0.3 µm²/ms, and a share
    of isotropic tissue of 0.8 µm²/ms."""
    axes = rng.normal(size=(voxels, 2, 3))
    axes /= np.linalg.norm(axes, axis=2, keepdims=True)
    share = rng.dirichlet(np.ones(3), voxels)
    b = acq.bvals / 1000
    fibre = np.exp(-b * (0.3 + 1.4 * np.einsum("vkx,nx->vkn", axes, acq.bvecs) ** 2))
    return np.einsum("vk,vkn->vn", share[:, :2], fibre) + share[:, 2:] * np.exp(-0.8 * b)


def as_dwi(signal, acq, sd, magnitude=True):
    return Dwi(signal.astype(np.float32), np.ones((len(signal), 1, 1), bool), np.eye(4), acq, sd,
               magnitude=magnitude)


def measured(acq, voxels, rng, sd=SD, s0=400.0, magnitude=True):
    clean = s0 * clean_signal(acq, voxels, rng)
    noise = rng.normal(0, sd * s0, (2, *clean.shape))
    noisy = np.hypot(clean + noise[0], noise[1]) if magnitude else clean + noise[0]
    return as_dwi(noisy, acq, sd * s0, magnitude), clean


def method(models=None, allow=False, **settings):
    paths = {f"training.{k.replace('__', '.')}": v for k, v in settings.items()}
    return methods.get(NAME, context=kinds.MethodContext(
        sloppy=True, models=models, allow_extrapolation=allow, settings={NAME: paths}))


def cohort(acquisitions, load, people=None):
    runs = list(acquisitions)
    return kinds.Cohort(pd.DataFrame({"run": runs, "participant": people or runs,
                                      "snr_b0": [20.0] * len(runs)}),
                        acquisitions=acquisitions, load=load)


def save(checkpoints, folder):
    for name, trained in checkpoints.items():
        (folder / name).mkdir(parents=True)
        for file, content in checkpoint.pack(trained).items():
            (folder / name / file).write_bytes(content)


def test_fit_is_least_squares_with_the_penalty():
    """λ 0.006 on l²(l+1)², degree by the number of directions; padding is left out."""
    acq = Acquisition(np.r_[0, [1000] * 30, [2500] * 10],
                      np.r_[np.zeros((1, 3)), spread(30), spread(10)])
    stack = learn.select_stack(acq, acq.shells)
    fit = learn.fit_matrices(stack)[0].numpy()
    assert fit.shape == (2, 45, 30)
    for shell, (axes, l_max) in enumerate(((spread(30), 6), (spread(10), 2))):
        wanted = sh.smooth_fit(l_max, axes, 0.006)
        np.testing.assert_allclose(fit[shell][:len(wanted), :len(axes)], wanted, atol=1e-8)
        assert not fit[shell][len(wanted):].any() and not fit[shell][:, len(axes):].any()


def test_simulated_noise_and_target():
    """Rician: E[M²] = S² + 2σ²; Gaussian: E = S. The target is noise-free, and both are divided
    by the same mean b0, whose noise is that of its volumes."""
    acq = table(6, (1000,), b0=4)
    stack = learn.select_stack(acq, acq.shells).to(torch.zeros(1))
    n, sigma = 40_000, 0.2
    clean = torch.linspace(0.05, 0.5, 6).expand(1, n, 1, 6)
    magnitude = torch.arange(n) < n // 2
    b = learn.measure(stack, clean, torch.full((n,), sigma), magnitude,
                      torch.Generator().manual_seed(0))
    s0 = clean[0, :, 0, 0] / b.target[:, 0, 0]  # mean b0 over the true S0
    torch.testing.assert_close(b.target * s0[:, None, None], clean[0])
    assert abs(float(s0[magnitude].mean()) - (1 + sigma**2 / 2)) < 3e-3
    assert abs(float(s0[~magnitude].mean()) - 1) < 3e-3
    assert abs(float(s0.std()) - sigma / 2) < 3e-3
    signal = b.signal[:, 0] * s0[:, None]
    second = signal[magnitude].square().mean(0)
    torch.testing.assert_close(second, clean[0, 0, 0] ** 2 + 2 * sigma**2, atol=4e-3, rtol=0)
    torch.testing.assert_close(signal[~magnitude].mean(0), clean[0, 0, 0], atol=5e-3, rtol=0)
    torch.testing.assert_close(b.noise[:, 0] * s0, torch.full((n,), sigma))
    torch.testing.assert_close(b.noise[:, 1], b.noise[:, 0] * magnitude)


def test_simulated_tissue():
    """Two compartments, with free water in a share of the voxels; fractions add up to 1."""
    generator = torch.Generator().manual_seed(1)
    _, parts = learn.simulate_tissue(4000, generator)
    total = sum(c.fraction for c in parts)
    torch.testing.assert_close(total, torch.ones(4000))
    water = parts[-1]
    assert abs(float((water.fraction > 0).float().mean()) - learn.WATER) < 0.03
    assert (water.axial == 3).all() and (water.radial == 3).all()
    assert (parts[0].radial == 0).all()


def test_loss_counts_what_was_measured():
    stack = learn.select_stack(acq := table(6, (1000,)), acq.shells).to(torch.zeros(1))
    clean = torch.full((1, 4, 1, 6), 0.5)
    b = learn.measure(stack, clean, torch.tensor([0.1, 0.1, 0.2, 0.2]), torch.ones(4).bool(),
                      torch.Generator().manual_seed(0))
    output = b.target + torch.tensor([1.0, 1.0, 2.0, 2.0])[:, None, None]
    assert float(learn.mean_square_error(output, b)) == pytest.approx((1 + 4) / 2, rel=1e-5)
    sigma = b.noise[:, 0].numpy()
    weight = sigma**-2 / (sigma**-2).mean()
    assert float(learn.mean_square_error(output, b, 2.0)) == pytest.approx(
        float((weight * [1, 1, 4, 4]).mean()), rel=1e-5)


def test_input_is_what_a_measurement_is():
    """Training and application arrange a signal in the same way."""
    acq = Acquisition(np.r_[0, [2000] * 7, 0, [1000] * 6],
                      np.r_[np.zeros((1, 3)), spread(7), np.zeros((1, 3)), spread(6)])
    signal = torch.arange(30.0).view(2, 15)
    packed = learn.pack(signal, acq.shells)
    assert packed.shape == (2, 2, 7)
    assert packed[0, 0].tolist() == [9, 10, 11, 12, 13, 14, 0]
    assert packed[0, 1].tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_refusals():
    with pytest.raises(Refusal, match="no volume without weighting"):
        method().check(table(b0=0))
    with pytest.raises(Refusal, match=r"5 × b 1000.*at least 6 directions"):
        method().check(table(5, (1000,)))
    planar = table()
    planar = replace(planar, b_delta=np.where(planar.b0, 1.0, -0.5))
    with pytest.raises(Refusal, match=r"b_delta -0\.5.*needed are.*b_delta 1.*allow-extrapolation"):
        method().check(planar)
    with pytest.raises(Refusal, match=r"b 300 .*needed are.*500–5000"):
        method().check(table(b=(300,)))
    assert method(allow=True).violations(planar)
    with pytest.raises(Refusal, match=r"11 × b 1000.*shell of 12 directions: with fewer, FA falls"):
        method().check(table(11, (1000,)))
    assert "12 directions" in method(allow=True).violations(table(6, (1000,)))[0]
    assert not method().violations(table(12, (1000,)))
    assert not method().violations(table())


def test_shells_outside_of_the_training_are_left_as_they_are(rng):
    acq = Acquisition(np.r_[0, 0, [200] * 6, [1000] * 20],
                      np.r_[np.zeros((2, 3)), spread(6), spread(20)])
    dwi, _ = measured(acq, 20, rng)
    result = method().denoise(dwi, "cpu")
    np.testing.assert_array_equal(result.signal[:, :8], dwi.signal[:, :8])
    assert (result.signal[:, 8:] != dwi.signal[:, 8:]).any()
    assert result.parameters["ShellsLeftOut"] == [200] and "6 × b 200" in result.notices[0]


def test_warnings_of_few_directions_and_of_strange_noise(rng):
    def warned(n, sd):
        dwi, _ = measured(table(n, (1000,)), 20, rng, sd)
        return method().denoise(dwi, "cpu").warnings

    assert warned(30, 0.05) == []
    (few,) = warned(29, 0.05)
    assert "29 directions" in few and "FA" in few
    (loud,) = warned(30, 0.5)
    assert "SNR is 2" in loud and "5–100" in loud


def test_a_few_directions_beside_many_are_left_as_they_are(rng):
    acq = Acquisition(np.r_[0, 0, [700] * 6, [1000] * 20],
                      np.r_[np.zeros((2, 3)), spread(6), spread(20)])
    dwi, _ = measured(acq, 20, rng)
    result = method().denoise(dwi, "cpu")
    np.testing.assert_array_equal(result.signal[:, :8], dwi.signal[:, :8])
    assert result.parameters["ShellsLeftOut"] == [700]


def test_the_cohort_with_the_least_noise_is_not_the_best():
    """The target of a validation holds its noise, so that errors compare relative to the noise."""
    (bundled,) = method().weights
    domain = replace(bundled.card.trained_for, shell_count=None,
                     shells=(ShellRange((1000, 1000), 1.0, (30, 30)),))
    quiet, noisy = (replace(bundled, card=replace(
        bundled.card, trained_for=domain, metrics={"mse_input": level, "mse_output": out}))
        for level, out in ((1e-3, 0.9e-3), (4e-3, 2.2e-3)))
    chosen = method()
    chosen.__dict__["weights"] = [quiet, noisy, bundled]
    assert chosen.select(table(30, (1000,))) is noisy


def test_voxels_without_b0_signal_are_left_as_they_are(rng):
    dwi, _ = measured(table(), 20, rng)
    signal = dwi.signal.copy()
    signal[3, :2] = 0
    signal[5] = 0
    result = method().denoise(as_dwi(signal, dwi.acquisition, dwi.noise_sd), "cpu")
    np.testing.assert_array_equal(result.signal[[3, 5]], signal[[3, 5]])
    assert result.counts["spherical_no_b0_signal"] == 2


def test_unknown_noise_is_assumed_and_said(rng):
    dwi, _ = measured(table(), 20, rng)
    result = method().denoise(as_dwi(dwi.signal, dwi.acquisition, None), "cpu")
    assert "SNR of 20" in result.notices[0] and "S0 / 20" in result.parameters["NoiseSD"]
    known = method().denoise(as_dwi(dwi.signal, dwi.acquisition, SD * 400), "cpu").signal
    assert not np.allclose(result.signal, known, rtol=1e-3)  # S0/20 holds for no single voxel


@pytest.mark.parametrize("n,b,sd,share", [
    (30, (1000, 2500), 0.05, 0.25), (64, (3000,), 0.05, 0.25), (12, (1000,), 0.1, 0.5),
    (30, (1000, 2500), 0.01, 1.0)])
def test_error_falls_on_independent_tensors(n, b, sd, share, rng):
    """Tensors, not the model of the training: below the measured signal and below an SH fit. With
    16 b0 volumes the error of the mean b0, which remains, is small. SNR 100 is no worse than
    measured."""
    acq = table(n, b, b0=16, turn=0.3)
    dwi, clean = measured(acq, 1500, rng, sd)
    weighted = ~acq.b0
    found = method().denoise(dwi, "cpu").signal

    def error(signal):
        return np.square(signal - clean)[:, weighted].mean()

    fitted = dwi.signal.astype(float)
    for shell in acq.shells:
        axes, l_max = acq.bvecs[shell.indices], sh.degree_for(len(shell), 8)
        fitted[:, shell.indices] = (dwi.signal[:, shell.indices]
                                    @ sh.smooth_fit(l_max, axes, 0.006).T @ sh.basis(l_max, axes).T)
    assert error(found) < error(fitted)
    assert error(found) < share * error(dwi.signal)


def test_a_rotated_head_gives_the_same_signal(rng):
    """Head and table are rotated together, so that the measured values are the same. The bound is
    a tenth of the noise of SNR 500."""
    dwi, _ = measured(acq := table(), 500, rng)
    turn = Rotation.from_euler("zyx", [40, -25, 70], degrees=True).as_matrix()
    turned = as_dwi(dwi.signal, acq.rotated(turn), dwi.noise_sd)
    one, other = (method().denoise(d, "cpu") for d in (dwi, turned))
    assert one.parameters["RotationEquivariant"]
    difference = (one.signal - other.signal) / 400
    assert np.sqrt(np.square(difference).mean()) < 2e-4
    # the order of the volumes does not matter, nor does the sign of a direction
    order = rng.permutation(len(acq))
    sign = rng.choice([-1, 1], len(acq))[:, None]
    shuffled = as_dwi(dwi.signal[:, order], replace(acq, bvecs=sign * acq.bvecs)[order],
                      dwi.noise_sd)
    np.testing.assert_allclose(method().denoise(shuffled, "cpu").signal, one.signal[:, order],
                               atol=4e-3)


def test_noise_floor_is_removed(rng):
    """Free water at b 3000 has a signal of 1e-4, its magnitude one of 0.06 at SNR 20."""
    acq = table(30, (1000, 3000))
    clean = 400 * np.exp(-acq.bvals * 3e-3) * np.ones((2000, 1))
    noise = rng.normal(0, 20, (2, *clean.shape))
    high = acq.bvals == 3000
    floor = 20 * math.sqrt(math.pi / 2)
    dwi = as_dwi(np.hypot(clean + noise[0], noise[1]), acq, 20.0)
    assert dwi.signal[:, high].mean() == pytest.approx(floor, rel=0.02)
    magnitude = method().denoise(dwi, "cpu")
    assert abs(magnitude.signal[:, high].mean()) < 0.2 * floor
    assert magnitude.parameters["NoiseFloor"] == "removed"
    # the real part has none, and none is subtracted
    clean = 400 * clean_signal(acq, 2000, rng)
    real = as_dwi(clean + rng.normal(0, 20, clean.shape), acq, 20.0, magnitude=False)
    result = method().denoise(real, "cpu")
    assert abs((result.signal - clean)[:, high].mean()) < 0.2 * floor
    assert result.parameters["NoiseFloor"] == "none in the input"


@pytest.fixture(scope="module")
def runs():
    """Three people of one acquisition, with turned tables as after motion correction."""
    rng = np.random.default_rng(8)
    return {f"sub-{i}": measured(table(turn=0.01 * i), 400, rng)[0] for i in range(3)}


def taught(runs, steps=20, **settings):
    learned = method(**settings)
    return learned.fit(cohort({k: v.acquisition for k, v in runs.items()}, runs.__getitem__),
                       kinds.TrainingSettings(max_steps=steps)).checkpoints


@pytest.mark.parametrize("layer,space", [("zonal", "signal"), ("local", "coefficient"),
                                         ("signal", "signal"), ("connected", "signal")])
def test_cohort_round_trip(runs, layer, space, tmp_path):
    """Trained at group level, found again at participant level, before the bundled weights."""
    made = taught(runs, network__layer=layer, network__space=space, network__widths=[8, 4, 8])
    (name, trained), = made.items()
    assert name == f"{NAME}_{layer}_relu_{space}_b1000n30_b2500n30"
    assert trained.card.trained_for.snr == (10, 40)
    assert trained.card.training["runs"] == 3 and trained.card.training["voxels"] == 1200
    save(made, tmp_path)
    applied = method(tmp_path)
    dwi = runs["sub-1"]
    assert applied.select(dwi.acquisition).card.sha256 and not applied.violations(dwi.acquisition)
    result = applied.denoise(dwi, "cpu")
    assert result.parameters["Layer"] == layer
    assert result.parameters["RotationEquivariant"] == (layer == "zonal")
    assert np.isfinite(result.signal).all()
    # another acquisition takes the bundled weights
    assert applied.select(table(24)).card.network["shells"] == 0
    other = table(turn=0.5)
    assert applied.select(other).card.network["shells"] == (0 if layer in ("signal", "connected")
                                                            else 2)


@pytest.mark.parametrize("half", [True, False])
def test_signal_without_the_half_of_the_noise_that_training_keeps(monkeypatch, rng, half):
    """If all voxels have the attenuation x = 0.4, the best prediction of y = x + n from z = y + n'
    is (x + z)/2, with n and n' of one distribution, and x follows from it. The bundled network
    learns x, and its output stays."""
    acq = table()
    noisy = 0.4 + rng.normal(0, SD, (50, len(acq)))
    noisy[:, acq.b0] = 1
    dwi = as_dwi(400 * noisy, acq, SD * 400, magnitude=False)
    monkeypatch.setattr(module, "build_network", lambda _: torch.nn.Identity())
    trained = SimpleNamespace(
        card=SimpleNamespace(network={"layer": "local"}, constants={"half_of_the_noise": half},
                             trained_for=SimpleNamespace(snr=(5.0, 100.0))),
        into=lambda _: Halving())
    signal, _ = apply_network(trained, dwi, acq.shells, "cpu")
    expected = 0.4 if half else (0.4 + noisy[:, ~acq.b0]) / 2
    np.testing.assert_allclose(signal[:, ~acq.b0], np.broadcast_to(400 * expected, (50, 60)),
                               rtol=1e-5)


class Halving(torch.nn.Module):
    """(0.4 + z)/2."""

    def forward(self, z, *_):
        return (0.4 + z) / 2


def test_networks_that_keep_half_of_the_noise_say_so(runs):
    """They are those of a cohort, with a shortcut and for any table."""
    for layer, kept in (("zonal", True), ("connected", False)):
        (trained,) = taught(runs, 1, network__layer=layer,
                            network__widths=[8, 4, 8]).values()
        assert trained.card.constants["half_of_the_noise"] is kept
    bundled = checkpoint.load(methods.FOLDER.parent / "weights" / NAME, NAME)
    assert not bundled.card.constants.get("half_of_the_noise", False)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_validation_is_on_participants_that_are_not_learned_from(monkeypatch, seed):
    """The attenuation says whose a voxel is: k/10 for participant k, who has two runs."""
    acq, people = table(), ["1", "1", "2", "2", "3", "3", "4", "4"]

    def load(name):
        signal = np.where(acq.b0, 1.0, int(people[int(name)]) / 10) * np.ones((40, 1))
        return as_dwi(400 * signal, acq, SD * 400)

    def owners(minibatches):
        return {round(10 * float(v)) for b in minibatches for v in b.target[b.measured].unique()}

    class Stop(Exception):
        pass

    found = []

    def train(_, __, draw, held_out, *args, **options):
        generator = torch.Generator().manual_seed(0)
        found.append((owners(b for _ in range(40) for b in draw(generator)), owners(held_out)))
        raise Stop

    monkeypatch.setattr(learn, "train", train)
    everyone = cohort(dict.fromkeys(map(str, range(8)), acq), load, people)
    with pytest.raises(Stop):
        method(held_out=8 * 1024, batch=16).fit(everyone, kinds.TrainingSettings(seed=seed))
    ((learned, validated),) = found
    assert len(validated) == 1 and len(learned) == 3 and learned | validated == {1, 2, 3, 4}


def test_target_of_a_cohort_is_the_measured_signal(runs):
    samples = [learn.sample_run(dwi, 100, 0) for dwi in runs.values()]
    stacks, signals, sigma = zip(*samples, strict=True)
    sampler = learn.CohortSampler(stacks, signals, sigma, [False] * 3, 2000)
    (b,) = sampler.draw(torch.Generator().manual_seed(0))
    run = next(i for i, s in enumerate(signals) if (s == b.target[0]).flatten(1).all(1).any())
    assert all((signals[run] == row).flatten(1).all(1).any() for row in b.target[:20])
    ratio = ((b.signal - b.target) / b.noise[:, :1, None])[b.target > 0.2].square().mean()
    assert float(ratio) == pytest.approx(1, rel=0.03)
    # with magnitudes the second moment rises by two channels of noise
    (b,) = replace(sampler, magnitude=[True] * 3).draw(torch.Generator().manual_seed(0))
    excess = (b.signal.square() - b.target.square()).mean() / b.noise[:, 0].square().mean()
    assert float(excess) == pytest.approx(2, rel=0.1)


def test_training_on_a_cohort_lowers_the_error(runs):
    """The added noise is lowered from the first steps on."""
    (trained,) = taught(runs).values()
    (longer,) = taught(runs, steps=150).values()
    assert longer.card.metrics["mse_output"] < 0.8 * longer.card.metrics["mse_input"]
    assert longer.card.metrics["mse_output"] < trained.card.metrics["mse_output"]
    # a training is a function of its seed
    again, = taught(runs).values()
    other, = taught(runs).values()
    assert all(torch.equal(v, other.tensors[k]) for k, v in again.tensors.items())


def test_cohorts_that_are_refused(runs):
    acq = next(iter(runs.values())).acquisition
    settings = kinds.TrainingSettings(max_steps=2)

    def fit(acquisitions, load=runs.__getitem__, people=None, **options):
        return method(**options).fit(cohort(acquisitions, load, people), settings)

    two = {"sub-0": acq, "sub-1": acq}
    with pytest.raises(UsageError, match=r"found 1 participant. At least 2"):
        fit({"sub-0": acq})
    with pytest.raises(UsageError, match=r"found 1 participant"):
        fit(two, people=["a", "a"])
    with pytest.raises(UsageError, match=r"runs of one acquisition. Found: 30 × b 1000.*20 × b 1"):
        fit({"sub-0": acq, "sub-1": table(20)})
    with pytest.raises(UsageError, match="no volume without weighting"):
        fit(dict.fromkeys(two, table(b0=0)))
    mixed = Acquisition(np.r_[0, [1000] * 5, [2000] * 20],
                        np.r_[np.zeros((1, 3)), spread(5), spread(20)])
    with pytest.raises(UsageError, match="Each shell needs at least 6"):
        fit(dict.fromkeys(two, mixed))
    with pytest.raises(UsageError, match="noise of sub-0 could not be measured"):
        fit(two, lambda name: replace(runs[name], noise_sd=None))
    turned = {"sub-0": acq, "sub-1": table(turn=0.5)}
    with pytest.raises(UsageError, match=r"directions of sub-1 differ by 2\d°.*layer=zonal"):
        fit(turned, network__layer="connected")
    with pytest.raises(UsageError, match=r"takes it from the runs"):
        fit(two, network__shells=3)


def test_init_continues_from_the_same_network(runs, tmp_path):
    made = taught(runs)
    save(made, tmp_path)
    (name, first), = made.items()
    acquisitions = {k: v.acquisition for k, v in runs.items()}
    settings = kinds.TrainingSettings(max_steps=1, init=tmp_path / name)
    (more,) = method().fit(cohort(acquisitions, runs.__getitem__), settings).checkpoints.values()
    assert more.card.training["start"] == checkpoint.load(tmp_path / name).card.sha256
    change = max(float((v - first.tensors[k]).abs().max()) for k, v in more.tensors.items())
    assert 0 < change < 0.02
    with pytest.raises(UsageError, match="holds the network"):
        method(network__widths=[8, 4, 8]).fit(cohort(acquisitions, runs.__getitem__), settings)


def test_directions_in_order():
    acq = table()
    flipped = acq.bvecs * np.where(np.arange(len(acq)) % 2, 1, -1)[:, None]
    assert direction_difference(flipped, acq) == pytest.approx(0, abs=1e-4)
    assert direction_difference(acq.bvecs[::-1], acq) > 10
    assert direction_difference(acq.bvecs[1:], acq) == 90


def test_bundled_card():
    trained = checkpoint.load(methods.FOLDER.parent / "weights" / NAME, NAME)
    card = trained.card
    assert card.network["layer"] == "zonal" and card.network["shells"] == 0
    assert card.trained_for.shell_count and card.metrics["mse_output"] < card.metrics["mse_input"]
    trained.into(build_network(card.network))
