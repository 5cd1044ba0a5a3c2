"""Sites of runs: the order of sources, what is ambiguous, covariates."""

import json

import pytest

from bidsapp.errors import UsageError
from support import bids_tree as truth
from support.app import find_runs, run_names

SCANNER = {"Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "EchoTime": 0.08}


@pytest.fixture
def tree(bids_tree):
    def write(rows=None, participants=("01", "02", "03"), **options):
        return bids_tree(participants, rows=rows, **{"shape": (7, 8, 9), **options})
    return write


def batches(result):
    return {run.name: run.batch for label in result.participants for run in result.runs[label]}


def sources(result):
    return {run.batch_source for label in result.participants for run in result.runs[label]}


def sessions_tsv(bids, label, rows):
    text = "session_id\t" + "\t".join(next(iter(rows.values()))) + "\n"
    text += "".join(f"ses-{s}\t" + "\t".join(map(str, row.values())) + "\n"
                    for s, row in rows.items())
    (bids / f"sub-{label}/sub-{label}_sessions.tsv").write_text(text)


SITES = {"01": {"site": "A"}, "02": {"site": "B"}, "03": {"site": "A"}}


def test_site_column(tree):
    result = find_runs(tree(SITES))
    assert batches(result) == {"sub-01": "A", "sub-02": "B", "sub-03": "A"}
    assert sources(result) == {"participants.tsv:site"}
    assert result.rows["02"] == {"site": "B", "batch": "B"}


@pytest.mark.parametrize("age", ["9" * 5000, "-1e400"])
def test_number_that_is_too_large(tree, age):
    """It is missing, of its participant alone; an integer of more than 64 bits stays a label."""
    rows = {"01": {"age": age, "id": "1" * 20}, "02": {"age": 31, "id": 5}}
    result = find_runs(tree(rows, ("01", "02")))
    assert {run.participant: dict(run.covariates) for runs in result.runs.values()
            for run in runs} == {"01": {"id": "1" * 20}, "02": {"age": 31, "id": 5}}
    assert "age" not in result.rows["01"]
    assert result.problems["02"] == []
    (told,) = result.problems["01"]
    assert "participants.tsv: age of sub-01 is" in told and "or write n/a" in told


def test_too_large_number_in_sessions(tree):
    bids = tree(SITES, ("01", "02", "03"), sessions=("a",))
    sessions_tsv(bids, "02", {"a": {"age": "1" + "0" * 400}})
    result = find_runs(bids)
    assert "sub-02_sessions.tsv: age of sub-02 ses-a" in result.problems["02"][0]
    assert not result.problems["01"]


def test_scanner_column(tree):
    rows = {p: {"scanner": row["site"]} for p, row in SITES.items()}
    assert sources(find_runs(tree(rows))) == {"participants.tsv:scanner"}


def test_batch_column_comes_first(tree):
    rows = {p: {**row, "coil": f"c{p}"} for p, row in SITES.items()}
    result = find_runs(tree(rows), "--batch-column", "coil")
    assert batches(result) == {"sub-01": "c01", "sub-02": "c02", "sub-03": "c03"}


@pytest.mark.parametrize("columns,argv", [
    ("lab", []), ("age\tsite", []), ("age\tlab", ["--batch-column", "lab"])])
def test_batch_file_comes_before_all(tree, tmp_path, columns, argv):
    more = "30\t" if "age" in columns else ""
    text = f"participant_id\t{columns}\n" + "".join(
        f"{p}\t{more}L{p[-1]}\n" for p in ("sub-01", "02", "sub-03"))
    (tmp_path / "b.tsv").write_text(text)
    result = find_runs(tree(SITES), "--batch-file", tmp_path / "b.tsv", *argv)
    assert batches(result) == {"sub-01": "L1", "sub-02": "L2", "sub-03": "L3"}
    assert all("b.tsv" in source for source in sources(result))


def test_sessions_tsv(tree):
    bids = tree({}, ("01",), sessions=("a", "b"))
    sessions_tsv(bids, "01", {"a": {"site": "A", "age": 20}, "b": {"site": "B", "age": 21.5}})
    result = find_runs(bids)
    assert batches(result) == {"sub-01_ses-a": "A", "sub-01_ses-b": "B"}
    assert sources(result) == {"sessions.tsv:site"}
    assert [run.covariates["age"] for run in result.runs["01"]] == [20, 21.5]
    assert result.rows["01"]["batch"] == "A,B"


def test_sessions_as_rows_of_participants_tsv(tree):
    bids = tree({}, ("01",), sessions=("a", "b"))
    (bids / "participants.tsv").write_text(
        "participant_id\tsession_id\tsite\nsub-01\tses-a\tA\nsub-01\tb\tB\n")
    assert batches(find_runs(bids)) == {"sub-01_ses-a": "A", "sub-01_ses-b": "B"}


@pytest.mark.parametrize("key", ["DeviceSerialNumber", "StationName", "ReceiveCoilName",
                                 "SoftwareVersions", "Manufacturer", "ManufacturersModelName"])
def test_scanner_fields_tell_scanners_apart(tree, key):
    bids = tree(sidecar=SCANNER)
    other = bids / "sub-02/dwi/sub-02_dwi.json"
    other.write_text(json.dumps({**SCANNER, key: "another"}))
    named = batches(find_runs(bids))
    assert named["sub-01"] == named["sub-03"] != named["sub-02"]
    assert named["sub-01"].startswith("Siemens-Prisma-")
    other.write_text(json.dumps({**SCANNER, "EchoTime": 0.09}))
    assert len(set(batches(find_runs(bids)).values())) == 1, "echo time is no scanner"


def test_serial_number_does_not_show(tree):
    name = batches(find_runs(tree(sidecar={**SCANNER, "DeviceSerialNumber": "166017"})))["sub-01"]
    assert "166017" not in name


def test_institution_then_unknown(tree, caplog):
    bids = tree(sidecar={"InstitutionName": "Lab of Physics, Berlin"})
    (bids / "sub-02/dwi/sub-02_dwi.json").write_text("{}")
    (bids / "sub-03/dwi/sub-03_dwi.json").write_text("{}")
    assert batches(find_runs(bids)) == {"sub-01": "Lab-of-Physics-Berlin", "sub-02": "unknown",
                                    "sub-03": "unknown"}
    assert caplog.text.count("--batch-file") == 1, "told once"


def test_table_is_printed(tree, caplog):
    caplog.set_level("INFO")
    find_runs(tree(SITES))
    assert "batch A (participants.tsv:site): 2 run(s) of 2 participant(s): sub-01, sub-03" \
        in caplog.text


@pytest.mark.parametrize("name", ["participant", "session", "run", "batch"])
def test_columns_of_the_group_table_are_no_covariates(tree, caplog, name):
    rows = {p: {**row, "age": 30, name: f"x{p}"} for p, row in SITES.items()}
    bids = tree(rows)
    assert find_runs(bids).runs["01"][0].covariates == {"age": 30}
    assert f"the columns {name} are left out" in caplog.text
    assert ("--batch-column batch" in caplog.text) == (name == "batch")
    caplog.clear()
    result = find_runs(bids, "--batch-column", name)
    assert batches(result)["sub-02"] == "x02" and "left out" not in caplog.text


# ambiguity

def test_columns_that_group_alike_are_fine(tree):
    rows = {p: {**row, "scanner": row["site"] * 2} for p, row in SITES.items()}
    assert batches(find_runs(tree(rows)))["sub-01"] == "A"


@pytest.mark.parametrize("argv", [[], ["--participant-label", "02"]])
def test_site_and_scanner_that_differ_stop(tree, argv):
    """One participant of a job array must stop like the whole dataset does."""
    rows = {p: {**row, "scanner": f"s{p}"} for p, row in SITES.items()}
    bids = tree(rows)
    with pytest.raises(UsageError, match=r"ambiguous.*site.*scanner.*--batch-column"):
        find_runs(bids, *argv)
    assert sources(find_runs(bids, *argv, "--batch-column", "site")) == {"participants.tsv:site"}


def test_participants_and_sessions_that_differ_stop(tree):
    bids = tree({"01": {"site": "A"}}, ("01",), sessions=("a", "b"))
    sessions_tsv(bids, "01", {"a": {"site": "A"}, "b": {"site": "B"}})
    with pytest.raises(UsageError, match=r"sub-01 ses-b is ambiguous: sessions.tsv:site says 'B'"):
        find_runs(bids)
    named = batches(find_runs(bids, "--batch-column", "site"))
    assert named == {"sub-01_ses-a": "A", "sub-01_ses-b": "B"}, "the session knows better"


def test_some_without_a_site_stop(tree):
    bids = tree({**SITES, "03": {"site": "n/a"}})
    with pytest.raises(UsageError, match=r"1 of 3 runs have no batch, e.g. sub-03. Fill in"):
        find_runs(bids)
    assert run_names(find_runs(bids, "--participant-label", "01")) == ["sub-01"]


def test_column_without_values_is_no_column(tree):
    result = find_runs(tree({p: {"site": "n/a"} for p in ("01", "02", "03")}))
    assert sources(result) == {"scanner fields of the sidecar"}


@pytest.mark.parametrize("text,argv,message", [
    (None, [], "b.tsv: does not exist"),
    ("a\tb\n1\t2\n", [], "no column participant_id"),
    ("participant_id\ta\tb\nsub-01\t1\t2\n", [], "which of its columns a, b is the batch"),
    ("participant_id\ta\nsub-01\t1\n", ["--batch-column", "x"], "'x' has no value.*are a"),
    ("participant_id\ta\nsub-01\t1\nsub-01\t2\n", [], "two rows for sub-01 differ"),
    ("participant_id\ta\nsub-01\t1\n", [], "2 of 3 runs have no batch"),
])
def test_batch_file_that_cannot_be_used(tree, tmp_path, text, argv, message):
    if text:
        (tmp_path / "b.tsv").write_text(text)
    with pytest.raises(UsageError, match=message):
        find_runs(tree(), "--batch-file", tmp_path / "b.tsv", *argv)


def test_unknown_batch_column(tree):
    with pytest.raises(UsageError, match=r"'x' has no value.*there are age, sex"):
        find_runs(tree(), "--batch-column", "x")


def test_broken_participants_tsv(tree):
    bids = tree()
    (bids / "participants.tsv").write_text("subject,age\n01,3\n")
    with pytest.raises(UsageError, match=r"participants.tsv: has no column participant_id"):
        find_runs(bids)


def test_broken_sessions_tsv_is_its_participants_problem(tree):
    bids = tree(None, ("01", "02"), sessions=("a",))
    (bids / "sub-01/sub-01_sessions.tsv").write_text("visit\n1\n")
    result = find_runs(bids)
    assert "has no column session_id" in result.problems["01"][0]
    assert result.problems["02"] == [] and len(run_names(result)) == 2


# covariates

def test_covariates_are_typed(tree):
    row = {"age": "34", "height": "1.80", "sex": "F", "code": "007", "rate": "1e-3", "none": "n/a",
           "odd": "nan"}
    bids = tree({"01": row, "02": {"age": "5"}}, ("01", "02"))
    result = find_runs(bids)
    assert result.runs["01"][0].covariates == {"age": 34, "height": 1.8, "sex": "F", "code": "007",
                                               "rate": 0.001, "odd": "nan"}
    assert result.rows["02"].keys() == {"age", "batch"}


def test_descriptions_of_columns(tree, caplog):
    bids = tree()
    assert list(find_runs(bids).columns) == ["batch"]
    (bids / "participants.json").write_text(json.dumps({"age": {"Units": "year"}, "sex": 3}))
    assert find_runs(bids).columns["age"] == {"Units": "year"}
    (bids / "participants.json").write_text("{")
    assert list(find_runs(bids).columns) == ["batch"] and "participants.json" in caplog.text


def test_participant_with_problems_alone_has_a_row(tree):
    bids = tree()
    (bids / "sub-01/dwi/sub-01_dwi.bval").unlink()
    assert find_runs(bids).rows["01"] == {"age": 30, "sex": "F", "batch": "n/a"}


def test_rows_only_of_who_was_asked_for(tree):
    truth.write_participants(bids := tree(), SITES)
    assert list(find_runs(bids, "--participant-label", "03", "01").rows) == ["03", "01"]


def test_rows_with_surplus_cells(bids_tree):
    """An empty cell at the end does not shift the row; a filled one is refused."""
    bids = bids_tree(("01", "02"), rows={"01": {"age": 20, "site": "A"}, "02": {"age": 30,
                                                                                "site": "B"}})
    table = bids / "participants.tsv"
    lines = table.read_text().splitlines()
    table.write_text("\n".join([lines[0], *(f"{line}\t" for line in lines[1:])]) + "\n")
    batches = {r.batch for runs in find_runs(bids).runs.values() for r in runs}
    assert batches == {"A", "B"}
    table.write_text("\n".join([*lines[:2], f"{lines[2]}\tmore"]) + "\n")
    with pytest.raises(UsageError, match="line 3 has more cells"):
        find_runs(bids)


def test_columns_of_one_name(bids_tree):
    bids = bids_tree()
    (bids / "participants.tsv").write_text(
        "participant_id\tsite\tsite\nsub-01\tA\tB\nsub-02\tB\tA\n")
    with pytest.raises(UsageError, match="two columns are called 'site'"):
        find_runs(bids)
