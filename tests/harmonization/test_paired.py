"""Harmonizers that learn from pairs, on heads whose site effect is known.

These are the heads of `support.travelling_heads`.
"""

import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from bidsapp import cli, methods, run, sh, tensor, training
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import pack
from bidsapp.domain import ShellRange
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.harmonization import intensity, paired, pairs, patches
from bidsapp.kinds import Harmonized
from bidsapp.recipe import harmonize
from support import synthetic_head
from support.travelling_heads import (
    AFFINE,
    AXES,
    BVALS,
    NOISE,
    PEOPLE,
    head,
    load_head,
    sloppy_method,
    study,
)

METHODS = ("harmonize_shresnet", "harmonize_golkov", "harmonize_hybrid")


@cache
def fit(name):
    method = sloppy_method(name)
    return method, method.fit(*study())


@pytest.fixture(params=[name if name == "harmonize_golkov" else
                        pytest.param(name, marks=pytest.mark.slow) for name in METHODS])
def trained(request):
    return fit(request.param)


@pytest.fixture
def shresnet():
    return fit("harmonize_shresnet")


@pytest.mark.slow
def test_learns_the_factors_of_the_orders(shresnet):
    """The error of held-out participants falls to less than a third. The rest is noise, whose share
    in 'before' is known, and what a hundred steps do not learn."""
    _, fitted = shresnet
    (checkpoint,) = fitted.checkpoints.values()
    m = checkpoint.card.metrics
    for name in ("gm", "wm"):
        before, after = m[f"mse_before_{name}_b1000"], m[f"mse_after_{name}_b1000"]
        assert after - NOISE**2 < (before - NOISE**2) / 3, m


@pytest.mark.slow
def test_harmonizes_who_it_has_not_seen(shresnet):
    """Against the noise-free signal of the reference: less than half the error, everywhere."""
    method, fitted = shresnet
    (checkpoint,) = fitted.checkpoints.values()
    dwi, truth = head("07", "B"), head("07", "A", noise=0)
    before = dwi.signal.copy()
    found = method.harmonize(dwi, checkpoint, "B", "cpu")
    np.testing.assert_array_equal(dwi.signal, before)
    weighted = ~dwi.acquisition.b0
    np.testing.assert_array_equal(found.signal[:, ~weighted], before[:, ~weighted])
    error = [np.square(s[:, weighted] / s[:, ~weighted].mean(1, keepdims=True)
                       - truth.signal[:, weighted] / 800).mean() for s in (before, found.signal)]
    assert error[1] < error[0] / 2, error
    assert found.counts == {"shresnet_unchanged": 0, "shresnet_clipped_values": 0}


@pytest.mark.slow
def test_hybrid_brings_fa_and_md_near():
    """In white matter of participants it did not learn from, against the noise-free reference.
    Noise stays, since the change is added to the signal."""
    method, fitted = fit("harmonize_hybrid")
    (checkpoint,) = fitted.checkpoints.values()
    dwi, truth = head("07", "B"), head("07", "A", noise=0)
    found = method.harmonize(dwi, checkpoint, "B", "cpu")
    x = tensor.design(dwi.acquisition.btensors)
    before, after, right = (tensor.fit(torch.from_numpy(s.copy()), x) for s in (
        dwi.signal, found.signal, truth.signal))
    white = synthetic_head.tissues()[::2, ::2, ::2][dwi.mask] >= 3
    for name in ("fa", "md"):
        error = [(m[name] - right[name])[white].abs().mean() for m in (before, after)]
        assert error[1] < error[0] / 2, (name, error)
    assert found.counts == {"hybrid_unchanged": 0, "hybrid_clipped_values": 0}


@pytest.mark.slow
def test_hybrid_learns_nothing_where_there_is_nothing():
    """Between sites that differ by noise alone FA stays; the smoothing of the series, which lowers
    it, is no difference of scanners."""
    method = sloppy_method("harmonize_hybrid")
    (checkpoint,) = method.fit(*study(sites="AC")).checkpoints.values()
    dwi = head("07", "C")
    found = method.harmonize(dwi, checkpoint, "C", "cpu")
    x = tensor.design(dwi.acquisition.btensors)
    white = synthetic_head.tissues()[::2, ::2, ::2][dwi.mask] >= 3
    before, after = (tensor.fit(torch.from_numpy(s.copy()), x)["fa"][white].mean()
                     for s in (dwi.signal, found.signal))
    assert float(after / before) == pytest.approx(1, abs=0.01)


@pytest.mark.slow
def test_keeps_directions(shresnet):
    """The principal axis of degree 2 is that of the input, to float32, in every voxel with one."""
    method, fitted = shresnet
    (checkpoint,) = fitted.checkpoints.values()
    dwi = head("07", "B")
    found = method.harmonize(dwi, checkpoint, "B", "cpu").signal
    fit = np.linalg.pinv(sh.basis(4, AXES[3:]))
    points, weights = sh.quadrature(8)
    second = sh.basis(4, points) * (sh.degrees(4) == 2)

    def axes(signal):
        c = (signal[:, 3:] / signal[:, :3].mean(1, keepdims=True)) @ fit.T
        moment = np.einsum("pi,vp,pj->vij", points, (c @ second.T) * weights, points)
        values, vectors = np.linalg.eigh(moment)
        return values, vectors[:, :, 0]

    (values, own), (_, new) = axes(dwi.signal), axes(found)
    clear = values[:, 1] - values[:, 0] > 0.05
    assert clear.sum() > 200
    assert np.abs((own * new).sum(1))[clear].min() > np.cos(np.deg2rad(0.1))


def test_leaves_a_card_and_one_checkpoint_per_batch(trained):
    method, fitted = trained
    assert list(fitted.checkpoints) == [f"{method.name}_B-to-A"]
    card = fitted.checkpoints[f"{method.name}_B-to-A"].card
    assert (card.reference_batch, card.batches) == ("A", ("B",))
    assert card.trained_for.shells == (ShellRange((1000.0, 1000.0), 1.0, (30, 30)),)
    told = card.training["participants"]
    assert told["A"] == told["B"] and len(told["A"]) == 3 and "01" not in told["A"]
    assert card.training["held_out"] == 1
    assert all(np.isfinite(v) for v in card.metrics.values())
    pack(fitted.checkpoints[f"{method.name}_B-to-A"])  # the card is plain JSON


@pytest.mark.slow
def test_who_validates_teaches_nothing(monkeypatch):
    """Neither networks nor quantiles have seen them. Pairs stand in the order of PEOPLE."""
    method = sloppy_method("harmonize_hybrid")
    original, seen = method._train, []

    def train(study, name, recipe, own, mine, others, *more):
        seen.append([set(own.pair[voxels].tolist()) for voxels in (mine[pairs.BOTH], others)])
        return original(study, name, recipe, own, mine, others, *more)

    monkeypatch.setattr(method, "_train", train)
    (model,) = method.fit(*study(max_steps=1)).checkpoints.values()
    (learned, held), = seen
    assert len(held) == 1 and not learned & held and learned | held == {0, 1, 2}
    quantiles = [np.mean([intensity.quantiles(head(PEOPLE[i], site)) for i in sorted(learned)], 0)
                 for site in "BA"]
    np.testing.assert_allclose(model.tensors["quantiles"], quantiles, rtol=1e-5)
    assert model.card.constants["output"] == "change"


@pytest.mark.slow
def test_several_batches_in_one_command():
    method = sloppy_method("harmonize_golkov")
    fitted = method.fit(*study(PEOPLE[:2], "ABC", max_steps=2))
    assert sorted(fitted.checkpoints) == ["harmonize_golkov_B-to-A", "harmonize_golkov_C-to-A"]


@pytest.mark.slow
def test_a_new_batch_leaves_the_models_of_others_alone(tmp_path):
    """A network is not trained again on the same scans, but on other scans, seeds or steps."""
    method = sloppy_method("harmonize_golkov")
    first = method.fit(*study(PEOPLE[:2], max_steps=2))
    method = sloppy_method("harmonize_golkov", models=tmp_path)
    (name, made), = first.checkpoints.items()
    (tmp_path / name).mkdir()
    for file, content in pack(made).items():
        (tmp_path / name / file).write_bytes(content)
    read = []

    def load(run):
        read.append(run[2])
        return head(run[:2], run[2])

    both = method.fit(*study(PEOPLE[:2], "ABC", max_steps=2, load=load)).checkpoints
    assert len(both) == 2 and set(read) == {"A", "C"}
    assert all(torch.equal(both[name].tensors[k], v) for k, v in made.tensors.items())
    for more in ({"max_steps": 3}, {"people": PEOPLE}):
        read.clear()
        method.fit(*study(**{"people": PEOPLE[:2], "max_steps": 2, "load": load, **more}))
        assert "B" in read, more


def test_refuses_what_it_cannot_harmonize(trained):
    method, fitted = trained
    (checkpoint,) = fitted.checkpoints.values()
    few = Acquisition(BVALS[:15], AXES[:15])
    dwi = head("01", "B")
    with pytest.raises(Refusal, match=r"12 × b 1000.* 15 or more directions"):
        method.harmonize(Dwi(dwi.signal[:, :15], dwi.mask, AFFINE, few), checkpoint, "B", "cpu")
    with pytest.raises(Refusal, match="Needed are a b0"):
        method.check(Acquisition(BVALS[3:], AXES[3:]))
    with pytest.raises(Refusal, match="linear encoding"):
        method.check(Acquisition(BVALS, AXES, np.where(BVALS > 0, 0.0, 1.0)))


@pytest.mark.slow
def test_patches_at_the_edge_hold_the_nearest_voxels(shresnet, monkeypatch):
    """As in training, and no zeros: the mean over directions is above 0 in the margin, too."""
    method, fitted = shresnet
    (checkpoint,) = fitted.checkpoints.values()
    images, function = [], paired.apply_to_volume

    def watched(network, image, *more):
        images.append(image)
        return function(network, image, *more)

    monkeypatch.setattr(paired, "apply_to_volume", watched)
    method.harmonize(head("01", "B"), checkpoint, "B", "cpu")
    assert images and all((image[..., 0] > 0).all() for image in images)


def test_voxels_without_b0_stay_as_they_are(trained):
    method, fitted = trained
    (checkpoint,) = fitted.checkpoints.values()
    dwi = head("01", "B")
    signal = dwi.signal.copy()
    signal[5, :3] = 0
    found = method.harmonize(Dwi(signal, dwi.mask, AFFINE, dwi.acquisition), checkpoint, "B", "cpu")
    np.testing.assert_array_equal(found.signal[5], signal[5])
    assert found.counts[f"{method.short}_unchanged"] == 1
    assert np.isfinite(found.signal).all()


@pytest.mark.slow
def test_an_interrupted_training_may_be_asked_for_fewer_steps(tmp_path, monkeypatch, caplog):
    """Also for fewer than an epoch has. Registrations, resuming and steps are told."""
    method = sloppy_method("harmonize_golkov")
    train = training.train

    def cut(*arguments, **options):
        train(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, caplog.at_level("INFO", "qsphere"):
        patch.setattr(training, "train", cut)
        with pytest.raises(KeyboardInterrupt):
            method.fit(*study(PEOPLE[:2], max_steps=12, states=tmp_path))
    assert "harmonize_golkov: registering 2 of 2" in caplog.text
    assert re.search(r"b1000\.\w+, stage 1 of \d: training for 12 steps", caplog.text)
    for steps, done, told in ((15, 15, "resumed at step 12 of 15"), (3, 15, "holds 15 steps, 3")):
        caplog.clear()
        with caplog.at_level("INFO", "qsphere"):
            fitted = method.fit(*study(PEOPLE[:2], max_steps=steps, states=tmp_path))
        assert told in caplog.text
        assert next(iter(fitted.checkpoints.values())).card.training["steps"][0][0] == done


@pytest.mark.slow
def test_an_interrupted_training_gives_the_same_weights(tmp_path, monkeypatch):
    """Cut off in the second stage, before it had saved anything, and once more after."""
    method = sloppy_method("harmonize_golkov")
    monkeypatch.setattr(method, "settings", lambda table: {
        **methods.get(method.name).settings(table, "sloppy"), "stages": [
            {"optimizer": "adam", "learning_rate": 1e-3, "batch": 64, "epochs": 2},
            {"optimizer": "sgd", "learning_rate": 1e-2, "batch": 32, "epochs": 3,
             "decay": "plateau", "factor": 0.9, "plateau": 1, "patience": 5}], "epoch": 320})
    whole = method.fit(*study(PEOPLE[:2], states=tmp_path / "whole"))
    blocks, seen = patches.PatchDataset.blocks, []

    def cut(*told):
        seen.append(1)
        if len(seen) in (3, 6):
            raise KeyboardInterrupt
        return blocks(*told)

    monkeypatch.setattr(patches.PatchDataset, "blocks", cut)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            method.fit(*study(PEOPLE[:2], states=tmp_path / "cut"))
    again = method.fit(*study(PEOPLE[:2], states=tmp_path / "cut"))
    (one,), (other,) = (f.checkpoints.values() for f in (whole, again))
    for name, weights in one.tensors.items():
        torch.testing.assert_close(other.tensors[name], weights, rtol=0, atol=0)
    assert other.card.metrics == one.card.metrics
    assert sorted(p.name[:29] + p.name[-7:] for p in (tmp_path / "cut").glob("*.ckpt")) == [
        f"harmonize_golkov_B-to-A.b1000.{k}.ckpt" for k in (1, 2)]


def load_with_a_broken_mask(run):
    """Load a scan; the mask of 02B has only five voxels left."""
    dwi = load_head(run)
    if run != "02B":
        return dwi
    rows = np.arange(100, 105)
    mask = np.zeros_like(dwi.mask)
    mask[tuple(np.argwhere(dwi.mask)[rows].T)] = True
    return replace(dwi, signal=dwi.signal[rows], mask=mask)


def register_all(folder, workers, load=load_head, deformable=True):
    folder.mkdir()
    known, settings = study(PEOPLE[:2], load=load, states=folder, workers=workers)
    found = pairs.pair_runs(known.statistics, "A")["B"]
    patches.PairedScans(sloppy_method(), known, settings, found, [30], 4, deformable,
                        folder)
    return {p.name: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.slow
def test_pairs_that_are_registered_side_by_side_are_the_same(tmp_path, monkeypatch):
    alone = register_all(tmp_path / "1", 1)
    assert len([name for name in alone if name.startswith(pairs.PREFIX)]) == 2

    def registers(*_):
        raise AssertionError("the other processes were to register")

    monkeypatch.setattr(pairs, "_register", registers)
    assert register_all(tmp_path / "2", 2) == alone


@pytest.mark.slow
def test_a_pair_that_cannot_be_registered_is_told_alike(tmp_path):
    told = []
    for workers in (1, 2):
        with pytest.raises(UsageError, match="02B and 02A: the brain masks of these") as error:
            register_all(tmp_path / str(workers), workers, load_with_a_broken_mask, False)
        told.append(str(error.value))
    assert told[0] == told[1]


def test_loss_of_the_hybrid_is_in_units_of_what_there_is(tmp_path):
    """An unchanged signal has an error of 1, the unit in which errors are measured."""
    method, (known, settings) = sloppy_method("harmonize_hybrid"), study()
    found = pairs.pair_runs(known.statistics, "A")["B"][:1]
    own = patches.PairedScans(method, known, settings, found, [30], 4, False, tmp_path).samples[0]
    voxels = own.select({0})
    recipe = {"validation": 10**6, "loss": {"signal": 0.5, "fa": 2.0, "md": 1.0}}
    loss, batch = method.loss(own, voxels, recipe, "cpu"), own(voxels, "cpu")
    assert float(loss(batch.centre, batch).mean()) == pytest.approx(3.5, rel=1e-4)


@pytest.mark.slow
def test_errors_of_the_validation_are_those_of_their_formula(tmp_path):
    """Errors before the network, of those it did not learn from, equal those by numpy."""
    method, (known, settings) = sloppy_method(), study(max_steps=1)
    found = pairs.pair_runs(known.statistics, "A")["B"][:2]
    travellers = patches.PairedScans(method, known, settings, found, [30], 4, False, tmp_path)
    trained = method._train_shells(settings, "x", [ShellRange((1000.0, 1000.0), 1.0, (30, 30))],
                              method.settings("training"), travellers, ["01", "02"], None)
    (who,) = trained.held_out
    metrics = method._signal_metrics(trained, travellers, ["b1000"], "cpu")
    aligned = pairs.align(head(who, "B"), head(who, "A"), l_max=4, deformable=False)
    shown = aligned.image[0, 1:-1, 1:-1, 1:-1][aligned.overlap] @ sh.basis(4, AXES[3:]).T
    labels = aligned.labels[aligned.overlap]
    for name, value in tissue.NAMES.items():
        error = np.square(shown - aligned.target[:, 3:])[labels == value].mean()
        assert metrics[f"mse_before_{name}_b1000"] == pytest.approx(error, rel=1e-4)


@pytest.mark.slow
def test_fa_and_md_of_the_validation_are_those_of_the_signal(monkeypatch):
    """Before: against numpy; after, where the scan becomes the reference's: none, by pairs of
    people who validated alone."""
    method, tested = sloppy_method("harmonize_golkov"), []

    def becomes(dwi, *_):
        (who,) = [p for p in PEOPLE if np.array_equal(head(p, "B").signal, dwi.signal)]
        tested.append(who)
        return Harmonized(head(who, "A").signal, lambda other: other.signal,
                          no_intervals="a test")

    monkeypatch.setattr(method, "harmonize", becomes)
    (model,) = method.fit(*study(max_steps=1)).checkpoints.values()
    metrics, (who,) = model.card.metrics, tested
    design = tensor.design(Acquisition(BVALS, AXES).btensors[3:])[:, :6]
    maps = []
    for where in "BA":
        dwi = head(who, where)
        ratio = dwi.signal[:, 3:] / dwi.signal[:, :3].mean(1, keepdims=True)
        xx, xy, xz, yy, yz, zz = np.linalg.lstsq(design, np.log(ratio).T, rcond=None)[0]
        matrix = np.moveaxis(np.array([[xx, xy, xz], [xy, yy, yz], [xz, yz, zz]]), -1, 0)
        values = np.linalg.eigvalsh(matrix)
        md = values.mean(1)
        spread = np.sqrt(np.square(values - md[:, None]).sum(1))
        maps.append({"fa": np.sqrt(1.5) * spread / np.linalg.norm(values, axis=1), "md": md})
    registration = pairs.register(head(who, "B"), head(who, "A"), deformable=False)
    for name, label in tissue.NAMES.items():
        for key in ("fa", "md"):
            inside = (registration.labels == label)[head(who, "A").mask]
            away = (maps[0][key] - maps[1][key])[inside]
            told = {k: metrics[f"{k[0]}_{key}_{k[1]}_{name}_b1000"] for k in (
                ("mse", "before"), ("bias", "before"), ("mse", "after"))}
            assert told["mse", "before"] == pytest.approx(np.square(away).mean(), rel=0.05)
            assert told["bias", "before"] == pytest.approx(away.mean(), rel=0.05, abs=1e-3)
            assert told["mse", "after"] < 0.02 * told["mse", "before"]
    assert metrics["error_b1000"] < 0.002


@pytest.mark.slow
def test_processes_that_train_together_share_registrations(tmp_path, monkeypatch):
    """As torchrun tells the second of two: it does every other pair before it asks for all."""
    for name, value in (("TORCHELASTIC_RUN_ID", "x"), ("RANK", "1"), ("WORLD_SIZE", "2"),
                        ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    method, asked = sloppy_method("harmonize_golkov"), []
    original = method.register

    def register(study, pair, *how):
        asked.append(pair.participant)
        return original(study, pair, *how)

    monkeypatch.setattr(method, "register", register)
    (tmp_path / "own").mkdir()
    known, settings = study(states=tmp_path, devices=(2, 1))
    patches.PairedScans(method, known, settings, pairs.pair_runs(known.statistics, "A")["B"],
                       [30], 4, False, tmp_path / "own")
    assert asked == [*PEOPLE[1::2], *PEOPLE]


@pytest.mark.slow
def test_a_model_that_made_things_worse_says_so(monkeypatch, caplog):
    """When it is trained, and on the page of everyone to whom it is applied."""
    method, fitted = fit("harmonize_golkov")
    (good,) = fitted.checkpoints.values()
    dwi = head("01", "B")
    better = {k: 0.5 if "after" in k else 1.0 for k in good.card.metrics}
    good = replace(good, card=replace(good.card, metrics=better))
    assert method.harmonize(dwi, good, "B", "cpu").notices == ()
    method = sloppy_method("harmonize_golkov")
    monkeypatch.setattr(method, "_signal_metrics", lambda *_: {
        "mse_before_wm_b1000": 1.0, "mse_after_wm_b1000": 1.1,
        "mse_before_gm_b1000": 1.0, "mse_after_gm_b1000": 0.9})
    monkeypatch.setattr(method, "_map_metrics", lambda *_: {
        "mse_fa_before_gm_b1000": 1.0, "mse_fa_after_gm_b1000": 1.1,
        "mse_md_before_gm_b1000": 1.0, "mse_md_after_gm_b1000": 1.0})
    fitted = method.fit(*study(max_steps=2))
    (bad,), (told,) = fitted.checkpoints.values(), fitted.notices
    assert ("held out of the training rose (signal in white matter, b1000; FA in grey matter, "
            "b1000)") in told
    assert told in caplog.text
    (notice,) = method.harmonize(dwi, bad, "B", "cpu").notices
    assert "FA in grey matter, b1000) when harmonize_golkov was trained" in notice


@pytest.mark.slow
def test_epochs_of_the_command_line_win():
    """10 steps of 256 of the 2560 voxels of a brief epoch, ten times by its own settings."""
    settings = {"harmonize_golkov": {"training.stages.1.epochs": 1}}
    method = sloppy_method("harmonize_golkov", settings=settings)
    (model,) = method.fit(*study()).checkpoints.values()
    assert model.card.training["steps"] == [[10]]
    assert fit("harmonize_golkov")[1].checkpoints.popitem()[1].card.training["steps"] == [[100]]


@pytest.mark.slow
def test_a_degree_of_the_command_line_reaches_network_card_and_use(tmp_path):
    """Trained with degree 2, for which 12 directions suffice; an odd degree is refused."""
    few = np.r_[:15]
    cohort, settings = study(PEOPLE[:2], max_steps=2, load=lambda run: thinned(
        head(run[:2], run[2]), few))
    cohort = replace(cohort, acquisitions=dict.fromkeys(
        cohort.acquisitions, Acquisition(BVALS, AXES)[few]))
    with pytest.raises(UsageError, match="15 or more directions"):
        sloppy_method("harmonize_golkov").fit(cohort, settings)
    degree = {"training.l_max": 2}
    method = sloppy_method("harmonize_golkov", settings={"harmonize_golkov": degree})
    ((name, model),) = run.fit(method, cohort, settings).checkpoints.items()
    assert model.card.training["settings"] == degree and model.card.network["l_max"] == 2
    (tmp_path / name).mkdir()
    for file, content in pack(model).items():
        (tmp_path / name / file).write_bytes(content)
    (found,) = harmonize.load_models(cli.parse(
        ["/in", "/out", "participant", "--harmonize", str(tmp_path / name)]))
    scan = thinned(head("07", "B"), few)
    assert np.isfinite(found.method.harmonize(scan, found.checkpoint, "B", "cpu").signal).all()
    odd = sloppy_method("harmonize_golkov", settings={"harmonize_golkov": {"training.l_max": 3}})
    with pytest.raises(UsageError, match="an even degree is needed"):
        odd.fit(*study())


def thinned(dwi, volumes):
    return replace(dwi, signal=dwi.signal[:, volumes], acquisition=dwi.acquisition[volumes])


@pytest.mark.slow
def test_epochs_do_not_make_another_training(tmp_path):
    """The state of an interrupted training serves for more epochs, not for another network."""
    def states(**changed):
        method = sloppy_method("harmonize_golkov", settings={"harmonize_golkov": {
            f"training.{k.replace('_', '.')}": v for k, v in changed.items()}})
        folder = tmp_path / repr(changed)
        method.fit(*study(PEOPLE[:2], max_steps=2, states=folder))
        return {p.name for p in folder.glob("*.ckpt")}

    assert states() == states(stages_1_epochs=3)
    assert not states() & states(network_hidden=8)


@pytest.mark.slow
def test_blocks_of_the_command_line_win():
    """Another number is another training."""
    cohort, settings = study(max_steps=2)
    method, other = (sloppy_method(settings={"harmonize_shresnet": {"training.network.blocks": n}})
                     for n in (3, 1))
    (model,) = method.fit(cohort, settings).checkpoints.values()
    assert model.card.network["blocks"] == 3
    assert len({m._digest(settings, [], cohort.statistics)
                for m in (method, other, sloppy_method())}) == 3
    assert np.isfinite(method.harmonize(head("01", "B"), model, "B", "cpu").signal).all()


def broken(run):
    dwi = head(run[:2], run[2])
    if run != "02B":
        return dwi
    signal = dwi.signal.copy()
    signal[:, 7] = np.nan
    return Dwi(signal, dwi.mask, AFFINE, dwi.acquisition)


OTHER = Acquisition(2 * BVALS, AXES)
BAD = [
    ({"people": ("01",)}, "at least 2 participants at every site"),
    ({"sites": "A"}, "at least two sites"),
    ({"reference_batch": None}, "--reference-batch"),
    ({"reference_batch": "a"}, "no such site; found A: 3, B: 3"),
    ({"acquisitions": {"02B": OTHER}}, "shells differ. 02B of B has 30 × b 2000"),
    ({"load": broken}, r"values of 02B are NaN or infinite \(3\.0%"),
]


@pytest.mark.parametrize("options,message", BAD, ids=[m[:20] for _, m in BAD])
def test_studies_that_cannot_carry_it_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        sloppy_method().fit(*study(**options))


@pytest.mark.parametrize("shared,message", [([], "nobody was scanned at B and at A"),
                                            (["02"], "only sub-02 was scanned at B and at A")])
def test_batches_without_pairs_are_refused(shared, message):
    whole, settings = study(("01", "02", "03", "04"))
    table = whole.statistics
    kept = table[((table["batch"] == "A") & table["participant"].isin(["01", "02"]))
                 | ((table["batch"] == "B") & table["participant"].isin(["03", "04", *shared]))]
    with pytest.raises(UsageError, match=f"{message}.*harmonize_mica"):
        sloppy_method().fit(replace(whole, statistics=kept), settings)
