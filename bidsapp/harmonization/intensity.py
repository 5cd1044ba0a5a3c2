"""Distributions of S/S0 in a shell of a scan, and the warp from one to another.

With F the distribution of a scan, and Q = F⁻¹ the quantiles of a reference,

    h(x) = Q_ref(F(x)),    S' = S0 h(S / S0)

(Wrobel et al. 2020, doi:10.1016/j.neuroimage.2020.117242). h is monotone: order within a shell
stays.
"""

from __future__ import annotations

import numpy as np

from bidsapp.acquisition import Shell
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal

GRID = 1000
"""Probabilities (k + ½) / GRID at which quantiles are taken."""

LEAST_VALID = 0.5
"""Share of the values of a shell that must be above 0, S0 too, in a scan to learn from."""


def quantiles(dwi: Dwi) -> np.ndarray:
    """(shell, GRID) of S/S0 in the mask.

    Raises:
        DataError: hardly any value of a shell is above 0.
    """
    s0, found = dwi.mean_b0, []
    for shell in dwi.acquisition.shells:
        values = _ratios(dwi, s0, shell)
        share = float(np.isfinite(values).mean())
        if share < LEAST_VALID:
            raise DataError(
                f"has a signal above 0 in only {share:.0%} of the values at b = {shell.b:.0f} "
                f"s/mm² ({dwi.invalid} values of the run are NaN or infinite); needed are "
                f"{LEAST_VALID:.0%}. Check image and mask, or leave it out with "
                "--participant-label.")
        found.append(_quantiles(values))
    return np.stack(found)


def quantiles_to_warp(dwi: Dwi) -> np.ndarray:
    """As `quantiles`, of a scan to apply a warp to.

    Raises:
        Refusal: no value of a shell is above 0.
    """
    s0 = dwi.mean_b0
    return np.stack([_quantiles(_some_ratios(dwi, s0, shell)) for shell in dwi.acquisition.shells])


def warp(dwi: Dwi, reference: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, int]:
    """The signal warped from one distribution to another in every shell, and how many values
    stayed as they are for not being above 0, or in a voxel whose S0 is not. b0 volumes stay.

    reference, source: (shell, GRID) quantiles, in the order of the scan's shells.

    Raises:
        Refusal: no value of a shell is above 0.
    """
    s0, signal, kept = dwi.mean_b0, dwi.signal.copy("K"), 0
    for k, shell in enumerate(dwi.acquisition.shells):
        values = _some_ratios(dwi, s0, shell)
        good = np.isfinite(values)
        for i, x, here in zip(shell.indices, values.T, good.T, strict=True):
            signal[here, i] = s0[here] * _warp(x[here], source[k], reference[k])
        kept += int((~good).sum())
    return signal, kept


def _ratios(dwi: Dwi, s0: np.ndarray, shell: Shell) -> np.ndarray:
    """(voxel, direction) float32 S/S0 of a shell, NaN where S or S0 is not above 0."""
    signal = dwi.signal[:, shell.indices]
    good = (signal > 0) & (s0[:, None] > 0)
    signal /= np.where(s0 > 0, s0, 1)[:, None]
    signal[~good] = np.nan
    return signal


def _some_ratios(dwi: Dwi, s0: np.ndarray, shell: Shell) -> np.ndarray:
    """`_ratios`, of which one at least is there.

    Raises:
        Refusal: none is.
    """
    values = _ratios(dwi, s0, shell)
    if not np.isfinite(values).any():
        raise Refusal(f"no signal above 0 was found at b = {shell.b:.0f} s/mm². Check image and "
                      "mask, or leave the run out.")
    return values


def _quantiles(values: np.ndarray) -> np.ndarray:
    """(GRID,) of those that are not NaN."""
    there = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(there, (np.arange(GRID) + 0.5) / GRID)


def _warp(x: np.ndarray, own: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Q_ref(F(x)) by linear interpolation between the quantiles; in proportion beyond them."""
    at, where = np.unique(own, return_inverse=True)
    to = np.bincount(where, reference) / np.bincount(where)
    out = np.interp(x, at, to)
    out = np.where(x < at[0], x * (to[0] / at[0]), out)
    return np.where(x > at[-1], x * (to[-1] / at[-1]), out)
