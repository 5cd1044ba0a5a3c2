"""Preservation of biological effects by harmonization.

An effect is the slope of a tissue's mean FA or MD over age, the difference of its mean between the
sexes, or local contrast. With b the effect in the measured maps and a the effect in the harmonized
maps of the same participants, a / b should be 1. Its 95 % interval is that of Fieller (1954,
doi:10.1111/j.2517-6161.1954.tb00159.x), all θ with

    (a − θ b)² ≤ t² c (s_aa − 2 θ s_ab + θ² s_bb),

where s is the covariance of the residuals of the two fits, on the same participants, and c s_bb the
variance of b (c depends on the design alone). If the 95 % interval of b contains 0, the interval of
the ratio is unbounded, and nothing can be said about the effect.

Local contrast of a map x against r, the map of the same participant's scan at the reference site,
is

    Σ (x_i − x_j)(r_i − r_j) / Σ (r_i − r_j)²

over neighbouring voxels i, j of one tissue. The noise of x is independent of r, so that neither
noise nor its removal changes the expected sum. Blurring of the differences that both scans show
lowers it.
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
"""Names of the maps in text, by their keys."""

EFFECTS = {"age": "slope over age", "sex": "difference between the sexes",
           "contrast": "local contrast"}
"""Names of the effects in text, by their keys."""

TISSUES = {"wm": "white matter", "gm": "grey matter"}
"""Names of the tissues in text, by their keys."""

KEPT, LOST, GROWN = "not lost", "lost", "exaggerated"
REFERENCE, OPEN = "as at the reference", "cannot be told"
"""Results of `verdict`."""

CHANGES = {LOST: "lost from", GROWN: "added to"}
"""Verdicts that give a warning, and their words: "more than 10 % was … effects"."""

CONTRAST_OF_REFERENCE = 1.0
"""Local contrast of the reference scan against itself."""

COLUMNS = ["effect", "people", "before", "after", "reference", "ratio", "low", "high", "verdict"]
"""Columns of the tables of effects."""


class Ratio(NamedTuple):
    """An effect before and after harmonization, the ratio after / before, and the ends of its 95 %
    interval; NaN if it is unbounded."""

    before: float
    after: float
    ratio: float
    low: float
    high: float


def ratio_of_effects(before: Float[np.ndarray, " participant"],
                     after: Float[np.ndarray, " participant"],
                     covariate: Float[np.ndarray, " participant"] | None = None) -> Ratio:
    """Compute an effect before and after harmonization, and Fieller's interval of the ratio.

    The effect is the slope of the values over the covariate or, without one, their mean.

    Parameters
    ----------
    before, after
        Values of the same participants in the same order. There are more participants than
        coefficients (2, or 1 without covariate).
    covariate
        Must differ between participants.

    Returns
    -------
    Ratio
        The ratio is NaN if the effect before is 0.
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
    # outer θ² − 2 middle θ + inner ≤ 0: an interval if the parabola opens upwards
    outer, middle, inner = b * b - spread[0, 0], a * b - spread[0, 1], a * a - spread[1, 1]
    low = high = math.nan
    if outer > 0:
        half = math.sqrt(max(middle**2 - outer * inner, 0.0))
        low, high = (middle - half) / outer, (middle + half) / outer
    return Ratio(float(b), float(a), float(a / b) if b else math.nan, float(low), float(high))


def neighbours(inside: Bool[np.ndarray, "x y z"], labels: Integer[np.ndarray, "x y z"]
               ) -> Int[np.ndarray, "2 pair"]:
    """Find the pairs of voxels that share a face and a label above 0.

    Parameters
    ----------
    inside
        Mask of the voxels.
    labels
        Tissue labels.

    Returns
    -------
    (2, pair) int
        Rows of both voxels of each pair among the voxels of the mask.
    """
    row = np.full(inside.shape, -1)
    row[inside] = np.arange(inside.sum())
    pairs = []
    for axis in range(inside.ndim):
        (first, second), (label, next_label) = (
            (v[:-1], v[1:]) for v in (np.moveaxis(row, axis, 0), np.moveaxis(labels, axis, 0)))
        same = (first >= 0) & (second >= 0) & (label == next_label) & (label > 0)
        pairs.append(np.stack([first[same], second[same]]))
    return np.concatenate(pairs, axis=1)


def verdict(ratio: Ratio, reference: float = math.nan) -> str:
    """Judge how harmonization changed an effect.

    Parameters
    ----------
    ratio
        The effect before and after.
    reference
        The effect in the same participants' scans at the reference site; NaN if unknown.

    Returns
    -------
    str
        `lost`: the ratio lies below 1 − LOSS, and its interval below 1. `exaggerated`: the ratio
        lies above 1 + LOSS, and its interval above 1. `as at the reference` replaces either of them
        if the change corrected the effect: it has the sign of the effect at the reference, and fell
        to no less than 1 − LOSS, or rose to no more than 1 + LOSS, times that effect. `not lost`:
        the interval lies above 1 − LOSS. `cannot be told`: none of these, or no bounded interval.
    """
    if not math.isfinite(ratio.low):
        return OPEN
    same_sign = math.isfinite(reference) and reference * ratio.after > 0
    if ratio.ratio < 1 - LOSS and ratio.high < 1:
        corrected = same_sign and abs(ratio.after) >= (1 - LOSS) * abs(reference)
        return REFERENCE if corrected else LOST
    if ratio.ratio > 1 + LOSS and ratio.low > 1:
        corrected = same_sign and abs(ratio.after) <= (1 + LOSS) * abs(reference)
        return REFERENCE if corrected else GROWN
    return KEPT if ratio.low >= 1 - LOSS else OPEN


def judge_folds(table: pd.DataFrame, statistics: pd.DataFrame) -> pd.DataFrame:
    """Judge how effects in FA and MD survive in a cross-validation, in participants held out of
    the training.

    Parameters
    ----------
    table
        The table of `crossvalidation.fit`: means and contrasts before and after, for every batch,
        participant, shell, tissue and measure.
    statistics
        Columns participant, batch, and age and sex if they are known.

    Returns
    -------
    DataFrame
        batch, shell, tissue, measure and COLUMNS. An effect of a covariate needs three
        participants, local contrast two.
    """
    rows = []
    for key, group in table[table["measure"].isin([*MAPS])].groupby(
            ["batch", "shell", "tissue", "measure"], sort=False):
        people = group.set_index("participant")
        values = people.assign(before=people["mean_before"], after=people["mean_after"],
                               reference=people["mean_before"] - people["bias_before"])
        labels = dict(zip(["batch", "shell", "tissue", "measure"], map(str, key), strict=True))
        rows += [{**labels, **row} for row in _judge_covariates(
            values, _covariates(statistics, labels["batch"]))]
        contrasts = people[["contrast_before", "contrast_after"]].dropna().to_numpy()
        if len(contrasts) > 1:
            rows.append({**labels, **_row("contrast", len(contrasts),
                                          ratio_of_effects(*contrasts.T),
                                          CONTRAST_OF_REFERENCE)})
    return pd.DataFrame(rows, columns=["batch", "shell", "tissue", "measure", *COLUMNS])


def judge_in_sample(statistics: pd.DataFrame, features: Sequence[str],
              tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Judge how the effects of covariates in mean FA and MD over the brain mask survive.

    Some of the participants may be those of the training.

    Parameters
    ----------
    statistics
        A row for each run: participant, batch, age and sex if they are known, features, and those
        of the harmonized images, if any.
    features
        Columns of map statistics.
    tables
        Other tables of harmonized features, by name: participant, batch, features.

    Returns
    -------
    DataFrame
        data (`harmonized` or the name of a table), batch, measure (the feature) and COLUMNS, for
        the sites and features that harmonization changed.
    """
    after = quality.harmonized_columns(statistics, features)
    both = statistics.dropna(subset=[*after])  # runs that were not harmonized are left out
    data = {"harmonized": (both, both[["participant", "batch", *after]].rename(columns=after)),
            **{name: (statistics, table) for name, table in tables.items()}}
    rows = []
    for (name, (measured, table)), feature in (
            (d, f) for d in data.items() for f in features
            if f in d[1][1] and f.endswith(("_fa_mean", "_md_mean"))):
        for batch in sorted(statistics["batch"].unique()):
            values = pd.DataFrame({when: t[t["batch"] == batch].groupby("participant")[
                feature].mean() for when, t in (("before", measured), ("after", table))}).dropna()
            if np.allclose(values["before"], values["after"], rtol=1e-9, atol=0):
                continue
            rows += [{"data": name, "batch": batch, "measure": feature, **row}
                     for row in _judge_covariates(values, _covariates(statistics, batch))]
    return pd.DataFrame(rows, columns=["data", "batch", "measure", *COLUMNS])


def name_effects(effects: pd.DataFrame, verdict: str) -> list[str]:
    """Name the effects with one verdict, each with its ratio, for a sentence.

    Parameters
    ----------
    effects
        Table of `judge_folds` or `judge_in_sample`.
    verdict
        One of the verdicts.
    """
    return [f"{describe(row)} ({format_ratio(row)})"
            for row in effects[effects["verdict"] == verdict].to_dict("records")]


def describe(row: Mapping[Any, Any]) -> str:
    """Describe an effect: `slope over age of MD in white matter, b1000, siteB`."""
    return f"{EFFECTS[row['effect']]} of {place(row)}"


def place(row: Mapping[Any, Any]) -> str:
    """Describe a measure and its place: `MD in white matter, b1000, siteB`, or `dti_md in the
    brain, siteB, combat` for a table of `judge_in_sample`."""
    measure = MAPS.get(row["measure"], row["measure"].removesuffix("_mean"))
    inside = f"{TISSUES[row['tissue']]}, {row['shell']}" if "tissue" in row else "the brain"
    return ", ".join([f"{measure} in {inside}", row["batch"], *([row["data"]] if "data" in row
                                                                else [])])


def format_ratio(row: Mapping[Any, Any]) -> str:
    """Format the ratio of an effect: `ratio 0.71, 95 % interval 0.60 to 0.82`."""
    if row["ratio"] != row["ratio"]:
        return "no ratio"
    interval = (f"95 % interval {row['low']:.2f} to {row['high']:.2f}"
                if row["low"] == row["low"] else "95 % interval without ends")
    return f"ratio {row['ratio']:.3g}, {interval}"


def _judge_covariates(values: pd.DataFrame, covariates: pd.DataFrame) -> Iterator[dict[str, Any]]:
    """Yield a row of COLUMNS for each covariate, given the columns before, after and possibly
    reference by participant."""
    for name, covariate in covariates.items():
        table = values.join(covariate.rename("covariate"), how="inner").dropna()
        x = table["covariate"].to_numpy(float)
        if len(table) < 3 or np.ptp(x) == 0:
            continue
        ratio = ratio_of_effects(table["before"].to_numpy(float), table["after"].to_numpy(float),
                                 x)
        reference = (float(np.polyfit(x, table["reference"].to_numpy(float), 1)[0])
                     if "reference" in table else math.nan)
        yield _row(str(name), len(table), ratio, reference)


def _row(effect: str, people: int, ratio: Ratio, reference: float = math.nan) -> dict[str, Any]:
    return {"effect": effect, "people": people, **ratio._asdict(), "reference": reference,
            "verdict": verdict(ratio, reference)}


def _covariates(statistics: pd.DataFrame, batch: str) -> pd.DataFrame:
    """Collect the age of a site's participants, and their sex as 0 and 1 if there are two."""
    people = statistics[statistics["batch"] == batch].groupby("participant")
    covariates = pd.DataFrame(index=list(people.groups))
    if "age" in statistics:
        covariates["age"] = pd.to_numeric(people["age"].first(), errors="coerce")
    if "sex" in statistics:
        sex = people["sex"].first()
        codes = sex.astype("category").cat
        if len(codes.categories) == 2:
            covariates["sex"] = codes.codes.where(sex.notna())
    return covariates
