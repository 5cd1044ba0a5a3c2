"""Resample finished maps to another grid by one interpolation; write the transform for ITK.

A transform is represented by points: for each voxel of the new grid, the world point (RAS+, mm) of
the source images that it shows. ITK maps points in the same direction, so that
`antsApplyTransforms` with the written file resamples any other image of the run in the same way.
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Shaped

from bidsapp import sh
from bidsapp.dwi import open_image
from bidsapp.registration.geometry import (
    fill_nearest,
    grid_coordinates,
    transform_points,
    world_points,
)
from bidsapp.registration.image import sample

VOXELS = 4096
"""Number of voxels whose densities are rotated at a time."""

def output_grid(shape: Sequence[int], affine: np.ndarray, size: float
                ) -> tuple[tuple[int, ...], Float[np.ndarray, "4 4"]]:
    """Lay a grid of cubic voxels over the field of view of another one.

    Parameters
    ----------
    shape : sequence of int
        Shape of the other grid.
    affine : (4, 4)
        Affine of the other grid: voxel indices to world RAS+, mm.
    size : float
        Edge of the new voxels, mm.

    Returns
    -------
    shape : tuple of int
    affine : (4, 4)
        It has the axes and the outer corner of the other grid.
    """
    edges = np.linalg.norm(affine[:3, :3], axis=0)
    new = affine.copy()
    new[:3, :3] = affine[:3, :3] / edges * size
    new[:3, 3] += (new[:3, :3] - affine[:3, :3]).sum(axis=1) / 2
    count = np.ceil(np.asarray(shape[:3]) * edges / size - 1e-3)
    return tuple(int(n) for n in count), new


def through(points: Float[np.ndarray, "*grid 3"], mapped: Float[np.ndarray, "x y z 3"],
            affine: Float[np.ndarray, "4 4"]) -> Float[np.ndarray, "*grid 3"]:
    """Map world points by a transform that is known at the voxels of a grid.

    Parameters
    ----------
    points : (…, 3)
        World, mm.
    mapped : (x, y, z, 3)
        World points to which the voxels of the grid are mapped, mm (`template.register`).
    affine : (4, 4)
        Affine of the grid. A point beyond it is displaced like the nearest voxel.
    """
    displacement = mapped - world_points(mapped.shape[:3], affine)
    return points + np.stack([sample(displacement[..., k], affine, points, beyond="nearest")
                              for k in range(3)], -1)


def scalars(values: Shaped[np.ndarray, "voxel k"], mask: np.ndarray, affine: np.ndarray,
            points: Float[np.ndarray, "n 3"], order: int = 1) -> Shaped[np.ndarray, "n k"]:
    """Interpolate maps that have values inside a mask.

    The mask is surrounded by its nearest values, so that zeros outside do not affect the result.
    The result is NaN where the value of the nearest voxel of the mask is not finite.

    Parameters
    ----------
    values : (voxel, k)
        Values of the voxels of the mask.
    mask : (x, y, z) bool
    affine : (4, 4)
        Affine of the mask.
    points : (n, 3)
        World points at which to interpolate, mm.
    order : int
        1: linear, 0: nearest voxel.
    """
    from scipy.ndimage import map_coordinates

    usable = np.isfinite(values).all(axis=1)
    if not usable.any():
        return np.full((len(points), values.shape[1]), np.nan)
    coordinates = grid_coordinates(affine, points)
    filled = fill_nearest(values[usable], mask, usable)
    out = np.stack([map_coordinates(filled[..., k], coordinates, order=order, mode="nearest")
                    for k in range(values.shape[1])], -1)
    if not usable.all():
        missing = fill_nearest(~usable[:, None], mask)[..., 0]
        missing = map_coordinates(missing.astype(np.uint8), coordinates, order=0, mode="nearest")
        out[missing > 0] = np.nan
    return out


def directions(values: Float[np.ndarray, "voxel 3"], mask: np.ndarray, affine: np.ndarray,
               points: Float[np.ndarray, "n 3"], rotations: Float[np.ndarray, "n 3 3"]
               ) -> Float[np.ndarray, "n 3"]:
    """Interpolate directions n, whose sign has no meaning, and rotate them with the head.

    n nᵀ is interpolated, and its principal axis is the new direction.

    Parameters
    ----------
    values, mask, affine, points
        Those of `scalars`.
    rotations : (n, 3, 3)
        Rotations of directions from the source images to the new grid (`deformable.rotations`).
    """
    dyads = np.einsum("vi,vj->vij", values, values).reshape(-1, 9)
    mean = scalars(dyads, mask, affine, points).reshape(-1, 3, 3)
    mean[~np.isfinite(mean).all(axis=(1, 2))] = 0
    axis = np.linalg.eigh(mean)[1][..., -1] * (np.trace(mean, axis1=1, axis2=2) > 0)[:, None]
    return np.einsum("nij,nj->ni", rotations, axis)


def densities(values: Float[np.ndarray, "voxel c"], mask: np.ndarray, affine: np.ndarray,
              points: Float[np.ndarray, "n 3"], rotations: Float[np.ndarray, "n 3 3"]
              ) -> Float[np.ndarray, "n c"]:
    """Interpolate SH coefficients of densities on the sphere, and rotate them with the head.

    The parameters are those of `directions`.
    """
    import torch

    mean = scalars(values, mask, affine, points)
    return np.concatenate([
        sh.rotate(torch.from_numpy(mean[i:i + VOXELS]), torch.from_numpy(rotations[i:i + VOXELS]))
        .numpy() for i in range(0, len(mean), VOXELS)]) if len(mean) else mean


def pack_rigid(matrix: Float[np.ndarray, "4 4"]) -> bytes:
    """Write a linear transform, world of the new grid → world of the source, as ITK text.

    The file holds six digits of each number, which moves points by less than 0.001 mm.
    """
    from nitransforms.io.itk import ITKLinearTransform

    return bytes(ITKLinearTransform.from_ras(matrix).to_string(), "ascii")


def pack_field(points: Float[np.ndarray, "x y z 3"], affine: Float[np.ndarray, "4 4"]) -> bytes:
    """Write a deformation as an ITK displacement field (.nii.gz).

    Parameters
    ----------
    points : (x, y, z, 3)
        World points of the source images, mm, at the voxels of the new grid.
    affine : (4, 4)
        Affine of the new grid.
    """
    import nibabel as nib
    from nitransforms.io.itk import ITKDisplacementsField

    displacement = (points - world_points(points.shape[:3], affine)).astype(np.float32)
    image = ITKDisplacementsField.to_image(nib.Nifti1Image(displacement, affine))
    image.header.set_xyzt_units("mm")
    return gzip.compress(image.to_bytes(), 6, mtime=0)


def read_points(path: Path, shape: Sequence[int], affine: Float[np.ndarray, "4 4"]
                ) -> Float[np.ndarray, "x y z 3"]:
    """Read a transform that `pack_rigid` or `pack_field` wrote, as world points of the source."""
    from nitransforms.io.itk import ITKDisplacementsField, ITKLinearTransform

    points = world_points(shape, affine)
    if path.suffix == ".txt":
        return transform_points(ITKLinearTransform.from_filename(path).to_ras(), points)
    return points + np.asarray(ITKDisplacementsField.from_image(open_image(path)).dataobj)
