"""Figures of a run before and after its signal was changed, with the difference."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np

from bidsapp.dwi import Dwi
from bidsapp.evaluate.change import Change, Pair
from bidsapp.report.canvas import (
    PER_ROW,
    STYLE,
    WIDTH,
    Canvas,
    View,
    colour_bar,
    coloured,
    figure,
    show,
    svg,
)
from bidsapp.report.figures import Figure

DIFFERENCE = "RdBu_r"

MAPS = {"fa": ("FA", "gray", ""), "md": ("MD", "viridis", "mm²/s")}
"""Title, colour map and unit of each map."""


def of_change(change: Change, dwi: Dwi, step: str, desc: str) -> list[Figure]:
    """Draw FA, MD and the mean S/S0 of each shell: before, after and the difference.

    Parameters
    ----------
    change : Change
        Values of the voxels before and after.
    dwi : Dwi
        Signal of the run, whose mask and affine place the voxels.
    step : str
        What changed the signal, such as `harmonization`; with a capital, it is the heading under
        which the figures stand.
    desc : str
        `desc` entity of the figures, or its beginning.
    """
    canvas = Canvas(dwi)
    remark = (f"The median angle between the principal directions before and after is "
              f"{change.median_angle:.2g}° over {len(change.angle)} single-fibre voxels."
              if change.median_angle is not None else
              f"Only {len(change.angle)} single-fibre voxels (FA above 0.7, in the corpus callosum "
              "or deep in the brain), so the change of fibre directions is not reported.")
    drawn = []
    with mpl.rc_context(STYLE):
        for name, pair in change.maps.items():
            title, cmap, unit = MAPS[name]
            drawn.append(_figure(canvas, pair, title, cmap, unit, "dwimap",
                                 {"model": "tensor", "param": name, "desc": desc}, step,
                                 remark if name == "fa" else ""))
        for name, pair in change.signal.items():
            drawn.append(_figure(canvas, pair, f"Mean S/S0 of {name.replace('_', ', ')}", "gray",
                                 "", "dwi", {"desc": f"{desc}{name.replace('_', '')}"}, step, ""))
    return drawn


def _figure(canvas: Canvas, pair: Pair, title: str, cmap: str, unit: str, suffix: str,
            entities: dict[str, str], step: str, remark: str) -> Figure:
    before, after = pair
    difference = after - before
    low, high = map(float, np.percentile(np.concatenate(pair), (2, 98)))
    low = min(low, 0.0)  # the scale includes 0
    high = high if high > low else low + 1
    most = float(np.percentile(np.abs(difference), 98)) or high / 100
    view = canvas.views[0]
    thin = -(-len(view.positions) // PER_ROW)  # to one row
    view = View(view.axis, view.positions[thin // 2::thin], view.zooms)
    rows = [(before, (low, high), cmap, "before"), (after, (low, high), cmap, "after"),
            (difference, (-most, most), DIFFERENCE, "after − before")]
    images = [canvas.mosaic(coloured(canvas.canonical(canvas.dwi.unmask(values)), limits, colours,
                                     canvas.mask), view) for values, limits, colours, _ in rows]
    ratio = images[0].shape[0] * view.zooms[1] / (images[0].shape[1] * view.zooms[0])
    width = min(WIDTH - 0.9, 3.0 / ratio)
    tall, head = width * ratio, 0.3
    total = len(rows) * (tall + head)
    drawn = figure(total)
    for k, (image, (_, limits, colours, label)) in enumerate(zip(images, rows, strict=True)):
        bottom = (total - (k + 1) * (tall + head)) / total
        ax = drawn.add_axes((0.05 / WIDTH, bottom, width / WIDTH, tall / total))
        show(ax, image, view.zooms)
        ax.set_title(f"{title}, {label}", loc="left", size=10)
        bar = drawn.add_axes(((width + 0.13) / WIDTH, bottom + 0.05 * tall / total, 0.16 / WIDTH,
                              0.85 * tall / total))
        colour_bar(bar, limits, colours, unit)
    medians = [f"{np.median(v):.4g}" for v in pair]
    caption = (f"The same slices and, before and after, the same scale. Median {medians[0]} before "
               f"and {medians[1]} after{f' ({unit})' if unit else ''}; mean change "
               f"{difference.mean():+.3g}, mean absolute change {np.abs(difference).mean():.3g}. "
               f"Where a lesion or a fold shows in the difference, {step} changed it. ")
    return Figure(suffix, entities, svg(drawn), f"{title} before and after {step}",
                  (caption + remark).strip(), step.capitalize())
