"""The batch ("site") of every run, and the covariates of every participant.

In this order: --batch-file / --batch-column; columns `site` or `scanner` of participants.tsv or
sessions.tsv; a name of the scanner with a hash of Manufacturer, ManufacturersModelName,
DeviceSerialNumber, StationName, ReceiveCoilName and SoftwareVersions; InstitutionName; "unknown".
Two answers at one level that group the runs differently stop the program.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from bidsapp.dwi import Run
from bidsapp.errors import UsageError

COLUMNS = ("site", "scanner")
SCANNER = ("Manufacturer", "ManufacturersModelName", "DeviceSerialNumber", "StationName",
           "ReceiveCoilName", "SoftwareVersions")
SETTLE = "Name the column to use with --batch-column, or give a table with --batch-file."

Key = tuple[str, str | None]
"""participant and session label; session None: the row holds for every session."""


def resolve(runs: Sequence[Run], root: Path, *, batch_file: Path | None = None,
            batch_column: str | None = None) -> tuple[list[Run], pd.DataFrame]:
    """The runs with batch, batch_source and covariates; and the table of them to print.

    Raises:
        UsageError: a table is broken or lacks a row or the column; two tables, columns or rows
            give different batches.
    """
    people = _table(root / "participants.tsv", "participant_id")
    visits: dict[Key, dict[str, str]] = {}
    for p in {run.participant for run in runs}:
        rows = _table(root / f"sub-{p}" / f"sub-{p}_sessions.tsv", "session_id", participant=p)
        visits |= rows
    given = _given(runs, root, people, visits, batch_file, batch_column)
    out = []
    for run in runs:
        source, name = given.get(run.name) or _scanner(run.metadata)
        row = people.get((run.participant, None), {}) | visits.get(_key(run), {})
        out.append(replace(run, batch=name, batch_source=source,
                           covariates={k: _typed(v) for k, v in row.items()}))
    table = pd.DataFrame(
        [(f"sub-{r.participant}", f"ses-{r.session}" if r.session else "n/a", r.name, r.batch,
          r.batch_source) for r in out],
        columns=["participant_id", "session_id", "run", "batch", "source"])
    return out, table


def _given(runs: Sequence[Run], root: Path, people: Mapping[Key, dict[str, str]],
           visits: Mapping[Key, dict[str, str]], batch_file: Path | None,
           batch_column: str | None) -> dict[str, tuple[str, str]]:
    """(source, batch) by run name, from tables that a person wrote; {} where there is none."""
    if batch_file is not None:
        rows = _table(batch_file, "participant_id", needed=True)
        column = batch_column or _only_column(rows, batch_file)
        candidates = {f"{batch_file.name}:{column}": _column(runs, rows, column)}
        required = f"--batch-file {batch_file}, column {column!r}"
    else:
        tables = {"participants.tsv": people, "sessions.tsv": visits}
        columns = (batch_column,) if batch_column else COLUMNS
        candidates = {f"{name}:{c}": _column(runs, rows, c)
                      for name, rows in reversed(tables.items()) for c in columns}
        if batch_column is None:
            _equivalent({f"participants.tsv:{c}": {k: r[c] for k, r in people.items() if c in r}
                         for c in COLUMNS})
        required = f"--batch-column {batch_column}" if batch_column else ""
    candidates = {source: values for source, values in candidates.items() if values}
    if not candidates:
        if required:
            raise UsageError(f"{required}: no value for any run was found. Present are the columns "
                             f"{', '.join(sorted({c for r in people.values() for c in r}))} of "
                             "participants.tsv.")
        return {}
    _equivalent(candidates)
    source = max(candidates, key=lambda s: len(candidates[s]))
    chosen = candidates[source]
    same_name = {s: v for s, v in candidates.items() if s.split(":")[1] == source.split(":")[1]}
    out: dict[str, tuple[str, str]] = {}
    for run in runs:
        name = next((v[run.name] for v in same_name.values() if run.name in v), None)
        if name is not None:
            out[run.name] = (source if run.name in chosen else next(
                s for s, v in same_name.items() if run.name in v), name)
    missing = [run.name for run in runs if run.name not in out]
    if missing:
        raise UsageError(f"{required or source}: {len(missing)} of {len(runs)} runs have no batch, "
                         f"e.g. {missing[0]}. Fill in their rows, leave them out with "
                         "--participant-label, or give a table with --batch-file.")
    return out


def _column(runs: Iterable[Run], rows: Mapping[Key, dict[str, str]], column: str
            ) -> dict[str, str]:
    found = {}
    for run in runs:
        row = rows.get(_key(run)) or rows.get((run.participant, None)) or {}
        if column in row:
            found[run.name] = row[column]
    return found


def _equivalent(candidates: Mapping[str, Mapping[Any, str]]) -> None:
    """Every two sources group what both know alike; of one column, they give equal values."""
    for (a, left), (b, right) in itertools.combinations(candidates.items(), 2):
        pairs = {(left[k], right[k]): k for k in left.keys() & right.keys()}
        same_column = a.split(":")[1] == b.split(":")[1]
        clash = [(x, y) for x, y in sorted(pairs)
                 if (same_column and x != y)
                 or any((x == u) != (y == v) for u, v in pairs)]
        if clash:
            x, y = clash[0]
            who = pairs[x, y]
            who = who if isinstance(who, str) else f"sub-{who[0]}"
            raise UsageError(f"the batch is ambiguous: {a} and {b} group the data differently, "
                             f"e.g. {x!r} and {y!r} for {who}. {SETTLE}")


def _scanner(metadata: Mapping[str, Any]) -> tuple[str, str]:
    fields = {k: str(metadata[k]).strip() for k in SCANNER if metadata.get(k)}
    if fields:
        maker, model = (fields.get(k, "") for k in SCANNER[:2])
        label = model if model.lower().startswith(maker.lower()) else f"{maker} {model}"
        digest = hashlib.sha1(repr(sorted(fields.items())).encode()).hexdigest()[:6]
        return "scanner fields of the sidecar", _slug(f"{label or 'scanner'} {digest}")
    if metadata.get("InstitutionName"):
        return "InstitutionName", _slug(str(metadata["InstitutionName"]))
    return "none found", "unknown"


def _slug(text: str) -> str:
    return re.sub(r"[^0-9A-Za-z]+", "-", text).strip("-")


def _key(run: Run) -> Key:
    return run.participant, run.session


def _only_column(rows: Mapping[Key, dict[str, str]], path: Path) -> str:
    columns = {c for row in rows.values() for c in row}
    for choice in (columns, columns & {*COLUMNS, "batch"}):
        if len(choice) == 1:
            return next(iter(choice))
    raise UsageError(f"--batch-file {path}: which of its columns {', '.join(sorted(columns))} is "
                     "the batch? Name it with --batch-column.")


def _table(path: Path, identifier: str, *, participant: str = "", needed: bool = False
           ) -> dict[Key, dict[str, str]]:
    """Rows by participant and session, labels without prefix, n/a and empty cells left out."""
    if not path.exists() and not needed:
        return {}
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as a table ({error}). It must be a text file "
                         "with columns apart by tabs.") from error
    if identifier not in table:
        raise UsageError(f"{path}: has no column {identifier} (found: {', '.join(table)}). Name "
                         "it so; columns are apart by tabs.")
    rows: dict[Key, dict[str, str]] = {}
    for record in table.to_dict("records"):
        row = {str(k): v.strip() for k, v in record.items()
               if isinstance(v, str) and v.strip() not in ("", "n/a")}
        session = row.pop("session_id", None)
        person = participant or row.pop("participant_id", "")
        key = (person.removeprefix("sub-"), session.removeprefix("ses-") if session else None)
        if key in rows and rows[key] != row:
            raise UsageError(f"{path}: two rows for {person}{f' {session}' if session else ''} "
                             "differ. Leave one, or tell them apart by session_id.")
        rows[key] = row
    return rows


def _typed(value: str) -> Any:
    """int or float where the text is one, else the text."""
    if re.fullmatch(r"-?(0|[1-9]\d*)", value):
        return int(value)
    try:
        number = float(value)
    except ValueError:
        return value
    return number if math.isfinite(number) and not value.startswith("0") or "." in value \
        else value
