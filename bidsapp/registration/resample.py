"""Finished maps on another grid, by one interpolation, and the transform as ITK files hold it.

A transform is given as points: for each voxel of the new grid, the place in the world of the old
images that it shows. ITK maps points in this direction, too, so that `antsApplyTransforms` with
the file that is written here does the same to any other image of the run.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped

from bidsapp import sh
from bidsapp.dwi import open_image, read_array
from bidsapp.registration.geometry import (
    fill_nearest,
    grid_coordinates,
    transform_points,
    world_points,
)
from bidsapp.registration.image import sample
from bidsapp.registration.itk import FLIP

VOXELS = 4096
"""Voxels whose densities are turned at a time."""

VECTOR_INTENT = 1007
"""NIfTI code of an image of vectors."""


def output_grid(shape: Sequence[int], affine: np.ndarray, size: float
                ) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]]:
    """Lay a grid of cubic voxels over the field of view of another one.

    Parameters
    ----------
    shape : sequence of int
        Of the other grid.
    affine : (4, 4)
        Of the other grid.
    size : float
        Edge of the new voxels, mm.

    Returns
    -------
    shape : tuple of int
    affine : (4, 4)
        With the axes of the other grid and the same outer corner.
    """
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    new = affine.copy()
    new[:3, :3] = affine[:3, :3] / edges * size
    new[:3, 3] += (new[:3, :3] - affine[:3, :3]).sum(axis=1) / 2
    count = np.ceil(np.asarray(shape[:3]) * edges / size - 1e-3)
    return tuple(int(n) for n in count), new


def through(points: Float[np.ndarray, "*grid 3"], place: Float[np.ndarray, "x y z 3"],
            affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "*grid 3"]:
    """Map world points by a transform that is known at the voxels of a grid.

    Parameters
    ----------
    points : (…, 3)
        World, mm.
    place : (x, y, z, 3)
        Where the voxels of the grid go, world, mm (`template.register`).
    affine : (4, 4)
        Of the grid. Beyond it, a point moves as the nearest voxel does.
    """
    moves = place - world_points(place.shape[:3], affine)
    return points + np.stack([sample(moves[..., k], affine, points, beyond="nearest")
                              for k in range(3)], -1)


def scalars(values: Shaped[np.ndarray, "voxel k"], mask: np.ndarray, affine: np.ndarray,
            points: Float[np.ndarray, "n 3"], order: int = 1) -> Shaped[np.ndarray, "n k"]:
    """Interpolate maps that are known in a mask.

    The nearest values stand outside the mask, so that the zeros there do not bleed in; the result
    lacks a value (NaN) where the nearest voxel of the mask does.

    Parameters
    ----------
    values : (voxel, k)
        Of the mask's voxels.
    mask : (x, y, z) bool
    affine : (4, 4)
        Of the mask.
    points : (n, 3)
        Where values are wanted, world, mm.
    order : int
        1: linear, 0: nearest voxel.
    """
    from scipy.ndimage import map_coordinates

    usable = np.isfinite(values).all(axis=1)
    if not usable.any():
        return np.full((len(points), values.shape[1]), np.nan)
    at = grid_coordinates(affine, points)
    filled = fill_nearest(values[usable], mask, usable)
    out = np.stack([map_coordinates(filled[..., k], at, order=order, mode="nearest")
                    for k in range(values.shape[1])], -1)
    if not usable.all():
        missing = fill_nearest(~usable[:, None], mask)[..., 0]
        out[map_coordinates(missing.astype(np.uint8), at, order=0, mode="nearest") > 0] = np.nan
    return out


def directions(values: Float[np.ndarray, "voxel 3"], mask: np.ndarray, affine: np.ndarray,
               points: Float[np.ndarray, "n 3"], turns: Float[np.ndarray, "n 3 3"]
               ) -> Float[np.ndarray, "n 3"]:
    """Interpolate directions whose sign means nothing, and turn them with the head.

    n nᵀ is interpolated; its principal axis is the new direction. Other arguments as of `scalars`.

    Parameters
    ----------
    turns : (n, 3, 3)
        Rotation of what the old images show at each point (`deformable.rotations`).
    """
    dyads = np.einsum("vi,vj->vij", values, values).reshape(-1, 9)
    seen = scalars(dyads, mask, affine, points).reshape(-1, 3, 3)
    seen[~np.isfinite(seen).all(axis=(1, 2))] = 0
    axis = np.linalg.eigh(seen)[1][..., -1] * (np.trace(seen, axis1=1, axis2=2) > 0)[:, None]
    return np.einsum("nij,nj->ni", turns, axis)


def densities(values: Float[np.ndarray, "voxel c"], mask: np.ndarray, affine: np.ndarray,
              points: Float[np.ndarray, "n 3"], turns: Float[np.ndarray, "n 3 3"]
              ) -> Float[np.ndarray, "n c"]:
    """Interpolate densities on the sphere, as coefficients (`sh`), and turn them with the head.

    Arguments as of `directions`.
    """
    import torch

    seen = scalars(values, mask, affine, points)
    return np.concatenate([
        sh.rotate(torch.from_numpy(seen[i:i + VOXELS]), torch.from_numpy(turns[i:i + VOXELS]))
        .numpy() for i in range(0, len(seen), VOXELS)]) if len(seen) else seen


def pack_rigid(matrix: Float[np.ndarray, "4 4"]) -> bytes:
    """Write a linear transform as an ITK text file. matrix: world of the new grid → old images."""
    linear, shift = FLIP[:, None] * matrix[:3, :3] * FLIP, FLIP * matrix[:3, 3]
    numbers = " ".join(f"{v:.17g}" for v in (*linear.ravel(), *shift))
    return ("#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
            f"Parameters: {numbers}\nFixedParameters: 0 0 0\n").encode()


def pack_field(points: Float[np.ndarray, "x y z 3"], affine: Float[np.ndarray, "4 4"]) -> bytes:
    """Write a deformation as an ITK displacement field (.nii.gz).

    Parameters
    ----------
    points : (x, y, z, 3)
        World of the old images, mm, of the voxels of the new grid.
    affine : (4, 4)
        Of the new grid.
    """
    import nibabel as nib

    moves = (points - world_points(points.shape[:3], affine)) * FLIP
    image = nib.Nifti1Image(moves[..., None, :].astype(np.float32), affine)
    image.header.set_intent(VECTOR_INTENT)
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 6, mtime=0)


def read_points(path: Path, shape: Sequence[int], affine: Float[np.ndarray, "4 4"]
                ) -> Float[np.ndarray, "x y z 3"]:
    """Read a transform that `pack_rigid` or `pack_field` wrote, as points of its new grid."""
    points = world_points(shape, affine)
    if path.suffix == ".txt":
        line = next(t for t in path.read_text().splitlines() if t.startswith("Parameters:"))
        numbers = np.array(line.split()[1:], np.float64)
        matrix = np.eye(4)
        matrix[:3, :3] = FLIP[:, None] * numbers[:9].reshape(3, 3) * FLIP
        matrix[:3, 3] = FLIP * numbers[9:]
        return transform_points(matrix, points)
    moves: Any = read_array(open_image(path), np.float32)[..., 0, :]
    return points + moves * FLIP
