"""Upsampling by U-Nets of slices: training on a cohort, selection by directions, refusals."""

import json
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch

from bidsapp import checkpoint, kinds, methods, upsample
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi, noise_sd
from bidsapp.errors import Refusal, UsageError
from bidsapp.methods.upsample_unet import slices
from bidsapp.methods.upsample_unet.method import SINGLE, match_directions
from support.app import qsphere
from support.crossing_tensors import simulate

DIRECTIONS, INPUTS, S0, NOISE = 24, 12, 500.0, 0.03
SPREAD = upsample.spread(np.zeros((0, 3)), DIRECTIONS, seed=1)
TABLE = Acquisition(np.r_[0, 0, np.full(DIRECTIONS, 1000.0)], np.r_[np.zeros((2, 3)), SPREAD])
AFFINE = np.diag([3.0, 3.0, 4.0, 1.0])
PEOPLE = ("01", "02", "03", "04")


def ellipsoid(shape=(13, 15, 11)):
    grid = np.meshgrid(*[np.linspace(-1, 1, n) for n in shape], indexing="ij")
    return sum(g**2 for g in grid) < 0.9


def head(person, table=TABLE, sd=NOISE, mask=None):
    """Random crossing tensors in every voxel, and the signal without noise."""
    mask = ellipsoid() if mask is None else mask
    signal, clean = simulate(np.random.default_rng(int(person)), table, int(mask.sum()), sd)
    dwi = Dwi((S0 * signal).astype(np.float32), mask, AFFINE, table, magnitude=False)
    return replace(dwi, noise_sd=noise_sd(dwi)), S0 * clean


def cohort(people=PEOPLE, tables=None, load=None):
    tables = tables or dict.fromkeys(people, TABLE)
    rows = pd.DataFrame({"participant": people, "run": people, "batch": "A", "snr_b0": 33.0})
    return kinds.Cohort(rows, acquisitions=tables, load=load or (lambda run: head(
        run, tables[run])[0]), voxel_sizes=dict.fromkeys(people, (3.0, 3.0, 4.0)))


def method_with(*texts, sloppy=True, **context):
    settings = methods.read_settings([f"upsample_unet.{t}" for t in texts],
                                     [methods.get("upsample_unet")], True, sloppy)
    return methods.get("upsample_unet", context=kinds.MethodContext(
        sloppy=sloppy, settings=settings, **context))


def keep(checkpoints, folder):
    for name, trained in checkpoints.items():
        (folder / name).mkdir(parents=True)
        for file, content in checkpoint.pack(trained).items():
            (folder / name / file).write_bytes(content)
    return folder


@cache
def trained(networks="joint"):
    method = method_with(f"networks={networks}", f"inputs={INPUTS}", "network.width=4")
    return method.fit(cohort(), kinds.TrainingSettings(max_steps=20, seed=1))


@pytest.fixture(params=["joint", "single"])
def networks(request):
    return request.param


@pytest.fixture
def models(networks, tmp_path):
    """Folder of a model of 12 inputs and 12 targets."""
    return keep(trained(networks).checkpoints, tmp_path / "models")


@pytest.fixture
def method(models):
    return methods.get("upsample_unet", context=kinds.MethodContext(models=models))


def limited(dwi):
    """The b0 volumes and the input directions of a scan."""
    return dwi.select_volumes(np.r_[0, 1, 2 + np.sort(upsample.subset(SPREAD, INPUTS))])


# --- pieces


def test_directions_are_matched_one_to_one_and_antipodes_are_equal(rng):
    order = rng.permutation(DIRECTIONS)
    moved = SPREAD + 0.01 * rng.standard_normal(SPREAD.shape)  # up to 2°
    moved *= rng.choice([-1, 1], DIRECTIONS)[:, None] / np.linalg.norm(moved, axis=1)[:, None]
    np.testing.assert_array_equal(order[match_directions(moved[order], SPREAD, 3)],
                                  np.arange(DIRECTIONS))
    assert match_directions(SPREAD[:-1], SPREAD, 3) is None
    assert match_directions(SPREAD[[0, *range(DIRECTIONS - 1)]], SPREAD, 3) is None  # one twice
    tilt = np.radians(4)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    assert match_directions(SPREAD @ turn.T, SPREAD, 3) is None
    assert match_directions(SPREAD @ turn.T, SPREAD, 4.1) is not None


def test_linear_prediction_is_the_least_squares_fit(tmp_path):
    dataset, rows = slices.SliceDataset(tmp_path, 100, INPUTS), []
    for person in PEOPLE[:2]:
        dwi, _ = head(person)
        dataset.add(dwi, 2 + np.arange(DIRECTIONS))
        rows.append(dwi.signal[:, 2:] / dwi.mean_b0[:, None])
    values = np.concatenate(rows).astype(np.float64)
    x, y = np.column_stack([values[:, :INPUTS], np.ones(len(values))]), values[:, INPUTS:]
    wanted, *_ = np.linalg.lstsq(x, y, rcond=None)
    found = slices.fit_linear(dataset)
    np.testing.assert_allclose(found.matrix, wanted[:-1].T, atol=1e-4)
    np.testing.assert_allclose(found.shift, wanted[-1], atol=1e-4)
    np.testing.assert_allclose(found.scale, (y - x @ wanted).std(0), rtol=1e-3)
    mean = slices.fit_linear(dataset, constant=True)
    assert not mean.matrix.any()
    np.testing.assert_allclose(mean.shift, y.mean(0), rtol=1e-4)
    np.testing.assert_allclose(mean.scale, y.std(0), rtol=1e-3)


def test_slices_are_axial_and_hold_each_voxel_once():
    dwi, _ = head("01")
    number = slices.number_voxels(dwi)
    z, x, y = np.nonzero(number >= 0)
    assert sorted(number[z, x, y]) == list(range(len(dwi.signal)))
    i, j, k = np.nonzero(dwi.mask)
    for one, other in ((x, i), (y, j), (z, k)):
        np.testing.assert_array_equal(one + other.min(), other[number[number >= 0]])


def test_minibatches_pad_slices_of_other_sizes_with_zeros(tmp_path):
    dataset = slices.SliceDataset(tmp_path, 3, INPUTS)
    shapes = [(9, 12, 5), (14, 6, 6)]
    for person, shape in zip(PEOPLE, shapes, strict=False):
        dataset.add(head(person, mask=np.ones(shape, bool))[0], 2 + np.arange(DIRECTIONS))
    assert len(dataset) == 6
    drawn = dataset([4, 1], [3, 5])
    assert drawn.inputs.shape == (2, INPUTS, 14, 12) and drawn.targets.shape == (2, 2, 14, 12)
    assert drawn.mask.sum((1, 2)).tolist() == [14 * 6, 9 * 12]
    assert not drawn.inputs.movedim(1, 3)[~drawn.mask].any()
    dwi, _ = head("02", mask=np.ones(shapes[1], bool))
    ratio = dwi.unmask(dwi.signal / dwi.mean_b0[:, None])[:, :, 2]  # slices 0, 2 and 5 of six
    np.testing.assert_allclose(drawn.targets[0, :, :, :6].movedim(0, 2), ratio[..., [17, 19]],
                               rtol=1e-5)


def test_calibration_finds_the_parts_of_the_variance(rng):
    """sd² = 0.3 ν² + (0.02 + 0.05 ŷ)², known; measurements have the noise ν as well."""
    count = 40_000
    predicted = rng.uniform(0.05, 0.9, (count, 2))
    noise = rng.uniform(0.01, 0.08, count)
    sd = np.sqrt(0.3 * noise[:, None]**2 + (0.02 + 0.05 * predicted)**2)
    truth = predicted + sd * rng.standard_normal(sd.shape)
    measured = truth + noise[:, None] * rng.standard_normal(sd.shape)
    found = slices.calibrate(predicted, measured, noise)
    np.testing.assert_allclose(found["gain"], 0.3, atol=0.06)
    again = slices.error_sd(predicted.astype(np.float32), noise.astype(np.float32), found,
                            np.arange(2))
    assert np.sqrt(np.mean((again / sd - 1) ** 2)) < 0.05
    assert np.mean(np.abs(truth - predicted) < 1.6449 * again) == pytest.approx(0.9, abs=0.01)


# --- training and application


def test_learns_to_predict_a_person_that_it_has_not_seen(method):
    """The error without noise is below the noise of a measurement, and its SD is right."""
    dwi, clean = head("09")
    known = limited(dwi)
    target = method.target(known.acquisition)
    assert len(target) == DIRECTIONS - INPUTS and (target.bvals == 1000).all()
    cosine = np.abs(SPREAD @ target.bvecs.T)
    np.testing.assert_allclose(cosine.max(0), 1)
    new = 2 + cosine.argmax(0)
    assert not set(new) & set(2 + upsample.subset(SPREAD, INPUTS))
    made = method.predict(known, target, "cpu")
    error = made.signal - clean[:, new]
    assert made.signal.dtype == made.sd.dtype == np.float32
    assert np.sqrt(np.mean(error**2)) < 0.9 * NOISE * S0
    nearest = np.abs(known.acquisition.bvecs @ target.bvecs.T).argmax(0)
    assert np.mean(error**2) < 0.5 * np.mean((known.signal[:, nearest] - clean[:, new])**2)
    assert np.mean(np.abs(error) < 1.6449 * made.sd) == pytest.approx(0.9, abs=0.04)
    noisy = np.abs(made.signal - dwi.signal[:, new]) < 1.6449 * np.hypot(made.sd, dwi.noise_sd)
    assert np.mean(noisy) == pytest.approx(0.9, abs=0.02)


def test_networks_improve_on_the_linear_prediction():
    """Inputs are u or v, and targets u v, which no linear map of them is."""
    def load(run):
        dwi, _ = head(run, sd=0.0)
        u, v = np.random.default_rng(int(run)).uniform(0, 1, (2, len(dwi.signal), 1))
        inputs = upsample.subset(SPREAD, INPUTS)
        values = np.repeat(u * v, DIRECTIONS, 1)
        values[:, inputs[::2]], values[:, inputs[1::2]] = u, v
        signal = np.column_stack([np.ones((len(u), 2)), values])
        return replace(dwi, signal=(S0 * signal).astype(np.float32))

    fitted = method_with(f"inputs={INPUTS}", "network.width=8", "slices=11").fit(
        cohort(load=load), kinds.TrainingSettings(max_steps=150, seed=1))
    (model,) = fitted.checkpoints.values()
    metrics = model.card.metrics
    assert metrics["mse_linear"] == pytest.approx(1 / 144, rel=0.1)  # Var (u − ½)(v − ½)
    assert metrics["mse_signal"] < 0.3 * metrics["mse_linear"]
    assert model.card.training["validation"][0] == pytest.approx(
        metrics["mse_signal"] / metrics["mse_linear"], rel=0.1)


def test_linear_prediction_knows_nothing_of_the_validation():
    """Targets do not depend on the inputs, and are those of a participant: the prediction is the
    mean of the participants of the training, and its error the distance of the one held out."""
    level = dict(zip(PEOPLE, (0.1, 0.2, 0.5, 0.8), strict=True))
    inputs = 2 + upsample.subset(SPREAD, INPUTS)
    mask = np.ones((8, 8, 6), bool)

    def load(run):
        signal = np.full((mask.sum(), len(TABLE)), level[run])
        signal[:, :2] = 1
        signal[:, inputs] = np.random.default_rng(int(run)).uniform(0, 1, (len(signal), INPUTS))
        return Dwi((S0 * signal).astype(np.float32), mask, AFFINE, TABLE, magnitude=False)

    fitted = method_with(f"inputs={INPUTS}", "network.width=2").fit(
        cohort(load=load), kinds.TrainingSettings(max_steps=1))
    (model,) = fitted.checkpoints.values()
    shift = model.tensors["linear.shift"] + model.tensors["linear.matrix"].sum(1) / 2
    others = {p: np.mean([level[q] for q in PEOPLE if q != p]) for p in PEOPLE}
    held = min(PEOPLE, key=lambda p: abs(float(shift.mean()) - others[p]))
    np.testing.assert_allclose(shift, others[held], atol=0.01)
    assert model.card.metrics["mse_linear"] == pytest.approx(
        (level[held] - others[held])**2, rel=0.1)


def test_card_says_what_was_learned(networks):
    (name, model), = trained(networks).checkpoints.items()
    card = model.card
    assert name == f"upsample_unet_b1000n{INPUTS}"
    assert card.constants["networks"] == networks
    assert len(card.training["steps"]) == (DIRECTIONS - INPUTS if networks == SINGLE else 1)
    (shell,) = card.trained_for.shells
    assert shell.directions == (INPUTS, INPUTS) and shell.b == (1000, 1000)
    assert card.trained_for.voxel_size == ((3, 3), (3, 3), (4, 4))
    assert (card.training["runs"], card.training["validation_runs"]) == (4, 1)
    json.dumps(dict(trained(networks).model))


def test_order_of_volumes_and_targets_and_antipodes_do_not_matter(method, rng):
    known = limited(head("09")[0])
    target = method.target(known.acquisition)
    one = method.predict(known, target, "cpu")
    order, back = rng.permutation(len(known.acquisition)), rng.permutation(len(target))
    other = known.select_volumes(order)
    sign = rng.choice([-1.0, 1.0], len(order))[:, None]
    other = replace(other, acquisition=replace(
        other.acquisition, bvecs=sign * other.acquisition.bvecs))
    made = method.predict(other, target[back], "cpu")
    np.testing.assert_allclose(made.signal, one.signal[:, back], rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(made.sd, one.sd[:, back], rtol=1e-3)
    some = method.predict(known, target[[5, 2]], "cpu")
    np.testing.assert_allclose(some.signal, one.signal[:, [5, 2]], rtol=1e-4, atol=1e-3)


def test_how_an_image_is_stored_does_not_matter(method):
    """Axes in another order and direction, and a margin around the head."""
    known = limited(head("09")[0])
    target = method.target(known.acquisition)
    one = method.predict(known, target, "cpu")
    row = np.full(known.mask.shape, -1)
    row[known.mask] = np.arange(len(known.signal))
    row = np.pad(row, 3, constant_values=-1)[::-1].transpose(2, 0, 1)
    mask = row >= 0
    affine = np.eye(4)
    affine[:3, :3] = AFFINE[:3, :3] @ np.diag([-1, 1, 1])[:, [2, 0, 1]]
    other = method.predict(Dwi(known.signal[row[mask]], mask, affine, known.acquisition,
                               known.noise_sd, magnitude=False), target, "cpu")
    np.testing.assert_allclose(other.signal, one.signal[row[mask]], rtol=1e-4, atol=1e-3)


def test_voxels_without_b0_signal_are_zero_and_the_input_is_unchanged(method):
    dwi = limited(head("09")[0])
    signal = dwi.signal.copy()
    signal[7, :2] = 0
    signal[9, :2] = -3
    dwi = replace(dwi, signal=signal, magnitude=True)
    made = method.predict(dwi, method.target(dwi.acquisition), "cpu")
    np.testing.assert_array_equal(dwi.signal, signal)
    assert not made.signal[[7, 9]].any() and not made.sd[[7, 9]].any()
    assert np.isfinite(made.signal).all() and np.isfinite(made.sd).all()
    assert made.signal.min() >= 0  # magnitudes
    assert made.counts == {"unet_no_b0_signal": 2}
    json.dumps([made.counts, made.parameters])
    quiet = method.predict(replace(dwi, noise_sd=None), method.target(dwi.acquisition), "cpu")
    assert quiet.sd is None


# --- refusals


def test_without_a_model_it_says_how_to_train(tmp_path):
    known = limited(head("09")[0]).acquisition
    method = methods.get("upsample_unet", context=kinds.MethodContext(models=tmp_path))
    with pytest.raises(Refusal, match=r"no trained model.*--train upsample_unet.*upsample_gp"):
        method.check(known)
    assert method.target(known) is None
    with pytest.raises(Refusal, match="0 b0 volumes"):
        method.check(known[2:])


def test_other_directions_are_refused(method):
    known = limited(head("09")[0])
    half = np.r_[0:9]
    for acquisition in (TABLE, known.acquisition[half], replace(
            known.acquisition, b_delta=np.r_[1, 1, np.zeros(INPUTS)])):
        assert method.target(acquisition) is None
        with pytest.raises(Refusal, match=r"found .* × b 1000.*models for 12 × b 1000.*Needed are"):
            method.check(acquisition)
    with pytest.raises(Refusal, match="found 9"):
        part = known.select_volumes(np.r_[0:11])
        method.predict(part, TABLE[[5]], "cpu")
    two = Acquisition(np.r_[known.acquisition.bvals, np.full(DIRECTIONS, 2000.0)],
                      np.r_[known.acquisition.bvecs, SPREAD])
    with pytest.raises(Refusal, match="found 24 × b 2000"):
        method.check(two)


def test_other_targets_are_refused(method):
    known = limited(head("09")[0])
    target = method.target(known.acquisition)
    for strange in (replace(target, bvals=2 * target.bvals), known.acquisition[[4]]):
        with pytest.raises(Refusal, match=r"measurements to predict.*trained for \(12 × b 1000"):
            method.predict(known, strange, "cpu")


def test_another_b_or_voxel_size_needs_allow_extrapolation(method, models):
    known = limited(head("09")[0])
    far = replace(known.acquisition, bvals=1.5 * known.acquisition.bvals)
    assert method.violations(known.acquisition, method.target(known.acquisition)) == []
    assert "needed are 12 × b 1000" in method.violations(far, method.target(far))[0]
    allowed = methods.get("upsample_unet", context=kinds.MethodContext(
        models=models, allow_extrapolation=True))
    for dwi, text in ((replace(known, acquisition=far), "12 × b 1500"),
                      (replace(known, affine=np.diag([3, 3, 3, 1.0])), "3 × 3 × 3 mm")):
        target = method.target(dwi.acquisition)
        size = np.linalg.norm(dwi.affine[:3, :3], axis=0).tolist()
        assert text in method.violations(dwi.acquisition, target, size)[0]  # for the dry run
        with pytest.raises(Refusal, match=rf"{text}.*--allow-extrapolation"):
            method.predict(dwi, target, "cpu")
        made = allowed.predict(dwi, target, "cpu")
        assert text in made.parameters["OutOfDistribution"][0] and made.notices


def test_each_shell_has_a_model_of_its_own(tmp_path):
    table = Acquisition(np.r_[TABLE.bvals, np.full(DIRECTIONS, 2000.0)],
                        np.r_[TABLE.bvecs, -SPREAD])
    fitted = method_with(f"inputs={INPUTS}", "network.width=2").fit(
        cohort(tables=dict.fromkeys(PEOPLE, table)), kinds.TrainingSettings(max_steps=10))
    assert set(fitted.checkpoints) == {f"upsample_unet_b{b}n{INPUTS}" for b in (1000, 2000)}
    method = methods.get("upsample_unet", context=kinds.MethodContext(
        models=keep(fitted.checkpoints, tmp_path / "models")))
    dwi, clean = head("09", table)
    inputs = 2 + upsample.subset(SPREAD, INPUTS)
    known = dwi.select_volumes(np.r_[0, 1, inputs, inputs + DIRECTIONS])
    target = method.target(known.acquisition)
    assert [len(s) for s in target.shells] == [INPUTS, INPUTS]
    new = np.setdiff1d(np.arange(2, 2 + DIRECTIONS), inputs)
    error = method.predict(known, target, "cpu").signal - clean[:, np.r_[new, new + DIRECTIONS]]
    assert np.sqrt(np.mean(error**2, axis=0)).max() < 1.2 * NOISE * S0
    alone = method.target(known.acquisition[:2 + INPUTS])  # one of the shells
    assert len(alone) == INPUTS


@pytest.mark.parametrize("tables,texts,message", [
    ({"03": Acquisition(TABLE.bvals, TABLE.rotated(np.diag([1, -1, -1])).bvecs)}, (),
     r"03 has 24 × b 1000.*01 has 24 × b 1000.*same directions"),
    ({"02": TABLE[:-1]}, (), r"02 has 23 × b 1000"),
    ({"04": TABLE[2:]}, (), r"04 has 24 × b 1000 s/mm² and 0 b0 volumes"),
    (dict.fromkeys(PEOPLE, TABLE[:8]), (), r"6 × b 1000 s/mm², of which 2 would be inputs"),
    (dict.fromkeys(PEOPLE, TABLE[:2]), (), r"01 has no diffusion-weighted volume"),
    ({}, ("inputs=24",), r"24 would be inputs.*--set upsample_unet.inputs=N"),
    ({p: replace(TABLE, b_delta=np.r_[1, 1, np.full(DIRECTIONS, -0.5)]) for p in PEOPLE}, (),
     r"Needed are linear encoding")])
def test_unsuitable_cohorts_are_refused(tables, texts, message):
    with pytest.raises(UsageError, match=message):
        method_with(*texts).fit(cohort(tables=dict.fromkeys(PEOPLE, TABLE) | tables),
                                kinds.TrainingSettings())


def test_one_participant_is_refused():
    with pytest.raises(UsageError, match="found 1 participant"):
        method_with("inputs=12").fit(cohort(("01",)), kinds.TrainingSettings())


def test_runs_within_two_degrees_count_as_the_same_whatever_their_order(rng):
    tilt = np.radians(1.5)
    turn = np.array([[np.cos(tilt), -np.sin(tilt), 0], [np.sin(tilt), np.cos(tilt), 0], [0, 0, 1]])
    order = rng.permutation(len(TABLE))
    table = TABLE[order].rotated(turn)
    fitted = method_with(f"inputs={INPUTS}", "network.width=2").fit(
        cohort(tables={**dict.fromkeys(PEOPLE, TABLE), "02": table}),
        kinds.TrainingSettings(max_steps=10, seed=1))
    (model,) = fitted.checkpoints.values()
    (other,) = trained().checkpoints.values()
    assert model.card.metrics["mse_linear"] == pytest.approx(
        other.card.metrics["mse_linear"], rel=0.1)


# --- state, start, command line


def test_a_training_is_resumed_from_its_state(tmp_path, networks):
    method = method_with(f"networks={networks}", f"inputs={INPUTS}", "network.width=2",
                         "schedule.decay=constant")
    people = cohort(PEOPLE[:2])

    def fit(steps, states):
        return next(iter(method.fit(people, kinds.TrainingSettings(
            max_steps=steps, seed=2, states=states)).checkpoints.values()))

    whole = fit(20, tmp_path / "one")
    half = fit(10, tmp_path / "two")
    states = list((tmp_path / "two").glob("upsample_unet_b1000n12.*ckpt"))
    assert len(states) == len(half.card.training["steps"])
    again = fit(20, tmp_path / "two")
    for key, value in whole.tensors.items():
        torch.testing.assert_close(again.tensors[key], value, rtol=0, atol=0)
    assert set(half.card.training["steps"]) == {10} and set(again.card.training["steps"]) == {20}


def test_a_training_can_start_from_a_checkpoint(models, networks, tmp_path):
    folder = models / f"upsample_unet_b1000n{INPUTS}"
    texts = (f"networks={networks}", f"inputs={INPUTS}", "network.width=4",
             "schedule.learning_rate=1e-12")
    (model,) = method_with(*texts).fit(cohort(), kinds.TrainingSettings(
        max_steps=1, seed=1, init=folder)).checkpoints.values()
    start = checkpoint.load(folder)
    assert model.card.training["start"] == start.card.sha256
    name = "joint.final.weight" if networks == "joint" else "direction-3.final.weight"
    torch.testing.assert_close(model.tensors[name], start.tensors[name], rtol=0, atol=1e-6)
    for changed, message in (("network.width=2", "do not fit its network"),
                             ("inputs=10", "do not fit its network")):
        with pytest.raises(UsageError, match=f"--init: .*{message}"):
            method_with(*texts, changed).fit(cohort(), kinds.TrainingSettings(init=folder))
    other = Acquisition(TABLE.bvals, TABLE.rotated(np.diag([1, -1, -1])).bvecs)
    with pytest.raises(UsageError, match=r"--init: .* other directions"):
        method_with(*texts).fit(cohort(tables=dict.fromkeys(PEOPLE, other)),
                                kinds.TrainingSettings(init=folder))
    with pytest.raises(UsageError, match="holds no checkpoint"):
        method_with(*texts).fit(cohort(), kinds.TrainingSettings(init=tmp_path / "none"))


@pytest.mark.slow
def test_group_level_trains_and_participant_level_finds_the_model(bids_tree, tmp_path):
    root, out = bids_tree(scheme=((0, 2), (1000, 12))), tmp_path / "out"
    assert qsphere(root, out, "participant", "--estimate", "dti") == 0
    assert qsphere(root, out, "group", "--train", "upsample_unet", "--sloppy",
                   "--set", "upsample_unet.inputs=6") == 0
    assert not list((out / "group/log").glob("*.ckpt"))
    method = methods.get("upsample_unet", context=kinds.MethodContext(models=out / "group/models"))
    (model,) = method.weights
    inputs = np.array(model.card.constants["inputs"])
    target = method.target(Acquisition(np.r_[0, np.full(6, 1000.0)],
                                       np.r_[np.zeros((1, 3)), inputs]))
    assert len(target) == 6
    # the directions for the scanner, and what the page says
    table = pd.read_csv(out / "group/desc-unetb1000n6_directions.tsv", sep="\t")
    assert table["role"].tolist() == ["input"] * 6 + ["target"] * 6
    np.testing.assert_allclose(table[["x", "y", "z"]][:6], inputs, atol=1e-4)
    page = (out / "group.html").read_text()
    assert "held-out simulation" not in page
    assert "1 held-out runs of the cohort: 6 to 6 further directions" in page
    assert "runs that have the input directions (group/desc-unetb1000n6_directions.tsv)" in page
