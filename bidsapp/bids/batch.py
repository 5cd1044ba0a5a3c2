"""The batch ("site") of every run, and the covariates of every participant.

In this order: --batch-file / --batch-column; columns `site` or `scanner` of participants.tsv or
sessions.tsv; a name of the scanner with a hash of Manufacturer, ManufacturersModelName,
DeviceSerialNumber, StationName, ReceiveCoilName and SoftwareVersions; InstitutionName; "unknown".
Two answers at one level that group the data differently stop the program.
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

from bidsapp.bids.inherit import here, read_json
from bidsapp.dwi import Run
from bidsapp.errors import DataError, UsageError

log = logging.getLogger(__name__)

COLUMNS = ("site", "scanner")
SCANNER = ("Manufacturer", "ManufacturersModelName", "DeviceSerialNumber", "StationName",
           "ReceiveCoilName", "SoftwareVersions")
RESERVED = ("participant", "session", "run", "batch")
"""Columns of the group table that say whose row it is: no covariate may have these names."""

SETTLE = "Name the column to use with --batch-column, or give a table with --batch-file."
BATCH = {"Description": "Batch (site) of the participant's runs; several are joined by commas"}
NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][-+]?\d+)?")

Key = tuple[str, str | None]
"""Participant and session label; session None: for every session."""
Rows = Mapping[Key, Mapping[str, str]]


@dataclass(frozen=True)
class Batches:
    """Tables that a person wrote about participants and sessions.

    covariates: participants.tsv with sessions.tsv. named: (batch, source) from the options or the
    columns site and scanner; the whole answer when not empty. columns: of participants.json.
    """

    covariates: Rows
    named: Mapping[Key, tuple[str, str]]
    columns: Mapping[str, dict[str, Any]]

    @classmethod
    def read(cls, root: Path, labels: Iterable[str], batch_file: Path | None,
             batch_column: str | None, problems: Mapping[str, list[str]]) -> Batches:
        """A sessions.tsv that cannot be read is added to its participant's problems, and so is a
        number that is too large, which then counts as missing.

        Raises:
            UsageError: another table is broken or lacks the column; the batch is ambiguous.
        """
        people = _table(root / "participants.tsv", "participant_id")
        visits: dict[Key, dict[str, str]] = {}
        for label in labels:
            try:
                visits |= _table(_sessions(root, label), "session_id", label)
            except UsageError as error:
                problems[label].append(str(error))
        _drop_too_large(people, problems, lambda label: root / "participants.tsv")
        _drop_too_large(visits, problems, partial(_sessions, root))
        tables: dict[str, Rows] = {"sessions.tsv": visits, "participants.tsv": people}
        columns: Sequence[str] = COLUMNS
        if batch_file:
            tables = {str(batch_file): _table(_given(batch_file), "participant_id")}
            columns = [batch_column or _only_column(tables[str(batch_file)], batch_file)]
        elif batch_column:
            columns = [batch_column]
        keys = {*people, *visits, *((label, None) for label in labels)}
        settled = columns is not COLUMNS
        found = [c for c in (_column(tables, column, keys, settled) for column in columns) if c]
        if settled and not found:
            there = sorted({c for rows in tables.values() for row in rows.values() for c in row})
            raise UsageError(f"no value of {columns[0]!r}, which is to be the batch, in "
                             f"{' or '.join(tables)}; the columns there are {', '.join(there)}. "
                             "Correct --batch-column or the table.")
        for a, b in itertools.combinations(found, 2):
            _same_groups(a, b)
        named = max(found, key=len, default={})
        return cls({k: {**people.get((k[0], None), {}), **people.get(k, {}), **visits.get(k, {})}
                    for k in keys}, named, _descriptions(root))

    def resolve(self, runs: Sequence[Run]) -> list[Run]:
        """The runs with batch, batch_source and covariates; the table of batches is logged.

        Raises:
            UsageError: some runs have a row with their batch and others have none.
        """
        if missing := [run.name for run in runs if self.named and not _at(self.named, run)]:
            source = next(iter(self.named.values()))[1]
            raise UsageError(f"{source}: {len(missing)} of {len(runs)} runs have no batch, e.g. "
                             f"{missing[0]}. Fill in their rows, leave them out with "
                             "--participant-label or --session-label, or give a table with "
                             "--batch-file.")
        sites = {*COLUMNS, *(source.rpartition(":")[2] for _, source in self.named.values())}
        left_out = {*RESERVED} - sites
        if taken := sorted(left_out.intersection(set().union(*self.covariates.values()))):
            log.warning("participants.tsv or sessions.tsv: the group table has columns of its own "
                        "called %s, so yours are left out. Rename them to have them as "
                        "covariates%s.", ", ".join(taken), "; if batch is the site, give "
                        "--batch-column batch" if "batch" in taken else "")
        out = []
        for run in runs:
            name, source = _at(self.named, run) or _scanner(run.metadata)
            row = _at(self.covariates, run) or {}
            out.append(replace(run, batch=name, batch_source=source,
                               covariates={k: _typed(v) for k, v in row.items()
                                           if k not in sites | left_out}))
        _log_table(out)
        return out

    def rows(self, runs: Mapping[str, Sequence[Run]]) -> dict[str, dict[str, Any]]:
        """Rows of participants.tsv by label: covariates of all sessions, and the batch."""
        return {label: {**{k: _typed(v) for k, v in self.covariates[label, None].items()},
                        "batch": ",".join(sorted({run.batch for run in mine})) or "n/a"}
                for label, mine in runs.items()}


def _at(table: Mapping[Key, Any], run: Run) -> Any:
    key = (run.participant, run.session)
    return table[key] if key in table else table.get((run.participant, None))


def _column(tables: Mapping[str, Rows], column: str, keys: Iterable[Key], settled: bool
            ) -> dict[Key, tuple[str, str]]:
    """(value, source) by key, from the first table that knows it.

    Raises UsageError: another table gives another value, and nobody has `settled` it by name.
    """
    found: dict[Key, tuple[str, str]] = {}
    for key in keys:
        for name, rows in tables.items():
            row = {**rows.get((key[0], None), {}), **rows.get(key, {})}
            if column not in row:
                continue
            value, source = found.setdefault(key, (row[column], f"{name}:{column}"))
            if value != row[column] and not settled:
                raise UsageError(f"the batch of sub-{key[0]}{f' ses-{key[1]}' if key[1] else ''} "
                                 f"is ambiguous: {source} says {value!r}, {name}:{column} says "
                                 f"{row[column]!r}. Correct one of them. {SETTLE}")
    return found


def _same_groups(a: Mapping[Key, tuple[str, str]], b: Mapping[Key, tuple[str, str]]) -> None:
    """Raises UsageError unless values of a and b, where both are known, pair one to one."""
    one: dict[str, Key] = {}
    other: dict[str, Key] = {}
    for key in sorted(a.keys() & b.keys(), key=str):
        (x, source), (y, second) = a[key], b[key]
        for seen in (one.setdefault(x, key), other.setdefault(y, key)):
            if (a[seen][0], b[seen][0]) != (x, y):
                raise UsageError(
                    f"the batch is ambiguous: {source} and {second} group the participants "
                    f"differently, {a[seen][0]!r} and {b[seen][0]!r} for sub-{seen[0]} but {x!r} "
                    f"and {y!r} for sub-{key[0]}. {SETTLE}")


def _scanner(metadata: Mapping[str, Any]) -> tuple[str, str]:
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
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-")


def _log_table(runs: Sequence[Run]) -> None:
    batches = defaultdict(list)
    for run in runs:
        batches[run.batch, run.batch_source].append(run)
    for (name, source), members in sorted(batches.items()):
        people = dict.fromkeys(f"sub-{run.participant}" for run in members)
        shown = ", ".join(itertools.islice(people, 5)) + (" …" if len(people) > 5 else "")
        log.info("batch %s (%s): %d run(s) of %d participant(s): %s", name, source, len(members),
                 len(people), shown)
    if any(run.batch_source == "none found" for run in runs):
        log.warning("no site, scanner or institution is known of some runs: their batch is "
                    "\"unknown\". Add a column `site` to participants.tsv, or give --batch-file.")


def _only_column(rows: Rows, path: Path) -> str:
    columns = {c for row in rows.values() for c in row}
    for choice in (columns, columns & {*COLUMNS, "batch"}):
        if len(choice) == 1:
            return next(iter(choice))
    raise UsageError(f"--batch-file {path}: which of its columns {', '.join(sorted(columns))} is "
                     "the batch? Name it with --batch-column.")


def _given(path: Path) -> Path:
    try:
        return here(path)
    except DataError as error:
        raise UsageError(f"--batch-file {error}") from error


def _table(path: Path, identifier: str, participant: str = "") -> dict[Key, dict[str, str]]:
    """Rows by participant and session, labels without prefix, n/a and empty cells left out."""
    if not path.exists():
        return {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, delimiter="\t")
            columns, records = list(reader.fieldnames or ()), list(reader)
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"{path}: cannot be read as a table ({error}). It must be a text file "
                         "with columns apart by tabs.") from error
    if identifier not in columns:
        raise UsageError(f"{path}: has no column {identifier} (found: {', '.join(columns)}). Name "
                         "it so; columns are apart by tabs.")
    if twice := [c for c, n in Counter(columns).items() if n > 1]:
        raise UsageError(f"{path}: two columns are called {twice[0]!r}. Rename or remove one.")
    rows: dict[Key, dict[str, str]] = {}
    for number, record in enumerate(records, 2):
        if any(cell.strip() for cell in record.pop(None, ())):
            raise UsageError(f"{path}: line {number} has more cells than there are columns "
                             f"({len(columns)}). Correct it; columns are apart by tabs.")
        row = {k: v.strip() for k, v in record.items()
               if v is not None and v.strip() not in ("", "n/a")}
        session = row.pop("session_id", None)
        person = participant or row.pop("participant_id", "")
        key = (person.removeprefix("sub-"), session.removeprefix("ses-") if session else None)
        if rows.setdefault(key, row) != row:
            raise UsageError(f"{path}: two rows for {person}{f' {session}' if session else ''} "
                             "differ. Leave one, or tell them apart by session_id.")
    return rows


def _sessions(root: Path, label: str) -> Path:
    return root / f"sub-{label}" / f"sub-{label}_sessions.tsv"


def _drop_too_large(rows: Mapping[Key, dict[str, str]], problems: Mapping[str, list[str]],
                    table: Callable[[str], Path]) -> None:
    """Remove numbers that no float holds, and add a message on each to its participant's problems.

    table: label to the file that the rows were read from.
    """
    for (label, session), row in rows.items():
        for column, value in [*row.items()]:
            if NUMBER.fullmatch(value) and not math.isfinite(float(value)):
                del row[column]
                problems.get(label, []).append(
                    f"{table(label)}: {column} of sub-{label}{f' ses-{session}' if session else ''}"
                    f" is {value[:12]}…, a number of {len(value)} characters, which is too large. "
                    "Correct it, or write n/a.")


def _descriptions(root: Path) -> dict[str, dict[str, Any]]:
    path, found = root / "participants.json", {}
    if path.exists():
        try:
            found = {k: v for k, v in read_json(path).items() if isinstance(v, dict)}
        except DataError as error:
            log.warning("%s Its descriptions are left out.", error)
    return {**found, "batch": BATCH}


def _typed(value: str) -> Any:
    """A number where the text is one, else the text: 007 stays a label, and so does an integer that
    no table holds in 64 bits."""
    match = NUMBER.fullmatch(value)
    if not match:
        return value
    if match[2] or match[3]:
        return float(value)
    return int(value) if len(value) < 19 else value
