"""Tissue posteriors on the grid of the diffusion images, from a T1w image of the participant.

N4 bias correction and Atropos (Avants et al. 2011, doi:10.1007/s12021-011-9109-y; Tustison et al.
2010, doi:10.1109/TMI.2010.2046908; antspyx) in T1w space, inside the brain mask of the diffusion
images, which a rigid registration brings there. The posteriors come back averaged over voxels.

The registration maximises normalised mutual information (Studholme et al. 1999,
doi:10.1016/S0031-3203(98)00091-0) between the T1w image and the attenuation, mean weighted signal
over mean b0: unlike the b0 it has no bias field and sets white from grey matter. It is dense and
deterministic, and turns about the brain's centre; antspyx' and dipy's rigid registrations gave, on
the same images, moves that differed by degrees between runs or starts, and lost a thin slab.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp import scratch
from bidsapp.dwi import Dwi, open_image, read_array
from bidsapp.errors import DataError

TISSUES = ("GM", "WM", "CSF")
"""Order of the columns, and the labels of BIDS."""

FINEST = 1.5
"""mm: a finer T1w image is resampled to this, which no diffusion image resolves."""

BINS = 32
RIM = 2
"""Voxels around the brain mask that are compared, too, for the edge of the brain holds a slab
firmly."""

COARSE, FINE = (4.0, 4.0, 0.1, 10_000), (0.0, 1.0, 0.01, 40_000)
"""Smoothing (mm), first step (mm or degrees), tolerance of the parameters, voxels compared."""

TURNS = (0.0, -10.0, 10.0)
"""Degrees about the left–right axis, in which heads nod, of the starts of the registration."""

FARTHEST = 30.0
"""Degrees or mm from its start beyond which no move is sought."""

SEEN = 0.5
"""Share of the brain mask that the T1w image must cover."""

SMOOTHNESS = "[0.1,1x1x1]"
"""Of Atropos' Markov random field: weight and radius."""


def posteriors(dwi: Dwi, t1w: Path, given: Sequence[Path] = (), work_dir: Path | None = None
               ) -> np.ndarray:
    """(voxel, 3) float32 probabilities of grey matter, white matter and CSF, Σ ≤ 1.

    given: maps of the three in the space of `t1w`, in the order of TISSUES, in place of Atropos'.
    Temporary files go to work_dir.

    Raises:
        DataError: an image is unreadable, without contrast, or shows less than half of the brain.
    """
    image, affine = _read(t1w)
    move = align(dwi, image, affine)
    at = _voxels(dwi.mask, dwi.affine, move, affine)
    seen = np.all((at >= 0) & (at <= np.array(image.shape)[:, None] - 1), axis=0).mean()
    if seen < SEEN:
        raise DataError(f"{t1w}: covers only {seen:.0%} of the brain in the diffusion images.")
    if given:
        maps = [_read(path) for path in given]
    else:
        maps = [(m, affine) for m in _atropos(image, affine, _to_anatomy(dwi, image, affine, move),
                                              work_dir)]
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0).mean()
    columns = [_sample(m, a, _voxels(dwi.mask, dwi.affine, move, a), size) for m, a in maps]
    p = np.column_stack(columns).clip(0, 1)
    return (p / np.maximum(p.sum(axis=1, keepdims=True), 1)).astype(np.float32)


def align(dwi: Dwi, image: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """(4, 4): world of the diffusion images → world of the T1w image, a rigid move.

    The best of several starts (the images as they lie, their centres together; each with the head
    nodding) is found on smooth images and then refined.
    """
    from scipy.ndimage import binary_dilation
    from scipy.spatial.transform import Rotation

    b0 = dwi.mean_b0
    ratio = dwi.signal[:, ~dwi.acquisition.b0].mean(axis=1) / np.where(b0 > 0, b0, np.inf)
    fixed = dwi.unmask(ratio.clip(0, 1))
    region = binary_dilation(dwi.mask, iterations=RIM)
    points = _world(np.argwhere(dwi.mask), dwi.affine)
    centre = points.mean(axis=0)
    head = np.argwhere(image > image.mean())
    shift = _world(head, affine).mean(axis=0) - centre
    starts = [np.r_[turn, 0, 0, off] for off, turn in product((np.zeros(3), shift), TURNS)]
    best = min((_climb(p, COARSE, fixed, region, dwi, centre, image, affine) for p in starts),
               key=lambda found: found[1])[0]
    best = _climb(best, FINE, fixed, region, dwi, centre, image, affine)[0]
    move = np.eye(4)
    move[:3, :3] = Rotation.from_rotvec(best[:3], degrees=True).as_matrix()
    move[:3, 3] = centre + best[3:] - move[:3, :3] @ centre
    return move


def _climb(start: np.ndarray, how: tuple[float, float, float, int], fixed: np.ndarray,
           region: np.ndarray, dwi: Dwi, centre: np.ndarray, image: np.ndarray,
           affine: np.ndarray) -> tuple[np.ndarray, float]:
    """Rotation vector (degrees) and translation (mm) of the least cost near `start`, and the
    cost: minus the normalised mutual information, (H(a) + H(b)) / H(a, b)."""
    from scipy.ndimage import gaussian_filter, map_coordinates
    from scipy.optimize import minimize
    from scipy.spatial.transform import Rotation

    sigma, step, tolerance, most = how
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0)
    weight = gaussian_filter(dwi.mask.astype(np.float32), sigma / size)
    smooth = gaussian_filter(fixed, sigma / size) / np.maximum(weight, 0.05)
    every = max(1, int(region.sum()) // most)
    points = _world(np.argwhere(region)[::every], dwi.affine) - centre
    mine = _levels(smooth[region], smooth[dwi.mask]).astype(np.int64)[::every] * BINS
    moving = gaussian_filter(image, max(sigma, size.mean() / 2.355)
                             / np.linalg.norm(affine[:3, :3], axis=0))
    moving = _levels(moving, moving[moving > moving.mean()], low=0.0)
    to = np.linalg.inv(affine)

    def cost(p: np.ndarray) -> float:
        beyond = np.maximum(np.abs(p - start) - FARTHEST, 0).sum()
        world = Rotation.from_rotvec(p[:3], degrees=True).apply(points) + centre + p[3:]
        seen = map_coordinates(moving, _world(world, to).T, order=1).astype(np.int64)
        joint = np.bincount(mine + seen, minlength=BINS**2).reshape(BINS, BINS) / len(mine)
        return beyond - (_entropy(joint.sum(0)) + _entropy(joint.sum(1))) / _entropy(joint)

    found = minimize(cost, start, method="Powell", options={
        "xtol": tolerance, "ftol": 1e-6, "direc": step * np.eye(6)})
    return found.x, float(found.fun)


def _levels(values: np.ndarray, of: np.ndarray, low: float | None = None) -> np.ndarray:
    """0 … BINS − 1 over the 1st to 99th percentile of `of`, float32."""
    ends = np.percentile(of, (1, 98))
    bottom = ends[0] if low is None else low
    scaled = (values - bottom) / max(ends[1] - bottom, 1e-12) * BINS
    return scaled.clip(0, BINS - 1).astype(np.float32)


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return float(-(p * np.log(p)).sum())


def _atropos(image: np.ndarray, affine: np.ndarray, brain: np.ndarray, work_dir: Path | None
             ) -> list[np.ndarray]:
    """Posterior maps in the order of TISSUES; one thread and a constant seed (r), so that they are
    the same each time."""
    os.environ.setdefault("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "1")
    import ants
    from scipy.ndimage import binary_erosion, binary_opening, label

    size = np.linalg.norm(affine[:3, :3], axis=0)
    lps = np.diag([-1.0, -1, 1, 1]) @ affine
    where = {"origin": lps[:3, 3].tolist(), "spacing": size.tolist(),
             "direction": lps[:3, :3] / size}

    def to_ants(values: np.ndarray) -> Any:
        return ants.from_numpy(np.ascontiguousarray(values, np.float32), **where)

    # the mask's edge holds scalp, whose fat is the brightest of a T1w image
    core = binary_erosion(brain, iterations=max(1, round(5 / size.mean())))
    if not core.any():
        raise DataError("the brain is too thin for its bias field to be found.")
    flat = ants.n4_bias_field_correction(
        to_ants(image), mask=to_ants(core), shrink_factor=max(1, round(4 / size.mean())),
        rescale_intensities=False, convergence={"iters": [50] * 4, "tol": 1e-7}).numpy()
    inside = binary_opening(brain & (flat < 1.1 * np.percentile(flat[core], 99.5)))
    parts = label(inside)[0]
    inside = parts == np.bincount(parts.ravel())[1:].argmax() + 1 if parts.any() else core
    with temporary(work_dir):
        classes = ants.atropos(to_ants(flat), to_ants(inside), i="kmeans[3]", m=SMOOTHNESS,
                               c="[5,0]", r=0)["probabilityimages"]
    maps = sorted((c.numpy() for c in classes), key=lambda p: (p * flat).sum() / max(p.sum(), 1e-9))
    return [maps[1], maps[2], maps[0]]  # dark to bright: CSF, grey, white


@contextmanager
def temporary(work_dir: Path | None) -> Iterator[str]:
    """antspyx leaves its files in Python's temporary folder: one that is removed with them."""
    before = tempfile.tempdir
    with scratch.temporary(work_dir) as folder:
        tempfile.tempdir = str(folder)
        try:
            yield tempfile.tempdir
        finally:
            tempfile.tempdir = before


def _read(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """(x, y, z) float32, at most as fine as FINEST, and its affine."""
    from scipy.ndimage import gaussian_filter, zoom

    image = open_image(path)
    values = np.nan_to_num(read_array(image, np.float32), posinf=0, neginf=0)
    if values.ndim == 4 and values.shape[3] == 1:
        values = values[..., 0]
    if values.ndim != 3 or min(values.shape) < 2 or not np.ptp(values) > 0:
        raise DataError(f"{path}: is no volume with contrast (shape {values.shape}).")
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


def _to_anatomy(dwi: Dwi, image: np.ndarray, affine: np.ndarray, move: np.ndarray) -> np.ndarray:
    """The brain mask on the T1w grid."""
    from scipy.ndimage import affine_transform

    to = np.linalg.inv(move @ dwi.affine) @ affine
    return affine_transform(dwi.mask.astype(np.float32), to[:3, :3], to[:3, 3], image.shape,
                            order=1) > 0.5


def _sample(values: np.ndarray, affine: np.ndarray, at: np.ndarray, size: float) -> np.ndarray:
    """Means over voxels of `size` mm at (3, voxel) indices; 0 outside the image."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    own = np.linalg.norm(affine[:3, :3], axis=0)
    smooth = gaussian_filter(values, np.sqrt(np.maximum(size**2 - own**2, 0) / 12) / own)
    return map_coordinates(smooth, at, order=1)


def _voxels(mask: np.ndarray, affine: np.ndarray, move: np.ndarray, other: np.ndarray
            ) -> np.ndarray:
    """(3, voxel): indices in the image of affine `other` of the voxels of the mask."""
    return _world(np.argwhere(mask), np.linalg.inv(other) @ move @ affine).T


def _world(indices: np.ndarray, affine: np.ndarray) -> np.ndarray:
    return indices @ affine[:3, :3].T + affine[:3, 3]
