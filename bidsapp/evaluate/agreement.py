"""How well harmonization did: against a target, between sites, and for what is biology.

Pure functions of arrays. `found` is what was harmonized, `truth` what it should be: the scan of the
reference site, with its noise or without.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float

from bidsapp import tensor
from bidsapp.acquisition import Acquisition
from bidsapp.blocks import map_voxels
from bidsapp.evaluate import quality

WINDOW = 1.5
"""Voxels, SD of the Gaussian window of SSIM (Wang et al. 2004)."""

K1, K2 = 0.01, 0.03
"""Of SSIM: constants as shares of the range."""

LEAST = 3
"""People, below which nothing is said of sites."""

LEAST_ATTENUATION = 1e-3
"""S/S0 below this is raised to it before its logarithm is taken."""

CONFIDENCE = 0.95
"""Of every interval."""


class Estimate(NamedTuple):
    """A number with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mse(found: np.ndarray, truth: np.ndarray) -> float:
    """Mean of (found − truth)²."""
    return float(np.square(found - truth, dtype=np.float64).mean())


def nmse(found: np.ndarray, truth: np.ndarray) -> float:
    """Σ (found − truth)² / Σ truth² (Koppers et al. 2018, eq. 2)."""
    return mse(found, truth) / float(np.square(truth, dtype=np.float64).mean())


def shell_maps(ratio: Float[np.ndarray, "voxel direction"], acquisition: Acquisition,
               device: str = "cpu") -> dict[str, np.ndarray]:
    """fa (1), md (mm²/s) and direction (voxel, 3) of the tensor of one shell's S/S0.

    acquisition: that shell's. S/S0 = 1 at b = 0 joins them as one measurement.
    """
    x = np.concatenate([tensor.design(acquisition.btensors), tensor.design(np.zeros((1, 3, 3)))])
    values = np.ones((len(ratio), len(x)), np.float32)
    values[:, :-1] = np.maximum(ratio, LEAST_ATTENUATION)

    def fit(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        found = tensor.fit(signal, x)
        return {k: found[k] for k in ("fa", "md", "direction")}

    return map_voxels(fit, values, device)


def angle(one: Float[np.ndarray, "voxel 3"], other: Float[np.ndarray, "voxel 3"]
          ) -> Float[np.ndarray, " voxel"]:
    """Degrees between axes of length 1."""
    return np.degrees(np.arccos(np.clip(np.abs((one * other).sum(1)), 0, 1)))


def ssim(found: Float[np.ndarray, "x y z"], truth: Float[np.ndarray, "x y z"],
         mask: Bool[np.ndarray, "x y z"]) -> float:
    """Mean structural similarity of two volumes over the mask (Wang et al. 2004,
    doi:10.1109/TIP.2003.819861, eq. 13), with a Gaussian window of 1.5 voxels.

    The range L is that of the truth within the mask; both are 0 outside.
    """
    from scipy.ndimage import gaussian_filter

    a, b = (np.where(mask, v, 0).astype(np.float64) for v in (found, truth))
    c1, c2 = ((k * np.ptp(truth[mask])) ** 2 for k in (K1, K2))

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, WINDOW)

    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    local = ((2 * ma * mb + c1) * (2 * ab + c2)
             / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(local[mask].mean())


def sharpness(found: Float[np.ndarray, "x y z"], truth: Float[np.ndarray, "x y z"],
              mask: Bool[np.ndarray, "x y z"]) -> float:
    """Σ ∇found · ∇truth / Σ |∇truth|² inside the mask, central differences: 1 where edges are as
    steep as the truth's, less where they are blurred; noise, which has no part in the truth's
    edges, does not count."""
    from scipy.ndimage import binary_erosion

    inner = binary_erosion(mask)
    one, other = (np.stack(np.gradient(v.astype(np.float64)))[:, inner] for v in (found, truth))
    return float((one * other).sum() / (other**2).sum())


def better_than_second(errors: Mapping[str, Float[np.ndarray, " participant"]]
                       ) -> tuple[str, str, float]:
    """The method of the least mean error, the second, and p of Wilcoxon's signed-rank test,
    two-sided, between the two over participants.

    errors: one per participant, in one order, by method (two or more). With n participants p is at
    least 2^(1 − n). Errors that are equal throughout give p = 1.
    """
    from scipy.stats import wilcoxon

    best, second = sorted(errors, key=lambda m: float(np.mean(errors[m])))[:2]
    difference = np.subtract(errors[best], errors[second])
    if not difference.any():
        return best, second, 1.0
    return best, second, float(wilcoxon(difference).pvalue)


def icc(values: Float[np.ndarray, "participant site"]) -> float:
    """`icc_consistency` without its interval."""
    return icc_consistency(values).value


def icc_consistency(values: Float[np.ndarray, "participant site"]) -> Estimate:
    """Estimate ICC(3,1), consistency, of travelling participants.

    With MSR, MSC and MSE, the mean squares of n participants, of k sites and of the residual,

        ICC(3,1) = (MSR − MSE) / (MSR + (k − 1) MSE)

    (Shrout & Fleiss 1979, doi:10.1037/0033-2909.86.2.420). A shift of a site that is the same for
    everybody does not lower it. The interval is that of McGraw & Wong 1996
    (doi:10.1037/1082-989X.1.1.30), table 7, case C,1.
    """
    n, k, between, _, error = _mean_squares(values)
    if error == 0:
        return Estimate(1.0, 1.0, 1.0)
    ratio, free = between / error, ((n - 1), (n - 1) * (k - 1))
    low, high = ratio / _f_quantile(*free), ratio * _f_quantile(*free[::-1])
    return Estimate(*((f - 1) / (f + k - 1) for f in (ratio, low, high)))


def icc_agreement(values: Float[np.ndarray, "participant site"]) -> Estimate:
    """Estimate ICC(2,1), absolute agreement, of travelling participants.

    In the terms of `icc_consistency`,

        ICC(2,1) = (MSR − MSE) / (MSR + (k − 1) MSE + k (MSC − MSE) / n)

    (Shrout & Fleiss 1979). A shift between sites lowers it. The interval is that of McGraw & Wong
    1996, table 7, case A,1, with the degrees of freedom of Satterthwaite.
    """
    n, k, between, sites, error = _mean_squares(values)
    value = (between - error) / (between + (k - 1) * error + k * (sites - error) / n)
    if value >= 1:
        return Estimate(1.0, 1.0, 1.0)
    a = k * value / (n * (1 - value))
    b = 1 + k * value * (n - 1) / (n * (1 - value))
    free = (a * sites + b * error) ** 2 / (
        (a * sites) ** 2 / (k - 1) + (b * error) ** 2 / ((n - 1) * (k - 1)))
    rest = k * sites + (k * n - k - n) * error
    below, above = _f_quantile(n - 1, free), _f_quantile(free, n - 1)
    return Estimate(value, n * (between - below * error) / (below * rest + n * between),
                    n * (above * between - error) / (rest + n * above * between))


def _mean_squares(values: np.ndarray) -> tuple[float, float, float, float, float]:
    """n, k, and the mean squares of participants, of sites, and of the residual."""
    n, k = map(float, values.shape)
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between = k * ((rows - values.mean()) ** 2).sum() / (n - 1)
    sites = n * ((columns - values.mean()) ** 2).sum() / (k - 1)
    error = ((values - rows - columns + values.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    return n, k, float(between), float(sites), float(error)


def _f_quantile(one: float, other: float) -> float:
    """Upper limit of the F distribution, two-sided."""
    from scipy.stats import f

    return float(f.ppf((1 + CONFIDENCE) / 2, one, other))


def paired_difference(values: Float[np.ndarray, "participant site"],
                      weights: Float[np.ndarray, " site"]) -> Estimate:
    """Estimate Σ_j w_j μ_j, where μ_j is the mean of a site, from people scanned at every site:
    the mean of everyone's own Σ_j w_j x_j, with Student's t interval over people."""
    from scipy.stats import t

    own = values @ weights
    half = t.ppf((1 + CONFIDENCE) / 2, len(own) - 1) * own.std(ddof=1) / math.sqrt(len(own))
    return Estimate(float(own.mean()), float(own.mean() - half), float(own.mean() + half))


def unpaired_difference(groups: Sequence[Float[np.ndarray, " _"]],
                        weights: Float[np.ndarray, " site"]) -> Estimate:
    """Estimate Σ_j w_j μ_j from different people at every site, of unequal variances: with the
    degrees of freedom of Welch 1947 (doi:10.1093/biomet/34.1-2.28), which for two sites and
    w = (1, −1) is Welch's interval of a difference."""
    from scipy.stats import t

    counts = np.array([len(g) for g in groups])
    parts = weights**2 * np.array([g.var(ddof=1) for g in groups]) / counts
    value = float(weights @ [g.mean() for g in groups])
    if not parts.any():
        return Estimate(value, value, value)
    free = parts.sum() ** 2 / (parts**2 / (counts - 1)).sum()
    half = float(t.ppf((1 + CONFIDENCE) / 2, free) * math.sqrt(parts.sum()))
    return Estimate(value, value - half, value + half)


def variation(values: Float[np.ndarray, "participant site"]) -> float:
    """Mean over participants of the SD over sites (n − 1) relative to their mean. Shifts count."""
    return float((values.std(1, ddof=1) / np.abs(values.mean(1))).mean())


def site_auc(features: Float[np.ndarray, "scan feature"], sites: np.ndarray,
             participants: np.ndarray) -> dict[str, float]:
    """Area under the ROC curve with which standardised features tell each site from the others, by
    logistic regression, leaving one participant out in turn. 0.5: sites cannot be told."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import LeaveOneGroupOut, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    score = cross_val_predict(model, features, sites, groups=participants,
                              cv=LeaveOneGroupOut(), method="predict_proba")
    return {str(name): float(roc_auc_score(sites == name, score[:, i]))
            for i, name in enumerate(np.unique(sites))}


def slope(ages: Float[np.ndarray, " participant"], values: Float[np.ndarray, " participant"]
          ) -> float:
    """Of the least-squares line through values over ages, per year."""
    return float(np.polyfit(ages, values, 1)[0])


def contrast(values: Float[np.ndarray, " voxel"], lesion: Bool[np.ndarray, " voxel"],
             around: Bool[np.ndarray, " voxel"]) -> float:
    """Mean in the lesion relative to that of the tissue around it, minus 1."""
    return float(values[lesion].mean() / values[around].mean() - 1)


def compare_sites(table: pd.DataFrame, features: Sequence[str], reference: str | None = None
             ) -> Iterator[dict[str, Any]]:
    """Measure how far sites agree, and by how much each differs.

    Parameters
    ----------
    table
        A row for each run; those of one participant in one batch are averaged, and rows that lack
        a feature left out.
    features
        Columns of the table.
    reference
        The batch from which differences are taken; None for the mean of all batches' means.

    Yields
    ------
    dict
        statistic, of, batch, people, value, low and high (95 % interval, NaN where there is none).
        Of each feature, over people scanned in every batch: `icc_consistency`, `icc_agreement` and
        `cov`. `difference` of the batch: `paired_difference` over people scanned in both (without
        a reference: in every batch), `unpaired_difference` where those are fewer than three.
        `auc` of each batch from all features. Nothing is said of fewer than three people.
    """
    means = table.dropna(subset=[*features]).groupby(["participant", "batch"])[[*features]].mean()
    batches = sorted(means.index.unique("batch"))
    if len(batches) < 2:
        return
    for feature in features:
        wide = means[feature].unstack("batch")
        whole = wide.dropna().to_numpy()
        if len(whole) >= LEAST and np.ptp(whole) > 0:
            for name, value in (("icc_consistency", icc_consistency(whole)),
                                ("icc_agreement", icc_agreement(whole)),
                                ("cov", Estimate(variation(whole), math.nan, math.nan))):
                yield _row(name, feature, "", len(whole), value)
        yield from _differences(wide, feature, reference)
    people = means.index.get_level_values("participant").to_numpy()
    sites = means.index.get_level_values("batch").to_numpy()
    # without any one person, every batch must still be there to be learned
    if features and all(len(set(people[sites == b])) >= LEAST for b in batches):
        for name, auc in site_auc(means.to_numpy(), sites, people).items():
            yield _row("auc", "all features", name, len(set(people)),
                       Estimate(auc, math.nan, math.nan))


def _differences(wide: pd.DataFrame, feature: str, reference: str | None
                 ) -> Iterator[dict[str, Any]]:
    """Of each batch but the reference. wide: a row for each person, a column for each batch."""
    for batch in wide.columns:
        if batch == reference:
            continue
        concerned = wide if reference not in wide.columns else wide[[batch, reference]]
        weights = (concerned.columns == batch).astype(float)
        weights -= (1 / len(weights) if concerned is wide
                    else (concerned.columns == reference).astype(float))
        both = concerned.dropna().to_numpy()
        groups = [column.dropna().to_numpy() for _, column in concerned.items()]
        if len(both) >= LEAST:
            yield _row("paired_difference", feature, batch, len(both),
                       paired_difference(both, weights))
        elif min(map(len, groups)) >= LEAST:
            yield _row("unpaired_difference", feature, batch,
                       int(concerned.notna().any(axis=1).sum()),
                       unpaired_difference(groups, weights))


def _row(statistic: str, of: str, batch: str, people: int, found: Estimate) -> dict[str, Any]:
    return {"statistic": statistic, "of": of, "batch": batch or "n/a", "people": people,
            **found._asdict()}


def compare_tables(statistics: pd.DataFrame, features: Sequence[str],
                   tables: Mapping[str, pd.DataFrame], reference: str | None = None
                   ) -> pd.DataFrame:
    """Compare sites (`compare_sites`) in the measured and in the harmonized maps.

    Parameters
    ----------
    statistics
        A row for each run: participant, batch, the features, and `harmonized_…` of them, if any.
    features
        Columns of map statistics.
    tables
        Other tables of harmonized features, by name.
    reference
        The site from which differences are taken.

    Returns
    -------
    DataFrame
        The rows of `compare_sites` with a column `data`: `measured`, `harmonized`, or the name of
        a table. Where only some runs were harmonized, the measured maps of just those runs come,
        too.
    """
    after = quality.harmonized_columns(statistics, features)
    both = statistics.dropna(subset=[*after]) if after else statistics
    known = list(after.values()) or list(features)
    kinds = {"measured": (statistics, list(features)), **{
        k: (t, [f for f in features if f in t]) for k, t in tables.items()}}
    if after:
        if len(both) < len(statistics):
            kinds["measured, of the runs harmonized"] = both, known
        kinds["harmonized"] = both[["participant", "batch", *after]].rename(columns=after), known
    return pd.DataFrame([{"data": kind, **row} for kind, (table, names) in kinds.items()
                         for row in compare_sites(table, names, reference)],
                        columns=["data", "statistic", "of", "batch", "people", "value", "low",
                                 "high"])
