"""Affine registration of images of different heads.

antspyx (Avants et al. 2011, doi:10.1016/j.neuroimage.2010.09.025) finds twelve parameters that
maximise the mutual information over all voxels. It starts with the centres of mass aligned.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float

from bidsapp.registration.image import Image
from bidsapp.registration.itk import FLIP, temporary_folder, to_ants

SHRINK, MIN_VOXELS = (6, 4, 2, 1), 8
"""Shrink factors of the resolution levels, and the minimum number of voxels along each axis of a
shrunken image. Factors that would leave fewer are lowered."""

ITERATIONS = (500, 250, 100, 10)
"""Iterations at each level. At full resolution, the slowest level, more than ten changed nothing
(measured on one pair of heads)."""


def register(fixed: Image, moving: Image, work_dir: Path | None = None
             ) -> Float[np.ndarray, "4 4"]:
    """Register two images by an affine transform.

    Parameters
    ----------
    fixed, moving : Image
        The two images.
    work_dir : Path, optional
        Folder for temporary files.

    Returns
    -------
    (4, 4)
        World of `fixed` → world of `moving`, mm.
    """
    images = [to_ants(image.values, image.affine) for image in (fixed, moving)]
    most = min(*fixed.values.shape, *moving.values.shape) // MIN_VOXELS
    import ants

    with temporary_folder(work_dir) as folder:
        result = ants.registration(
            *images, type_of_transform="Affine", outprefix=f"{folder}/affine",
            aff_random_sampling_rate=1.0, aff_iterations=ITERATIONS,
            aff_shrink_factors=tuple(max(1, min(f, most)) for f in SHRINK))
        transform = ants.read_transform(result["fwdtransforms"][0])
        matrix, shift = np.split(np.asarray(transform.parameters, np.float64), [9])
        centre = np.asarray(transform.fixed_parameters, np.float64)
    linear = matrix.reshape(3, 3)
    affine = np.eye(4)
    affine[:3, :3] = FLIP[:, None] * linear * FLIP
    affine[:3, 3] = FLIP * (centre + shift - linear @ centre)
    return affine
