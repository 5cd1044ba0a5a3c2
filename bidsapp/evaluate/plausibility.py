"""Plausibility of a signal and of its gradient table.

`check` refuses signals that no scanner measures: constant volumes, a negative mean, integers that
overflowed, volumes in another order than the b-values. It warns of what is very probably wrong:
many negative values, or directions that do not belong to their volumes. (`gradients` looks for
flipped or swapped axes.) The thresholds separate correct from wrong tables of real scans of heads
and phantoms from three vendors; `tests/evaluate/test_plausibility.py` repeats that where the scans
are available.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

import numpy as np

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError

NEGATIVE_MEAN = -0.05
"""Minimum mean of a volume, as a share of the mean of b0 volumes: noise about 0 can lower the mean
of a strongly weighted volume this far."""

NEGATIVE_SHARE = 0.05
"""Maximum share of negative values in the mask: interpolation leaves fewer."""

WRAPPED = -0.25
"""Share of the highest values of the mean b0, below which a value has overflowed. It is negative:
noise and the undershoot of interpolation are smaller."""

WEIGHTED = 400.0
"""b in s/mm² from which the mean signal of any tissue or liquid is clearly below that of b = 0."""

BRIGHTER = 1.15
"""Factor between two mean signals from which a volume counts as brighter than another."""

B0_SPREAD = 1.3
"""Maximum ratio between the mean signals of b0 volumes."""

MIN_VOLUMES = 6
"""Minimum number of volumes of a shell for its median to be compared with another's."""

MIN_DIRECTIONS = 12
"""Minimum number of directions of a shell for its order to be judged: with fewer, chance explains
much."""

STRUCTURE = 0.1
"""SD of the correlations between the volumes of a shell, above which the signal depends on the
direction. It is 0.2 to 0.45 in heads and a liquid crystal, and 0.01 to 0.05 in water."""

DIRECTED = 1.0
"""Minimum share of the contrast that the directions explain (R²), divided by that SD: noise lowers
both alike. The ratio is 2 or more in heads and a liquid crystal, and up to 0.8 in
97.5 % of 200 wrong orders of 12 directions."""


def check(dwi: Dwi, mean_b0: np.ndarray) -> list[str]:
    """Refuse an impossible signal, and describe in sentences what is probably wrong.

    Parameters
    ----------
    dwi
        The signal within the mask, with one b0 volume at least.
    mean_b0
        (x, y, z) mean of the b0 volumes, inside and outside the mask.

    Returns
    -------
    list of str
        What was found, what it means and what to do; empty if the signal is plausible.

    Raises
    ------
    DataError
        A volume is constant or negative in its mean, all volumes have the same mean, integers have
        overflowed, or the signal does not fall with b.
    """
    acquisition = dwi.acquisition
    _refuse_wrapped(mean_b0)
    means, negative = np.zeros(len(acquisition)), 0
    constant = []
    for i in range(len(acquisition)):
        volume = dwi.signal[:, i]
        means[i] = volume.mean(dtype=np.float64)
        negative += int((volume < 0).sum())
        if volume.max() == volume.min() and len(volume) > 1:
            constant.append(i)
    if constant:
        raise DataError(f"{_volumes(constant)} the same value in every voxel of the mask "
                        f"({means[constant[0]]:g} in volume {constant[0]}). Remove them from "
                        "image, .bval and .bvec, or convert the series again.")
    if len(means) > 1 and np.ptp(means) == 0:
        raise DataError(f"all {len(means)} volumes have the same mean signal in the mask "
                        f"({means[0]:g}): they are copies of one volume. Convert the series "
                        "again.")
    level = float(np.median(means[acquisition.b0]))
    if level <= 0 or means.min() < NEGATIVE_MEAN * level:
        i = int(means.argmin())
        raise DataError(f"the mean signal in the mask of volume {i} is negative ({means[i]:.4g}). "
                        "Magnitude images are needed, which are not negative. Convert the "
                        "series again from the magnitude images alone, as unsigned integers or "
                        "floating point.")
    _refuse_order(means, acquisition)
    notices = []
    if dwi.invalid:
        notices.append(
            f"{dwi.invalid} values in the mask ({dwi.invalid / dwi.signal.size:.2g} of all) are "
            "NaN or infinite. They were read as 0, which biases the maps in these voxels. Convert "
            "or preprocess the series again.")
    b0 = np.flatnonzero(acquisition.b0)
    if means[b0].max() > B0_SPREAD * means[b0].min():
        low, high = b0[means[b0].argmin()], b0[means[b0].argmax()]
        notices.append(
            f"The b0 volumes differ: the mean signal in the mask is {means[low]:.4g} in volume "
            f"{low} and {means[high]:.4g} in volume {high}. S/S0 is wrong if one of them lost "
            "signal or belongs to another series. Inspect both, and remove the wrong one from "
            "image, .bval and .bvec.")
    if (share := negative / dwi.signal.size) > NEGATIVE_SHARE:
        notices.append(
            f"{share:.0%} of the values in the mask are negative. Magnitude images are not "
            "negative, and interpolation leaves fewer negative values. The maps are biased in "
            "these voxels. Use the magnitude images.")
    return notices + _check_directions(dwi, means)


def _refuse_wrapped(mean_b0: np.ndarray) -> None:
    """Refuse integers above 32 767 that were read as signed: strongly negative voxels next to
    bright ones."""
    from scipy.ndimage import binary_dilation

    if not (mean_b0 > 0).any():
        return
    top = float(np.percentile(mean_b0[mean_b0 > 0], 99.9))
    wrapped = mean_b0 < WRAPPED * top
    if wrapped.sum() < 3:
        return
    beside = mean_b0[binary_dilation(wrapped) & (mean_b0 > 0)]
    if len(beside) and np.percentile(beside, 75) > top / 2:  # some lie beside air
        raise DataError(
            f"{int(wrapped.sum())} voxels of the mean b0 are strongly negative (down to "
            f"{mean_b0.min():.4g}) next to the brightest ones: integers above 32 767 were stored "
            "or read as signed 16-bit integers. Convert the series again as unsigned 16-bit "
            "integers or floating point.")


def _refuse_order(means: np.ndarray, acquisition: Acquisition) -> None:
    """Refuse volumes in a wrong order: b0 volumes are the brightest, and shells darken with b.

    With k b0 volumes, the k brightest volumes must be these, provided that the next is clearly
    darker than the k-th. So a single b0 volume can be checked, and a b0 volume with signal dropout
    does not look misplaced. Medians of shells are compared as well.
    """
    b0, weighted = acquisition.b0, acquisition.bvals >= WEIGHTED
    ranked = np.flatnonzero(b0 | weighted)
    ranked = ranked[np.argsort(-means[ranked], kind="stable")]
    k = int(b0.sum())
    remedy = ("Bring image, .bval and .bvec into the same order: export the three from the same "
              "series again.")
    if k < len(ranked) and means[ranked[k - 1]] > BRIGHTER * means[ranked[k]] \
            and not b0[ranked[:k]].all():
        bright = sorted(int(i) for i in ranked[:k] if not b0[i])
        dark = sorted(set(np.flatnonzero(b0).tolist()) - set(ranked[:k].tolist()))
        raise DataError(
            f"the volumes are in another order than the table: the brightest include "
            f"{_listed(bright)}, which should be weighted according to the table (b = "
            f"{acquisition.bvals[bright[0]]:g} s/mm²), but not {_listed(dark)}, for which the "
            f"table says b = 0. {remedy}")
    # few directions may lie along the fibres of an oriented sample in one shell, across in another
    shells = [(s, float(np.median(means[s.indices]))) for s in acquisition.shells
              if s.b >= WEIGHTED and len(s) >= MIN_VOLUMES]
    for (low, before), (high, after) in permutations(shells, 2):
        if (abs(low.b_delta - high.b_delta) < 0.1 and high.b > 1.3 * low.b
                and after > BRIGHTER * before):
            raise DataError(
                f"the signal rises with b: its median is {before:.4g} at b = {low.b:.0f} s/mm² "
                f"and {after:.4g} at b = {high.b:.0f}, so the volumes are in another order than "
                f"the table. {remedy}")


def _check_directions(dwi: Dwi, means: np.ndarray) -> list[str]:
    """Describe the first shell whose directions do not explain how its volumes differ, if any.

    Each volume is divided by its mean, so that signal dropout does not count. Spherical harmonics
    of degree 2 explain a share R² of Σ (S − mean of the shell)² over voxels and volumes. A share
    5 / (n − 1) is expected by chance in any order, and R² is corrected for it. R² does not depend
    on flips and rotations of the table.
    """
    step = max(1, len(dwi.signal) // 20_000)
    for shell in dwi.acquisition.shells:
        n = len(shell)
        if (n < MIN_DIRECTIONS or shell.b < WEIGHTED or abs(shell.b_delta) < 0.1
                or means[shell.indices].min() <= 0):
            continue
        contrast = dwi.signal[::step, shell.indices] / means[shell.indices]
        contrast -= contrast.mean(axis=1, keepdims=True)
        squares = contrast.T @ contrast
        size = np.sqrt(np.diag(squares))
        structure = float((squares / np.outer(size, size))[np.triu_indices(n, 1)].std())
        basis, _ = np.linalg.qr(sh.basis(2, dwi.acquisition.bvecs[shell.indices]))
        chance = 5 / (n - 1)
        explained = np.trace(basis.T @ squares @ basis) / np.trace(squares)
        explained = (explained - chance) / (1 - chance)
        if structure > STRUCTURE and explained < DIRECTED * structure:
            usual = min(2 * structure, 0.9)
            return [f"At b = {shell.b:.0f} s/mm², the directions hardly explain how the volumes "
                    f"differ (R² {explained:.2f}; {usual:.2f} or more is usual). Either the "
                    "volumes are in another order than the .bvec, or the head moved far. Export "
                    "image and tables from the same series again, or correct motion first."]
    return []


def _volumes(indices: Sequence[int]) -> str:
    return f"{_listed(indices)} {'has' if len(indices) == 1 else 'have'}"


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", …" if len(indices) > 5 else "")
    return f"volume{'' if len(indices) == 1 else 's'} {shown}"
