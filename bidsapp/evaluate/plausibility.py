"""Refuse or flag a signal that cannot be what its tables say it is.

`check` refuses what no scanner measures: constant volumes, a negative mean, integers that wrapped
round, volumes in another order than the b-values. It flags what is wrong almost surely: many
negative values, directions that do not belong to their volumes, a .bvec whose axes are flipped or
swapped. The thresholds lie between what right and wrong tables of real scans gave, of heads and of
phantoms, of three makers; `test_plausibility.py` repeats that where they are at hand.
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
"""Noise about 0 can bring the mean of a strongly weighted volume this far down (of the mean b0)."""

NEGATIVE_SHARE = 0.05
"""Interpolation leaves fewer negative values in the mask than this share."""

WRAPPED = -0.25
"""Values of the mean b0 below this share of its largest have wrapped round: noise and the
undershoot of interpolation are smaller."""

WEIGHTED = 400.0
"""s/mm²: from here on the mean signal of any tissue or liquid is clearly below that of b = 0."""

BRIGHTER = 1.15
"""A volume counts as brighter than another where their means differ by more than this factor."""

B0_SPREAD = 1.3
"""Factor by which the mean signals of volumes without weighting may differ."""

MIN_VOLUMES = 6
"""Fewest volumes of a shell whose median is compared with another's."""

MIN_DIRECTIONS = 12
"""Fewest directions of a shell whose order is judged: with fewer, chance explains much."""

STRUCTURE = 0.1
"""SD of the correlations between volumes from which a shell has contrast between directions: 0.2
to 0.45 in heads and a liquid crystal, 0.01 to 0.05 in water."""

DIRECTED = 1.0
"""Share of that contrast which the directions explain, over its SD: noise lessens both alike. 2 or
more in heads and a liquid crystal, up to 0.8 in 97.5 % of 200 other orders of 12 directions."""


def check(dwi: Dwi, mean_b0: np.ndarray) -> list[str]:
    """Refuse a signal that cannot be right; return sentences on what is probably wrong.

    Parameters
    ----------
    dwi
        The signal within the mask.
    mean_b0
        (x, y, z) mean of the volumes without weighting, outside of the mask, too.

    Returns
    -------
    list of str
        What was found, what it means and what to do; nothing where all is plausible.

    Raises
    ------
    DataError
        The signal is constant, negative, wrapped or does not fall with b.
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
                        f"({means[0]:g}): they are copies of one. Convert the series again.")
    level = float(np.median(means[acquisition.b0]))
    if level <= 0 or means.min() < NEGATIVE_MEAN * level:
        i = int(means.argmin())
        raise DataError(f"the mean signal in the mask of volume {i} is negative ({means[i]:.4g}). "
                        "Magnitudes are needed, which have no sign: convert the series again, with "
                        "the magnitude images alone and as unsigned or real numbers.")
    _refuse_order(means, acquisition)
    notices = []
    if dwi.invalid:
        notices.append(
            f"{dwi.invalid} values in the mask ({dwi.invalid / dwi.signal.size:.2g} of all) are "
            "NaN or infinite. They were read as 0, which biases maps where they are. Convert or "
            "preprocess the series again.")
    b0 = np.flatnonzero(acquisition.b0)
    if means[b0].max() > B0_SPREAD * means[b0].min():
        low, high = b0[means[b0].argmin()], b0[means[b0].argmax()]
        notices.append(
            f"Volumes without weighting differ: the mean signal in the mask is {means[low]:.4g} in "
            f"volume {low} and {means[high]:.4g} in volume {high}. S/S0 is wrong if one of them "
            "lost signal or is of another series. Look at both, and remove the wrong one from "
            "image, .bval and .bvec.")
    if (share := negative / dwi.signal.size) > NEGATIVE_SHARE:
        notices.append(
            f"{share:.0%} of the values in the mask are negative; magnitudes have no sign, and "
            "interpolation leaves fewer. Maps are biased where they are: give the magnitude "
            "images.")
    return notices + _unordered(dwi, means)


def _refuse_wrapped(mean_b0: np.ndarray) -> None:
    """Integers above 32 767 that were read as signed: strongly negative voxels amid bright ones."""
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
            f"{mean_b0.min():.4g}) amid the brightest ones: integers above 32 767 were stored or "
            "read as signed 16-bit ones. Convert the series again as unsigned 16-bit integers or "
            "floating point.")


def _refuse_order(means: np.ndarray, acquisition: Acquisition) -> None:
    """Volumes without weighting are the brightest, and shells darken as b grows.

    The k brightest volumes, where the next is clearly darker, must be the k without weighting:
    that holds for one volume, too, and one whose signal dropped out does not look misplaced.
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
            f"{_listed(bright)}, of which the table says that they are weighted (b = "
            f"{acquisition.bvals[bright[0]]:g} s/mm²), but not {_listed(dark)}, of which it says "
            f"b = 0. {remedy}")
    # an oriented sample's few volumes may point along its fibres in one shell, across in the next
    shells = [(s, float(np.median(means[s.indices]))) for s in acquisition.shells
              if s.b >= WEIGHTED and len(s) >= MIN_VOLUMES]
    for (low, before), (high, after) in permutations(shells, 2):
        if (abs(low.b_delta - high.b_delta) < 0.1 and high.b > 1.3 * low.b
                and after > BRIGHTER * before):
            raise DataError(
                f"the signal rises with b: its median is {before:.4g} at b = {low.b:.0f} s/mm² "
                f"and {after:.4g} at b = {high.b:.0f}, so the volumes are in another order than "
                f"the table. {remedy}")


def _unordered(dwi: Dwi, means: np.ndarray) -> list[str]:
    """A sentence where directions do not explain how the volumes of a shell differ.

    Each volume is divided by its mean, so that one that lost signal does not count, and of Σ (S −
    mean of the shell)² over voxels and volumes spherical harmonics of degree 2 explain a share R².
    Of that, 5 / (n − 1) are chance in any order, and are taken off. No flip and no rotation of the
    table changes R².
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
                    f"differ (R² {explained:.2f}; {usual:.2f} or more is usual). The volumes are "
                    "in another order than the .bvec, or the head moved far. Export image and "
                    "tables from the same series again, or correct motion first."]
    return []


def _volumes(indices: Sequence[int]) -> str:
    return f"{_listed(indices)} {'has' if len(indices) == 1 else 'have'}"


def _listed(indices: Sequence[int]) -> str:
    shown = ", ".join(map(str, indices[:5])) + (", …" if len(indices) > 5 else "")
    return f"volume{'' if len(indices) == 1 else 's'} {shown}"
