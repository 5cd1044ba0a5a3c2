"""Whether a b-vector table with flipped or swapped axes explains the signal better than the given.

Principal directions run along fibres, so a voxel agrees more with the neighbour that lies along
its direction than with others (Schilling et al. 2019, doi:10.1016/j.mri.2019.01.018; Jeurissen et
al. 2014, doi:10.1016/j.media.2014.05.012). A flip or swap P of the table's axes turns the tensor
D into P D Pᵀ and its principal direction v into P v exactly, so that one fit serves all 24 tables
that differ by more than a sign. Over pairs of neighbours (x, y) with FA above MIN_FA, weighted by
FA(x) FA(y), and with y the one of the 26 neighbours of x nearest to ± P v(x),

    coherence(P) = mean |v(x) · v(y)| − the mean of that over all neighbours,

where v(x) · v(y) is the same for all P: only the neighbour differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations, product

import numpy as np
import torch

from bidsapp import tensor
from bidsapp.dwi import Dwi

MIN_FA = 0.3

MAX_VOXELS = 100_000
"""Slices about the middle of the mask are judged, as many as hold no more voxels."""

COHERENT = 0.75
"""Agreement along the fibres of the best table: 0.85 or more in heads, 0.66 in a liquid crystal,
0.5 where directions are noise."""

GAIN = 0.02
"""Coherence of the best table: 0.027 or more in heads, 0.01 in a liquid crystal."""

LESS = 0.75
"""The given table is wrong where its coherence is below this share of the best one's."""

SURE = 6.0
"""Standard errors by which they differ at least. A crystal's slabs reach 5.7, those of heads 6.3,
but with a gain below GAIN."""

STEPS = np.array([n for n in product((-1, 0, 1), repeat=3) if n > (0, 0, 0)])
"""(13, 3): the neighbours of a voxel, without their opposites."""


@dataclass(frozen=True)
class Coherence:
    """Fibre coherence with the table as it is given and with the best of the 24.

    better: how the best table is made of the given one, in words; "" where the given one is as
    good or the evidence does not suffice.
    """

    given: float
    best: float
    better: str


def measure_coherence(dwi: Dwi, axes: np.ndarray) -> Coherence | None:
    """Compare the given table with those whose axes are flipped or swapped.

    Parameters
    ----------
    dwi
        The signal within the mask.
    axes
        (3, 3): the axes of the .bvec in world RAS+, as columns (`btable.fsl_axes`).

    Returns
    -------
    Coherence or None
        None where no tensor can be fitted, the mask has a single slice, or no voxel has a
        neighbour with FA above MIN_FA.
    """
    use = tensor.volumes(dwi.acquisition)
    x = tensor.design(dwi.acquisition.btensors)[use]
    slab = _slab(dwi.mask)
    if np.linalg.matrix_rank(x) < tensor.TERMS or min(map(np.ptp, np.nonzero(slab))) < 1:
        return None
    signal = torch.from_numpy(dwi.signal[slab[dwi.mask]][:, use])
    fit = tensor.fit(signal, x, weighted=False)
    fa = torch.where(fit["failed"], 0, fit["fa"]).numpy()
    keep = fa > MIN_FA
    weight, direction = np.zeros(slab.shape, np.float32), np.zeros((*slab.shape, 3), np.float32)
    slab[slab] = keep
    weight[slab], direction[slab] = fa[keep], fit["direction"].numpy()[keep]
    agreement, weights = _neighbours(slab, weight, direction)
    if not weights.any():
        return None

    steps = STEPS @ dwi.affine[:3, :3].T
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    along = direction[slab] @ axes
    rows = np.arange(len(along))
    scores, influence = {}, {}
    for table in list_tables():
        nearest = np.abs(along @ (steps @ axes @ table).T).argmax(axis=1)
        part, whole = agreement[nearest, rows], weights[nearest, rows]
        if not (total := whole.sum()):
            return None
        scores[table.tobytes()] = score = part.sum() / total
        influence[table.tobytes()] = (part - score * whole) / total
    usual = agreement.sum() / weights.sum()
    right, best = np.eye(3).tobytes(), max(scores, key=lambda t: scores[t])
    given, top = scores[right] - usual, scores[best] - usual
    error = np.sqrt(np.sum((influence[best] - influence[right]) ** 2))
    wrong = (top > GAIN and scores[best] > COHERENT and given < LESS * top
             and top - given > SURE * error)
    return Coherence(float(given), float(top),
                     describe(np.frombuffer(best).reshape(3, 3)) if wrong else "")


def list_tables() -> list[np.ndarray]:
    """(3, 3) flips and swaps of axes; of those that differ by a sign of all three, one."""
    flips = (np.ones(3), *(1 - 2 * np.eye(3)))
    return [flip[:, None] * np.eye(3)[list(order)]
            for order in permutations(range(3)) for flip in flips]


def describe(table: np.ndarray) -> str:
    """The rows of a .bvec after this flip or swap, in words that follow "with"."""
    order = np.abs(table).argmax(axis=1)
    words = ([f"rows {' '.join('xyz'[i] for i in order)} in place of x y z"]
             if list(order) != [0, 1, 2] else [])
    words += [f"the {('first', 'second', 'third')[i]} row negated"
              for i in range(3) if table[i, order[i]] < 0]
    return ", ".join(words)


def describe_mismatch(found: Coherence) -> str:
    """The sentence on the page and in the log where a better table was found."""
    return (f"The b-vectors are probably wrong: with {found.better} in the .bvec, neighbouring "
            f"voxels agree far better along the fibres (coherence {found.best:.3f}; as given, "
            f"{found.given:.3f}). Then directions, and all that rests on them, are wrong; FA and "
            "MD are not. Convert the series again with a recent dcm2niix, or correct the .bvec in "
            "this way and compare.")


def _slab(mask: np.ndarray) -> np.ndarray:
    """The mask in slices about its middle that hold MAX_VOXELS at most, but three in any case."""
    sizes = mask.sum(axis=(0, 1))
    low = high = int(np.searchsorted(np.cumsum(sizes), mask.sum() / 2))
    while low > 0 or high < len(sizes) - 1:
        wider = (max(low - 1, 0), min(high + 1, len(sizes) - 1))
        if sizes[wider[0]:wider[1] + 1].sum() > MAX_VOXELS and high > low:
            break
        low, high = wider
    slab = np.zeros_like(mask)
    slab[..., low:high + 1] = mask[..., low:high + 1]
    return slab


def _neighbours(slab: np.ndarray, weight: np.ndarray, direction: np.ndarray
                ) -> tuple[np.ndarray, np.ndarray]:
    """(13, voxel) weighted agreement with both neighbours of each step, and the weights."""
    at = np.argwhere(slab) + 1
    weight, direction = np.pad(weight, 1), np.pad(direction, ((1, 1), (1, 1), (1, 1), (0, 0)))
    own, axis = weight[tuple(at.T)], direction[tuple(at.T)]
    agreement = np.zeros((len(STEPS), len(at)))
    weights = np.zeros_like(agreement)
    for k, step in enumerate(STEPS):
        for sign in (1, -1):
            there = tuple((at + sign * step).T)
            product = own * weight[there]
            agreement[k] += product * np.abs(np.einsum("vi,vi->v", direction[there], axis))
            weights[k] += product
    return agreement, weights
