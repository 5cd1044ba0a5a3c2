"""Write a new BIDS dataset, such as a phantom, once all its files are complete.

Files are written in a hidden folder inside the dataset and renamed into place at the end. A hidden
record lists the files and folders that were put in place. Only these are replaced if the same
program makes the dataset again, so that results beside them, such as derivatives/qsphere, are kept.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from filelock import FileLock, Timeout
from jaxtyping import Float, Shaped

from bidsapp.acquisition import Acquisition
from bidsapp.bids import btable
from bidsapp.bids.writer import to_json, to_tsv
from bidsapp.errors import UsageError

STAGING = ".qsphere-staging"
"""Name of the hidden folder."""

SHARED = ("derivatives", "sourcedata")
"""Top-level folders that may hold files of other programs, so that their content is recorded and
replaced, not the folder itself."""


class NewDataset:
    """The files of a new dataset, made by `new_dataset`. Paths are relative to its root."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def text(self, path: PurePosixPath | str, text: str) -> None:
        """Write a text file."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def json(self, path: PurePosixPath | str, content: Mapping[str, Any]) -> None:
        """Write a JSON file."""
        self.text(path, to_json(content))

    def table(self, path: PurePosixPath | str, rows: Iterable[Mapping[Any, Any]],
              columns: Mapping[str, Any]) -> None:
        """Write a TSV, and the JSON that describes its columns."""
        self.text(path, to_tsv(rows))
        self.json(PurePosixPath(path).with_suffix(".json"), columns)

    def image(self, path: PurePosixPath, data: Shaped[np.ndarray, "*k x y z"], affine: np.ndarray,
              sidecar: Mapping[str, Any] | None = None, repetition_time: float = 0) -> None:
        """Write a NIfTI image, and its sidecar if given.

        data: (x, y, z), or (volume, x, y, z), whose first axis becomes the last in the file.
        affine: voxel indices to RAS+ of the scanner, mm. repetition_time: s.
        """
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        image = nib.Nifti1Image(np.moveaxis(data, 0, -1) if data.ndim > 3 else data, affine)
        image.set_qform(affine, 1)
        image.set_sform(affine, 1)
        image.header.set_xyzt_units("mm", "sec" if data.ndim > 3 else "unknown")
        if repetition_time:
            image.header.set_zooms((*image.header.get_zooms()[:3], repetition_time))
        nib.save(image, file)
        if sidecar is not None:
            self.json(path.with_name(path.name.removesuffix(".nii.gz") + ".json"), sidecar)

    def gradients(self, path: PurePosixPath, acquisition: Acquisition,
                  affine: Float[np.ndarray, "4 4"]) -> None:
        """Write the .bval and .bvec of an image …_dwi.nii.gz."""
        stem = path.name.removesuffix(".nii.gz")
        self.text(path.with_name(f"{stem}.bval"), btable.text(acquisition.bvals[None]))
        self.text(path.with_name(f"{stem}.bvec"), btable.text(btable.to_fsl(acquisition, affine)))


@contextmanager
def new_dataset(root: Path, maker: str) -> Iterator[NewDataset]:
    """Write a dataset in the block and put it in place at its end, unless there is an exception.

    Parameters
    ----------
    root : Path
        Root of the dataset.
    maker : str
        Name of the program that makes it, in the names of its record and lock.

    Yields
    ------
    NewDataset

    Raises
    ------
    UsageError
        `root` holds files that this maker has not made, cannot be written, or is in use.
    """
    root = root.absolute()
    record, staging = root / f".{maker}.json", root / STAGING
    try:
        if root.exists() and not root.is_dir():
            raise UsageError(f"{root} is a file. Give a new or empty folder.")
        existing = sorted(p.name for p in root.iterdir()) if root.exists() else []
        if existing and not record.exists() and not set(existing) <= {STAGING, f".{maker}.lock"}:
            raise UsageError(f"{root} is not empty (it holds {', '.join(existing[:3])}…) and was "
                             f"not made by {maker}. Give a new or empty folder.")
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{maker}.lock", timeout=0):
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir()
            try:
                yield NewDataset(staging)
                _replace(root, staging, record)
            finally:
                shutil.rmtree(staging, ignore_errors=True)
    except Timeout as error:
        raise UsageError(f"another {maker} is writing {root}. Wait for it, or give another "
                         "folder.") from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT,
                               errno.ENOTDIR):
            raise
        raise UsageError(f"{root} cannot be written ({error.strerror}). Give a folder that you may "
                         "write to and that has free space.") from error


def _replace(root: Path, staging: Path, record: Path) -> None:
    """Replace the recorded entries by those of the staging folder.

    The record lists old and new entries meanwhile, so that the next call replaces both if this one
    is killed.
    """
    entries = [p.relative_to(staging) for p in sorted(staging.iterdir()) if p.name not in SHARED]
    entries += [p.relative_to(staging) for name in SHARED
                for p in sorted((staging / name).glob("*"))]
    try:
        old = json.loads(record.read_text()) if record.exists() else []
    except ValueError:  # truncated; entries of the new dataset are replaced in any case
        old = []
    record.write_text(to_json(sorted({*old, *map(str, entries)})))
    for name in {*old, *map(str, entries)}:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    for entry in entries:
        (root / entry).parent.mkdir(exist_ok=True)
        (staging / entry).rename(root / entry)
    record.write_text(to_json(sorted(map(str, entries))))
