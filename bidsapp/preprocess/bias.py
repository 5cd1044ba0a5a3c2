"""Correction of the receive bias field, estimated from the mean b0.

The measured signal is the product of the signal and a smooth field β(x), the same in all volumes
after motion correction:  S(x) = I(x) / β(x).  Ratios to the b0, and all maps made of them, do not
change.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from bidsapp.anatomy.n4 import bias_field
from bidsapp.errors import DataError


@dataclass(frozen=True, eq=False)
class BiasField:
    """A bias field, and its range in the mask.

    Parameters
    ----------
    values : (x, y, z) float32
        β, positive, with mean 1 in the mask: the corrected signal is signal / values.
    lowest, highest : float
        Percentiles 1 and 99 of β in the mask.
    """

    values: np.ndarray
    lowest: float
    highest: float


def estimate(mean_b0: Float[np.ndarray, "x y z"], mask: Bool[np.ndarray, "x y z"],
             affine: Float[np.ndarray, "4 4"]) -> BiasField:
    """Estimate the bias field of a series by N4.

    Parameters
    ----------
    mean_b0 : (x, y, z)
        Mean of the b0 volumes after all corrections of position.
    mask : (x, y, z) bool
        The brain.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.

    Returns
    -------
    BiasField

    Raises
    ------
    DataError
        The mask is empty, or no voxel in it is above 0.
    """
    if not mask.any():
        raise DataError("the brain mask is empty, so that no bias field can be estimated. Check "
                        "the mask, or leave out the step `bias`.")
    values = bias_field(np.nan_to_num(mean_b0, posinf=0, neginf=0), mask, affine)
    lowest, highest = np.percentile(values[mask], (1, 99))
    return BiasField(values, float(lowest), float(highest))
