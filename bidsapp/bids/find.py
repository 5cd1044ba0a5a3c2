"""Find what can be processed: pybids' index of a dataset, and the runs in it.

A run is one DWI file; several files of one session are one run when they are one acquisition
split in parts: they differ in acq and run alone and share grid, affine, dir, phase encoding,
readout time and echo time.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np

from bidsapp.acquisition import B0_MAX
from bidsapp.bids import batch, foreign
from bidsapp.bids.btable import largest_b
from bidsapp.bids.inherit import entities_of, here, nearest, sidecar, stem_of
from bidsapp.bids.names import ENTITIES, output
from bidsapp.dwi import Part, Run
from bidsapp.errors import DataError, UsageError

if TYPE_CHECKING:
    import pandas as pd
    from bids.layout import BIDSLayout

log = logging.getLogger(__name__)

AFFINE_TOLERANCE = 1e-3
"""Files whose affines differ by less (mm) lie on one grid."""

COMPLEX = ("phase", "real", "imag")
SPLIT_BY = ("acq", "run")
SHORT = {"acq": "acquisition", "dir": "direction", "ses": "session", "sub": "subject",
         "rec": "reconstruction"}
DIRECTORIES = "directories.sha256"


@dataclass(frozen=True)
class Found:
    """What there is to do.

    runs: by participant label, in order of their names. problems: by participant, messages about
    what could not be used. unknown: participants asked for that no dataset holds. batches: a table
    of every run, its batch and where that was read from.
    """

    runs: Mapping[str, list[Run]]
    problems: Mapping[str, list[str]]
    unknown: list[str]
    batches: pd.DataFrame = field(repr=False)


def index(bids_dir: Path, *, database_dir: Path | None, validate: bool,
          participants: Sequence[str] = ()) -> BIDSLayout:
    """pybids' index of the dwi folders of a dataset, sidecar content left aside.

    With `database_dir` the index of all participants is kept there; it is made again when any
    folder of the dataset has changed since. Without it only `participants` are indexed.

    Raises:
        UsageError: BIDS_DIR is missing, unreadable or no BIDS dataset.
    """
    from bids.exceptions import BIDSValidationError
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    root = bids_dir.absolute()
    _check_root(root)
    ignore = [
        re.compile(r"^/(?!sub-)[^/.]+(/|$)"),
        re.compile(r"^/sub-[^/]+/(ses-[^/]+/)?(?!ses-|dwi(/|$))[^/.]+(/|$)"),
    ]
    if participants and database_dir is None:
        labels = "|".join(re.escape(p) for p in _labels(participants, "sub"))
        ignore.append(re.compile(rf"^/sub-(?!({labels})(/|$))"))
    indexer = BIDSLayoutIndexer(validate=validate, ignore=ignore, index_metadata=False)
    try:
        if database_dir is None:
            return BIDSLayout(root, validate=validate, indexer=indexer)
        return _cached(root, database_dir.absolute(), validate, indexer)
    except BIDSValidationError as error:
        raise UsageError(f"{root}: pybids does not take it for a BIDS dataset: {error}. Correct "
                         "it, or give --skip-bids-validation.") from error
    except PermissionError as error:
        raise UsageError(f"{root}: a folder cannot be read ({error}). Grant read access.") \
            from error


def read_filters(path: Path | None) -> dict[str, Any]:
    """The content of --bids-filter-file, {"dwi": {entity: value}}; {} without one.

    Raises:
        UsageError: the file is missing or not a JSON object of objects.
    """
    if path is None:
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UsageError(f"--bids-filter-file {path}: cannot be read as JSON ({error}).") \
            from error
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise UsageError(f"--bids-filter-file {path}: needed is an object of objects, e.g. "
                         '{"dwi": {"acquisition": "x"}}.')
    return table


def find_runs(layout: BIDSLayout, *, participants: Sequence[str] = (),
              sessions: Sequence[str] = (), filters: Mapping[str, Any] | None = None,
              derivatives: Mapping[str, Path] | None = None, batch_file: Path | None = None,
              batch_column: str | None = None) -> Found:
    """The runs of each participant, with masks, batches and covariates.

    participants, sessions: labels with or without prefix; none means all. filters: as
    `read_filters` gives them. derivatives: folders by name; where one holds preprocessed runs of a
    participant's session they replace the raw ones.

    Raises:
        UsageError: no DWI anywhere, a derivative's folder that cannot be used, an ambiguous batch.
    """
    root = Path(layout.root)
    participants, sessions = _labels(participants, "sub"), _labels(sessions, "ses")
    trees = {name: foreign.Tree.of(name, path) for name, path in (derivatives or {}).items()}
    if layout.is_derivative:
        trees = {"preprocessed": foreign.Tree.of("preprocessed", root), **trees}
    known = {p.name[4:] for p in root.glob("sub-*") if p.is_dir()}
    known.update(*(tree.participants for tree in trees.values()))
    wanted = [p for p in dict.fromkeys(participants) if p in known] or \
        ([] if participants else sorted(known, key=_natural))

    problems: dict[str, list[str]] = defaultdict(list)
    raw: dict[str, list[Path]] = defaultdict(list)
    if not layout.is_derivative:
        for path in _images(layout, wanted, filters or {}):
            raw[entities_of(path.name).get("sub", "")].append(path)
    runs: dict[str, list[Run]] = {}
    for p in wanted:
        ready = foreign.runs(trees, p, problems[p])
        taken = {run.session for run in ready}
        mine = [path for path in raw[p]
                if not taken & {None, entities_of(path.name).get("ses")}]
        if len(mine) < len(raw[p]):
            log.info("sub-%s: preprocessed runs of %s are used instead of %d raw files.", p,
                     ", ".join(sorted({r.dataset[0] for r in ready})), len(raw[p]) - len(mine))
        mine = [path for path in mine
                if not sessions or entities_of(path.name).get("ses") in sessions]
        here_ = _runs(mine, root, problems[p]) + [r for r in ready
                                                 if not sessions or r.session in sessions]
        if here_:
            runs[p] = [foreign.with_mask(run, trees) for run in
                       sorted(here_, key=lambda run: _natural(run.name))]
        elif not problems[p] and participants:
            problems[p].append(_nothing(root, p, sessions))
    problems = {p: messages for p, messages in problems.items() if messages}
    unknown = [p for p in dict.fromkeys(participants) if p not in known]
    if not runs and not problems and not unknown:
        raise UsageError(_nothing(root, "*", sessions))
    named, table = batch.resolve([r for rs in runs.values() for r in rs], root,
                                 batch_file=batch_file, batch_column=batch_column)
    grouped: dict[str, list[Run]] = {p: [] for p in runs}
    for run in named:
        grouped[run.participant].append(run)
    return Found(grouped, problems, unknown, table)


def _check_root(root: Path) -> None:
    if not root.is_dir():
        raise UsageError(f"BIDS_DIR {root} is not a folder that exists. Give the root of a BIDS "
                         "dataset (in a container: the path it is mounted on).")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"BIDS_DIR {root} cannot be read. Grant read access to it.")
    path = root / "dataset_description.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8-sig"))
        if not isinstance(description, dict):
            raise ValueError("it is not an object")
    except FileNotFoundError as error:
        raise UsageError(f"BIDS_DIR {root} holds no dataset_description.json, so it is not the "
                         "root of a BIDS dataset. Give the root, or write the file: "
                         '{"Name": "my data", "BIDSVersion": "1.10.0"}.') from error
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: cannot be read as JSON ({error}). Correct it.") from error


def _cached(root: Path, folder: Path, validate: bool, indexer: Any) -> BIDSLayout:
    """The index in `folder`, made again unless it was made of the same folders."""
    from bids.layout import BIDSLayout
    from filelock import FileLock

    stamp, state = folder / DIRECTORIES, _state(root, validate)
    current = stamp.exists() and stamp.read_text() == state
    if current and not os.access(folder, os.W_OK):
        return BIDSLayout(root, validate=validate, database_path=folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / "index.lock"):
            if stamp.exists() and stamp.read_text() == state:
                return BIDSLayout(root, validate=validate, database_path=folder)
            stamp.unlink(missing_ok=True)
            layout = BIDSLayout(root, validate=validate, database_path=folder,
                                reset_database=True, indexer=indexer)
            stamp.write_text(state)
            return layout
    except OSError as error:
        raise UsageError(f"--bids-database-dir {folder}: cannot be written ({error}). Give a "
                         "folder that can, or leave the option out.") from error


def _state(root: Path, validate: bool) -> str:
    """Changes when a file or folder down to dwi/ is added, removed or renamed."""
    folders = [root]
    for pattern in ("sub-*", "sub-*/ses-*", "sub-*/dwi", "sub-*/ses-*/dwi"):
        folders += sorted(root.glob(pattern))
    listing = "\n".join(f"{f} {f.stat().st_mtime_ns}" for f in folders if f.is_dir())
    return hashlib.sha256(f"{validate}\n{listing}".encode()).hexdigest()


def _images(layout: BIDSLayout, participants: list[str], filters: Mapping[str, Any]) -> list[Path]:
    """DWI files of these participants that pass the filters, complex data left out."""
    for query in set(filters) - {"dwi"}:
        log.warning("--bids-filter-file: the query %r is not used here; only \"dwi\" is.", query)
    query = {"suffix": "dwi", "extension": [".nii", ".nii.gz"], "datatype": "dwi"}
    known = layout.get_entities(metadata=False)
    for key, value in filters.get("dwi", {}).items():
        name = SHORT.get(key, key)
        if name in known or name == "regex_search":
            query[name] = _value(value)
        else:
            log.warning("--bids-filter-file: %r is not an entity of file names and is left "
                        "aside; known are %s.", key, ", ".join(sorted(known)))
    chosen = set(participants)
    files = [Path(f) for f in layout.get(return_type="filename", **query)]
    files = [f for f in files if entities_of(f.name).get("sub") in chosen]
    parts = [f for f in files if entities_of(f.name).get("part") in COMPLEX]
    if parts:
        log.info("left out: %d files of complex data (part-phase, -real, -imag), e.g. %s.",
                 len(parts), parts[0].name)
    return [f for f in files if f not in set(parts)]


def _value(value: Any) -> Any:
    """null → must be absent, "*" → any; pybids' own names of these are understood, too."""
    from bids.layout import Query

    if isinstance(value, list):
        return [_value(v) for v in value]
    if isinstance(value, str) and (match := re.match(r"<?Query\.(\w+)", value)):
        return getattr(Query, match[1], value)
    return {None: Query.NONE, "*": Query.ANY}.get(value, value)


def _runs(images: Iterable[Path], root: Path, problems: list[str]) -> list[Run]:
    """One run per acquisition of a participant."""
    parts: dict[Path, Part] = {}
    for image in sorted(images, key=lambda path: _natural(str(path))):
        try:
            parts[image] = read_part(image, root)
        except DataError as error:
            problems.append(str(error))
    sessions = defaultdict(list)
    for group in _groups(list(parts.values())):
        sessions[entities_of(group[0].image.name).get("ses")].append(group)
    kept = []
    for groups in sessions.values():
        weighted = [max((b for b in map(largest_b, g) if b is not None), default=B0_MAX) >= B0_MAX
                    for g in groups]
        for group, counts in zip(groups, weighted, strict=True):
            if counts or not any(weighted):
                kept.append(group)
            else:
                log.info("%s: only b0 volumes (all b < %g s/mm²) beside weighted runs: left out.",
                         ", ".join(p.image.name for p in group), B0_MAX)
    return list(_named(kept, root))


def read_part(image: Path, root: Path) -> Part:
    """An image with the tables and sidecars that belong to it.

    Raises:
        DataError: one of them is missing, a link to nowhere, or broken; or the name is not BIDS.
    """
    try:
        output(_ordered(entities_of(image.name)), "dwi", ".nii.gz")
    except (KeyError, ValueError) as error:
        raise DataError(f"{image}: is not a BIDS name ({error}). Rename it and the files beside "
                        "it.") from error
    here(image)
    stem = stem_of(image)
    if image.suffix == ".nii" and (twin := image.with_name(image.name + ".gz")).exists():
        raise DataError(f"{image}: {twin.name} stands beside it. Remove one of the two.")
    encoding = next((p for p in (stem.with_name(stem.name + e)
                                 for e in (".btens", ".bshape", ".tsv"))
                     if p.exists() or p.is_symlink()), None)
    return Part(image, nearest(image, root, ".bval"), nearest(image, root, ".bvec"),
                here(encoding) if encoding else None, sidecar(image, root))


def _groups(parts: list[Part]) -> list[list[Part]]:
    """Parts that are one acquisition, together and in order."""
    groups: list[list[Part]] = []
    grids: list[tuple[Any, tuple[int, ...], np.ndarray]] = []
    for part in parts:
        grid = _grid(part.image)
        if grid is None:
            groups.append([part])
            grids.append((None, (), np.eye(4)))
            continue
        key = _key(part)
        for group, (other, shape, affine) in zip(groups, grids, strict=True):
            if key == other and shape == grid[0] and np.allclose(
                    affine, grid[1], rtol=0, atol=AFFINE_TOLERANCE):
                group.append(part)
                break
        else:
            groups.append([part])
            grids.append((key, *grid))
    return groups


def _key(part: Part) -> tuple[Any, ...]:
    """What the parts of one acquisition share, besides the grid.

    Where neither `dir` nor the sidecar tells the phase encoding, acq may stand for it (acq-AP), so
    that only `run` may differ.
    """
    entities = entities_of(part.image.name)
    facts = [part.metadata.get(k)
             for k in ("PhaseEncodingDirection", "TotalReadoutTime", "EchoTime")]
    unsure = facts[0] is None and "dir" not in entities
    split = ("run",) if unsure else SPLIT_BY
    return (tuple((k, v) for k, v in _ordered(entities).items() if k not in split),
            *(round(f, 5) if isinstance(f, float) else str(f) for f in facts))


def _grid(image: Path) -> tuple[tuple[int, ...], np.ndarray] | None:
    """Shape and affine of a 4-D image, else None: it is then kept apart, and loading it reports."""
    try:
        header = nib.Nifti1Image.load(image)
    except Exception:  # nibabel raises many kinds on damaged headers
        return None
    return (header.shape[:3], header.affine) if header.ndim == 4 else None


def _named(groups: list[list[Part]], root: Path) -> Iterator[Run]:
    """Runs with the entities on which their parts agree; with the first part's where that would
    give two runs one name."""
    first = [_ordered(entities_of(g[0].image.name)) for g in groups]
    shared = [{k: v for k, v in e.items()
               if all(entities_of(p.image.name).get(k) == v for p in g)}
              for e, g in zip(first, groups, strict=True)]
    count = Counter(tuple(e.items()) for e in shared)
    for group, whole, agreed in zip(groups, first, shared, strict=True):
        run = Run(whole if count[tuple(agreed.items())] > 1 else agreed, tuple(group),
                  dataset=("raw", root))
        if len(group) > 1:
            log.info("%s: %d files are one acquisition and are joined in this order: %s.",
                     run.name, len(group), ", ".join(p.image.name for p in group))
        yield run


def _nothing(root: Path, participant: str, sessions: Sequence[str]) -> str:
    place = f" in session {' or '.join(sessions)}" if sessions else ""
    return (f"{root}/sub-{participant}: no DWI found{place}. Needed is "
            f"sub-<label>/[ses-<label>/]dwi/*_dwi.nii[.gz] with a valid BIDS name that passes "
            "--bids-filter-file; --skip-bids-validation takes other names, too.")


def _ordered(entities: Mapping[str, str]) -> dict[str, str]:
    rank = {key: i for i, key in enumerate(ENTITIES)}
    return dict(sorted(entities.items(), key=lambda kv: rank.get(kv[0], len(rank))))


def _labels(labels: Sequence[str], prefix: str) -> list[str]:
    return [label.removeprefix(f"{prefix}-") for label in labels]


def _natural(text: str) -> list[Any]:
    """Sorts run-2 before run-10."""
    return [(int(t), t) if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", text)]
