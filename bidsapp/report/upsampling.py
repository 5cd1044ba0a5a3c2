"""Figures of predicted volumes: beside measured ones, and in the round trip."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from bidsapp.acquisition import Acquisition, describe_shape
from bidsapp.dwi import Dwi
from bidsapp.kinds import Predicted
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


def of_prediction(made: Predicted, target: Acquisition, dwi: Dwi) -> Figure:
    """Draw a predicted volume, the measured volume of the nearest direction, and the SD.

    Parameters
    ----------
    made : Predicted
    target : Acquisition
        The predicted measurements. The first of the highest b-value is drawn.
    dwi : Dwi
        The measured signal.
    """
    i = int(target.bvals.argmax())
    table = dwi.acquisition
    shape = np.abs(table.bvals - target.bvals[i]) + 1000 * np.abs(table.b_delta - target.b_delta[i])
    shell = np.flatnonzero(shape <= shape.min() + 0.1 * target.bvals[i])
    angles = np.degrees(np.arccos(np.abs(table.bvecs[shell] @ target.bvecs[i]).clip(0, 1)))
    nearest, angle = int(shell[angles.argmin()]), float(angles.min())
    canvas = Canvas(dwi)
    limits = (0.0, float(np.percentile(dwi.signal[:, nearest], 99)) or 1.0)

    def strip(title: str, values: np.ndarray, ends: tuple[float, float], cmap: str) -> Strip:
        volume = canvas.canonical(dwi.unmask(values))
        return Strip(title, coloured(volume, ends, cmap, canvas.mask), (ends, cmap, ""))

    strips = [strip(f"measured, volume {nearest}, b {table.bvals[nearest]:.0f} s/mm²",
                    dwi.signal[:, nearest], limits, "gray"),
              strip(f"predicted, b {target.bvals[i]:.0f} s/mm², {angle:.0f}° away",
                    made.signal[:, i], limits, "gray")]
    if made.sd is not None:
        ends = (0.0, float(np.percentile(made.sd[:, i], 99)) or 1.0)
        strips.append(strip("SD of the prediction's error", made.sd[:, i], ends, "viridis"))
    with mpl.rc_context(STYLE):
        image = svg(draw_strips(canvas, one_row_views(canvas)[:1], strips))
    return Figure("dwi", {"desc": "predicted"}, image, "A predicted volume",
                  "A predicted volume has less noise than a measured one. It should have the same "
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
            axes[0].plot(rows["volume"], rows["rmse"], "o", ms=3.5, color=colour, label=label)
            axes[1].plot(rows["volume"], rows["correlation"], "o", ms=3.5, color=colour)
        if noise:
            axes[0].axhline(noise, color="#444444", lw=1, ls="--", label="noise SD")
        axes[0].set(ylim=(0, None), ylabel="signal", title="RMSE")
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
