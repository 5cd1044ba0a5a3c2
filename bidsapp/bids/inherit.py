"""Which files belong to an image: the inheritance principle of BIDS, read from the folders.

A file applies to an image when it stands in the image's folder or above it (up to the dataset's
root), has the same suffix, and no entity that the image does not share. JSON keys nearer to the
image win; of .bval and .bvec the nearest file is used
(https://bids-specification.readthedocs.io/en/stable/common-principles.html#the-inheritance-principle).
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from bidsapp.errors import DataError


def entities_of(name: str) -> dict[str, str]:
    """`sub-01_dir-AP_dwi.nii.gz` → {"sub": "01", "dir": "AP"}; labels as they are written."""
    return dict(part.split("-", 1) for part in name.split(".")[0].split("_") if "-" in part)


def suffix_of(name: str) -> str:
    """The part after the last underscore, without extension: `dwi`."""
    return name.split(".")[0].rsplit("_", 1)[-1]


def stem_of(path: Path) -> Path:
    """The path without .nii or .nii.gz."""
    return path.with_name(path.name.removesuffix(".gz").removesuffix(".nii"))


def applicable(image: Path, root: Path, extension: str) -> list[Path]:
    """Files with this extension that apply to the image, the nearest first.

    Within one folder the file that shares most entities comes first.
    """
    own, suffix = entities_of(image.name), suffix_of(image.name)
    found: list[Path] = []
    folder = image.parent
    while True:
        here = [n for n in _names(folder, folder.stat().st_mtime_ns) if n.endswith(extension)
                and suffix_of(n) == suffix and entities_of(n).items() <= own.items()]
        found += [folder / n for n in sorted(here, key=lambda n: (-len(entities_of(n)), n))]
        if folder in (root, folder.parent):
            return found
        folder = folder.parent


def sidecar(image: Path, root: Path) -> dict[str, Any]:
    """The image's metadata: all JSON files that apply, keys of nearer ones winning.

    Raises:
        DataError: a JSON file is broken, a link to nowhere, or no object.
    """
    merged: dict[str, Any] = {}
    for path in reversed(applicable(image, root, ".json")):
        merged |= _json(here(path), path.stat().st_mtime_ns)
    return merged


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


@lru_cache(maxsize=4096)
def _names(folder: Path, changed: int) -> tuple[str, ...]:
    return tuple(p.name for p in folder.iterdir())


@lru_cache(maxsize=4096)
def _json(path: Path, changed: int) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Correct or remove it.") \
            from error
    if not isinstance(table, dict):
        raise DataError(f"{path}: holds a {type(table).__name__}, an object {{...}} is needed.")
    return table
