"""What harmonization leaves of differences between people, and of contrast within a brain.

An effect is the slope of a tissue's mean FA or MD over age, the difference of its mean between the
sexes, or local contrast. With b the effect in the measured maps and a that in the harmonized maps
of the same people, a / b should be 1. Its 95 % interval is Fieller's (1954, doi:10.1111/
j.2517-6161.1954.tb00159.x), all θ with

    (a − θ b)² ≤ t² c (s_aa − 2 θ s_ab + θ² s_bb),

where s is the covariance of the residuals of the two fits, on the same people, and c s_bb the
variance of b. It has no ends where b itself may be 0: then nothing can be said.

Local contrast of a map x against r, the map of the same person's scan in the reference batch, is

    Σ (x_i − x_j)(r_i − r_j) / Σ (r_i − r_j)²

over neighbouring voxels i, j of one tissue. The noise of x has no part in r, so it adds nothing to
the sum and its removal takes nothing away, but what blurs the steps that both scans show does.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float, Int, Integer

from bidsapp.evaluate import quality
from bidsapp.evaluate.agreement import CONFIDENCE

LOSS = 0.1
"""Share of an effect that may be lost, or added to it, without a warning."""

MAPS = {"fa": "FA", "md": "MD"}
EFFECTS = {"age": "slope over age", "sex": "difference between the sexes",
           "contrast": "local contrast"}
TISSUES = {"wm": "white matter", "gm": "grey matter"}
KEPT, LOST, GROWN = "not lost", "lost", "exaggerated"
REFERENCE, OPEN = "as at the reference", "cannot be told"
"""Verdicts."""

CHANGES = {LOST: "lost of", GROWN: "added to"}
"""Verdicts that warn, as words of a sentence."""

CONTRAST_OF_REFERENCE = 1.0
"""Local contrast of the reference scan against itself."""

COLUMNS = ["effect", "people", "before", "after", "reference", "ratio", "low", "high", "verdict"]


class Ratio(NamedTuple):
    """An effect before and after, after / before, and the ends of its 95 % interval; NaN where it
    has none."""

    before: float
    after: float
    ratio: float
    low: float
    high: float


def ratio_of_effects(before: Float[np.ndarray, " participant"],
                     after: Float[np.ndarray, " participant"],
                     covariate: Float[np.ndarray, " participant"] | None = None) -> Ratio:
    """Compare the slopes over a covariate, or without one the means, of two values of each person.

    Parameters
    ----------
    before, after
        Of the same people, in one order; more people than coefficients (2, or 1 without covariate).
    covariate
        Not the same for all.
    """
    from scipy.stats import t

    design = np.ones((len(before), 1))
    if covariate is not None:
        design = np.column_stack([design, covariate - covariate.mean()])
    values = np.column_stack([before, after])
    coefficients = np.linalg.lstsq(design, values, rcond=None)[0]
    residual = values - design @ coefficients
    free = len(before) - design.shape[1]
    spread = (residual.T @ residual / free / (design[:, -1] ** 2).sum()
              * t.ppf((1 + CONFIDENCE) / 2, free) ** 2)
    b, a = coefficients[-1]
    # the parabola in θ, which is below 0 between the ends where it opens upwards
    outer, middle, inner = b * b - spread[0, 0], a * b - spread[0, 1], a * a - spread[1, 1]
    low = high = math.nan
    if outer > 0:
        half = math.sqrt(max(middle**2 - outer * inner, 0.0))
        low, high = (middle - half) / outer, (middle + half) / outer
    return Ratio(float(b), float(a), float(a / b) if b else math.nan, float(low), float(high))


def neighbours(inside: Bool[np.ndarray, "x y z"], labels: Integer[np.ndarray, "x y z"]
               ) -> Int[np.ndarray, "2 pair"]:
    """Find the pairs of voxels that share a face and a label above 0, as rows among the voxels
    inside."""
    row = np.full(inside.shape, -1)
    row[inside] = np.arange(inside.sum())
    found = []
    for axis in range(inside.ndim):
        (first, second), (one, other) = (
            (v[:-1], v[1:]) for v in (np.moveaxis(row, axis, 0), np.moveaxis(labels, axis, 0)))
        same = (first >= 0) & (second >= 0) & (one == other) & (one > 0)
        found.append(np.stack([first[same], second[same]]))
    return np.concatenate(found, axis=1)


def verdict(found: Ratio, reference: float = math.nan) -> str:
    """Judge what became of an effect.

    `lost`: the ratio lies below 1 − LOSS, and its interval below 1. `exaggerated`: the ratio lies
    above 1 + LOSS, and its interval above 1. Instead of either `as at the reference` where the
    effect in the same people's scans of the reference batch is no more than LOSS beyond: then it
    was corrected. `not lost`: the interval lies above 1 − LOSS. Else `cannot be told`.
    """
    if not math.isfinite(found.low):
        return OPEN
    same_sign = math.isfinite(reference) and reference * found.after > 0
    if found.ratio < 1 - LOSS and found.high < 1:
        corrected = same_sign and abs(found.after) >= (1 - LOSS) * abs(reference)
        return REFERENCE if corrected else LOST
    if found.ratio > 1 + LOSS and found.low > 1:
        corrected = same_sign and abs(found.after) <= (1 + LOSS) * abs(reference)
        return REFERENCE if corrected else GROWN
    return KEPT if found.low >= 1 - LOSS else OPEN


def judge_folds(table: pd.DataFrame, statistics: pd.DataFrame) -> pd.DataFrame:
    """Judge what a cross-validation left of FA and MD of people not learned from.

    Parameters
    ----------
    table
        As `crossvalidation.fit` makes it: of every batch, participant, shell, tissue and measure
        the means and contrasts before and after.
    statistics
        Columns participant, batch, and age and sex where they are known.

    Returns
    -------
    DataFrame
        batch, shell, tissue, measure and COLUMNS.
    """
    rows = []
    for key, own in table[table["measure"].isin([*MAPS])].groupby(
            ["batch", "shell", "tissue", "measure"], sort=False):
        people = own.set_index("participant")
        values = people.assign(before=people["mean_before"], after=people["mean_after"],
                               reference=people["mean_before"] - people["bias_before"])
        known = dict(zip(["batch", "shell", "tissue", "measure"], map(str, key), strict=True))
        rows += [{**known, **row} for row in _of_covariates(
            values, _covariates(statistics, known["batch"]))]
        sharp = people[["contrast_before", "contrast_after"]].dropna().to_numpy()
        if len(sharp) > 1:
            rows.append({**known, **_row("contrast", len(sharp), ratio_of_effects(*sharp.T),
                                         CONTRAST_OF_REFERENCE)})
    return pd.DataFrame(rows, columns=["batch", "shell", "tissue", "measure", *COLUMNS])


def judge_in_sample(statistics: pd.DataFrame, features: Sequence[str],
              tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge what harmonization left of FA and MD over the brain mask, of people from whom may have
    been learned.

    Parameters
    ----------
    statistics
        A row for each run: participant, batch, age and sex where they are known, features, and
        those of the harmonized images, if any.
    tables
        Other tables of harmonized features, by name: participant, batch, features.

    Returns
    -------
    DataFrame
        data, batch, measure (the feature) and COLUMNS, of the batches that were changed.
    """
    after = quality.harmonized_columns(statistics, features)
    both = statistics.dropna(subset=[*after])  # a person's runs that were not harmonized stay out
    kinds = {"harmonized": (both, both[["participant", "batch", *after]].rename(columns=after)),
             **{name: (statistics, table) for name, table in tables.items()}}
    rows = []
    for (kind, (measured, table)), feature in (
            (k, f) for k in kinds.items() for f in features
            if f in k[1][1] and f.endswith(("_fa_mean", "_md_mean"))):
        for batch in sorted(statistics["batch"].unique()):
            values = pd.DataFrame({when: t[t["batch"] == batch].groupby("participant")[
                feature].mean() for when, t in (("before", measured), ("after", table))}).dropna()
            if np.allclose(values["before"], values["after"], rtol=1e-9, atol=0):
                continue
            rows += [{"data": kind, "batch": batch, "measure": feature, **row}
                     for row in _of_covariates(values, _covariates(statistics, batch))]
    return pd.DataFrame(rows, columns=["data", "batch", "measure", *COLUMNS])


def name_effects(found: pd.DataFrame, kind: str) -> list[str]:
    """Name the effects of one verdict, each with its ratio, for a sentence."""
    return [f"{describe(row)} ({format_ratio(row)})"
            for row in found[found["verdict"] == kind].to_dict("records")]


def describe(row: Mapping[Any, Any]) -> str:
    """`slope over age of MD in white matter, b1000, siteB`."""
    return f"{EFFECTS[row['effect']]} of {place(row)}"


def place(row: Mapping[Any, Any]) -> str:
    """`MD in white matter, b1000, siteB`, or `dti_md in the brain, siteB, combat` of a table."""
    measure = MAPS.get(row["measure"], row["measure"].removesuffix("_mean"))
    inside = f"{TISSUES[row['tissue']]}, {row['shell']}" if "tissue" in row else "the brain"
    return ", ".join([f"{measure} in {inside}", row["batch"], *([row["data"]] if "data" in row
                                                                else [])])


def format_ratio(row: Mapping[Any, Any]) -> str:
    """`ratio 0.71, 95 % interval 0.60–0.82`, of harmonized to measured."""
    if row["ratio"] != row["ratio"]:
        return "no ratio"
    interval = (f"95 % interval {row['low']:.2f} to {row['high']:.2f}"
                if row["low"] == row["low"] else "95 % interval without ends")
    return f"ratio {row['ratio']:.3g}, {interval}"


def _of_covariates(values: pd.DataFrame, covariates: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Rows of COLUMNS. values: before, after and maybe reference, by participant."""
    for name, covariate in covariates.items():
        own = values.join(covariate.rename("covariate"), how="inner").dropna()
        x = own["covariate"].to_numpy(float)
        if len(own) < 3 or np.ptp(x) == 0:
            continue
        found = ratio_of_effects(own["before"].to_numpy(float), own["after"].to_numpy(float), x)
        reference = (float(np.polyfit(x, own["reference"].to_numpy(float), 1)[0])
                     if "reference" in own else math.nan)
        yield _row(str(name), len(own), found, reference)


def _row(effect: str, people: int, found: Ratio, reference: float = math.nan) -> dict[str, Any]:
    return {"effect": effect, "people": people, **found._asdict(), "reference": reference,
            "verdict": verdict(found, reference)}


def _covariates(statistics: pd.DataFrame, batch: str) -> pd.DataFrame:
    """Age, and sex as 0 and 1 where there are two, of the people of a batch, by participant."""
    people = statistics[statistics["batch"] == batch].groupby("participant")
    found = pd.DataFrame(index=list(people.groups))
    if "age" in statistics:
        found["age"] = pd.to_numeric(people["age"].first(), errors="coerce")
    if "sex" in statistics:
        sex = people["sex"].first()
        codes = sex.astype("category").cat
        if len(codes.categories) == 2:
            found["sex"] = codes.codes.where(sex.notna())
    return found
