"""antspyx: images and transforms between the world (RAS+) and ITK's (LPS+), reproducibly."""

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
"""World RAS+ to ITK's, LPS+."""


def to_ants(values: np.ndarray, affine: np.ndarray) -> Any:
    """Make an image of antspyx, which then computes on one thread and from one seed.

    Parameters
    ----------
    values : (x, y, z)
    affine : (4, 4)
        Voxel indices to world RAS+, mm.
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
    """Make a folder that is removed with all that antspyx leaves in Python's temporary one."""
    before = tempfile.tempdir
    with scratch.temporary(work_dir) as folder:
        tempfile.tempdir = str(folder)
        try:
            yield tempfile.tempdir
        finally:
            tempfile.tempdir = before
