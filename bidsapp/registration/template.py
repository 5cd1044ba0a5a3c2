"""A space that people share: the mean of their FA images, and where it lies in each of them.

A point p of the fixed image lies in the moving one at φ(p) = A (p + u(p)): A is affine
(`registration.affine`), u is found as between the scans of one head (`registration.deformable`),
but at half the resolution, for what is carried over is smooth.
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
"""The first template is one person's image, each further one the mean after a registration to the
one before."""

MARGIN = 6.0
"""mm about the brain."""

ITERATIONS = (40, 20, 0)
"""Of SyN, at a quarter, half and the whole of the resolution."""


def build(images: Sequence[Image], work_dir: Path | None = None, workers: int = 1
          ) -> tuple[Image, list[Float[np.ndarray, "x y z 3"]]]:
    """The template of FA images, and for each of them the world points at which the template's
    voxels lie. It begins as the image of median volume: its size is nobody's extreme. workers:
    processes that register side by side, each an image at a time."""
    start = sorted(images, key=lambda i: i.volume)[(len(images) - 1) // 2]
    affine, shape = _grid(images, start)
    template = Image(start.at(world_points(shape, affine)).astype(np.float32), affine)
    with spread(workers) as each:
        for number in range(1, ROUNDS + 1):
            found = each(register, [(template, image, work_dir) for image in images])
            places = [next(found) for _ in track(
                images, f"template, round {number} of {ROUNDS}: registering")]
            mean = np.mean([image.at(p) for image, p in zip(images, places, strict=True)], axis=0)
            template = Image(mean.astype(np.float32), affine)
    return template, places


def register(fixed: Image, moving: Image, work_dir: Path | None = None
           ) -> Float[np.ndarray, "x y z 3"]:
    """φ at the voxels of `fixed`: world points of `moving`. The same whatever the order of the
    axes of `fixed`."""
    import nibabel as nib

    order = nib.orientations.io_orientation(fixed.affine)
    values = nib.orientations.apply_orientation(fixed.values, order)
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(order, fixed.values.shape)
    linear = affine_registration.register(Image(values, affine), moving, work_dir)
    points = world_points(values.shape, affine)
    seen = moving.at(transform_points(linear, points))
    u = displacement(values, seen, affine, work_dir, ITERATIONS)
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], order)
    return nib.orientations.apply_orientation(transform_points(linear, points + u), back)


def _grid(images: Sequence[Image], start: Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """Voxels as wide as the images' are on average, along the axes of the world, about `start`."""
    size = float(np.median([abs(np.linalg.det(i.affine[:3, :3])) ** (1 / 3) for i in images]))
    points = transform_points(start.affine, np.argwhere(start.values > 0))
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = low
    return affine, tuple(int(n) for n in np.ceil((high - low) / size) + 1)
