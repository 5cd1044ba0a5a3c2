"""Measures of harmonization: errors against a target, edges, agreement between sites.

Most are pure functions of arrays; `compare_sites` and `compare_tables` take tables. `estimate` is
the harmonized image, and `truth` its target: the scan at the reference site, with its noise or
without.
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
"""SD in voxels of the Gaussian window of SSIM (Wang et al. 2004)."""

K1, K2 = 0.01, 0.03
"""Constants of SSIM, as shares of the range (Wang et al. 2004)."""

MIN_PARTICIPANTS = 3
"""Minimum number of participants for a comparison of sites."""

MIN_ATTENUATION = 1e-3
"""Minimum S/S0: lower values are raised to it before the logarithm."""

CONFIDENCE = 0.95
"""Level of every confidence interval."""


class Estimate(NamedTuple):
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def mse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Compute the mean square error, the mean of (estimate − truth)²."""
    return float(np.square(estimate - truth, dtype=np.float64).mean())


def nmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Compute the normalised mean square error (Koppers et al. 2018, eq. 2):

    Σ (estimate − truth)² / Σ truth²
    """
    return mse(estimate, truth) / float(np.square(truth, dtype=np.float64).mean())


def shell_maps(attenuation: Float[np.ndarray, "voxel direction"], acquisition: Acquisition,
               device: str = "cpu") -> dict[str, np.ndarray]:
    """Fit the tensor to the S/S0 of one shell, and to S/S0 = 1 at b = 0.

    Parameters
    ----------
    attenuation
        (voxel, direction) S/S0 of the shell.
    acquisition
        Acquisition of the shell alone, without b0 volumes.
    device
        cpu, cuda or cuda:N.

    Returns
    -------
    dict
        fa (1), md (mm²/s), and direction, (voxel, 3) unit vectors.
    """
    x = np.concatenate([tensor.design(acquisition.btensors), tensor.design(np.zeros((1, 3, 3)))])
    values = np.ones((len(attenuation), len(x)), np.float32)
    values[:, :-1] = np.maximum(attenuation, MIN_ATTENUATION)

    def fit(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = tensor.fit(signal, x)
        return {k: maps[k] for k in ("fa", "md", "direction")}

    return map_voxels(fit, values, device)


def angle(one: Float[np.ndarray, "voxel 3"], other: Float[np.ndarray, "voxel 3"]
          ) -> Float[np.ndarray, " voxel"]:
    """Compute the angles in degrees between axes of unit length, whatever their signs."""
    return np.degrees(np.arccos(np.clip(np.abs((one * other).sum(1)), 0, 1)))


def ssim(estimate: Float[np.ndarray, "x y z"], truth: Float[np.ndarray, "x y z"],
         mask: Bool[np.ndarray, "x y z"]) -> float:
    """Compute the structural similarity of two volumes, averaged over a mask.

    It is that of Wang et al. 2004 (doi:10.1109/TIP.2003.819861, eq. 13) with a Gaussian window. The
    dynamic range L is that of the truth within the mask. Both volumes are set to 0 outside.
    """
    from scipy.ndimage import gaussian_filter

    a, b = (np.where(mask, v, 0).astype(np.float64) for v in (estimate, truth))
    c1, c2 = ((k * np.ptp(truth[mask])) ** 2 for k in (K1, K2))

    def mean(values: np.ndarray) -> np.ndarray:
        return gaussian_filter(values, WINDOW)

    ma, mb = mean(a), mean(b)
    va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
    local = ((2 * ma * mb + c1) * (2 * ab + c2)
             / ((ma**2 + mb**2 + c1) * (va + vb + c2)))
    return float(local[mask].mean())


def sharpness(estimate: Float[np.ndarray, "x y z"], truth: Float[np.ndarray, "x y z"],
              mask: Bool[np.ndarray, "x y z"]) -> float:
    """Compare the steepness of edges inside a mask, with gradients by central differences:

    Σ ∇estimate · ∇truth / Σ |∇truth|²

    It is 1 if edges are as steep as those of the truth, and less if they are blurred. Noise does
    not count, because it does not correlate with the edges of the truth.
    """
    from scipy.ndimage import binary_erosion

    inner = binary_erosion(mask)
    one, other = (np.stack(np.gradient(v.astype(np.float64)))[:, inner]
                  for v in (estimate, truth))
    return float((one * other).sum() / (other**2).sum())


def icc(values: Float[np.ndarray, "participant site"]) -> float:
    """Estimate ICC(3,1), consistency: the value of `icc_consistency` without its interval."""
    return icc_consistency(values).value


def icc_consistency(values: Float[np.ndarray, "participant site"]) -> Estimate:
    """Estimate ICC(3,1), consistency, from travelling participants.

    With MSR, MSC and MSE, the mean squares of n participants, of k sites and of the residual,

        ICC(3,1) = (MSR − MSE) / (MSR + (k − 1) MSE)

    (Shrout & Fleiss 1979, doi:10.1037/0033-2909.86.2.420). A shift of a site that is the same for
    all participants does not lower it. The interval is that of McGraw & Wong 1996
    (doi:10.1037/1082-989X.1.1.30), table 7, case C,1.
    """
    n, k, between, _, error = _mean_squares(values)
    if error == 0:
        return Estimate(1.0, 1.0, 1.0)
    ratio, free = between / error, ((n - 1), (n - 1) * (k - 1))
    low, high = ratio / _f_quantile(*free), ratio * _f_quantile(*free[::-1])
    return Estimate(*((f - 1) / (f + k - 1) for f in (ratio, low, high)))


def icc_agreement(values: Float[np.ndarray, "participant site"]) -> Estimate:
    """Estimate ICC(2,1), absolute agreement, from travelling participants.

    With the symbols of `icc_consistency`,

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
    """Compute n, k, and the mean squares of participants, of sites, and of the residual."""
    n, k = map(float, values.shape)
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between = k * ((rows - values.mean()) ** 2).sum() / (n - 1)
    sites = n * ((columns - values.mean()) ** 2).sum() / (k - 1)
    error = ((values - rows - columns + values.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    return n, k, float(between), float(sites), float(error)


def _f_quantile(one: float, other: float) -> float:
    """Compute the upper two-sided quantile of the F distribution."""
    from scipy.stats import f

    return float(f.ppf((1 + CONFIDENCE) / 2, one, other))


def paired_difference(values: Float[np.ndarray, "participant site"],
                      weights: Float[np.ndarray, " site"]) -> Estimate:
    """Estimate Σ_j w_j μ_j, with μ_j the mean of site j, from participants scanned at every site.

    It is the mean over participants of Σ_j w_j x_j, with x_j a participant's value at site j, and
    Student's t interval. For a difference, the weights add up to 0.
    """
    from scipy.stats import t

    sums = values @ weights
    half = t.ppf((1 + CONFIDENCE) / 2, len(sums) - 1) * sums.std(ddof=1) / math.sqrt(len(sums))
    return Estimate(float(sums.mean()), float(sums.mean() - half), float(sums.mean() + half))


def unpaired_difference(groups: Sequence[Float[np.ndarray, " _"]],
                        weights: Float[np.ndarray, " site"]) -> Estimate:
    """Estimate Σ_j w_j μ_j from different participants at every site, with unequal variances.

    The degrees of freedom are those of Welch 1947 (doi:10.1093/biomet/34.1-2.28). For two sites and
    w = (1, −1) the interval is Welch's interval of a difference.
    """
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
    """Compute the coefficient of variation between sites: SD (n − 1) over mean, averaged over
    participants. A shift of a site raises it."""
    return float((values.std(1, ddof=1) / np.abs(values.mean(1))).mean())


def site_auc(features: Float[np.ndarray, "scan feature"], sites: np.ndarray,
             participants: np.ndarray) -> dict[str, float]:
    """Measure how well a classifier separates each site from the others.

    The classifier is a logistic regression on standardised features, with one participant left out
    in turn.

    Parameters
    ----------
    features
        A row for each scan.
    sites, participants
        (scan,) labels. Each site needs two participants.

    Returns
    -------
    dict of str to float
        Area under the ROC curve by site; 0.5 if it cannot be separated.
    """
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
    """Compute the slope per year of the least-squares line of values over ages."""
    return float(np.polyfit(ages, values, 1)[0])


def contrast(values: Float[np.ndarray, " voxel"], lesion: Bool[np.ndarray, " voxel"],
             around: Bool[np.ndarray, " voxel"]) -> float:
    """Compute the contrast of a lesion: its mean over that of the surrounding tissue, minus 1."""
    return float(values[lesion].mean() / values[around].mean() - 1)


def compare_sites(table: pd.DataFrame, features: Sequence[str], reference: str | None = None
             ) -> Iterator[dict[str, Any]]:
    """Measure the agreement between sites and the difference of each site.

    Parameters
    ----------
    table
        A row for each run. Runs of one participant at one site are averaged. Rows that lack a
        feature are left out.
    features
        Columns of the table.
    reference
        The site from which differences are taken. If it is None or not in the table, differences
        are from the mean of the means of all sites, that of the site itself included.

    Yields
    ------
    dict
        statistic, of (the feature), batch, people (number of participants), value, low and high
        (95 % interval, NaN if there is none).

        For each feature, over participants scanned at every site: `icc_consistency`,
        `icc_agreement` and `cov` (`variation`). For each feature and site: `paired_difference`,
        over participants scanned at the site and at the reference (without a reference: at every
        site), or `unpaired_difference` if those are fewer than MIN_PARTICIPANTS. For each site:
        `auc` from all features. A statistic of fewer than MIN_PARTICIPANTS is left out; an
        unpaired difference and `auc` need as many at each site.
    """
    means = table.dropna(subset=[*features]).groupby(["participant", "batch"])[[*features]].mean()
    batches = sorted(means.index.unique("batch"))
    if len(batches) < 2:
        return
    for feature in features:
        wide = means[feature].unstack("batch")
        complete = wide.dropna().to_numpy()
        if len(complete) >= MIN_PARTICIPANTS and np.ptp(complete) > 0:
            for name, value in (("icc_consistency", icc_consistency(complete)),
                                ("icc_agreement", icc_agreement(complete)),
                                ("cov", Estimate(variation(complete), math.nan, math.nan))):
                yield _row(name, feature, "", len(complete), value)
        yield from _differences(wide, feature, reference)
    people = means.index.get_level_values("participant").to_numpy()
    sites = means.index.get_level_values("batch").to_numpy()
    # after one participant is left out, every site must still have some
    if features and all(len(set(people[sites == b])) >= MIN_PARTICIPANTS for b in batches):
        for name, auc in site_auc(means.to_numpy(), sites, people).items():
            yield _row("auc", "all features", name, len(set(people)),
                       Estimate(auc, math.nan, math.nan))


def _differences(wide: pd.DataFrame, feature: str, reference: str | None
                 ) -> Iterator[dict[str, Any]]:
    """Estimate the difference of each site, given a row per participant and a column per site."""
    has_reference = reference in wide.columns
    for batch in wide.columns:
        if batch == reference:
            continue
        compared = wide[[batch, reference]] if has_reference else wide
        weights = (compared.columns == batch).astype(float)
        weights -= ((compared.columns == reference).astype(float) if has_reference
                    else 1 / len(weights))
        paired = compared.dropna().to_numpy()
        groups = [column.dropna().to_numpy() for _, column in compared.items()]
        if len(paired) >= MIN_PARTICIPANTS:
            yield _row("paired_difference", feature, batch, len(paired),
                       paired_difference(paired, weights))
        elif min(map(len, groups)) >= MIN_PARTICIPANTS:
            yield _row("unpaired_difference", feature, batch,
                       int(compared.notna().any(axis=1).sum()),
                       unpaired_difference(groups, weights))


def _row(statistic: str, feature: str, batch: str, people: int, estimate: Estimate
         ) -> dict[str, Any]:
    return {"statistic": statistic, "of": feature, "batch": batch or "n/a", "people": people,
            **estimate._asdict()}


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
        As for `compare_sites`.

    Returns
    -------
    DataFrame
        The rows of `compare_sites` with a column `data`: `measured`, `harmonized`, or the name of
        a table. If only some runs were harmonized, the measured maps of these runs alone follow,
        too.
    """
    after = quality.harmonized_columns(statistics, features)
    both = statistics.dropna(subset=[*after]) if after else statistics
    compared = list(after.values()) or list(features)
    data = {"measured": (statistics, list(features)), **{
        k: (t, [f for f in features if f in t]) for k, t in tables.items()}}
    if after:
        if len(both) < len(statistics):
            data["measured, of the runs harmonized"] = both, compared
        data["harmonized"] = both[["participant", "batch", *after]].rename(columns=after), compared
    return pd.DataFrame([{"data": name, **row} for name, (table, names) in data.items()
                         for row in compare_sites(table, names, reference)],
                        columns=["data", "statistic", "of", "batch", "people", "value", "low",
                                 "high"])
