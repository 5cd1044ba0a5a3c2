"""Figures of map statistics by site, before and after harmonization."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes

from bidsapp.evaluate import quality
from bidsapp.kinds import Cohort, Fitted
from bidsapp.report.canvas import PALETTE, STYLE, WIDTH, figure, scaled_unit, svg
from bidsapp.report.figures import Figure, units_of


def of_group(cohort: Cohort, fitted: Mapping[str, Fitted]) -> list[Figure]:
    """Draw map statistics by site: as measured, of harmonized images, and of harmonized tables.

    Parameters
    ----------
    cohort : Cohort
        All runs, with their map statistics.
    fitted : mapping of str to Fitted
        Results of the trained methods, by name. Tables with `batch` and map statistics hold
        harmonized statistics, and are drawn.
    """
    features = list(cohort.features)
    if not features:
        return []
    units = {f: units_of(d) for f, d in quality.describe_columns(features).items()}
    runs = len(cohort.statistics)
    with mpl.rc_context(STYLE):
        drawn = [Figure(
            "dwimap", {"desc": "distributions"},
            _distributions([("as measured", cohort.statistics)], features, units),
            "Map statistics by site",
            f"Mean of each map over the brain mask; a point per run ({runs} in all), a line from "
            "the lower to the upper quartile and a bar at the median of each site.",
            "Distributions")]
        if pairs := quality.harmonized_columns(cohort.statistics, features):
            after = cohort.statistics[["batch", *pairs]].rename(columns=pairs)
            drawn.append(Figure(
                "dwimap", {"desc": "harmonized"},
                _distributions([("before", cohort.statistics), ("after", after)],
                               list(pairs.values()), units),
                "Before and after harmonization of the images",
                "Maps of the measured signal (open circles) and of the harmonized one (filled "
                "circles) of every run that was processed with --harmonize.",
                "Harmonization"))
        for method, result in fitted.items():
            for name, table in result.tables.items():
                shared = [f for f in features if f in table.columns]
                if not shared or "batch" not in table.columns:
                    continue
                label = name.removeprefix("desc-").split("_")[0]
                drawn.append(Figure(
                    "dwimap", {"desc": label},
                    _distributions([("before", cohort.statistics), ("after", table)], shared,
                                   units),
                    f"Before and after {label}",
                    f"{method}: the statistics of every run before (open circles), and after "
                    "(filled circles; runs of one participant in one site are averaged first).",
                    "Harmonization"))
    return drawn


def _distributions(tables: Sequence[tuple[str, Any]], features: Sequence[str],
                   units: Mapping[str, str]) -> bytes:
    """Draw a panel per feature and a row per site: points of the last table filled, others open."""
    batches = sorted({str(b) for _, table in tables for b in table["batch"]})
    columns = min(2, len(features))
    rows = -(-len(features) // columns)
    tall = 0.75 + max(0.45, 0.22 + 0.16 * len(tables)) * len(batches)
    drawn = figure(tall * rows)
    axes = drawn.subplots(rows, columns, squeeze=False).ravel()
    printable = ["".join(c if c.isprintable() else "�" for c in b) for b in batches]
    labels = [b if len(b) <= 24 else f"{b[:23]}…" for b in printable]
    for ax, feature in zip(axes, features, strict=False):
        every = np.concatenate([t[feature].to_numpy(float) for _, t in tables])
        finite = every[np.isfinite(every)]
        scale, unit = scaled_unit(float(np.abs(finite).max(initial=0)), units[feature])
        for t, (_, table) in enumerate(tables):
            offset = (t - (len(tables) - 1) / 2) * 0.36
            for k, batch in enumerate(batches):
                values = table.loc[table["batch"].astype(str) == batch, feature].to_numpy(float)
                _points(ax, scale * values[np.isfinite(values)], k + offset,
                        PALETTE[k % len(PALETTE)], filled=t == len(tables) - 1)
        ax.set_yticks(range(len(batches)), labels)
        ax.set_ylim(len(batches) - 0.45, -0.55)
        ax.set_title(feature.removesuffix("_mean"), loc="left")
        ax.set_xlabel(unit)
        ax.locator_params(axis="x", nbins=5)
    for ax in axes[len(features):]:
        ax.set_axis_off()
    room = 0.35 + 0.075 * max(map(len, labels))  # inches, for the names of sites
    wide = (WIDTH - 0.2 - columns * room) / columns
    drawn.subplots_adjust(room / WIDTH, 0.45 / (tall * rows), 1 - 0.2 / WIDTH,
                          1 - 0.3 / (tall * rows), wspace=room / wide,
                          hspace=0.75 / (tall - 0.75))
    return svg(drawn)


def _points(ax: Axes, values: np.ndarray, y: float, colour: str, *, filled: bool) -> None:
    """Draw values along x at height y, with their quartiles and median."""
    if not len(values):
        return
    jitter = 0.09 * np.sin(7.3 * np.arange(len(values)))
    ax.scatter(values, y + jitter, s=14, edgecolors=colour, linewidths=0.8, zorder=2, alpha=0.8,
               facecolors=colour if filled else "none")
    q1, median, q3 = np.percentile(values, (25, 50, 75))
    ax.plot((q1, q3), (y, y), color="#333333", linewidth=1, zorder=3)
    ax.plot(median, y, "|", color="black", markersize=12, markeredgewidth=2, zorder=3)
