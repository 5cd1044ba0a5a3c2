"""Directions of further measurements, spread subsets, and the errors of upsamplers.

A direction and its antipode are measured alike, so that a set of directions has the electrostatic
energy of charges at both (Jones et al. 1999,
doi:10.1002/(SICI)1522-2594(199909)42:3<515::AID-MRM14>3.0.CO;2-Q)

    E = Σ_{i<j} e(n_i, n_j),    e(n, n') = 1/|n − n'| + 1/|n + n'|.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int

from bidsapp import sh
from bidsapp.acquisition import SHELL_GAP, Acquisition, Shell
from bidsapp.dwi import Dwi
from bidsapp.kinds import Upsampler
from bidsapp.progress import track

STARTS, CANDIDATES = 8, 20
"""Number of starts of `spread`, and of random candidates per new direction in each."""

NEAREST = 1e-9
"""Lower limit of the squared distance of two directions in e, which would be infinite."""

SAME_DIRECTION = 1.0
"""Angle in degrees below which two directions, or one and the antipode of another, are the same."""

Z90 = 1.6449
"""Half width of a 90 % interval of a normal distribution, in SDs."""

MAX_CONDITION = 30.0
"""Highest condition number of YᵀY of directions that determine SH coefficients."""

SAMPLE = 20_000
"""Number of voxels, at least, of a sample spread evenly over the mask; all of a smaller mask."""

OUTLIER = 5.0
"""Signal, in units of the 95th percentile of all, above which a voxel is left out of a sample. Fits
use mean squares, which one bad value would govern."""

BINS, BIN_VOXELS = 20, 100
"""Maximum number of bins of `ErrorCurve`, and minimum number of voxels in each."""


def energy(directions: Float[np.ndarray, "n 3"]) -> float:
    """Compute the electrostatic energy E of unit directions and their antipodes.

    >>> round(energy(np.eye(3)), 6)  # 3 pairs, each 2/√2
    4.242641
    """
    return float(np.triu(_repulsion(directions, directions), 1).sum())


def _repulsion(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """(len(a), len(b)) e of unit directions: |n ± n'|² = 2 ± 2 n·n'."""
    c = a @ b.T
    return (2 - 2 * c).clip(NEAREST)**-0.5 + (2 + 2 * c).clip(NEAREST)**-0.5


def spread(measured: Float[np.ndarray, "n 3"], count: int, seed: int = 0
           ) -> Float[np.ndarray, "count 3"]:
    """Spread new directions between measured ones by electrostatic repulsion.

    The new directions minimise E of all directions (L-BFGS); the measured ones stay. Each of
    STARTS starts is the greedy choice among random candidates, and the lowest E counts.

    Parameters
    ----------
    measured : (n, 3)
        Unit vectors; n may be 0.
    count : int
        Number of new directions.
    seed : int
        Seed of the candidates. The result is deterministic.

    Returns
    -------
    (count, 3) float64
        Unit vectors.
    """
    from scipy.optimize import minimize

    fixed = np.asarray(measured, np.float64).reshape(-1, 3)
    if not count:
        return np.zeros((0, 3))

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        v = flat.reshape(-1, 3)
        length = np.linalg.norm(v, axis=1, keepdims=True)
        x = v / length
        value, slope = 0.0, np.zeros_like(x)
        for others, share in ((fixed, 1.0), (x, 0.5)):
            c = x @ others.T
            near, far = (2 - 2 * c).clip(NEAREST), (2 + 2 * c).clip(NEAREST)
            pair, by_c = near**-0.5 + far**-0.5, near**-1.5 - far**-1.5
            if others is x:
                np.fill_diagonal(pair, 0)
                np.fill_diagonal(by_c, 0)
            value += share * pair.sum()
            slope += by_c @ others  # each pair of new directions moves both: 2 · ½
        slope -= (slope * x).sum(1, keepdims=True) * x
        return value, (slope / length).ravel()

    rng = np.random.default_rng(seed)
    best, least = np.zeros((count, 3)), np.inf
    for _ in range(STARTS):
        start = _greedy(fixed, _normalised(rng.standard_normal((CANDIDATES * count, 3))), count)
        found = minimize(objective, start.ravel(), jac=True, method="L-BFGS-B",
                         options={"maxiter": 2000, "maxfun": 4000, "ftol": 1e-14, "gtol": 1e-8})
        if found.fun < least:
            best, least = _normalised(found.x.reshape(-1, 3)), found.fun
    return best


def _normalised(v: np.ndarray) -> np.ndarray:
    return v / np.linalg.norm(v, axis=1, keepdims=True)


def _greedy(fixed: np.ndarray, candidates: np.ndarray, count: int) -> np.ndarray:
    """(count, 3): candidates, each the one with the lowest e to the fixed and the chosen ones."""
    potential = _repulsion(candidates, fixed).sum(1)
    chosen = np.empty((count, 3))
    for i in range(count):
        chosen[i] = candidates[potential.argmin()]
        potential += _repulsion(candidates, chosen[i:i + 1])[:, 0]
    return chosen


def subset(directions: Float[np.ndarray, "n 3"], count: int) -> Int[np.ndarray, " count"]:
    """Select a spread subset of directions greedily.

    The first direction is selected first, then always the one that adds the least energy. A
    smaller subset is therefore the beginning of a larger one.

    Parameters
    ----------
    directions : (n, 3)
        Unit vectors.
    count : int
        Number of directions to select, at most n.

    Returns
    -------
    (count,) int
        Indices in the order of the selection.

    Raises
    ------
    ValueError
        There are fewer directions.
    """
    x = np.asarray(directions, np.float64)
    if not 0 <= count <= len(x):
        raise ValueError(f"a subset of {count} directions was asked for, and there are {len(x)}")
    chosen = np.zeros(count, int)
    potential = np.zeros(len(x))
    for i in range(count):
        chosen[i] = potential.argmin()
        potential += _repulsion(x, x[chosen[i:i + 1]])[:, 0]
        potential[chosen[i]] = np.inf
    return chosen


def distinct(directions: Float[np.ndarray, "n 3"]) -> Int[np.ndarray, " m"]:
    """Find the first of each group of unit directions that are the same, antipodes included.

    >>> distinct(np.array([[1.0, 0, 0], [0, 1, 0], [-1, 0, 0]])).tolist()
    [0, 1]
    """
    near = np.abs(directions @ directions.T) > np.cos(np.radians(SAME_DIRECTION))
    first: list[int] = []
    for i in range(len(directions)):
        if not near[i, first].any():
            first.append(i)
    return np.array(first, int)


def determines(degree: int, directions: Float[np.ndarray, "n 3"]) -> bool:
    """Tell whether directions are spread well enough for an SH fit of a degree.

    They are if there are as many as coefficients and the condition number of YᵀY is at most
    MAX_CONDITION. Directions in a plane or in a small cap are not, however many.
    """
    return len(directions) >= sh.size(degree) and bool(
        np.linalg.cond(sh.basis(degree, directions))**2 <= MAX_CONDITION)


def sample_voxels(signal: Float[np.ndarray, "voxel n"], columns: Int[np.ndarray, " m"]
                  ) -> tuple[Float[np.ndarray, "sample m"], list[str]]:
    """Select about SAMPLE voxels for fits of mean squares, without those of bad values (OUTLIER).

    Parameters
    ----------
    signal : (voxel, n)
    columns : (m,) int
        The measurements that are selected.

    Returns
    -------
    sample : (sample, m) float64
    notices : list of str
        A sentence on the voxels that were left out; empty if there were none.
    """
    sample = signal[::max(1, len(signal) // SAMPLE), columns].astype(np.float64)
    size = np.abs(sample)
    bad = (size > OUTLIER * np.percentile(size, 95)).any(1)
    return sample[~bad], [
        f"{bad.sum()} of {len(bad)} voxels have a weighted signal above {OUTLIER:g} times the 95th "
        "percentile. They were left out of the fit, and predictions there are wrong. Look for bad "
        "values in the image."] if bad.any() else []


def has_one_b(acquisition: Acquisition, shell: Shell) -> bool:
    """Tell whether the b-values of a shell are within SHELL_GAP of their mean.

    They are not in tables without shells, which count as one wide shell (`Acquisition.shells`).
    """
    b = acquisition.bvals[shell.indices]
    return bool((np.abs(b - shell.b) <= SHELL_GAP * shell.b).all())


def assign_folds(dwi: Dwi, folds: int) -> Int[np.ndarray, " n"]:
    """Assign the weighted volumes to folds whose directions are spread over each shell.

    Parameters
    ----------
    dwi : Dwi
    folds : int
        Number of folds. A shell of fewer directions has one in each of its first folds.

    Returns
    -------
    (n,) int
        Fold of each volume; −1 for b0 volumes.
    """
    acquisition = dwi.acquisition
    fold = np.full(len(acquisition), -1)
    for shell in acquisition.shells:
        rest = shell.indices
        for f in range(folds):
            size = -(-len(rest) // (folds - f))
            part = rest[subset(acquisition.bvecs[rest], size)]
            fold[part] = f
            rest = np.setdiff1d(rest, part)
    return fold


def round_trip(method: Upsampler, dwi: Dwi, device: str, seed: int, folds: int = 10,
               voxels: int = 8_000) -> pd.DataFrame:
    """Predict each weighted volume from those of the other folds, and all that are in no fold.

    These are b0 volumes and those of shells that the method cannot predict.

    Parameters
    ----------
    method : Upsampler
        A method with `any_table`.
    dwi : Dwi
        The measured signal.
    device : str
        cpu, cuda or cuda:N.
    seed : int
        Seed of the method.
    folds : int
        Number of folds (`assign_folds`).
    voxels : int
        Maximum number of voxels of the slab in which it is done (`Dwi.middle_slab`).

    Returns
    -------
    DataFrame
        One row per weighted volume, in their order: `volume` (from 0), `b` (s/mm²), `b_delta`,
        `mean_signal` (measured), `rmse` and `mean_error` (predicted minus measured; all
        three in the units of the run), `coverage` (share of voxels whose measurement lies in the
        90 % interval of prediction error and noise; NaN if either is unknown) and `correlation` of
        predicted and measured signal over voxels.

    Raises
    ------
    Refusal
        The other folds are too few measurements for the method.
    """
    slab = dwi.middle_slab(voxels)
    fold = assign_folds(slab, folds)
    usable = np.isin(np.arange(len(fold)), [i for shell in method.shells(slab.acquisition)
                                            for i in shell.indices])
    fold[~usable] = -1
    rows = []
    for f in track(range(fold.max() + 1), f"{method.name}: round trip"):
        part = np.flatnonzero(fold == f)
        predicted = method.predict(slab.select_volumes(fold != f), slab.acquisition[part], device,
                                   seed)
        for k, v in enumerate(part.tolist()):
            measured, value = (x.astype(np.float64) for x in (slab.signal[:, v],
                                                              predicted.signal[:, k]))
            error, noise = value - measured, slab.noise_of(np.array([v]))
            coverage = np.nan
            if predicted.sd is not None and noise is not None:
                half = Z90 * np.hypot(predicted.sd[:, k].astype(np.float64), noise)
                coverage = float(np.mean(np.abs(error) <= half))
            varies = measured.std() > 0 and value.std() > 0
            rows.append({
                "volume": v, "b": slab.acquisition.bvals[v], "b_delta": slab.acquisition.b_delta[v],
                "mean_signal": measured.mean(), "rmse": float(np.sqrt(np.mean(error**2))),
                "mean_error": error.mean(), "coverage": coverage,
                "correlation": np.corrcoef(measured, value)[0, 1] if varies else np.nan})
    return pd.DataFrame(rows).sort_values("volume", ignore_index=True)


@dataclass(frozen=True, eq=False)
class ErrorCurve:
    """Mean square error of predictions as a function of the anisotropy of a voxel.

    Errors of angular predictions grow with the part of the signal that depends on the direction.
    The square errors of one voxel are too few to show its own level, and those of all voxels hide
    the difference between tissues. They are therefore averaged over voxels of like anisotropy, in
    bins with the same number of voxels, and interpolated linearly between the bins' means.

    Parameters
    ----------
    anisotropy : (bin,)
        Mean anisotropy of each bin, ascending.
    square : (bin,)
        Mean square error of each bin.
    """

    anisotropy: Float[torch.Tensor, " bin"]
    square: Float[torch.Tensor, " bin"]

    @classmethod
    def fit(cls, anisotropy: Float[np.ndarray, " voxel"], square: Float[np.ndarray, " voxel"],
            device: str = "cpu") -> ErrorCurve:
        """Average square errors over voxels of like anisotropy.

        Parameters
        ----------
        anisotropy : (voxel,)
            Any measure of the part of the signal that depends on the direction.
        square : (voxel,)
            Mean square error of each voxel, in any unit.
        device : str
            Device of the result.

        Returns
        -------
        ErrorCurve
        """
        order = np.argsort(anisotropy, kind="stable")
        bins = np.array_split(order, max(1, min(BINS, len(order) // BIN_VOXELS)))
        return cls(*(torch.tensor([values[b].mean() for b in bins], dtype=torch.float32,
                                  device=device) for values in (anisotropy, square)))

    def __call__(self, anisotropy: Float[torch.Tensor, " voxel"]) -> Float[torch.Tensor, " voxel"]:
        """Interpolate the mean square error at the anisotropy of voxels."""
        last = len(self.anisotropy) - 1
        high = torch.bucketize(anisotropy, self.anisotropy).clamp(max=last)
        low = (high - 1).clamp(min=0)
        step = (self.anisotropy[high] - self.anisotropy[low]).clamp(
            min=torch.finfo(torch.float32).tiny)
        share = ((anisotropy - self.anisotropy[low]) / step).clamp(0, 1)
        return torch.lerp(self.square[low], self.square[high], share)
