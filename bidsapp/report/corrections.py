"""Figures of what preprocessing corrected in a run, and its table of confounds.

Every figure stands under SECTION. All volumes of a figure lie on one grid; their axes are those of
the image on disk, not of the display.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.ticker import MaxNLocator

from bidsapp.acquisition import Acquisition
from bidsapp.report.canvas import (
    PALETTE,
    STYLE,
    Canvas,
    Limits,
    Strip,
    colour_bar,
    coloured,
    draw_strips,
    figure,
    mosaics,
    one_row_views,
    svg,
)
from bidsapp.report.figures import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

SECTION = "Corrections"

EDDY_TERMS = ("1", "x", "y", "z", "x²", "y²", "z²", "xy", "xz", "yz")
"""Terms of the eddy-current field, with x, y, z in units of 100 mm from the centre."""

CHANGE_SECONDS = 1.0
"""Time after which the images of the b = 0 figure change places, s."""

FLICKER_SLICES = 6
"""Maximum of slices in a row of the b = 0 figure; with fewer, the line leaves more to see."""

CARPET_LIMIT = 8.0
"""Robust z at which the colours of the carpet plot end."""

RED, GREEN, BLUE = PALETTE[1], PALETTE[2], PALETTE[0]
"""Colours of x, y and z, as in maps of directions."""

GREY = "#444444"


class _Grid(NamedTuple):
    """Mask and affine, which is what a canvas needs of a run."""

    mask: np.ndarray
    affine: np.ndarray


def of_denoising(before: np.ndarray, after: np.ndarray, sigma: np.ndarray | None,
                 residual_rms: np.ndarray, mask: np.ndarray, affine: np.ndarray) -> list[Figure]:
    """Draw a volume before and after denoising, what was taken away, and the noise level.

    Parameters
    ----------
    before, after : (x, y, z)
        One weighted volume.
    sigma : (x, y, z), optional
        Noise SD, in units of the signal; 0 or NaN where it is unknown, None if it was not
        estimated.
    residual_rms : (x, y, z)
        Root mean square over volumes of what was taken away, in units of the signal.
    mask : (x, y, z) bool
        Brain mask.
    affine : (4, 4)
        Voxels to world RAS+, mm.

    Returns
    -------
    list of Figure
    """
    canvas = _canvas(mask, affine)
    before, after, rms = map(canvas.canonical, (before, after, residual_rms))
    noise = np.full(rms.shape, np.nan)
    if sigma is not None:
        np.copyto(noise, canvas.canonical(sigma), where=canvas.canonical(sigma) > 0)
    level, typical = _median(noise[canvas.mask]), _median(rms[canvas.mask])
    relative = rms if level is None else rms / noise
    grey = _limits(before[canvas.mask], (0, 99))
    span = 3 * (level or typical or 1.0)
    noise_ends, relative_ends = (_limits(v[canvas.mask], (2, 98)) for v in (noise, relative))
    everywhere = np.ones_like(canvas.mask)
    strips = [
        Strip("before", coloured(before, grey, "gray", everywhere)),
        Strip("after", coloured(after, grey, "gray", everywhere)),
        Strip("before − after", coloured(before - after, (-span, span), "gray", canvas.mask),
               ((-span, span), "gray", ""))]
    if level is not None:
        strips.append(Strip("noise SD", coloured(noise, noise_ends, "viridis", canvas.mask),
                             (noise_ends, "viridis", "")))
    strips.append(Strip(
        "RMS over volumes of before − after" + (", divided by the noise SD" if level else ""),
        coloured(relative, relative_ends, "gray", canvas.mask), (relative_ends, "gray", "")))
    with mpl.rc_context(STYLE):
        image = svg(draw_strips(canvas, one_row_views(canvas)[:1], strips))
    middle, anatomy = _median(relative[canvas.mask]), _correlation(relative, before, canvas.mask)
    text = f"Median noise SD {level:.4g}. " if level else ""
    if middle is not None:
        text += (f"What was taken away has a median RMS of {middle:.3g}{' noise SD' * bool(level)}"
                 + (f", whose map correlates {anatomy:+.2f} with the volume before. "
                    if anatomy is not None else ". "))
    return [Figure(
        "dwi", {"desc": "denoising"}, image, "Denoising",
        "One weighted volume before and after, on one scale, and their difference from −3 to 3 "
        f"times the median {'noise SD' if level else 'RMS'}. {text}The difference and the last row "
        "should look like noise: where they show anatomy, denoising took signal away. Where the "
        "signal of magnitude images is near the noise, the difference may be above 0, since the "
        "noise floor goes with the noise.", SECTION)]


def of_field(hz: np.ndarray, mask: np.ndarray, affine: np.ndarray,
             correlation_before: float | None = None, correlation_after: float | None = None,
             pair: Sequence[np.ndarray] | None = None,
             names: tuple[str, str] = ("first", "second")) -> list[Figure]:
    """Draw the susceptibility field, and two b0s of opposite phase encoding before and after.

    Parameters
    ----------
    hz : (x, y, z)
        Field, Hz.
    mask : (x, y, z) bool
        Brain mask.
    affine : (4, 4)
        Voxels to world RAS+, mm.
    correlation_before, correlation_after : float, optional
        Correlation of the two b0s in the head; unknown if None or NaN.
    pair : four of (x, y, z), optional
        The first and the second b0 as measured, and both corrected.
    names : (str, str)
        Names of the two b0s, such as AP and PA.

    Returns
    -------
    list of Figure
    """
    canvas = _canvas(mask, affine)
    field = canvas.canonical(hz)
    inside = field[canvas.mask & np.isfinite(field)]
    most = (float(np.percentile(np.abs(inside), 99)) if inside.size else 0.0) or 1.0
    limits = (-most, most)
    low, high = np.percentile(inside, (5, 95)) if inside.size else (0.0, 0.0)
    with mpl.rc_context(STYLE):
        drawn = [Figure(
            "fieldmap", {"desc": "preproc"},
            svg(mosaics(canvas, coloured(field, limits, "RdBu_r", canvas.mask),
                        "Susceptibility field", bar=(limits, "RdBu_r"), unit="Hz")),
            "Susceptibility field",
            f"Off-resonance in the brain, 5 to 95%: {low:+.0f} to {high:+.0f} Hz; colours end at "
            f"±{most:.0f} Hz. A voxel is shifted along the phase encoding by the field times the "
            "total readout time, in voxels. The field should be smooth, and strong only near air: "
            "above the sinuses and the ear canals.", SECTION)]
        if pair is not None:
            drawn.append(_pair(canvas, [canvas.canonical(v) for v in pair], names,
                               correlation_before, correlation_after))
    return drawn


def of_b0(before: np.ndarray, after: np.ndarray, mask: np.ndarray, affine: np.ndarray,
          edge: np.ndarray | None = None) -> list[Figure]:
    """Draw the b0 before and after all corrections; the two change places every second.

    The two images are drawn one above the other, each under its label, and a style sheet in the SVG
    makes them swap: whoever looks at one place sees them flicker, and in print, in a viewer without
    animation, or for a reader who asked for reduced motion both are there.

    Parameters
    ----------
    before, after : (x, y, z)
        Mean b0 as measured and corrected.
    mask : (x, y, z) bool
        Brain mask.
    affine : (4, 4)
        Voxels to world RAS+, mm.
    edge : (x, y, z) bool, optional
        White matter of the T1w image on this grid. Its border is drawn; without it, that of the
        mask.

    Returns
    -------
    list of Figure
    """
    canvas = _canvas(mask, affine)
    before, after = canvas.canonical(before), canvas.canonical(after)
    grey = _limits(np.concatenate([before[canvas.mask], after[canvas.mask]]), (0, 99))
    outline = canvas.mask if edge is None else canvas.canonical(edge)
    everywhere = np.ones_like(canvas.mask)
    strips = [Strip(label, coloured(volume, grey, "gray", everywhere), outline=outline, gid=label)
              for label, volume in (("before", before), ("after", after))]
    views = one_row_views(canvas, FLICKER_SLICES)
    views = [views[0], *views[1:][-1:]]  # axial and sagittal, where both are large
    with mpl.rc_context(STYLE):
        drawn = draw_strips(canvas, views, strips)
        image = _swap(svg(drawn), 72 * drawn.get_figheight() / 2)
    line = ("the brain mask" if edge is None else "white matter in the T1w image")
    return [Figure(
        "dwi", {"desc": "flicker"}, image, "b = 0 before and after",
        "Mean b = 0 as measured and after all corrections, on one scale. The two change places "
        "every second (not in print): look at one spot, and what moves was moved by the "
        f"corrections. The orange line surrounds {line} and is the same in both; after the "
        "corrections the image should follow it.", SECTION)]


def of_motion(translations: np.ndarray, rotations: np.ndarray, eddy: np.ndarray | None,
              framewise_displacement: np.ndarray, b0: np.ndarray) -> list[Figure]:
    """Plot head motion and eddy-current fields by volume.

    Parameters
    ----------
    translations : (n, 3)
        Displacement of the brain's centre along world x, y and z, mm.
    rotations : (n, 3)
        Angles about world x, y and z, degrees.
    eddy : (n, 10), optional
        Coefficients of EDDY_TERMS, Hz.
    framewise_displacement : (n,)
        mm; NaN in the first volume.
    b0 : (n,) bool

    Returns
    -------
    list of Figure
    """
    fd = np.asarray(framewise_displacement, dtype=float)
    xyz, others = (RED, GREEN, BLUE), (PALETTE[4], PALETTE[3], PALETTE[5])
    panels: list[tuple[str, np.ndarray, Sequence[str], Sequence[str], str]] = [
        ("translation (mm)", translations, ("x (left–right)", "y (back–front)", "z (down–up)"),
         xyz, ".-"),
        ("rotation (°)", rotations, ("about x (nod)", "about y (tilt)", "about z (turn)"),
         xyz, ".-"),
        ("framewise\ndisplacement (mm)", fd[:, None], ("",), (GREY,), ".-")]
    if eddy is not None:
        panels += [("eddy field (Hz)", eddy[:, :4], EDDY_TERMS[:4], (GREY, *xyz), "."),
                   ("eddy field (Hz)", eddy[:, 4:], EDDY_TERMS[4:], (*xyz, *others), ".")]
    with mpl.rc_context(STYLE):
        axes, drawn = _by_volume([1.15] * len(panels), len(b0), b0)
        for ax, (label, values, names, colours, style) in zip(axes, panels, strict=True):
            ax.axhline(0, color="#888888", linewidth=0.6)
            for column, name, colour in zip(np.transpose(values), names, colours, strict=True):
                ax.plot(column, style, markersize=3.5, linewidth=0.9, color=colour, label=name)
            ax.set_ylabel(label, size=8)
            if len(names) > 1:
                ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8,
                          handlelength=1.2, labelspacing=0.2)
        image = svg(drawn)
    text = (f"Largest displacement of the brain's centre "
            f"{_largest(np.linalg.norm(translations, axis=1))} mm, largest angle "
            f"{_largest(rotations)}°. ")
    if np.isfinite(fd).any():
        text += (f"Framewise displacement: mean {np.nanmean(fd):.2g} mm, maximum "
                 f"{np.nanmax(fd):.2g} mm in volume {int(np.nanargmax(fd))}. ")
    if eddy is not None:
        text += ("Fields of eddy currents are polynomials of the position in the scanner, with x, "
                 f"y and z in units of 100 mm; largest coefficient {_largest(eddy)} Hz. ")
    return [Figure("dwi", {"desc": "motion"}, image, "Head motion"
                   + (" and eddy currents" if eddy is not None else ""),
                   f"{text}Grey bands: b = 0.", SECTION)]


def of_carpet(z: np.ndarray, outliers: np.ndarray, bvals: np.ndarray) -> list[Figure]:
    """Draw how far every slice of every volume is from its prediction, and the replaced slices.

    Parameters
    ----------
    z : (slice, volume)
        Robust z of the residual of the slice; NaN where it was not assessed.
    outliers : (slice, volume) bool
        Outlier slices.
    bvals : (volume,)
        b-values, s/mm².

    Returns
    -------
    list of Figure
    """
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle

    depth, n = z.shape
    tall = float(np.clip(0.06 * depth, 0.8, 3.6))
    with mpl.rc_context(STYLE):
        (above, top, carpet), drawn = _by_volume([0.5, 0.5, tall], n, None)
        above.plot(bvals, ".", color=GREY, markersize=3.5)
        above.set_ylabel("b (s/mm²)", size=8)
        highest = max(1.0, float(np.max(bvals)))
        above.set_ylim(-0.15 * highest, 1.2 * highest)
        top.bar(range(n), outliers.sum(axis=0), width=0.8, color=PALETTE[1])
        top.set_ylabel("outliers", size=8)
        top.set_ylim(0, max(1, outliers.sum(axis=0).max(initial=0)) * 1.05)
        for ax, most in ((above, 2), (top, 2), (carpet, 6)):
            ax.yaxis.set_major_locator(MaxNLocator(most, integer=True, min_n_ticks=1))
        limits = (-CARPET_LIMIT, CARPET_LIMIT)
        carpet.set_facecolor("#dddddd")
        carpet.imshow(z, origin="lower", aspect="auto", cmap="RdBu_r", vmin=limits[0],
                      vmax=limits[1], interpolation="none")
        carpet.add_collection(PatchCollection(
            [Rectangle((i - 0.5, k - 0.5), 1, 1) for k, i in np.argwhere(outliers)],
            facecolor="none", edgecolor="black", linewidth=0.8), autolim=False)
        carpet.set_ylabel("slice")
        box = carpet.get_position()
        colour_bar(drawn.add_axes((box.x1 + 0.015, box.y0, 0.016, box.height * 0.9)), limits,
                   "RdBu_r", "z")
        image = svg(drawn)
    replaced, volumes = int(outliers.sum()), int(outliers.any(axis=0).sum())
    assessed = int(np.isfinite(z).sum())
    if not assessed:
        text = "No slice was assessed. "
    elif replaced:
        text = (f"{replaced} of {assessed} slices, in {volumes} volume{'s' * (volumes > 1)}, are "
                "outliers (black frames). They were replaced by their prediction where other "
                "volumes show the same place. ")
    else:
        text = f"None of {assessed} slices is an outlier. "
    if assessed and assessed < z.size:
        text += f"{z.size - assessed} slices without enough brain were not assessed. "
    return [Figure(
        "dwi", {"desc": "carpet"}, image, "Slices and their predictions",
        f"{text}Colour: mean residual of each slice against the prediction from the other volumes, "
        "in robust standard deviations of its shell; blue is signal that is missing; light grey: "
        "not assessed. Above: b-value and number of outlier slices of each volume.", SECTION)]


def of_correlation(before: np.ndarray, after: np.ndarray) -> list[Figure]:
    """Plot the neighbouring DWI correlation of each volume before and after.

    Parameters
    ----------
    before, after : (n,)
        `quality.neighbouring_correlations`, NaN for b0.

    Returns
    -------
    list of Figure
    """
    both = np.isfinite(before) & np.isfinite(after)
    with mpl.rc_context(STYLE):
        (ax,), drawn = _by_volume([1.9], len(before), None)
        at = np.flatnonzero(both)
        ax.vlines(at, before[both], after[both], color="#BBBBBB", linewidth=1)
        ax.plot(before, "o", markersize=4, markerfacecolor="white", color=PALETTE[1],
                label="before")
        ax.plot(after, "o", markersize=4, color=PALETTE[0], label="after")
        ax.set_ylabel("correlation")
        if not both.any():
            ax.set_ylim(0, 1)
        ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=8, handlelength=1)
        image = svg(drawn)
    if both.any():
        rise = after[both] - before[both]
        text = (f"Mean {before[both].mean():.4g} before and {after[both].mean():.4g} after; it "
                f"rose in {int((rise > 0).sum())} of {len(rise)} volumes. ")
        if rise.min() < 0:
            text += (f"The largest fall is {-rise.min():.2g}, in volume "
                     f"{int(at[rise.argmin()])}. ")
    else:
        text = "It could not be computed: two weighted volumes are needed. "
    return [Figure(
        "dwi", {"desc": "correlation"}, image, "Neighbouring DWI correlation",
        f"Correlation over the mask of each weighted volume with the one of the nearest b-tensor. "
        f"{text}Motion, eddy currents, noise and lost slices lower it; smoothing raises it too, so "
        "it must be read together with the other figures. The bias field, which also raises it, is "
        "in both.", SECTION)]


def confounds(original: Acquisition, rotated: Acquisition, *,
              translations: np.ndarray | None = None, rotations: np.ndarray | None = None,
              framewise_displacement: np.ndarray | None = None, eddy: np.ndarray | None = None,
              replaced: np.ndarray | None = None, correlation_before: np.ndarray | None = None,
              correlation_after: np.ndarray | None = None
              ) -> tuple[list[dict[str, Any]], dict[str, dict[str, str]]]:
    """Arrange the rows and the sidecar of desc-confounds_timeseries.tsv.

    Columns have the names of fMRIPrep and QSIPrep where these have the quantity. What is not given
    has no column.

    Parameters
    ----------
    original, rotated : Acquisition
        Gradient table of the n volumes as measured, and rotated with the head.
    translations : (n, 3), optional
        Displacement of the brain's centre along world x, y and z, mm.
    rotations : (n, 3), optional
        Angles about world x, y and z, degrees.
    framewise_displacement : (n,), optional
        mm; NaN in the first volume.
    eddy : (n, 10), optional
        Coefficients of EDDY_TERMS, Hz.
    replaced : (slice, n) bool, optional
        Slices that were replaced.
    correlation_before, correlation_after : (n,), optional
        Neighbouring DWI correlation, NaN for b0.

    Returns
    -------
    rows : list of dict
        One for each volume; NaN where there is no value.
    columns : dict
        Description and Units of each column.
    """
    table: dict[str, tuple[Any, str, str]] = {}

    def add(names: Sequence[str], values: np.ndarray | None, description: str, units: str) -> None:
        if values is not None:
            for k, name in enumerate(names):
                axis = name.rsplit("_", 1)[-1]
                table[name] = (np.reshape(values, (len(original), -1))[:, k],
                               description.format(axis), units)

    add([f"trans_{a}" for a in "xyz"], translations,
        "Displacement of the centre of the brain in this volume, along the {} axis of world RAS+ "
        "coordinates, relative to the reference", "mm")
    add([f"rot_{a}" for a in "xyz"], None if rotations is None else np.radians(rotations),
        "Rotation of the head in this volume about the {} axis of world RAS+ coordinates, relative "
        "to the reference: angle of R = Rz Ry Rx", "rad")
    add(["framewise_displacement"], framewise_displacement,
        "Framewise displacement (Power et al. 2012): sum of the absolute changes of translations "
        "and rotations since the volume before, rotations as arcs of a sphere of radius 50 mm",
        "mm")
    add([f"eddy_{t}" for t in ("constant", *"xyz", "x2", "y2", "z2", "xy", "xz", "yz")], eddy,
        "Field of eddy currents in this volume: coefficient of the term {} of a polynomial of the "
        "position in the scanner, in units of 100 mm from the centre", "Hz")
    add(["n_replaced_slices"], None if replaced is None else replaced.sum(axis=0),
        "Slices with signal dropout that were replaced by the prediction from the other volumes",
        "slices")
    for name, values, when in (("ndc_raw", correlation_before, "before all corrections"),
                               ("ndc_preproc", correlation_after,
                                "after all corrections but that of the bias field")):
        add([name], values, "Neighbouring DWI correlation (Yeh et al. 2019): correlation over the "
            f"mask with the volume of the nearest b-tensor, {when}; none for b = 0", "1")
    add(["bval"], rotated.bvals, "b-value", "s/mm^2")
    add([f"grad_{a}" for a in "xyz"], rotated.bvecs,
        "Component {} of the b-vector in world RAS+ coordinates (.bvec files refer to voxel axes), "
        "rotated with the head, as in the corrected images", "1")
    add([f"original_grad_{a}" for a in "xyz"], original.bvecs,
        "Component {} of the b-vector in world RAS+ coordinates, as measured", "1")
    rows = [{name: values[i].item() for name, (values, _, _) in table.items()}
            for i in range(len(original))]
    return rows, {name: {"Description": description, "Units": units}
                  for name, (_, description, units) in table.items()}


def _canvas(mask: np.ndarray, affine: np.ndarray) -> Canvas:
    """Make the canvas of a grid; all of the grid is shown if the mask is empty."""
    grid: Any = _Grid(mask.astype(bool) if mask.any() else np.ones(mask.shape, bool), affine)
    return Canvas(grid)


def _pair(canvas: Canvas, pair: Sequence[np.ndarray], names: tuple[str, str],
          before: float | None, after: float | None) -> Figure:
    """Draw two b0s of opposite phase encoding, as measured and corrected."""
    strips = []
    titles = [f"{name}, {state}" for state in ("as measured", "corrected") for name in names]
    for volume, title in zip(pair, titles, strict=True):
        grey = _limits(volume[canvas.mask], (0, 99))
        strips.append(Strip(title, coloured(volume, grey, "gray", np.ones_like(canvas.mask)),
                             outline=canvas.mask))
    text = (f"Their correlation in the head is {before:.3f} as measured and {after:.3f} "
            "corrected. " if before is not None and after is not None
            and np.isfinite([before, after]).all() else "")
    return Figure(
        "dwi", {"desc": "distortion"}, svg(draw_strips(canvas, one_row_views(canvas)[:1], strips)),
        "b = 0 of opposite phase encoding",
        f"The field distorts the two in opposite directions. {text}Corrected, they should look "
        "alike and fill the brain mask (orange line). Where signal was piled up the image cannot "
        "be restored sharply.", SECTION)


def _by_volume(heights: Sequence[float], n: int, b0: np.ndarray | None
               ) -> tuple[list[Axes], Drawing]:
    """Make plots of these heights (inches) below one another over n volumes, b0s as grey bands."""
    gap, foot, head = 0.14, 0.45, 0.1
    total = sum(heights) + gap * (len(heights) - 1) + foot + head
    drawn = figure(total)
    axes: list[Axes] = []
    top = total - head
    for height in heights:
        ax = drawn.add_axes((0.075, (top - height) / total, 0.8, height / total))
        ax.set_xlim(-0.5, n - 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        ax.tick_params(labelsize=8, labelbottom=len(axes) == len(heights) - 1)
        for i in np.flatnonzero(b0) if b0 is not None else ():
            ax.axvspan(i - 0.5, i + 0.5, color="#E6E6E6", linewidth=0, zorder=0)
        ax.yaxis.set_label_coords(-0.05, 0.5)
        axes.append(ax)
        top -= height + gap
    axes[-1].set_xlabel("volume")
    return axes, drawn


def _swap(image: bytes, distance: float) -> bytes:
    """Let the parts of an SVG whose ids begin with `before` and `after` change places.

    `distance` is between their places, in points. The SVG stays as it is where animation is off.
    """
    moves = "".join(
        f"@keyframes {name}-moves {{ 50% {{ transform: translate(0, {sign}{distance:.4f}px) }} }}\n"
        f'[id^="{name}-"] {{ animation: {name}-moves {2 * CHANGE_SECONDS:g}s step-end infinite }}\n'
        for name, sign in (("before", ""), ("after", "-")))
    still = "@media print, (prefers-reduced-motion: reduce) { * { animation: none !important } }\n"
    return image.replace(b"</style>", f"\n{moves}{still}</style>".encode(), 1)


def _limits(values: np.ndarray, percentiles: tuple[float, float]) -> Limits:
    """Find the ends of a colour scale; a percentile of 0 stands for the value 0."""
    finite = values[np.isfinite(values)]
    if not finite.size:
        return 0.0, 1.0
    low, high = (0.0 if p == 0 else float(np.percentile(finite, p)) for p in percentiles)
    return (low, high) if high > low else (low, low + (abs(low) or 1.0))


def _largest(values: np.ndarray) -> str:
    finite = np.abs(values)[np.isfinite(values)]
    return f"{finite.max():.2g}" if finite.size else "n/a"


def _median(values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else None


def _correlation(one: np.ndarray, two: np.ndarray, mask: np.ndarray) -> float | None:
    """Correlate two volumes over the finite voxels of a mask; None if one is constant."""
    use = mask & np.isfinite(one) & np.isfinite(two)
    one, two = one[use].astype(float), two[use].astype(float)
    if len(one) < 2 or not one.std() or not two.std():
        return None
    return float(np.corrcoef(one, two)[0, 1])
