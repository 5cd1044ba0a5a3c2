"""Distributions of S/S0 in the shells of a scan, and the warp from one distribution to another.

With F the cumulative distribution of a scan, Q = F⁻¹ its quantiles, and Q_ref the quantiles of a
reference,

    h(x) = Q_ref(F(x)),    S' = S0 h(S / S0)

(Wrobel et al. 2020, doi:10.1016/j.neuroimage.2020.117242). h is monotone, so it keeps the order of
the values in a shell.
"""

from __future__ import annotations

import numpy as np

from bidsapp.acquisition import Shell
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal

GRID = 1000
"""Number of quantiles, at the probabilities (k + ½) / GRID."""

MIN_VALID = 0.5
"""Share of the values of a shell at which S and S0 must be above 0, in a scan of the training."""


def quantiles(dwi: Dwi) -> np.ndarray:
    """Compute the quantiles of S/S0 in the mask, by shell, of a scan of the training.

    Returns
    -------
    (shell, GRID) ndarray

    Raises
    ------
    DataError
        S and S0 are above 0 at less than MIN_VALID of the values of a shell. The message is a
        predicate, to follow the name of the run.
    """
    s0, by_shell = dwi.mean_b0, []
    for shell in dwi.acquisition.shells:
        values = _ratios(dwi, s0, shell)
        share = float(np.isfinite(values).mean())
        if share < MIN_VALID:
            raise DataError(
                f"has a signal above 0 in only {share:.0%} of the values at b = {shell.b:.0f} "
                f"s/mm² ({dwi.invalid} values of the run are NaN or infinite). Needed are "
                f"{MIN_VALID:.0%}. Check image and mask, or leave it out with "
                "--participant-label.")
        by_shell.append(_quantiles(values))
    return np.stack(by_shell)


def quantiles_to_warp(dwi: Dwi) -> np.ndarray:
    """Compute the quantiles of S/S0 in the mask, by shell, of a scan to be warped.

    Returns
    -------
    (shell, GRID) ndarray

    Raises
    ------
    Refusal
        A shell has no value above 0.
    """
    s0 = dwi.mean_b0
    return np.stack([_quantiles(_some_ratios(dwi, s0, shell)) for shell in dwi.acquisition.shells])


def warp(dwi: Dwi, reference: np.ndarray, source: np.ndarray) -> tuple[np.ndarray, int]:
    """Warp the signal of every shell from one distribution of S/S0 to another.

    Parameters
    ----------
    dwi : Dwi
    reference, source : (shell, GRID)
        Quantiles of the distribution to warp to, and of the one to warp from, in the order of the
        scan's shells.

    Returns
    -------
    signal : (voxel, measurement) float32
        b0 volumes are unchanged.
    unchanged : int
        Number of weighted values that are unchanged, because S or S0 is not above 0.

    Raises
    ------
    Refusal
        A shell has no value above 0.
    """
    s0, signal, unchanged = dwi.mean_b0, dwi.signal.copy("K"), 0
    for k, shell in enumerate(dwi.acquisition.shells):
        values = _some_ratios(dwi, s0, shell)
        valid = np.isfinite(values)
        for i, x, rows in zip(shell.indices, values.T, valid.T, strict=True):
            signal[rows, i] = s0[rows] * _warp(x[rows], source[k], reference[k])
        unchanged += int((~valid).sum())
    return signal, unchanged


def _ratios(dwi: Dwi, s0: np.ndarray, shell: Shell) -> np.ndarray:
    """Compute S/S0 of a shell, (voxel, direction) float32; NaN if S or S0 is not above 0."""
    signal = dwi.signal[:, shell.indices]
    valid = (signal > 0) & (s0[:, None] > 0)
    signal /= np.where(s0 > 0, s0, 1)[:, None]
    signal[~valid] = np.nan
    return signal


def _some_ratios(dwi: Dwi, s0: np.ndarray, shell: Shell) -> np.ndarray:
    """Compute `_ratios`; raise Refusal if there is none."""
    values = _ratios(dwi, s0, shell)
    if not np.isfinite(values).any():
        raise Refusal(f"no signal above 0 was found at b = {shell.b:.0f} s/mm². Check image and "
                      "mask, or leave the run out.")
    return values


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Compute the quantiles, (GRID,), of the values that are not NaN."""
    finite = values[np.isfinite(values)].astype(np.float64)
    return np.quantile(finite, (np.arange(GRID) + 0.5) / GRID)


def _warp(x: np.ndarray, source: np.ndarray, reference: np.ndarray) -> np.ndarray:
    """Compute Q_ref(F(x)): linear between the quantiles, proportional beyond them.

    Equal quantiles of the source map to the mean of those of the reference.
    """
    knots, group = np.unique(source, return_inverse=True)
    targets = np.bincount(group, reference) / np.bincount(group)
    warped = np.interp(x, knots, targets)
    warped = np.where(x < knots[0], x * (targets[0] / knots[0]), warped)
    return np.where(x > knots[-1], x * (targets[-1] / knots[-1]), warped)
