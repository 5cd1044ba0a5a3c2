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
from bidsapp.blocks import one_thread
from bidsapp.dwi import Dwi

MIN_FA = 0.3

MOST_VOXELS = 100_000
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


def coherence(dwi: Dwi, axes: np.ndarray) -> Coherence | None:
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
    with one_thread():
        signal = torch.from_numpy(dwi.signal[slab[dwi.mask]][:, use])
        fit = tensor.fit(signal, x, weighted=False)
    fa = torch.where(fit["failed"], 0, fit["fa"]).numpy()
    keep = fa > MIN_FA
    slab[slab] = keep
    weight, direction = fa[keep], fit["direction"].numpy()[keep]
    agreement, weights = _neighbours(slab, weight, direction)
    if not weights.any():
        return None

    steps = STEPS @ dwi.affine[:3, :3].T
    steps /= np.linalg.norm(steps, axis=1, keepdims=True)
    along = direction @ axes
    scores, nearest = {}, {}
    for table in tables():
        step = np.abs(along @ (steps @ axes @ table).T).argmax(axis=1)
        nearest[table.tobytes()] = flat = step * len(along) + np.arange(len(along))
        if not (total := weights.take(flat).sum()):
            return None
        scores[table.tobytes()] = agreement.take(flat).sum() / total
    usual = agreement.sum() / weights.sum()
    right, best = np.eye(3).tobytes(), max(scores, key=lambda t: scores[t])
    given, top = scores[right] - usual, scores[best] - usual

    def influence(table: bytes) -> np.ndarray:
        """(voxel,) what each voxel adds to a table's score."""
        whole = weights.take(nearest[table])
        return (agreement.take(nearest[table]) - scores[table] * whole) / whole.sum()

    error = np.sqrt(np.sum((influence(best) - influence(right)) ** 2))
    wrong = (top > GAIN and scores[best] > COHERENT and given < LESS * top
             and top - given > SURE * error)
    return Coherence(float(given), float(top),
                     describe(np.frombuffer(best).reshape(3, 3)) if wrong else "")


def tables() -> list[np.ndarray]:
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


def notice(found: Coherence) -> str:
    """The sentence on the page and in the log where a better table was found."""
    return (f"The b-vectors are probably wrong: with {found.better} in the .bvec, neighbouring "
            f"voxels agree far better along the fibres (coherence {found.best:.3f}; as given, "
            f"{found.given:.3f}). Then directions, and all that rests on them, are wrong; FA and "
            "MD are not. Convert the series again with a recent dcm2niix, or correct the .bvec in "
            "this way and compare.")


def _slab(mask: np.ndarray) -> np.ndarray:
    """The mask in slices about its middle that hold MOST_VOXELS at most, but three in any case."""
    sizes = mask.sum(axis=(0, 1))
    low = high = int(np.searchsorted(np.cumsum(sizes), mask.sum() / 2))
    while low > 0 or high < len(sizes) - 1:
        wider = (max(low - 1, 0), min(high + 1, len(sizes) - 1))
        if sizes[wider[0]:wider[1] + 1].sum() > MOST_VOXELS and high > low:
            break
        low, high = wider
    slab = np.zeros_like(mask)
    slab[..., low:high + 1] = mask[..., low:high + 1]
    return slab


def _neighbours(slab: np.ndarray, weight: np.ndarray, direction: np.ndarray
                ) -> tuple[np.ndarray, np.ndarray]:
    """(13, voxel) weighted agreement with both neighbours of each step, and the weights.

    weight (voxel,) and direction (voxel, 3) are those of the voxels of `slab`.
    """
    shape = tuple(n + 2 for n in slab.shape)
    here = np.ravel_multi_index(tuple(np.argwhere(slab).T + 1), shape)
    index = np.full(np.prod(shape), -1)
    index[here] = np.arange(len(here))
    agreement = np.zeros((len(STEPS), len(here)))
    weights = np.zeros_like(agreement)
    for k, step in enumerate(STEPS):
        other = index[here + step @ (shape[1] * shape[2], shape[2], 1)]
        first = np.flatnonzero(other >= 0)
        second = other[first]
        product = weight[first] * weight[second]
        cosine = np.einsum("vi,vi->v", direction[first], direction[second])
        for pair in first, second:  # each holds a voxel once
            weights[k, pair] += product
            agreement[k, pair] += product * np.abs(cosine)
    return agreement, weights
