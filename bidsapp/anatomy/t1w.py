"""Brain mask and tissue posteriors from a T1w image of the participant.

The diffusion images are registered to the T1w image by a rigid transform (`registration.rigid`).
The brain is segmented in the T1w image by deepbet (`anatomy.deepbet`). Inside the brain mask of the
diffusion images, the bias field of the T1w image is corrected by N4 (`anatomy.n4`) and tissue is
segmented by Atropos of antspyx (Avants et al. 2011, doi:10.1007/s12021-011-9109-y). Masks and
posteriors are averaged over the voxels of the diffusion images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from bidsapp.anatomy import deepbet, n4
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

MIN_OVERLAP = 0.8
"""Smallest overlap (Dice) of the brain masks of the T1w image and of the b0. It was 0.90 to 0.96,
also for images of two people, and 0.66 where the registration failed."""

MIN_RATIO, MAX_SYMMETRY = 1.1, 0.9
"""Smallest ratio of the T1w image's match to that of its mirror image, and largest symmetry at
which it counts (`rigid.Likeness`). The symmetry of real images was 0.60 to 0.86."""

SMOOTHNESS = "[0.1,1x1x1]"
"""Weight and radius of Atropos' Markov random field."""


class Anatomy(NamedTuple):
    """A T1w image, at most as fine as FINEST, and where the diffusion images lie in it.

    Attributes
    ----------
    image : (x, y, z) float32
        Without bias field, if the brain was found.
    affine : (4, 4)
        Its voxel indices to world RAS+, mm.
    transform : (4, 4)
        World of the diffusion images → world of the T1w image, mm.
    brain : (x, y, z) bool or None
        Brain in the T1w image; None if it was not found.
    notice : str
        Why the brain was not found, as a sentence; empty if it was.
    """

    image: np.ndarray
    affine: np.ndarray
    transform: np.ndarray
    brain: np.ndarray | None = None
    notice: str = ""


def register(dwi: Dwi, t1w: Path, device: str = "cpu", transform: np.ndarray | None = None
             ) -> Anatomy:
    """Read a T1w image of the same head and register the diffusion images to it (`align`)."""
    return align(rigid.attenuation(dwi), dwi.mask, dwi.affine, t1w, device, transform)


def align(attenuation: Float[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"],
          affine: Float[np.ndarray, "4 4"], t1w: Path, device: str = "cpu",
          transform: Float[np.ndarray, "4 4"] | None = None) -> Anatomy:
    """Register diffusion images to a T1w image of the same head by a rigid transform.

    The T1w image is that of the brain without bias field, or that of the whole head if no brain is
    found that agrees with the mask.

    Parameters
    ----------
    attenuation : (x, y, z)
        Mean weighted signal over mean b0, 0 outside the mask.
    mask : (x, y, z) bool
        Brain mask of the diffusion images.
    affine : (4, 4)
        Voxel indices of the diffusion images to world RAS+, mm.
    t1w : Path
        T1w image.
    device : str
        Device of torch, for the brain extraction.
    transform : (4, 4), optional
        Result of an earlier registration of the same images, which is kept.

    Returns
    -------
    Anatomy

    Raises
    ------
    DataError
        The image is unreadable, without contrast, shows less than half of the brain, or shows
        someone else (`rigid.compare_to_mirror`).
    """
    head, head_affine, image, brain, notice = _find_head(t1w, device)
    known = transform is not None
    try:
        if brain is None:
            raise DataError(notice)
        only = np.where(brain, image, 0)
        if transform is None:
            transform = rigid.register(attenuation, mask, affine, only, head_affine)
        _require_agreement(_to_dwi(brain, head_affine, transform, mask.shape, affine), mask)
    except DataError as error:
        image, brain, notice = head, None, str(error)
        if not known or transform is None:
            transform = rigid.register(attenuation, mask, affine, head, head_affine)
    if brain is not None and not known:
        match = rigid.compare_to_mirror(attenuation, mask, affine, only, head_affine, transform)
        if match.ratio < MIN_RATIO and match.symmetry < MAX_SYMMETRY:
            raise DataError(
                f"{t1w}: matches the diffusion images no better than its mirror image does (ratio "
                f"{match.ratio:.2f}; {MIN_RATIO} is needed), so it shows someone else, or the "
                "registration failed. Replace or remove the T1w image.")
    at = _voxels(mask, affine, transform, head_affine)
    coverage = np.all((at >= 0) & (at <= np.array(head.shape)[:, None] - 1), axis=0).mean()
    if coverage < MIN_COVERAGE:
        raise DataError(f"{t1w}: covers only {coverage:.0%} of the brain in the diffusion images.")
    return Anatomy(image, head_affine, transform, brain, notice)


class _Head(NamedTuple):
    """A T1w image as `read` reads it, with its affine; without bias field; its brain, or why none
    was found."""

    image: np.ndarray
    affine: np.ndarray
    flat: np.ndarray
    brain: np.ndarray | None
    notice: str


def _find_head(t1w: Path, device: str) -> _Head:
    status = t1w.stat() if t1w.exists() else None
    return _segment_head(t1w, device, status and (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=1)
def _segment_head(t1w: Path, device: str, _status: tuple[int, int] | None) -> _Head:
    """Find brain and bias field; kept for the steps of one participant, which all need them."""
    image, affine = read(t1w)
    try:
        brain = find_brain(image, affine, device)
        head = _Head(image, affine, image / n4.bias_field(image, brain, affine), brain, "")
    except DataError as error:
        return _Head(image, affine, image, None, str(error))
    for array in (head.image, head.flat, head.brain):
        assert array is not None
        array.flags.writeable = False
    return head


def find_brain(image: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"],
               device: str = "cpu") -> Bool[np.ndarray, "x y z"]:
    """Segment the brain in a T1w image by deepbet (`deepbet.extract`).

    Raises
    ------
    DataError
        The package deepbet is not installed, or no brain was found.
    """
    if not deepbet.is_installed():
        raise DataError("the package deepbet, which holds the networks that find the brain in a "
                        "T1w image, is not installed. The brain mask of the diffusion images is "
                        "used instead.")
    return deepbet.extract(image, affine, device)


def mask_from_t1w(anatomy: Anatomy, mask: Bool[np.ndarray, "x y z"],
                  affine: Float[np.ndarray, "4 4"]) -> Bool[np.ndarray, "x y z"]:
    """Bring the brain mask of a T1w image to the grid of the diffusion images.

    Parameters
    ----------
    anatomy : Anatomy
        Result of `align` for these images.
    mask : (x, y, z) bool
        Brain mask that was made from the mean b0.
    affine : (4, 4)
        Voxel indices of the diffusion images to world RAS+, mm.

    Returns
    -------
    (x, y, z) bool
        Voxels that are brain by more than half.

    Raises
    ------
    DataError
        The brain was not found in the T1w image (the notice of `anatomy`).
    """
    if anatomy.brain is None:
        raise DataError(anatomy.notice)
    return _to_dwi(anatomy.brain, anatomy.affine, anatomy.transform, mask.shape, affine)


def _to_dwi(brain: np.ndarray, brain_affine: np.ndarray, transform: np.ndarray,
            shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """A mask on the grid of the diffusion images: voxels of which more than half is inside."""
    size = np.linalg.norm(affine[:3, :3], axis=0).mean()
    at = _voxels(np.ones(shape, bool), affine, transform, brain_affine)
    return (_sample(brain.astype(np.float32), brain_affine, at, size) > 0.5).reshape(shape)


def _require_agreement(brain: np.ndarray, mask: np.ndarray) -> None:
    """Raise DataError if two brain masks on one grid overlap too little (Dice's coefficient)."""
    overlap = 2 * (brain & mask).sum() / (brain.sum() + mask.sum())
    if overlap < MIN_OVERLAP:
        raise DataError(
            f"the brain that was found in the T1w image and that of the diffusion images overlap "
            f"by {overlap:.2f} only (Dice); {MIN_OVERLAP} is needed. Check that the T1w image "
            "is of this participant. The brain mask of the diffusion images is used instead.")


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
    anatomy = anatomy or register(dwi, t1w)
    if probsegs:
        maps = [read(path) for path in probsegs]
    else:
        maps = [(m, anatomy.affine) for m in segment(dwi, anatomy, work_dir)]
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0).mean()
    columns = [_sample(m, a, _voxels(dwi.mask, dwi.affine, anatomy.transform, a), size)
               for m, a in maps]
    p = np.column_stack(columns).clip(0, 1)
    return (p / np.maximum(p.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def segment(dwi: Dwi, anatomy: Anatomy, work_dir: Path | None = None) -> list[np.ndarray]:
    """Segment the tissues of the brain in a T1w image by Atropos.

    The result is reproducible, by one thread and a fixed seed (r=0).

    Parameters
    ----------
    dwi : Dwi
        Its brain mask is used where the brain was not found in the T1w image.
    anatomy : Anatomy
        Result of `register`.
    work_dir : Path, optional
        Folder for temporary files.

    Returns
    -------
    list of three (x, y, z) float32
        Probabilities on the grid of the T1w image, in the order of TISSUES.

    Raises
    ------
    DataError
        The brain mask is too thin for N4.
    """
    image, inside = anatomy.image, anatomy.brain
    if inside is None:
        image, inside = _flatten(image, anatomy.affine, brain_mask(dwi, anatomy))
    return _atropos(image, anatomy.affine, inside, work_dir)


def describe(t1w: Path, device: str = "cpu", work_dir: Path | None = None
             ) -> tuple[Bool[np.ndarray, "x y z"], list[Float[np.ndarray, "x y z"]]]:
    """Find the brain and its tissues in a T1w image, on its own grid and without diffusion images.

    Parameters
    ----------
    t1w : Path
        T1w image.
    device : str
        Device of torch, for the brain extraction.
    work_dir : Path, optional
        Folder for temporary files.

    Returns
    -------
    brain : (x, y, z) bool
    tissues : list of three (x, y, z) float32
        Probabilities in the order of TISSUES.

    Raises
    ------
    DataError
        The image cannot be read, or no brain was found.
    """
    _, affine, flat, brain, notice = _find_head(t1w, device)
    if brain is None:
        raise DataError(notice)
    tissues = _atropos(flat, affine, brain, work_dir)
    image = open_image(t1w)
    shape = image.shape[:3]
    at = _voxels(np.ones(shape, bool), image.affine, np.eye(4), affine)
    inside, *maps = (_sample(m.astype(np.float32), affine, at, 0.0).reshape(shape)
                     for m in (brain, *tissues))
    return inside > 0.5, maps


def _atropos(image: np.ndarray, affine: np.ndarray, inside: np.ndarray, work_dir: Path | None
             ) -> list[np.ndarray]:
    import ants

    with temporary_folder(work_dir):
        classes = ants.atropos(to_ants(image, affine), to_ants(inside, affine), i="kmeans[3]",
                               m=SMOOTHNESS, c="[5,0]", r=0)["probabilityimages"]
    maps = sorted((c.numpy() for c in classes),
                  key=lambda p: (p * image).sum() / max(p.sum(), 1e-9))
    return [maps[1], maps[2], maps[0]]  # from dark to bright: CSF, grey matter, white matter


def _flatten(image: np.ndarray, affine: np.ndarray, brain: np.ndarray
             ) -> tuple[np.ndarray, np.ndarray]:
    """Remove the bias field of a T1w image, and the scalp from a brain mask of diffusion images."""
    from scipy.ndimage import binary_erosion, binary_opening, label

    size = np.linalg.norm(affine[:3, :3], axis=0)

    # the edge of the mask holds scalp, whose fat is the brightest tissue of a T1w image
    core = binary_erosion(brain, iterations=max(1, round(5 / size.mean())))
    if not core.any():
        raise DataError("the brain mask is too thin to estimate the bias field.")
    flat = image / n4.bias_field(image, core, affine)
    inside = binary_opening(brain & (flat < 1.1 * np.percentile(flat[core], 99.5)))
    parts = label(inside)[0]
    inside = parts == np.bincount(parts.ravel())[1:].argmax() + 1 if parts.any() else core
    return flat, inside


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
    """Return the brain in the T1w image; if it was not found, the brain mask of the diffusion
    images, brought to the grid of the T1w image.

    Returns
    -------
    (x, y, z) bool
    """
    if anatomy.brain is not None:
        return anatomy.brain
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
