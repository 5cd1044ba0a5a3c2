"""Find what can be processed: the runs of each participant, their masks, batches and covariates.

A run is one DWI file. Several files of one session are one run when they are one acquisition split
in parts: they differ in acq and run alone; share grid, affine, phase encoding, readout time and
echo time; and their b-tables complement each other. Files that repeat a b-table are repeated
measurements and stay apart, as do directions of phase encoding. Preprocessed runs of a session
replace its raw ones.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp.acquisition import B0_MAX, Acquisition
from bidsapp.bids import batch, corrections, preprocessed
from bidsapp.bids.btable import largest_b, read_acquisition
from bidsapp.bids.index import (
    description,
    files,
    index,
    label_order,
    participants,
    read_filters,
)
from bidsapp.bids.inherit import entities_of, ordered, read_part, sidecar
from bidsapp.dwi import Part, Run, open_image
from bidsapp.errors import DataError, UsageError
from bidsapp.options import Options

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3
"""Files whose affines differ by less (mm) lie on one grid."""

SAME_TENSOR = 0.05
"""b-tensors that differ by less than this share of their norm (2°, or 5 % of b) are the same."""


@dataclass(frozen=True)
class Inventory:
    """What there is to do.

    name, authors: the dataset's. participants: labels with runs or problems. runs, problems: of
    each of them; problems are messages about files that could not be used. unknown: labels asked
    for that do not exist. rows, columns: participants.tsv (covariates and batch) and its
    descriptions.
    """

    name: str
    authors: list[str]
    participants: list[str]
    runs: Mapping[str, list[Run]]
    problems: Mapping[str, list[str]]
    unknown: list[str]
    rows: Mapping[str, dict[str, Any]] = field(repr=False)
    columns: Mapping[str, dict[str, Any]] = field(repr=False)


def find(options: Options) -> Inventory:
    """The runs that the options ask for; notices and the table of batches go to the log.

    Raises:
        UsageError: BIDS_DIR, a derivative, the filter or a table of batches cannot be used; the
            batch is ambiguous; none of the participants asked for exists; there is no dMRI at all.
    """
    root = options.bids_dir.absolute()
    about = description(root, needed=not options.skip_bids_validation)
    filters = read_filters(options.bids_filter_file)
    asked = list(dict.fromkeys(s.removeprefix("sub-") for s in options.participant_label))
    sessions = {s.removeprefix("ses-") for s in options.session_label}

    trees, raw = list(options.derivatives), dict[str, list[Path]]()
    if about.get("DatasetType") == "derivative":
        trees.insert(0, ("raw", root))
    else:
        layout = index(root, participants=asked, validate=not options.skip_bids_validation,
                       database_dir=options.bids_database_dir)
        raw = preprocessed.by_label(files(layout, "dwi", filters))
    derivatives = [preprocessed.Tree.of(name, path, asked, filters) for name, path in trees]

    known = participants(root).union(*(tree.labels for tree in derivatives))
    unknown = [label for label in asked if label not in known]
    wanted = [p for p in asked if p in known] if asked else sorted(known, key=label_order)
    problems: dict[str, list[str]] = {label: [] for label in wanted}
    runs = {label: sorted(
        _participant(label, raw.get(label, []), root, derivatives, sessions, problems[label]),
        key=lambda run: label_order(run.name)) for label in wanted}
    nothing = [label for label in runs if not runs[label] and not problems[label]]
    if len(nothing) == len(runs):
        raise UsageError(_nothing(root, unknown, nothing, sessions, trees))
    if nothing and not asked:
        log.info("without dMRI%s: %s", f" in {_sessions(sessions)}" if sessions else "",
                 ", ".join(f"sub-{label}" for label in nothing))
    for label in nothing:
        problems[label] = [f"{root / f'sub-{label}'}: no DWI found. {_looked_for(sessions)}"] \
            if asked else []
    labels = [label for label in runs if runs[label] or problems[label]]
    batches = batch.Batches.read(root, labels, options.batch_file, options.batch_column, problems)
    resolved = iter(batches.resolve([run for label in labels for run in runs[label]]))
    anatomy = [*(tree.root for tree in derivatives), root]
    runs = {label: [preprocessed.with_anatomy(next(resolved), anatomy) for _ in runs[label]]
            for label in labels}
    authors = about.get("Authors")
    return Inventory(str(about.get("Name") or root.name),
                 [str(a) for a in authors] if isinstance(authors, list) else [], labels, runs,
                 problems, unknown, batches.rows(runs), batches.columns)


def _participant(label: str, raw: Sequence[Path], root: Path, trees: Sequence[preprocessed.Tree],
                 sessions: Collection[str], problems: list[str]) -> Iterator[Run]:
    """Preprocessed runs of the first tree that has any of a session; raw ones of other sessions."""
    taken: dict[str | None, str] = {}
    for tree in trees:
        for session, read in tree.sources(label):
            if taken.setdefault(session, tree.name) != tree.name:
                log.warning("sub-%s: %s holds session %s, too; %s comes first and is used.", label,
                            tree.name, session, taken[session])
            elif not sessions or session in sessions:
                try:
                    run = read()
                except DataError as error:
                    problems.append(str(error))
                    continue
                measured = [path for path in raw
                            if session in (None, entities_of(path.name).get("ses"))]
                yield _with_mask(_with_scanner(run, measured, root), trees)
    wanted = [p for p in raw if not sessions or entities_of(p.name).get("ses") in sessions]
    mine = [p for p in wanted if not taken.keys() & {None, entities_of(p.name).get("ses")}]
    if len(mine) < len(wanted):
        log.info("sub-%s: %d raw files are left out, for %s holds preprocessed ones.", label,
                 len(wanted) - len(mine), " and ".join(dict.fromkeys(taken.values())))
    for run in _raw_runs(mine, root, problems):
        yield _with_mask(run, trees)


def _with_scanner(run: Run, raw: Sequence[Path], root: Path) -> Run:
    """The run with what all raw sidecars of its session say of the scanner, where its own do not:
    most preprocessing tools do not copy it."""
    keys = {*batch.SCANNER, "InstitutionName"}
    if not raw or keys & run.metadata.keys():
        return run
    try:
        measured = [sidecar(path, root) for path in raw]
    except DataError as error:
        log.warning("%s: its scanner is not known: %s", run.name, error)
        return run
    scanner = {k: v for k, v in measured[0].items()
               if k in keys and all(other.get(k) == v for other in measured)}
    return replace(run, parts=tuple(replace(part, metadata={**scanner, **part.metadata})
                                    for part in run.parts))


def _with_mask(run: Run, trees: Sequence[preprocessed.Tree]) -> Run:
    masks = (tree.mask_of(run) for tree in trees)
    return run if run.mask else replace(run, mask=next((m for m in masks if m), None))


def _raw_runs(images: Sequence[Path], root: Path, problems: list[str]) -> Iterator[Run]:
    """One run per acquisition of a participant, without complex parts and lone b0 series."""
    parts = []
    for image in sorted(images, key=lambda path: label_order(path.name)):
        if entities_of(image.name).get("part", "mag") != "mag":
            log.info("%s: left out, only magnitude images are used.", image.name)
            continue
        try:
            parts.append(read_part(image, root))
        except DataError as error:
            problems.append(str(error))
    sessions = defaultdict(list)
    for group in _joined(parts):
        sessions[entities_of(group[0].image.name).get("ses")].append(group)
    for groups in sessions.values():
        candidates = corrections.read_session(groups[0][0].image.parent.parent, root, parts)
        weighted = [any(largest_b(part) >= B0_MAX for part in group) for group in groups]
        kept = [g for g, is_weighted in zip(groups, weighted, strict=True)
                if is_weighted or not any(weighted)]
        for group in groups:
            if group not in kept:
                log.info("%s: left out, it holds only b0 volumes (b < %g s/mm²) and stands beside "
                         "weighted runs.", ", ".join(p.image.name for p in group), B0_MAX)
        for entities, group in zip(_names(kept), kept, strict=True):
            if len(group) > 1:
                log.info("%s: one acquisition, joined in this order: %s.", group[0].image.name,
                         ", ".join(p.image.name for p in group))
            yield corrections.find_corrections(
                Run(entities, tuple(group), dataset=("raw", root)), root, candidates)


def _joined(parts: Sequence[Part]) -> list[list[Part]]:
    """Parts that are one acquisition, together and in order."""
    alike = defaultdict(list)
    for part in parts:
        alike[_key(part)].append(part)
    joined: list[list[Part]] = []
    for same in alike.values():
        if len(same) == 1:
            joined.append(same)
            continue
        groups: list[tuple[list[Part], list[Acquisition], Any]] = []
        for part in same:
            try:
                image = open_image(part.image)
                table = read_acquisition(part)
            except DataError:  # loading it will tell
                joined.append([part])
                continue
            for members, tables, first in groups:
                if (image.shape[:3] == first.shape[:3]
                        and np.allclose(image.affine, first.affine, rtol=0, atol=AFFINE_TOLERANCE)
                        and not any(repeats(table, other) for other in tables)):
                    members.append(part)
                    tables.append(table)
                    break
            else:
                groups.append(([part], [table], image))
        joined += [members for members, *_ in groups]
    return joined


def _key(part: Part) -> tuple[Any, ...]:
    """What the parts of one acquisition share, besides the grid.

    Where neither `dir` nor the sidecar tells the phase encoding, acq may stand for it (acq-AP), so
    that only `run` may differ.
    """
    entities = ordered(entities_of(part.image.name))
    facts = [part.metadata.get(k)
             for k in ("PhaseEncodingDirection", "TotalReadoutTime", "EchoTime")]
    unsure = facts[0] is None and "dir" not in entities
    split = ("run",) if unsure else ("acq", "run")
    return (tuple((k, v) for k, v in entities.items() if k not in split),
            *(round(f, 5) if isinstance(f, int | float) else str(f) for f in facts))


def repeats(a: Acquisition, b: Acquisition) -> bool:
    """Whether most weighted volumes of the shorter table stand in the other, too.

    The same volume is the same b-tensor: ‖B − B'‖ < 0.05 ‖B‖ (Frobenius).
    """
    few, many = sorted((t.btensors[~t.b0] for t in (a, b)), key=len)
    if not len(few):
        return False
    differences = np.linalg.norm(few[:, None] - many[None], axis=(2, 3))
    norms = np.linalg.norm(few, axis=(1, 2))
    return bool(np.mean(differences.min(axis=1) < SAME_TENSOR * norms) > 0.5)


def _names(groups: Sequence[Sequence[Part]]) -> Iterator[dict[str, str]]:
    """The entities on which the parts of a group agree; the first part's where another group
    would have that name, too."""
    own = [[ordered(entities_of(part.image.name)) for part in group] for group in groups]
    shared = [{k: v for k, v in es[0].items() if all(e.get(k) == v for e in es)} for es in own]
    for i, agreed in enumerate(shared):
        others = [e for j, es in enumerate(own) if j != i for e in (es[0], shared[j])]
        yield own[i][0] if agreed in others else agreed


def _nothing(root: Path, unknown: Sequence[str], nothing: Sequence[str],
             sessions: Collection[str], trees: Sequence[tuple[str, Path]]) -> str:
    places = ", ".join([str(root), *(str(path) for _, path in trees if path != root)])
    told = [f"no participant {', '.join(f'sub-{label}' for label in unknown)} exists in {places}."
            if unknown else ""]
    if nothing or not unknown:
        told.append(f"no dMRI found in {places}"
                    + (f" for {', '.join(f'sub-{s}' for s in nothing[:5])}" if nothing else "")
                    + f". {_looked_for(sessions)}")
    return " ".join(filter(None, told))


def _looked_for(sessions: Collection[str]) -> str:
    return ("Looked for sub-<label>/[ses-<label>/]dwi/*_dwi.nii[.gz] with a valid BIDS name"
            + (f" in {_sessions(sessions)}" if sessions else "")
            + ", passing --bids-filter-file where one is given. Check names, labels and filter.")


def _sessions(sessions: Collection[str]) -> str:
    return " or ".join(f"ses-{s}" for s in sorted(sessions))
