"""Training on volumes: random crops, the start of another task, and its refusals."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from bidsapp import checkpoint, kinds, methods, selection
from bidsapp.acquisition import Acquisition
from bidsapp.errors import UsageError
from bidsapp.volumetric import learn
from bidsapp.volumetric.corruption import Corruption
from bidsapp.volumetric.inputs import MIN_DIRECTIONS, Grid
from bidsapp.volumetric.labels import label_fibres
from support import bids_tree, ellipsoid, synthetic_head, travelling_heads, untrained_volumes

TISSUES = {1: 0, 2: 2, 3: 1, 4: 1}
"""Labels of `synthetic_head` → column of the tissue probabilities."""


def tissue(run):
    labels = synthetic_head.tissues()[::2, ::2, ::2]
    inside = labels[labels > 0]
    return np.eye(3, dtype=np.float32)[[TISSUES[label] for label in inside]]


def cohort(people=("01", "02", "03"), **more):
    more.setdefault("tissue", tissue)
    return travelling_heads.study(people, "A", **more)


def method_with(name, *settings, **context):
    method = methods.get(name)
    values = methods.read_settings([f"{name}.{s}" for s in settings], [method], training=True,
                                   sloppy=True)
    return methods.get(name, context=kinds.MethodContext(sloppy=True, settings=values, **context))


def keep(fitted, folder):
    for name, trained in fitted.checkpoints.items():
        (folder / name).mkdir(parents=True)
        for file, content in checkpoint.pack(trained).items():
            (folder / name / file).write_bytes(content)
    return folder / next(iter(fitted.checkpoints))


def test_parts_of_a_table_keep_enough_directions():
    acquisition = Acquisition(*bids_tree.table(((700, 7), (1500, 20), (3000, 40))))
    generator = torch.Generator().manual_seed(0)
    shells, sizes = set(), set()
    for _ in range(60):
        part = acquisition[learn.subsample(acquisition, generator)]
        shells.add(tuple(round(s.b) for s in part.shells))
        sizes |= {len(s) for s in part.shells}
    assert len(shells) == 7  # every set but the empty one
    assert min(sizes) == MIN_DIRECTIONS
    assert max(sizes) > 30


def test_a_validation_draws_several_corruptions_that_stay_the_same(scan):
    validation = learn.Validation([scan, scan], 16, Corruption("artifacts", 6.0), seed=3)
    first, second = list(validation), list(validation)
    assert len(first) == 2 * learn.DRAWS
    assert all(torch.equal(a.ratio, b.ratio) for a, b in zip(first, second, strict=True))
    assert len({float(a.ratio.sum()) for a in first}) == len(first)
    assert len(list(learn.Validation([scan, scan], 16))) == 2


def test_what_a_sampler_draws_is_a_part_of_the_table(scan):
    for subsample in (True, False):
        recipe = learn.read_recipe({**methods.get("estimate_tissue").settings("training"),
                                    "patch": 16, "batch": 8, "subsample": subsample})
        (minibatch,) = learn.Sampler([scan], recipe)(torch.Generator().manual_seed(0))
        counts = {len(crop.ratio) for crop in minibatch}
        assert counts <= set(range(MIN_DIRECTIONS, 33))
        assert (len(counts) > 1) == subsample and (counts == {32}) != subsample


@pytest.mark.parametrize("corruption", ["artifacts", "none", "mask"])
@pytest.mark.parametrize("input_", ["any", "table"])
def test_pretraining_starts_a_task(corruption, input_, tmp_path):
    people, settings = cohort()
    pretraining = method_with("pretrain_artifacts", f"corruption={corruption}", f"input={input_}")
    fitted = pretraining.fit(people, settings)
    folder = keep(fitted, tmp_path)
    assert folder.name == f"pretrain_artifacts_{'any' if input_ == 'any' else 'b1000n30'}"
    (pretrained,) = fitted.checkpoints.values()
    assert pretrained.card.training["corruption"]["kind"] == corruption
    assert pretrained.card.metrics["mse"] > 0
    task = method_with("estimate_tissue")
    (trained,) = task.fit(people, replace(settings, init=folder, max_steps=1)
                          ).checkpoints.values()
    assert trained.card.training["start"] == checkpoint.load(folder).card.sha256
    assert json.loads(json.dumps(trained.card.constants["channels"])) == json.loads(
        (folder / "model.json").read_text())["constants"]["channels"]
    assert {k for k in trained.tensors if k.startswith("encoder.")} == {
        k for k in pretrained.tensors if k.startswith("encoder.")}
    moved = [float((v - pretrained.tensors[k]).abs().max()) for k, v in trained.tensors.items()
             if k.startswith("encoder.")]
    assert max(moved) < 2e-3  # one step of Adam moves each weight by its learning rate, 1e-3


def test_the_same_training_goes_on_with_its_head(tmp_path):
    """The head of a pretraining starts another pretraining, and that of a task no other target."""
    people, settings = cohort()
    settings = replace(settings, max_steps=1)
    for name, same, other in (("pretrain_artifacts", "corruption=none", None),
                              ("estimate_direction", "loss", "target=angles")):
        method = method_with(name)
        folder = keep(method.fit(people, settings), tmp_path)
        first = checkpoint.load(folder)
        for text in filter(None, (same, other)):
            changed = method_with(name, *[text] * ("=" in text))
            (trained,) = changed.fit(people, replace(settings, init=folder)).checkpoints.values()
            moved = max(float((trained.tensors[k] - v).abs().max()) if
                        trained.tensors[k].shape == v.shape else 1.0
                        for k, v in first.tensors.items() if k.startswith("head"))
            assert (moved < 2e-3) == (text == same)  # one step of Adam at 1e-3


def test_a_pretraining_that_has_not_learned_says_so(caplog, tmp_path):
    people, settings = cohort()
    (trained,) = method_with("pretrain_artifacts").fit(people, settings).checkpoints.values()
    before, after = (trained.card.metrics[k] for k in ("mse_before", "mse"))
    assert before < after  # of four steps
    assert "it has not learned yet" in caplog.text and "not learned yet" in trained.card.warnings[0]
    folder = keep(kinds.Fitted({}, {}, {"weights": trained}), tmp_path)
    method_with("estimate_tissue").fit(people, replace(settings, init=folder, max_steps=1))
    assert "of the weights that it starts from: the validation's mean" in caplog.text
    plain = method_with("pretrain_artifacts", "corruption=none").fit(people, settings)
    assert not next(iter(plain.checkpoints.values())).card.warnings


def test_a_task_keeps_its_own_voxel_with_the_encoder_of_any_table(tmp_path):
    people, settings = cohort()
    folder = keep(method_with("pretrain_artifacts", "voxel=8").fit(people, settings), tmp_path)
    assert checkpoint.load(folder).card.constants["channels"]["voxel"] == 8
    (trained,) = method_with("estimate_tissue", "voxel=7").fit(
        people, replace(settings, init=folder, max_steps=1)).checkpoints.values()
    assert trained.card.constants["channels"]["voxel"] == 7


def test_a_task_starts_from_the_bundled_pretraining_unless_told_otherwise():
    people, settings = cohort()
    settings = replace(settings, max_steps=1)
    bundled = selection.bundled_weights(learn.PRETRAINING)
    for texts, start in (((), bundled.card.sha256), (("start=random",), "random"),
                         (("network.width=4",), "random"), (("input=table",), "random")):
        (trained,) = method_with("estimate_tissue", *texts).fit(
            people, settings).checkpoints.values()
        assert trained.card.training["start"] == start


def test_a_task_learns_what_it_can_see():
    """Tissues of the head differ clearly in their signals."""
    people, settings = cohort()
    task = method_with("estimate_tissue", "network.width=4", "patch=32",
                       "schedule.validate_every=20", "schedule.learning_rate=0.01")
    (trained,) = task.fit(people, replace(settings, max_steps=80)).checkpoints.values()
    assert trained.card.metrics["accuracy"] > 0.9  # 0.58 if all were grey matter
    assert trained.card.training["validation_runs"] == 1


def test_the_weights_of_a_training_are_used(tmp_path):
    people, settings = cohort()
    task = method_with("estimate_tissue", "network.width=4", "patch=32",
                       "schedule.validate_every=20", "schedule.learning_rate=0.01")
    folder = keep(task.fit(people, replace(settings, max_steps=60)), tmp_path)
    task = methods.get("estimate_tissue", context=kinds.MethodContext(models=folder.parent))
    dwi = travelling_heads.head("09", "A")
    derived = task.apply(dwi, "cpu")
    truth = tissue("09A").argmax(1) + 1
    assert (derived.maps["segmentation"] == truth).mean() > 0.8
    total = sum(derived.maps[k] for k in ("gm", "wm", "csf"))
    np.testing.assert_allclose(total, 1, atol=1e-4)
    dark = dwi.signal.copy()
    dark[0] = 0
    without = task.apply(replace(dwi, signal=dark), "cpu")
    np.testing.assert_array_equal(without.valid, np.arange(len(dark)) > 0)
    assert not any(values[0] for values in without.maps.values())
    reordered = replace(dwi, signal=dwi.signal[:, ::-1].copy(),
                        acquisition=dwi.acquisition[np.arange(len(dwi.acquisition))[::-1]])
    np.testing.assert_allclose(task.apply(reordered, "cpu").maps["gm"], derived.maps["gm"],
                               atol=1e-3)


@pytest.mark.parametrize("name", ["estimate_crossings", "estimate_direction"])
@pytest.mark.parametrize("t1w", [True, False])
def test_fibres_are_learned_with_and_without_a_t1w_image(name, t1w):
    people, settings = cohort(tissue=tissue if t1w else None)
    task = method_with(name)
    labelled = task._read(people, "cpu", "01A")
    white = tissue("01A").argmax(1) == 1
    if name == "estimate_crossings":  # grey matter and CSF have no fibre, and are learned
        assert labelled.valid.all()
        np.testing.assert_array_equal(labelled.target[:, 0] == 1, ~white)
        np.testing.assert_array_equal(labelled.target.sum(1), 1)
    else:
        np.testing.assert_array_equal(labelled.valid, white)
    (trained,) = task.fit(people, settings).checkpoints.values()
    assert trained.card.training["runs"] == 3


def test_a_direction_that_is_learned_returns_to_the_world():
    """Grid axes that are not those of the world: targets are turned to them, results back."""
    angle = np.radians(30)
    turn = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0],
                     [0, 0, 1]])

    def load(run):
        dwi = travelling_heads.head(run[:2], "A")
        affine = dwi.affine.copy()
        affine[:3, :3] = turn @ affine[:3, :3]
        return replace(dwi, affine=affine, acquisition=replace(
            dwi.acquisition, bvecs=dwi.acquisition.bvecs @ turn.T))

    people, _ = cohort(load=load)
    task = method_with("estimate_direction")
    labelled = task._read(people, "cpu", "01A")
    grid = Grid.over(labelled.dwi)
    axes = task.derive(labelled.target, grid).maps["direction"][labelled.valid]
    plain = label_fibres(labelled.dwi, tissue("01A").argmax(1) == 1).axis[labelled.valid]
    assert np.abs((axes * plain).sum(1)).min() > 0.999
    assert np.abs(grid.rotation - np.eye(3)).max() > 0.4


def test_the_network_of_the_runs_table_goes_before_one_of_any_table(tmp_path):
    people, settings = cohort()
    keep(method_with("estimate_tissue").fit(people, settings), tmp_path)
    keep(method_with("estimate_tissue", "input=table").fit(people, settings), tmp_path)
    task = methods.get("estimate_tissue", context=kinds.MethodContext(models=tmp_path))
    assert not task.select(people.acquisitions["01A"]).card.network["any_table"]


def test_what_the_start_determines_is_not_to_be_set(tmp_path):
    people, settings = cohort()
    folder = keep(method_with("pretrain_artifacts", "input=table").fit(people, settings), tmp_path)
    for text in ("network.width=4", "input=any", "voxel=3"):
        with pytest.raises(UsageError, match=f"{text.partition('=')[0]}: the network of --init"):
            method_with("estimate_tissue", text).fit(people, replace(settings, init=folder))


def test_a_training_of_another_loss_does_not_resume(tmp_path):
    people, settings = cohort()
    settings = replace(settings, states=tmp_path)
    for loss in ("cross-entropy", "l1"):
        method_with("estimate_tissue", f"loss={loss}").fit(people, settings)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2


def test_the_domain_is_that_of_the_runs_that_were_learned_from():
    people, settings = cohort(tissue=lambda run: None if run == "02A" else tissue(run))
    people.statistics.loc[people.statistics["run"] == "02A", "snr_b0"] = 5.0
    (trained,) = method_with("estimate_tissue").fit(people, settings).checkpoints.values()
    assert trained.card.trained_for.snr == (30.0, 30.0)


def test_shells_outside_of_the_domain_have_no_part(tmp_path):
    """And the run is resampled to the voxels of the network."""
    saved = untrained_volumes.checkpoint("estimate_tissue", voxel=8.0)
    folder = keep(kinds.Fitted({}, {}, {"estimate_tissue_any": saved}), tmp_path)
    method = methods.get("estimate_tissue", context=kinds.MethodContext(models=folder.parent))
    rng = np.random.default_rng(0)
    dwi = ellipsoid.dwi_on(np.diag([3.0, 3, 3, 1]), (24, 26, 20), ((0, 2), (1000, 20), (5000, 20)))
    dwi = ellipsoid.with_signal(dwi, rng.uniform(0.2, 0.8, dwi.signal.shape))
    derived = method.apply(dwi, "cpu")
    assert derived.parameters["ShellsLeftOut"] == [5000]
    assert any("learned from none (1 runs, 1 steps)" in notice for notice in derived.notices)
    assert any("resampled to 8 mm" in notice for notice in derived.notices)
    other = dwi.signal.copy()
    other[:, 22:] = rng.uniform(0, 1, (len(other), 20))
    np.testing.assert_array_equal(
        method.apply(replace(dwi, signal=other), "cpu").maps["gm"], derived.maps["gm"])
    # values between grid points of 8 mm are interpolated: neighbours of 3 mm hardly differ
    volume = dwi.unmask(derived.maps["gm"])
    inside = dwi.mask[1:] & dwi.mask[:-1]
    step = np.abs(np.diff(volume, axis=0))[inside].mean()
    own = replace(saved, card=replace(saved.card, constants={
        "channels": {"voxel": 3.0, "directions": [], "b": 0.0}}))
    fine = keep(kinds.Fitted({}, {}, {"estimate_tissue_fine": own}), tmp_path / "fine")
    method = methods.get("estimate_tissue", context=kinds.MethodContext(models=fine.parent))
    volume = dwi.unmask(method.apply(dwi, "cpu").maps["gm"])
    assert step < 0.7 * np.abs(np.diff(volume, axis=0))[inside].mean()


def test_a_training_goes_on_where_it_stopped(tmp_path):
    people, settings = cohort()
    task = method_with("estimate_tissue", "network.width=4")

    def weights(**more):
        (trained,) = task.fit(people, replace(settings, **more)).checkpoints.values()
        return trained.tensors

    weights(max_steps=2, states=tmp_path)
    resumed, straight = weights(max_steps=4, states=tmp_path), weights(max_steps=4)
    for name in straight:
        assert torch.equal(resumed[name], straight[name])


def test_runs_without_labels_are_left_out_or_refused(caplog):
    people, settings = cohort(tissue=lambda run: None if run == "02A" else tissue(run))
    task = method_with("estimate_tissue")
    (trained,) = task.fit(people, settings).checkpoints.values()
    assert "02A is left out: it has no T1w image" in caplog.text
    assert trained.card.training["runs"] == 2
    alone, settings = cohort(tissue=lambda run: None)
    with pytest.raises(UsageError, match="0 participant"):
        task.fit(alone, settings)


def test_the_site_of_the_table_must_exist():
    people, settings = cohort(reference_batch="nowhere")
    with pytest.raises(UsageError, match="nowhere: no run is of that site; there are A"):
        method_with("pretrain_artifacts").fit(people, settings)


def test_init_of_another_network_is_refused(tmp_path):
    bundled = methods.get("estimate_scnn2").weights[-1]
    fitted = kinds.Fitted({}, {}, {"estimate_scnn2": bundled})
    folder = keep(fitted, tmp_path)
    with pytest.raises(UsageError, match=re.escape("has no encoder of volumes")):
        learn.load_start(folder)
    with pytest.raises(UsageError, match="--init"):
        learn.load_start(tmp_path / "nowhere")
