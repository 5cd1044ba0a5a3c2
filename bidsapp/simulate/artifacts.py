"""Simulate the raw images of a scan with the artifacts of a scanner, and their truth.

The head at rest is the scan of `simulate.phantom`. In volume v, its point x is at y = R x + t, and
the EPI shows it along the phase-encoding axis (unit vector p, which includes the sign) at

    φ(x) = y + p T s [h(x) + e(y)],

with the susceptibility field h (Hz), which moves with the head, the eddy-current field e (Hz),
which does not, the total readout time T, so that T (h + e) is a shift in voxels, and the voxel size
s (Andersson et al. 2003, doi:10.1016/S1053-8119(03)00336-7). Nothing is lost: the signal of a cell
of the fine grid spreads over the cell between its displaced edges, so that it gains intensity where
the edges approach each other. The steps are, volume by volume:

1. the signal of the cells for the gradient that the turned head feels, Rᵀ g; scalp is added;
2. the rigid motion, by cubic interpolation on the fine grid, and the receive field at y;
3. the displacement (`transport`);
4. the point spread: that of the phantom; for Gibbs ringing, the truncated Fourier series
   (`fourier_matrix`) replaces the reference site's in the plane of the slices;
5. the loss of slices, the phase of each shot, noise of each coil, zeros in the part of k-space that
   partial Fourier does not acquire, and the magnitude.

The susceptibility field is the dipole field of an air-tissue model in a magnet along z (Marques and
Bowtell 2005, doi:10.1002/cmr.b.20034), less the second-order polynomial that shimming removes.

The phase-encoding axis is y, and the slice axis z; all coordinates are world RAS+ (mm). Nothing is
shared with the code that corrects.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Complex, Float
from scipy import fft, ndimage

from bidsapp.acquisition import Acquisition, PhaseEncoding
from bidsapp.options import PhantomOptions
from bidsapp.simulate import noise
from bidsapp.simulate.anatomy import Atlas
from bidsapp.simulate.fields import HALF_WIDTH, SplineField, stream
from bidsapp.simulate.person import Person
from bidsapp.simulate.phantom import (
    T1_SNR,
    UNIT,
    Grid,
    Head,
    Scan,
    place_head,
    simulate_scan,
)
from bidsapp.simulate.site import FWHM, Site, spread_matrix

ECHO_SPACING = 0.7e-3
"""Effective echo spacing (s)."""

PARTIAL_FOURIER = 0.75
"""Acquired share of k-space with partial Fourier."""

REVERSE = 2
"""Number of b0 volumes with the opposite phase encoding, acquired after the series."""

BINS = 4
"""Bins per fine cell along the phase-encoding axis, in which displaced signal is collected."""

BONE, SCALP = 9.0, 14.0
"""Distances from the brain (mm) at which the scalp begins and ends; bone gives no signal."""

SURFACE = 18.0
"""Distance from the brain (mm) of the surface of the head, where air begins."""

SCALP_S0, SCALP_D, SCALP_T1 = 1.2, 0.4, 1.0
"""Signal of the scalp at b = 0 (that of white matter is 1), its diffusivity (µm²/ms), and its
T1-weighted intensity."""

SHOT_RAMP = 2.0
"""SD of the slopes of a shot's phase (rad per 100 mm) at b = 1000 s/mm²; ∝ √b."""

GRE_ECHO_TIMES = (0.00492, 0.00738)
"""Echo times (s) of the GRE field map."""

GRE_DENSITY = (0.7, 0.8, 1.0)
"""Signal of WM, GM and CSF in the GRE, in multiples of UNIT; that of the scalp is 1."""

LARMOR = 127.74e6
"""Resonance frequency of water at 3 T (Hz)."""

AIR = 9.4e-6
"""Susceptibility of air less that of tissue (SI)."""

FIELD_STEP = 4.0
"""Spacing of the lattice of the susceptibility field (mm)."""

SMOOTH = 5.0
"""SD of the Gaussian (mm) that smooths the border of air and tissue."""

AIR_SPACES = (
    ((0, 86, -10), (18, 5, 11)),  # frontal sinus
    ((0, 46, -60), (12, 22, 14)),  # nasal cavity and ethmoid cells
    ((0, 22, -57), (12, 10, 9)),  # sphenoid sinus
    ((-28, 52, -70), (12, 15, 15)), ((28, 52, -70), (12, 15, 15)),  # maxillary sinuses
    ((-58, -28, -60), (8, 11, 12)), ((58, -28, -60), (8, 11, 12)),  # mastoid cells
    ((-74, -20, -56), (22, 4, 4)), ((74, -20, -56), (22, 4, 4)),  # ear canals
    ((0, 5, -98), (11, 8, 35)),  # pharynx
)
"""Centres and half axes (mm, MNI152) of the ellipsoids that are air."""

FLESH = (((0, 42, -60), (62, 50, 52)), ((0, -32, -105), (64, 74, 78)))
"""Centres and half axes (mm, MNI152) of face and neck."""


@dataclass(frozen=True, eq=False)
class RawScan:
    """Raw images of one scan, and the truth about their artifacts.

    There are n volumes of the series and, after them, m of the opposite phase encoding (b0 only);
    m is 0 without distortion.

    Parameters
    ----------
    scan : Scan
        The same scan without artifacts: grids, nominal table, mask, tissue and truth.
    magnitude : (n, x, y, z) ndarray
        Magnitude of the series.
    phase : (n, x, y, z) ndarray or None
        Its phase (rad), if complex images are simulated.
    encoding, reverse_encoding : PhaseEncoding
        Those of the series and of `reverse`.
    reverse : (m, x, y, z) ndarray
        Magnitude of the b0 volumes with the opposite phase encoding.
    phasediff : (x, y, z) ndarray or None
        Phase difference of the two echoes of a GRE (rad, wrapped to ±π) on the grid of the series;
        the head is at rest. None without distortion.
    gre : (2, x, y, z) ndarray
        Magnitudes of its echoes.
    echo_times : (float, float)
        Their echo times (s).
    t1 : (x, y, z) ndarray
        T1-weighted image on the grid `scan.fine`.
    clean : (n, x, y, z) ndarray
        Noise-free signal of the same site without artifacts, with the head at rest: what a perfect
        correction returns. Its table is `felt`.
    felt : Acquisition
        Table of the series in the frame of the head: its b-vectors are Rᵀ g.
    sigma : (x, y, z) ndarray
        SD of the noise of one real channel.
    field : (x, y, z) ndarray
        Susceptibility field (Hz) of the head at rest.
    rotations, translations : (n + m, 3, 3) and (n + m, 3) ndarray
        R and t (mm) of y = R x + t; those of the first volume are 1 and 0.
    eddy : (n + m, 10) ndarray
        Eddy-current field (Hz): coefficients of `eddy_basis`.
    gradient_response : (3, 10) ndarray
        `eddy` is √(b / 1000 s/mm²) g times this matrix, with the unit vector g of the gradient.
    lost : (n + m, z) ndarray
        Share of the signal that each slice has lost.
    """

    scan: Scan
    magnitude: np.ndarray
    phase: np.ndarray | None
    encoding: PhaseEncoding
    reverse: np.ndarray
    reverse_encoding: PhaseEncoding
    phasediff: np.ndarray | None
    gre: np.ndarray
    echo_times: tuple[float, float]
    t1: np.ndarray
    clean: np.ndarray
    felt: Acquisition
    sigma: np.ndarray
    field: np.ndarray
    rotations: np.ndarray
    translations: np.ndarray
    eddy: np.ndarray
    gradient_response: np.ndarray
    lost: np.ndarray


def simulate_raw(person: Person, site: Site, reference: Site, table: Acquisition, atlas: Atlas,
                 options: PhantomOptions, pose: np.ndarray) -> RawScan:
    """Simulate the raw images of a scan with the artifacts that the options name.

    Parameters
    ----------
    person, site, reference, table, atlas, options, pose
        As in `simulate_scan`.

    Returns
    -------
    RawScan
    """
    scan = simulate_scan(person, site, reference, table, atlas, options, pose)
    names = person.label, site.name
    m = REVERSE if options.has("distortion") else 0
    n, shape = len(table), scan.grid.shape
    acquired = Acquisition(np.append(table.bvals, np.zeros(m)),
                           np.concatenate([table.bvecs, np.zeros((m, 3))]))
    readout = ECHO_SPACING * (shape[1] - 1)
    encodings = PhaseEncoding(1, -1, readout), PhaseEncoding(1, 1, readout)
    rotations, translations = draw_motion(n + m, options, *names)
    response = draw_gradient_response(options, *names)
    eddy = np.sqrt(acquired.bvals / 1000)[:, None] * acquired.bvecs @ response
    lost = draw_losses(acquired, np.any(scan.mask, (0, 1)), options, *names)

    head = place_head(person, atlas, options, pose)
    field = susceptibility_field(person, atlas, options, pose)
    scanner = Scanner(head, scan.grid, site, field, options, person.label)
    felt = replace(acquired, bvecs=np.einsum("vji,vj->vi", rotations, acquired.bvecs))
    signal = head.signal(site, felt, options)
    magnitude = np.empty((n + m, *shape), np.float32)
    phase = np.empty((n, *shape), np.float32) if options.has("complex") else None
    rng = stream(options.random_seed, "artifacts", *names)
    for v in range(n + m):
        shift = encodings[v >= n].sign * readout * site.voxel
        image = scanner.show(signal[v], acquired.bvals[v], rotations[v], translations[v],
                             shift, eddy[v])
        image = image * (1 - lost[v])
        channels = scanner.receive(image, acquired.bvals[v], rng)
        magnitude[v] = np.sqrt((np.abs(channels) ** 2).sum(0))
        if phase is not None and v < n:
            phase[v] = np.angle(channels[0])
    phasediff, gre = (scanner.gradient_echo(rng) if m else
                      (None, np.empty((0, *shape), np.float32)))
    clean = np.stack([scanner.spread(scanner.cells(s), truncated=False) for s in signal[:n]])
    clean *= scanner.level
    return RawScan(
        scan, magnitude=UNIT * magnitude[:n], phase=phase, encoding=encodings[0],
        reverse=UNIT * magnitude[n:], reverse_encoding=encodings[1], phasediff=phasediff,
        gre=UNIT * gre, echo_times=GRE_ECHO_TIMES, t1=UNIT * scanner.t1(rng), clean=UNIT * clean,
        felt=felt[:n], sigma=UNIT * scanner.sigma,
        field=field.at(scan.grid.points)[0].reshape(shape), rotations=rotations,
        translations=translations, eddy=eddy, gradient_response=response, lost=lost)


# --- what is drawn


def draw_motion(n: int, options: PhantomOptions, *names: object
                ) -> tuple[Float[np.ndarray, "n 3 3"], Float[np.ndarray, "n 3"]]:
    """Draw the motion of a head: a random walk with a jump now and then.

    Parameters
    ----------
    n : int
        Number of volumes.
    options : PhantomOptions
        `motion_mm` and `motion_degrees`: largest translation and rotation, which are reached.
    *names : object
        Words that identify the scan.

    Returns
    -------
    rotations : (n, 3, 3) ndarray
    translations : (n, 3) ndarray
        In mm. Those of the first volume are 1 and 0.
    """
    from scipy.spatial.transform import Rotation

    rng = stream(options.random_seed, "motion", *names)
    size = np.where(rng.uniform(size=(n, 1)) < 0.05, 5.0, 1.0)  # of each step
    walk = np.cumsum(size[:, None] * rng.standard_normal((n, 2, 3)), 0)
    walk -= walk[0]
    largest = np.maximum(np.linalg.norm(walk, axis=-1).max(0), 1e-9)
    moves = options.has("motion")
    walk *= (moves * np.array([options.motion_degrees, options.motion_mm]) / largest)[:, None]
    return Rotation.from_rotvec(np.radians(walk[:, 0])).as_matrix(), walk[:, 1]


def draw_gradient_response(options: PhantomOptions, *names: object) -> Float[np.ndarray, "3 10"]:
    """Draw the coefficients of `eddy_basis` (Hz) per component of a gradient of b = 1000 s/mm²."""
    rng = stream(options.random_seed, "eddy", *names)
    size = options.eddy_hz * np.array([0.5, *[1.0] * 3, *[0.5] * 6])
    return options.has("eddy") * size * rng.standard_normal((3, 10))


def draw_losses(table: Acquisition, brain: np.ndarray, options: PhantomOptions, *names: object
                ) -> Float[np.ndarray, "n z"]:
    """Draw the share of the signal that slices lose: half to all, in `options.dropout` of the
    slices with brain, (z,) bool, of weighted volumes."""
    rng = stream(options.random_seed, "dropout", *names)
    shape = len(table), len(brain)
    chosen = rng.uniform(size=shape) < options.dropout
    share = rng.uniform(0.5, 1, shape)
    return np.where(options.has("dropout") & chosen & brain & ~table.b0[:, None], share, 0)


def eddy_basis(points: Float[np.ndarray, "... 3"], centre: Float[np.ndarray, " 3"]
               ) -> Float[np.ndarray, "... 10"]:
    """Compute 1, x, y, z, x², y², z², xy, xz, yz of points, with x, y, z in units of 100 mm from
    the centre of the series' grid."""
    x, y, z = np.moveaxis((points - centre) / 100, -1, 0)
    return np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], -1)


def susceptibility_field(person: Person, atlas: Atlas, options: PhantomOptions, pose: np.ndarray
                         ) -> SplineField:
    """Compute the field of the air around and inside of a head after shimming.

    Susceptibilities are relative to tissue, so that only air has one.

    Parameters
    ----------
    person : Person
    atlas : Atlas
    options : PhantomOptions
        `field_scale`: factor of the field; the field is 0 without distortion.
    pose : (4, 4) ndarray
        Rigid transformation from person to scanner coordinates (mm).

    Returns
    -------
    SplineField
        One field (Hz) in coordinates of the scanner.
    """
    half = int(HALF_WIDTH / FIELD_STEP)
    axis = FIELD_STEP * np.arange(-half, half + 1)
    if not options.has("distortion"):
        return SplineField(np.zeros((1, *[len(axis)] * 3), np.float32), FIELD_STEP)
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    mapped = person.to_atlas((points - pose[:3, 3]) @ pose[:3, :3])
    shape = (len(axis),) * 3
    brain = (atlas.sample(atlas.tissue, mapped).sum(0) > 0.5).reshape(shape)
    distance = ndimage.distance_transform_edt(~brain, sampling=FIELD_STEP)
    tissue = np.clip((SURFACE - distance) / FIELD_STEP + 0.5, 0, 1)
    for ellipsoid in FLESH:
        tissue = np.maximum(tissue, _ellipsoid(mapped, *ellipsoid).reshape(shape))
    for ellipsoid in AIR_SPACES:
        tissue = np.minimum(tissue, 1 - _ellipsoid(mapped, *ellipsoid).reshape(shape))
    tissue = ndimage.gaussian_filter(tissue, SMOOTH / FIELD_STEP)
    relative = dipole_field(AIR * (1 - tissue))
    basis = eddy_basis(points, np.zeros(3)).reshape(*shape, -1)
    shim = np.linalg.lstsq(basis[brain], relative[brain], rcond=None)[0]
    field = options.field_scale * LARMOR * (relative - basis @ shim)
    return SplineField(ndimage.spline_filter(field, output=np.float32)[None], FIELD_STEP)


def dipole_field(susceptibility: Float[np.ndarray, "n n n"]) -> Float[np.ndarray, "n n n"]:
    """Compute the relative change of a magnetic field along z: (1/3 − k_z²/k²) χ in k-space.

    Its mean is 0, and the susceptibility is continued periodically.
    """
    n = len(susceptibility)
    k = fft.fftfreq(n)
    kx, ky, kz = np.meshgrid(k, k, k[:n // 2 + 1], indexing="ij", sparse=True)
    square = kx**2 + ky**2 + kz**2
    square[0, 0, 0] = np.inf
    dipole = 1 / 3 - kz**2 / square
    dipole[0, 0, 0] = 0
    return fft.irfftn(dipole * fft.rfftn(susceptibility), susceptibility.shape)


def _ellipsoid(points: np.ndarray, centre: tuple, half_axes: tuple) -> np.ndarray:
    """Compute the share of an ellipsoid in cells of FIELD_STEP mm at points."""
    half = np.array(half_axes, float)
    radius = np.linalg.norm((points - np.array(centre)) / half, axis=-1)
    return np.clip((1 - radius) * half.min() / FIELD_STEP + 0.5, 0, 1)


# --- what the scanner does


def transport(mass: Float[np.ndarray, "... n"], edges: Float[np.ndarray, "... n+1"], bins: int
              ) -> Float[np.ndarray, "... bins"]:
    """Spread the mass of cells evenly between their displaced edges, and collect it in bins.

    A displaced cell is a box: a step up at its lower edge and a step down at its upper edge, of
    height mass over width. The bins hold the integral over the sum of all steps. Cells may overlap
    or be turned over, which is what happens where a field folds the image.

    Parameters
    ----------
    mass : (…, n) ndarray
    edges : (…, n + 1) ndarray
        Displaced edges of the cells, in widths of a bin from the lower edge of the first bin.
    bins : int
        Number of bins.

    Returns
    -------
    (…, bins) ndarray
        Its sum over the bins is that of the mass that is not displaced beyond them.
    """
    *outer, n = mass.shape
    cells = np.flatnonzero(mass)
    first = cells + cells // n  # index of the lower edge, of which each line has n + 1
    low, high = (np.asarray(edges, np.float64).reshape(-1)[first + i] for i in (0, 1))
    low, high = np.minimum(low, high), np.maximum(low, high)
    high = np.maximum(high, low + 1e-6)
    density = mass.reshape(-1)[cells] / (high - low)
    columns = bins + 2
    steps = np.zeros(mass.size // n * columns)
    for position, height in ((low, density), (high, -density)):
        position = np.clip(position, 0, bins)
        column = position.astype(np.int64)
        part = height * (position - column)
        index = cells // n * columns + column
        steps += np.bincount(index, height - part, len(steps))
        steps += np.bincount(index + 1, part, len(steps))
    return np.cumsum(steps.reshape(*outer, columns), -1)[..., :bins]


def fourier_matrix(centres: Float[np.ndarray, " m"], voxel: float, cells: Float[np.ndarray, " n"],
                   width: float, fwhm: float) -> Float[np.ndarray, "m n"]:
    """Compute the weights of cells in voxels of an image with as many Fourier coefficients.

    The m coefficients of the field of view m voxel, of which those of a cell are
    sinc(k width) exp(−2π² k² SD²) exp(−2πi k x), are summed at the centres of the voxels.

    Parameters
    ----------
    centres : (m,) ndarray
        Voxel centres (mm).
    voxel : float
        Voxel size (mm).
    cells : (n,) ndarray
        Centres of the cells (mm).
    width : float
        Width of the cells (mm).
    fwhm : float
        FWHM of the Gaussian that blurs the object (mm).

    Returns
    -------
    (m, n) ndarray
    """
    m = len(centres)
    k = np.arange(-(m // 2), (m + 1) // 2) / (m * voxel)
    sd = fwhm / np.sqrt(8 * np.log(2))
    transfer = np.sinc(k * width) * np.exp(-2 * np.pi**2 * (k * sd) ** 2) * width / (m * voxel)
    waves = [np.exp(2j * np.pi * np.outer(x, k)) for x in (centres, cells)]
    return ((waves[0] * transfer) @ waves[1].conj().T).real


class Scanner:
    """A head in a scanner, and how its images come about.

    Parameters
    ----------
    head : Head
        At rest.
    grid : Grid
        Grid of the images.
    site : Site
    field : SplineField
        Susceptibility field (Hz) of the head at rest.
    options : PhantomOptions
    label : str
        Label of the person, which with the seed determines phase and scalp.
    """

    def __init__(self, head: Head, grid: Grid, site: Site, field: SplineField,
                 options: PhantomOptions, label: str) -> None:
        self.head, self.grid, self.site, self.options = head, grid, site, options
        self.shape = head.fine.shape
        self.origin, self.steps = head.fine.affine[:3, 3], np.diag(head.fine.affine)[:3]
        self.centre = np.array([(a[0] + a[-1]) / 2 for a in grid.axes])
        self.level = site.level(grid.points).reshape(grid.shape)
        self.sigma = (site.sigma(grid.points).reshape(grid.shape) if np.isfinite(site.snr)
                      else np.zeros(grid.shape))
        self.fine_level = site.level(head.fine.points).reshape(self.shape)
        brain = np.zeros(self.shape, bool)
        brain.reshape(-1)[head.inside] = head.tissue.share.sum(0) > 0.5
        step = head.fine.size
        away = ndimage.distance_transform_edt(~brain, sampling=step) - step / 2
        self.scalp = np.zeros(self.shape, np.float32)
        if options.has("skull"):
            texture = SplineField.draw(stream(options.random_seed, "scalp", label),
                                       np.array([0.2]), 15.0)
            layer = (np.clip((SCALP - away) / step + 0.5, 0, 1)
                     * np.clip((away - BONE) / step + 0.5, 0, 1))
            self.scalp += layer * np.exp(texture.at(head.fine.points)[0].reshape(self.shape))
        self.field = field if options.has("distortion") else None
        content = self.scalp > 0
        content.reshape(-1)[head.inside] = True
        self.away = ndimage.distance_transform_edt(~content, sampling=step)
        self.matrices = {truncated: self._matrices(truncated)
                         for truncated in {False, options.has("gibbs")}}
        self.position = torch.as_tensor((grid.points - self.centre) / 100, dtype=torch.float32)
        slices = np.broadcast_to(np.arange(grid.shape[2]), grid.shape).reshape(-1)
        self.slices = torch.as_tensor(slices.copy())
        self.generator = torch.Generator().manual_seed(int(stream(
            options.random_seed, "phase", label, site.name).integers(2**62)))
        self.background = np.pi * noise.smooth_field(
            self.position, 3, 1, self.generator).numpy().reshape(grid.shape)

    def _matrices(self, truncated: bool) -> list[np.ndarray]:
        """Compute the point spread along each axis; y has BINS per cell."""
        matrices = []
        fine, voxel, fwhm = self.head.fine, self.grid.size, self.site.fwhm
        for i, (centres, cells) in enumerate(zip(self.grid.axes, fine.axes, strict=True)):
            parts = BINS if i == 1 else 1
            width = fine.size / parts
            offsets = width * (np.arange(parts) - (parts - 1) / 2)
            cells = (cells[:, None] + offsets).reshape(-1)
            if truncated and i < 2:
                excess = np.sqrt(max(0.0, fwhm**2 - FWHM**2))  # of sites that blur more
                matrix = fourier_matrix(centres, voxel, cells, width, excess)
            else:
                order = np.argsort(cells)
                matrix = np.empty((len(centres), len(cells)))
                matrix[:, order] = spread_matrix(centres, voxel, cells[order], width, fwhm)
            matrices.append(matrix.astype(np.float32))
        return matrices

    def cells(self, values: Float[np.ndarray, " n"], scalp: float = 0) -> np.ndarray:
        """Fill the fine grid with the values of the brain's cells and of the scalp."""
        image = scalp * self.scalp
        image.reshape(-1)[self.head.inside] += values
        return image

    def spread(self, image: np.ndarray, truncated: bool | None = None) -> np.ndarray:
        """Apply the point spread to values on the fine grid, whose y axis may be divided into BINS
        per cell."""
        if image.shape[1] == self.shape[1]:
            image = np.repeat(image, BINS, 1)
        x, y, z = self.matrices[self.options.has("gibbs") if truncated is None else truncated]
        return np.tensordot(x, y @ (image @ z.T), 1)

    def show(self, signal: np.ndarray, b: float, rotation: np.ndarray, translation: np.ndarray,
             shift: float, eddy: np.ndarray) -> Float[np.ndarray, "x y z"]:
        """Show the head, moved and distorted.

        signal: (n,) of the brain's cells. shift: mm along the y axis per Hz.
        """
        image = self.cells(signal, SCALP_S0 * np.exp(-b / 1000 * SCALP_D))
        reach = np.linalg.norm(translation) + 150 * np.linalg.norm(rotation - np.eye(3), 2)
        near = self.away <= reach + (2 * self.head.fine.size if reach else 0)
        if reach:
            coefficients = ndimage.spline_filter(image, output=np.float32)
            at = (self._rest(self._points(near), rotation, translation) - self.origin) / self.steps
            image = np.zeros_like(image)
            image[near] = ndimage.map_coordinates(coefficients, at.T, order=3, prefilter=False)
        image = image * self.fine_level
        if self.field is None and not eddy.any():
            return self.spread(image)
        needed = np.zeros(np.add(self.shape, (0, 1, 0)), bool)  # edges of cells along y
        needed[:, :-1] |= near
        needed[:, 1:] |= near
        points = self._points(needed) - self.steps * (0, 0.5, 0)
        hertz = eddy_basis(points, self.centre) @ eddy
        if self.field is not None:
            hertz = hertz + self.field.at(self._rest(points, rotation, translation))[0]
        edges = np.zeros(needed.shape) + np.arange(needed.shape[1])[:, None]
        edges[needed] += shift * hertz / self.steps[1]
        mass, edges = (np.moveaxis(BINS * a, 1, -1) for a in (image, edges))
        shown = transport(mass, edges, BINS * self.shape[1]).astype(np.float32)
        return self.spread(np.moveaxis(shown, -1, 1))

    def _points(self, selected: np.ndarray) -> Float[np.ndarray, "n 3"]:
        """World coordinates of the selected cells."""
        return self.origin + self.steps * np.stack(np.nonzero(selected), -1)

    @staticmethod
    def _rest(points: np.ndarray, rotation: np.ndarray, translation: np.ndarray) -> np.ndarray:
        """x = Rᵀ (y − t)."""
        return (points - translation) @ rotation

    def receive(self, image: np.ndarray, b: float, rng: np.random.Generator
                ) -> Complex[np.ndarray, "coil x y z"]:
        """Add phase and noise, and lose what partial Fourier does not acquire.

        With complex images, the coils are combined; otherwise the signal is in the first.
        """
        coils = 1 if self.options.has("complex") else self.site.coils
        partial = self.options.has("partial-fourier")
        channels = np.zeros((coils, *image.shape), np.complex64)
        channels[0] = image
        if self.options.has("complex"):
            shot = noise.shot_phase(
                self.position, self.slices, 1, self.generator, offset=np.pi * (b > 0),
                gradient=SHOT_RAMP * np.sqrt(b / 1000)).numpy().reshape(image.shape)
            channels[0] *= np.exp(1j * (self.background + shot))
        # zeros reduce the noise; its SD in the image is sigma in any case
        sigma = self.sigma / np.sqrt(PARTIAL_FOURIER if partial else 1)
        for real in (channels.real, channels.imag):
            real += sigma * rng.standard_normal(channels.shape, np.float32)
        return zero_fill(channels) if partial else channels

    def gradient_echo(self, rng: np.random.Generator
                      ) -> tuple[Float[np.ndarray, "x y z"], Float[np.ndarray, "2 x y z"]]:
        """Simulate the phase difference (rad) and the magnitudes of a GRE of the head at rest."""
        density = self.cells(np.array(GRE_DENSITY, np.float32) @ self.head.tissue.share, 1.0)
        density *= self.fine_level
        hertz = np.zeros(self.shape, np.float32)
        near = self.away <= 0
        hertz[near] = self.field.at(self._points(near))[0] if self.field else 0
        echoes = []
        for time in GRE_ECHO_TIMES:
            angle = 2 * np.pi * time * hertz
            parts = [self.spread(density * f(angle), truncated=False) for f in (np.cos, np.sin)]
            echo = (parts[0] + 1j * parts[1]) * np.exp(1j * self.background)
            echoes.append(echo + self.sigma * (rng.standard_normal(echo.shape)
                                               + 1j * rng.standard_normal(echo.shape)))
        return (np.angle(echoes[1] * echoes[0].conj()).astype(np.float32),
                np.abs(echoes).astype(np.float32))

    def t1(self, rng: np.random.Generator) -> Float[np.ndarray, "x y z"]:
        """Simulate the T1-weighted image on the fine grid."""
        image = self.cells(self.head.t1, SCALP_T1) * self.fine_level
        if not np.isfinite(self.site.snr):
            return image
        sigma = self.fine_level / (T1_SNR * self.site.snr)
        real, imaginary = sigma * rng.standard_normal((2, *image.shape))
        return np.hypot(image + real, imaginary).astype(np.float32)


def zero_fill(images: np.ndarray) -> np.ndarray:
    """Set the first part of k-space along y that partial Fourier does not acquire to 0.

    Parameters
    ----------
    images : (…, x, y, z) complex ndarray

    Returns
    -------
    (…, x, y, z) ndarray
    """
    n = images.shape[-2]
    k = np.round(fft.fftfreq(n) * n)
    acquired = k >= -np.floor((PARTIAL_FOURIER - 0.5) * n)
    return fft.ifft(fft.fft(images, axis=-2) * acquired[:, None], axis=-2)
