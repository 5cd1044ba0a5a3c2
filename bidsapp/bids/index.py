"""Index the dwi folders of a dataset with pybids, and query the index.

Sidecars are read by `bidsapp.bids.inherit`, since pybids 0.22 fails on the whole dataset if the
JSON of a single participant is not valid or is a link to a missing file.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bidsapp import scratch
from bidsapp.bids.inherit import read_json
from bidsapp.errors import DataError, UsageError

if TYPE_CHECKING:
    from bids.layout import BIDSLayout

log = logging.getLogger(__name__)

IGNORED = (r"^/(?!sub-)[^/.]+(/|$)",
           r"^/sub-[^/]+/(ses-[^/]+/)?(?!ses-|dwi(/|$))[^/.]+(/|$)")
"""Patterns of the folders that are not indexed: all but sub-*/[ses-*/]dwi."""

PYBIDS_NAMES = {"acq": "acquisition", "dir": "direction", "ses": "session", "sub": "subject",
                "rec": "reconstruction"}
"""Names of entities in pybids, by their key in file names."""


def read_description(root: Path, *, needed: bool) -> dict[str, Any]:
    """Read dataset_description.json.

    Parameters
    ----------
    root : Path
        Root of the dataset.
    needed : bool
        Whether the file must exist.

    Returns
    -------
    dict
        Its content; empty if it does not exist and is not needed.

    Raises
    ------
    UsageError
        `root` is not a folder that can be read, or not the root of a BIDS dataset.
    """
    if not root.is_dir():
        raise UsageError(f"BIDS_DIR {root} is not a folder that exists. Give the root of a BIDS "
                         "dataset (in a container: the path it is mounted on).")
    if not os.access(root, os.R_OK | os.X_OK):
        raise UsageError(f"BIDS_DIR {root} cannot be read. Grant read access to it.")
    path = root / "dataset_description.json"
    if not path.exists():
        if not needed:
            return {}
        layout = next((name for name, pattern in (("HCP-YA", "*/T1w/Diffusion"),
                                                  ("UK Biobank", "*/dMRI/dMRI"))
                       if any(root.glob(pattern))), None)
        raise UsageError(
            f"BIDS_DIR {root} holds no dataset_description.json, so it is not the root of a BIDS "
            "dataset. " + (f"It looks like {layout}: give it as --derivatives NAME={root}, and as "
                           "BIDS_DIR a folder with nothing but that file" if layout else
                           "Give the root, or write the file") +
            ': {"Name": "my data", "BIDSVersion": "1.10.0"}.')
    try:
        return read_json(path)
    except DataError as error:
        raise UsageError(str(error)) from error


def build_index(root: Path, *, participants: Collection[str], validate: bool,
                derivative: bool = False, database_dir: Path | None = None) -> BIDSLayout:
    """Index the dwi folders of a dataset with pybids.

    Parameters
    ----------
    root : Path
        Root of the dataset.
    participants : collection of str
        Labels of the participants to index; empty: all. Ignored if there is a `database_dir`.
    validate : bool
        Whether to leave out files whose names are not valid in BIDS.
    derivative : bool
        Whether the dataset is a derivative.
    database_dir : Path, optional
        Folder that keeps the index of all participants for later calls, in a subfolder named by a
        hash of the dataset's folders and their times, so that an outdated index is never used.

    Returns
    -------
    BIDSLayout

    Raises
    ------
    UsageError
        pybids does not accept the dataset or cannot read its description, or the database cannot
        be written.
    """
    from bids.exceptions import BIDSValidationError
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    ignore = [re.compile(pattern) for pattern in IGNORED]
    if participants and database_dir is None:
        ignore.append(re.compile(rf"^/sub-(?!({'|'.join(map(re.escape, participants))})(/|$))"))

    def make_layout(path: Path | None) -> BIDSLayout:
        return BIDSLayout(root, validate=validate, is_derivative=derivative,
                          database_path=path, indexer=BIDSLayoutIndexer(
                              validate=validate, ignore=ignore, index_metadata=False))

    description = root / "dataset_description.json"
    try:
        if description.exists():
            read_json(description)
        if database_dir is None:
            return make_layout(None)
        database = database_dir.absolute() / _state(root, validate)
        if not database.exists():
            database.parent.mkdir(parents=True, exist_ok=True)
            with scratch.temporary(database.parent) as unfinished:
                make_layout(unfinished)
                try:
                    unfinished.rename(database)
                except OSError:
                    if not database.exists():  # otherwise another process was first
                        raise
        return make_layout(database)
    except BIDSValidationError as error:
        raise UsageError(f"{root}: pybids does not accept it as a BIDS dataset: {error}. Correct "
                         "it, or give --skip-bids-validation.") from error
    except DataError as error:
        raise UsageError(str(error)) from error
    except ValueError as error:  # pybids is stricter than read_json
        raise UsageError(f"{description}: pybids cannot read it ({error}). Save it as JSON in "
                         "UTF-8 without a byte order mark.") from error
    except OSError as error:
        raise UsageError(f"{root}: cannot be indexed ({error}). Grant read access"
                         + (f", and write access to --bids-database-dir {database_dir}."
                            if database_dir else ".")) from error


def _state(root: Path, validate: bool) -> str:
    """Hash that changes if a file or folder down to the level of dwi/ is added, removed or renamed.

    It does not change with the content of files, which the index does not hold.
    """
    folders = [root]
    for pattern in ("sub-*", "sub-*/ses-*", "sub-*/dwi", "sub-*/ses-*/dwi"):
        folders += sorted(root.glob(pattern))
    listing = "\n".join(f"{f} {f.stat().st_mtime_ns}" for f in folders if f.is_dir())
    return hashlib.sha256(f"{validate}\n{listing}".encode()).hexdigest()[:32]


def read_filters(path: Path | None) -> dict[str, Any]:
    """Read the `dwi` query of --bids-filter-file.

    Parameters
    ----------
    path : Path or None
        The file, if one is given.

    Returns
    -------
    dict
        Values by entity; empty without a file.

    Raises
    ------
    UsageError
        The file is missing, not a JSON object of objects, or has a value that is not allowed.
    """
    if path is None:
        return {}
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"--bids-filter-file {path}: cannot be read as JSON ({error}).") \
            from error
    if not isinstance(table, dict) or not all(isinstance(v, dict) for v in table.values()):
        raise UsageError(f"--bids-filter-file {path}: an object of objects is needed, e.g. "
                         '{"dwi": {"acquisition": "x"}}.')
    for entity, value in table.get("dwi", {}).items():
        values = value if isinstance(value, list) else [value]
        if not all(v is None or isinstance(v, str | int | float) for v in values):
            raise UsageError(f"--bids-filter-file {path}: {entity} is {value!r}; a label, a "
                             "list of labels, null (absent) or \"*\" (any) is needed.")
        if table["dwi"].get("regex_search"):
            for v in values:
                try:
                    re.compile(str(v))
                except re.error as error:
                    raise UsageError(f"--bids-filter-file {path}: {entity} is {v!r}, which is not "
                                     f"a regular expression ({error}).") from error
    if others := sorted(set(table) - {"dwi"}):
        log.info("--bids-filter-file: only the query \"dwi\" is used, not %s.",
                 ", ".join(others))
    return table.get("dwi", {})


def find_files(layout: BIDSLayout, suffix: str, filters: Mapping[str, Any], **more: Any
               ) -> list[Path]:
    """Find the NIfTI images of a suffix that pass the filters.

    Parameters
    ----------
    layout : BIDSLayout
        Index of the dataset.
    suffix : str
        BIDS suffix, such as `dwi`.
    filters : mapping
        Values by entity (key or name in pybids), from `read_filters`. Unknown entities are ignored,
        with a warning unless the dataset is a derivative.
    **more
        Further conditions, by the names of pybids.

    Returns
    -------
    list of Path
    """
    entities = {entity for config in layout.config.values() for entity in config.entities}
    query: dict[str, Any] = {"suffix": suffix, "extension": [".nii", ".nii.gz"]}
    for key, value in filters.items():
        name = PYBIDS_NAMES.get(key, key)
        if name in entities or name == "regex_search":
            query[name] = _value(value)
        elif not layout.is_derivative:
            log.warning("--bids-filter-file: %r is not an entity and is ignored; known are %s.",
                        key, ", ".join(sorted(entities)))
    paths = layout.get(return_type="filename", invalid_filters="allow", **(query | more))
    return [Path(path) for path in paths]


def _value(value: Any) -> Any:
    """Convert null (absent), "*" (any) and texts such as "Query.NONE" to values for pybids."""
    from bids.layout import Query

    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_value(v) for v in value]
    if isinstance(value, str) and (match := re.match(r"<?Query\.(\w+)", value)):
        return getattr(Query, match[1], value)
    return {None: Query.NONE, "*": Query.ANY}.get(value, value)


def label_order(text: str) -> list[tuple[int, str]]:
    """Make a sort key that puts run-2 before run-10."""
    return [(int(t), t) if t.isdigit() else (-1, t) for t in re.split(r"(\d+)", text)]


def list_participants(root: Path) -> set[str]:
    """List the labels of the sub-* folders."""
    return {p.name.removeprefix("sub-") for p in root.glob("sub-*/")}
