"""Slices in display orientation, mosaics of them, and SVG files that are reproducible to the byte.

The display is neurological (left is left). A canonical volume is one whose axes were flipped and
swapped into the order closest to world RAS+, without resampling. Each mosaic is one RGB image.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import matplotlib as mpl
import nibabel as nib
import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bidsapp.dwi import Dwi

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#6A3D9A", "#8C564B")
"""Okabe and Ito's colours, safe for colour-blind readers, and two more."""

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "qsphere", "svg.fonttype": "none", "font.family": ["sans-serif"],
    "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.spines.top": False,
    "axes.spines.right": False, "axes.titlesize": 10, "axes.titleweight": "bold",
    "legend.frameon": False, "image.composite_image": False, "axes.grid": False,
    "axes.facecolor": "white", "figure.facecolor": "white", "savefig.facecolor": "white",
    "text.color": "#222222", "axes.labelcolor": "#222222", "text.usetex": False,
    "text.parse_math": False,  # a $ in the name of a site is a $
}
WIDTH = 10.0
"""Width of every figure, inches."""

TILE = 110
"""Maximum of pixels along the longer side of a slice in a mosaic."""

Limits = tuple[float, float]
"""Values at the two ends of a colour scale."""

LEVELS = 128
"""Number of colours of a colour scale: fewer make smaller files, and 128 look continuous."""

PER_ROW = 7
"""Slices in a row of a mosaic."""

LABELS = (("P", "A"), ("L", "R"), ("L", "R"))
"""Labels of the left and right side of slices across x (sagittal), y (coronal), z (axial)."""

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def figure(height: float) -> Figure:
    """Make an empty figure of WIDTH × height inches; draw on it inside `rc_context(STYLE)`."""
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def svg(drawn: Figure) -> bytes:
    """Write a figure as SVG: text as text, no date, ids from a fixed salt, lines to 0.01 pt."""
    out = io.BytesIO()
    with mpl.rc_context(STYLE):
        drawn.savefig(out, format="svg",
                      metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = re.sub(rb"(?<=base64,)[A-Za-z0-9+/=\s]+", _smaller_png, out.getvalue())
    return re.sub(rb' d="[^"]*"', lambda m: re.sub(rb"(\.\d\d)\d+", rb"\1", m[0]), text)


def _smaller_png(match: re.Match[bytes]) -> bytes:
    """Compress an opaque image without loss: no alpha, and a palette if 256 colours suffice."""
    from PIL import Image

    image: Any = Image.open(io.BytesIO(base64.b64decode(match[0])))
    if image.getextrema()[-1] != (255, 255):
        return match[0]
    image = image.convert("RGB")
    colours = image.getcolors(256)
    if colours:
        pixels = np.asarray(image).reshape(-1, 3)
        table, index = np.unique(pixels, axis=0, return_inverse=True)
        image = Image.fromarray(index.reshape(image.height, image.width).astype(np.uint8), "P")
        image.putpalette(table.tobytes())
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return base64.b64encode(out.getvalue())


@dataclass(frozen=True)
class View:
    """Slices across one axis of the canonical grid.

    Parameters
    ----------
    axis : int
        0 sagittal, 1 coronal, 2 axial.
    positions : tuple of int
        Canonical indices of the slices along the axis.
    zooms : tuple of float
        mm per pixel, to the right and upwards.
    """

    axis: int
    positions: tuple[int, ...]
    zooms: tuple[float, float]


class Canvas:
    """Display geometry of a Dwi.

    Attributes
    ----------
    affine : (4, 4)
        Canonical voxel indices to world RAS+, mm.
    axes : (3, 3)
        Columns of the affine at unit length: world directions of the canonical axes.
    zooms : tuple of float
        Voxel size along the canonical axes, mm.
    mask : (x, y, z) bool
        Brain mask in the canonical grid.
    """

    def __init__(self, dwi: Dwi) -> None:
        self.dwi = dwi
        self.orientation = nib.io_orientation(dwi.affine)
        if np.isnan(self.orientation).any():
            self.orientation = np.array([[0, 1], [1, 1], [2, 1]])
        zooms = np.ones(3)
        zooms[self.orientation[:, 0].astype(int)] = nib.affines.voxel_sizes(dwi.affine)
        self.zooms = tuple(float(z) for z in zooms)
        self.mask = self.canonical(dwi.mask)
        self.affine = dwi.affine @ nib.orientations.inv_ornt_aff(self.orientation, dwi.mask.shape)
        self.axes = self.affine[:3, :3] / np.linalg.norm(self.affine[:3, :3], axis=0)

    def canonical(self, volume: np.ndarray) -> np.ndarray:
        """Bring a volume (x, y, z, …) into the order of axes closest to RAS+."""
        return nib.apply_orientation(volume, self.orientation)

    def place(self, axis: int, index: int) -> tuple[int, int]:
        """Find the canonical axis and index of slice `index` across axis `axis` of the image."""
        to, flip = int(self.orientation[axis, 0]), self.orientation[axis, 1]
        return to, index if flip > 0 else self.dwi.mask.shape[axis] - 1 - index

    @cached_property
    def box(self) -> tuple[slice, slice, slice]:
        """Bounding box of the mask with a margin of 2 voxels, in the canonical grid."""
        bounds = []
        for axis in range(3):
            there = np.flatnonzero(self.mask.any(axis=tuple({0, 1, 2} - {axis})))
            bounds.append(slice(max(int(there[0]) - 2, 0),
                                min(int(there[-1]) + 3, self.mask.shape[axis])))
        return bounds[0], bounds[1], bounds[2]

    @cached_property
    def views(self) -> tuple[View, ...]:
        """Choose the slices: those of the plane with the largest area in two rows, others in one.

        Axial planes are preferred, their area counting 1.3 times. Another plane is shown if its
        shorter side is at least a quarter of its longer one, and the mask extends across it by more
        than a quarter of its largest extent.
        """
        size = np.array([b.stop - b.start for b in self.box]) * self.zooms
        planes = {a: [d for d in range(3) if d != a] for a in (2, 1, 0)}
        area = {a: size[p].prod() for a, p in planes.items()}
        first = max(planes, key=lambda a: area[a] * (1.3 if a == 2 else 1))
        views = []
        for axis in sorted(planes, key=lambda a: a != first):
            across, up = planes[axis]
            ratio = min(size[across], size[up]) / max(size[across], size[up])
            if axis == first or (ratio >= 0.25 and size[axis] > 0.25 * size.max()):
                count = 2 * PER_ROW if axis == first else PER_ROW
                views.append(View(axis, self._spread(axis, count),
                                  (self.zooms[across], self.zooms[up])))
        return tuple(views)

    def _spread(self, axis: int, count: int) -> tuple[int, ...]:
        """Spread at most `count` positions evenly over slices with 15 % or more of the largest area
        of the mask."""
        area = self.mask.sum(axis=tuple({0, 1, 2} - {axis}))
        there = np.flatnonzero(area >= 0.15 * area.max())
        picked = np.linspace(0, len(there) - 1, min(count, len(there)))
        return tuple(int(there[round(p)]) for p in picked)

    def tile(self, volume: np.ndarray, axis: int, position: int, crop: bool = True) -> np.ndarray:
        """Cut a slice of a canonical volume (x, y, z[, 3]): (row, column[, 3]), bottom first."""
        box: list[slice | int] = list(self.box if crop else (slice(None),) * 3)
        box[axis] = position
        return np.swapaxes(volume[tuple(box)], 0, 1)

    def mosaic(self, volume: np.ndarray, view: View, crop: bool = True) -> np.ndarray:
        """Arrange slices of a canonical volume in rows, framed in black, the first at top left.

        Row 0 of the mosaic is the bottom. Of slices longer than TILE pixels every second (third, …)
        pixel is kept.
        """
        tiles = [self.tile(volume, view.axis, p, crop) for p in view.positions]
        step = -(-max(tiles[0].shape[:2]) // TILE)
        tiles = [np.pad(t[::step, ::step], ((1, 1), (1, 1), *([(0, 0)] * (t.ndim - 2))))
                 for t in tiles]
        tiles += [np.zeros_like(tiles[0])] * (-len(tiles) % self.per_row(view))
        rows = [np.concatenate(tiles[i:i + self.per_row(view)], axis=1)
                for i in range(0, len(tiles), self.per_row(view))]
        return np.concatenate(rows[::-1], axis=0)

    @staticmethod
    def per_row(view: View) -> int:
        return min(PER_ROW, len(view.positions))


def mosaics(canvas: Canvas, colours: Any, title: str, *, crop: bool = True,
            outline: np.ndarray | None = None, bar: tuple[Limits, str] | None = None,
            unit: str = "") -> Figure:
    """Draw all views of a volume below one another.

    Parameters
    ----------
    canvas : Canvas
    colours : (x, y, z, 3) uint8
        Canonical volume.
    title : str
    crop : bool
        Whether only the bounding box of the mask is shown.
    outline : (x, y, z) bool, optional
        Canonical volume whose border is drawn as a line.
    bar : (limits, colour map), optional
        Colour bar.
    unit : str
        Label of the colour bar.
    """
    images = [canvas.mosaic(colours, v, crop) for v in canvas.views]
    heights, widths = [], []
    room = WIDTH - (0.9 if bar else 0.1)
    for image, view in zip(images, canvas.views, strict=True):
        columns = canvas.per_row(view)
        ratio = image.shape[0] * view.zooms[1] / (image.shape[1] * view.zooms[0])
        width = min(room, room * columns / 4, 7.0 / ratio)
        widths.append(width)
        heights.append(width * ratio)
    gap, head = 0.08, 0.35
    total = sum(heights) + gap * len(heights) + head
    drawn = figure(total)
    top = total - head
    drawn.text(0.005, 1 - 0.08 / total, title, va="top", weight="bold", size=10)
    for image, view, width, height in zip(images, canvas.views, widths, heights, strict=True):
        ax = drawn.add_axes((0.05 / WIDTH, (top - height) / total, width / WIDTH, height / total))
        show(ax, image, view.zooms)
        if outline is not None:
            draw_outline(ax, canvas.mosaic(outline, view, crop))
        label_sides(ax, canvas, image, view)
        top -= height + gap
    if bar:
        height = min(sum(heights), 2.6)
        cax = drawn.add_axes(((max(widths) + 0.13) / WIDTH, (total - head - height) / total,
                              0.16 / WIDTH, (height - 0.1) / total))
        colour_bar(cax, bar[0], bar[1], unit)
    return drawn


def show(ax: Axes, image: np.ndarray, zooms: tuple[float, float]) -> None:
    """Draw an RGB or grey image, row 0 at the bottom, pixels of the right shape, no frame."""
    ax.imshow(image, origin="lower", aspect=zooms[1] / zooms[0], interpolation="none",
              cmap="gray", vmin=0, vmax=255)
    ax.set_axis_off()


def label_sides(ax: Axes, canvas: Canvas, image: np.ndarray, view: View) -> None:
    """Write which side is left and which right into the first slice of a mosaic."""
    left, right = LABELS[view.axis]
    tile_w = image.shape[1] / canvas.per_row(view)
    tile_h = image.shape[0] / max(1, -(-len(view.positions) // canvas.per_row(view)))
    y = image.shape[0] - tile_h / 2
    for x, label, side in ((0.5, left, "left"), (tile_w - 1.5, right, "right")):
        ax.text(x, y, label, ha=side, va="center", color="white", size=8)


def draw_outline(ax: Axes, inside: np.ndarray) -> None:
    """Draw the border of a boolean image; straight pieces keep only their end points."""
    from contourpy import contour_generator
    from matplotlib.collections import LineCollection

    lines = []
    for line in contour_generator(z=inside.astype(float)).lines(0.5):
        step = np.diff(np.asarray(line), axis=0)
        turn = step[1:, 0] * step[:-1, 1] != step[1:, 1] * step[:-1, 0]
        lines.append(np.asarray(line)[np.concatenate([[True], turn, [True]])])
    ax.add_collection(LineCollection(lines, colors="#E69F00", linewidths=0.8), autolim=False)


def colour_bar(ax: Axes, limits: Limits, cmap: str, unit: str) -> None:
    """Draw a vertical colour bar from limit to limit; powers of 1000 go to the unit."""
    low, high = limits
    scale, unit = scaled_unit(max(abs(low), abs(high)), unit)
    ax.imshow(np.linspace(0, 1, 128)[:, None], origin="lower", aspect="auto", cmap=cmap,
              extent=(0, 1, low * scale, high * scale), interpolation="none",
              vmin=0, vmax=1)
    ax.set_xticks([])
    ax.yaxis.tick_right()
    ax.locator_params(axis="y", nbins=5, integer=unit == "label")
    ax.tick_params(labelsize=8)
    ax.set_title(unit, fontsize=8, weight="normal", loc="left")


def scaled_unit(most: float, unit: str) -> tuple[float, str]:
    """Find the factor that brings values up to `most` to 1–1000, and the unit with its power.

    Values from 0.01 to 10 000 stay as they are.
    """
    power = 0 if 0.01 <= most < 1e4 or not most > 0 else 3 * int(np.floor(np.log10(most) / 3))
    return 10.0**-power, f"10{str(power).translate(SUPERSCRIPT)} {unit}".strip() if power else unit


def coloured(values: np.ndarray, limits: Limits, cmap: str, mask: np.ndarray) -> np.ndarray:
    """Colour a scalar volume in LEVELS steps from limit to limit: (x, y, z, 3) uint8.

    Black outside the mask, mid-grey where values are not finite.
    """
    table = (mpl.colormaps[cmap](np.linspace(0, 1, LEVELS))[:, :3] * 255).round().astype(np.uint8)
    finite = np.isfinite(values)
    low, high = limits
    scaled = (np.where(finite, values, low) - low) / (high - low)
    out = table[(np.clip(scaled, 0, 1) * (LEVELS - 1)).round().astype(np.uint8)]
    out[~finite] = 128
    out[~mask] = 0
    return out


class Strip(NamedTuple):
    """A canonical volume in colours, (x, y, z, 3), of which `draw_strips` draws a row per view."""

    title: str
    colours: np.ndarray
    bar: tuple[Limits, str, str] | None = None
    outline: np.ndarray | None = None
    gid: str | None = None


def one_row_views(canvas: Canvas, most: int = PER_ROW) -> list[View]:
    """Thin the views of a canvas out to one row each, of at most this many slices."""
    thinned = []
    for view in canvas.views:
        count = min(most, len(view.positions))
        at = ((np.arange(count) + 0.5) * len(view.positions) / count).astype(int)
        thinned.append(View(view.axis, tuple(view.positions[i] for i in at), view.zooms))
    return thinned


def draw_strips(canvas: Canvas, views: Sequence[View], strips: Sequence[Strip]) -> Figure:
    """Draw volumes below one another, each in a row per view under its title, all of one height.

    What belongs to a strip has SVG ids that begin with its gid.
    """
    barred = any(strip.bar for strip in strips)
    room, head, gap = WIDTH - (0.9 if barred else 0.1), 0.28, 0.06
    sizes = []
    for view in views:
        image = canvas.mosaic(canvas.mask, view)
        ratio = image.shape[0] * view.zooms[1] / (image.shape[1] * view.zooms[0])
        width = min(room, room * len(view.positions) / 4, 3.0 / ratio)
        sizes.append((width, width * ratio))
    each = head + sum(height + gap for _, height in sizes)
    total = each * len(strips)
    drawn = figure(total)
    for k, strip in enumerate(strips):
        top = total - k * each
        label = drawn.text(0.005, (top - 0.07) / total, strip.title, va="top", weight="bold",
                           size=10)
        label.set_gid(strip.gid and f"{strip.gid}-label")
        top -= head
        for row, (view, (width, height)) in enumerate(zip(views, sizes, strict=True)):
            ax = drawn.add_axes((0.05 / WIDTH, (top - height) / total, width / WIDTH,
                                 height / total))
            ax.set_gid(strip.gid and f"{strip.gid}-{row}")
            image = canvas.mosaic(strip.colours, view)
            show(ax, image, view.zooms)
            label_sides(ax, canvas, image, view)
            if strip.outline is not None:
                draw_outline(ax, canvas.mosaic(strip.outline, view))
            top -= height + gap
        if strip.bar:
            limits, cmap, unit = strip.bar
            width, height = sizes[0]
            colour_bar(drawn.add_axes(((width + 0.13) / WIDTH, (total - k * each - head - height)
                                       / total, 0.16 / WIDTH, 0.88 * height / total)),
                       limits, cmap, unit)
    return drawn
