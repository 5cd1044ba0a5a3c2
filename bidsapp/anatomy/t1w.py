"""Tissue posteriors on the grid of the diffusion images, from a T1w image of the participant.

The brain mask of the diffusion images is moved to the T1w image by a rigid registration
(`registration.rigid`). Inside it, the bias field is corrected by N4 (Tustison et al. 2010,
doi:10.1109/TMI.2010.2046908) and tissue is segmented by Atropos (Avants et al. 2011,
doi:10.1007/s12021-011-9109-y), both of antspyx. The posteriors are averaged over the voxels of the
diffusion images.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bidsapp.dwi import Dwi, open_image, read_array
from bidsapp.errors import DataError
from bidsapp.registration import rigid
from bidsapp.registration.geometry import transform_points
from bidsapp.registration.itk import temporary_folder, to_ants

TISSUES = ("GM", "WM", "CSF")
"""BIDS labels of the tissues, in the order of the posteriors' columns."""

FINEST = 1.5
"""Smallest voxel size of the T1w image, in mm. A finer image is resampled to it, since diffusion
images do not resolve more."""

MIN_COVERAGE = 0.5
"""Smallest share of the brain mask that the T1w image must cover."""

SMOOTHNESS = "[0.1,1x1x1]"
"""Weight and radius of Atropos' Markov random field."""


class Anatomy(NamedTuple):
    """A T1w image, at most as fine as FINEST, and where the diffusion images lie in it.

    Attributes
    ----------
    image : (x, y, z) float32
    affine : (4, 4)
        Its voxel indices to world RAS+, mm.
    transform : (4, 4)
        World of the diffusion images → world of the T1w image, mm.
    """

    image: np.ndarray
    affine: np.ndarray
    transform: np.ndarray


def register(dwi: Dwi, t1w: Path) -> Anatomy:
    """Read a T1w image of the same head and register the diffusion images to it.

    Raises
    ------
    DataError
        The image is unreadable, without contrast, or shows less than half of the brain.
    """
    image, affine = read(t1w)
    transform = rigid.align(dwi, image, affine)
    at = _voxels(dwi.mask, dwi.affine, transform, affine)
    coverage = np.all((at >= 0) & (at <= np.array(image.shape)[:, None] - 1), axis=0).mean()
    if coverage < MIN_COVERAGE:
        raise DataError(f"{t1w}: covers only {coverage:.0%} of the brain in the diffusion images.")
    return Anatomy(image, affine, transform)


def posteriors(dwi: Dwi, t1w: Path, probsegs: Sequence[Path] = (), work_dir: Path | None = None,
               anatomy: Anatomy | None = None) -> np.ndarray:
    """Estimate the tissue probabilities of the brain's voxels.

    Parameters
    ----------
    dwi : Dwi
        The diffusion series.
    t1w : Path
        T1w image of the same head.
    probsegs : sequence of Path
        Probability maps of the three tissues in the world coordinates of `t1w`, in the order of
        TISSUES, which are used instead of Atropos'. Their grids may differ from that of `t1w`.
    work_dir : Path, optional
        Folder for temporary files.
    anatomy : Anatomy, optional
        Result of `register` for these images; default: it is called.

    Returns
    -------
    (voxel, 3) float32
        Probabilities of grey matter, white matter and CSF, Σ ≤ 1.

    Raises
    ------
    DataError
        An image cannot be read, has no contrast, or covers less than half of the brain; or the
        brain mask is too thin for N4.
    """
    image, affine, transform = anatomy = anatomy or register(dwi, t1w)
    if probsegs:
        maps = [read(path) for path in probsegs]
    else:
        brain = brain_mask(dwi, anatomy)
        maps = [(m, affine) for m in _atropos(image, affine, brain, work_dir)]
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0).mean()
    columns = [_sample(m, a, _voxels(dwi.mask, dwi.affine, transform, a), size) for m, a in maps]
    p = np.column_stack(columns).clip(0, 1)
    return (p / np.maximum(p.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def _atropos(image: np.ndarray, affine: np.ndarray, brain: np.ndarray, work_dir: Path | None
             ) -> list[np.ndarray]:
    """Posterior maps in the order of TISSUES, reproducible by one thread and a fixed seed (r=0)."""
    import ants
    from scipy.ndimage import binary_erosion, binary_opening, label

    size = np.linalg.norm(affine[:3, :3], axis=0)

    # the edge of the mask holds scalp, whose fat is the brightest tissue of a T1w image
    core = binary_erosion(brain, iterations=max(1, round(5 / size.mean())))
    if not core.any():
        raise DataError("the brain mask is too thin to estimate the bias field.")
    flat = ants.n4_bias_field_correction(
        to_ants(image, affine), mask=to_ants(core, affine),
        shrink_factor=max(1, round(4 / size.mean())), rescale_intensities=False,
        convergence={"iters": [50] * 4, "tol": 1e-7}).numpy()
    inside = binary_opening(brain & (flat < 1.1 * np.percentile(flat[core], 99.5)))
    parts = label(inside)[0]
    inside = parts == np.bincount(parts.ravel())[1:].argmax() + 1 if parts.any() else core
    with temporary_folder(work_dir):
        classes = ants.atropos(to_ants(flat, affine), to_ants(inside, affine), i="kmeans[3]",
                               m=SMOOTHNESS, c="[5,0]", r=0)["probabilityimages"]
    maps = sorted((c.numpy() for c in classes), key=lambda p: (p * flat).sum() / max(p.sum(), 1e-9))
    return [maps[1], maps[2], maps[0]]  # from dark to bright: CSF, grey matter, white matter


def read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read an image, (x, y, z) float32, and its affine; voxels smaller than FINEST are enlarged.

    Raises
    ------
    DataError
        It is unreadable or no volume with contrast.
    """
    from scipy.ndimage import gaussian_filter, zoom

    image = open_image(path)
    values = np.nan_to_num(read_array(image, np.float32), posinf=0, neginf=0)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or min(values.shape) < 2 or not np.ptp(values) > 0:
        raise DataError(f"{path}: is not a volume with contrast (shape {values.shape}).")
    size = np.linalg.norm(image.affine[:3, :3], axis=0)
    new = np.maximum(1, np.round(np.array(values.shape) * size / np.maximum(size, FINEST)))
    factor = new / values.shape
    if (factor == 1).all():
        return values, image.affine
    smooth = gaussian_filter(values, np.where(factor < 1, 0.4 / factor, 0))
    affine = image.affine.copy()
    affine[:3, :3] = image.affine[:3, :3] / factor
    affine[:3, 3] += image.affine[:3, :3] @ (0.5 / factor - 0.5)
    return zoom(smooth, factor, order=1, grid_mode=True, mode="nearest"), affine


def brain_mask(dwi: Dwi, anatomy: Anatomy) -> np.ndarray:
    """Bring the brain mask of the diffusion images to the grid of the T1w image.

    Returns
    -------
    (x, y, z) bool
    """
    from scipy.ndimage import affine_transform

    to_dwi = np.linalg.inv(anatomy.transform @ dwi.affine) @ anatomy.affine
    return affine_transform(dwi.mask.astype(np.float32), to_dwi[:3, :3], to_dwi[:3, 3],
                            anatomy.image.shape, order=1) > 0.5


def _sample(values: np.ndarray, affine: np.ndarray, at: np.ndarray, size: float) -> np.ndarray:
    """Means over voxels of `size` mm at (3, voxel) coordinates, by a Gaussian of the variance of
    that box; 0 outside the image."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    voxel = np.linalg.norm(affine[:3, :3], axis=0)
    smooth = gaussian_filter(values, np.sqrt(np.maximum(size**2 - voxel**2, 0) / 12) / voxel)
    return map_coordinates(smooth, at, order=1)


def _voxels(mask: np.ndarray, affine: np.ndarray, transform: np.ndarray, other: np.ndarray
            ) -> np.ndarray:
    """(3, voxel) coordinates of the mask's voxels in the image of affine `other`."""
    return transform_points(np.linalg.inv(other) @ transform @ affine, np.argwhere(mask)).T
