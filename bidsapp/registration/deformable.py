"""Deformable registration by SyN of antspyx (Avants et al. 2008, doi:10.1016/j.media.2007.06.004).

The metric is the local cross-correlation over all voxels. antspyx runs on one thread (`to_ants`),
so that results are identical to the byte. The voxel of the fixed image at the world point p
corresponds to the point φ(p) of the moving image,

    φ(p) = M(p + u(p)),   J = ∂φ/∂p = R S,

with M a rigid or affine transform that is found first, u the displacement, and R the rotation of
the polar decomposition (finite strain: Alexander et al. 2001, doi:10.1109/42.963816). A direction n
of the moving image corresponds to Rᵀ n in the fixed image.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bidsapp.dwi import open_image
from bidsapp.registration.itk import FLIP, temporary_folder, to_ants

ITERATIONS = (40, 20, 10)
"""Iterations at a quarter, at half and at full resolution."""

RADIUS = 3
"""Radius of the local cross-correlation, in voxels."""


def displacement(fixed: np.ndarray, moving: np.ndarray, affine: np.ndarray, work_dir: Path | None,
                 iterations: Sequence[int] = ITERATIONS, flow: float = 3.0
                 ) -> Float[np.ndarray, "x y z 3"]:
    """Find the displacement u between two images on one grid, after M has been applied.

    Parameters
    ----------
    fixed, moving : (x, y, z)
        The fixed image, and the moving image resampled by M on its grid.
    affine : (4, 4)
        Voxel indices of both images to world RAS+, mm.
    work_dir : Path or None
        Folder for temporary files.
    iterations : sequence of int
        Iterations at a quarter, at half and at full resolution.
    flow : float
        Variance, in voxels², of the Gaussian that smooths each update. The default, that of
        antspyx, suits images of different heads.

    Returns
    -------
    (x, y, z, 3)
        u at the voxels of the grid: world RAS+, mm.
    """
    images = [to_ants(v, affine) for v in (fixed, moving)]
    import ants

    with temporary_folder(work_dir) as folder:
        result = ants.registration(
            *images,
            type_of_transform="SyNOnly", initial_transform="Identity", syn_metric="CC",
            syn_sampling=RADIUS, reg_iterations=iterations, flow_sigma=flow,
            outprefix=f"{folder}/syn")
        warp = next(f for f in result["fwdtransforms"] if f.endswith(".nii.gz"))
        u = np.asarray(open_image(Path(warp)).dataobj, np.float64)[..., 0, :]
    return u * FLIP


def rotations(points: Float[np.ndarray, "x y z 3"], affine: np.ndarray,
              inside: Any = ...) -> Float[np.ndarray, "*voxel 3 3"]:
    """Compute Rᵀ of the polar decomposition of ∂φ/∂p.

    Parameters
    ----------
    points : (x, y, z, 3)
        φ at the voxels of a grid: world, mm.
    affine : (4, 4)
        Voxel indices of the grid to world RAS+, mm.
    inside : (x, y, z) bool, optional
        Voxels whose rotations are computed; default: all.

    Returns
    -------
    (…, 3, 3)
        Rᵀ at each voxel, which rotates directions of the moving image to the fixed image.
    """
    slopes = np.stack([np.gradient(points, axis=a)[inside] for a in range(3)], -1)
    left, _, right = np.linalg.svd(slopes @ np.linalg.inv(affine[:3, :3]))
    left[..., -1] *= np.linalg.det(left @ right)[..., None]
    return (left @ right).swapaxes(-1, -2)
