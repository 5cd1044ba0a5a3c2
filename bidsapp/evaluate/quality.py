"""Quality of a run in numbers: the signal, slices that look corrupted, statistics of the maps.

Every key that these functions make has a Description and Units in `describe_columns`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from bidsapp import methods, sh
from bidsapp.acquisition import Shell

if TYPE_CHECKING:
    import pandas as pd

    from bidsapp.dwi import Dwi
    from bidsapp.kinds import Derived, Method

OUTLIER = 3.5
"""Robust z beyond which a run is an outlier (Iglewicz & Hoaglin 1993)."""

MIN_RUNS = 5
"""Fewest runs of a batch that are compared among themselves; else all runs are."""

DROPOUT_Z = 6.0
DROPOUT_LOSS = 0.1
"""A slice looks corrupted at a robust z beyond -6 and 10 % or more of its signal gone."""

MIN_VOLUMES = 6
"""Fewest volumes of a shell in which one can stand out."""

STATISTICS = {"mean": "Mean", "sd": "Standard deviation", "median": "Median"}

FIXED: dict[str, tuple[str, str]] = {
    "n_voxels": ("Voxels in the brain mask", "voxels"),
    "mask_volume": ("Volume of the brain mask", "mL"),
    "n_volumes": ("Volumes, b = 0 included", "volumes"),
    "n_b0": ("Volumes with b < 50 s/mm²", "volumes"),
    "n_shells": ("Shells: volumes that share b and b-tensor shape", "shells"),
    "n_invalid": ("NaN or infinite values inside the mask, set to 0", "values"),
    "n_negative": ("Values below 0 inside the mask", "values"),
    "noise_sd": ("Standard deviation of the noise: residual of a spherical harmonics fit per "
                 "shell, median over voxels", "as the input signal"),
    "snr_b0": ("Median over the mask of the mean b = 0 signal divided by noise_sd", "1"),
    "ndc": ("Neighbouring DWI correlation: mean over weighted volumes of the correlation, over "
            "the mask, with the volume of the nearest b-tensor (Yeh et al. 2019)", "1"),
    "n_dropout_slices": (f"Slices whose mean signal lies {DROPOUT_LOSS:.0%} or more, and "
                         f"{DROPOUT_Z:g} robust standard deviations or more, below what the other "
                         "volumes of the shell predict", "slices"),
    "n_dropout_volumes": ("Volumes with such a slice", "volumes"),
    "fibre_coherence": ("How much more principal directions agree with the neighbour that lies "
                        "along them than with neighbours at large: mean |cos| over voxels of FA > "
                        "0.3 (after Schilling et al. 2019)", "1"),
    "fibre_coherence_best": ("The same with the best of the 24 b-vector tables whose axes are "
                             "flipped or swapped", "1"),
    "harmonization_angle": ("Median angle between the principal directions before and after "
                            "harmonization, in single-fibre voxels", "degrees"),
    "harmonization_voxels": ("Single-fibre voxels: FA > 0.7 in the corpus callosum, or deep in the "
                             "brain", "voxels"),
}
_AGAINST = "the scan in the reference batch, brought together, over voxels of the tissue"
_MAP = "S/S0 and FA: 1; MD: mm²/s"
GROUP: dict[str, tuple[str, str]] = {
    f"{key}_{when}": (f"{what}; {how}, as spherical harmonics", units)
    for key, what, units in (
        ("nmse", f"Square error against {_AGAINST}, over that scan's squares: Σ (y − ŷ)² / Σ y²",
         "1"),
        ("bias", f"Mean difference from {_AGAINST}", _MAP),
        ("mean", "Mean over voxels of the tissue", _MAP),
        ("contrast", "Local contrast: Σ (x_i − x_j)(r_i − r_j) / Σ (r_i − r_j)² over neighbouring "
                     "voxels of the tissue, r the map of the scan in the reference batch", "1"))
    for when, how in (("before", "as measured"), ("after", "harmonized"))} | {
    "value": ("The statistic", "as the column, or 1"),
    "before": ("The effect in measured maps", "as the measure, per year where of age"),
    "after": ("The effect in harmonized maps of the same people", "as before"),
    "reference": ("The effect in the same people's scans in the reference batch", "as before"),
    "ratio": ("after / before", "1"),
    "low": ("Lower end of the 95 % confidence interval", "as the number"),
    "high": ("Upper end of the 95 % confidence interval", "as the number")}
"""Columns of group tables that are no measures of a run."""

IDENTIFIERS = {
    "participant": "Participant label, without sub-", "session": "Session label, without ses-",
    "run": "Name of the run", "batch": "Site or scanner that the run is counted to",
    "shell": "Shell of the signal, by its b in s/mm²",
    "tissue": "wm: white matter, gm: grey matter",
    "measure": "What the error is of: signal, S/S0; fa and md, of the shell's tensor",
    "dti_shells": "Shells that the diffusion tensor was fitted to, by their b in s/mm²",
    "fold": "Number of the training, of which this participant was no part",
    "data": "What of: measured, harmonized, or the table of that name",
    "statistic": "icc_consistency: ICC(3,1) of people scanned in every batch, which a shift of a "
                 "batch does not lower; icc_agreement: ICC(2,1) of them, which it does; cov: SD "
                 "between batches over the mean, mean over those people; paired_difference and "
                 "unpaired_difference: the batch's mean less the reference's (or, without a "
                 "reference, the mean of all), of the same or of different people; auc: area under "
                 "the ROC curve with which the means of all maps tell the batch, leaving one "
                 "person out in turn",
    "of": "Column of desc-image_qc.tsv, or all features",
    "people": "Number of people it rests on",
    "effect": "age: slope of the mean over age; sex: difference of the means between the sexes, "
              "the second in alphabetical order less the first; contrast: mean local contrast",
    "verdict": "not lost: the interval of the ratio lies above 0.9; lost: the ratio lies below "
               "0.9 and its interval below 1; exaggerated: the ratio lies above 1.1 and its "
               "interval above 1; as at the reference: either of the two, but the effect in the "
               "reference batch is no more than 10 % beyond; cannot be told: anything else",
}


@dataclass(frozen=True, eq=False)
class Slices:
    """Slice-wise signal against what the other volumes of the shell predict.

    change: (slice, volume) observed / expected - 1; NaN where it was not assessed.
    z: (slice, volume) robust z of log(observed / expected); NaN likewise.
    Slices are those of the third image axis.
    """

    change: np.ndarray
    z: np.ndarray

    @property
    def suspects(self) -> list[tuple[int, int]]:
        """(slice, volume) that look corrupted, the worst first."""
        with np.errstate(invalid="ignore"):
            bad = (self.z < -DROPOUT_Z) & (self.change < -DROPOUT_LOSS)
        return sorted(((int(k), int(i)) for k, i in np.argwhere(bad)),
                      key=lambda ki: self.change[ki])


def shell_name(shell: Shell) -> str:
    """`b1000`; `b1000_planar`, `b1000_spherical` or `b1000_bdelta0p5` for other encodings."""
    shapes = {1.0: "", 0.0: "_spherical", -0.5: "_planar"}
    rounded = round(shell.b_delta / 0.05) * 0.05
    shape = next((s for d, s in shapes.items() if abs(rounded - d) < 0.01), None)
    if shape is None:
        shape = f"_bdelta{rounded:.2g}".replace(".", "p").replace("-", "m")
    return f"b{shell.b:.0f}{shape}"


def measure_quality(dwi: Dwi) -> dict[str, Any]:
    """Flat QC numbers of one run; None where one cannot be computed."""
    acquisition, signal = dwi.acquisition, dwi.signal
    slices = slice_signal(dwi).suspects
    noise = dwi.noise_sd
    qc: dict[str, Any] = {
        "n_voxels": len(signal),
        "mask_volume": round(len(signal) * abs(np.linalg.det(dwi.affine[:3, :3])) / 1000, 3),
        "n_volumes": len(acquisition), "n_b0": int(acquisition.b0.sum()),
        "n_shells": len(acquisition.shells), "n_invalid": dwi.invalid,
        "n_negative": sum(int((signal[:, i] < 0).sum()) for i in range(len(acquisition))),
        "noise_sd": noise,
        "snr_b0": _ratio(np.median(dwi.mean_b0), noise) if acquisition.b0.any() else None,
        "ndc": neighbouring_correlation(dwi),
        "n_dropout_slices": len(slices), "n_dropout_volumes": len({i for _, i in slices}),
    }
    for shell in acquisition.shells:
        level = float(np.median(mean_volume(dwi, shell.indices)))
        name = shell_name(shell)
        qc |= {f"{name}_signal": level, f"{name}_snr": _ratio(level, noise)}
    return qc


def mean_volume(dwi: Dwi, indices: np.ndarray) -> np.ndarray:
    """(voxel,) mean signal over some volumes, one at a time so that none is copied."""
    total = np.zeros(len(dwi.signal))
    for i in indices:
        total += dwi.signal[:, i]
    return total / len(indices)


def neighbouring_correlation(dwi: Dwi) -> float | None:
    """Mean over weighted volumes of Pearson's r, over the mask, with the nearest weighted volume.

    Nearest in the Frobenius distance of b-tensors, which makes n and -n one direction (Yeh et al.
    2019, doi:10.1016/j.neuroimage.2019.116131). None with fewer than two weighted volumes.
    """
    weighted = np.flatnonzero(~dwi.acquisition.b0)
    if len(weighted) < 2:
        return None
    tensors = dwi.acquisition.btensors[weighted].reshape(len(weighted), 9)
    distance = ((tensors[:, None] - tensors[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    pairs = zip(weighted, weighted[distance.argmin(axis=1)], strict=True)
    found = {frozenset((int(i), int(j))): 0.0 for i, j in pairs}
    for i, j in map(sorted, found):
        found[frozenset((i, j))] = _pearson(dwi.signal[:, i], dwi.signal[:, j])
    each = [found[frozenset((int(i), int(weighted[distance[k].argmin()])))]
            for k, i in enumerate(weighted)]
    return float(np.mean(each)) if np.isfinite(each).all() else None


def slice_signal(dwi: Dwi) -> Slices:
    """Compare every slice of every volume with what its shell predicts.

    m is the mean signal of a slice inside the mask. Per slice and shell, log m is modelled over
    the volumes by spherical harmonics in the direction (degree 2 from 18 volumes up, else a
    constant), fitted robustly; from the residual the median over the slices of the volume is
    taken, where there are 5 slices or more, so that a change of the whole volume does not count.
    z = residual / max(SD of that slice, SD of all slices), both SDs as 1.4826 MAD.
    Slices with fewer voxels than 20, or a tenth of the largest slice, and shells of fewer than
    MIN_VOLUMES volumes are not assessed.
    """
    acquisition = dwi.acquisition
    where = np.nonzero(dwi.mask)[2]
    depth = dwi.mask.shape[2]
    size = np.bincount(where, minlength=depth)
    use = np.flatnonzero(size >= max(20, 0.1 * size.max()))
    change, z = np.full((2, depth, len(acquisition)), np.nan)
    groups = [s.indices for s in acquisition.shells] + [np.flatnonzero(acquisition.b0)]
    for indices in (g for g in groups if len(g) >= MIN_VOLUMES and len(use)):
        mean = np.stack([np.bincount(where, dwi.signal[:, i], depth)[use] / size[use]
                         for i in indices], axis=1)
        usual = np.median(mean, axis=1, keepdims=True)
        if (usual <= 0).any():
            continue
        log = np.log(np.maximum(mean / usual, 1e-3))
        directed = not acquisition.b0[indices[0]]
        degree = sh.degree_for(len(indices) / 3, most=2) if directed else 0
        basis = (sh.independent(sh.basis(degree, acquisition.bvecs[indices])) if degree
                 else np.ones((len(indices), 1)))
        residual = log - _robust_fit(basis, log)
        if len(use) >= 5:
            residual = residual - np.median(residual, axis=0)
        own = 1.4826 * np.median(np.abs(residual), axis=1, keepdims=True)
        every = 1.4826 * np.median(np.abs(residual))
        z[np.ix_(use, indices)] = residual / np.maximum(np.maximum(own, every), 1e-6)
        change[np.ix_(use, indices)] = np.expm1(residual)
    return Slices(change, z)


def summarize_maps(method: Method, derived: Derived) -> dict[str, float | None]:
    """Mean, SD and median over the voxels with an estimate of each scalar map: `dti_fa_mean`, …
    (labels have none)."""
    found: dict[str, float | None] = {}
    maps = method.outputs["maps"]
    for key, values in derived.maps.items():
        if values.ndim != 1 or maps[key]["Units"] == "label":
            continue
        finite = values[np.isfinite(values) & (True if derived.valid is None else derived.valid)]
        finite = finite.astype(np.float64)
        numbers = (finite.mean(), finite.std(), np.median(finite)) if len(finite) else (None,) * 3
        found |= {f"{method.short}_{key}_{statistic}": None if n is None else float(n)
                  for statistic, n in zip(STATISTICS, numbers, strict=True)}
    return found


def describe_columns(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Description and Units of each column of a QC table, for its JSON sidecar."""
    return {str(key): _describe(str(key)) for key in keys}


def harmonized_columns(table: pd.DataFrame, features: Iterable[str]) -> dict[str, str]:
    """Columns of a table that hold a feature after harmonization, and the feature of each."""
    return {f"harmonized_{f}": f for f in features if f"harmonized_{f}" in table.columns}


def map_features(keys: Iterable[str]) -> list[str]:
    """The columns that ComBat works on: means of maps, those of uncertainty maps left out."""
    known = _map_columns()
    return [k for k in keys if k in known and k.endswith("_mean") and not k.endswith("_std_mean")]


def find_outliers(table: pd.DataFrame) -> pd.DataFrame:
    """Measures of runs that stand out: columns run, batch, measure, value, median, z, why.

    z = (x - median) / (1.4826 MAD), or / (1.2533 mean absolute deviation) where the MAD is 0
    (Iglewicz & Hoaglin 1993), among the runs of the batch where it has MIN_RUNS values, else among
    all runs where those are enough. |z| > 3.5 stands out; the furthest come first.
    """
    import pandas as pd

    found = []
    known = _map_columns()
    for measure in (c for c in table.columns if _is_signal(c) or c in known):
        values = pd.to_numeric(table[measure], errors="coerce")
        for batch, members in values.groupby(table["batch"]):
            members = members.dropna()
            enough = len(members) >= MIN_RUNS
            peers = members if enough else values.dropna()
            if len(peers) < MIN_RUNS:
                continue
            median = peers.median()
            distance = (peers - median).abs()
            scale = 1.4826 * distance.median() or 1.2533 * distance.mean()
            if not scale > 1e-9 * abs(median):
                continue
            z = (members - median) / scale
            for row in z.index[z.abs() > OUTLIER]:
                side = "above" if z[row] > 0 else "below"
                whom = f"{len(peers)} runs of {batch}" if enough else f"all {len(peers)} runs"
                found.append({
                    "run": table.loc[row, "run"], "batch": batch, "measure": measure,
                    "value": float(members[row]), "median": float(median), "z": float(z[row]),
                    "why": f"{members[row]:.4g} lies {abs(z[row]):.1f} robust standard deviations "
                           f"{side} the median {median:.4g} of {whom}"})
    names = ["run", "batch", "measure", "value", "median", "z", "why"]
    return pd.DataFrame(found, columns=names).sort_values(
        "z", key=abs, ascending=False, kind="stable", ignore_index=True)


def _describe(key: str) -> dict[str, str]:
    if fixed := FIXED.get(key, GROUP.get(key)):
        return {"Description": fixed[0], "Units": fixed[1]}
    if key in IDENTIFIERS:
        return {"Description": IDENTIFIERS[key], "Units": "n/a"}
    if entry := _map_columns().get(key):
        return entry
    if shell := re.fullmatch(r"b(\d+)(?:_(planar|spherical|bdelta\w+))?_(signal|snr)", key):
        b, shape, what = shell.groups()
        of = f"the mean signal of the shell b = {b} s/mm²" + (f" ({shape})" if shape else "")
        return ({"Description": f"Median over the mask of {of}", "Units": "as the input signal"}
                if what == "signal" else
                {"Description": f"Median over the mask of {of} divided by noise_sd", "Units": "1"})
    signal, _, rest = key.partition("_")
    if signal in ("harmonized", "upsampled"):
        entry = _describe(rest)
        return {**entry, "Description": f"{entry['Description']}; of the {signal} signal"}
    for short in _short_names():
        if key.startswith(f"{short}_"):
            what = key.removeprefix(f"{short}_").removeprefix("n_").replace("_", " ")
            return {"Description": f"{short}: voxels handled in a special way: {what}",
                    "Units": "voxels"}
    return {"Description": f"{key}, as participants.tsv, sessions.tsv or the method gives it",
            "Units": "n/a"}


@cache
def _short_names() -> tuple[str, ...]:
    return tuple(methods.get(name).short for name in methods.names())


@cache
def _map_columns() -> Mapping[str, dict[str, str]]:
    """Description and Units of every statistic of every scalar map that a method can make."""
    found: dict[str, dict[str, str]] = {}
    for name in methods.names("estimate_"):
        method = methods.get(name)
        for key, entry in method.outputs["maps"].items():
            found |= dict(_map_statistics(method.short, key, entry))
    return found


def _map_statistics(method: str, key: str, entry: Mapping[str, Any]
                    ) -> Iterator[tuple[str, dict[str, str]]]:
    for statistic, word in STATISTICS.items():
        yield f"{method}_{key}_{statistic}", {
            "Description": f"{word} over the brain mask of: {entry['Description']}",
            "Units": entry["Units"]}


def _is_signal(key: str) -> bool:
    own = key in FIXED and not key.startswith("harmonization_")
    return own or bool(re.fullmatch(r"b\d+\w*_(signal|snr)", key))


def _ratio(value: float, noise: float | None) -> float | None:
    return float(value / noise) if noise else None


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def _robust_fit(basis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fitted values of (row, n) on an (n, p) basis: least squares with Tukey's weights, 10 steps.

    It starts from the median of each row, so that one gross outlier does not pull the fit.
    """
    fitted = np.broadcast_to(np.median(values, axis=1, keepdims=True), values.shape)
    if basis.shape[1] == 1:
        return fitted
    for _ in range(10):
        residual = values - fitted
        scale = 4.685 * 1.4826 * np.median(np.abs(residual), axis=1, keepdims=True)
        weight = np.clip(1 - (residual / np.maximum(scale, 1e-9)) ** 2, 0, None) ** 2 + 1e-6
        normal = np.einsum("rn,np,nq->rpq", weight, basis, basis)
        moment = np.einsum("rn,np,rn->rp", weight, basis, values)
        fitted = np.linalg.solve(normal, moment[..., None])[..., 0] @ basis.T
    return fitted
