"""Brain masks: read the mask of the dataset, or make a median-Otsu mask of the mean b0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bidsapp.dwi import open_image, read_array
from bidsapp.errors import DataError

AFFINE_TOLERANCE = 1e-2
"""Largest difference between entries of affines that count as equal, in mm."""

RADIUS = 4
"""Radius of the median filter, in voxels."""

LEVELS = 1024
"""Number of grey values of the median filter."""

NO_BRAIN = ("median-Otsu found no brain in the mean b0. Check the image, or give a mask through a "
            "derivatives folder.")
"""Message for an image in which no voxel is above the threshold."""


def read_mask(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Read a brain mask, and check that it is on the grid of the DWI.

    Parameters
    ----------
    path : Path
        Image of the mask; values above 0.5 are brain.
    shape : tuple of int
        (x, y, z) of the DWI.
    affine : (4, 4)
        Affine of the DWI.

    Returns
    -------
    (x, y, z) bool

    Raises
    ------
    DataError
        The mask cannot be read, has another grid than the DWI, or is empty.
    """
    image = open_image(path)
    if image.shape not in (shape, (*shape, 1)):
        raise DataError(f"{path}: the mask has the shape {image.shape}, but the DWI has {shape}. "
                        "Resample the mask to the DWI, or remove it.")
    if not np.allclose(image.affine, affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise DataError(f"{path}: the mask's affine differs from that of the DWI. Resample the "
                        "mask to the DWI, or remove it.")
    mask = np.nan_to_num(read_array(image).reshape(shape)) > 0.5
    if not mask.any():
        raise DataError(f"{path}: the mask is empty. Replace it, or remove it to have one made "
                        "from the mean b0.")
    return mask


def median_otsu(mean_b0: np.ndarray) -> np.ndarray:
    """Segment the brain in a mean b0 volume by a median filter and Otsu's threshold.

    The mask is that of DIPY's `median_otsu` with one pass. DIPY's median filter sorts the window of
    each voxel. This one updates a histogram of `LEVELS` grey values as the window moves, which is
    faster; the rounding to grey values commutes with the median and with the threshold.

    Parameters
    ----------
    mean_b0 : np.ndarray
        (x, y, z), finite.

    Returns
    -------
    np.ndarray
        (x, y, z) bool: the largest component, with its holes filled slice by slice.

    Raises
    ------
    DataError
        The image is not positive anywhere, is constant, or shows no brain.
    """
    from scipy.ndimage import binary_fill_holes, label
    from skimage.filters import rank, threshold_otsu

    if not np.any(mean_b0 > 0):
        raise DataError("the mean b0 image has no value above 0 (NaN and infinite values count as "
                        "0), so no brain mask can be made. Check the image, or give a mask.")
    if np.ptp(mean_b0) == 0:
        raise DataError(f"the mean b0 image has the same value ({mean_b0.flat[0]:g}) everywhere, "
                        "so it shows nothing. Convert the series again.")
    # a few extreme values, which are hardly ever a median, must not coarsen the grey values
    low, high = np.percentile(mean_b0, [0.1, 99.9])
    if low == high:
        raise DataError(NO_BRAIN)
    grey = (mean_b0.clip(low, high) - low) * ((LEVELS - 1) / (high - low))
    mirrored = np.pad(np.rint(grey).astype(np.uint16), RADIUS, mode="symmetric")
    window = np.ones((2 * RADIUS + 1,) * 3, np.uint8)
    smooth = rank.median(mirrored, window)[(slice(RADIUS, -RADIUS),) * 3].astype(np.float32)
    components, count = label(smooth > threshold_otsu(smooth))
    if not count:
        raise DataError(NO_BRAIN)
    mask = components == np.bincount(components.flat)[1:].argmax() + 1
    # slice by slice, since in 3-D dark deep grey matter of a thin slab is open above and below
    return np.stack([binary_fill_holes(k) for k in np.moveaxis(mask, 2, 0)], axis=2)
