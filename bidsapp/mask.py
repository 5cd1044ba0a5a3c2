"""The brain mask of a run: the one given with the data, else dipy's median-Otsu on the mean b0."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bidsapp.dwi import open_image, read_array
from bidsapp.errors import DataError

AFFINE_TOLERANCE = 1e-2


def read_mask(path: Path, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """The mask in `path`, (x, y, z) bool.

    Raises:
        DataError: the mask cannot be read, lies on another grid than the DWI, or is empty.
    """
    image = open_image(path)
    if image.shape not in (shape, (*shape, 1)):
        raise DataError(f"{path}: the mask has the shape {image.shape}, one volume of the DWI's "
                        f"{shape} is needed. Resample the mask to the DWI, or remove it.")
    if not np.allclose(image.affine, affine, rtol=0, atol=AFFINE_TOLERANCE):
        raise DataError(f"{path}: the mask's affine is not that of the DWI. Resample the mask to "
                        "the DWI, or remove it.")
    mask = np.nan_to_num(read_array(image).reshape(shape)) > 0.5
    if not mask.any():
        raise DataError(f"{path}: the mask is empty. Replace it, or remove it to have one made "
                        "from the mean b0.")
    return mask


def median_otsu(mean_b0: np.ndarray) -> np.ndarray:
    """Brain mask of a mean b0 volume, (x, y, z) bool (dipy, median radius 4, one pass, largest
    component, holes filled slice by slice).

    Raises:
        DataError: nothing is left.
    """
    from dipy.segment.mask import clean_cc_mask
    from dipy.segment.mask import median_otsu as dipy_median_otsu
    from scipy.ndimage import binary_fill_holes

    if not np.any(mean_b0 > 0):
        raise DataError("the mean b0 image has no value above 0 (NaN and infinite values count as "
                        "0), so no brain mask can be made. Check the image, or give a mask.")
    if np.ptp(mean_b0) == 0:
        raise DataError(f"the mean b0 image has the same value ({mean_b0.flat[0]:g}) everywhere, "
                        "so it shows nothing. Convert the series again.")
    _, mask = dipy_median_otsu(mean_b0, median_radius=4, numpass=1)
    mask = clean_cc_mask(mask) if mask.any() else mask
    # by slice: in three dimensions, dark deep grey matter in a thin slab is open above and below
    mask = np.stack([binary_fill_holes(k) for k in np.moveaxis(mask, 2, 0)], axis=2)
    if not mask.any():
        raise DataError("median-Otsu found no brain in the mean b0. Check the image, or give a "
                        "mask through a derivatives folder.")
    return mask.astype(bool)
