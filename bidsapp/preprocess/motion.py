"""Head motion, eddy currents and outlier slices of a diffusion series.

Each volume is registered to its prediction from all others, which has its contrast: for weighted
volumes the leave-one-out prediction of a Gaussian process over b-tensors (`bidsapp.gp`), for b0
volumes the mean of the others. With S_v(x) the intensity of volume v at the points x of the
reference (`bidsapp.preprocess.model`) and P_v(x) its prediction, a Gauss–Newton step solves

    min_δ Σ_x w_v(x) [S_v(x) + A_v(x) δ − γ_v(x) P_v(x)]²,    A_v = ∂S_v / ∂(motion, field),

for 6 rigid and up to 9 field parameters, with a gain γ_v that is constant in blocks of the image:
errors of the predictions are smooth, so that they should not move the volume. A_v is built from the
gradient of P_v, in which the noise is averaged. P is linear in S, P = W S; a misalignment u of the
volumes therefore appears in the steps as δ = (1 − W) u. W is symmetric in the sign of the gradient,
while the field of eddy currents changes with it: the part of the field that is linear in the
gradient is fitted to all steps at once, and the rest has a prior about it. The rigid motion between
the b0 and the weighted volumes is the mean of a registration of the b0 volumes to their regression
on the weighted ones, and of what the order of the scan says.

Along the phase encoding the constant of the field looks like a translation. The positions of all
volumes along it are therefore one series (`_split_series`): a random walk of the head through b0
and weighted volumes, plus the field, plus an error that all weighted volumes share, that of the
registration of b0 to weighted volumes. The b0 volumes have no field and no such error.

(Andersson and Sotiropoulos 2015, 2016, doi:10.1016/j.neuroimage.2015.07.067 and
doi:10.1016/j.neuroimage.2015.10.019; outlier slices after Andersson et al. 2016,
doi:10.1016/j.neuroimage.2016.06.058)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float

from bidsapp.acquisition import Acquisition, PhaseEncoding
from bidsapp.blocks import one_thread
from bidsapp.gp import GaussianProcess
from bidsapp.preprocess.model import EDDY_TERMS, Geometry, eddy_basis, eddy_basis_along
from bidsapp.registration.geometry import transform_points

SMOOTHING = (8.0, 5.0, 3.0, 2.0, 0.0)
"""FWHM by which the volumes are smoothed in each pass, mm."""

STEPS = 2
"""Gauss–Newton steps of each pass."""

MAX_POINTS = 30_000
"""Largest number of voxels that are compared."""

HP_POINTS = 5_000
"""Number of voxels from which the hyper-parameters of the Gaussian process are estimated."""

SHARED = 0.3
"""Share of the misalignment of the predictions of weighted volumes that is taken back; of those of
b0 volumes all is."""

PRIOR_SHIFT, PRIOR_ANGLE, PRIOR_VOXELS = 10.0, 0.2, 5.0
"""SD of a step of translation (mm) and of rotation (rad), and of the shift (voxels) by which each
term of the field depends on the gradient at 100 mm from the centre. They stop only what the images
do not determine."""

EDDY_SPREAD = 0.03
"""SD of the shift (voxels) by each term of the field at 100 mm from the centre, about its part that
is linear in the gradient."""

TURN_RADIUS, LEAST_STEP, START = 50.0, 0.02, 10.0
"""To tell the constant of the field from motion: radius (mm) at which rotations count as steps of
the head, smallest SD of a step (mm), and SD of where the head is first (mm)."""

STEP_SPREAD = 0.5
"""SD of the logarithm of the ratio κ between steps along the phase encoding and other steps."""

LINEAR_FIELD = 30.0
"""SD of the constant of the field by the gradient of the largest b-value, Hz."""

FLOOR = 0.3
"""Floor of the variance of a voxel's residuals, relative to its mean over the voxels."""

CONTRAST_ANGLE, CONTRAST_SHIFT = 0.005, 0.4
"""SD of the error of a registration of b0 to weighted volumes by the images, rad and mm. On two
real series of 20 × b 2500 whose first volume is the b0, the images placed the weighted volumes 0.24
and 0.41 mm, 0.14° and 0.37° from where the order of the scan does."""

BLOCK_SIZE = 15.0
"""Edge of the blocks over which residuals may be correlated, mm."""

LINEAR_MIN, QUADRATIC_MIN = 6, 12
"""Minimum number of weighted volumes for the linear and for the quadratic terms of the field."""

OUTLIER_Z = 4.0
"""A slice is an outlier if its relative difference from the prediction is below the negative of
this number of robust SDs of its shell."""

OUTLIER_LOSS = 0.05
"""Smallest relative loss of signal of an outlier slice."""

MIN_AREA = 3000.0
"""Minimum area of the mask in a slice that is assessed, mm². In smaller ones the edge of the brain
dominates, and with it what is left of motion."""

MIN_SHELL = 6
"""Minimum number of volumes of a shell that has an SD of its own; smaller ones share theirs."""

SLICES_AT_ONCE = 8
"""Number of outlier slices that are predicted at once, which bounds the memory."""


@dataclass(frozen=True, eq=False)
class MotionEstimate:
    """Motion, eddy currents and outlier slices of a series of n volumes.

    Parameters
    ----------
    geometry : Geometry
        Position of the reference in each volume. The reference is the first b0 volume, or the
        first volume if there is none.
    acquisition : Acquisition
        The gradient table in the frame of the head, n → Rᵀ n.
    outliers : (slice, n) bool
        Slices that are replaced by their prediction.
    z : (slice, n)
        Relative difference from the prediction in robust SDs of the shell; NaN if not assessed.
    slice_axis : int
        Voxel axis of the slices.
    eddy_terms : int
        Number of coefficients of the field that were fitted: 0, 4 (linear) or 10 (quadratic).
    notices : tuple of str
        What was left out, and why.
    points : (points, 3)
        Points of the reference that were compared, world mm.
    """

    geometry: Geometry
    acquisition: Acquisition
    outliers: np.ndarray
    z: np.ndarray
    slice_axis: int
    eddy_terms: int
    notices: tuple[str, ...]
    points: np.ndarray


@one_thread()
def estimate(volumes: Sequence[np.ndarray], acquisition: Acquisition,
             encodings: Sequence[PhaseEncoding | None], affine: Float[np.ndarray, "4 4"],
             mask: Bool[np.ndarray, "x y z"], field: Float[np.ndarray, "x y z"] | None = None, *,
             device: str = "cpu", slice_axis: int = 2, smoothing: Sequence[float] = SMOOTHING
             ) -> MotionEstimate:
    """Estimate the motion, the field of eddy currents and the outlier slices of a series.

    Parameters
    ----------
    volumes : sequence of n arrays (x, y, z)
        The volumes in the order of the scan; of complex ones the magnitude is used.
    acquisition : Acquisition
        Of the n volumes, in the frame of the scanner.
    encodings : sequence of PhaseEncoding or None
        Phase encoding of each volume. Without one, or without its readout time, eddy currents are
        left out.
    affine : (4, 4)
        Voxel to world RAS+, mm.
    mask : (x, y, z) bool
        The brain, on the reference grid.
    field : (x, y, z), optional
        Susceptibility field at the position of the reference, Hz.
    device : str
        Device of the computation.
    slice_axis : int
        Voxel axis of the slices.
    smoothing : sequence of float
        FWHM of each pass, mm.

    Returns
    -------
    MotionEstimate

    Raises
    ------
    ValueError
        The numbers of volumes, measurements and encodings differ, or the mask is empty.
    numpy.linalg.LinAlgError
        The estimation diverged.
    """
    if not len(volumes) == len(acquisition) == len(encodings) or not mask.any():
        raise ValueError(f"{len(volumes)} volumes, {len(acquisition)} measurements, "
                         f"{len(encodings)} encodings; mask of {mask.sum()} voxels")
    head = _Head(volumes, acquisition, tuple(encodings), affine, mask, field, device, slice_axis)
    b0, weighted = np.flatnonzero(acquisition.b0), np.flatnonzero(~acquisition.b0)
    if len(b0) > 1:
        for fwhm in smoothing:
            head.load(b0, fwhm)
            head.align(b0, np.zeros(0, int))
            head.refer_to(int(b0[0]), b0)
        head.place_between(b0, weighted)
    terms, notices = _terms(acquisition, encodings)
    if len(weighted) > 1:
        for fwhm in smoothing:
            head.load(np.r_[b0, weighted], fwhm)
            head.align(weighted, terms)
            if len(b0):
                head.anchor(b0, weighted, terms)
            if len(terms):
                head.separate()
            if not len(b0):
                head.refer_to(0, weighted)
    elif len(weighted):
        notices.append("The only weighted volume was not registered: there is no other to predict "
                       "it from.")
    head.assess_slices([g for g in (b0, weighted) if len(g) > 1])
    geometry = head.geometry()
    return MotionEstimate(
        geometry, acquisition.rotated(np.swapaxes(geometry.rotations, 1, 2)), head.outliers,
        head.z, slice_axis,
        len(terms) + 1 if len(terms) else 0, tuple(notices), head.points)


@one_thread()
def replace_outliers(volumes: Sequence[np.ndarray], estimated: MotionEstimate
                     ) -> tuple[list[np.ndarray], np.ndarray]:
    """Replace the outlier slices of a series by their predictions from the other volumes.

    Each voxel of such a slice is predicted from the volumes of its kind (b0 or weighted) that show
    the same point of the head in a slice that is no outlier. Without such volumes it stays. Of
    complex volumes the magnitude is replaced.

    Parameters
    ----------
    volumes : sequence of n arrays (x, y, z)
        The volumes.
    estimated : MotionEstimate
        Their motion and outlier slices.

    Returns
    -------
    list of n arrays (x, y, z)
        Volumes without outliers are those that were given, not copies.
    (slice, n) bool
        Slices that were replaced.
    """
    geometry, axis = estimated.geometry, estimated.slice_axis
    result, replaced = list(volumes), np.zeros_like(estimated.outliers)
    table, count = estimated.acquisition, estimated.outliers.shape[0]
    for index in (np.flatnonzero(table.b0), np.flatnonzero(~table.b0)):
        lost = [(k, v) for v in index.tolist()
                for k in np.flatnonzero(estimated.outliers[:, v]).tolist()]
        if not lost or len(index) < 2:
            continue
        process = GaussianProcess.fit(_voxels_of(volumes, estimated, index), table[index])
        for first in range(0, len(lost), SLICES_AT_ONCE):
            part = lost[first:first + SLICES_AT_ONCE]
            points = [_slice_points(geometry, v, axis, k) for k, v in part]
            sizes = np.cumsum([0] + [len(x) for x in points])
            signal, slices = _show(volumes, geometry, index, np.concatenate(points), axis)
            for (k, v), low, high in zip(part, sizes[:-1], sizes[1:], strict=True):
                near = np.abs(slices[:, low:high, None] - np.arange(count)) < 1
                bad = (near & estimated.outliers.T[index][:, None]).any(-1)
                use = (bad.mean(1) < 0.5) & (index != v)
                if not use.any():
                    continue
                weights = process.predict(table[[v]], use).weights[0]
                factor = geometry.coordinates(v, points[part.index((k, v))])[1]
                value = weights @ signal[:, low:high] / np.maximum(factor, 0.1)
                # a real part that was made of complex data has values below 0, which are noise
                if np.iscomplexobj(volumes[v]) or volumes[v].min() >= 0:
                    value = np.maximum(value, 0)
                _put(result, volumes, v, axis, k, value)
                replaced[k, v] = True
    return result, replaced


def _real(volume: np.ndarray) -> np.ndarray:
    """float32: the magnitude of a complex volume; a real one as it is, values below 0 included."""
    return (np.abs(volume) if np.iscomplexobj(volume) else volume).astype(np.float32, copy=False)


def _slice_points(geometry: Geometry, v: int, axis: int, k: int) -> np.ndarray:
    """(voxel, 3) points of the reference that the voxels of a slice show."""
    shape = list(geometry.shape)
    shape[axis] = 1
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1).reshape(-1, 3)
    index[:, axis] = k
    return geometry.reference_points(v, transform_points(geometry.affine, index))


def _show(volumes: Sequence[np.ndarray], geometry: Geometry, index: np.ndarray, points: np.ndarray,
          axis: int) -> tuple[np.ndarray, np.ndarray]:
    """(n, points): signals of volumes at points of the reference, and the slices there."""
    from scipy.ndimage import map_coordinates

    signal, slices = np.empty((2, len(index), len(points)), np.float32)
    field = geometry.field_at(points)
    for i, v in enumerate(index.tolist()):
        at, factor = geometry._displace(v, points, *field)
        signal[i] = factor * map_coordinates(_real(volumes[v]), at.T, order=1, mode="nearest")
        slices[i] = at[:, axis]
    return signal, slices


def _voxels_of(volumes: Sequence[np.ndarray], estimated: MotionEstimate, index: np.ndarray
               ) -> np.ndarray:
    """(voxel, n) signals at some points of the head, for the hyper-parameters."""
    points = estimated.points[:: max(1, len(estimated.points) // HP_POINTS)]
    return _show(volumes, estimated.geometry, index, points, 0)[0].T


def _put(replaced: list[np.ndarray], volumes: Sequence[np.ndarray], v: int, axis: int, k: int,
         magnitude: np.ndarray) -> None:
    """Replace the magnitude of a slice in a copy of its volume."""
    if replaced[v] is volumes[v]:
        replaced[v] = np.array(volumes[v])
    target = np.moveaxis(replaced[v], axis, 0)[k]
    value = magnitude.reshape(target.shape)
    target[...] = value * np.exp(1j * np.angle(target)) if np.iscomplexobj(target) else value


class _Head:
    """State of the estimation: the position of the head in each volume, about its centre.

    y = R (x − c) + c + s, so that the translation is t = c + s − R c.
    """

    def __init__(self, volumes: Sequence[np.ndarray], acquisition: Acquisition,
                 encodings: tuple[PhaseEncoding | None, ...], affine: np.ndarray,
                 mask: np.ndarray, field: np.ndarray | None, device: str, slice_axis: int) -> None:
        n, shape = len(volumes), mask.shape
        self.volumes, self.acquisition, self.encodings = volumes, acquisition, encodings
        self.affine, self.mask_shape = affine, shape
        self.device, self.slice_axis = device, slice_axis
        voxels = np.argwhere(mask)
        in_slice = np.delete(affine[:3, :3], slice_axis, axis=1)
        self.area_per_point = max(1.0, len(voxels) / MAX_POINTS) \
            * float(np.linalg.norm(np.cross(*in_slice.T)))
        keep = np.random.default_rng(0).permutation(len(voxels))[:MAX_POINTS]
        self.points = transform_points(affine, voxels[np.sort(keep)].astype(float))
        self.centre = self.points.mean(0)
        self.rotation, self.shift = np.tile(np.eye(3), (n, 1, 1)), np.zeros((n, 3))
        self.eddy, self.eddy_slope = np.zeros((n, EDDY_TERMS)), np.zeros((3, EDDY_TERMS))
        blocks = np.floor((self.points - self.points.min(0)) / BLOCK_SIZE).astype(int)
        self.blocks = torch.from_numpy(np.unique(
            blocks, axis=0, return_inverse=True)[1].reshape(-1)).to(device)
        self.n_blocks = int(self.blocks.max()) + 1
        self.outliers = np.zeros((shape[slice_axis], n), bool)
        self.z = np.full((shape[slice_axis], n), np.nan)
        self.rest = Geometry.static(affine, shape, encodings, field)
        self.at_field = self.rest.field_at(self.points)
        self.images: dict[int, torch.Tensor] = {}

    def geometry(self) -> Geometry:
        t = self.centre + self.shift - self.rotation @ self.centre
        return replace(self.rest, rotations=self.rotation, translations=t, eddy=self.eddy)

    def load(self, index: np.ndarray, fwhm: float) -> None:
        """Compute spline coefficients of volumes smoothed by a Gaussian."""
        from scipy.ndimage import gaussian_filter, spline_filter

        sigma = fwhm / 2.355 / np.linalg.norm(self.affine[:3, :3], axis=0)
        self.images.clear()
        for v in index:
            image = _real(self.volumes[v])
            image = gaussian_filter(image, sigma, mode="nearest") if fwhm else image
            self.images[v] = torch.from_numpy(np.pad(
                spline_filter(image, 3, np.float32, mode="mirror"), 2, mode="reflect")
            ).to(self.device)

    def sample(self, index: np.ndarray, points: np.ndarray | None = None) -> _Sampled:
        """Sample volumes where they show the points of the reference."""
        geometry = self.geometry()
        points = self.points if points is None else points
        at_field = self.at_field if points is self.points else self.rest.field_at(points)
        last = np.array(self.mask_shape) - 1
        n, count = len(index), len(points)
        signal = torch.empty((n, count), device=self.device)
        gradient = torch.empty((n, 3, count), device=self.device)
        inside = torch.empty((n, count), dtype=torch.bool, device=self.device)
        slices = np.empty((n, count), np.float32)
        for i, v in enumerate(index.tolist()):
            at, factor = geometry._displace(v, points, *at_field)
            scale = torch.from_numpy(factor.astype(np.float32)).to(self.device)
            value, slope = _interpolate(self.images[v], torch.from_numpy(
                at.clip(0, last).T.astype(np.float32)).to(self.device))
            # ∂/∂x of the head: Rᵀ times that in the scanner, A⁻ᵀ times that of the voxels
            to_head = self.rotation[v].T @ np.linalg.inv(self.affine)[:3, :3].T
            signal[i] = value * scale
            gradient[i] = torch.from_numpy(to_head.astype(np.float32)).to(self.device) \
                @ slope * scale
            inside[i] = torch.from_numpy(
                np.all((at >= -0.5) & (at <= last + 0.5), axis=1)).to(self.device)
            slices[i] = at[:, self.slice_axis]
        return _Sampled(signal, gradient, inside, slices)

    def weights(self, index: np.ndarray, sampled: _Sampled) -> torch.Tensor:
        """(n, n) W of the predictions P = W S."""
        n = len(index)
        if self.acquisition.b0[index].all():
            w = (np.ones((n, n)) - np.eye(n)) / (n - 1)
        else:
            table = self.acquisition[index].rotated(np.swapaxes(self.rotation[index], 1, 2))
            step = max(1, len(self.points) // HP_POINTS)
            w = GaussianProcess.fit(sampled.signal[:, ::step].T.cpu().numpy(),
                                    table).leave_one_out().weights
        return torch.from_numpy(w.astype(np.float32)).to(self.device)

    def predict(self, index: np.ndarray, sampled: _Sampled
                ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Predict the volumes: W, P, and the voxels of each that can be trusted.

        The values in outlier slices are replaced by predictions first.
        """
        w = self.weights(index, sampled)
        good = sampled.inside & ~torch.from_numpy(self._in_outliers(index, sampled.slices)
                                                  ).to(self.device)
        filled = sampled.signal
        for _ in range(3 if not good.all() else 1):
            predicted = w @ filled
            filled = torch.where(good, sampled.signal, predicted)
        return w, predicted, good

    def align(self, index: np.ndarray, terms: np.ndarray) -> None:
        """Register volumes to their predictions by Gauss–Newton steps."""
        for _ in range(STEPS):
            sampled = self.sample(index)
            w, predicted, good = self.predict(index, sampled)
            self._find_outliers(index, sampled, predicted)
            n = len(index)
            slope = (w @ sampled.gradient.reshape(n, -1)).reshape(n, 3, -1)
            trust = self._trust(index, sampled, predicted, good)
            normal, right = zip(*(
                self._normal(v, sampled.signal[i], predicted[i], slope[i], trust[i], terms)
                for i, v in enumerate(index.tolist())), strict=True)
            shared = w.cpu().numpy().astype(float)
            if not self.acquisition.b0[index].all():
                # W of the gradients, each relative to that of its volume
                size = slope.square().mean((1, 2)).sqrt().cpu().numpy().astype(float)
                shared *= size / size[:, None]
            delta = self._solve(index, np.stack(normal), np.stack(right), shared,
                                terms)
            self._move(index, delta, terms)

    def _trust(self, index: np.ndarray, sampled: _Sampled, predicted: torch.Tensor,
               good: torch.Tensor) -> torch.Tensor:
        """(n, points) root of the weights w: 1 over the root of the mean square residual of a voxel
        over the volumes of its shell, plus FLOOR times the mean of this over the voxels."""
        squares = torch.where(good, sampled.signal - predicted, 0).square()
        trust = torch.zeros_like(squares)
        for group in self._groups(index):
            rows = torch.from_numpy(group).to(self.device)
            mean = squares[rows].sum(0) / good[rows].sum(0).clamp(min=1)
            trust[rows] = (mean + FLOOR * mean.mean()).rsqrt() * good[rows]
        return trust

    def _normal(self, v: int, signal: torch.Tensor, predicted: torch.Tensor, slope: torch.Tensor,
                good: torch.Tensor, terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Normal equations of translation (mm), rotation (rad) and eddy terms (Hz): H C⁻¹ H and
        H C⁻¹ Aᵀ(P − S), with H = AᵀA and C the covariance of Aᵀ(P − S).

        Residuals of neighbouring voxels are correlated, since the prediction has errors of its own.
        C is therefore estimated from sums over blocks of the image. H C⁻¹ H is the precision of the
        least-squares estimate.
        """
        per_hertz = self.rest.shift_per_hertz(v)
        y = (self.points - self.centre) @ self.rotation[v].T + self.shift[v]
        rotation, arm, along = (torch.from_numpy(a.astype(np.float32)).to(self.device)
                                for a in (self.rotation[v], y.T, per_hertz))
        g = rotation @ slope
        columns = [g, torch.linalg.cross(arm, g, dim=0)]
        if len(terms):
            basis, derivative = (
                torch.from_numpy(b[:, terms].T.astype(np.float32)).to(self.device)
                for b in (eddy_basis(y + self.centre, self.rest.centre),
                          eddy_basis_along(y + self.centre, self.rest.centre, per_hertz)))
            columns.append((along @ g) * basis + predicted * derivative)
        a, difference = self._without_local_gain(
            torch.cat(columns) * good, (predicted - signal) * good, predicted * good)
        normal = (a @ a.T).double().cpu().numpy()
        right = (a @ difference).double().cpu().numpy()
        _require_finite(normal, right)
        fit = np.linalg.lstsq(normal, right, rcond=1e-10)[0]
        rest = difference - torch.from_numpy(fit.astype(np.float32)).to(self.device) @ a
        scores = torch.zeros((len(a), self.n_blocks), device=self.device)
        scores.index_add_(1, self.blocks, a * rest)
        scatter = (scores @ scores.T).double().cpu().numpy()
        independent = float(rest.square().mean()) * normal
        information = np.linalg.solve(scatter + independent + 1e-9 * np.trace(independent)
                                      * np.eye(len(a)), np.column_stack([normal, right]))
        return normal @ information[:, :-1], normal @ information[:, -1]

    def _without_local_gain(self, columns: torch.Tensor, difference: torch.Tensor,
                            predicted: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Project the columns of A and P − S onto what no gain of P in a block can explain."""
        rows = torch.cat([columns, difference[None], predicted[None]])
        products = torch.zeros((len(rows), self.n_blocks), device=self.device)
        products.index_add_(1, self.blocks, rows * predicted)
        gain = products[:-1] / products[-1].clamp(min=1e-12)
        rows = rows[:-1] - gain[:, self.blocks] * predicted
        return rows[:-1], rows[-1]

    def _solve(self, index: np.ndarray, normal: np.ndarray, right: np.ndarray,
               shared: np.ndarray, terms: np.ndarray) -> np.ndarray:
        """Solve for the steps of all volumes, (n, 6 + terms).

        The field of eddy currents has the prior mean `eddy_slope`ᵀ q, linear in the gradient
        q = √b n, and the prior SD EDDY_SPREAD. A residual field e of the volumes appears in their
        steps as (1 − W) e; a change of the slope is thus fitted to the steps with the regressors
        (1 − W) q and (1 − W) 1, and weighted by the precision of the steps.
        """
        n, k = len(index), len(terms)
        rigid = np.arange(6)
        precision = np.zeros((n, 6 + k))
        precision[:, :6] = 1 / np.r_[[PRIOR_SHIFT] * 3, [PRIOR_ANGLE] * 3]**2
        target = np.zeros((n, 6 + k))
        if k:
            field = slice(6, 6 + k)
            readout = np.array([self._readout(v) for v in index.tolist()])
            q = self._gradients(index)
            x = (np.eye(n) - shared) @ np.column_stack([np.ones(n), q])
            inner = np.linalg.solve(
                normal[:, rigid[:, None], rigid]
                + precision[:, rigid, None] * np.eye(6),
                np.concatenate([normal[:, rigid, field], right[:, rigid, None]], -1))
            outer = normal[:, field, rigid] @ inner
            reduced = normal[:, field, field] - outer[..., :k]
            reduced_right = right[:, field] - outer[..., k]
            system = np.einsum("vi,vj,vkl->ikjl", x, x, reduced).reshape(4 * k, 4 * k)
            system += np.eye(4 * k) * (np.mean(readout) / PRIOR_VOXELS)**2
            beta = np.linalg.solve(system, np.einsum("vi,vk->ik", x, reduced_right).ravel())
            change = beta.reshape(4, k)[1:]
            self.eddy_slope[:, terms] += change
            right = right + np.einsum("vij,vj->vi", normal[:, :, field], shared @ q @ change)
            precision[:, field] = (readout[:, None] / EDDY_SPREAD)**2
            target[:, field] = (q @ self.eddy_slope - self.eddy[index])[:, terms]
        delta = np.linalg.solve(normal + precision[:, :, None] * np.eye(6 + k),
                                (right + precision * target)[..., None])[..., 0]
        if self.acquisition.b0[index].all():  # 1 − W has the null vector 1: all move together
            rigid_steps = np.linalg.pinv(np.eye(n) - shared) @ delta[:, :6]
        else:
            rigid_steps = np.linalg.solve(np.eye(n) - SHARED * shared, delta[:, :6])
        delta[:, :6] = rigid_steps - rigid_steps.mean(0)  # the frame is found otherwise
        return delta

    def _gradients(self, index: np.ndarray) -> np.ndarray:
        """(n, 3) q = √b n, relative to the largest √b."""
        bvals = self.acquisition.bvals
        return np.sqrt(bvals[index] / bvals.max())[:, None] * self.acquisition.bvecs[index]

    def _readout(self, v: int) -> float:
        encoding = self.encodings[v]
        return (encoding.readout or 0.0) if encoding is not None else 0.0

    def _move(self, index: np.ndarray, delta: np.ndarray, terms: np.ndarray) -> None:
        """Add a step to the positions."""
        from scipy.spatial.transform import Rotation

        for v, d in zip(index, delta, strict=True):
            turn = Rotation.from_rotvec(d[3:6]).as_matrix()
            self.rotation[v] = turn @ self.rotation[v]
            self.shift[v] = turn @ self.shift[v] + d[:3]
            self.eddy[v, terms] += d[6:]

    def separate(self) -> None:
        """Tell the constant of the field from a translation of the head along the phase encoding,
        and put the weighted volumes where this translation and the b0 volumes have them."""
        from scipy.spatial.transform import Rotation

        b0 = self.acquisition.b0
        q, shifts = self._gradients(np.arange(len(b0))), np.array([
            self.rest.shift_per_hertz(v) for v in range(len(b0))])
        turns = Rotation.from_matrix(
            np.swapaxes(self.rotation[:-1], 1, 2) @ self.rotation[1:]).as_rotvec()
        for along in self._phase_axes():
            steps = np.diff(self.shift @ (np.eye(3) - np.outer(along, along)), axis=0)
            squares = np.sum(steps**2 + (TURN_RADIUS * turns)**2, 1) / 5
            s = shifts @ along
            at = self.shift @ along
            total = at + s * self.eddy[:, 0]
            u, shared = _split_series(total, s, q, squares, b0)
            total = total - shared
            u = np.where(s != 0, u, total)
            self.eddy[:, 0] = np.divide(total - u, s, out=self.eddy[:, 0], where=(s != 0) & ~b0)
            self.shift += np.where(b0, 0, u - at)[:, None] * along

    def _phase_axes(self) -> np.ndarray:
        """(k, 3) unit vectors of the axes of phase encoding in world coordinates."""
        axes = sorted({e.axis for e in self.encodings if e is not None})
        return (self.affine[:3, axes] / np.linalg.norm(self.affine[:3, axes], axis=0)).T

    def anchor(self, b0: np.ndarray, weighted: np.ndarray, terms: np.ndarray) -> None:
        """Move all weighted volumes by one rigid motion so that they fit the b0 volumes.

        It is the mean of what the images say (`_match_b0`), which differences of contrast bias, and
        of what the order of the scan says (`_follow_b0`), weighted by the inverse squares of their
        errors. Along the phase encoding it is what the images say, and `separate` goes on from it.
        """
        from scipy.spatial.transform import Rotation

        along = self._phase_axes() if len(terms) else np.zeros((0, 3))
        across = np.eye(3) - np.linalg.pinv(along) @ along
        turn, shift = self._match_b0(b0, weighted)
        turns, shifts, angle_sd, shift_sd = self._follow_b0(b0, weighted, across)
        share = 1 / (1 + (CONTRAST_ANGLE / angle_sd)**2)
        turn = Rotation.from_rotvec(share * turn + (1 - share) * turns).as_matrix()
        share = 1 / (1 + (CONTRAST_SHIFT / shift_sd)**2)
        shift = shift + (1 - share) * across @ (shifts - shift)
        # x of the b0 = D x of the weighted: y = R D⁻¹ x + …
        for v in weighted:
            self.rotation[v] = self.rotation[v] @ turn.T
            self.shift[v] = self.shift[v] - self.rotation[v] @ shift

    def _follow_b0(self, b0: np.ndarray, weighted: np.ndarray, across: np.ndarray
                   ) -> tuple[np.ndarray, np.ndarray, float, float]:
        """Find the rigid motion that puts weighted volumes where the b0 volumes beside them in the
        scan are: rotation vector (rad) and shift (mm), with their SDs. These are from the spread of
        the pairs, and at least from the steps between neighbouring weighted volumes; that of the
        shift is from its components in the range of the projection `across`."""
        from scipy.spatial.transform import Rotation

        def steps(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            """From the positions a to the positions b, in the frame of a."""
            back = np.swapaxes(self.rotation[a], 1, 2)
            return (Rotation.from_matrix(back @ self.rotation[b]).as_rotvec(),
                    (back @ (self.shift[b] - self.shift[a])[..., None])[..., 0])

        pairs = np.array([(b, w) for b in b0 for w in (
            *weighted[weighted < b][-1:], *weighted[weighted > b][:1])])
        turns, shifts = steps(pairs[:, 0], pairs[:, 1])
        angle_sd, shift_sd = (
            float(np.sqrt(max(np.var(pair @ part, axis=0).sum(), np.mean(np.sum(
                (step @ part)**2, 1))) / max(np.trace(part), 1) / len(b0))) + 1e-6
            for pair, step, part in zip((turns, shifts), steps(weighted[:-1], weighted[1:]),
                                        (np.eye(3), across), strict=True))
        return np.median(turns, axis=0), np.median(shifts, axis=0), angle_sd, shift_sd

    def _match_b0(self, b0: np.ndarray, weighted: np.ndarray, steps: int = 4
                  ) -> tuple[np.ndarray, np.ndarray]:
        """Find the rigid motion that makes the mean b0 fit best to a polynomial of the weighted
        volumes: rotation vector (rad) and shift (mm)."""
        from scipy.spatial.transform import Rotation

        signal = self.sample(weighted).signal
        features = []
        for shell in self._groups(weighted):
            part = signal[torch.from_numpy(shell).to(self.device)]
            features += [part.mean(0), part.std(0)] if len(shell) >= MIN_SHELL else [part.mean(0)]
        x = _polynomials(torch.stack(features).double())
        turn, shift = np.eye(3), np.zeros(3)
        for _ in range(steps):
            points = (self.points - self.centre) @ turn.T + self.centre + shift
            sampled = self.sample(b0, points)
            good = sampled.inside.all(0)
            mean, slope = sampled.signal.mean(0), sampled.gradient.mean(0)
            # NumPy's, since torch's depends on where its operands lie in memory
            beta = np.linalg.lstsq((x.T * good[:, None]).cpu().numpy(),
                                   (mean * good).double().cpu().numpy(), rcond=None)[0]
            predicted = (torch.from_numpy(beta).to(x) @ x).float()
            arm = torch.from_numpy((points - self.centre).T.astype(np.float32)).to(self.device)
            squares = torch.where(good, predicted - mean, 0).square()
            trust = (squares + FLOOR * squares.mean()).rsqrt() * good
            a, difference = self._without_local_gain(
                torch.cat([slope, torch.linalg.cross(arm, slope, dim=0)]) * trust,
                (predicted - mean) * trust, predicted * trust)
            normal, right = ((a @ b).cpu().numpy().astype(float) for b in (a.T, difference))
            _require_finite(normal, right)
            d = np.linalg.solve(normal, right)
            step = Rotation.from_rotvec(d[3:]).as_matrix()
            turn, shift = step @ turn, step @ shift + d[:3]
        return Rotation.from_matrix(turn).as_rotvec(), shift

    def place_between(self, b0: np.ndarray, weighted: np.ndarray) -> None:
        """Give weighted volumes the motion of the b0 volumes around them, by interpolation."""
        from scipy.spatial.transform import Rotation

        vectors = Rotation.from_matrix(self.rotation[b0]).as_rotvec()
        for axis in range(3):
            self.shift[weighted, axis] = np.interp(weighted, b0, self.shift[b0, axis])
        self.rotation[weighted] = Rotation.from_rotvec(np.stack(
            [np.interp(weighted, b0, vectors[:, axis]) for axis in range(3)], -1)).as_matrix()

    def refer_to(self, first: int, index: np.ndarray) -> None:
        """Make the volume `first` the reference of some volumes: R = I and t = 0 there.

        The mask and the field lie on it, so that this is done after each pass.
        """
        turn, shift = self.rotation[first].copy(), self.shift[first].copy()
        self.rotation[index] = self.rotation[index] @ turn.T
        self.shift[index] -= self.rotation[index] @ shift

    def assess_slices(self, groups: Sequence[np.ndarray]) -> None:
        """Find the outlier slices at the final positions."""
        for index in groups:
            self.load(index, 0.0)
            for _ in range(2):
                sampled = self.sample(index)
                _, predicted, _ = self.predict(index, sampled)
                self._find_outliers(index, sampled, predicted)

    def _find_outliers(self, index: np.ndarray, sampled: _Sampled, predicted: torch.Tensor) -> None:
        """Estimate the relative difference c_k of each slice from its prediction.

        A point between two slices shows both. With linear weights h the model is S = P (1 + Σ h_k
        c_k), and its sums over h_k are solved for c.
        """
        count = self.mask_shape[self.slice_axis]
        change = np.full((count, len(index)), np.nan)
        for i in range(len(index)):
            inside = sampled.inside[i].cpu().numpy()
            expected = predicted[i].cpu().numpy()[inside].astype(float)
            difference = sampled.signal[i].cpu().numpy()[inside] - expected
            at = sampled.slices[i][inside].clip(0, count - 1)
            k = np.minimum(at.astype(int), max(count - 2, 0))
            h = np.stack([1 - (at - k), at - k])
            mix = np.zeros((count + 1, count + 1))
            right, voxels = np.zeros((2, count + 1))
            for p in range(2):
                right += np.bincount(k + p, h[p] * difference, count + 1)
                voxels += np.bincount(k + p, h[p], count + 1)
                for q in range(2):
                    np.add.at(mix, (np.arange(count) + p, np.arange(count) + q),
                              np.bincount(k, h[p] * h[q] * expected, count))
            # all slices are solved for, lest a loss in a small one counts as its neighbour's
            fitted = np.linalg.lstsq(mix, right, rcond=1e-6)[0]
            assessed = (voxels * self.area_per_point >= MIN_AREA) & (np.diag(mix) > 0)
            change[assessed[:-1], i] = fitted[assessed]
        z = np.full(change.shape, np.nan)
        for group in self._groups(index):
            z[:, group] = _robust_z(change[:, group])
        self.z[:, index] = z
        with np.errstate(invalid="ignore"):
            self.outliers[:, index] = (z < -OUTLIER_Z) & (change < -OUTLIER_LOSS)

    def _in_outliers(self, index: np.ndarray, slices: np.ndarray) -> np.ndarray:
        """(n, points) bool: less than a slice away from an outlier slice."""
        last = self.mask_shape[self.slice_axis] - 1
        below = np.floor(slices).clip(0, last).astype(int)
        above = np.ceil(slices).clip(0, last).astype(int)
        volume = index[:, None]
        return self.outliers[below, volume] | self.outliers[above, volume]

    def _groups(self, index: np.ndarray) -> list[np.ndarray]:
        """Positions in `index` of each shell; shells of few volumes are one group."""
        table = self.acquisition[index]
        if table.b0.all():
            return [np.arange(len(index))]
        shells = [s.indices for s in table.shells]
        small = [s for s in shells if len(s) < MIN_SHELL]
        return [s for s in shells if len(s) >= MIN_SHELL] \
            + ([np.sort(np.concatenate(small))] if small else [])


def _split_series(position: Float[np.ndarray, " n"], shift_per_hertz: Float[np.ndarray, " n"],
                  q: Float[np.ndarray, "n 3"], squares: Float[np.ndarray, " n-1"],
                  b0: Bool[np.ndarray, " n"]) -> tuple[np.ndarray, float]:
    """Split the positions d of the volumes along the phase encoding, in the order of the scan, into
    the translation u of the head, the field, and an error e that the weighted volumes share:

        d_v = u_v + s_v (β·q_v + ε_v) + e [v is weighted].

    u is a random walk, whose steps have the mean square `squares` of those of the five other rigid
    parameters times κ² ≥ 1, where log κ has a prior about 0. The field has a part that is linear in
    the gradient q and independent deviations ε (SD σ) from it: on a real pair of series of opposite
    phase encoding they were the same for a direction in both, −0.97 correlated as a translation. b0
    volumes have q = 0 and ε = 0. e is the error of the registration of b0 to weighted volumes (SD
    CONTRAST_SHIFT); without b0 volumes it is not determined, and 0. κ and σ are those of the
    largest posterior density; u and e, which are returned, have their posterior means given them.
    An uncertain u next to a b0 thus leaves e to the registration, and a walk from one b0 to the
    next does not.
    """
    from scipy.optimize import minimize

    walk = np.minimum.outer(*2 * [np.append(0, np.cumsum(squares + LEAST_STEP**2))])
    s, weighted = shift_per_hertz * ~b0, (~b0).astype(float) * b0.any()
    others = LINEAR_FIELD**2 * np.outer(s, s) * (q @ q.T) \
        + CONTRAST_SHIFT**2 * np.outer(weighted, weighted)
    d = position - position.mean()

    def head(log_kappa: float) -> np.ndarray:
        return START**2 + np.exp(2 * log_kappa) * walk

    def series(logs: np.ndarray) -> np.ndarray:
        return head(logs[0]) + others + np.diag((np.exp(logs[1]) * s)**2 + 1e-6)

    def cost(logs: np.ndarray) -> float:
        k = series(logs)
        return float(np.linalg.slogdet(k)[1] + d @ np.linalg.solve(k, d)
                     + (logs[0] / STEP_SPREAD)**2)

    best = min((minimize(cost, (kappa, sigma), method="L-BFGS-B", bounds=[(0, 4), (-4, 4)])
                for kappa in (0, 1.5) for sigma in (-2, 1)), key=lambda fit: fit.fun).x
    solved = np.linalg.solve(series(best), d)
    return position.mean() + head(best[0]) @ solved, float(CONTRAST_SHIFT**2 * weighted @ solved)


class _Sampled(NamedTuple):
    """Volumes at the points of the reference: signal (n, points); gradient (n, 3, points) in the
    frame of the head, 1/mm; whether the point is in the field of view; and its slice (n, points).
    """

    signal: torch.Tensor
    gradient: torch.Tensor
    inside: torch.Tensor
    slices: np.ndarray


def _require_finite(*arrays: np.ndarray) -> None:
    """Refuse what is not finite before LAPACK writes about it to the terminal."""
    if not all(np.isfinite(a).all() for a in arrays):
        raise np.linalg.LinAlgError("a step is not finite")


def _interpolate(coefficients: torch.Tensor, at: torch.Tensor
                 ) -> tuple[torch.Tensor, torch.Tensor]:
    """Evaluate a cubic B-spline and its gradient per voxel, (points) and (3, points).

    coefficients: of the volume with a margin of 2; at: (3, points) voxel coordinates.
    """
    first = at.floor()
    weights, slopes = zip(*(_spline_weights(at[a] - first[a]) for a in range(3)), strict=True)
    strides = coefficients.stride()
    start = sum((first[a].long() + 1) * strides[a] for a in range(3))
    flat = coefficients.flatten()
    value = torch.zeros_like(at[0])
    gradient = torch.zeros_like(at)
    for i in range(4):
        for j in range(4):
            row = start + (i * strides[0] + j * strides[1])
            taps = [flat[row + k] for k in range(4)]
            line = sum(w * t for w, t in zip(weights[2], taps, strict=True))
            slope = sum(w * t for w, t in zip(slopes[2], taps, strict=True))
            plane = weights[0][i] * weights[1][j]
            value += plane * line
            gradient[0] += slopes[0][i] * weights[1][j] * line
            gradient[1] += weights[0][i] * slopes[1][j] * line
            gradient[2] += plane * slope
    return value, gradient


def _spline_weights(f: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Weights of the four coefficients around a fraction f of a voxel, and their derivatives."""
    g = 1 - f
    return ([g**3 / 6, 2 / 3 - f**2 * (2 - f) / 2, 2 / 3 - g**2 * (2 - g) / 2, f**3 / 6],
            [-g**2 / 2, f * (3 * f - 4) / 2, -g * (3 * g - 4) / 2, f**2 / 2])


def _polynomials(features: torch.Tensor) -> torch.Tensor:
    """(k, points): 1, and all products of up to three of the features, scaled to mean square 1."""
    from itertools import combinations_with_replacement

    features = features / features.square().mean(1, keepdim=True).sqrt().clamp(min=1e-12)
    rows = [torch.ones_like(features[0])]
    for degree in (1, 2, 3):
        rows += [features[list(c)].prod(0) for c in
                 combinations_with_replacement(range(min(len(features), 4)), degree)]
    return torch.stack(rows)


def _robust_z(change: np.ndarray) -> np.ndarray:
    """(slice, volume) deviation from the median of the shell, in robust SDs.

    The SD of each slice is 1.4826 times the median absolute deviation over the volumes, at least
    the median of this over the slices.
    """
    assessed = np.isfinite(change).any(1)
    z = np.full(change.shape, np.nan)
    if change.shape[1] < 2 or not assessed.any():
        return z
    values = change[assessed]
    deviation = values - np.nanmedian(values, axis=1, keepdims=True)
    sd = 1.4826 * np.nanmedian(np.abs(deviation), axis=1, keepdims=True)
    z[assessed] = deviation / np.maximum(sd, np.median(sd)).clip(1e-6)
    return z


def _terms(acquisition: Acquisition, encodings: Sequence[PhaseEncoding | None]
           ) -> tuple[np.ndarray, list[str]]:
    """Terms of the field that are fitted besides the constant, and notices."""
    weighted = int((~acquisition.b0).sum())
    if any(e is None or e.readout is None for e in encodings):
        return np.zeros(0, int), [
            "Eddy currents were not corrected: the phase encoding or its readout time is unknown. "
            "Add PhaseEncodingDirection and TotalReadoutTime to the sidecar."]
    if weighted < LINEAR_MIN:
        return np.zeros(0, int), ["Eddy currents were not corrected: there are "
                                  f"{weighted} weighted volumes, and {LINEAR_MIN} are needed."]
    if weighted < QUADRATIC_MIN:
        return np.arange(1, 4), ["Eddy currents were corrected by linear terms only: there are "
                                 f"{weighted} weighted volumes, and quadratic terms need "
                                 f"{QUADRATIC_MIN}."]
    return np.arange(1, EDDY_TERMS), []
