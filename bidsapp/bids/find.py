"""Find the runs of each participant, with their masks, batches and covariates.

A run is usually one DWI file. Several files of a session are one run if they are one acquisition
split into parts: their names differ only in acq and run; they share grid, affine, phase encoding,
readout time and echo time; and their gradient tables complement each other. Files that repeat a
gradient table are repeated measurements and remain separate runs, as do files with different phase
encoding. If a derivative has preprocessed runs of a session, the raw runs of the session are not
used.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp.acquisition import B0_MAX, Acquisition, PhaseEncoding
from bidsapp.bids import batch, corrections, preprocessed
from bidsapp.bids.btable import largest_b, read_acquisition
from bidsapp.bids.index import (
    build_index,
    find_files,
    label_order,
    list_participants,
    read_description,
    read_filters,
)
from bidsapp.bids.inherit import entities_of, ordered, read_part, read_sidecar
from bidsapp.dwi import Part, Run, open_image
from bidsapp.errors import DataError, UsageError
from bidsapp.options import Options

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3
"""Largest difference between the affines of files on one grid, in mm."""

SAME_TENSOR = 0.05
"""Largest difference between equal b-tensors, as a share of their norm (about 2°, or 5 % of b)."""


@dataclass(frozen=True)
class Inventory:
    """The runs that can be processed.

    Parameters
    ----------
    name, authors
        Name and authors of the dataset.
    participants : list of str
        Labels of the participants with runs or problems.
    runs, problems : mapping
        Runs, and messages about files that could not be used, by participant.
    unknown : list of str
        Labels of --participant-label that do not exist.
    rows, columns : mapping
        Rows of participants.tsv (covariates and batch) by participant, and descriptions of its
        columns.
    """

    name: str
    authors: list[str]
    participants: list[str]
    runs: Mapping[str, list[Run]]
    problems: Mapping[str, list[str]]
    unknown: list[str]
    rows: Mapping[str, dict[str, Any]] = field(repr=False)
    columns: Mapping[str, dict[str, Any]] = field(repr=False)


def find_runs(options: Options) -> Inventory:
    """Find the runs that the options select, and log the batches and what is left out.

    Parameters
    ----------
    options : Options
        Options of the command line.

    Returns
    -------
    Inventory

    Raises
    ------
    UsageError
        BIDS_DIR, a derivative, the filter or a table of batches cannot be used; the batch is
        ambiguous; none of the given participants exists; or there is no dMRI at all.
    """
    root = options.bids_dir.absolute()
    about = read_description(root, needed=not options.skip_bids_validation)
    filters = read_filters(options.bids_filter_file)
    given = list(dict.fromkeys(s.removeprefix("sub-") for s in options.participant_label))
    sessions = {s.removeprefix("ses-") for s in options.session_label}

    folders, raw = list(options.derivatives), dict[str, list[Path]]()
    if about.get("DatasetType") == "derivative":
        folders.insert(0, ("raw", root))
    else:
        layout = build_index(root, participants=given, validate=not options.skip_bids_validation,
                             database_dir=options.bids_database_dir)
        raw = preprocessed.by_label(find_files(layout, "dwi", filters))
    derivatives = [preprocessed.Derivative.read(name, path, given, filters)
                   for name, path in folders]

    existing = list_participants(root).union(*(d.labels for d in derivatives))
    unknown = [label for label in given if label not in existing]
    selected = [p for p in given if p in existing] if given else sorted(existing, key=label_order)
    problems: dict[str, list[str]] = {label: [] for label in selected}
    runs = {label: sorted(
        _participant_runs(label, raw.get(label, []), root, derivatives, sessions, problems[label],
                          options.merge_distortion_groups),
        key=lambda run: label_order(run.name)) for label in selected}
    empty = [label for label in runs if not runs[label] and not problems[label]]
    if len(empty) == len(runs):
        raise UsageError(_describe_nothing(root, unknown, empty, sessions, folders))
    if empty and not given:
        log.info("without dMRI%s: %s", f" in {_describe_sessions(sessions)}" if sessions else "",
                 ", ".join(f"sub-{label}" for label in empty))
    for label in empty:
        problems[label] = [f"{root / f'sub-{label}'}: no DWI found. {_describe_search(sessions)}"] \
            if given else []
    labels = [label for label in runs if runs[label] or problems[label]]
    batches = batch.Batches.read(root, labels, options.batch_file, options.batch_column, problems)
    with_batch = iter(batches.assign([run for label in labels for run in runs[label]]))
    roots = [*(d.root for d in derivatives), root]
    runs = {label: [preprocessed.with_anatomy(next(with_batch), roots) for _ in runs[label]]
            for label in labels}
    authors = about.get("Authors")
    return Inventory(str(about.get("Name") or root.name),
                 [str(a) for a in authors] if isinstance(authors, list) else [], labels, runs,
                 problems, unknown, batches.rows(runs), batches.columns)


def _participant_runs(label: str, raw: Sequence[Path], root: Path,
                      derivatives: Sequence[preprocessed.Derivative],
                      sessions: Collection[str], problems: list[str], merge: bool
                      ) -> Iterator[Run]:
    """Yield the preprocessed runs of a participant, then the raw runs of other sessions.

    If several derivatives have runs of a session, those of the first are used. One whose runs have
    no session replaces the raw runs of all sessions. A preprocessed run that cannot be read is a
    problem, and is not replaced by raw data.
    """
    used_derivative: dict[str | None, str] = {}  # its name, by session
    for derivative in derivatives:
        for session, read in derivative.sources(label):
            if used_derivative.setdefault(session, derivative.name) != derivative.name:
                log.warning("sub-%s: %s also has session %s; %s comes first and is used.", label,
                            derivative.name, session, used_derivative[session])
            elif not sessions or session in sessions:
                try:
                    run = read()
                except DataError as error:
                    problems.append(str(error))
                    continue
                same_session = [path for path in raw
                                if session in (None, entities_of(path.name).get("ses"))]
                yield _with_mask(_with_scanner(run, same_session, root), derivatives)
    selected = [p for p in raw if not sessions or entities_of(p.name).get("ses") in sessions]
    used = [p for p in selected
            if not used_derivative.keys() & {None, entities_of(p.name).get("ses")}]
    if len(used) < len(selected):
        log.info("sub-%s: %d raw files are left out, since %s has preprocessed ones.", label,
                 len(selected) - len(used), " and ".join(dict.fromkeys(used_derivative.values())))
    for run in _raw_runs(used, root, problems, merge):
        yield _with_mask(run, derivatives)


def _with_scanner(run: Run, raw: Sequence[Path], root: Path) -> Run:
    """Add scanner and institution from raw sidecars to a preprocessed run whose sidecar has no such
    key, since most preprocessing tools do not copy them. Keys on which raw sidecars differ are left
    out."""
    keys = {*batch.SCANNER, "InstitutionName"}
    if not raw or keys & run.metadata.keys():
        return run
    try:
        sidecars = [read_sidecar(path, root) for path in raw]
    except DataError as error:
        log.warning("%s: the scanner is not known: %s", run.name, error)
        return run
    scanner = {k: v for k, v in sidecars[0].items()
               if k in keys and all(other.get(k) == v for other in sidecars)}
    return replace(run, parts=tuple(replace(part, metadata={**scanner, **part.metadata})
                                    for part in run.parts))


def _with_mask(run: Run, derivatives: Sequence[preprocessed.Derivative]) -> Run:
    """Add the mask of the first derivative that has one for a run without a mask."""
    masks = (derivative.mask_of(run) for derivative in derivatives)
    return run if run.mask else replace(run, mask=next((m for m in masks if m), None))


def _raw_runs(images: Sequence[Path], root: Path, problems: list[str], merge: bool
              ) -> Iterator[Run]:
    """Yield one run per acquisition of a participant.

    A run has the magnitudes of its files or, where there are none, their real parts; phases and
    imaginary parts are found beside them. In a session with weighted runs, series of b0 volumes
    alone are left out. merge: whether runs with opposite phase encodings are joined.
    """
    parts = []
    magnitudes = {tuple(sorted(_without(entities_of(image.name), "part").items()))
                  for image in images if entities_of(image.name).get("part", "mag") == "mag"}
    for image in sorted(images, key=lambda path: label_order(path.name)):
        entities = entities_of(image.name)
        kind = entities.get("part", "mag")
        beside = tuple(sorted(_without(entities, "part").items())) in magnitudes
        if kind in ("phase", "imag") or (kind == "real" and beside):
            continue
        try:
            parts.append(read_part(image, root))
        except DataError as error:
            problems.append(str(error))
    sessions = defaultdict(list)
    for group in _group_parts(parts):
        sessions[entities_of(group[0].image.name).get("ses")].append(group)
    for groups in sessions.values():
        candidates = corrections.read_session(groups[0][0].image.parent.parent, root, parts)
        weighted = [any(largest_b(part) >= B0_MAX for part in group) for group in groups]
        kept = [g for g, is_weighted in zip(groups, weighted, strict=True)
                if is_weighted or not any(weighted)]
        for group in groups:
            if group not in kept:
                log.info("%s: left out, since it has only b0 volumes (b < %g s/mm²) and there are "
                         "weighted runs.", ", ".join(p.image.name for p in group), B0_MAX)
        if merge:
            kept = _merge_opposite(kept)
        for entities, group in zip(_run_entities(kept), kept, strict=True):
            if len(group) > 1:
                log.info("%s: one acquisition, joined in this order: %s.", group[0].image.name,
                         ", ".join(p.image.name for p in group))
            yield corrections.find_corrections(
                Run(entities, tuple(group), dataset=("raw", root)), root, candidates)


def _group_parts(parts: Sequence[Part]) -> list[list[Part]]:
    """Group the files that are parts of one acquisition; keep their order in each group."""
    by_properties = defaultdict(list)
    for part in parts:
        by_properties[_shared_properties(part)].append(part)
    complete: list[list[Part]] = []
    for candidates in by_properties.values():
        if len(candidates) == 1:
            complete.append(candidates)
            continue
        groups: list[tuple[list[Part], list[Acquisition], Any]] = []
        for part in candidates:
            try:
                image = open_image(part.image)
                table = read_acquisition(part)
            except DataError:  # reported when the run is loaded
                complete.append([part])
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
        complete += [members for members, *_ in groups]
    return complete


def _merge_opposite(groups: Sequence[list[Part]]) -> list[list[Part]]:
    """Join the groups that differ in dir and run alone, have one grid and opposite encodings."""
    merged: list[list[Part]] = []
    for group in groups:
        for other in merged:
            if _is_opposite(group[0], other[0]):
                other += group
                break
        else:
            merged.append([*group])
    return merged


def _is_opposite(a: Part, b: Part) -> bool:
    names = [_without(entities_of(part.image.name), "dir", "run") for part in (a, b)]
    try:
        encodings = [PhaseEncoding.from_sidecar(part.metadata) for part in (a, b)]
        images = [open_image(part.image) for part in (a, b)]
    except DataError:  # reported when the run is loaded
        return False
    return (names[0] == names[1] and encodings[0] is not None
            and encodings[0].opposes(encodings[1])
            and images[0].shape[:3] == images[1].shape[:3]
            and np.allclose(images[0].affine, images[1].affine, rtol=0, atol=AFFINE_TOLERANCE))


def _without(entities: Mapping[str, str], *keys: str) -> dict[str, str]:
    return {k: v for k, v in entities.items() if k not in keys}


def _shared_properties(part: Part) -> tuple[Any, ...]:
    """The entities and sidecar values in which the parts of one acquisition must agree.

    If neither `dir` nor the sidecar gives the phase encoding, acq may name it (acq-AP), so acq must
    agree as well.
    """
    entities = ordered(entities_of(part.image.name))
    values = [part.metadata.get(k)
              for k in ("PhaseEncodingDirection", "TotalReadoutTime", "EchoTime")]
    unknown_direction = values[0] is None and "dir" not in entities
    split = ("run",) if unknown_direction else ("acq", "run")
    return (tuple((k, v) for k, v in entities.items() if k not in split),
            *(round(v, 5) if isinstance(v, int | float) else str(v) for v in values))


def repeats(a: Acquisition, b: Acquisition) -> bool:
    """Tell whether more than half of the weighted volumes of the shorter table are in the other.

    Volumes are equal if their b-tensors are: ‖B − B'‖ < 0.05 ‖B‖ (Frobenius norm).
    """
    few, many = sorted((t.btensors[~t.b0] for t in (a, b)), key=len)
    if not len(few):
        return False
    differences = np.linalg.norm(few[:, None] - many[None], axis=(2, 3))
    norms = np.linalg.norm(few, axis=(1, 2))
    return bool(np.mean(differences.min(axis=1) < SAME_TENSOR * norms) > 0.5)


def _run_entities(groups: Sequence[Sequence[Part]]) -> Iterator[dict[str, str]]:
    """Yield the entities of the run of each group.

    They are those that its parts share, or those of its first part if another group would have the
    same name.
    """
    parts = [[ordered(entities_of(part.image.name)) for part in group] for group in groups]
    shared = [{k: v for k, v in es[0].items() if all(e.get(k) == v for e in es)} for es in parts]
    for i, common in enumerate(shared):
        others = [e for j, es in enumerate(parts) if j != i for e in (es[0], shared[j])]
        yield parts[i][0] if common in others else common


def _describe_nothing(root: Path, unknown: Sequence[str], empty: Sequence[str],
                      sessions: Collection[str], folders: Sequence[tuple[str, Path]]) -> str:
    places = ", ".join([str(root), *(str(path) for _, path in folders if path != root)])
    sentences = [f"no participant {', '.join(f'sub-{label}' for label in unknown)} exists in "
                 f"{places}." if unknown else ""]
    if empty or not unknown:
        sentences.append(f"no dMRI found in {places}"
                         + (f" for {', '.join(f'sub-{s}' for s in empty[:5])}" if empty else "")
                         + f". {_describe_search(sessions)}")
    return " ".join(filter(None, sentences))


def _describe_search(sessions: Collection[str]) -> str:
    return ("Looked for sub-<label>/[ses-<label>/]dwi/*_dwi.nii[.gz] with a valid BIDS name"
            + (f" in {_describe_sessions(sessions)}" if sessions else "")
            + ", that passes --bids-filter-file if one is given. Check names, labels and filter.")


def _describe_sessions(sessions: Collection[str]) -> str:
    return " or ".join(f"ses-{s}" for s in sorted(sessions))
