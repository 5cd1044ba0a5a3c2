"""Figures of predicted volumes: beside measured ones, and in the round trip."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from bidsapp.acquisition import SAME_SHAPE, SHELL_GAP, Acquisition, describe_shape
from bidsapp.dwi import Dwi
from bidsapp.report.canvas import (
    PALETTE,
    STYLE,
    Canvas,
    Strip,
    coloured,
    draw_strips,
    figure,
    one_row_views,
    svg,
)
from bidsapp.report.figures import Figure

SECTION = "Upsampling"


def of_directions(acquisition: Acquisition, target: Acquisition) -> Figure:
    """Draw the measured and the predicted directions of each shell on the sphere.

    Parameters
    ----------
    acquisition, target : Acquisition
        The given and the predicted measurements.
    """
    near = [np.abs(target.bvals - s.b) <= SHELL_GAP * s.b for s in acquisition.shells]
    near = [rows & (np.abs(target.b_delta - s.b_delta) <= SAME_SHAPE)
            for rows, s in zip(near, acquisition.shells, strict=True)]
    parts = [(s.b, s.b_delta, acquisition.bvecs[s.indices], target.bvecs[rows])
             for s, rows in zip(acquisition.shells, near, strict=True) if rows.any()]
    if (other := ~np.any([np.zeros(len(target), bool), *near], axis=0)).any():
        rest = target[other]
        parts += [(s.b, s.b_delta, np.zeros((0, 3)), rest.bvecs[s.indices]) for s in rest.shells]
    columns = max(2, min(4, len(parts)))
    rows = -(-len(parts) // columns)
    with mpl.rc_context(STYLE):
        drawn = figure(0.3 + 2.75 * rows)
        circle = np.linspace(0, 2 * np.pi, 200)
        for k, (b, b_delta, given, new) in enumerate(parts):
            ax = drawn.add_subplot(rows, columns, k + 1, aspect="equal")
            ax.set_axis_off()
            ax.plot(np.cos(circle), np.sin(circle), color="#888888", linewidth=0.8)
            for bvecs, face, edge in ((given, "#444444", "#444444"), (new, "none", PALETTE[1])):
                above = np.where(bvecs[:, 2:] >= 0, bvecs, -bvecs)
                plane = above[:, :2] / np.sqrt(1 + above[:, 2:])
                ax.scatter(plane[:, 0], plane[:, 1], s=22, linewidths=1, facecolors=face,
                           edgecolors=edge)
            ax.set_xlim(-1.1, 1.1)
            ax.set_ylim(-1.1, 1.1)
            ax.set_title(f"b = {b:.0f} s/mm²{describe_shape(float(b_delta))}\n{len(given)} given, "
                         f"{len(new)} predicted", size=9)
        drawn.subplots_adjust(0.01, 0.02, 0.99, 1 - 0.45 / (0.3 + 2.75 * rows), 0.05, 0.3)
        image = svg(drawn)
    return Figure("dwi", {"desc": "upsampledbvecs"}, image, "Given and predicted directions",
                  "Axes of the given (filled) and predicted (open) measurements, seen from above "
                  "the head (upper half sphere, equal-area projection). Predictions far from "
                  "all given directions are the least certain.", SECTION)


def of_prediction(predicted: np.ndarray, sd: np.ndarray | None, target: Acquisition, dwi: Dwi,
                  given: str = "measured") -> Figure:
    """Draw a predicted volume, the given volume of the nearest direction, and the SD.

    Parameters
    ----------
    predicted : (voxel, m)
        Predicted signals.
    sd : (voxel, m), optional
        SDs of their errors.
    target : Acquisition
        The predicted measurements. Of the shell with the highest b-value the one that is farthest
        from the given directions is drawn.
    dwi : Dwi
        The given signal.
    given : str
        Its name.
    """
    table = dwi.acquisition
    highest = np.flatnonzero(target.bvals >= (1 - SHELL_GAP) * target.bvals.max())
    away = np.abs(target.bvecs[highest] @ table.bvecs[~table.b0].T).max(1)
    i = int(highest[away.argmin()])
    shape = np.abs(table.bvals - target.bvals[i]) + 1000 * np.abs(table.b_delta - target.b_delta[i])
    shell = np.flatnonzero(shape <= shape.min() + 0.1 * target.bvals[i])
    angles = np.degrees(np.arccos(np.abs(table.bvecs[shell] @ target.bvecs[i]).clip(0, 1)))
    nearest, angle = int(shell[angles.argmin()]), float(angles.min())
    canvas = Canvas(dwi)
    limits = (0.0, float(np.percentile(dwi.signal[:, nearest], 99)) or 1.0)

    def strip(title: str, values: np.ndarray, ends: tuple[float, float], cmap: str) -> Strip:
        volume = canvas.canonical(dwi.unmask(values))
        return Strip(title, coloured(volume, ends, cmap, canvas.mask), (ends, cmap, ""))

    strips = [strip(f"{given}, volume {nearest}, b {table.bvals[nearest]:.0f} s/mm²",
                    dwi.signal[:, nearest], limits, "gray"),
              strip(f"predicted, b {target.bvals[i]:.0f} s/mm², {angle:.0f}° away",
                    predicted[:, i], limits, "gray")]
    if sd is not None:
        ends = (0.0, float(np.percentile(sd[:, i], 99)) or 1.0)
        strips.append(strip("SD of the prediction's error", sd[:, i], ends, "viridis"))
    with mpl.rc_context(STYLE):
        image = svg(draw_strips(canvas, one_row_views(canvas)[:1], strips))
    return Figure("dwi", {"desc": "predicted"}, image, "A predicted volume",
                  "Of the highest b-value, the predicted volume that is farthest from the given "
                  "directions. It has less noise than a measured one. It should have the same "
                  "anatomy and, where fibres are coherent, the contrast of its own direction. "
                  "Nothing should appear in it that no measured volume shows.", SECTION)


def of_round_trip(trip: pd.DataFrame, noise: float | None) -> Figure:
    """Draw how well each measured volume is predicted from others.

    Parameters
    ----------
    trip : DataFrame
        Result of `upsample.round_trip`.
    noise : float, optional
        Noise SD in the units of the run.
    """
    with mpl.rc_context(STYLE):
        drawn = figure(3.0)
        axes = drawn.subplots(1, 2, gridspec_kw={"left": 0.08, "right": 0.98, "bottom": 0.2,
                                                 "top": 0.88, "wspace": 0.28})
        shells = trip.groupby([trip["b"].round(-2), trip["b_delta"].round(1)])
        for k, (_, rows) in enumerate(shells):
            colour = PALETTE[k % len(PALETTE)]
            label = f"b {rows['b'].mean():.0f}{describe_shape(float(rows['b_delta'].mean()))}"
            axes[0].plot(rows["volume"], rows["rmse"] / (noise or 1), "o", ms=3.5, color=colour,
                         label=label)
            axes[1].plot(rows["volume"], rows["correlation"], "o", ms=3.5, color=colour)
        if noise:
            axes[0].axhline(1, color="#444444", lw=1, ls="--", label="noise SD")
        axes[0].set(ylim=(0, None), ylabel="in units of the noise" if noise else "signal",
                    title="RMSE")
        axes[1].set(ylim=(None, 1), title="correlation")
        for ax in axes:
            ax.set_xlabel("measured volume")
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes[0].legend(fontsize=8, ncols=2)
        image = svg(drawn)
    coverage = trip["coverage"].median()
    text = ("Each measured volume was predicted from those of nine tenths of the directions, in "
            "slices around the middle of the brain. The RMSE contains the noise of the measured "
            "volume. ")
    if np.isfinite(coverage):
        text += (f"{coverage:.0%} of the measured values of a volume (median) lie in the 90 % "
                 "interval of predicted SD and noise. ")
    return Figure("dwi", {"desc": "roundtrip"}, image, "Round trip of the prediction",
                  text + "A volume that stands out may have been moved or corrupted, or have a "
                  "wrong b-vector; shells of few directions are predicted less well.", SECTION)
