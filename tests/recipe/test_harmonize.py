"""Harmonizers on their way: trained across sites, applied to people, refused where they must be."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from bidsapp import checkpoint, methods
from bidsapp.acquisition import Acquisition
from bidsapp.domain import ShellRange, TrainingDomain
from bidsapp.dwi import FIXED_MEMORY, Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.evaluate.change import compare_signals
from bidsapp.harmonization import harmonizer
from bidsapp.kinds import Cohort, TrainingSettings
from bidsapp.recipe import harmonize
from bidsapp.recipe.steps import load_measured
from support import bids_tree as truth
from support.app import content, image, qsphere, validate
from support.two_scanners import LABELS, ROWS, simulate_other_scanner

MODEL = "harmonize_mica_toA"
GRID = (np.arange(1000) + 0.5) / 1000


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(bids, out) of six people of two scanners, processed, and a model that maps B to A."""
    folder = tmp_path_factory.mktemp("harmonize")
    bids = truth.write_dataset(folder / "bids", LABELS, rows=ROWS)
    for label in LABELS[1::2]:
        simulate_other_scanner(bids, label)
    out = folder / "out"
    assert qsphere(bids, out, "participant", "--estimate", "dti") == 0
    assert qsphere(bids, out, "group", "--train", "harmonize_mica", "--reference-batch", "A") == 0
    return bids, out


@pytest.fixture(scope="module")
def harmonized(study, tmp_path_factory):
    """The same after --harmonize, in a copy."""
    bids, out = study
    shutil.copytree(out, copy := tmp_path_factory.mktemp("after") / "out")
    assert qsphere(bids, copy, "participant", "--estimate", "dti", "--harmonize", "mica") == 0
    return bids, copy


@pytest.fixture
def fresh(study, tmp_path):
    bids, out = study
    shutil.copytree(out, tmp_path / "out")
    return bids, tmp_path / "out"


def stem(out, label):
    return out / f"sub-{label}/dwi/sub-{label}"


def sidecar(out, label, what):
    return json.loads(Path(f"{stem(out, label)}_{what}.json").read_text())


def ratios(signal):
    """(voxel, volume) S/S0 of an image's voxels."""
    return signal[..., 2:] / signal[..., :2].mean(axis=-1, keepdims=True)


def quantiles(data, mask):
    """(2, 1000) of S/S0 at b 1000 and 2000, by definition."""
    values = ratios(data[mask])
    return np.stack([np.quantile(values[:, :12], GRID), np.quantile(values[:, 12:], GRID)])


def measured(bids, out, label):
    mask = image(f"{stem(out, label)}_desc-brain_mask.nii.gz") > 0
    return image(bids / f"sub-{label}/dwi/sub-{label}_dwi.nii.gz"), mask


def test_distribution_becomes_the_reference(harmonized):
    """Within the quantiles' step: a value between two of them cannot be placed better."""
    bids, out = harmonized
    reference = np.mean([quantiles(*measured(bids, out, p)) for p in LABELS[::2]], axis=0)
    step = np.diff(reference, axis=1).max(axis=1)
    for label in LABELS[1::2]:
        data, mask = measured(bids, out, label)
        before = np.abs(quantiles(data, mask) - reference)[:, 5:-5]
        after = np.abs(quantiles(image(f"{stem(out, label)}_desc-harmonized_dwi.nii.gz"), mask)
                       - reference)[:, 5:-5]
        assert (before.mean(axis=1) > 0.02).all()
        assert (after.max(axis=1) <= step).all()
        assert after.max() < 0.02 * before.max()


def test_maps_come_near_the_truth(harmonized):
    """The bend raised MD of site B by 30 %; after harmonization it is what site A finds."""
    _, out = harmonized
    md = {}
    for label in LABELS:
        inside = (image(f"{stem(out, label)}_desc-brain_mask.nii.gz") > 0) & truth.head()
        for desc in ("", "_desc-harmonized"):
            path = Path(f"{stem(out, label)}_model-tensor_param-md{desc}_dwimap.nii.gz")
            if path.exists():
                md[label, desc] = np.median(image(path)[inside])
    assert ("01", "_desc-harmonized") not in md
    for label in LABELS[1::2]:
        assert abs(md[label, ""] / truth.MD - 1.3) < 0.05
        assert abs(md[label, "_desc-harmonized"] / truth.MD - 1) < 0.05


def test_reference_batch_passes_unchanged(harmonized):
    bids, out = harmonized
    for label in LABELS[::2]:
        data, mask = measured(bids, out, label)
        kept = image(f"{stem(out, label)}_desc-harmonized_dwi.nii.gz")
        np.testing.assert_array_equal(kept[mask], data[mask])
        assert not list(out.glob(f"sub-{label}/dwi/*desc-harmonized_dwimap*"))
        about = sidecar(out, label, "desc-harmonized_dwi")
        assert about["Unchanged"] is True
        assert "A is the reference site" in (out / f"sub-{label}.html").read_text()


def test_table_of_b_stays(harmonized):
    bids, out = harmonized
    for extension in ("bval", "bvec"):
        ours = np.loadtxt(f"{stem(out, '02')}_desc-harmonized_dwi.{extension}")
        theirs = np.loadtxt(bids / f"sub-02/dwi/sub-02_dwi.{extension}")
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_sidecars_say_what_made_them(harmonized):
    _, out = harmonized
    card = json.loads((out / f"group/models/{MODEL}/model.json").read_text())
    for what in ("desc-harmonized_dwi", "model-tensor_param-fa_desc-harmonized_dwimap"):
        about = sidecar(out, "02", what)
        model = about["HarmonizationModel"]
        assert (model["Id"], model["ReferenceBatch"], model["Batch"]) == (MODEL, "A", "B")
        assert model["SHA256"] == card["sha256"] and model["BatchSource"].endswith(":site")
        assert model["TrainingRange"] == card["trained_for"]
        assert "OutOfDistribution" not in about
    assert any(uri.endswith("desc-harmonized_dwi.nii.gz") for uri in
               sidecar(out, "02", "model-tensor_param-fa_desc-harmonized_dwimap")["Sources"])
    assert "HarmonizationModel" not in sidecar(out, "02", "model-tensor_param-fa_dwimap")
    assert "SynthesizedVolumes" not in sidecar(out, "02", "desc-harmonized_dwi")


def test_sidecars_tell_noise_and_why_there_are_no_intervals(harmonized):
    """The level is that of the scan times what a warp makes of it, and never 0."""
    _, out = harmonized
    for what in ("desc-harmonized_dwi", "model-tensor_param-fa_desc-harmonized_dwimap"):
        noise = sidecar(out, "02", what)["Noise"]
        assert [s["b"] for s in noise["SDByShell"]] == [1000, 2000]
        assert all(0.2 < s["SD"] / noise["SDWithoutWeighting"] < 5 for s in noise["SDByShell"])
        assert "harmonized again" in noise["Source"]
    names = {p.name for p in (out / "sub-02/dwi").glob("*stat-std*.nii.gz")}
    assert names and not any("harmonized" in n for n in names)
    parameters = sidecar(out, "02", "model-tensor_param-fa_desc-harmonized_dwimap")["Model"][
        "Parameters"]
    assert "the error of a warp of whole scans" in parameters["Uncertainty"]
    assert "come without intervals" in (out / "sub-02.html").read_text()


def test_validator_has_nothing_to_say(harmonized):
    assert validate(harmonized[1]) == []


def test_report_shows_before_and_after(harmonized):
    _, out = harmonized
    figures = {p.name for p in (out / "sub-02/figures").glob("*change*")}
    assert len(figures) == 4, figures
    page = (out / "sub-02.html").read_text()
    for words in ("FA before and after harmonization", "Mean S/S0 of b2000", "single-fibre",
                  f"Harmonized from B to A by {MODEL}"):
        assert words in page
    qc = pd.read_csv(f"{stem(out, '02')}_desc-image_qc.tsv", sep="\t").iloc[0]
    described = sidecar(out, "02", "desc-image_qc")
    assert set(qc.index) == set(described)
    assert qc["harmonized_dti_md_mean"] < 0.9 * qc["dti_md_mean"]
    assert "of the harmonized signal" in described["harmonized_dti_md_mean"]["Description"]
    assert described["harmonized_dti_md_mean"]["Units"] == "mm^2/s"


def test_group_compares_both(harmonized, tmp_path):
    bids, out = harmonized
    shutil.copytree(out, tmp_path / "out")
    assert qsphere(bids, tmp_path / "out", "group") == 0
    table = pd.read_csv(tmp_path / "out/group/desc-image_qc.tsv", sep="\t")
    spread = [abs(np.subtract(*table.groupby("batch")[c].mean()))
              for c in ("dti_md_mean", "harmonized_dti_md_mean")]
    assert spread[1] < 0.1 * spread[0]
    assert (tmp_path / "out/group/figures/desc-harmonized.svg").exists()
    assert (tmp_path / f"out/group/models/{MODEL}/model.json").exists(), "models stay"
    assert validate(tmp_path / "out") == []


@pytest.mark.slow
def test_two_harmonizers_in_one_output_are_told(fresh, tmp_path, capsys):
    """A person by each: said where the second is applied, and on the group's page."""
    bids, out = fresh
    shutil.copytree(out / f"group/models/{MODEL}", tmp_path / "models/other")
    card = tmp_path / "models/other/model.json"
    model = checkpoint.load(card.parent)
    again = replace(model, card=replace(model.card, reference_batch="Z"))
    for name, content_of in checkpoint.pack(again).items():
        (card.parent / name).write_bytes(content_of)
    argv = (bids, out, "participant", "--estimate", "dti", "--participant-label")
    assert qsphere(*argv, "02", "--harmonize", "mica") == 0
    assert "different harmonizers" not in capsys.readouterr().err
    assert qsphere(*argv, "04", "--harmonize", tmp_path / "models/other") == 0
    told = ("are of different harmonizers: 1 run(s) by harmonize_mica to A (sub-02); 1 run(s) by "
            "harmonize_mica to Z (sub-04)")
    assert told in capsys.readouterr().err
    assert qsphere(bids, out, "group") == 0
    assert told in (out / "group.html").read_text()


def test_second_run_skips(harmonized, capsys):
    bids, out = harmonized
    before = content(out)
    assert qsphere(bids, out, "participant", "--estimate", "dti", "--harmonize", MODEL) == 0
    assert capsys.readouterr().err.count("complete and unchanged, skipped") == len(LABELS)
    assert content(out) == before


def test_training_again_gives_the_same_model(fresh):
    bids, out = fresh
    model = out / f"group/models/{MODEL}"
    before = {p.name: p.read_bytes() for p in model.iterdir()}
    assert qsphere(bids, out, "group", "--train", "harmonize_mica", "--reference-batch", "A") == 0
    assert {p.name: p.read_bytes() for p in model.iterdir()} == before
    assert "Maps B to A" in (out / "group.html").read_text()


def test_card(study):
    card = json.loads((study[1] / f"group/models/{MODEL}/model.json").read_text())
    known = card["trained_for"]
    assert [(s["b"], s["directions"]) for s in known["shells"]] == [
        ([1000, 1000], [12, 12]), ([2000, 2000], [16, 16])]
    assert known["shell_count"] is None and known["b0"] == [2, 2]
    assert known["voxel_size"] == [[3.0, 3.0], [3.2, 3.2], [3.5, 3.5]]
    assert known["covariates"] == {"age": [20, 55], "sex": ["F", "M"]}
    assert known["sites"] == ["B"] and card["reference_batch"] == "A"
    people = card["training"]["participants"]
    assert {b: len(p) for b, p in people.items()} == {"A": 3, "B": 3}
    assert not any("sub" in p or p in LABELS for p in people["A"])
    distance = card["metrics"]
    assert distance["distance_b1000_A"] < 0.2 * distance["distance_b1000_B"]


@pytest.mark.slow
@pytest.mark.parametrize("what,message", [
    ("scheme", "16 × b 3000 s/mm², needed are 12 × b 1000, 16 × b 2000 s/mm²"),
    ("directions", "6 directions at b = 2000 s/mm², 16 were seen in training"),
    ("voxel", "the voxel is 2 × 2.1 × 2.3 mm, seen in training were 3 × 3.2 × 3.5 mm"),
    ("batch", "the batch is Bb, known are B. Did you mean B?")])
def test_refused_outside_of_the_training(fresh, tmp_path, capsys, what, message):
    """Exit code 1, the reason and the remedy told; the measured signal is processed all the same;
    --allow-extrapolation goes on and says so."""
    _, out = fresh
    new = {"scheme": {"scheme": ((0, 2), (1000, 12), (3000, 16))},
           "directions": {"scheme": ((0, 2), (1000, 12), (2000, 6))},
           "voxel": {"matrix": truth.affine(voxel=(2.0, 2.1, 2.3))}, "batch": {}}[what]
    site = "Bb" if what == "batch" else "B"
    other = truth.write_dataset(tmp_path / "other", ("09",), rows={"09": {"site": site}}, **new)
    argv = (other, out, "participant", "--estimate", "dti", "--harmonize", MODEL)
    assert qsphere(*argv) == 1
    told = capsys.readouterr().err
    assert message in told and "--allow-extrapolation" in told and "--train harmonize_mica" in told
    assert Path(f"{stem(out, '09')}_model-tensor_param-fa_dwimap.nii.gz").exists()
    assert not list(out.glob("sub-09/dwi/*desc-harmonized*"))
    assert "does not fit" in (out / "sub-09.html").read_text()
    assert qsphere(*argv) == 1, "skipped, and still not what was asked for"
    assert qsphere(*argv, "--dry-run") == 0
    assert message in capsys.readouterr().out
    assert qsphere(*argv, "--allow-extrapolation") == 0
    for name in ("desc-harmonized_dwi", "model-tensor_param-fa_desc-harmonized_dwimap"):
        assert sidecar(out, "09", name)["OutOfDistribution"]
    assert "outside of what the model was trained for" in (out / "sub-09.html").read_text()


@pytest.mark.slow
def test_another_model_does_not_replace_what_one_made(study, harmonized, tmp_path, capsys):
    """Refused, exit code 1, and every image and the group's record of the run stay; the same model
    trained again replaces its own; so does another once the image is gone. The reference batch is
    the measured signal, whatever the model."""
    bids, _ = study
    shutil.copytree(harmonized[1], out := tmp_path / "out")
    model, other = out / f"group/models/{MODEL}", tmp_path / "other_model"
    retrain(model, other, 1.1)
    argv = (bids, out, "participant", "--estimate", "dti", "--participant-label", "01", "02")
    before = content(out, logs=True)
    assert qsphere(*argv, "--harmonize", other, "--dry-run") == 0
    assert f"refused: {stem(out, '02')}_desc-harmonized" in capsys.readouterr().out
    assert content(out, logs=True) == before
    assert qsphere(*argv, "--harmonize", other) == 1
    told = capsys.readouterr().err
    assert f"was made by the model {MODEL}" in told and "names other_model" in told
    assert "another OUTPUT_DIR" in told and "sub-02_desc-harmonized_dwi.nii.gz" in told
    after = content(out, logs=True)
    mine = [n for n in before if n.startswith("sub-02/") and not n.endswith("log/page.json")]
    assert mine and all(after[n] == before[n] for n in mine)
    assert sidecar(out, "01", "desc-harmonized_dwi")["HarmonizationModel"]["Id"] == "other_model"
    assert "was made by the model" in (out / "sub-02.html").read_text()
    assert "was made by the model" not in (out / "sub-01.html").read_text()

    retrain(model, model, 1.05)
    assert qsphere(*argv, "--harmonize", MODEL, "--participant-label", "02") == 0
    assert "was made by the model" not in (out / "sub-02.html").read_text()
    image_path = Path(f"{stem(out, '02')}_desc-harmonized_dwi.nii.gz")
    assert image_path.read_bytes() != before["sub-02/dwi/sub-02_desc-harmonized_dwi.nii.gz"]
    image_path.unlink()
    assert qsphere(*argv, "--harmonize", other) == 0
    assert sidecar(out, "02", "desc-harmonized_dwi")["HarmonizationModel"]["Id"] == "other_model"


def test_memory_limit_of_a_training(fresh, tmp_path, monkeypatch):
    """Scans beyond it are read from a file in the work folder; the model is the same. Two are held
    at a time."""
    bids, out = fresh
    model, held = out / f"group/models/{MODEL}", []
    before = {p.name: p.read_bytes() for p in model.iterdir()}

    def spy(dataset, run, **options):
        dwi = load_measured(dataset, run, **options)
        array = dwi.signal
        while array is not None and not isinstance(array, np.memmap):
            array = array.base if isinstance(array, np.ndarray) else None
        held.append(array is not None)
        return dwi

    monkeypatch.setattr("bidsapp.run.load_measured", spy)
    # --mem-mb counts from what a process needs, and in bytes: the scans of these tests are small
    monkeypatch.setattr("bidsapp.run.memory_limit", lambda given: FIXED_MEMORY + given)
    scan = 2 * 4 * 30 * int(image(f"{stem(out, '01')}_desc-brain_mask.nii.gz").sum())
    for limit, in_file in ((2.2 * scan, False), (1.5 * scan, True)):
        assert qsphere(bids, out, "group", "--train", "mica", "--reference-batch", "A",
                       "--mem-mb", int(limit), "-w", tmp_path / "work") == 0
        assert len(held) == 6 and set(held) == {in_file}
        assert {p.name: p.read_bytes() for p in model.iterdir()} == before
        held.clear()
    assert not list((tmp_path / "work").iterdir())


def retrain(model, folder, factor):
    """The model with other weights, in a folder."""
    trained = checkpoint.load(model)
    folder.mkdir(exist_ok=True)
    weights = {k: v * factor for k, v in trained.tensors.items()}
    for file, data in checkpoint.pack(checkpoint.Checkpoint(weights, trained.card)).items():
        (folder / file).write_bytes(data)


def test_short_names_of_methods():
    assert [methods.get(n).name for n in ("rish", "harmonize_rish", "synthesize", "scnn2")] == [
        "harmonize_rish", "harmonize_rish", "synthesize", "estimate_scnn2"]
    assert methods.get("rish", "harmonize").name == "harmonize_rish"
    with pytest.raises(UsageError, match=r"Available to estimate are.*Did you mean estimate_smt\?"):
        methods.get("smtt", "estimate")
    with pytest.raises(UsageError, match=r"no such method: rihs.*Did you mean rish\?"):
        methods.get("rihs")


def test_ambiguous_short_names_are_refused(monkeypatch):
    known = ["estimate_both", "harmonize_both", "harmonize_rish"]
    monkeypatch.setattr(methods, "names", lambda kind="": [n for n in known if n.startswith(kind)])
    with pytest.raises(UsageError, match="short name of estimate_both and harmonize_both"):
        methods.get("both")
    assert methods.get("rish").name == "harmonize_rish"


@pytest.mark.parametrize("given,message", [
    ("harmonize_mica_toB", "Did you mean harmonize_mica_toA?"), ("mica", "holds no model of it"),
    ("shrek", "no such folder, model or method"), (".", "holds no checkpoint")])
def test_model_that_cannot_be_had(study, tmp_path, capsys, given, message):
    bids, out = study
    where = tmp_path / "empty" if given == "mica" else out
    argv = ("participant", "--harmonize", tmp_path if given == "." else given)
    assert qsphere(bids, where, *argv) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "empty").exists()


def test_model_that_was_changed(fresh, capsys):
    bids, out = fresh
    weights = out / f"group/models/{MODEL}/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert qsphere(bids, out, "participant", "--harmonize", weights.parent) == 2
    assert "changed or damaged" in capsys.readouterr().err


@pytest.mark.parametrize("reference,rows,message", [
    ("Aa", ROWS, "no such site; found A: 3, B: 3. Did you mean A?"),
    (None, ROWS, "Name the reference with --reference-batch"),
    ("A", {p: {**r, "site": "A"} for p, r in ROWS.items()}, "needs at least two sites"),
    ("A", {p: {**r, "site": "B" if p == "02" else "A"} for p, r in ROWS.items()},
     "at least 2 participants at every site; found A: 5, B: 1. Add participants to B")])
def test_studies_that_carry_no_training(fresh, tmp_path, capsys, reference, rows, message):
    bids, out = fresh
    shutil.copytree(bids, tmp_path / "bids")
    truth.write_participants(tmp_path / "bids", rows)
    before = content(out / "group")
    argv = ["--reference-batch", reference] if reference else []
    assert qsphere(tmp_path / "bids", out, "group", "--train", "harmonize_mica", *argv) == 2
    assert message in capsys.readouterr().err
    assert content(out / "group") == before


def sites(rng, **other):
    """A Cohort of four scans of random tensors at A and B; `other`: acquisition of one at B."""
    acquisition = Acquisition(*truth.table())
    runs = {f"sub-{i}": (replace(acquisition, **other) if i == 3 else acquisition)
            for i in range(4)}
    mask = np.zeros((5, 6, 7), bool)
    mask[1:4, 1:5, 1:6] = True

    def load(name):
        signal = rng.uniform(1, 100, (mask.sum(), len(runs[name]))).astype(np.float32)
        return Dwi(signal, mask, np.eye(4), runs[name])

    table = pd.DataFrame({"participant": list("0123"), "run": list(runs), "batch": list("AABB"),
                          "snr_b0": [20.0, 30.0, 25.0, None]})
    return Cohort(table, reference_batch="A", acquisitions=runs, load=load)


def test_shells_that_differ_between_batches(rng):
    bvals, _ = truth.table()
    study = sites(rng, bvals=np.where(bvals == 2000, 2500, bvals))
    with pytest.raises(UsageError, match=r"shells differ\. sub-3 of B has 12 × b 1000, 16 × b 2500"
                                         r"; sub-0 of A has 12 × b 1000, 16 × b 2000"):
        methods.get("harmonize_mica").fit(study, TrainingSettings())


@pytest.mark.parametrize("invalid,message", [
    (77, r"77 values of sub-0 are NaN or infinite \(4.3%"), (0, r"sub-0 .*only 0%")])
def test_scan_without_signal(rng, invalid, message):
    study = sites(rng)
    dead = replace(study, load=lambda name: replace(
        study.load(name), signal=np.zeros_like(study.load(name).signal), invalid=invalid))
    with pytest.raises(UsageError, match=message):
        methods.get("harmonize_mica").fit(dead, TrainingSettings())


def test_mean_of_quantiles_is_that_of_the_people(rng, caplog):
    """Two people with the quantiles a and b of uniform signals: the reference is (a + b) / 2. The
    other site lies between them, so that there is nothing to harmonize, and this is told."""
    study = sites(rng)
    level = {"sub-0": 0.2, "sub-1": 0.6, "sub-2": 0.5, "sub-3": 0.5}

    def load(name):
        dwi = study.load(name)
        signal = np.full_like(dwi.signal, level[name] * 10)
        signal[:, :2] = 10
        return replace(dwi, signal=signal)

    (made,) = methods.get("harmonize_mica").fit(
        replace(study, load=load), TrainingSettings()).checkpoints.values()
    np.testing.assert_allclose(made.tensors["quantiles"], 0.4, rtol=1e-6)
    assert made.card.metrics["distance_b1000_B"] == pytest.approx(0.1)
    assert made.card.metrics["distance_b2000_A"] == pytest.approx(0.4)
    assert made.card.trained_for.snr == (20, 30)
    assert "scans of B differ no more from those of A than the participants" in caplog.text
    caplog.clear()
    methods.get("harmonize_mica").fit(replace(study, load=lambda name: replace(
        load(name), signal=load(name).signal * np.r_[1, 1, np.full(28, 1 + 2 * (name > "sub-1"))]
        .astype(np.float32))), TrainingSettings())
    (few,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "A has 2 participants, B has 2 participants. In smaller groups than 16" in few


def card_of(batches, reference="A"):
    shells = (ShellRange((1000.0, 1000.0), 1.0, (12, 14)),
              ShellRange((2000.0, 2000.0), 1.0, (16, 16)))
    domain = TrainingDomain(shells, (1, 2), sites=batches)
    return checkpoint.Card("harmonize_mica", {}, domain, {}, "", 0, {}, reference_batch=reference)


def model_of(*batches, reference="A"):
    return harmonize.Model(f"to{reference}from{''.join(batches)}", methods.get("harmonize_mica"),
                           checkpoint.Checkpoint({}, card_of(batches, reference)))


def test_warnings_of_the_card_are_told_where_it_is_applied(rng, tmp_path):
    """On the page and in every sidecar, as the card came back from its file."""
    study = sites(rng)
    (made,) = methods.get("harmonize_mica").fit(study, TrainingSettings()).checkpoints.values()
    card = replace(made.card, warnings=("in cross-validation more than 10 % was lost of MD.",))
    for file, packed in checkpoint.pack(replace(made, card=card)).items():
        (tmp_path / file).write_bytes(packed)
    model = harmonize.Model("m", methods.get("harmonize_mica"), checkpoint.load(tmp_path))
    name = "sub-2"
    run = SimpleNamespace(batch="B", batch_source="x", covariates={})
    result = harmonize.apply([model], study.load(name), run, allow=True, device="cpu")
    assert f"Harmonization: {card.warnings[0]}" in result.warnings
    assert result.about["HarmonizationModel"]["Warnings"] == list(card.warnings)
    quiet = harmonize.Model("m", model.method, made)
    result = harmonize.apply([quiet], study.load(name), run, allow=True, device="cpu")
    assert "Warnings" not in result.about["HarmonizationModel"]
    assert not any("cross-validation" in n for n in result.warnings)


def test_without_a_noise_level_there_are_no_intervals(rng, monkeypatch):
    """A harmonizer that knows its own error, of a scan whose noise is known, and is not."""
    study, method = sites(rng), methods.get("harmonize_mica")
    (made,) = method.fit(study, TrainingSettings()).checkpoints.values()
    own = method.harmonize

    def certain(dwi, *how):
        return replace(own(dwi, *how), no_intervals="",
                       errors=[0.01] * len(dwi.acquisition.shells))

    monkeypatch.setattr(method, "harmonize", certain)
    run = SimpleNamespace(batch="B", batch_source="x", covariates={})
    for noise, reason in ((None, harmonize.UNKNOWN_NOISE), (3.0, "")):
        dwi = replace(study.load("sub-2"), noise_sd=noise)
        result = harmonize.apply([harmonize.Model("m", method, made)], dwi, run, allow=True,
                                 device="cpu")
        assert result.no_intervals == reason
        assert any("without intervals" in n for n in result.notices) == bool(reason)
        assert ("HarmonizationError" in result.about) != bool(reason)


def test_one_of_several_models_is_selected():
    models = [model_of("B"), model_of("C")]
    assert harmonize.select(models, "C") is models[1]
    assert harmonize.select(models, "A").checkpoint.card.reference_batch == "A"
    with pytest.raises(Refusal, match=r"no model for the batch D; there are models for A, B, C"):
        harmonize.select(models, "D")
    with pytest.raises(Refusal, match="all know the batch B"):
        harmonize.select([*models, model_of("B", reference="C")], "B")
    assert harmonize.select(models[:1], "D") is models[0]


def test_names_of_models_hold_any_batch():
    method = methods.get("harmonize_mica")
    names = {harmonizer.model_name(method, b) for b in ("A", "a/b", "ab", "../x", "Maker 1,5 T")}
    assert len(names) == 5
    assert all(name.replace("_", "").isalnum() for name in names)


def test_change_of_directions_is_measured(rng):
    """A fibre turned by 10° about an axis across it turns the principal direction by 10°."""
    acquisition = Acquisition(*truth.table(((0, 2), (1000, 32))))
    mask = np.ones((16, 17, 18), bool)

    def dwi(axis):
        d = 0.3e-3 * np.eye(3) + 1.6e-3 * np.outer(axis, axis)
        clean = 100 * np.exp(-np.einsum("nij,ij->n", acquisition.btensors, d))
        return Dwi(np.tile(clean.astype(np.float32), (mask.sum(), 1)), mask,
                   np.diag([3.0, 3, 3, 1]), acquisition)

    angle = np.radians(10)
    before, after = dwi(np.array([1.0, 0, 0])), dwi(np.array([np.cos(angle), np.sin(angle), 0]))
    found = compare_signals(before, after, "cpu")
    assert found.median_angle == pytest.approx(10, abs=0.01)
    np.testing.assert_allclose(found.maps["fa"][0], found.maps["fa"][1], atol=1e-4)
    assert compare_signals(before, before, "cpu").median_angle == pytest.approx(0, abs=0.05)


def test_values_without_a_ratio_stay(rng):
    """Zeros, negatives and voxels without S0 are left; ties get one value."""
    study = sites(rng)
    method = methods.get("harmonize_mica")
    (made,) = method.fit(study, TrainingSettings()).checkpoints.values()
    dwi = study.load("sub-2")
    signal = dwi.signal.copy()
    signal[0], signal[1, 5], signal[2, :2] = 0, -3, 0
    signal[3:30, 7] = signal[3:30, :2].mean(axis=1) * 0.5
    result = method.harmonize(replace(dwi, signal=signal), made, "B", "cpu")
    for kept in ((0, slice(None)), (1, 5), (2, slice(None))):
        np.testing.assert_array_equal(result.signal[kept], signal[kept])
    assert result.counts["mica_unchanged_values"] == 2 * 28 + 1
    np.testing.assert_array_equal(result.signal[:, :2], signal[:, :2])
    ratio = result.signal[3:30, 7] / signal[3:30, :2].mean(axis=1)
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert torch.isfinite(torch.from_numpy(result.signal)).all()
