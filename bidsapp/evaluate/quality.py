"""Quality measures of a run: the signal, slices that look corrupted, statistics of the maps.

`describe_columns` describes the columns of all tables of the group level, those of `agreement`,
`biology` and `crossvalidation` included.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from bidsapp import methods, sh
from bidsapp.acquisition import Acquisition, Shell

if TYPE_CHECKING:
    import pandas as pd

    from bidsapp.dwi import Dwi
    from bidsapp.kinds import Derived, Method

OUTLIER = 3.5
"""Absolute robust z above which a run is an outlier (Iglewicz & Hoaglin 1993)."""

MIN_RUNS = 5
"""Minimum number of runs of a site for them to be compared among themselves; below it, a run is
compared with the runs of all sites."""

DROPOUT_Z = 6.0
"""A slice looks corrupted if its robust z is below the negative of this number, and its loss of
signal is above DROPOUT_LOSS."""

DROPOUT_LOSS = 0.1
"""Share of the signal that a slice must have lost to look corrupted."""

MIN_VOLUMES = 6
"""Minimum number of volumes of a shell for its slices to be assessed."""

HEAD_RADIUS = 50.0
"""Distance in mm from the centre of the head at which framewise displacement counts rotations."""

STATISTICS = {"mean": "Mean", "sd": "Standard deviation", "median": "Median"}
"""Statistics of a map, by the suffix of the column."""

FIXED: dict[str, tuple[str, str]] = {
    "n_voxels": ("Voxels in the brain mask", "voxels"),
    "mask_volume": ("Volume of the brain mask", "mL"),
    "n_volumes": ("Number of volumes, including b = 0", "volumes"),
    "n_b0": ("Volumes with b < 50 s/mm²", "volumes"),
    "n_shells": ("Number of shells, each with one b and one b-tensor shape", "shells"),
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
    "fibre_coherence": ("Fibre coherence: agreement of principal directions with the neighbour "
                        "along them, minus that with all neighbours; mean |cos| over voxels of FA "
                        "> 0.3 (after Schilling et al. 2019)", "1"),
    "fibre_coherence_best": ("Fibre coherence with the best of the 24 b-vector tables with flipped "
                             "or swapped axes", "1"),
    "preproc_noise_sd": ("Standard deviation of the noise that denoising estimated: median of its "
                         "map over the brain mask", "as the input signal"),
    "preproc_noise_removed": ("Share of the noise variance that denoising removed: mean square of "
                              "what it took away divided by the mean square of the noise map, over "
                              "the brain mask", "1"),
    "field_correlation_before": ("Correlation in the head of the b = 0 images of opposite phase "
                                 "encoding, as measured", "1"),
    "field_correlation_after": ("The same, corrected for the field", "1"),
    "field_max": ("Largest absolute value of the susceptibility field in the brain mask", "Hz"),
    "fd_mean": ("Framewise displacement (Power et al. 2012): mean over all volumes but the first",
                "mm"),
    "fd_max": ("Largest framewise displacement", "mm"),
    "n_replaced_slices": ("Slices with signal dropout that were replaced by the prediction from "
                          "the other volumes", "slices"),
    "ndc_raw": ("The same as ndc, of the images before any correction", "1"),
    "ndc_preproc": ("The same as ndc_raw, of the corrected images with their bias field, which "
                    "raises it; ndc is without it", "1"),
    "bias_min": ("Smallest factor of the bias field in the brain mask: its 1st percentile", "1"),
    "bias_max": ("Largest factor of the bias field in the brain mask: its 99th percentile", "1"),
    "roundtrip_rmse": ("Upsampling: root mean square error of a measured volume predicted from "
                       "others, divided by noise_sd; median over volumes", "1"),
    "roundtrip_correlation": ("The correlation of the two over voxels; median over volumes", "1"),
    "roundtrip_coverage": ("Share of the measured values in the 90 % interval of predicted SD and "
                           "noise; median over volumes", "1"),
    "harmonization_angle": ("Median angle between the principal directions before and after "
                            "harmonization, in single-fibre voxels", "degrees"),
    "harmonization_voxels": ("Number of single-fibre voxels: FA > 0.7 in the corpus callosum, or "
                             "deep in the brain", "voxels"),
}
"""Description and Units of the columns of desc-image_qc.tsv that are the same for all methods and
shells."""

_AGAINST = "the registered scan at the reference site, over voxels of the tissue"
_MAP = "S/S0 and FA: 1; MD: mm²/s"
GROUP: dict[str, tuple[str, str]] = {
    f"{key}_{when}": (f"{what}; {how}, as spherical harmonics", units)
    for key, what, units in (
        ("nmse", f"Normalised mean square error against {_AGAINST}: Σ (y − ŷ)² / Σ y²", "1"),
        ("bias", f"Mean difference from {_AGAINST}", _MAP),
        ("mean", "Mean over voxels of the tissue", _MAP),
        ("contrast", "Local contrast: Σ (x_i − x_j)(r_i − r_j) / Σ (r_i − r_j)² over neighbouring "
                     "voxels of the tissue, r the map of the scan at the reference site", "1"))
    for when, how in (("before", "as measured"), ("after", "harmonized"))} | {
    "value": ("The statistic", "as the column, or 1"),
    "before": ("The effect in measured maps", "as the measure, per year for age"),
    "after": ("The effect in harmonized maps of the same participants", "as before"),
    "reference": ("The effect in the same participants' scans at the reference site", "as before"),
    "ratio": ("after / before", "1"),
    "low": ("Lower end of the 95 % confidence interval", "as the number"),
    "high": ("Upper end of the 95 % confidence interval", "as the number")}
"""Description and Units of the numbers in the other tables of the group level."""

IDENTIFIERS = {
    "participant": "Participant label, without sub-", "session": "Session label, without ses-",
    "run": "Name of the run", "batch": "Site or scanner of the run",
    "shell": "Shell of the signal, by its b in s/mm²",
    "tissue": "wm: white matter, gm: grey matter",
    "measure": "Measure that the error refers to: signal, S/S0; fa and md, of the shell's tensor",
    "dti_shells": "Shells that the diffusion tensor was fitted to, by their b in s/mm²",
    "fold": "Number of the fold: the training that held this participant out",
    "data": "Maps that were compared: measured, harmonized, or the table of that name",
    "statistic": "icc_consistency: ICC(3,1) of participants scanned at every site, which a shift "
                 "of a site does not lower; icc_agreement: ICC(2,1) of the same, which it lowers; "
                 "cov: coefficient of variation between sites, mean over the same participants; "
                 "paired_difference and unpaired_difference: the site's mean minus the reference's "
                 "(without a reference, minus the mean of all sites), of the same or of different "
                 "participants; auc: area under the ROC curve of a classifier that separates the "
                 "site by the means of all maps, leaving one participant out in turn",
    "of": "Column of desc-image_qc.tsv, or all features",
    "people": "Number of participants that the value is based on",
    "effect": "age: slope of the mean over age; sex: difference of the means between the sexes, "
              "the second in alphabetical order minus the first; contrast: mean local contrast",
    "verdict": "not lost: the interval of the ratio lies above 0.9; lost: the ratio lies below "
               "0.9 and its interval below 1; exaggerated: the ratio lies above 1.1 and its "
               "interval above 1; as at the reference: lost or exaggerated, but no more than "
               "10 % beyond the effect at the reference site; cannot be told: none of these",
}
"""Descriptions of the columns, of any table, that say what a row is about."""


@dataclass(frozen=True, eq=False)
class Slices:
    """Signal of each slice relative to the prediction from the volumes of its shell.

    Parameters
    ----------
    change : (slice, volume)
        observed / expected − 1, NaN if the slice was not assessed. Slices are those of the third
        image axis.
    z : (slice, volume)
        Robust z of log(observed / expected), NaN if the slice was not assessed.
    """

    change: np.ndarray
    z: np.ndarray

    @property
    def suspects(self) -> list[tuple[int, int]]:
        """(slice, volume) of the slices that look corrupted, the worst first."""
        with np.errstate(invalid="ignore"):
            corrupted = (self.z < -DROPOUT_Z) & (self.change < -DROPOUT_LOSS)
        return sorted(((int(k), int(i)) for k, i in np.argwhere(corrupted)),
                      key=lambda ki: self.change[ki])


class HeadMotion(NamedTuple):
    """Movement of the head in each volume of a series.

    Attributes
    ----------
    translations : (n, 3)
        Displacement of the centre of the brain along world x, y and z, mm.
    rotations : (n, 3)
        Angles about world x, y and z, degrees.
    framewise_displacement : (n,)
        mm; NaN in the first volume.
    """

    translations: np.ndarray
    rotations: np.ndarray
    framewise_displacement: np.ndarray


def shell_name(shell: Shell) -> str:
    """Name a shell: `b1000`, or `b1000_planar`, `b1000_spherical` or `b1000_bdelta0p5` if its
    encoding is not linear."""
    shapes = {1.0: "", 0.0: "_spherical", -0.5: "_planar"}
    rounded = round(shell.b_delta / 0.05) * 0.05
    shape = next((s for d, s in shapes.items() if abs(rounded - d) < 0.01), None)
    if shape is None:
        shape = f"_bdelta{rounded:.2g}".replace(".", "p").replace("-", "m")
    return f"b{shell.b:.0f}{shape}"


def measure_quality(dwi: Dwi) -> dict[str, Any]:
    """Compute the quality measures of the signal of a run.

    Returns
    -------
    dict
        Values by column of desc-image_qc.tsv; None if a value cannot be computed.
    """
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
    """Average the signal over some volumes, one at a time to save memory.

    Returns
    -------
    (voxel,) ndarray
    """
    total = np.zeros(len(dwi.signal))
    for i in indices:
        total += dwi.signal[:, i]
    return total / len(indices)


def neighbouring_correlations(signal: np.ndarray, acquisition: Acquisition) -> np.ndarray:
    """Compute the neighbouring DWI correlation of each volume (Yeh et al. 2019,
    doi:10.1016/j.neuroimage.2019.116131).

    It is the correlation over voxels of a weighted volume with the nearest other one. The distance
    is the Frobenius distance of b-tensors, so that n and −n are the same direction.

    Parameters
    ----------
    signal : (voxel, volume)
        Signal inside the mask.
    acquisition : Acquisition
        Gradient table of the volumes.

    Returns
    -------
    (volume,) ndarray
        NaN for b = 0, where the signal of a volume is constant, and with fewer than two weighted
        volumes.
    """
    correlations = np.full(len(acquisition), np.nan)
    weighted = np.flatnonzero(~acquisition.b0)
    if len(weighted) < 2:
        return correlations
    tensors = acquisition.btensors[weighted].reshape(len(weighted), 9)
    distance = ((tensors[:, None] - tensors[None]) ** 2).sum(axis=2)
    np.fill_diagonal(distance, np.inf)
    pairs = [(int(min(i, j)), int(max(i, j)))
             for i, j in zip(weighted, weighted[distance.argmin(axis=1)], strict=True)]
    of_pair = {(i, j): _pearson(signal[:, i], signal[:, j]) for i, j in set(pairs)}
    correlations[weighted] = [of_pair[pair] for pair in pairs]
    return correlations


def neighbouring_correlation(dwi: Dwi) -> float | None:
    """Average `neighbouring_correlations` over the weighted volumes.

    Returns
    -------
    float or None
        None with fewer than two weighted volumes, or if a correlation is undefined.
    """
    values = neighbouring_correlations(dwi.signal, dwi.acquisition)[~dwi.acquisition.b0]
    return float(values.mean()) if len(values) and np.isfinite(values).all() else None


def head_motion(rotations: np.ndarray, translations: np.ndarray, centre: np.ndarray
                ) -> HeadMotion:
    """Describe rigid movements y = R x + t, in world coordinates, as rotations about a centre c and
    its displacement.

    The displacement is R c + t − c, the angles are those of R = Rz(γ) Ry(β) Rx(α). The framewise
    displacement of volume v is Σ |d_v − d_(v−1)| + 50 mm · Σ |r_v − r_(v−1)| (Power et al. 2012,
    doi:10.1016/j.neuroimage.2011.10.018).

    Parameters
    ----------
    rotations : (n, 3, 3)
        R of each volume.
    translations : (n, 3)
        t of each volume, mm.
    centre : (3,)
        c, the centre of the brain, mm.

    Returns
    -------
    HeadMotion
    """
    from scipy.spatial.transform import Rotation

    displacement = rotations @ centre + translations - centre
    angles = Rotation.from_matrix(rotations).as_euler("xyz")
    steps = (np.abs(np.diff(displacement, axis=0)).sum(axis=1)
             + HEAD_RADIUS * np.abs(np.diff(angles, axis=0)).sum(axis=1))
    return HeadMotion(displacement, np.degrees(angles), np.concatenate([[np.nan], steps]))


def slice_signal(dwi: Dwi) -> Slices:
    """Compare every slice of every volume with the prediction from its shell.

    With m the mean signal of a slice inside the mask, log m is modelled, for each slice and shell,
    by spherical harmonics of the direction (degree 2 for 18 or more volumes, otherwise a constant),
    which are fitted robustly over the volumes. With 5 or more slices, the median over the slices of
    a volume is subtracted from the residuals, so that a change of the whole volume does not count.
    Then z = residual / max(SD of that slice, SD of all slices), with both SDs as 1.4826 MAD. Slices
    with fewer than 20 voxels, or less than a tenth of the largest slice, and shells with fewer than
    MIN_VOLUMES volumes are not assessed.
    """
    acquisition = dwi.acquisition
    slices = np.nonzero(dwi.mask)[2]
    depth = dwi.mask.shape[2]
    size = np.bincount(slices, minlength=depth)
    use = np.flatnonzero(size >= max(20, 0.1 * size.max()))
    change, z = np.full((2, depth, len(acquisition)), np.nan)
    groups = [s.indices for s in acquisition.shells] + [np.flatnonzero(acquisition.b0)]
    for indices in (g for g in groups if len(g) >= MIN_VOLUMES and len(use)):
        mean = np.stack([np.bincount(slices, dwi.signal[:, i], depth)[use] / size[use]
                         for i in indices], axis=1)
        median = np.median(mean, axis=1, keepdims=True)
        if (median <= 0).any():
            continue
        log = np.log(np.maximum(mean / median, 1e-3))
        directed = not acquisition.b0[indices[0]]
        degree = sh.degree_for(len(indices) / 3, l_max=2) if directed else 0
        basis = (sh.independent(sh.basis(degree, acquisition.bvecs[indices])) if degree
                 else np.ones((len(indices), 1)))
        residual = log - _robust_fit(basis, log)
        if len(use) >= 5:
            residual = residual - np.median(residual, axis=0)
        slice_sd = 1.4826 * np.median(np.abs(residual), axis=1, keepdims=True)
        overall_sd = 1.4826 * np.median(np.abs(residual))
        z[np.ix_(use, indices)] = residual / np.maximum(np.maximum(slice_sd, overall_sd), 1e-6)
        change[np.ix_(use, indices)] = np.expm1(residual)
    return Slices(change, z)


def summarize_maps(method: Method, derived: Derived) -> dict[str, float | None]:
    """Compute mean, SD and median of each scalar map over the voxels with a valid, finite value.

    Parameters
    ----------
    method : Method
        The estimator, which names and describes its maps.
    derived : Derived
        Its maps of a run.

    Returns
    -------
    dict
        Values by column (`dti_fa_mean`, …); None without voxels. Maps of labels are left out.
    """
    columns: dict[str, float | None] = {}
    maps = method.outputs["maps"]
    for key, values in derived.maps.items():
        if values.ndim != 1 or maps[key]["Units"] == "label":
            continue
        finite = values[np.isfinite(values) & (True if derived.valid is None else derived.valid)]
        finite = finite.astype(np.float64)
        numbers = (finite.mean(), finite.std(), np.median(finite)) if len(finite) else (None,) * 3
        columns |= {f"{method.short}_{key}_{statistic}": None if n is None else float(n)
                    for statistic, n in zip(STATISTICS, numbers, strict=True)}
    return columns


def describe_columns(keys: Iterable[str]) -> dict[str, dict[str, str]]:
    """Describe the columns of a table for its JSON sidecar.

    Parameters
    ----------
    keys : iterable of str
        Names of the columns.

    Returns
    -------
    dict
        Description and Units of each column.
    """
    return {str(key): _describe(str(key)) for key in keys}


def harmonized_columns(table: pd.DataFrame, features: Iterable[str]) -> dict[str, str]:
    """Find the columns of a table that hold features after harmonization.

    Returns
    -------
    dict of str to str
        The feature, by the name of its harmonized column.
    """
    return {f"harmonized_{f}": f for f in features if f"harmonized_{f}" in table.columns}


def map_features(keys: Iterable[str]) -> list[str]:
    """Select the columns that ComBat works on: means of maps, without maps of standard errors
    (`_std`)."""
    of_maps = _map_columns()
    return [k for k in keys
            if k in of_maps and k.endswith("_mean") and not k.endswith("_std_mean")]


def find_outliers(table: pd.DataFrame) -> pd.DataFrame:
    """Find outliers among the runs.

    z = (x − median) / (1.4826 MAD), or / (1.2533 mean absolute deviation) if the MAD is 0
    (Iglewicz & Hoaglin 1993), among the runs of the site if it has MIN_RUNS values, otherwise among
    all runs if these have. |z| > OUTLIER is an outlier. Measures that are (nearly) the same in all
    runs have none.

    Parameters
    ----------
    table
        A row for each run: run, batch, and quality measures. Those of the measured signal and the
        statistics of maps are tested; other columns are not.

    Returns
    -------
    DataFrame
        Columns run, batch, measure, value, median, z, why; the largest |z| first.
    """
    import pandas as pd

    rows = []
    of_maps = _map_columns()
    for measure in (c for c in table.columns if _is_signal(c) or c in of_maps):
        values = pd.to_numeric(table[measure], errors="coerce")
        for batch, of_site in values.groupby(table["batch"]):
            of_site = of_site.dropna()
            enough = len(of_site) >= MIN_RUNS
            peers = of_site if enough else values.dropna()
            if len(peers) < MIN_RUNS:
                continue
            median = peers.median()
            distance = (peers - median).abs()
            scale = 1.4826 * distance.median() or 1.2533 * distance.mean()
            if not scale > 1e-9 * abs(median):
                continue
            z = (of_site - median) / scale
            for row in z.index[z.abs() > OUTLIER]:
                direction = "above" if z[row] > 0 else "below"
                group = f"{len(peers)} runs of {batch}" if enough else f"all {len(peers)} runs"
                rows.append({
                    "run": table.loc[row, "run"], "batch": batch, "measure": measure,
                    "value": float(of_site[row]), "median": float(median), "z": float(z[row]),
                    "why": f"{of_site[row]:.4g} lies {abs(z[row]):.1f} robust standard deviations "
                           f"{direction} the median {median:.4g} of {group}"})
    names = ["run", "batch", "measure", "value", "median", "z", "why"]
    return pd.DataFrame(rows, columns=names).sort_values(
        "z", key=abs, ascending=False, kind="stable", ignore_index=True)


def _describe(key: str) -> dict[str, str]:
    if fixed := FIXED.get(key, GROUP.get(key)):
        return {"Description": fixed[0], "Units": fixed[1]}
    if key in IDENTIFIERS:
        return {"Description": IDENTIFIERS[key], "Units": "n/a"}
    if entry := _map_columns().get(key):
        return entry
    if shell := re.fullmatch(r"b(\d+)(?:_(planar|spherical|bdelta\w+))?_(signal|snr)", key):
        b, shape, measure = shell.groups()
        level = ("Median over the mask of the mean signal of the shell b = "
                 f"{b} s/mm²" + (f" ({shape})" if shape else ""))
        return ({"Description": level, "Units": "as the input signal"} if measure == "signal" else
                {"Description": f"{level} divided by noise_sd", "Units": "1"})
    signal, _, rest = key.partition("_")
    if signal in ("denoised", "harmonized", "upsampled"):
        entry = _describe(rest)
        return {**entry, "Description": f"{entry['Description']}; of the {signal} signal"}
    for short in _short_names():
        if key.startswith(f"{short}_"):
            event = key.removeprefix(f"{short}_").removeprefix("n_").replace("_", " ")
            return {"Description": f"{short}: number of voxels with special treatment: {event}",
                    "Units": "voxels"}
    return {"Description": f"{key}, from participants.tsv, sessions.tsv or the method",
            "Units": "n/a"}


@cache
def _short_names() -> tuple[str, ...]:
    return tuple(methods.get(name).short for name in methods.names())


@cache
def _map_columns() -> Mapping[str, dict[str, str]]:
    """Describe every statistic of every scalar map of the estimators."""
    columns: dict[str, dict[str, str]] = {}
    for name in methods.names("estimate_"):
        method = methods.get(name)
        for key, entry in method.outputs["maps"].items():
            columns |= dict(_map_statistics(method.short, key, entry))
    return columns


def _map_statistics(method: str, key: str, entry: Mapping[str, Any]
                    ) -> Iterator[tuple[str, dict[str, str]]]:
    for statistic, word in STATISTICS.items():
        yield f"{method}_{key}_{statistic}", {
            "Description": f"{word} over the brain mask of: {entry['Description']}",
            "Units": entry["Units"]}


def _is_signal(key: str) -> bool:
    """Whether a column is a quality measure of the measured signal."""
    fixed = key in FIXED and not key.startswith(("harmonization_", "roundtrip_"))
    return fixed or bool(re.fullmatch(r"b\d+\w*_(signal|snr)", key))


def _ratio(value: float, noise: float | None) -> float | None:
    return float(value / noise) if noise else None


def _pearson(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(dtype=np.float64), b - b.mean(dtype=np.float64)
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else np.nan


def _robust_fit(basis: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Fit values, (row, n), on a basis, (n, p), by 10 steps of least squares with Tukey's weights.

    The fit starts from the median of each row, so that a gross outlier does not bias it.
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
