"""Images for antspyx in the frame of ITK (LPS+), and a folder for its temporary files."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp import scratch

FLIP = np.array([-1.0, -1.0, 1.0])
"""Signs that convert world points between RAS+ and LPS+, the frame of ITK."""


def to_ants(values: np.ndarray, affine: np.ndarray) -> Any:
    """Make an image for antspyx, which then computes on one thread with a fixed seed.

    Variables of the environment that are already set (ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS,
    ANTS_RANDOM_SEED) have precedence.

    Parameters
    ----------
    values : (x, y, z)
        The image.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.

    Returns
    -------
    ants.ANTsImage
        The image in float32.
    """
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    os.environ.setdefault("ANTS_RANDOM_SEED", "1")
    import ants

    size = np.linalg.norm(affine[:3, :3], axis=0)
    return ants.from_numpy(
        np.ascontiguousarray(values, np.float32), origin=(FLIP * affine[:3, 3]).tolist(),
        spacing=size.tolist(), direction=FLIP[:, None] * affine[:3, :3] / size)


@contextmanager
def temporary_folder(work_dir: Path | None) -> Iterator[str]:
    """Make a temporary folder for the block, which Python's `tempfile`, and so antspyx, uses."""
    before = tempfile.tempdir
    with scratch.temporary(work_dir) as folder:
        tempfile.tempdir = str(folder)
        try:
            yield tempfile.tempdir
        finally:
            tempfile.tempdir = before
