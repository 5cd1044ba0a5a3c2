"""Find the batch (site) of each run, and the covariates of each participant.

The batch is the first of the following that is available:
1. --batch-file: its column --batch-column or, without this option, its only column, or its only one
   that is called site, scanner or batch;
2. the column --batch-column of sessions.tsv or else of participants.tsv;
3. the column `site` or `scanner` of these two tables, or that with more values if there are both;
4. the name of the scanner, with a hash of Manufacturer, ManufacturersModelName,
   DeviceSerialNumber, StationName, ReceiveCoilName and SoftwareVersions in the sidecar;
5. InstitutionName in the sidecar;
6. "unknown".
Under 3, the program stops if the two tables differ in a value, or if site and scanner group the
data differently. If a table gives any batch (1 to 3), it must give that of every run.
"""

from __future__ import annotations

import csv
import hashlib
import itertools
import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from bidsapp.bids.inherit import read_json, require_file
from bidsapp.dwi import Run
from bidsapp.errors import DataError, UsageError

log = logging.getLogger(__name__)

COLUMNS = ("site", "scanner")
"""Columns of participants.tsv and sessions.tsv that name the batch."""

SCANNER = ("Manufacturer", "ManufacturersModelName", "DeviceSerialNumber", "StationName",
           "ReceiveCoilName", "SoftwareVersions")
"""Sidecar keys that identify a scanner."""

RESERVED = ("participant", "session", "run", "batch")
"""Columns of the group table that identify a row. Columns of the input with these names are not
covariates."""

REMEDY = "Name the column to use with --batch-column, or give a table with --batch-file."
BATCH = {"Description": "Batch (site) of the participant's runs; several are joined by commas"}
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")

Key = tuple[str, str | None]
"""Labels of a participant and a session; None means all sessions."""

Rows = Mapping[Key, Mapping[str, str]]
"""Cells by column, for each participant and session; empty cells and n/a are left out."""


@dataclass(frozen=True)
class Batches:
    """The batches and covariates that the tables of a dataset give.

    Parameters
    ----------
    covariates : Rows
        Rows of participants.tsv, joined with those of sessions.tsv, which take precedence.
    named : mapping
        Batch and its source (TABLE:COLUMN) by participant and session, from the options or the
        columns site and scanner. If it is not empty, no sidecar is used.
    columns : mapping
        Descriptions of the columns, from participants.json, and of `batch`.
    """

    covariates: Rows
    named: Mapping[Key, tuple[str, str]]
    columns: Mapping[str, dict[str, Any]]

    @classmethod
    def read(cls, root: Path, labels: Iterable[str], batch_file: Path | None,
             batch_column: str | None, problems: Mapping[str, list[str]]) -> Batches:
        """Read the tables of a dataset.

        Parameters
        ----------
        root : Path
            Root of the dataset.
        labels : iterable of str
            Labels of the participants.
        batch_file, batch_column
            The options of these names.
        problems : mapping
            Messages by participant, to which this adds: a sessions.tsv that cannot be read, and
            numbers that are too large, which then count as missing.

        Raises
        ------
        UsageError
            participants.tsv or --batch-file cannot be read or lacks the column, or the batch is
            ambiguous.
        """
        participants = _read_table(root / "participants.tsv", "participant_id")
        sessions: dict[Key, dict[str, str]] = {}
        for label in labels:
            try:
                sessions |= _read_table(_sessions_tsv(root, label), "session_id", label)
            except UsageError as error:
                problems[label].append(str(error))
        _drop_too_large(participants, problems, lambda label: root / "participants.tsv")
        _drop_too_large(sessions, problems, partial(_sessions_tsv, root))
        tables: dict[str, Rows] = {"sessions.tsv": sessions, "participants.tsv": participants}
        columns: Sequence[str] = COLUMNS
        if batch_file:
            tables = {str(batch_file): _read_table(_require_batch_file(batch_file),
                                                   "participant_id")}
            columns = [batch_column or _only_column(tables[str(batch_file)], batch_file)]
        elif batch_column:
            columns = [batch_column]
        keys = {*participants, *sessions, *((label, None) for label in labels)}
        explicit = columns is not COLUMNS
        values = [c for c in (_column(tables, column, keys, explicit) for column in columns) if c]
        if explicit and not values:
            present = sorted({c for rows in tables.values() for row in rows.values() for c in row})
            raise UsageError(f"the batch column {columns[0]!r} has no value in "
                             f"{' or '.join(tables)}; the columns there are {', '.join(present)}. "
                             "Correct --batch-column or the table.")
        for a, b in itertools.combinations(values, 2):
            _require_same_groups(a, b)
        named = max(values, key=len, default={})
        return cls({k: {**participants.get((k[0], None), {}), **participants.get(k, {}),
                        **sessions.get(k, {})} for k in keys}, named, _read_descriptions(root))

    def assign(self, runs: Sequence[Run]) -> list[Run]:
        """Add batch, batch_source and covariates to runs, and log the table of batches.

        Parameters
        ----------
        runs : sequence of Run
            Runs of any participants.

        Returns
        -------
        list of Run
            The runs in the same order.

        Raises
        ------
        UsageError
            Some runs have a batch in the tables, and others have none.
        """
        if missing := [run.name for run in runs if self.named and not _look_up(self.named, run)]:
            source = next(iter(self.named.values()))[1]
            raise UsageError(f"{source}: {len(missing)} of {len(runs)} runs have no batch, e.g. "
                             f"{missing[0]}. Fill in their rows, leave them out with "
                             "--participant-label or --session-label, or give a table with "
                             "--batch-file.")
        batch_columns = {*COLUMNS,
                         *(source.rpartition(":")[2] for _, source in self.named.values())}
        left_out = {*RESERVED} - batch_columns
        if reserved := sorted(left_out.intersection(set().union(*self.covariates.values()))):
            log.warning("participants.tsv or sessions.tsv: the columns %s are left out, since the "
                        "group table uses these names. Rename them to have them as "
                        "covariates%s.", ", ".join(reserved), "; if batch is the site, give "
                        "--batch-column batch" if "batch" in reserved else "")
        assigned = []
        for run in runs:
            name, source = _look_up(self.named, run) or _name_scanner(run.metadata)
            row = _look_up(self.covariates, run) or {}
            assigned.append(replace(run, batch=name, batch_source=source,
                                    covariates={k: _convert(v) for k, v in row.items()
                                                if k not in batch_columns | left_out}))
        _log_table(assigned)
        return assigned

    def rows(self, runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
        """Make the rows of the output's participants.tsv: those of the input, and the batches.

        Values of single sessions are left out.

        Parameters
        ----------
        runs : mapping
            Runs by label of the participant.

        Returns
        -------
        dict
            Cells by column, by label.
        """
        return {label: {**{k: _convert(v) for k, v in self.covariates[label, None].items()},
                        "batch": ",".join(sorted({run.batch for run in group})) or "n/a"}
                for label, group in runs.items()}


def _look_up(table: Mapping[Key, Any], run: Run) -> Any:
    """The entry of the run's session or, if there is none, of its participant."""
    key = (run.participant, run.session)
    return table[key] if key in table else table.get((run.participant, None))


def _column(tables: Mapping[str, Rows], column: str, keys: Iterable[Key], explicit: bool
            ) -> dict[Key, tuple[str, str]]:
    """Find value and source (TABLE:COLUMN) of a column by key, from the first table that has one.

    Raises UsageError if tables disagree, unless an option named the column (explicit).
    """
    values: dict[Key, tuple[str, str]] = {}
    for key in keys:
        for name, rows in tables.items():
            row = {**rows.get((key[0], None), {}), **rows.get(key, {})}
            if column not in row:
                continue
            value, source = values.setdefault(key, (row[column], f"{name}:{column}"))
            if value != row[column] and not explicit:
                raise UsageError(f"the batch of sub-{key[0]}{f' ses-{key[1]}' if key[1] else ''} "
                                 f"is ambiguous: {source} says {value!r}, {name}:{column} says "
                                 f"{row[column]!r}. Correct one of them. {REMEDY}")
    return values


def _require_same_groups(a: Mapping[Key, tuple[str, str]], b: Mapping[Key, tuple[str, str]]
                         ) -> None:
    """Raise UsageError unless two columns group their common keys alike, whatever their values."""
    first_x: dict[str, Key] = {}
    first_y: dict[str, Key] = {}
    for key in sorted(a.keys() & b.keys(), key=str):
        (x, source), (y, second) = a[key], b[key]
        for earlier in (first_x.setdefault(x, key), first_y.setdefault(y, key)):
            if (a[earlier][0], b[earlier][0]) != (x, y):
                raise UsageError(
                    f"the batch is ambiguous: {source} and {second} group the participants "
                    f"differently, {a[earlier][0]!r} and {b[earlier][0]!r} for sub-{earlier[0]} "
                    f"but {x!r} and {y!r} for sub-{key[0]}. {REMEDY}")


def _name_scanner(metadata: Mapping[str, Any]) -> tuple[str, str]:
    """Derive name and source of the batch from the sidecar."""
    fields = {k: str(metadata[k]).strip() for k in SCANNER if metadata.get(k)}
    if fields:
        maker, model = (fields.get(k, "") for k in SCANNER[:2])
        label = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
        digest = hashlib.sha256(repr(sorted(fields.items())).encode()).hexdigest()[:6]
        return _slug(f"{label or 'scanner'} {digest}"), "scanner fields of the sidecar"
    if metadata.get("InstitutionName"):
        return _slug(str(metadata["InstitutionName"])), "InstitutionName"
    return "unknown", "none found"


def _slug(text: str) -> str:
    """Replace everything but letters and digits by hyphens."""
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-")


def _log_table(runs: Sequence[Run]) -> None:
    batches = defaultdict(list)
    for run in runs:
        batches[run.batch, run.batch_source].append(run)
    for (name, source), members in sorted(batches.items()):
        participants = dict.fromkeys(f"sub-{run.participant}" for run in members)
        examples = ", ".join(itertools.islice(participants, 5))
        log.info("batch %s (%s): %d run(s) of %d participant(s): %s%s", name, source, len(members),
                 len(participants), examples, " …" if len(participants) > 5 else "")
    if any(run.batch_source == "none found" for run in runs):
        log.warning("the site, scanner and institution of some runs are not known, so their batch "
                    "is \"unknown\". Add a column `site` to participants.tsv, or give "
                    "--batch-file.")


def _only_column(rows: Rows, path: Path) -> str:
    columns = {c for row in rows.values() for c in row}
    for choice in (columns, columns & {*COLUMNS, "batch"}):
        if len(choice) == 1:
            return next(iter(choice))
    raise UsageError(f"--batch-file {path}: which of its columns {', '.join(sorted(columns))} is "
                     "the batch? Name it with --batch-column.")


def _require_batch_file(path: Path) -> Path:
    try:
        return require_file(path)
    except DataError as error:
        raise UsageError(f"--batch-file {error}") from error


def _read_table(path: Path, identifier: str, participant: str = "") -> dict[Key, dict[str, str]]:
    """Read the rows of a TSV; {} if there is none.

    identifier: column that must exist. participant: whose rows they all are, for a sessions.tsv.
    """
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t")
            columns, records = list(reader.fieldnames or ()), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a table ({error}). It must be a text file "
                         "with columns separated by tabs.") from error
    if identifier not in columns:
        raise UsageError(f"{path}: has no column {identifier} (found: {', '.join(columns)}). Add "
                         "this column; columns must be separated by tabs.")
    if duplicates := [c for c, n in Counter(columns).items() if n > 1]:
        raise UsageError(f"{path}: two columns are called {duplicates[0]!r}. Rename or remove one.")
    rows: dict[Key, dict[str, str]] = {}
    for number, record in enumerate(records, 2):
        if any(cell.strip() for cell in record.pop(None, ())):
            raise UsageError(f"{path}: line {number} has more cells than there are columns "
                             f"({len(columns)}). Correct it; columns must be separated by tabs.")
        row = {k: v.strip() for k, v in record.items()
               if v is not None and v.strip() not in ("", "n/a")}
        session = row.pop("session_id", None)
        person = participant or row.pop("participant_id", "")
        key = (person.removeprefix("sub-"), session.removeprefix("ses-") if session else None)
        if rows.setdefault(key, row) != row:
            raise UsageError(f"{path}: two rows for {person}{f' {session}' if session else ''} "
                             "differ. Remove one, or add a column session_id.")
    return rows


def _sessions_tsv(root: Path, label: str) -> Path:
    return root / f"sub-{label}" / f"sub-{label}_sessions.tsv"


def _drop_too_large(rows: Mapping[Key, dict[str, str]], problems: Mapping[str, list[str]],
                    table: Callable[[str], Path]) -> None:
    """Remove numbers that exceed the range of float, and add a message on each to `problems`.

    table: label → file that the rows were read from.
    """
    for (label, session), row in rows.items():
        for column, value in [*row.items()]:
            if NUMBER.fullmatch(value) and not math.isfinite(float(value)):
                del row[column]
                problems.get(label, []).append(
                    f"{table(label)}: {column} of sub-{label}{f' ses-{session}' if session else ''}"
                    f" is {value[:12]}…, a number of {len(value)} characters, which is too large. "
                    "Correct it, or write n/a.")


def _read_descriptions(root: Path) -> dict[str, dict[str, Any]]:
    path, descriptions = root / "participants.json", {}
    if path.exists():
        try:
            descriptions = {k: v for k, v in read_json(path).items() if isinstance(v, dict)}
        except DataError as error:
            log.warning("%s Its descriptions are left out.", error)
    return {**descriptions, "batch": BATCH}


def _convert(value: str) -> Any:
    """Convert a text to a number if it is one; 007, and integers beyond 64 bits, stay texts."""
    match = NUMBER.fullmatch(value)
    if not match:
        return value
    if match[2] or match[3]:
        return float(value)
    return int(value) if len(value) < 19 else value
