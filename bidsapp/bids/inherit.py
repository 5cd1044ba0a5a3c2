"""Find the tables and sidecars of an image by the inheritance principle of BIDS.

A file applies to an image if it is in the image's folder or above it, up to the root of the
dataset, if it has the same suffix, and if all its entities are those of the image. JSON files are
merged, and the keys of the file nearest to the image take precedence. Of .bval, .bvec and b-tensor
encoding files (`btable`), the nearest is used
(https://bids-specification.readthedocs.io/en/stable/common-principles.html#the-inheritance-principle).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bidsapp.bids.names import ENTITIES, output_path
from bidsapp.dwi import Part
from bidsapp.errors import DataError

ENCODINGS = (".btens", ".bshape", ".tsv")
"""Extensions of b-tensor encoding files."""

MAX_NESTING = 100
"""Largest depth of lists and objects in a JSON file. Copying or writing a deeper one exhausts the
stack."""


def entities_of(name: str) -> dict[str, str]:
    """Parse the entities of a file name.

    >>> entities_of("sub-01_dir-AP_dwi.nii.gz")
    {'sub': '01', 'dir': 'AP'}
    """
    return dict(part.split("-", 1) for part in name.split(".")[0].split("_") if "-" in part)


def ordered(entities: Mapping[str, str]) -> dict[str, str]:
    """Sort entities in BIDS order, unknown ones last."""
    rank = {key: i for i, key in enumerate(ENTITIES)}
    return dict(sorted(entities.items(), key=lambda item: rank.get(item[0], len(rank))))


def stem_of(path: Path) -> Path:
    """Remove .nii or .nii.gz from a path."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii"))


def name_of(path: Path) -> str:
    """Name of a file without .nii or .nii.gz."""
    return stem_of(path).name


def read_part(image: Path, root: Path) -> Part:
    """Find the .bval, .bvec, b-tensor encoding file and sidecars of a DWI; read the sidecars.

    Parameters
    ----------
    image : Path
        The DWI.
    root : Path
        Root of the dataset.

    Returns
    -------
    Part

    Raises
    ------
    DataError
        The image, its .bval or its .bvec is missing; a file is a link to a missing one; a sidecar
        cannot be read; the image is there as .nii and .nii.gz; there are several encoding files; or
        the name is not a BIDS name. The tables are not read.
    """
    try:
        output_path(entities_of(image.name), "dwi", ".nii.gz")
    except (KeyError, ValueError) as error:
        raise DataError(f"{image}: is not a BIDS name ({error}). Rename it and the files beside "
                        "it.") from error
    require_file(image)
    if image.suffix == ".nii" and (twin := image.with_name(image.name + ".gz")).exists():
        raise DataError(f"{image}: {twin.name} is beside it. Remove one of the two.")
    encodings = [files[0] for e in ENCODINGS if (files := find_applicable(image, root, e))]
    if len(encodings) > 1:
        raise DataError(f"{image}: has several encoding files, "
                        f"{' and '.join(str(e) for e in encodings)}. Keep one of them.")
    return Part(image, find_nearest(image, root, ".bval"), find_nearest(image, root, ".bvec"),
                require_file(encodings[0]) if encodings else None, read_sidecar(image, root))


def read_sidecar(image: Path, root: Path) -> dict[str, Any]:
    """Merge the JSON files that apply to an image; keys of the nearest take precedence.

    Parameters
    ----------
    image : Path
        The image.
    root : Path
        Root of the dataset.

    Returns
    -------
    dict

    Raises
    ------
    DataError
        One of them cannot be read (`read_json`).
    """
    merged: dict[str, Any] = {}
    for path in reversed(find_applicable(image, root, ".json")):
        merged |= read_json(path)
    return merged


def find_applicable(image: Path, root: Path, extension: str) -> list[Path]:
    """List the files with an extension that apply to an image, the nearest first.

    Within a folder, the file with the most entities comes first.
    """
    entities = entities_of(image.name).items()
    files: list[Path] = []
    for folder in (image.parent, *image.parent.parents):
        names = [n for n in _names(folder, folder.stat().st_mtime_ns) if n.endswith(extension)
                 and _suffix(n) == _suffix(image.name) and entities_of(n).items() <= entities]
        files += [folder / n for n in sorted(names, key=lambda n: (-len(entities_of(n)), n))]
        if folder == root:
            break
    return files


def find_nearest(image: Path, root: Path, extension: str) -> Path:
    """Find the nearest file with an extension that applies to an image.

    Raises
    ------
    DataError
        There is none, or it is a link to a missing file.
    """
    files = find_applicable(image, root, extension)
    if not files:
        raise DataError(f"{image}: no {extension} file belongs to it. Add "
                        f"{stem_of(image).name}{extension} beside it, or a file that it inherits.")
    return require_file(files[0])


def require_file(path: Path) -> Path:
    """Return a path if its file exists.

    Raises
    ------
    DataError
        The file is missing, or a link to a missing file, as an annexed file that was not fetched.
    """
    if not path.exists():
        state = "is a link to a missing file" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {state}. Fetch it (e.g. `datalad get {path.name}`) or copy it.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file. NaN and Infinity become None.

    Raises
    ------
    DataError
        The file is missing, is not JSON or not an object, holds a number beyond the range of float,
        or is nested more than MAX_NESTING deep.
    """
    return dict(_json(require_file(path), path.stat().st_mtime_ns))


def _suffix(name: str) -> str:
    return name.split(".")[0].rsplit("_", 1)[-1]


@lru_cache(maxsize=4096)
def _names(folder: Path, mtime_ns: int) -> tuple[str, ...]:
    """Names in a folder; mtime_ns keeps the cache from giving those of an earlier state."""
    return tuple(p.name for p in folder.iterdir())


@lru_cache(maxsize=4096)
def _json(path: Path, mtime_ns: int) -> dict[str, Any]:
    """Content of a JSON file; mtime_ns keeps the cache from giving an earlier one."""
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"), parse_int=_number,
                           parse_float=_number, parse_constant=_not_a_number)
        if not _nested_within(table, MAX_NESTING):
            raise RecursionError
        json.dumps(table, ensure_ascii=False).encode()  # half a surrogate pair cannot be written
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Correct it.") from error
    except RecursionError as error:
        raise DataError(f"{path}: its lists and objects are nested more than {MAX_NESTING} deep. "
                        "Correct it.") from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__}; an object {{...}} is needed.")
    return table


def _number(text: str) -> float:
    """Convert a text to an int if it is one, otherwise to a float."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:12]}… of {len(text)} characters is too large")
    return value if any(c in text for c in ".eE") else int(text)


def _not_a_number(text: str) -> None:
    """Convert NaN and Infinity, which some converters write although JSON lacks them, to None."""


def _nested_within(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nested_within(v, levels - 1) for v in inner)
