"""Conversion between voxels and world points (RAS+, mm), and values of voxels on a grid."""

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
    """Convert world points to coordinates of a grid.

    Parameters
    ----------
    affine : (4, 4)
        Voxel indices of the grid to world RAS+, mm.
    points : (…, 3)
        World points, mm.

    Returns
    -------
    (3, …)
        Voxel coordinates, in the form that `scipy.ndimage.map_coordinates` takes.
    """
    return np.moveaxis(transform_points(np.linalg.inv(affine), points), -1, 0)


def canonical(mask: np.ndarray, affine: np.ndarray
              ) -> tuple[np.ndarray, np.ndarray, Int[np.ndarray, " voxel"]]:
    """Reorient a mask to the axes closest to those of the world (RAS+).

    The output of a network on patches must not depend on the storage order of an image.

    Parameters
    ----------
    mask : (x, y, z) bool
        Mask of an image.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.

    Returns
    -------
    mask, affine
        Mask and affine with the new axes.
    rows : (voxel,) int
        For each voxel of the new mask, its row among the voxels of the old one: `signal[rows]` is
        the signal of the reoriented image.
    """
    axes = orientations.io_orientation(affine)
    row = np.full(mask.shape, -1)
    row[mask] = np.arange(mask.sum())
    row = np.ascontiguousarray(orientations.apply_orientation(row, axes))
    inside = row >= 0
    return inside, affine @ orientations.inv_ornt_aff(axes, mask.shape), row[inside]


def fill_nearest(values: Shaped[np.ndarray, "voxel k"], mask: np.ndarray,
                 usable: np.ndarray | None = None, margin: int = 0
                 ) -> Shaped[np.ndarray, "x y z k"]:
    """Put the values of voxels on their grid, and fill the rest with the nearest of them.

    Parameters
    ----------
    values : (voxel, k)
        Values of the voxels of the mask; with `usable`, of the usable ones alone.
    mask : (x, y, z) bool
        Mask of the values.
    usable : (voxel of the mask,) bool, optional
        Voxels of the mask that have a row in `values`; default: all.
    margin : int
        Voxels that are added on each side of the grid.

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
