"""A space that people share: the mean of their FA images, and where it lies in each of them.

A point p of the fixed image lies in the moving one at φ(p) = A (p + u(p)): A of twelve parameters,
by mutual information (antspyx, all voxels, from the centres of mass), then u as between the scans
of a pair (`preprocess.pairs`), at half the resolution, for what is carried over is smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bidsapp.preprocess import anatomy, pairs
from bidsapp.progress import track

ROUNDS = 2
"""The first template is one person's image, each further one the mean after a registration to the
one before."""

MARGIN = 6.0
"""mm about the brain."""

ITERATIONS = (40, 20, 0)
"""Of SyN, at a quarter, half and the whole of the resolution."""


SHRINK, ENOUGH = (6, 4, 2, 1), 8
"""Of the affine registration: factors by which images shrink, less where fewer than so many voxels
would remain along an axis."""

AFFINE_ITERATIONS = (500, 250, 100, 10)
"""At each: at the whole resolution, which takes longest, more than ten changed nothing (one
pair of heads)."""


@dataclass(frozen=True, eq=False)
class Image:
    """values: (x, y, z), 0 outside the brain; affine: (4, 4) to world RAS+, mm."""

    values: np.ndarray
    affine: np.ndarray

    def at(self, place: Float[np.ndarray, "*grid 3"]) -> Float[np.ndarray, "*grid"]:
        """Linear interpolation at world points; 0 beyond the image."""
        return sample(self.values, self.affine, place)

    @property
    def volume(self) -> float:
        """mm³ of what is not 0."""
        return float((self.values > 0).sum() * abs(np.linalg.det(self.affine[:3, :3])))


def sample(values: Float[np.ndarray, "x y z"], affine: np.ndarray,
           place: Float[np.ndarray, "*grid 3"], *, beyond: str = "constant"
           ) -> Float[np.ndarray, "*grid"]:
    """Linear interpolation at world points. beyond: the image there is 0, or its `nearest` edge."""
    from scipy.ndimage import map_coordinates

    return map_coordinates(values, pairs.indices(np.linalg.inv(affine), place), order=1,
                           mode=beyond)


def build(images: Sequence[Image], work_dir: Path | None = None
          ) -> tuple[Image, list[Float[np.ndarray, "x y z 3"]]]:
    """The template of FA images, and for each of them the world points at which the template's
    voxels lie. It begins as the image of median volume: its size is nobody's extreme."""
    start = sorted(images, key=lambda i: i.volume)[(len(images) - 1) // 2]
    affine, shape = _grid(images, start)
    template = Image(start.at(pairs.world(shape, affine)).astype(np.float32), affine)
    for number in range(1, ROUNDS + 1):
        places = [locate(template, image, work_dir) for image in track(
            images, f"template, round {number} of {ROUNDS}: registering")]
        mean = np.mean([image.at(p) for image, p in zip(images, places, strict=True)], axis=0)
        template = Image(mean.astype(np.float32), affine)
    return template, places


def locate(fixed: Image, moving: Image, work_dir: Path | None = None
           ) -> Float[np.ndarray, "x y z 3"]:
    """φ at the voxels of `fixed`: world points of `moving`. The same whatever the order of the
    axes of `fixed`."""
    import nibabel as nib

    order = nib.orientations.io_orientation(fixed.affine)
    values = nib.orientations.apply_orientation(fixed.values, order)
    affine = fixed.affine @ nib.orientations.inv_ornt_aff(order, fixed.values.shape)
    move = _affine(Image(values, affine), moving, work_dir)
    points = pairs.world(values.shape, affine)
    seen = moving.at(pairs.transformed(move, points))
    u = pairs.displacement(values, seen, affine, work_dir, ITERATIONS)
    back = nib.orientations.ornt_transform([[0, 1], [1, 1], [2, 1]], order)
    return nib.orientations.apply_orientation(pairs.transformed(move, points + u), back)


def _grid(images: Sequence[Image], start: Image) -> tuple[np.ndarray, tuple[int, ...]]:
    """Voxels as wide as the images' are on average, along the axes of the world, about `start`."""
    size = float(np.median([abs(np.linalg.det(i.affine[:3, :3])) ** (1 / 3) for i in images]))
    points = pairs.transformed(start.affine, np.argwhere(start.values > 0))
    low, high = points.min(0) - MARGIN, points.max(0) + MARGIN
    affine = np.diag([size, size, size, 1.0])
    affine[:3, 3] = low
    return affine, tuple(int(n) for n in np.ceil((high - low) / size) + 1)


def _affine(fixed: Image, moving: Image, work_dir: Path | None) -> np.ndarray:
    """(4, 4) world of `fixed` → world of `moving`."""
    images = [pairs.to_ants(i.values, i.affine) for i in (fixed, moving)]
    most = min(*fixed.values.shape, *moving.values.shape) // ENOUGH
    import ants

    with anatomy.temporary(work_dir) as folder:
        found = ants.registration(
            *images, type_of_transform="Affine", outprefix=f"{folder}/affine",
            aff_random_sampling_rate=1.0, aff_iterations=AFFINE_ITERATIONS,
            aff_shrink_factors=tuple(max(1, min(f, most)) for f in SHRINK))
        read = ants.read_transform(found["fwdtransforms"][0])
        matrix, shift = np.split(np.asarray(read.parameters, np.float64), [9])
        centre = np.asarray(read.fixed_parameters, np.float64)
    move = np.eye(4)
    turn = matrix.reshape(3, 3)
    move[:3, :3] = pairs.FLIP[:, None] * turn * pairs.FLIP
    move[:3, 3] = pairs.FLIP * (centre + shift - turn @ centre)
    return move
