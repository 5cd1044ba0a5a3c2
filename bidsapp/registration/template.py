"""A template of several participants' FA images, and its registration to each of them.

The point p of the fixed image corresponds to φ(p) = A (p + u(p)) of the moving image. A is affine
(`registration.affine`), and the displacement u is that of SyN (`registration.deformable`) up to
half the resolution. Full resolution is left out, since the maps that are resampled with φ are
smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bidsapp.progress import track
from bidsapp.registration import affine as affine_registration
from bidsapp.registration.deformable import displacement
from bidsapp.registration.geometry import transform_points, world_points
from bidsapp.registration.image import Image
from bidsapp.workers import spread

ROUNDS = 2
"""Rounds of the template's construction. The first template is one participant's image; each round
replaces it by the mean of the images that were registered to it."""

MARGIN = 6.0
"""Margin of the template's grid around the brain, in mm."""

ITERATIONS = (40, 20, 0)
"""Iterations of SyN at a quarter, at half and at full resolution."""


def build(images: Sequence[Image], work_dir: Path | None = None, workers: int = 1
          ) -> tuple[Image, list[Float[np.ndarray, "x y z 3"]]]:
    """Build a template from FA images.

    It starts as the image whose brain has the median volume, so that its size is not extreme.

    Parameters
    ----------
    images : sequence of Image
        FA images, one per participant.
    work_dir : Path, optional
        Folder for temporary files.
    workers : int
        Number of processes that register side by side.

    Returns
    -------
    template : Image
        Mean of the registered images.
    points : list of (x, y, z, 3)
        For each image, φ at the template's voxels: world points of the image, mm.
    """
    start = sorted(images, key=lambda i: i.volume)[(len(images) - 1) // 2]
    affine, shape = _grid(images, start)
    template = Image(start.at(world_points(shape, affine)).astype(np.float32), affine)
    with spread(workers) as each:
        for number in range(1, ROUNDS + 1):
            results = each(register, [(template, image, work_dir) for image in images])
            points = [next(results) for _ in track(
                images, f"template, round {number} of {ROUNDS}: registering")]
            mean = np.mean([image.at(p) for image, p in zip(images, points, strict=True)], axis=0)
            template = Image(mean.astype(np.float32), affine)
    return template, points


def register(fixed: Image, moving: Image, work_dir: Path | None = None,
             iterations: Sequence[int] = ITERATIONS) -> Float[np.ndarray, "x y z 3"]:
    """Register two images by an affine and a deformable transform.

    The result does not depend on the storage order of `fixed`.

    Parameters
    ----------
    fixed, moving : Image
        The two images.
    work_dir : Path, optional
        Folder for temporary files.
    iterations : sequence of int
        Of SyN, at a quarter, half and the whole of the resolution.

    Returns
    -------
    (x, y, z, 3)
        φ at the voxels of `fixed`: world points of `moving`, mm.
    """
    import nibabel as nib

    order = nib.orientations.io_orientation(fixed.affine)
    values = nib.orientations.apply_orientation(fixed.values, order)
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(order, fixed.values.shape)
    linear = affine_registration.register(Image(values, affine), moving, work_dir)
    points = world_points(values.shape, affine)
    resampled = moving.at(transform_points(linear, points))
    u = displacement(values, resampled, affine, work_dir, iterations)
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], order)
    return nib.orientations.apply_orientation(transform_points(linear, points + u), back)


def _grid(images: Sequence[Image], start: Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """Affine and shape of a grid around `start`, along the axes of the world, with isotropic voxels
    of the images' median size."""
    size = float(np.median([abs(np.linalg.det(i.affine[:3, :3])) ** (1 / 3) for i in images]))
    points = transform_points(start.affine, np.argwhere(start.values > 0))
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = low
    return affine, tuple(int(n) for n in np.ceil((high - low) / size) + 1)
