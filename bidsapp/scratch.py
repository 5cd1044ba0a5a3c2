"""Temporary folders that the next process removes if the one that made them was killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "qsphere-"
"""Prefix of temporary folders in a folder that is shared with other programs."""


@contextlib.contextmanager
def folder(parent: Path, prefix: str = "") -> Iterator[Path]:
    """Make an empty folder for the block, with a lock beside it while its owner is alive."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"
    with FileLock(path.with_suffix(".lock")) as lock:
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def sweep(parent: Path, prefix: str = "") -> None:
    """Remove the folders of processes that are dead, made there by `folder`."""
    for path in parent.glob(f"{prefix}*.lock"):
        with contextlib.suppress(OSError, Timeout), FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(parent: Path | None) -> Iterator[Path]:
    """Make an empty folder for the block.

    Parameters
    ----------
    parent : Path or None
        Folder to make it in, which is swept first; None: the system's temporary folder.

    Yields
    ------
    Path
    """
    if parent is None:
        with tempfile.TemporaryDirectory() as path:
            yield Path(path)
        return
    sweep(parent, PREFIX)
    with folder(parent, PREFIX) as new:
        yield new
