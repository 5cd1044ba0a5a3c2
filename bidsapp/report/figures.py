"""Figures of a run as SVG: its signal, and its maps as outputs.json of their method says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from bidsapp.dwi import Dwi
from bidsapp.evaluate import quality
from bidsapp.kinds import Derived, Method
from bidsapp.report import glyphs
from bidsapp.report.canvas import (
    PALETTE,
    STYLE,
    Canvas,
    coloured,
    figure,
    mosaics,
    show,
    svg,
)

SHOWN_SLICES = 8
"""Maximum of suspected slices that are drawn; all are counted."""

BRIGHT_FA = 0.7
"""FA at which colours are brightest."""

WHITE_FA = 0.3
"""FA above which voxels count as white matter in the check of a registration."""


@dataclass(frozen=True)
class Figure:
    """A figure and its description on the page.

    Parameters
    ----------
    suffix, entities : str, mapping
        Parts of the file name, as in BIDS.
    svg : bytes
    title, caption : str
    section : str
        Heading under which the figure stands.
    """

    suffix: str
    entities: Mapping[str, str]
    svg: bytes
    title: str
    caption: str
    section: str


def of_signal(dwi: Dwi, mean_b0: np.ndarray) -> list[Figure]:
    """Draw gradient directions, the mean b0 with the mask, signal and SNR, and corrupted slices.

    Parameters
    ----------
    dwi : Dwi
        The measured signal.
    mean_b0 : (x, y, z)
        Mean b0 on the whole grid.
    """
    canvas = Canvas(dwi)
    with mpl.rc_context(STYLE):
        return [_gradients(dwi), _mean_b0(canvas, mean_b0), _snr(dwi), _slices(canvas)]


def of_maps(method: Method, derived: Derived, dwi: Dwi) -> list[Figure]:
    """Draw each map whose entry in outputs.json says `"report": true`, and all maps of directions.

    Colours of a scalar map run over `display`, else `range`; an end that is null is the 98th
    percentile (2nd for the lower). A map of three components is a direction: |x| red, |y| green,
    |z| blue, times `fa` where the method has one; it comes first. A map of more components is an
    ODF, whose glyphs are drawn on the map that its entry names as `background`.

    Parameters
    ----------
    method : Method
    derived : Derived
        Maps of the method.
    dwi : Dwi
        The signal from which they were estimated.
    """
    canvas = Canvas(dwi)
    drawn: list[Figure] = []
    outputs = method.outputs
    with mpl.rc_context(STYLE):
        for key, values in derived.maps.items():
            entry = outputs["maps"][key]
            suffix, entities = method.name_map(entry)
            section = f"Maps: {method.name.removeprefix('estimate_')}"
            if values.ndim == 2 and values.shape[1] == 3:
                drawn.insert(0, _directions(canvas, values, derived.maps, entities,
                                            section))
            elif values.ndim == 1 and entry.get("report"):
                drawn.append(_map(canvas, values, entry, suffix, entities, section))
            elif entry.get("report"):
                drawn.append(_glyphs(canvas, values, derived, outputs, entry, entities, section))
    return drawn


def of_space(grid: Any, reference: np.ndarray, fa: np.ndarray, space: str,
             entities: Mapping[str, str]) -> Figure:
    """Draw the reference image of an output space with the outline of the white matter by FA.

    Parameters
    ----------
    grid : object
        With `mask` (x, y, z) bool, the brain in the space, and `affine`.
    reference, fa : (x, y, z)
    space : str
        Its name.
    entities : mapping
        Of the figure's file name.
    """
    canvas = Canvas(grid)
    volume = canvas.canonical(reference)
    limits = (0.0, float(np.percentile(volume[canvas.mask], 99.5)) or 1.0)
    with mpl.rc_context(STYLE):
        drawn = mosaics(canvas, coloured(volume, limits, "gray", np.ones_like(canvas.mask)),
                        f"{space} with the outline of FA above {WHITE_FA:g}",
                        outline=canvas.canonical(fa > WHITE_FA))
    return Figure(
        "dwimap", entities, svg(drawn), f"FA in the space {space}",
        f"Grey: the reference image of the space. The line surrounds FA above {WHITE_FA:g} as "
        "resampled to it: white matter, and the rim of the mask where that holds skull. Inside the "
        "brain it should follow white matter. If it does not, the registration has failed: do not "
        "use the maps in this space.", "Output spaces")


def _gradients(dwi: Dwi) -> Figure:
    shells = [s for s in dwi.acquisition.shells if abs(s.b_delta) > 0.01]
    columns = max(1, min(4, len(shells)))
    rows = max(1, -(-len(shells) // columns))
    drawn = figure(0.3 + 2.75 * rows)
    circle = np.linspace(0, 2 * np.pi, 200)
    for k in range(rows * columns):
        ax = drawn.add_subplot(rows, columns, k + 1, aspect="equal")
        ax.set_axis_off()
        if k >= len(shells):
            continue
        n = dwi.acquisition.bvecs[shells[k].indices]
        above = n[:, 2] >= 0
        axis = np.where(above[:, None], n, -n)
        # Lambert's projection of the upper half sphere: equal areas stay equal, the rim is radius 1
        plane = axis[:, :2] / np.sqrt(1 + axis[:, 2:])
        for radius, style in ((1, "-"), (np.sqrt(2) * np.sin(np.pi / 8), ":")):
            ax.plot(radius * np.cos(circle), radius * np.sin(circle), style, color="#888888",
                    linewidth=0.8)
        colour = PALETTE[k % len(PALETTE)]
        ax.scatter(plane[above, 0], plane[above, 1], s=22, color=colour, linewidths=0.8)
        ax.scatter(plane[~above, 0], plane[~above, 1], s=22, facecolors="none",
                   edgecolors=colour, linewidths=1)
        for x, y, text in ((0, 1.12, "A"), (0, -1.12, "P"), (-1.12, 0, "L"), (1.12, 0, "R")):
            ax.text(x, y, text, ha="center", va="center", size=8, color="#555555")
        ax.set_xlim(-1.25, 1.25)
        ax.set_ylim(-1.25, 1.25)
        shape = "" if shells[k].b_delta > 0.99 else f", b_Δ = {shells[k].b_delta:.2g}"
        ax.set_title(f"b = {shells[k].b:.0f} s/mm²{shape}\n{len(shells[k])} volumes", size=9)
    if not shells:
        drawn.text(0.5, 0.5, "No shell has directions (spherical encoding only).", ha="center")
    drawn.subplots_adjust(0.01, 0.02, 0.99, 1 - 0.45 / (0.3 + 2.75 * rows), 0.05, 0.3)
    return Figure(
        "dwi", {"desc": "bvecs"}, svg(drawn), "Gradient directions",
        "Axes of the b-tensors in world axes, seen from above the head, each as the point where it "
        "leaves the upper half sphere (equal-area projection; dotted: 45° from the vertical). "
        "Open circles were given pointing down. Gaps or clusters mean uneven sampling.",
        "Acquisition")


def _mean_b0(canvas: Canvas, mean_b0: np.ndarray) -> Figure:
    volume = canvas.canonical(np.asarray(mean_b0))
    inside = volume[canvas.mask]
    limits = (0.0, float(np.percentile(inside, 99.5)) or 1.0)
    grey = coloured(volume, limits, "gray", np.ones_like(canvas.mask))
    drawn = mosaics(canvas, grey, "Mean b = 0 and brain mask", crop=False, outline=canvas.mask)
    return Figure(
        "dwi", {"desc": "mask"}, svg(drawn), "Mean b = 0 with the brain mask",
        f"The orange line is the mask in which everything is computed ({len(inside)} voxels). It "
        "should follow the brain: maps are missing outside it, and air or skull inside it "
        "distorts the statistics.", "Brain mask")


def _snr(dwi: Dwi) -> Figure:
    """Draw the mean signal of each volume and the distribution of SNR over the mask by shell."""
    acquisition, noise = dwi.acquisition, dwi.noise_sd
    groups = [(quality.shell_name(s), s.indices) for s in acquisition.shells]
    if acquisition.b0.any():
        groups.insert(0, ("b0", np.flatnonzero(acquisition.b0)))
    colours = ["#444444", *PALETTE] if groups[0][0] == "b0" else list(PALETTE)
    height = max(2.9, 0.9 + 0.36 * len(groups))
    drawn = figure(height)
    left, right = drawn.subplots(1, 2, width_ratios=(3, 2))
    boxes = []
    for k, (_, indices) in enumerate(groups):
        means = [float(dwi.signal[:, i].mean(dtype=np.float64)) for i in indices]
        left.plot(indices, means, "o", markersize=4, color=colours[k % len(colours)])
        level = quality.mean_volume(dwi, indices) / (noise or 1)
        boxes.append(np.percentile(level, (5, 25, 50, 75, 95)))
    left.set_xlabel("volume")
    left.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    left.set_ylabel("mean signal in the mask")
    left.set_ylim(bottom=0)
    for k, (low, q1, median, q3, high) in enumerate(boxes):
        colour = colours[k % len(colours)]
        right.plot((low, high), (k, k), color=colour, linewidth=1.2)
        right.plot((q1, q3), (k, k), color=colour, linewidth=7, solid_capstyle="butt", alpha=0.5)
        right.plot(median, k, "o", color=colour, markersize=5)
        right.text(median, k - 0.22, f"{median:.3g}", ha="center", va="bottom", size=8)
    if noise:
        right.axvline(3, color="#888888", linewidth=0.8, linestyle=":")
    right.set_yticks(range(len(groups)), [name for name, _ in groups])
    for k, label in enumerate(right.get_yticklabels()):
        label.set_color(colours[k % len(colours)])
    right.set_ylim(len(groups) - 0.5, -0.75)
    right.set_xlim(left=0)
    right.set_xlabel("SNR over the mask" if noise else "signal over the mask")
    drawn.subplots_adjust(0.08, 0.5 / height, 0.98, 1 - 0.15 / height, 0.3)
    known = (f"Noise SD {noise:.4g} (residual of a spherical harmonics fit per shell). Dotted: SNR "
             "3, below which the noise floor biases the signal." if noise else
             "The noise level could not be estimated: too few volumes beside what a fit needs.")
    return Figure(
        "dwi", {"desc": "snr"}, svg(drawn), "Signal and SNR per shell",
        "Left: mean signal of each volume, coloured as on the right, in the order of the file; a "
        "drift, step or single low volume is worth a look. Right: signal of the mean volume of each"
        f" shell{' over the noise SD' if noise else ''}; point: median of the mask, box: quartiles,"
        f" line: 5 to 95%. {known}", "Signal")


def _slices(canvas: Canvas) -> Figure:
    """Draw the relative signal of each slice, and the suspected slices beside their shell mean."""
    dwi = canvas.dwi
    slices = quality.slice_signal(dwi)
    suspects = slices.suspects
    shown = suspects[:SHOWN_SLICES]
    tall = min(2.2, 0.6 + 0.1 * dwi.mask.shape[2])
    height = tall + 0.8 + (2.6 if shown else 0)
    drawn = figure(height)
    bottom = (height - tall - 0.3) / height
    ax = drawn.add_axes((0.07, bottom, 0.83, tall / height))
    ax.set_facecolor("#dddddd")
    ax.imshow(100 * slices.change, origin="lower", aspect="auto", cmap="RdBu_r", vmin=-30, vmax=30,
              interpolation="none")
    if suspects:
        k, i = np.array(suspects).T
        ax.plot(i, k, "s", markerfacecolor="none", markeredgecolor="black", markersize=6)
    ax.set_xlabel("volume")
    ax.set_ylabel("slice")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(10, integer=True))
    cax = drawn.add_axes((0.92, bottom, 0.015, tall / height))
    cax.imshow(np.linspace(-30, 30, 64)[:, None], origin="lower", aspect="auto", cmap="RdBu_r",
               extent=(0, 1, -30, 30), interpolation="none")
    cax.set_xticks([])
    cax.yaxis.tick_right()
    cax.set_title("%", size=8, weight="normal")
    for row, label in enumerate(("volume", "shell mean") if shown else ()):
        drawn.text(0.012, (1.66 - 1.1 * row) / height, label, rotation=90, va="center", size=8)
    for n, (k, i) in enumerate(shown):
        _suspect(drawn, canvas, n, k, i, slices, height)
    if not np.isfinite(slices.change).any():
        text = f"Not assessed: no shell has {quality.MIN_VOLUMES} volumes or more."
    elif suspects:
        text = (f"{len(suspects)} slice(s) in {len({i for _, i in suspects})} volume(s) look "
                "corrupted (black squares)"
                + (f"; the worst {len(shown)} are drawn below, over the same "
                   "slice of the mean of its shell." if shown else "."))
    else:
        text = "No slice looks corrupted."
    return Figure(
        "dwi", {"desc": "dropout"}, svg(drawn), "Slices that look corrupted",
        f"{text} Colour: mean signal of each slice of each volume against what the other volumes "
        "of its shell predict; grey: not assessed. Suspected from a loss of "
        f"{quality.DROPOUT_LOSS:.0%} and {quality.DROPOUT_Z:g} robust standard deviations.",
        "Signal")


def _suspect(drawn: Any, canvas: Canvas, n: int, k: int, i: int, slices: quality.Slices,
             height: float) -> None:
    """Draw suspected slice k of volume i in column n, over the same slice of its shell mean."""
    dwi = canvas.dwi
    groups = [s.indices for s in dwi.acquisition.shells] + [np.flatnonzero(dwi.acquisition.b0)]
    group = next(g for g in groups if i in g)
    axis, position = canvas.place(2, k)
    zooms = [z for a, z in enumerate(canvas.zooms) if a != axis]
    shell_mean = quality.mean_volume(dwi, group)
    tiles = [canvas.tile(canvas.canonical(dwi.unmask(v)), axis, position)
             for v in (dwi.signal[:, i], shell_mean)]
    top = max(float(np.percentile(tiles[1], 99)), 1e-12)
    for row, tile in enumerate(tiles):
        ax = drawn.add_axes((0.03 + 0.12 * n, (1.12 - 1.1 * row) / height, 0.115, 1.08 / height))
        show(ax, np.clip(tile / top, 0, 1) * 255, (zooms[0], zooms[1]))
        if row == 0:
            ax.set_title(f"slice {k}, vol. {i}\n{slices.change[k, i]:+.0%}, "
                         f"z = {slices.z[k, i]:.0f}", size=8, weight="normal")


def _directions(canvas: Canvas, direction: np.ndarray, maps: Mapping[str, np.ndarray],
                entities: dict[str, str], section: str) -> Figure:
    title, weight, brightness = "Principal direction", np.ones(len(direction)), ""
    if "fa" in maps:
        weight = np.clip(np.nan_to_num(maps["fa"]) / BRIGHT_FA, 0, 1)
        title, brightness = "Colour FA", f", brightness: FA up to {BRIGHT_FA:g}"
    elif "coherence" in maps:
        weight = np.clip(1.5 * maps["coherence"] - 0.5, 0, 1)
        title = "Direction of the largest bundle"
        brightness = (", brightness: coherence from 1/3 to 1. In grey matter and CSF it means "
                      "nothing")
    rgb = np.nan_to_num(np.abs(direction)) * weight[:, None]
    volume = canvas.dwi.unmask(((np.clip(rgb, 0, 1) * 31).round() * (255 / 31)).astype(np.uint8))
    drawn = mosaics(canvas, canvas.canonical(volume), title)
    return Figure(
        "dwimap", entities, svg(drawn), title,
        "Red: left–right, green: anterior–posterior, blue: inferior–superior, in world axes"
        + brightness + ". The corpus callosum should be red at the midline, the cingulum green, "
        "the corticospinal tract blue; anything else points to wrong b-vectors.", section)


def _map(canvas: Canvas, values: np.ndarray, entry: Mapping[str, Any], suffix: str,
         entities: dict[str, str], section: str) -> Figure:
    finite = values[np.isfinite(values)]
    ends = entry.get("display") or entry.get("range") or (None, None)
    usual = np.percentile(finite, (2, 98)) if len(finite) else (0.0, 1.0)
    low, high = (float(u if e is None else e) for e, u in zip(ends, usual, strict=True))
    high = high if high > low else low + 1
    cmap = entry.get("cmap", "viridis")
    volume = canvas.canonical(canvas.dwi.unmask(values))
    units = units_of(entry)
    name = entry["Description"].rstrip(".")
    drawn = mosaics(canvas, coloured(volume, (low, high), cmap, canvas.mask), short(name),
                    bar=((low, high), cmap), unit=units)
    beyond = float(np.mean((finite < low) | (finite > high))) if len(finite) else 0.0
    parts = [] if name == short(name) else [f"{name}."]
    if units == "label":
        counts = [f"{k}: {np.mean(finite == k):.2%}" for k in range(1, int(high) + 1)]
        parts.append(f"{', '.join(counts)} of the voxels.")
    else:
        parts.append(f"Shown from {low:.3g} to {high:.3g}{f' {units}' if units else ''}.")
    if len(finite) and units != "label":
        p5, median, p95 = np.percentile(finite, (5, 50, 95))
        parts.append(f"Median {median:.3g}, 5 to 95%: {p5:.3g} to {p95:.3g}.")
    if beyond > 0:
        parts.append(f"{beyond:.2%} of the voxels lie outside the shown range.")
    if len(finite) < len(values):
        parts.append(f"{len(values) - len(finite)} voxels have no value (grey).")
    return Figure(suffix, entities, svg(drawn), short(name), " ".join(parts), section)


def _glyphs(canvas: Canvas, odf: np.ndarray, derived: Derived, outputs: Mapping[str, Any],
            entry: Mapping[str, Any], entities: dict[str, str], section: str) -> Figure:
    behind, weight = outputs["maps"][entry["background"]], derived.maps[entry["background"]]
    unflagged = derived.maps.get("flag", 0 * weight) == 0
    with_glyph = unflagged & (True if derived.valid is None else derived.valid)
    background = coloured(canvas.canonical(canvas.dwi.unmask(weight)), tuple(behind["range"]),
                          "gray", canvas.mask)
    title, weight_name = short(entry["Description"]), short(behind["Description"])
    image, caption = glyphs.draw(canvas, odf, weight, with_glyph, background, title, weight_name)
    return Figure("dwimap", entities, image, title, caption, section)


def units_of(entry: Mapping[str, Any]) -> str:
    """Format units with superscripts; empty where there are none."""
    text = str(entry["Units"])
    return "" if text in ("unitless", "1") else text.replace("^2", "²").replace("um", "µm")


def short(text: str, most: int = 60) -> str:
    """Take the first clause of a description, for a title."""
    first = re.split(r"[;:,]| \(|\. ", text)[0].rstrip(".")
    return first if len(first) <= most else first[: most - 1].rstrip() + "…"
