"""Detection of a gradient table with flipped or swapped axes.

Principal directions run along fibres, so that a voxel agrees more with the neighbour along its
direction than with the others (Schilling et al. 2019, doi:10.1016/j.mri.2019.01.018; Jeurissen et
al. 2014, doi:10.1016/j.media.2014.05.012). A flip or swap P of the table's axes turns the tensor
D into P D Pᵀ and its principal direction v into P v exactly, so that one fit serves all 24 tables.
(There are 48, but P and −P are equivalent.) Over pairs of neighbours (x, y) with FA above MIN_FA,
weighted by FA(x) FA(y), and with y the one of the 26 neighbours of x nearest to ± P v(x),

    coherence(P) = mean |v(x) · v(y)| − mean of the same over all neighbours.

v(x) · v(y) does not depend on P; only the selected neighbour does.
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
"""Minimum FA of the voxels that are used."""

MAX_VOXELS = 100_000
"""Maximum number of voxels. Of a larger mask, the slices about its middle are used."""

COHERENT = 0.75
"""Minimum agreement along the fibres with the best table. It is 0.85 or more in heads, 0.66 in a
liquid crystal, and 0.5 if directions are noise."""

GAIN = 0.02
"""Minimum coherence of the best table. It is 0.027 or more in heads, and 0.01 in a liquid
crystal."""

LESS = 0.75
"""Share of the best table's coherence. The given table is wrong only if its coherence is lower."""

MIN_Z = 6.0
"""Minimum difference between the coherence of the best and of the given table, in standard errors.
Slabs of a liquid crystal reach 5.7; slabs of heads with a correct table reach 6.3, but with a
coherence below GAIN."""

STEPS = np.array([n for n in product((-1, 0, 1), repeat=3) if n > (0, 0, 0)])
"""Steps, (13, 3), to the neighbours of a voxel, without the opposite steps."""


@dataclass(frozen=True)
class Coherence:
    """Fibre coherence with the given table and with the best of the 24 tables.

    Parameters
    ----------
    given, best : float
        Coherence with either table.
    better : str
        Flip or swap that turns the given table into the best one, in words (`describe`); empty if
        the given table is as good or the evidence does not suffice.
    table : (3, 3)
        The flip or swap of the best table, which multiplies the rows of the .bvec from the left.
    rival : str
        Another flip or swap that is not clearly worse than the best one; empty if there is none.
    unclear : bool
        Whether even the best table agrees too little along the fibres (GAIN, COHERENT) to tell
        whether the given one is wrong.
    """

    given: float
    best: float
    better: str
    table: np.ndarray
    rival: str = ""
    unclear: bool = False


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
        None if no tensor can be fitted, the mask has a single slice, or no voxel has a neighbour
        with FA above MIN_FA.
    """
    selected = tensor.volumes(dwi.acquisition)
    x = tensor.design(dwi.acquisition.btensors)[selected]
    slab = _slab(dwi.mask)
    if np.linalg.matrix_rank(x) < tensor.TERMS or min(map(np.ptp, np.nonzero(slab))) < 1:
        return None
    with one_thread():
        signal = torch.from_numpy(dwi.signal[slab[dwi.mask]][:, selected])
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
    for table in list_tables():
        step = np.abs(along @ (steps @ axes @ table).T).argmax(axis=1)
        nearest[table.tobytes()] = flat = step * len(along) + np.arange(len(along))
        if not (total := weights.take(flat).sum()):
            return None
        scores[table.tobytes()] = agreement.take(flat).sum() / total
    everywhere = agreement.sum() / weights.sum()
    identity, best = np.eye(3).tobytes(), max(scores, key=lambda t: scores[t])
    given, highest = scores[identity] - everywhere, scores[best] - everywhere

    def influence(table: bytes) -> np.ndarray:
        """Compute the contribution of each voxel, (voxel,), to the score of a table."""
        whole = weights.take(nearest[table])
        return (agreement.take(nearest[table]) - scores[table] * whole) / whole.sum()

    def is_worse(table: bytes) -> bool:
        """Whether a table is worse than the best one beyond chance."""
        error = np.sqrt(np.sum((influence(best) - influence(table)) ** 2))
        return bool(scores[best] - scores[table] > MIN_Z * error)

    clear = bool(highest > GAIN and scores[best] > COHERENT)
    wrong = clear and given < LESS * highest and is_worse(identity)
    second = max((t for t in scores if t != best), key=lambda t: scores[t])
    table, other = (np.frombuffer(t).reshape(3, 3) for t in (best, second))
    return Coherence(float(given), float(highest), describe(table) if wrong else "", table,
                     describe(other) if wrong and not is_worse(second) else "", not clear)


def list_tables() -> list[np.ndarray]:
    """List the 24 flips and swaps of axes, (3, 3) each, up to a common sign of all axes."""
    flips = (np.ones(3), *(1 - 2 * np.eye(3)))
    return [flip[:, None] * np.eye(3)[list(order)]
            for order in permutations(range(3)) for flip in flips]


def describe(table: np.ndarray) -> str:
    """Describe a flip or swap of the rows of a .bvec: `rows y x z in place of x y z, the first row
    negated`."""
    order = np.abs(table).argmax(axis=1)
    words = ([f"rows {' '.join('xyz'[i] for i in order)} in place of x y z"]
             if list(order) != [0, 1, 2] else [])
    words += [f"the {('first', 'second', 'third')[i]} row negated"
              for i in range(3) if table[i, order[i]] < 0]
    return ", ".join(words)


def describe_mismatch(coherence: Coherence) -> str:
    """Describe a wrong table in sentences for the report and the log."""
    if coherence.rival:
        return ("The b-vectors are probably wrong, but how is not clear. Neighbouring voxels agree "
                f"far better along the fibres with {coherence.better} in the .bvec (coherence "
                f"{coherence.best:.3f}; with the given table {coherence.given:.3f}), and nearly as "
                f"well with {coherence.rival}. Fibre directions and everything derived from them "
                "are then wrong; FA and MD are correct. Convert the series again with a recent "
                "dcm2niix, or correct the .bvec in one of these ways and compare.")
    return (f"The b-vectors are probably wrong. With {coherence.better} in the .bvec, neighbouring "
            f"voxels agree far better along the fibres (coherence {coherence.best:.3f}; with the "
            f"given table {coherence.given:.3f}). Fibre directions and everything derived from "
            "them are then wrong; FA and MD are correct. Convert the series again with a recent "
            "dcm2niix, or correct the .bvec in this way and compare.")


def describe_unclear(coherence: Coherence) -> str:
    """Describe in sentences that the check cannot tell."""
    return ("The check of the b-vectors cannot tell whether rows of the .bvec are flipped or "
            "swapped: neighbouring voxels agree too little along the fibres (coherence "
            f"{coherence.best:.3f} with the best table), as in coarse voxels, few slices or much "
            "noise. Look at the fibre directions on the page.")


def _slab(mask: np.ndarray) -> np.ndarray:
    """Select slices about the middle of the mask: as many as hold MAX_VOXELS voxels, but at least
    three."""
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
    """Compute the weighted agreement, (13, voxel), with both neighbours of each step, and the
    weights, from the weight (voxel,) and direction (voxel, 3) of the voxels of `slab`."""
    shape = tuple(n + 2 for n in slab.shape)
    position = np.ravel_multi_index(tuple(np.argwhere(slab).T + 1), shape)
    index = np.full(np.prod(shape), -1)
    index[position] = np.arange(len(position))
    agreement = np.zeros((len(STEPS), len(position)))
    weights = np.zeros_like(agreement)
    for k, step in enumerate(STEPS):
        neighbour = index[position + step @ (shape[1] * shape[2], shape[2], 1)]
        first = np.flatnonzero(neighbour >= 0)
        second = neighbour[first]
        product = weight[first] * weight[second]
        cosine = np.einsum("vi,vi->v", direction[first], direction[second])
        for pair in first, second:  # each holds a voxel once
            weights[k, pair] += product
            agreement[k, pair] += product * np.abs(cosine)
    return agreement, weights
