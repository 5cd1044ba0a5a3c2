"""Temporary folders that the next process removes where the one that made them was killed."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

PREFIX = "qsphere-"
"""Begins the names of temporary folders in a folder that others use, too."""


@contextlib.contextmanager
def folder(parent: Path, prefix: str = "") -> Iterator[Path]:
    """Make an empty folder for the block. A lock beside it says that its owner lives."""
    path = parent / f"{prefix}{uuid.uuid4().hex}"
    with FileLock(path.with_suffix(".lock")) as lock:
        path.mkdir()
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            Path(lock.lock_file).unlink(missing_ok=True)


def sweep(parent: Path, prefix: str = "") -> None:
    """Remove the folders that `folder` made there for processes that are dead."""
    for path in parent.glob(f"{prefix}*.lock"):
        with contextlib.suppress(OSError, Timeout), FileLock(path, timeout=0):
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def temporary(parent: Path | None) -> Iterator[Path]:
    """Make an empty folder for the block, in the system's place for such or, swept, in `parent`."""
    if parent is None:
        with tempfile.TemporaryDirectory() as made:
            yield Path(made)
        return
    sweep(parent, PREFIX)
    with folder(parent, PREFIX) as path:
        yield path
