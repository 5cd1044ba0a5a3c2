"""The plan of a run: what is done again, what is left alone, what is removed."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from bidsapp import checkpoint, cli, methods
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from bidsapp.recipe import harmonize
from bidsapp.recipe.execute import Execution
from bidsapp.recipe.plan import choose, plan
from bidsapp.recipe.steps import RunContext, StepReport, load_run, outputs, reload_signal
from bidsapp.stage import Stage
from support import bids_tree as truth
from support.app import content, qsphere
from support.two_scanners import LABELS, ROWS, simulate_other_scanner


def times(out, pattern):
    """When each file of one person was written, in ns."""
    return {p.name: p.stat().st_mtime_ns for p in out.glob(f"sub-02/dwi/{pattern}")}


def columns(out):
    return (out / "sub-02/dwi/sub-02_desc-image_qc.tsv").read_text().split("\n")[0].split("\t")


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(bids, out) of two scanners: tensors of all, a model of the second, and one of its people
    harmonized."""
    folder = tmp_path_factory.mktemp("recipe")
    bids = truth.write_dataset(folder / "bids", LABELS, rows=ROWS)
    for label in LABELS[1::2]:
        simulate_other_scanner(bids, label)
    out = folder / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    assert qsphere(bids, out, "group", "--train", "mica", "--reference-batch", "A") == 0
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--harmonize", "mica",
                   "--participant-label", "02") == 0
    return bids, out


@pytest.fixture
def fresh(study, tmp_path):
    bids, out = study
    shutil.copytree(out, tmp_path / "out")
    return bids, tmp_path / "out"


def run(fresh, *more):
    bids, out = fresh
    return qsphere(bids, out, "participant", "--participant-label", "02", *more)


def test_an_estimate_that_is_added_is_done_alone(fresh, capsys):
    """Maps of both signals, with the harmonized one read back: the same bytes as all at once."""
    bids, out = fresh
    before = times(out, "*")
    capsys.readouterr()
    assert run(fresh, "--harmonize", "mica", "--estimate", "dti", "smt") == 0
    log = capsys.readouterr().err
    assert "estimate_smt on" in log and "harmonized_estimate_smt on" in log
    assert "estimate_dti on" not in log and "Harmonized from" not in log
    after = times(out, "*")
    assert {n: after[n] for n in before if "qc" not in n} == {
        n: before[n] for n in before if "qc" not in n}
    assert any("model-smt" in n and "desc-harmonized" in n for n in after)

    once = out.parent / "once"
    shutil.copytree(out / "group", once / "group")
    shutil.copy(out / "dataset_description.json", once)
    assert qsphere(bids, once, "participant", "--participant-label", "02", "--harmonize", "mica",
                   "--estimate", "dti", "smt") == 0
    ours, theirs = content(out / "sub-02"), content(once / "sub-02")
    assert ours.keys() == theirs.keys()
    assert [n for n in ours if ours[n] != theirs[n]] == []


def test_what_is_not_asked_for_again_stays(fresh):
    """A later command without --harmonize and dti leaves their files and their rows."""
    _, out = fresh
    before = times(out, "*")
    assert run(fresh, "--estimate", "smt") == 0
    after = times(out, "*")
    assert {n for n in before if "qc" not in n} <= after.keys()
    assert all(after[n] == t for n, t in before.items() if "qc" not in n)
    assert {"dti_fa_mean", "harmonized_dti_fa_mean"} <= set(columns(out))
    assert any(c.startswith("smt_") for c in columns(out))
    assert "harmonized" in (out / "sub-02.html").read_text()


def test_what_was_made_of_a_signal_that_changed_is_removed(study, tmp_path, capsys):
    bids = tmp_path / "bids"
    shutil.copytree(study[0], bids)
    shutil.copytree(study[1], tmp_path / "out")
    truth.write_run(bids / "sub-02/dwi/sub-02", seed=99)
    assert run((bids, tmp_path / "out"), "--estimate", "smt") == 0
    assert not times(tmp_path / "out", "*model-tensor*")
    assert not times(tmp_path / "out", "*desc-harmonized*")
    assert times(tmp_path / "out", "*model-smt*")
    assert "since what it was made from has changed" in capsys.readouterr().err
    assert not {c for c in columns(tmp_path / "out") if "dti" in c or "harmoni" in c}


def test_another_harmonizer_leaves_the_measured_maps_alone(fresh, capsys):
    """The model trained again, of other people: its signal and the maps of that alone are new."""
    bids, out = fresh
    card = out / "group/models/harmonize_mica_toA/model.json"
    earlier = json.loads(card.read_text())
    assert qsphere(bids, out, "group", "--train", "mica", "--reference-batch", "A",
                   "--participant-label", *LABELS[:4]) == 0
    assert json.loads(card.read_text()) != earlier
    measured = {n: t for n, t in times(out, "*model-tensor*").items() if "harmonized" not in n}
    harmonized = times(out, "*desc-harmonized*")
    capsys.readouterr()
    assert run(fresh, "--harmonize", "mica", "--estimate", "dti") == 0
    log = capsys.readouterr().err
    assert "harmonized_estimate_dti on" in log and ": estimate_dti on" not in log
    later = times(out, "*model-tensor*")
    assert all(later[n] == t for n, t in measured.items()) and measured
    assert all(t != harmonized[n] for n, t in times(out, "*desc-harmonized*").items())


def test_an_interrupted_run_is_known_as_one(fresh, monkeypatch):
    """Between two steps the run's record must not say that all is there."""
    _, out = fresh
    record = out / "sub-02/log/sub-02_dwi.json"

    def interrupted(*_):
        assert json.loads(record.read_text())["state"] == "incomplete"
        raise KeyboardInterrupt

    monkeypatch.setattr("bidsapp.recipe.steps.Estimate.apply", interrupted)
    assert run(fresh, "--estimate", "smt") == 130
    monkeypatch.undo()
    assert json.loads(record.read_text())["state"] == "incomplete"
    assert run(fresh, "--estimate", "smt") == 0
    assert json.loads(record.read_text())["state"] == "complete"


def test_fingerprints_follow_what_a_step_takes(study):
    """A step's fingerprint changes with its own parameters and with those of the steps before."""
    bids, out = study

    def fingerprints(*more, models=(), **covariates):
        options = cli.parse([str(bids), str(out), "participant", "--preprocess", "none",
                             "--estimate", "dti", "scnn2", *more])
        (run,) = find.find_runs(options).runs["02"]
        run = replace(run, covariates={**run.covariates, **covariates})
        context = RunContext(options, Dataset(out, {"raw": bids}), run, "cpu", np.inf)
        return {s.name: s.fingerprint for s in plan(
            context, replace(choose(options), models=models))}

    model = checkpoint.load(out / "group/models/harmonize_mica_toA")
    models = [harmonize.Model("x", methods.get("harmonize_mica"), model)]
    plain, with_model = fingerprints(), fingerprints(models=models)
    assert list(with_model) == ["measured", "harmonized", "estimate_dti",
                                "harmonized_estimate_dti", "estimate_scnn2",
                                "harmonized_estimate_scnn2"]
    assert plain == {n: with_model[n] for n in ("measured", "estimate_dti", "estimate_scnn2")}
    seeded = fingerprints("--random-seed", "1", models=models)
    assert seeded["measured"] == plain["measured"]
    assert seeded["estimate_dti"] != plain["estimate_dti"]
    other = fingerprints("--allow-extrapolation", models=models)
    assert other["estimate_dti"] == plain["estimate_dti"]
    assert other["estimate_scnn2"] != plain["estimate_scnn2"]
    assert other["harmonized"] != with_model["harmonized"]
    older = fingerprints(models=models, age=99)
    assert older["harmonized"] != with_model["harmonized"]
    assert older["measured"] == with_model["measured"]
    assert other["harmonized_estimate_dti"] != with_model["harmonized_estimate_dti"]


def test_weights_trained_for_an_acquisition_are_in_the_fingerprint(study, tmp_path):
    before = estimate(study[0], tmp_path, "scnn2").fingerprint
    card = tmp_path / "group/models/estimate_scnn2_b1000n12/model.json"
    card.parent.mkdir(parents=True)
    card.write_text("{}")
    assert estimate(study[0], tmp_path, "scnn2").fingerprint != before


def test_intervals_are_widened_by_the_error_of_the_steps_before(study, tmp_path, monkeypatch):
    step, derived = estimate(study[0], tmp_path, "dti"), []
    monkeypatch.setattr("bidsapp.recipe.steps.outputs", lambda *_: SimpleNamespace(
        write=lambda _, made: derived.append(made)))
    dwi = load_run(step.context.run)[0]
    for factor in (1.0, 1.5):
        step.apply(Stage(dwi, widening=factor), None, StepReport())
    before, after = (made.maps["md_std"] for made in derived)
    assert (before > 0).mean() > 0.99
    np.testing.assert_allclose(after, 1.5 * before, rtol=1e-5)


def test_a_corrected_table_stays_in_the_sidecars_of_harmonized_images(study, monkeypatch):
    """GradientTableCorrection is written by the first step; the harmonizer adds its own keys."""
    bids, out = study
    options = cli.parse([str(bids), str(out), "participant", "--preprocess", "none",
                         "--harmonize", "mica"])
    (run,) = find.find_runs(options).runs["02"]
    context = RunContext(options, Dataset(out, {"raw": bids}), run, "cpu", np.inf)
    step = next(s for s in plan(context, choose(options)) if s.name == "harmonized")
    stages = []
    monkeypatch.setattr("bidsapp.recipe.signals.outputs", lambda *args: SimpleNamespace(
        write_signal=lambda *_: stages.append(args[2])))
    report = StepReport()
    stage = Stage(load_run(run)[0], about={"GradientTableCorrection": "x flipped"})
    step.apply(stage, None, report)
    assert not any("denoised" in warning for warning in report.warnings)
    step.apply(replace(stage, desc="denoised"), None, denoised := StepReport())
    assert any("learned from signals that were not denoised" in w for w in denoised.warnings)
    assert stages[0].about["GradientTableCorrection"] == "x flipped"
    assert "HarmonizationModel" in stages[0].about and report.facts["about"] == stages[0].about


def estimate(bids, out, name):
    """The last step of a plan for sub-02."""
    options = cli.parse([str(bids), str(out), "participant", "--estimate", name])
    (run,) = find.find_runs(options).runs["02"]
    context = RunContext(options, Dataset(out, {"raw": bids}), run, "cpu", np.inf)
    return plan(context, choose(options))[-1]


def test_a_refusal_reaches_all_later_steps():
    """Also those of which a step stands between, whose record is then gone."""
    first = SimpleNamespace(record="first", needs=[])
    refused = SimpleNamespace(record="refused", needs=[first])
    second = SimpleNamespace(record="second", needs=[refused])
    last = SimpleNamespace(record="last", needs=[first, second])
    records = {"refused": {"refusal": "the run lies outside of the training"}}
    dataset = SimpleNamespace(record=lambda path: records.get(path, {}))
    execution = Execution(SimpleNamespace(dataset=dataset), [])
    assert [execution._lacks_signal(s) for s in (first, refused, second, last)] == [
        False, False, True, True]


def test_a_signal_is_read_back_with_its_own_directions(study, tmp_path):
    """As many measurements along others are not taken for those before; the same, written as text,
    are again those before, to the bit."""
    context = estimate(study[0], tmp_path, "dti").context
    dwi = load_run(context.run)[0]
    with context.dataset.transaction(context.path("step", ".json", "log", desc="x")) as transaction:
        transaction.image(context.mask, dwi.mask.astype(np.uint8), context.like, {})
    facts = {"about": {}, "no_intervals": "", "widening": 1.0, "noise_gain": None}
    for rotation in (np.eye(3), np.eye(3)[[1, 2, 0]]):
        table = dwi.acquisition.rotated(rotation)
        stage = Stage(replace(dwi, acquisition=table), desc="toy")
        with context.dataset.transaction(
                context.path("step", ".json", "log", desc="toy")) as transaction:
            outputs(context, transaction, stage).write_signal(
                methods.get("harmonize_mica"), {"Description": "", "Units": ""}, {})
        again = reload_signal(context, Stage(dwi), "toy", facts).dwi.acquisition
        np.testing.assert_allclose(again.bvecs, table.bvecs, atol=1e-5)
        assert (again is dwi.acquisition) == (rotation == np.eye(3)).all()
