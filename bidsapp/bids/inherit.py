"""Which files belong to an image: the inheritance principle of BIDS, read from the folders.

A file applies to an image when it stands in the image's folder or above it (up to the dataset's
root), has the same suffix, and no entity that the image does not share. JSON keys nearer to the
image win; of .bval, .bvec and encoding files the nearest is used
(https://bids-specification.readthedocs.io/en/stable/common-principles.html#the-inheritance-principle).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from bidsapp.bids.names import ENTITIES, output
from bidsapp.dwi import Part
from bidsapp.errors import DataError

ENCODINGS = (".btens", ".bshape", ".tsv")

MAX_NESTING = 100
"""Lists and objects nested deeper exhaust the stack where they are copied or written again."""


def entities_of(name: str) -> dict[str, str]:
    """`sub-01_dir-AP_dwi.nii.gz` → {"sub": "01", "dir": "AP"}; labels as they are written."""
    return dict(part.split("-", 1) for part in name.split(".")[0].split("_") if "-" in part)


def ordered(entities: Mapping[str, str]) -> dict[str, str]:
    """In BIDS order, unknown ones last."""
    rank = {key: i for i, key in enumerate(ENTITIES)}
    return dict(sorted(entities.items(), key=lambda item: rank.get(item[0], len(rank))))


def stem_of(path: Path) -> Path:
    """The path without .nii or .nii.gz."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii"))


def name_of(path: Path) -> str:
    """The file's name without .nii or .nii.gz."""
    return stem_of(path).name


def read_part(image: Path, root: Path) -> Part:
    """An image with the tables, encoding file and sidecars that belong to it.

    Raises:
        DataError: one of them is missing, a link to nowhere, broken or there twice; or the name is
            not BIDS.
    """
    try:
        output(entities_of(image.name), "dwi", ".nii.gz")
    except (KeyError, ValueError) as error:
        raise DataError(f"{image}: is not a BIDS name ({error}). Rename it and the files beside "
                        "it.") from error
    here(image)
    if image.suffix == ".nii" and (twin := image.with_name(image.name + ".gz")).exists():
        raise DataError(f"{image}: {twin.name} stands beside it. Remove one of the two.")
    encodings = [found[0] for e in ENCODINGS if (found := applicable(image, root, e))]
    if len(encodings) > 1:
        raise DataError(f"{image}: {' and '.join(str(e) for e in encodings)} all say how it was "
                        "encoded. Keep one of them.")
    return Part(image, nearest(image, root, ".bval"), nearest(image, root, ".bvec"),
                here(encodings[0]) if encodings else None, sidecar(image, root))


def sidecar(image: Path, root: Path) -> dict[str, Any]:
    """All JSON files that apply to the image, merged; keys of nearer ones win.

    Raises:
        DataError: one of them is broken, a link to nowhere, or no object.
    """
    merged: dict[str, Any] = {}
    for path in reversed(applicable(image, root, ".json")):
        merged |= read_json(path)
    return merged


def applicable(image: Path, root: Path, extension: str) -> list[Path]:
    """Files with this extension that apply to the image, the nearest first.

    Within one folder the file that shares most entities comes first.
    """
    own = entities_of(image.name)
    found: list[Path] = []
    for folder in (image.parent, *image.parent.parents):
        names = [n for n in _names(folder, folder.stat().st_mtime_ns) if n.endswith(extension)
                 and _suffix(n) == _suffix(image.name) and entities_of(n).items() <= own.items()]
        found += [folder / n for n in sorted(names, key=lambda n: (-len(entities_of(n)), n))]
        if folder == root:
            break
    return found


def nearest(image: Path, root: Path, extension: str) -> Path:
    """The nearest file with this extension.

    Raises:
        DataError: there is none, or it is a link to a file that is not here.
    """
    found = applicable(image, root, extension)
    if not found:
        raise DataError(f"{image}: no {extension} file belongs to it. Put "
                        f"{stem_of(image).name}{extension} beside it, or one that is inherited.")
    return here(found[0])


def here(path: Path) -> Path:
    """The path, if its file can be opened.

    Raises:
        DataError: it is missing, or a link to a file that is not here (annexed, not fetched).
    """
    if not path.exists():
        what = "is a link to a file that is not here" if path.is_symlink() else "does not exist"
        raise DataError(f"{path}: {what}. Fetch it (e.g. `datalad get {path.name}`) or copy it.")
    return path


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        DataError: it is broken, a link to nowhere, or no object; it holds a number that is too
            large for a float, or is nested too deep.
    """
    return dict(_json(here(path), path.stat().st_mtime_ns))


def _suffix(name: str) -> str:
    return name.split(".")[0].rsplit("_", 1)[-1]


@lru_cache(maxsize=4096)
def _names(folder: Path, changed: int) -> tuple[str, ...]:
    return tuple(p.name for p in folder.iterdir())


@lru_cache(maxsize=4096)
def _json(path: Path, changed: int) -> dict[str, Any]:
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
        raise DataError(f"{path}: holds a {type(table).__name__}, an object {{...}} is needed.")
    return table


def _number(text: str) -> float:
    """An int where the text is one."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {text[:12]}… of {len(text)} characters is too large")
    return value if any(c in text for c in ".eE") else int(text)


def _not_a_number(text: str) -> None:
    """NaN and Infinity, which JSON does not know but some converters write, count as unknown."""


def _nested_within(value: Any, levels: int) -> bool:
    if not isinstance(value, dict | list):
        return True
    inner = value.values() if isinstance(value, dict) else value
    return levels > 0 and all(_nested_within(v, levels - 1) for v in inner)
