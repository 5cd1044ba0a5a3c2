"""Simulate a scan of a phantom's person at a site, and its truth on the grid of the scan.

A scan is simulated in the scanner's frame (world RAS+ of its images). With the rigid pose y = R x +
t of the head, a point y of a fine grid lies at a(y) in the atlas. The fibre axes there are
(∂a/∂y)⁻¹ v with the atlas' axis v: the head rotates, the b-table does not. In every fine cell

    S = Σ_tissue share s0 e1 Σ_c f_c exp(−ΔTE/T2_c) ∫ ODF exp(−b c(y) B : D_c)

with stick and zeppelin in white and grey matter and free water in CSF. c(y) is actual over nominal
b; it multiplies the diffusivities, which is equivalent. e1 = 1 − exp(−TR/T1), over its value at
the reference site. A separable point spread function maps S to voxels. ΔTE is relative to the
reference site's echo time, so f is a fraction of the signal at that echo time.

The truth of a voxel is computed with the reference site's point spread: the tissue shares; d and f,
averaged over white and grey matter by share; the ODF, averaged over them by share s0; and FA and MD
of the tensor Σ share s0 D̄ / Σ share s0 over all tissues, D̄ = Σ_c f_c ∫ ODF D_c(n) dn, which is the
limit of b → 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy import ndimage

from bidsapp import sh
from bidsapp.acquisition import Acquisition
from bidsapp.options import PhantomOptions
from bidsapp.simulate import noise, odf
from bidsapp.simulate.anatomy import Atlas
from bidsapp.simulate.fields import SplineField, stream
from bidsapp.simulate.forward import Compartment, Protocol, two_compartments
from bidsapp.simulate.person import Person, TissueMaps, tissue_at
from bidsapp.simulate.site import Site, spread_matrix

L_MAX = 8
"""Highest degree of the ODFs."""

S0 = {"wm": 1.0, "gm": 1.25, "csf": 3.0}
"""Signal at b = 0 with the echo and repetition time of the reference site, in multiples of UNIT."""

UNIT = 1000.0
"""Intensity of pure white matter at b = 0 in the images."""

T2 = {"wm": (85.0, 60.0), "gm": (110.0, 65.0), "csf": (1500.0,)}
"""T2 (ms) of stick and zeppelin (in white matter as Veraart et al. 2018,
doi:10.1016/j.neuroimage.2017.09.030), and of water."""

T1 = {"wm": 0.85, "gm": 1.35, "csf": 4.2}
"""T1 (s) at 3 T."""

D_CSF = 3.0
"""Diffusivity of CSF (µm²/ms)."""

BOX = np.array([[-90.0, 90.0], [-126.0, 96.0], [-86.0, 100.0]])
"""Field of view in scanner coordinates (mm)."""

BLOCK = 2**14
"""Fine cells that are simulated at a time."""

T1_LESION = -0.25
"""Relative change of the T1-weighted signal in a lesion."""

T1_SNR = 3.0
"""SNR of the T1-weighted image over that of the DWI."""


@dataclass(frozen=True, eq=False)
class Grid:
    """Voxel centres along the axes of the scanner and voxel size (mm).

    x decreases with the index (radiological storage).
    """

    axes: tuple[np.ndarray, np.ndarray, np.ndarray]
    size: float

    @classmethod
    def over(cls, box: np.ndarray, size: float) -> Grid:
        """Create a grid of `size` mm that covers the (axis, low and high) box, centred on it."""
        axes = []
        for low, high in box:
            n = int(np.ceil((high - low) / size - 1e-6))
            axes.append((low + high) / 2 + size * (np.arange(n) - (n - 1) / 2))
        return cls((axes[0][::-1], axes[1], axes[2]), size)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(map(len, self.axes))

    @property
    def affine(self) -> np.ndarray:
        affine = np.diag([-self.size, self.size, self.size, 1])
        affine[:3, 3] = [a[0] for a in self.axes]
        return affine

    @property
    def points(self) -> Float[np.ndarray, "n 3"]:
        return np.stack(np.meshgrid(*self.axes, indexing="ij"), -1).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class Scan:
    """Images and truth of one person at one site.

    Parameters
    ----------
    grid, fine : Grid
        Grid of the DWI and its maps; grid of the simulated cells, which is that of the T1w.
    signal : (n, x, y, z) ndarray
        Measured signal; pure white matter is near UNIT at b = 0.
    reference : (n, x, y, z) ndarray
        Noise-free signal of the reference site on the same grid, with the same pose and table.
    acquisition : Acquisition
        Nominal b-table.
    mask, lesion : (x, y, z) bool ndarray
    tissue : (3, x, y, z) ndarray
        Shares of TISSUES, with the point spread of the reference site.
    truth : dict
        Maps by name, (x, y, z) or (coefficient, x, y, z), 0 outside of the mask.
    t1, t1_tissue : (x, y, z) and (3, x, y, z) ndarray
        T1-weighted image and shares of TISSUES on its grid, without point spread.
    pose : (4, 4) ndarray
        Rigid transformation from person to scanner coordinates (mm).
    jacobian : float
        Smallest determinant of ∂(atlas)/∂(scanner).
    """

    grid: Grid
    fine: Grid
    signal: np.ndarray
    reference: np.ndarray
    acquisition: Acquisition
    mask: np.ndarray
    lesion: np.ndarray
    tissue: np.ndarray
    truth: dict[str, np.ndarray]
    t1: np.ndarray
    t1_tissue: np.ndarray
    pose: np.ndarray
    jacobian: float


@dataclass(frozen=True, eq=False)
class Head:
    """Tissue of a person in the fine cells of the scanner's frame.

    Parameters
    ----------
    fine : Grid
        Grid of the cells.
    inside : (cell,) bool ndarray
        Whether a cell holds brain; n do.
    tissue : TissueMaps
        Tissue of these n cells, with axes in the scanner's frame.
    jacobian : float
        Smallest determinant of ∂(atlas)/∂(scanner).
    """

    fine: Grid
    inside: np.ndarray
    tissue: TissueMaps
    jacobian: float

    @property
    def points(self) -> Float[np.ndarray, "n 3"]:
        """Centres of the cells that hold brain (mm)."""
        return self.fine.points[self.inside]

    @property
    def t1(self) -> Float[np.ndarray, " n"]:
        """T1-weighted intensity, 0–1."""
        return self.tissue.t1 * (1 + T1_LESION * self.tissue.lesion)

    def signal(self, site: Site, table: Acquisition, options: PhantomOptions
               ) -> Float[np.ndarray, "measurement n"]:
        """Simulate the noise-free signals of a site, in multiples of UNIT."""
        return _Model(self.tissue, table).signal(site, self.points, options)


def draw_pose(options: PhantomOptions, *names: object) -> np.ndarray:
    """Draw the (4, 4) rigid transformation from a person's to the scanner's coordinates.

    Parameters
    ----------
    options : PhantomOptions
        `pose_rotation` and `pose_shift`: SDs of rotation (degrees) and shift (mm) about and along
        each axis. Draws are limited to 2 SD.
    *names : object
        Words that identify the scan; the draw depends on them and the seed.

    Returns
    -------
    (4, 4) ndarray
    """
    from scipy.spatial.transform import Rotation

    rng = stream(options.random_seed, "pose", *names)
    pose = np.eye(4)
    rotation = np.clip(rng.standard_normal(3), -2, 2) * options.pose_rotation
    pose[:3, :3] = Rotation.from_rotvec(np.deg2rad(rotation)).as_matrix()
    pose[:3, 3] = np.clip(rng.standard_normal(3), -2, 2) * options.pose_shift
    return pose


def simulate_scan(person: Person, site: Site, reference: Site, table: Acquisition, atlas: Atlas,
                  options: PhantomOptions, pose: np.ndarray) -> Scan:
    """Simulate a scan and its truth.

    Parameters
    ----------
    person : Person
    site : Site
        Site of the scan.
    reference : Site
        Reference site of the phantom.
    table : Acquisition
        Nominal b-table of the site.
    atlas : Atlas
    options : PhantomOptions
    pose : (4, 4) ndarray
        Rigid transformation from person to scanner coordinates (mm).

    Returns
    -------
    Scan
    """
    head, grid = place_head(person, atlas, options, pose), Grid.over(BOX, site.voxel)
    fine, inside, tissue, points = head.fine, head.inside, head.tissue, head.points
    model = _Model(tissue, table)
    imager = _Imager(inside.reshape(fine.shape), fine, grid, site.fwhm)
    reference_imager = _Imager(inside.reshape(fine.shape), fine, grid, reference.fwhm)
    clean = imager(model.signal(site, points, options))
    reference_signal = clean if site is reference else reference_imager(
        model.signal(reference, points, options))
    rng = torch.Generator().manual_seed(int(stream(
        options.random_seed, "noise", person.label, site.name).integers(2**62)))
    level, sigma = site.level(grid.points), site.sigma(grid.points)
    measured = add_noise(clean * level.reshape(grid.shape), sigma.reshape(grid.shape), site, rng)
    shares = reference_imager(tissue.share)
    mask = shares.sum(0) > 0.5
    t1, t1_tissue = np.zeros(fine.shape, np.float32), np.zeros((3, *fine.shape), np.float32)
    t1.reshape(-1)[inside] = head.t1
    t1_tissue.reshape(3, -1)[:, inside] = tissue.share
    t1_level = site.level(fine.points).reshape(fine.shape)
    t1 = add_noise(t1 * t1_level, t1_level / (T1_SNR * site.snr), site, rng)
    return Scan(
        grid, fine, UNIT * measured, UNIT * reference_signal, table, mask=mask,
        lesion=reference_imager(tissue.lesion[None])[0] > 0.5, tissue=np.clip(shares, 0, 1),
        truth=model.truth(reference_imager, mask), t1=UNIT * t1, t1_tissue=t1_tissue, pose=pose,
        jacobian=head.jacobian)


def place_head(person: Person, atlas: Atlas, options: PhantomOptions, pose: np.ndarray) -> Head:
    """Compute the tissue of a person in the fine cells of the scanner's frame.

    Parameters
    ----------
    person : Person
    atlas : Atlas
    options : PhantomOptions
    pose : (4, 4) ndarray
        Rigid transformation from person to scanner coordinates (mm).

    Returns
    -------
    Head
    """
    fine = Grid.over(BOX, atlas.step)
    atlas_points, inside, jacobian = _map_to_atlas(person, atlas, fine, pose)
    pattern = SplineField.draw(stream(options.random_seed, "pattern"), np.array([0.05, 0.02]), 35.0)
    points = (fine.points[inside] - pose[:3, 3]) @ pose[:3, :3]
    tissue = tissue_at(person, atlas, options, pattern, points, atlas_points, jacobian)
    return Head(fine, inside, tissue, float(np.linalg.det(jacobian).min()))


def _map_to_atlas(person: Person, atlas: Atlas, fine: Grid, pose: np.ndarray
                  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map the points of the fine grid to the atlas.

    The map varies little over twice the atlas' step, so it is evaluated on such a grid and
    interpolated.

    Returns
    -------
    atlas_points : (n, 3) ndarray
        a(y) of the points inside the brain.
    inside : (point,) bool ndarray
        Whether a point of the fine grid is inside the brain; n are.
    jacobian : (n, 3, 3) ndarray
        ∂a/∂y at these points.
    """
    coarse = Grid.over(BOX + 2 * atlas.step * np.array([-1, 1]), 2 * atlas.step)
    points = (coarse.points - pose[:3, 3]) @ pose[:3, :3]
    lattice = person.to_atlas(points).T.reshape(3, *coarse.shape).astype(np.float32)
    slopes = np.stack([np.gradient(lattice, axis, axis=i + 1)
                       for i, axis in enumerate(coarse.axes)], 1)  # atlas axis, scanner axis
    index = ((fine.points - coarse.affine[:3, 3]) / np.diag(coarse.affine)[:3]).T

    def interpolated(fields: np.ndarray, index: np.ndarray) -> np.ndarray:
        return np.stack([ndimage.map_coordinates(f, index, order=1) for f in fields], -1)

    mapped = interpolated(lattice, index)
    inside = atlas.sample(atlas.tissue, mapped).sum(0) > 0.02
    jacobian = interpolated(slopes.reshape(9, *coarse.shape), index[:, inside])
    return mapped[inside], inside, jacobian.reshape(-1, 3, 3)


class _Imager:
    """Point spread from values of fine cells inside the brain (k, n) to images (k, x, y, z)."""

    def __init__(self, inside: np.ndarray, fine: Grid, grid: Grid, fwhm: float) -> None:
        self.box = ndimage.find_objects(inside.astype(np.int8))[0]
        self.inside, self.shape = np.flatnonzero(inside[self.box]), grid.shape
        self.cells = inside[self.box].shape
        self.matrices = []
        for (centres, cells), part in zip(zip(grid.axes, fine.axes, strict=True), self.box,
                                          strict=True):
            ascending = cells[::-1] if cells[0] > cells[-1] else cells
            weights = spread_matrix(centres, grid.size, ascending, fine.size, fwhm)
            weights = weights if ascending is cells else weights[:, ::-1]
            self.matrices.append(np.ascontiguousarray(weights[:, part], np.float32))

    def __call__(self, values: Float[np.ndarray, "k n"]) -> Float[np.ndarray, "k x y z"]:
        x, y, z = self.matrices
        out = np.empty((len(values), *self.shape), np.float32)
        full = np.zeros(self.cells, np.float32)
        for k, value in enumerate(values):
            full.reshape(-1)[self.inside] = value
            out[k] = np.tensordot(x, y @ (full @ z.T), 1)
        return out


def add_noise(clean: np.ndarray, sigma: np.ndarray, site: Site, rng: torch.Generator) -> np.ndarray:
    """Add the noise of the site's coils, of SD sigma per channel and in the unit of the image; an
    infinite SNR leaves the image unchanged."""
    if not np.isfinite(site.snr):
        return clean
    return noise.noncentral_chi(torch.as_tensor(clean, dtype=torch.float32),
                                torch.as_tensor(sigma, dtype=torch.float32), site.coils,
                                rng).numpy()


class _Model:
    """Signal model and truth of n fine cells."""

    def __init__(self, tissue: TissueMaps, table: Acquisition) -> None:
        self.tissue, self.table = tissue, table
        like = torch.zeros((), dtype=torch.float32)
        self.protocol = Protocol(table, L_MAX, like)
        axes = torch.as_tensor(tissue.axes, dtype=torch.float32)
        kappa = {t: torch.full((axes.shape[1],), tissue.kappa[t]) for t in tissue.kappa}
        weight = torch.as_tensor(tissue.weight.T.copy(), dtype=torch.float32)
        wm = torch.zeros(axes.shape[1], sh.size(L_MAX))
        for i in range(weight.shape[1]):
            wm += weight[:, i, None] * odf.watson(axes[i], kappa["wm"], L_MAX)
        empty = weight.sum(1) < 0.5  # without a current the density is isotropic
        wm[empty, 0] = 1 / np.sqrt(4 * np.pi)
        self.odf = {"wm": wm, "gm": odf.watson(axes[3], kappa["gm"], L_MAX)}

    def signal(self, site: Site, points: np.ndarray, options: PhantomOptions) -> np.ndarray:
        """Simulate (measurement, n) signals at scanner points, in multiples of UNIT."""
        delay, b = site.echo_time - options.echo_time, (self.table.bvals / 1000).astype(np.float32)
        s0 = {t: S0[t] * _saturation(site.repetition_time, T1[t])
              / _saturation(options.repetition_time, T1[t]) for t in S0}
        out = np.empty((len(self.table), len(points)), np.float32)
        for start in range(0, len(points), BLOCK):
            rows = slice(start, start + BLOCK)
            c = torch.as_tensor(site.b_factor(points[rows]), dtype=torch.float32)
            csf = self.tissue.share[2, rows] * (s0["csf"] * math.exp(-delay / T2["csf"][0]))
            total = csf * np.exp(-np.outer(b, c.numpy()) * D_CSF)
            for i, name in enumerate(("wm", "gm")):
                level = torch.as_tensor(self.tissue.share[i, rows] * s0[name])
                where = level > 0
                parts = [Compartment(
                    p.fraction * math.exp(-delay / t2) * level[where], p.axial * c[where],
                    p.radial * c[where]) for p, t2 in zip(self._parts(i, rows, where), T2[name],
                                                          strict=True)]
                total[:, where.numpy()] += self.protocol.signal(
                    self.odf[name][rows][where], parts).numpy().T
            out[:, rows] = total
        return out

    def _parts(self, i: int, rows: slice, present: torch.Tensor) -> list[Compartment]:
        d, f = (torch.as_tensor(v[i, rows], dtype=torch.float32)[present]
                for v in (self.tissue.d, self.tissue.f))
        return two_compartments(d, f)

    def truth(self, image: _Imager, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the maps of the truth from the parameters of the forward model."""
        share, d, f = self.tissue.share, self.tissue.d, self.tissue.f
        level = np.stack([share[i] * S0[name] for i, name in enumerate(S0)])
        identity = np.array([1, 0, 0, 1, 0, 1], np.float32)[:, None]  # xx xy xz yy yz zz
        tensor = level[2] * D_CSF * identity
        density = np.zeros((sh.size(L_MAX), share.shape[1]), np.float32)
        for i, name in enumerate(("wm", "gm")):
            coefficients = self.odf[name].numpy().T
            density += level[i] * coefficients
            radial = (1 - f[i]) ** 2 * d[i]  # D̄ without dispersion: (1 − f) zeppelin + f stick
            tensor += level[i] * (radial * identity
                                  + (d[i] - radial) * (_second_moments().T @ coefficients))
        rows = [share[:2].sum(0), (share[:2] * d).sum(0), (share[:2] * f).sum(0), level.sum(0)]
        maps = np.maximum(image(np.vstack([*rows, tensor, density]))[:, mask], [[1e-6]] * 4
                          + [[-np.inf]] * (6 + len(density)))
        mean = (maps[4:10] / maps[3]).T
        values = np.linalg.eigvalsh(mean[:, [0, 1, 2, 1, 3, 4, 2, 4, 5]].reshape(-1, 3, 3))
        md = values.mean(-1)
        fa = np.sqrt(1.5 * ((values - md[:, None]) ** 2).sum(-1) / (values**2).sum(-1))
        scale = np.maximum(maps[10] * np.sqrt(4 * np.pi), 1e-6)
        truth = {"diffusivity": maps[1] / maps[0], "neuritefraction": maps[2] / maps[0],
                 "odf": maps[10:] / scale, "fa": fa, "md": md / 1000}
        out = {}
        for key, value in truth.items():
            out[key] = np.zeros((*value.shape[:-1], *mask.shape), np.float32)
            out[key][..., mask] = value
        return out


def _saturation(repetition_time: float, t1: float) -> float:
    """Compute the longitudinal magnetisation before excitation, over equilibrium (times in s)."""
    return 1 - math.exp(-repetition_time / t1)


def _second_moments() -> np.ndarray:
    """Compute the (coefficient, 6) matrix from an ODF to ∫ ODF n nᵀ dn (xx xy xz yy yz zz)."""
    points, weights = sh.quadrature(L_MAX + 2)
    i, j = np.triu_indices(3)
    return sh.basis(L_MAX, points).T @ (weights[:, None] * points[:, i] * points[:, j])
