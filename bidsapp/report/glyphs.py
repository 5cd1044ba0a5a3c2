"""Glyphs of orientation densities (ODFs).

The glyph of a voxel is the surface whose distance from the centre along n is proportional to the
density along n, seen from outside and coloured by n. Each pixel is computed independently: along
the line of sight through a pixel at (ρ, φ) from the centre, the visible point of the surface is the
one with the smallest angle θ from the viewer at which r(θ, φ) sin θ reaches ρ, since points at one
ρ are nearer to the viewer the smaller θ is.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.patches import Rectangle
from scipy.ndimage import uniform_filter

from bidsapp import sh
from bidsapp.report.canvas import LABELS, WIDTH, Canvas, figure, show, svg

CELL = 32
"""Pixels along the shorter side of a voxel."""

MOST = 32
"""Largest number of voxels along a side of the window, so that glyphs can be distinguished."""

TILTS = 48
"""Steps of θ from 0 to π."""

BLOCK = 32
"""Number of voxels whose surfaces are computed at once, few enough to fit the cache."""

PEAK = 90
"""Percentile of the densities at the peaks of all voxels that is drawn as long as half a voxel. The
peak of a single bundle is many times that of a crossing, which would be a dot if the highest peak
filled the voxel."""

NAMES = ("Sagittal", "Coronal", "Axial")
TOWARDS = (1, -1, 1)
"""Sign of the canonical axis across each plane that points to the viewer."""


@dataclass(frozen=True)
class Cut:
    """A window in one slice: the axis across it, and canonical index ranges along x, y and z."""

    axis: int
    box: tuple[slice, slice, slice]


def densest(amount: np.ndarray, axis: int, zooms: tuple[float, ...]) -> Cut:
    """Find the window across `axis` that holds the largest sum of `amount`.

    The window is a square in mm, cut to the volume, of MOST voxels along the axis of finer voxels.

    Parameters
    ----------
    amount : (x, y, z)
        Canonical volume of what the window should hold, ≥ 0.
    axis : int
        Canonical axis.
    zooms : tuple of float
        Voxel size, mm.
    """
    plane = [a for a in range(3) if a != axis]
    side = MOST * min(zooms[a] for a in plane)
    size = [1 if a == axis else max(1, min(int(side / zooms[a] + 1e-6), amount.shape[a]))
            for a in range(3)]
    means = uniform_filter(amount.astype(np.float64), size, mode="constant")
    best = np.unravel_index(int(means.argmax()), means.shape)
    starts = [min(max(int(b) - n // 2, 0), full - n)
              for b, n, full in zip(best, size, amount.shape, strict=True)]
    x, y, z = (slice(s, s + n) for s, n in zip(starts, size, strict=True))
    return Cut(axis, (x, y, z))


def surfaces(odf: np.ndarray, frame: np.ndarray, cell: tuple[int, int]
             ) -> tuple[np.ndarray, np.ndarray]:
    """Render glyphs.

    Parameters
    ----------
    odf : (voxel, coefficient)
        SH coefficients of densities; a density of 1 is as long as half the shorter side of a cell.
    frame : (3, 3)
        Columns are the world directions of right, up and towards the viewer.
    cell : (int, int)
        Rows and columns of pixels.

    Returns
    -------
    colours : (voxel, row, column, 3) uint8
        Row 0 is at the bottom.
    inside : (voxel, row, column) bool
        Pixels that the glyph covers.
    """
    up, right = ((np.arange(n) - (n - 1) / 2) / (min(cell) / 2) for n in cell)
    rho, phi = np.hypot(up[:, None], right), np.arctan2(up[:, None], right)
    theta = np.pi * (np.arange(TILTS) + 0.5) / TILTS
    near = rho <= 1
    screen = np.stack([np.cos(phi[near])[:, None] * np.sin(theta),
                       np.sin(phi[near])[:, None] * np.sin(theta),
                       np.broadcast_to(np.cos(theta), (int(near.sum()), TILTS))], -1)
    world = (screen @ frame.T).astype(np.float32)
    world /= np.linalg.norm(world, axis=-1, keepdims=True)
    basis = sh.evaluate(sh.l_max_of(odf.shape[1]), torch.from_numpy(world.reshape(-1, 3))).numpy()
    reach = (rho[near][:, None] / np.sin(theta)).astype(np.float32)
    hues = (np.abs(world) * 255).round().astype(np.uint8)
    colours = np.zeros((len(odf), *cell, 3), np.uint8)
    inside = np.zeros((len(odf), *cell), bool)
    for first in range(0, len(odf), BLOCK):
        block = slice(first, first + BLOCK)
        reached = (odf[block].astype(np.float32) @ basis.T).reshape(-1, *reach.shape) >= reach
        inside[block, near] = reached.any(-1)
        colours[block, near] = hues[np.arange(len(hues)), reached.argmax(-1)]
    return colours, inside


def painted(canvas: Canvas, odf: np.ndarray, rows: np.ndarray, background: np.ndarray, cut: Cut
            ) -> np.ndarray:
    """Render a window with its glyphs: (row, column, 3) uint8, row 0 at the bottom.

    Parameters
    ----------
    canvas : Canvas
    odf : (voxel, coefficient)
        As in `surfaces`.
    rows : (x, y, z) int
        Canonical volume of row numbers of `odf`, −1 for no glyph.
    background : (x, y, z, 3) uint8
        Canonical background, shown at half its brightness.
    cut : Cut
    """
    across, up = (a for a in range(3) if a != cut.axis)
    axes = canvas.axes
    frame = np.stack([axes[:, across], axes[:, up], TOWARDS[cut.axis] * axes[:, cut.axis]], 1)
    least = min(canvas.zooms[across], canvas.zooms[up])
    cell = (round(CELL * canvas.zooms[up] / least), round(CELL * canvas.zooms[across] / least))

    def tile(volume: np.ndarray) -> np.ndarray:
        return np.swapaxes(volume[cut.box].squeeze(cut.axis), 0, 1)

    image = (tile(background) // 2).repeat(cell[0], 0).repeat(cell[1], 1)
    index = tile(rows)
    there = np.argwhere(index >= 0)
    glyphs = surfaces(odf[index[index >= 0]], frame, cell)
    for (j, i), colours, inside in zip(there, *glyphs, strict=True):
        patch = image[j * cell[0]:(j + 1) * cell[0], i * cell[1]:(i + 1) * cell[1]]
        patch[inside] = colours[inside]
    return image


def draw(canvas: Canvas, odf: np.ndarray, weight: np.ndarray, with_glyph: np.ndarray,
         background: np.ndarray, title: str, weight_name: str) -> tuple[bytes, str]:
    """Draw glyphs of the most anisotropic windows.

    Parameters
    ----------
    canvas : Canvas
    odf : (voxel, coefficient)
        SH coefficients of densities with an integral of 1 over the sphere.
    weight : (voxel,)
        Map by which they are multiplied; `weight_name` describes it.
    with_glyph : (voxel,) bool
        Voxels that have a glyph.
    background : (x, y, z, 3) uint8
        The map `weight` as a canonical background.
    title, weight_name : str

    Returns
    -------
    svg : bytes
    caption : str
    """
    odf = np.where(with_glyph[:, None], odf * weight[:, None], 0)
    basis = sh.basis(sh.l_max_of(odf.shape[1]), sh.half_grid(59)[0]).T.astype(np.float32)
    peaks = np.concatenate([(odf[i:i + 4096] @ basis).max(1) for i in range(0, len(odf), 4096)])
    peak = float(np.percentile(peaks[with_glyph], PEAK)) if with_glyph.any() else 1.0
    peak = peak if peak > 0 else 1.0
    scaled = odf / np.maximum(peaks, peak)[:, None]
    rows = np.full(canvas.dwi.mask.shape, -1)
    rows[canvas.dwi.mask] = np.where(with_glyph, np.arange(len(odf)), -1)
    rows = canvas.canonical(rows)
    # windows are chosen by the power above degree 0, since isotropic densities show nothing; the
    # small constant breaks the tie where there is none
    power = np.sqrt((odf[:, 1:]**2).sum(1)) + 1e-9
    amount = canvas.canonical(canvas.dwi.unmask(power))
    axes = [v.axis for v in canvas.views if v.axis in (2, 1)] or [canvas.views[0].axis]
    cuts = [densest(amount, axis, canvas.zooms) for axis in sorted(axes, reverse=True)]
    images = [painted(canvas, scaled, rows, background, cut) for cut in cuts]

    side, gap, head = 6.6, 0.08, 0.6
    tall = [side * min(1, i.shape[0] / i.shape[1]) for i in images]
    total = sum(tall) + head * len(cuts)
    page = figure(total)
    top = total
    for cut, image, height in zip(cuts, images, tall, strict=True):
        top -= head + height
        centre = canvas.affine[:3] @ [*((s.start + s.stop - 1) / 2 for s in cut.box), 1]
        page.text(0.005, (top + height + 0.1) / total, f"{title}\n{NAMES[cut.axis]}, "
                  f"{'xyz'[cut.axis]} = {centre[cut.axis]:.0f} mm", va="bottom", weight="bold",
                  size=10)
        wide = height * image.shape[1] / image.shape[0]
        ax = page.add_axes((0.05 / WIDTH, top / total, wide / WIDTH, height / total))
        show(ax, image, (1.0, 1.0))
        for x, label, end in zip((0.01, 0.99), LABELS[cut.axis], ("left", "right"), strict=True):
            ax.text(x, 0.5, label, transform=ax.transAxes, ha=end, va="center", color="white")
        across, up = (a for a in range(3) if a != cut.axis)
        whole = canvas.tile(background, cut.axis, cut.box[cut.axis].start)
        room = WIDTH - side - 0.15 - gap
        ratio = whole.shape[0] * canvas.zooms[up] / (whole.shape[1] * canvas.zooms[across])
        small = min(room, height / ratio)
        where = page.add_axes(((wide + 0.05 + gap) / WIDTH, (top + height - small * ratio) / total,
                               small / WIDTH, small * ratio / total))
        show(where, whole, (canvas.zooms[across], canvas.zooms[up]))
        first = [cut.box[a].start - canvas.box[a].start - 0.5 for a in (across, up)]
        sides = [cut.box[a].stop - cut.box[a].start for a in (across, up)]
        where.add_patch(Rectangle((first[0], first[1]), sides[0], sides[1], fill=False,
                                  edgecolor="#E69F00", linewidth=1.2))
    weight_name = weight_name[0].lower() + weight_name[1:]
    return svg(page), (
        "In each voxel, the distance from the centre is the density along that direction times "
        f"the {weight_name}, on one scale that starts at 0: half a voxel is {peak:.2g} 1/sr, the "
        f"{PEAK}th percentile of all peaks (glyphs with a higher one are drawn as long). Colour: "
        "direction, red left–right, green anterior–posterior, blue inferior–superior, world axes. "
        f"Background: {weight_name}, at half brightness. The window holds the most anisotropic "
        f"voxels; the small picture shows where it lies. {(~with_glyph).mean():.2%} of the voxels "
        "are flagged or have no estimate, and have no glyph.")
