"""Grids and their places in the world (RAS+, mm)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int, Shaped
from nibabel import orientations


def transform_points(affine: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Apply a (4, 4) affine to points, whose last axis is (x, y, z)."""
    return points @ affine[:3, :3].T + affine[:3, 3]


def world_points(shape: Sequence[int], affine: np.ndarray) -> Float[np.ndarray, "x y z 3"]:
    """List the world points of all voxels of a grid."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return transform_points(affine, index)


def grid_coordinates(affine: np.ndarray, points: Float[np.ndarray, "*grid 3"]) -> np.ndarray:
    """Find world points on a grid: (3, …) as `scipy.ndimage.map_coordinates` asks.

    Parameters
    ----------
    affine : (4, 4)
        Of the grid: voxel indices to world RAS+, mm.
    points : (…, 3)
        World, mm.
    """
    return np.moveaxis(transform_points(np.linalg.inv(affine), points), -1, 0)


def canonical(mask: np.ndarray, affine: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, " voxel"]]:
    """Turn a mask so that its axes are as near to the world's (RAS+) as possible.

    A network of patches must not depend on how an image is stored.

    Parameters
    ----------
    mask : (x, y, z) bool
    affine : (4, 4)

    Returns
    -------
    mask, affine
        The same in the new order of axes.
    rows : (voxel,) int
        Row of the old mask that each voxel of the new one comes from.
    """
    axes = orientations.io_orientation(affine)
    row = np.full(mask.shape, -1)
    row[mask] = np.arange(mask.sum())
    row = np.ascontiguousarray(orientations.apply_orientation(row, axes))
    inside = row >= 0
    return inside, affine @ orientations.inv_ornt_aff(axes, mask.shape), row[inside]


def fill_nearest(values: Shaped[np.ndarray, "voxel k"], mask: np.ndarray,
                 usable: np.ndarray | None = None, margin: int = 0
                 ) -> Float[np.ndarray, "x y z k"]:
    """Put values of voxels on the grid, and the nearest of them everywhere else.

    Parameters
    ----------
    values : (voxel, k)
        Of the mask's voxels, or of the usable ones among them.
    mask : (x, y, z) bool
    usable : (voxel of the mask,) bool, optional
    margin : int
        Voxels by which the grid is wider on every side.

    Returns
    -------
    (x + 2 margin, y + 2 margin, z + 2 margin, k)
    """
    from scipy.ndimage import distance_transform_edt

    inside = mask.copy()
    if usable is not None:
        inside[mask] = usable
    inside = np.pad(inside, margin)
    nearest = distance_transform_edt(~inside, return_distances=False, return_indices=True)
    row = np.zeros(inside.shape, np.int32)
    row[inside] = np.arange(len(values))
    return values[row[tuple(nearest)]]
