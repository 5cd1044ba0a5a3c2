"""The app on whole datasets: what comes out, what a second run does, how processes share."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from bidsapp import cli, run
from bidsapp.bids import find
from bidsapp.bids.writer import Dataset
from bidsapp.run import participant_statistics
from support import bids_tree as truth
from support.app import content, image, qsphere, validate

PARTICIPANT = "participant"


def start(*argv, **options):
    return subprocess.Popen([sys.executable, "-m", "bidsapp", *map(str, argv), "--preprocess",
                             "none", "--nprocs", "1"],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options)


@pytest.fixture(scope="module")
def processed(tmp_path_factory):
    """(bids, out) of two participants, processed once for the tests that only look."""
    folder = tmp_path_factory.mktemp("processed")
    bids = truth.write_dataset(folder / "bids")
    assert qsphere(bids, folder / "out", PARTICIPANT) == 0
    return bids, folder / "out"


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """Eight processed participants of two sites that differ in their signal."""
    folder = tmp_path_factory.mktemp("eight")
    labels = [f"{i:02}" for i in range(1, 9)]
    rows = {p: {"age": 20 + 7 * i, "site": "AB"[i % 2]} for i, p in enumerate(labels)}
    bids = truth.write_dataset(folder / "bids", labels, rows=rows)
    assert qsphere(bids, folder / "out", PARTICIPANT, "--estimate", "dti") == 0
    return folder


@pytest.fixture
def study(eight, tmp_path):
    """(bids, out) of them, to be changed."""
    shutil.copytree(eight, tmp_path, dirs_exist_ok=True)
    return tmp_path / "bids", tmp_path / "out"


def test_maps_are_the_truth(processed):
    _, out = processed
    stem = out / "sub-01/dwi/sub-01"
    mask = image(f"{stem}_desc-brain_mask.nii.gz") > 0
    inside = mask & truth.head()
    assert inside.sum() > 0.5 * truth.head().sum()  # median-Otsu rounds off so small a head
    for name, true, within in (("fa", truth.FA, 0.03), ("md", truth.MD, 0.03e-3)):
        values = image(f"{stem}_model-tensor_param-{name}_dwimap.nii.gz")
        assert abs(np.median(values[inside]) - true) < within
        assert np.all(values[~mask] == 0)
    assert nib.load(f"{stem}_model-smt_param-neuritefraction_dwimap.nii.gz").shape == truth.SHAPE


def test_validator_has_nothing_to_say(processed):
    _, out = processed
    assert validate(out) == []


def test_validator_would_speak_up(processed, tmp_path):
    _, out = processed
    subprocess.run(["cp", "-r", out, tmp_path / "out"], check=True)
    (tmp_path / "out/sub-01/dwi/sub-01_nonsense.nii.gz").write_bytes(b"")
    assert validate(tmp_path / "out")


def test_sidecar_says_where_a_map_comes_from(processed):
    _, out = processed
    sidecar = json.loads((out / "sub-01/dwi/sub-01_model-tensor_param-md_dwimap.json").read_text())
    assert sidecar["Units"] == "mm^2/s"
    assert sidecar["SkullStripped"] is True and sidecar["EchoTime"] == 0.08
    description = json.loads((out / "dataset_description.json").read_text())
    for uri in sidecar["Sources"]:
        dataset, _, path = uri.removeprefix("bids:").partition(":")
        root = Path(str(description["DatasetLinks"].get(dataset, out)).removeprefix("file://"))
        assert (root / path).is_file(), uri
    assert any(uri.endswith("_dwi.nii.gz") for uri in sidecar["Sources"])


def test_log_says_what_ran(processed):
    _, out = processed
    (status,) = out.glob("sub-01/log/*/status.json")
    status = json.loads(status.read_text())
    assert status["status"] == "done" and status["runs"]["sub-01"]["status"] == "done"
    (options,) = out.glob("sub-01/log/*/options.toml")
    assert 'analysis_level = "participant"' in options.read_text()


def test_page_is_self_contained(processed):
    _, out = processed
    page = (out / "sub-01.html").read_text()
    for attribute in re.findall(r'(?:src|href)="([^"]*)"', page):
        assert attribute.startswith(("data:", "#", "https://", "./")), attribute[:80]
    assert not re.search(r'<(img|script|link)[^>]+(src|href)="http', page)


def test_options_of_a_run_can_be_used_again(processed, tmp_path):
    bids, out = processed
    (options,) = out.glob("sub-02/log/*/options.toml")
    assert qsphere(bids, tmp_path / "out", PARTICIPANT, "--participant-label", "02",
                   "--estimate", "dti", "--config-file", options) == 0


def test_second_run_changes_nothing_and_skips(processed, capsys):
    bids, out = processed
    before = content(out)
    times = {p: p.stat().st_mtime_ns for p in out.glob("sub-*/dwi/*")}
    assert qsphere(bids, out, PARTICIPANT) == 0
    assert "complete and unchanged, skipped" in capsys.readouterr().err
    assert content(out) == before
    assert {p: p.stat().st_mtime_ns for p in out.glob("sub-*/dwi/*")} == times


@pytest.mark.slow
def test_what_changed_is_done_again(bids_tree, tmp_path):
    bids, out = bids_tree(), tmp_path / "out"
    assert qsphere(bids, out, PARTICIPANT, "--estimate", "dti") == 0
    before = content(out)
    truth.write_run(bids / "sub-01/dwi/sub-01", seed=99)
    assert qsphere(bids, out, PARTICIPANT, "--estimate", "dti") == 0
    changed = {name for name, data in content(out).items() if before.get(name) != data}
    maps = {n for n in changed if n.endswith("dwimap.nii.gz")}
    assert maps and all(name.startswith("sub-01") for name in changed)


@pytest.mark.slow
def test_same_input_gives_the_same_bytes(processed, tmp_path):
    bids, out = processed
    assert qsphere(bids, tmp_path / "other/out", PARTICIPANT) == 0
    ours, others = content(out), content(tmp_path / "other/out")
    same = [n for n in ours if n.endswith((".nii.gz", ".svg", ".tsv"))]
    assert len(same) > 20
    assert [n for n in same if ours[n] != others.get(n)] == []


@pytest.mark.slow
def test_memory_limit_does_not_change_the_result(processed, tmp_path):
    bids, out = processed
    assert qsphere(bids, tmp_path / "out", PARTICIPANT, "--mem-mb", 100, "-w", tmp_path,
                   "--participant-label", "01") == 0
    for path in out.glob("sub-01/dwi/*.nii.gz"):
        assert path.read_bytes() == (tmp_path / "out/sub-01/dwi" / path.name).read_bytes()


@pytest.mark.slow
def test_several_participants_at_a_time(processed, tmp_path):
    bids, out = processed
    done = subprocess.run([sys.executable, "-m", "bidsapp", bids, tmp_path / "out", PARTICIPANT,
                           "--preprocess", "none", "--nprocs", "2", "--omp-nthreads", "1"],
                          capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "of 2 participants processed" in done.stderr
    maps = [p.relative_to(out) for p in out.glob("sub-*/dwi/*.nii.gz")]
    assert all((tmp_path / "out" / m).read_bytes() == (out / m).read_bytes() for m in maps)


@pytest.mark.parametrize("argv,memory,device,expected", [
    ((), 100, "cpu", (3, 2)), ((), 2.5, "cpu", (2, 3)), ((), 0.1, "cpu", (1, 6)),
    ((), 100, "cuda", (1, 6)), (("--omp-nthreads", "4"), 100, "cpu", (1, 4)),
    (("--omp-nthreads", "1"), 100, "cpu", (3, 1)), (("--nprocs", "1"), 100, "cpu", (1, 1))])
def test_cpus_are_shared_by_participants(bids_tree, argv, memory, device, expected):
    """Six CPUs for three people, memory in units of what one of them may need."""
    bids = bids_tree(("01", "02", "03"))
    options = cli.parse([str(bids), "out", PARTICIPANT, "--nprocs", "6", *argv])
    found = find.find_runs(options)
    (need,) = {run.memory_of(r) for runs in found.runs.values() for r in runs}
    assert need > run.FIXED_MEMORY
    assert run.share_cpus(options, found, memory * need, device) == expected


@pytest.mark.parametrize("argv,memory,device,devices,expected", [
    ((), 100, "cpu", (1, 1), (6, 100 / 6)), ((), 2.5, "cpu", (1, 1), (2, 1.25)),
    ((), 1.9, "cpu", (1, 1), (1, None)), ((), -1, "cpu", (1, 1), (1, None)),
    (("--nprocs", "1"), 100, "cpu", (1, 1), (1, None)), ((), 100, "cuda", (1, 1), (1, None)),
    ((), 100, "cpu", (2, 1), (1, None))])
def test_cpus_are_shared_by_pairs(bids_tree, monkeypatch, argv, memory, device, devices, expected):
    """Six CPUs; memory beside that of the process that waits, in units of what a pair needs."""
    options = cli.parse([str(bids_tree(("01", "02"))), "out", "group", "--nprocs", "6", *argv])
    found = find.find_runs(options)
    runs = [r for own in found.runs.values() for r in own]
    pair = 2 * run.memory_of(runs[0]) - run.FIXED_MEMORY
    assert pair > run.FIXED_MEMORY
    monkeypatch.setattr(run, "choose_device", lambda _: device)
    whole = run.FIXED_MEMORY + memory * pair
    workers, share = run.share_pairs(options, runs, whole, devices)
    assert workers == expected[0]
    assert share == pytest.approx(expected[1] * pair if expected[1] else whole / devices[0])


def test_dry_run_writes_nothing(bids_tree, tmp_path, capsys):
    bids = bids_tree()
    assert qsphere(bids, tmp_path / "out", PARTICIPANT, "--dry-run") == 0
    assert not (tmp_path / "out").exists()
    text = capsys.readouterr().out
    assert "sub-02" in text and "estimate_dti" in text and "GB" in text


def test_reports_only_makes_the_same_page(processed):
    bids, out = processed
    page = out / "sub-01.html"
    before = page.read_text()
    page.write_text("")
    record = json.loads((out / "sub-01/log/page.json").read_text())
    assert "sub-01.html" in record["outputs"]
    page.unlink()
    assert qsphere(bids, out, PARTICIPANT, "--reports-only") == 0
    assert page.read_text() == before


def test_reports_only_of_someone_unknown(processed, capsys):
    bids, out = processed
    assert qsphere(bids, out, PARTICIPANT, "--reports-only", "--participant-label", "01",
                   "99") == 1
    assert "sub-99 was not processed" in capsys.readouterr().err


def test_reports_only_needs_results(bids_tree, tmp_path, capsys):
    assert qsphere(bids_tree(), tmp_path / "out", PARTICIPANT, "--reports-only") == 2
    assert "Run without --reports-only first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_boilerplate_only(bids_tree, tmp_path):
    assert qsphere(bids_tree(), tmp_path / "out", PARTICIPANT, "--boilerplate-only") == 0
    assert "tensor" in (tmp_path / "out/logs/CITATION.md").read_text()
    assert not list((tmp_path / "out").glob("sub-*"))


def test_refused_method_is_told_and_the_rest_goes_on(bids_tree, tmp_path):
    bids = bids_tree(("01",), scheme=((0, 1), (1000, 12)))
    assert qsphere(bids, tmp_path / "out", PARTICIPANT) == 0
    assert list(tmp_path.glob("out/sub-01/dwi/*model-tensor*"))
    assert not list(tmp_path.glob("out/sub-01/dwi/*model-smt*"))
    (status,) = tmp_path.glob("out/sub-01/log/*/status.json")
    reason = json.loads(status.read_text())["runs"]["sub-01"]["refusals"]["estimate_smt"]
    assert "shell" in reason
    assert "shell" in (tmp_path / "out/sub-01.html").read_text()


def test_a_refused_method_that_was_named_is_a_failure(bids_tree, tmp_path, capsys):
    """The rest is done all the same; a run that is skipped the next time is still not complete."""
    bids = bids_tree(("01",), scheme=((0, 1), (1000, 12)))
    argv = (bids, tmp_path / "out", PARTICIPANT, "--estimate", "dti", "smt")
    for _ in range(2):
        assert qsphere(*argv) == 1
    told = capsys.readouterr().err
    assert "sub-01: estimate_smt is left out: " in told and "skipped" in told
    assert list(tmp_path.glob("out/sub-01/dwi/*model-tensor*"))
    assert qsphere(*argv[:3], "--estimate", "dti") == 0


@pytest.mark.slow
def test_sessions_and_runs_are_kept_apart(bids_tree, tmp_path):
    bids = bids_tree(("01",), ("a", "b"), ("dir-AP", "dir-PA"))
    assert qsphere(bids, tmp_path / "out", PARTICIPANT, "--session-label", "ses-a",
                   "--estimate", "dti") == 0
    maps = sorted(p.name for p in tmp_path.glob("out/sub-01/ses-*/dwi/*param-fa_dwimap.nii.gz"))
    assert maps == [f"sub-01_ses-a_dir-{d}_model-tensor_param-fa_dwimap.nii.gz"
                    for d in ("AP", "PA")]
    assert validate(tmp_path / "out") == []


@pytest.mark.slow
def test_group_report_and_combat(study, capsys):
    bids, out = study
    combat = ("--train", "harmonize_combat", "--reference-batch", "A")
    assert qsphere(bids, out, "group", *combat) == 0
    table = (out / "group/desc-combat_dwimap.tsv").read_text().splitlines()
    assert len(table) == 9
    assert set(json.loads((out / "group/desc-harmonizer_model.json").read_text())["Batches"]) \
        == {"A", "B"}
    page = (out / "group.html").read_text()
    qc = pd.read_csv(out / "group/desc-image_qc.tsv", sep="\t")
    fa = qc.groupby("batch")["dti_fa_mean"].mean()
    assert all(f"<td>{fa[batch]:.4g} ± " in page for batch in "AB")
    assert "ComBat" in page and ("<svg" in page or "data:image" in page)
    assert validate(out) == []
    before = content(out)
    assert qsphere(bids, out, "group") == 0
    assert content(out).keys() == before.keys(), "what was trained earlier stays, and is shown"
    page = (out / "group.html").read_text()
    assert "ComBat" in page and "reference site: A" in page, "that of the training"
    assert qsphere(bids, out, "group", *combat) == 0
    assert content(out) == before
    capsys.readouterr()
    fewer = [f"{i:02}" for i in range(1, 8)]
    assert qsphere(bids, out, "group", "--participant-label", *fewer) == 0
    assert not (out / "group/desc-combat_dwimap.tsv").exists(), "it was of other people"
    assert "harmonize_combat: its tables are removed" in capsys.readouterr().err


@pytest.mark.slow
def test_group_refuses_and_leaves_the_earlier_group_alone(study, capsys):
    bids, out = study
    assert qsphere(bids, out, "group") == 0
    before = content(out)
    truth.write_participants(bids, {f"{i:02}": {"site": "A"} for i in range(1, 9)})
    assert qsphere(bids, out, "group", "--train", "harmonize_combat") == 2
    assert "at least two sites" in capsys.readouterr().err
    assert content(out) == before


def test_group_without_someone_unknown(processed, capsys):
    bids, out = processed
    assert qsphere(bids, out, "group", "--participant-label", "01", "99") == 1
    assert "sub-99 does not exist" in capsys.readouterr().err


def test_combat_is_not_applied_to_images(processed, tmp_path, capsys):
    bids, _ = processed
    assert qsphere(bids, tmp_path / "out", PARTICIPANT, "--harmonize", "combat") == 2
    assert "group --train harmonize_combat" in capsys.readouterr().err


def test_group_table_keeps_its_own_columns(bids_tree, tmp_path, caplog):
    """Columns of participants.tsv do not overwrite who a row is of, nor what was measured."""
    bids = bids_tree(("01",), rows={"01": {"age": 30, "site": "A", "batch": "x", "run": 7,
                                           "n_voxels": 1, "dti_fa_mean": 2}})
    dataset = Dataset(tmp_path / "out", {})
    (dataset.root / "sub-01/log").mkdir(parents=True)
    (dataset.root / "sub-01/log/sub-01_dwi.json").write_text(json.dumps(
        {"state": "complete", "qc": {"n_voxels": 500, "dti_fa_mean": 0.4}}))
    options = cli.parse([str(bids), str(tmp_path / "out"), "group"])
    table, covariates = participant_statistics(dataset, find.find_runs(options))
    assert covariates == ["age"]
    assert table.to_dict("records") == [{
        "participant": "01", "session": "n/a", "run": "sub-01", "batch": "A", "age": 30,
        "n_voxels": 500, "dti_fa_mean": 0.4}]
    assert "n_voxels, dti_fa_mean left out" in caplog.text


def test_group_needs_participants(bids_tree, tmp_path, capsys):
    assert qsphere(bids_tree(), tmp_path / "out", "group") == 2
    assert "Run the participant level first" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_share_one_output(bids_tree, tmp_path):
    """Each with one participant of its own and one that both are to do."""
    bids, out = bids_tree(("01", "02", "03")), tmp_path / "out"
    running = [start(bids, out, PARTICIPANT, "--participant-label", own, "03")
               for own in ("01", "02")]
    texts = [p.communicate()[0] for p in running]
    assert [p.returncode for p in running] == [0, 0], texts
    assert len(list(out.glob("sub-*/dwi/*param-fa_dwimap.nii.gz"))) == 3
    assert sum("skipped" in text for text in texts) == 1
    assert len((out / "participants.tsv").read_text().splitlines()) == 4
    assert validate(out) == []


@pytest.mark.slow
def test_killed_and_run_again(bids_tree, tmp_path, processed, rng):
    """kill -9 at random moments: only whole files are ever visible; a last run completes all."""
    bids, out = bids_tree(), tmp_path / "out"
    for _ in range(6):
        process = start(bids, out, PARTICIPANT, start_new_session=True)
        deadline = time.monotonic() + float(rng.uniform(3, 12))
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.05)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for name, data in content(out, logs=True).items():
            if ".staging" in name or ".locks" in name:
                continue
            if name.endswith(".nii.gz"):
                assert np.isfinite(image(out / name)).all()
            elif name.endswith(".json"):
                json.loads(data)
            elif name.endswith(".html"):
                assert data.rstrip().endswith(b"</html>")
    assert qsphere(bids, out, PARTICIPANT) == 0
    expected = content(processed[1])
    maps = {n for n in expected if n.endswith(".nii.gz")}
    assert {n for n in content(out) if n.endswith(".nii.gz")} == maps
    assert validate(out) == []


def test_options_without_use_are_refused(tmp_path, bids_tree, capsys):
    bids = bids_tree()
    for option in ("--folds", "--epochs", "--blocks"):
        assert qsphere(bids, tmp_path / "out", "group", "--train", "harmonize_combat", option,
                       "3") == 2
        assert re.search(f"{option} 3: harmonize_combat does not use it.* harmonize_shresnet",
                         capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_methods_text_says_what_was_done(bids_tree, tmp_path):
    """Not what was planned: smt needs two shells, of which one is left."""
    bids = bids_tree(("01",))
    for name in ("bval", "bvec"):
        path = bids / f"sub-01/dwi/sub-01_dwi.{name}"
        rows = np.loadtxt(path, ndmin=2)
        if name == "bval":
            rows[rows > 0] = 1000
        np.savetxt(path, rows, fmt="%.8g")
    qsphere(bids, tmp_path / "out", PARTICIPANT, "--estimate", "dti", "smt")
    text = (tmp_path / "out/logs/CITATION.md").read_text()
    assert "Method: dti" in text and "Method: smt" not in text
