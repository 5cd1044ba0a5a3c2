"""Deformable registration: antspyx' SyN (Avants et al. 2008, doi:10.1016/j.media.2007.06.004).

Local cross-correlation over all voxels, on one thread, so that it repeats itself to the byte. Of a
voxel of the fixed image at the world point p, the moving image shows what lies at

    φ(p) = M(p + u(p)),   J = ∂φ/∂p = R S,

M a rigid or affine transform, u the displacement found here, and R the rotation of the polar
decomposition (finite strain: Alexander et al. 2001, doi:10.1109/42.963816): what the moving image
has along n stands in the fixed one along Rᵀ n.
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
"""At a quarter, half and the whole of the resolution."""

RADIUS = 3
"""Voxels, of the local cross-correlation."""


def displacement(fixed: np.ndarray, moving: np.ndarray, affine: np.ndarray, work_dir: Path | None,
                 iterations: Sequence[int] = ITERATIONS, flow: float = 3.0
                 ) -> Float[np.ndarray, "x y z 3"]:
    """Find the displacement u between two images on one grid.

    Parameters
    ----------
    fixed, moving : (x, y, z)
    affine : (4, 4)
        Of both.
    work_dir : Path or None
        For temporary files.
    iterations : sequence of int
        At a quarter, half and the whole of the resolution.
    flow : float
        Variance, in voxels², of the Gaussian that smooths every update. The default is antspyx'
        own, which serves unlike heads.

    Returns
    -------
    (x, y, z, 3)
        World, mm.
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
    """Rᵀ of the polar decomposition of ∂φ/∂p.

    Parameters
    ----------
    points : (x, y, z, 3)
        φ at the voxels of a grid, world.
    affine : (4, 4)
        Of the grid.
    inside : (x, y, z) bool, optional
        Voxels whose rotations are wanted; default: all.
    """
    slopes = np.stack([np.gradient(points, axis=a)[inside] for a in range(3)], -1)
    left, _, right = np.linalg.svd(slopes @ np.linalg.inv(affine[:3, :3]))
    left[..., -1] *= np.linalg.det(left @ right)[..., None]
    return (left @ right).swapaxes(-1, -2)
