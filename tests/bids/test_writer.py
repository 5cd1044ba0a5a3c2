"""The one writer: whole files or none, its own files only, several processes at once."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import pytest

from bidsapp.bids import names
from bidsapp.bids.writer import LOCKS, STAGING, Dataset, sha256, to_tsv
from bidsapp.errors import DataError, UsageError

RECORD = PurePosixPath("sub-01/log/sub-01_dwi.json")
MAP = PurePosixPath("sub-01/dwi/sub-01_dwimap.nii.gz")


@pytest.fixture
def like(rng):
    affine = np.diag([2, 2, 3, 1.0])
    return nib.Nifti1Image(np.zeros((7, 8, 9), np.float32), affine)


def visible(root):
    return {str(p.relative_to(root)) for p in root.rglob("*")
            if p.is_file() and not str(p.relative_to(root)).startswith((STAGING, LOCKS))}


def claimed(root, links=None):
    dataset = Dataset(root, links or {})
    dataset.claim()
    return dataset


def write(dataset, like, value=1.0, fingerprint="a", extra=()):
    with dataset.transaction(RECORD, fingerprint) as batch:
        batch.image(MAP, np.full((7, 8, 9), value, np.float32), like, {"Units": "1"})
        for name in extra:
            batch.text(PurePosixPath(name), "text")


def test_image_and_sidecar_appear_with_their_hashes(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    write(dataset, like)
    image = nib.load(tmp_path / "out" / MAP)
    assert np.all(np.asarray(image.dataobj) == 1) and np.allclose(image.affine, like.affine)
    record = dataset.record(RECORD)
    assert record["outputs"][str(MAP)] == [sha256(tmp_path / "out" / MAP)]
    assert dataset.is_complete(record, "a") and not dataset.is_complete(record, "b")


@pytest.mark.parametrize("value", [1.0, 2.0])
def test_a_file_of_another_step_is_taken_over(tmp_path, like, value):
    """Its own record no longer lists it, and is incomplete; what it lists alone stays. So do the
    files of a step that then leaves its old ones."""
    dataset, other = claimed(tmp_path / "out"), RECORD.with_name("sub-01_desc-x_step.json")
    write(dataset, like, extra=["sub-01/dwi/own.txt"])
    with dataset.transaction(other, "b") as transaction:
        transaction.image(MAP, np.full((7, 8, 9), value, np.float32), like, {"Units": "1"})
    record = dataset.record(RECORD)
    assert record["state"] == "incomplete" and list(record["outputs"]) == ["sub-01/dwi/own.txt"]
    assert dataset.is_complete(dataset.record(other), "b")
    with dataset.transaction(RECORD, "c"):
        pass
    assert np.asarray(nib.load(tmp_path / "out" / MAP).dataobj).max() == value
    assert not (tmp_path / "out/sub-01/dwi/own.txt").exists()


def test_a_file_of_another_step_that_was_changed_is_kept(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    write(dataset, like)
    nib.save(nib.Nifti1Image(np.ones((2, 2, 2), np.float32), np.eye(4)), tmp_path / "out" / MAP)
    other = RECORD.with_name("sub-01_desc-x_step.json")
    with (pytest.raises(DataError, match="changed since"),
          dataset.transaction(other, "b") as transaction):
        transaction.image(MAP, np.zeros((7, 8, 9), np.float32), like, {})
    assert nib.load(tmp_path / "out" / MAP).shape == (2, 2, 2)
    assert dataset.record(RECORD)["state"] == "complete"


def test_same_data_give_the_same_bytes(tmp_path, like):
    first, second = claimed(tmp_path / "a"), claimed(tmp_path / "b")
    write(first, like)
    write(second, like)
    assert sha256(first.root / MAP) == sha256(second.root / MAP)


def test_nothing_appears_after_an_exception(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    with pytest.raises(RuntimeError), dataset.transaction(RECORD) as batch:
        batch.image(MAP, np.zeros((7, 8, 9), np.float32), like, {})
        raise RuntimeError
    assert visible(dataset.root) == set()
    assert not any((dataset.root / STAGING).iterdir())


def test_foreign_file_is_not_overwritten(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    (dataset.root / MAP).parent.mkdir(parents=True)
    (dataset.root / MAP).write_bytes(b"precious")
    with pytest.raises(DataError, match="was not written by QSphere"):
        write(dataset, like)
    assert (dataset.root / MAP).read_bytes() == b"precious"


def test_own_file_changed_by_hand_is_not_overwritten(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    write(dataset, like)
    (dataset.root / MAP).write_bytes(b"edited")
    assert not dataset.is_complete(dataset.record(RECORD), "a")
    with pytest.raises(DataError, match="changed since"):
        write(dataset, like, 2.0)


def test_own_files_are_replaced_and_leftovers_removed(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    write(dataset, like, extra=["sub-01/dwi/old.txt"])
    write(dataset, like, 2.0)
    assert np.all(np.asarray(nib.load(dataset.root / MAP).dataobj) == 2)
    assert "sub-01/dwi/old.txt" not in visible(dataset.root)


def test_failure_keeps_earlier_files_known(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    write(dataset, like)
    dataset.mark(RECORD, "failed", {"error": "x"})
    assert not dataset.is_complete(dataset.record(RECORD), "a")
    write(dataset, like, 3.0)
    assert np.all(np.asarray(nib.load(dataset.root / MAP).dataobj) == 3)


@pytest.mark.parametrize("holds,message", [
    ({"thesis.docx": ""}, "is not empty"),
    ({"dataset_description.json": '{"GeneratedBy": [{"Name": "fMRIPrep"}]}'}, "another program"),
])
def test_folder_of_someone_else(tmp_path, holds, message):
    for name, text in holds.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        claimed(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == set(holds)


@pytest.fixture
def not_root():
    """Root may write everywhere, so it steps down for the length of a test."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    yield
    os.seteuid(user)


def test_folder_that_cannot_be_written(not_root):
    with pytest.raises(UsageError, match="cannot be written"):
        claimed(Path("/usr/qsphere-out"))


def test_folder_under_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be written"):
        claimed(tmp_path / "file" / "out")


def test_uris(tmp_path):
    dataset = claimed(tmp_path / "out", {"raw": tmp_path / "bids"})
    assert dataset.uri(tmp_path / "bids/sub-01/x.nii") == "bids:raw:sub-01/x.nii"
    assert dataset.uri(dataset.root / "sub-01/y.nii") == "bids::sub-01/y.nii"
    assert dataset.uri(tmp_path / "elsewhere") == (tmp_path / "elsewhere").as_uri()


def test_participants_are_merged(tmp_path):
    dataset = claimed(tmp_path / "out")
    dataset.participants({"02": {"batch": "x", "age": 3.5}}, {})
    dataset.participants({"01": {"batch": "y", "age": None}}, {"batch": {"Description": "site"}})
    assert (dataset.root / "participants.tsv").read_text() == (
        "participant_id\tbatch\tage\nsub-01\ty\tn/a\nsub-02\tx\t3.5\n")


def test_missing_values_and_order_of_columns():
    assert to_tsv([{"a": 1, "b": float("nan")}, {"a": 2, "c": "x"}]) == (
        "a\tb\tc\n1\tn/a\tn/a\n2\tn/a\tx\n")


@pytest.mark.parametrize("entities,expected", [
    ({"sub": "01", "run": "1", "dir": "AP"}, "sub-01/dwi/sub-01_dir-AP_run-1_dwimap.nii.gz"),
    ({"sub": "01", "ses": "a", "acq": "x"}, "sub-01/ses-a/dwi/sub-01_ses-a_acq-x_dwimap.nii.gz"),
])
def test_names_in_bids_order(entities, expected):
    assert str(names.output_path(entities, "dwimap", ".nii.gz")) == expected


def test_statistics_stand_before_descriptions():
    path = names.output_path({"sub": "01"}, "dwimap", ".json", desc="harmonized", stat="std",
                        param="fa", model="tensor")
    assert path.name == "sub-01_model-tensor_param-fa_stat-std_desc-harmonized_dwimap.json"


@pytest.mark.parametrize("bad", [{"sub": "0/1"}, {"sub": "01", "colour": "x"}])
def test_names_that_cannot_be(bad):
    with pytest.raises(ValueError):
        names.output_path(bad, "dwi", ".nii.gz")


KILLED = """
import sys, numpy as np, nibabel as nib
from pathlib import Path, PurePosixPath
from bidsapp.bids.writer import Dataset
dataset = Dataset(__import__("pathlib").Path(sys.argv[1]), {})
dataset.claim()
like = nib.Nifti1Image(np.zeros((40, 40, 40), np.float32), np.eye(4))
print("ready", flush=True)
for value in range(10_000):
    with dataset.transaction(PurePosixPath("sub-01/log/sub-01_dwi.json"), str(value)) as batch:
        for i in range(6):
            batch.image(PurePosixPath(f"sub-01/dwi/map{i}.nii.gz"),
                        np.full((40, 40, 40), value, np.float32), like, {"value": value})
"""


def test_a_record_is_complete_only_once_its_files_are_in_place(tmp_path, like, monkeypatch):
    """The files of the transaction before stand there; they must not pass for those of this one."""
    dataset, replace = claimed(tmp_path / "out"), Path.replace
    write(dataset, like)

    def interrupted(path, target):
        if target.name != RECORD.name:
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(dataset, like, 2.0, "b")
    monkeypatch.undo()
    assert not dataset.is_complete(dataset.record(RECORD), "b")
    write(dataset, like, 2.0, "b")
    assert dataset.is_complete(dataset.record(RECORD), "b")


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path, rng):
    """kill -9 at 20 moments: every visible file is whole, and the next process goes on."""
    out = tmp_path / "out"
    for _ in range(20):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(out)],
                                   stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        time.sleep(float(rng.uniform(0, 0.3)))
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        for path in out.glob("sub-01/dwi/*.nii.gz"):
            assert len(np.unique(np.asarray(nib.load(path).dataobj))) == 1
        for path in out.glob("sub-01/**/*.json"):
            json.loads(path.read_text())
    dataset = claimed(out)
    assert not any((out / STAGING).iterdir()), "what dead processes left is cleared"
    like = nib.Nifti1Image(np.zeros((40, 40, 40), np.float32), np.eye(4))
    with dataset.transaction(RECORD, "last") as batch:
        batch.image(PurePosixPath("sub-01/dwi/map0.nii.gz"),
                    np.full((40, 40, 40), -1, np.float32), like, {})
    assert dataset.is_complete(dataset.record(RECORD), "last")
    assert len(list(out.glob("sub-01/dwi/*.nii.gz"))) == 1


def test_names_as_long_as_bids_allows(tmp_path, like):
    dataset = claimed(tmp_path / "out")
    entities = dict.fromkeys(("sub", "ses", "acq", "dir"), 45 * "x")
    path = names.output_path(entities, "dwimap", ".nii.gz", param="fa")
    assert len(path.name) < 255 < len(str(path))
    with dataset.transaction(RECORD) as batch:
        batch.image(path, np.zeros((7, 8, 9), np.float32), like, {})
    assert (dataset.root / path).exists()


def test_shared_files_keep_what_someone_wrote(tmp_path):
    dataset = claimed(tmp_path / "out")
    dataset.describe("x", [], "cite")
    dataset.participants({"01": {"age": 3}}, {})
    (dataset.root / "README.md").write_text("mine")
    with (dataset.root / ".bidsignore").open("a") as stream:
        stream.write("notes\n")
    (dataset.root / "participants.json").write_text('{"age": {"Description": "mine"}}')
    description = json.loads((dataset.root / "dataset_description.json").read_text())
    (dataset.root / "dataset_description.json").write_text(
        json.dumps({**description, "Authors": ["A", "B"], "Funding": ["F"]}))
    dataset.describe("x", [], "cite")
    dataset.participants({"02": {"age": 4}}, {})
    assert (dataset.root / "README.md").read_text() == "mine"
    assert (dataset.root / ".bidsignore").read_text().splitlines()[-1] == "notes"
    assert dataset.record(PurePosixPath("participants.json"))["age"]["Description"] == "mine"
    description = json.loads((dataset.root / "dataset_description.json").read_text())
    assert description["Authors"] == ["A", "B"] and description["Funding"] == ["F"]


def test_uri_through_a_link(tmp_path):
    (tmp_path / "bids").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "bids")
    dataset = Dataset(tmp_path / "out", {"raw": tmp_path / "link"})
    for way in ("bids", "link"):
        assert dataset.uri(tmp_path / way / "sub-01" / "x.nii.gz") == "bids:raw:sub-01/x.nii.gz"


def test_two_processes_write_shared_tables(tmp_path):
    code = ("import sys; from pathlib import Path; from bidsapp.bids.writer import Dataset\n"
            "d = Dataset(Path(sys.argv[1]), {})\nd.claim()\n"
            "for i in range(20): d.participants({f'{sys.argv[2]}{i:02}': {'batch': 'x'}}, {})")
    running = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), who])
               for who in "ab"]
    assert [p.wait() for p in running] == [0, 0]
    assert len((tmp_path / "out/participants.tsv").read_text().splitlines()) == 41
