"""How well harmonization did: against a target, between sites, and for what is biology.

Pure functions of arrays. `found` is what was harmonized, `truth` what it should be: the scan of the
reference site, with its noise or without.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

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
    """ICC(3,1) of travelling participants: (MSR − MSE) / (MSR + (k − 1) MSE), with the mean squares
    of participants and of the residual after participants and k sites (Shrout & Fleiss 1979,
    doi:10.1037/0033-2909.86.2.420). A shift that is the same for everybody does not lower it."""
    n, k = values.shape
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    between = k * ((rows - values.mean()) ** 2).sum() / (n - 1)
    error = ((values - rows - columns + values.mean()) ** 2).sum() / ((n - 1) * (k - 1))
    return float((between - error) / (between + (k - 1) * error))


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


def of_sites(table: pd.DataFrame, features: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Rows of statistic, of, people, value: `icc` and `variation` of each feature over the people
    who were scanned in every batch, and `site_auc` of each batch from all features.

    table: a row for each run; those of one participant in one batch are averaged, and rows that
    lack a feature left out. Nothing is said of fewer than three people.
    """
    means = table.dropna(subset=[*features]).groupby(["participant", "batch"])[[*features]].mean()
    batches = sorted(means.index.unique("batch"))
    if len(batches) < 2:
        return
    for feature in features:
        wide = means[feature].unstack("batch").dropna()
        if len(wide) >= LEAST and np.ptp(wide.to_numpy()) > 0:
            yield {"statistic": "icc", "of": feature, "people": len(wide),
                   "value": icc(wide.to_numpy())}
            yield {"statistic": "cov", "of": feature, "people": len(wide),
                   "value": variation(wide.to_numpy())}
    people = means.index.get_level_values("participant").to_numpy()
    sites = means.index.get_level_values("batch").to_numpy()
    # without any one person, every batch must still be there to be learned
    if features and all(len(set(people[sites == b])) >= LEAST for b in batches):
        yield from ({"statistic": "auc", "of": name, "people": len(set(people)), "value": value}
                    for name, value in site_auc(means.to_numpy(), sites, people).items())


def of_group(statistics: pd.DataFrame, features: Sequence[str],
             tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """`of_sites` with a column `data`: measured; harmonized, of the runs that have maps of both,
    beside which `measured` is of the same runs; and every other table by its name."""
    after = quality.harmonized(statistics, features)
    both = statistics.dropna(subset=[*after]) if after else statistics
    known = list(after.values()) or list(features)
    kinds = {"measured": (both, known), **{k: (t, [f for f in features if f in t])
                                           for k, t in tables.items()}}
    if after:
        kinds["harmonized"] = both[["participant", "batch", *after]].rename(columns=after), known
    return pd.DataFrame([{"data": kind, **row} for kind, (table, names) in kinds.items()
                         for row in of_sites(table, names)],
                        columns=["data", "statistic", "of", "people", "value"])
