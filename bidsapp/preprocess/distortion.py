"""Susceptibility distortion: the off-resonance field from images of opposite phase encoding.

A field h (Hz) shifts a voxel x by d(x) = s T h(x) voxels along the phase axis, with s the sign of
the phase encoding and T its total readout time (s), and compresses or stretches the signal there.
The undistorted signal of an image I is (Jezzard and Balaban 1995, doi:10.1002/mrm.1910340111)

    S(x) = I(x + d(x)) · (1 + ∂d(x)),

with ∂ the derivative along the phase axis. Two images of opposite s show the same S, so that h
minimises

    E(h) = ½‖I₁(x + d₁)(1 + ∂d₁) − I₂(x + d₂)(1 + ∂d₂)‖² + α/2 ‖∇u‖² + β Σₖ φ(∂dₖ),

with u the displacement in voxels for the mean readout time, ∇u per mm times the voxel size along
the phase axis, and φ(t) = t⁴/(1 − t²), which keeps |∂d| below 1, so that no voxel folds (Ruthotto
et al. 2013, doi:10.1007/978-3-642-36480-8_25; Julian and Ruthotto 2024, doi:10.1002/hbm.26713).
u lives at the faces between the voxels of a line: its mean is the displacement of a voxel, and its
difference the derivative. The data couple neighbours of one line only, so the Gauss–Newton matrix
without the smoothness across lines is tridiagonal, and is solved exactly as the preconditioner of
conjugate gradients.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from bidsapp.acquisition import PhaseEncoding
from bidsapp.errors import DataError
from bidsapp.registration.geometry import grid_coordinates, transform_points, world_points

SMOOTHNESS, BARRIER = 0.03, 1e-3
"""Weights α of the field's gradient and β of the barrier, for images whose mean in the head is 1.
α was chosen by the error of the field on simulated heads (benchmarks/distortion.py)."""

LEVELS, MIN_SIZE = 3, 12
"""Number of resolutions, each with voxels of twice the size, and the fewest voxels along an axis
that is halved."""

ROUNDS, STILL = 10, 0.02
"""Most steps of the motion at a level (one at full resolution), and the motion in voxels that ends
them."""

MIN_STEP = 0.01
"""Shortest part of a Gauss–Newton step that is tried."""

STEPS, TOLERANCE = 8, 3e-3
"""Most Gauss–Newton steps in one alternation, and the relative decrease of E that ends them."""

CG_STEPS, CG_TOLERANCE = 12, 0.1
"""Most steps of conjugate gradients in a Gauss–Newton step, and the relative residual that ends
them."""


@dataclass(frozen=True, eq=False)
class Field:
    """An off-resonance field, and the images that it was estimated from, corrected.

    Parameters
    ----------
    hz : (x, y, z) float32
        The field on the grid of the first image (or of the b0), in Hz.
    move : (4, 4)
        World of the first image → world of the second, mm: the rigid motion between both.
    corrected : tuple of (x, y, z) float32
        The images, undistorted on that grid.
    before, after : float
        Pearson correlation of both images in the head, before and after the correction; NaN for a
        single image.
    jacobian : tuple of float
        Minimum and maximum of 1 + ∂d over both images in the head.
    notices : tuple of str
        What a user should know about the field.
    """

    hz: np.ndarray
    move: np.ndarray
    corrected: tuple[np.ndarray, ...]
    before: float
    after: float
    jacobian: tuple[float, float]
    notices: tuple[str, ...] = ()


def undistort(image: Float[np.ndarray, "x y z"], hz: Float[np.ndarray, "x y z"],
              affine: Float[np.ndarray, "4 4"], encoding: PhaseEncoding,
              move: np.ndarray | None = None, image_affine: np.ndarray | None = None
              ) -> Float[np.ndarray, "x y z"]:
    """Undistort one volume by a cubic interpolation with the intensity factor 1 + T ∂h.

    Parameters
    ----------
    image : (x, y, z)
        The distorted volume.
    hz : (x, y, z)
        Field in Hz on the grid of the result.
    affine : (4, 4)
        Voxel indices of the field to world RAS+, mm.
    encoding : PhaseEncoding
        Phase encoding of the volume, with its readout time.
    move : (4, 4), optional
        World of the field → world of the volume, mm; default: no motion.
    image_affine : (4, 4), optional
        Voxel indices of the volume to world; default: `affine`.

    Returns
    -------
    (x, y, z) float32
        S(x) = I(M x + p T h(x)) · (1 + T ∂h(x)), with p one voxel along the phase encoding; 0
        outside the volume.

    Raises
    ------
    DataError
        The readout time is unknown.
    """
    from scipy.ndimage import map_coordinates

    shift = _seconds(encoding) * hz
    points = world_points(hz.shape, affine)
    if move is not None:
        points = transform_points(move, points)
    where = grid_coordinates(affine if image_affine is None else image_affine, points)
    where[encoding.axis] += shift
    factor = 1 + np.gradient(shift, axis=encoding.axis)
    return (map_coordinates(image.astype(np.float32), where, order=3) * factor).astype(np.float32)


def field_from_pair(first: Float[np.ndarray, "x y z"], second: Float[np.ndarray, "x y z"],
                    affine: Float[np.ndarray, "4 4"], first_encoding: PhaseEncoding,
                    second_encoding: PhaseEncoding, *, second_affine: np.ndarray | None = None,
                    device: str = "cpu", smoothness: float = SMOOTHNESS) -> Field:
    """Estimate the field from two images of opposite phase encoding.

    Motion along the phase axis cannot be told apart from a constant field, and counts as field.

    Parameters
    ----------
    first, second : (x, y, z)
        b0 images (or means of several), which show the same contrast.
    affine : (4, 4)
        Voxel indices of the first image to world RAS+, mm.
    first_encoding, second_encoding : PhaseEncoding
        The same axis, opposite signs; the readout times may differ.
    second_affine : (4, 4), optional
        Voxel indices of the second image to world; default: `affine`.
    device : str
        Device of torch.
    smoothness : float
        Weight α.

    Returns
    -------
    Field
        The field in the frame of the first image.

    Raises
    ------
    DataError
        The encodings are not opposite or have no readout time, the images are not 3-D, have
        different grids, or no signal.
    """
    import torch

    _check_pair(first, second, first_encoding, second_encoding)
    second_affine = affine if second_affine is None else second_affine
    readout = np.array([_seconds(first_encoding), _seconds(second_encoding)])
    scale = float(np.abs(readout).mean())
    axis = first_encoding.axis
    images = [np.nan_to_num(np.asarray(i, np.float32), posinf=0, neginf=0).clip(0)
              for i in (first, second)]
    head = _head(images)
    images = [i / max(float(i[head].mean()), 1e-12) for i in images]
    # the phase axis comes first, so that all lines advance together
    order = [axis, *(a for a in range(3) if a != axis)]
    size = np.linalg.norm(affine[:3, :3], axis=0)[order]
    pyramid = [tuple(np.transpose(i, order) for i in images)]
    frames = [(_reorder(affine, order), _reorder(second_affine, order))]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape) >= 2 * MIN_SIZE:
        pyramid.append(tuple(_halve(i) for i in pyramid[-1]))
        frames.append(tuple(a @ _HALF for a in frames[-1]))
    move = np.eye(4)
    u = None
    for level in reversed(range(len(pyramid))):
        shape = pyramid[level][0].shape
        problem = _Problem(pyramid[level], frames[level], size, readout / scale, smoothness, device)
        u = problem.transport() if u is None else _double(u, shape)
        problem.place(move)
        u, energy = problem.solve(u)
        for _ in range(ROUNDS if level else 1):
            trial, trial_move = problem.solve_with_motion(u, move)
            problem.place(trial_move)
            trial, trial_energy = problem.solve(trial)
            if trial_energy >= energy:
                break
            change = _distance(move, trial_move, frames[level][0], u.shape)
            u, move, energy = trial, trial_move, trial_energy
            if change < STILL * size.mean() * 2**level:
                break
    assert u is not None
    faces = u.cpu().numpy() / scale
    hz = np.transpose((faces[:-1] + faces[1:]) / 2, np.argsort(order)).astype(np.float32)
    corrected = (undistort(first, hz, affine, first_encoding),
                 undistort(second, hz, affine, second_encoding, move, second_affine))
    slope = np.transpose(np.diff(faces, axis=0), np.argsort(order))[head]
    factors = [1 + r * slope for r in readout]
    del torch
    return Field(hz, move, corrected, _correlation(*images, head), _correlation(*corrected, head),
                 (float(np.min(factors)), float(np.max(factors))))


_HALF = np.diag([2.0, 2.0, 2.0, 1.0])
_HALF[:3, 3] = 0.5


def _reorder(affine: np.ndarray, order: list[int]) -> np.ndarray:
    return affine[:, [*order, 3]]


def _distance(a: np.ndarray, b: np.ndarray, affine: np.ndarray, shape: tuple[int, ...]) -> float:
    """The largest distance (mm) between where two motions take the corners of a grid."""
    corners = transform_points(affine, np.indices((2, 2, 2)).reshape(3, -1).T * np.array(shape))
    return float(np.linalg.norm(transform_points(a, corners) - transform_points(b, corners),
                                axis=1).max())


def _seconds(encoding: PhaseEncoding) -> float:
    """The signed readout time."""
    if encoding.readout is None:
        raise DataError("the total readout time is unknown, so that a field in Hz has no shift in "
                        "voxels. Write TotalReadoutTime in the sidecar, or give "
                        "--fallback-total-readout-time.")
    return encoding.sign * encoding.readout


def _check_pair(first: np.ndarray, second: np.ndarray, a: PhaseEncoding, b: PhaseEncoding) -> None:
    if not a.opposes(b):
        raise DataError(f"the pair has the phase encodings {a.direction} and {b.direction}; two of "
                        "one axis and opposite signs are needed. Correct PhaseEncodingDirection, "
                        "or remove the second image from the pair.")
    for encoding in (a, b):
        _seconds(encoding)
    if first.ndim != 3 or first.shape != second.shape:
        raise DataError(f"the images of the pair have the shapes {first.shape} and {second.shape}; "
                        "two volumes of one shape are needed. Resample the second on the grid of "
                        "the first.")
    for name, image in (("first", first), ("second", second)):
        if not np.nan_to_num(image, posinf=0, neginf=0).max() > 0:
            raise DataError(f"the {name} image of the pair holds no signal above 0. Convert it "
                            "again, or remove it from the pair.")


def _head(images: list[np.ndarray]) -> np.ndarray:
    """The voxels in which the mean of the images, each with its own scale, exceeds Otsu's
    threshold, in the largest component without holes."""
    from scipy.ndimage import binary_fill_holes, gaussian_filter, label
    from skimage.filters import threshold_otsu

    mean = gaussian_filter(sum(i / i.mean() for i in images), 1.0)
    mean = mean.clip(0, np.percentile(mean, 98))
    labels, _ = label(mean > threshold_otsu(mean))
    return binary_fill_holes(labels == np.bincount(labels.ravel())[1:].argmax() + 1)


def _correlation(a: np.ndarray, b: np.ndarray, mask: np.ndarray) -> float:
    return float(np.corrcoef(a[mask], b[mask])[0, 1])


def _halve(image: np.ndarray) -> np.ndarray:
    """Means of 2 × 2 × 2 voxels; the last voxel of an odd axis is repeated."""
    image = np.pad(image, [(0, n % 2) for n in image.shape], mode="edge")
    x, y, z = (n // 2 for n in image.shape)
    return image.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))


def _double(u: Any, shape: tuple[int, ...]) -> Any:
    """Displacements at the faces of a grid of half the size → those of a grid of `shape`."""
    import torch.nn.functional as F

    n, y, z = u.shape
    u = F.interpolate(u[None, None], (2 * n - 1, y, z), mode="trilinear", align_corners=True)
    u = F.interpolate(u, (2 * n - 1, 2 * y, 2 * z), mode="trilinear")[0, 0]
    return 2 * u[:shape[0] + 1, :shape[1], :shape[2]]


class _Problem:
    """E and its minimisation on one grid; tensors are (phase axis, two other axes)."""

    def __init__(self, images, frames, size, ratio, alpha, device):
        import torch

        self.torch, self.device = torch, device
        self.first, self.second = images
        self.frames, self.size, self.ratio, self.alpha = frames, size, ratio, alpha
        self.shape = self.first.shape
        self.lines = [self._polynomials(self.first)]
        self.index = torch.arange(self.shape[0], device=device, dtype=torch.float32)[:, None, None]
        self.across = [alpha * (size[0] / s) ** 2 for s in size[1:]]

    def _tensor(self, array):
        return self.torch.as_tensor(np.ascontiguousarray(array, np.float32), device=self.device)

    def _polynomials(self, image):
        """(n − 1, …, 4) coefficients of the cubic B-spline of each interval of each line."""
        from scipy.ndimage import spline_filter1d

        torch = self.torch
        c = self._tensor(spline_filter1d(image, axis=0, output=np.float32))
        c = torch.cat([c[1:2], c, c[-2:-1]])  # mirrored
        a, b, c, d = c[:-3], c[1:-2], c[2:-1], c[3:]
        return torch.stack([(a + 4 * b + c) / 6, (c - a) / 2, (a - 2 * b + c) / 2,
                            (d - 3 * c + 3 * b - a) / 6], -1)

    def _evaluate(self, lines, where):
        """Values and slopes at positions along the lines; the edge continues beyond a line."""
        torch = self.torch
        inside = where.clamp(0, self.shape[0] - 1)
        left = inside.floor().clamp(max=self.shape[0] - 2)
        t = inside - left
        lane = torch.arange(where[0].numel(), device=self.device).reshape(where[0].shape)
        rows = lines.reshape(-1, 4)[(left.long() * where[0].numel() + lane).reshape(-1)]
        p0, p1, p2, p3 = rows.reshape(*where.shape, 4).unbind(-1)
        value = ((p3 * t + p2) * t + p1) * t + p0
        slope = (3 * p3 * t + 2 * p2) * t + p1
        return value, slope * (inside == where)

    def place(self, move):
        """Resample the second image rigidly on the grid of the first."""
        from scipy.ndimage import map_coordinates

        to, of = self.frames
        if np.allclose(np.linalg.inv(of) @ move @ to, np.eye(4), atol=1e-6):
            second = self.second
        else:
            points = transform_points(move, world_points(self.shape, to))
            second = map_coordinates(self.second, grid_coordinates(of, points), order=3,
                                     mode="nearest")
        self.placed = second
        self.lines[1:] = [self._polynomials(second)]

    def transport(self):
        """Match the cumulative intensities of each line (optimal transport in one dimension)."""
        torch, n = self.torch, self.shape[0]
        flat = [torch.as_tensor(i, dtype=torch.float32).reshape(n, -1).T + 0.05
                for i in (self.first, self.second)]
        mass = [i.cumsum(1) / i.sum(1, keepdim=True) for i in flat]
        mass = [torch.cat([torch.zeros_like(m[:, :1]), m], 1) for m in mass]
        face = torch.arange(n + 1, dtype=torch.float32).expand_as(mass[0])
        level = torch.linspace(0, 1, 4 * n + 1).expand(len(face), -1).contiguous()
        q1, q2 = (_interpolate(level, m, face) for m in mass)
        r1, r2 = self.ratio
        shift = (q1 - q2) / (r1 - r2)
        u = _interpolate(face.contiguous(), (q1 - r1 * shift).contiguous(), shift)
        return self._smooth(u.T.reshape(n + 1, *self.shape[1:])).to(self.device)

    def _smooth(self, u):
        from scipy.ndimage import gaussian_filter

        return self.torch.as_tensor(gaussian_filter(u.numpy(), 1.0))

    def _energy(self, u):
        """E at u, with what its derivatives need."""
        r1, r2 = self.ratio
        middle, slope = (u[1:] + u[:-1]) / 2, u[1:] - u[:-1]
        if float(slope.abs().max()) * max(abs(r1), abs(r2)) >= 1:
            return np.inf, ()
        w1, g1 = self._evaluate(self.lines[0], self.index + r1 * middle)
        w2, g2 = self._evaluate(self.lines[1], self.index + r2 * middle)
        j1, j2 = 1 + r1 * slope, 1 + r2 * slope
        residual = w1 * j1 - w2 * j2
        energy = 0.5 * residual.square().sum() + self.alpha / 2 * slope.square().sum()
        for axis, weight in enumerate(self.across, 1):
            energy = energy + weight / 2 * u.diff(dim=axis).square().sum()
        for r in self.ratio:
            t = (r * slope).square()
            energy = energy + BARRIER * (t * t / (1 - t)).sum()
        return float(energy), (residual, r1 * g1 * j1 - r2 * g2 * j2, r1 * w1 - r2 * w2, slope)

    def _laplace(self, u):
        """α times the transposed gradient of the gradient across lines."""
        out = self.torch.zeros_like(u)
        for axis, weight in zip((-2, -1), self.across, strict=True):
            step = weight * u.diff(dim=axis)
            n = u.shape[axis] - 1
            out.narrow(axis, 1, n).add_(step)
            out.narrow(axis, 0, n).sub_(step)
        return out

    def _normal_equations(self, u, parts):
        """Gradient of E, the lines' part of its Gauss–Newton matrix, and the Jacobian's rows."""
        residual, a, c, slope = parts
        stiff = self.torch.full_like(slope, self.alpha)
        force = self.alpha * slope
        for r in self.ratio:
            t = r * slope
            gap = 1 - t * t
            force += BARRIER * r * 2 * t * (1 / gap**2 - 1)
            stiff += BARRIER * r * r * (2 / gap**2 - 2 + 8 * t * t / gap**3)
        lower, upper = a / 2 - c, a / 2 + c
        gradient = self._laplace(u)
        gradient[:-1] += lower * residual - force
        gradient[1:] += upper * residual + force
        diagonal = self.torch.zeros_like(u)
        diagonal[:-1] += lower.square() + stiff
        diagonal[1:] += upper.square() + stiff
        return gradient, diagonal, lower * upper - stiff, (lower, upper)

    def solve(self, u):
        """Minimise E over the field by Gauss–Newton steps from u."""
        energy, parts = self._energy(u)
        for _ in range(STEPS):
            gradient, diagonal, beside, _ = self._normal_equations(u, parts)
            step = self._conjugate_gradients(-gradient, diagonal, beside)
            expected = float((gradient * step).sum())
            length = 1.0
            trial, parts = self._energy(u + step)
            while trial > energy + 1e-4 * length * expected and length > MIN_STEP:
                length /= 2
                trial, parts = self._energy(u + length * step)
            if trial > energy:
                break
            u, decrease = u + length * step, energy - trial
            energy = trial
            if decrease < TOLERANCE * energy:
                break
        return u, energy

    def _conjugate_gradients(self, right, diagonal, beside):
        """Solve for right sides (…, faces, y, z)."""
        torch = self.torch

        def product(v):
            out = self._laplace(v)
            out.addcmul_(diagonal, v)
            out[..., :-1, :, :].addcmul_(beside, v[..., 1:, :, :])
            out[..., 1:, :, :].addcmul_(beside, v[..., :-1, :, :])
            return out

        def dot(a, b):
            return (a * b).sum((-3, -2, -1), keepdim=True)

        precondition = self._tridiagonal(diagonal, beside)
        x, r = torch.zeros_like(right), right.clone()
        z = precondition(r)
        p, rz = z.clone(), dot(r, z)
        stop = CG_TOLERANCE**2 * dot(r, r)
        for _ in range(CG_STEPS):
            q = product(p)
            length = rz / dot(p, q).clamp(min=1e-30)
            x += length * p
            r -= length * q
            if bool((dot(r, r) <= stop).all()):
                break
            z = precondition(r)
            old, rz = rz, dot(r, z)
            p = z + rz / old.clamp(min=1e-30) * p
        return x

    def _tridiagonal(self, diagonal, beside):
        """Factorise the matrix of each line, with the diagonal of the smoothness across lines."""
        d = diagonal.clone()
        for axis, weight in enumerate(self.across, 1):
            d += 2 * weight
            for end in (0, -1):
                d.select(axis, end).sub_(weight)
        ratio = self.torch.empty_like(beside)
        for i in range(len(beside)):
            ratio[i] = beside[i] / d[i]
            d[i + 1].addcmul_(ratio[i], beside[i], value=-1)

        def solve(b):
            x = b.clone()
            for i in range(len(ratio)):
                x[..., i + 1, :, :].addcmul_(ratio[i], x[..., i, :, :], value=-1)
            x /= d
            for i in reversed(range(len(ratio))):
                x[..., i, :, :].addcmul_(ratio[i], x[..., i + 1, :, :], value=-1)
            return x

        return solve

    def solve_with_motion(self, u, move):
        """Take one Gauss–Newton step of field and motion together.

        The motion's columns are δ(x) = ω × x + τ without τ along the phase axis. The field is
        eliminated by the Schur complement, since it can follow any motion locally.
        """
        from scipy.spatial.transform import Rotation

        torch, r2 = self.torch, self.ratio[1]
        _, parts = self._energy(u)
        residual = parts[0]
        gradient, diagonal, beside, rows = self._normal_equations(u, parts)
        to = self.frames[0]
        spacing = np.linalg.norm(to[:3, :3], axis=0)
        axes = to[:3, :3] / spacing  # the axes of the image in the world
        centre = (np.array(self.shape) - 1) / 2 * spacing
        middle, slope = (u[1:] + u[:-1]) / 2, u[1:] - u[:-1]
        where = self.index + r2 * middle
        g = [self._evaluate(self.lines[1], where)[1] / spacing[0]]
        g += [self._evaluate(self._polynomials(np.gradient(self.placed, spacing[a], axis=a)),
                             where)[0] for a in (1, 2)]
        x = [self._tensor((np.arange(n) * s - c).reshape([-1 if a == k else 1 for a in range(3)]))
             for k, (n, s, c) in enumerate(zip(self.shape, spacing, centre, strict=True))]
        x[0] = x[0] + r2 * middle * spacing[0]
        columns = -(1 + r2 * slope) * torch.stack([
            g[2] * x[1] - g[1] * x[2], g[0] * x[2] - g[2] * x[0], g[1] * x[0] - g[0] * x[1],
            g[1], g[2]])
        coupling = torch.zeros(5, *u.shape, device=self.device)
        coupling[:, :-1] += rows[0] * columns
        coupling[:, 1:] += rows[1] * columns
        solved = self._conjugate_gradients(torch.cat([-gradient[None], coupling]), diagonal,
                                           beside)
        flat = columns.reshape(5, -1)
        schur = flat @ flat.T - coupling.reshape(5, -1) @ solved[1:].reshape(5, -1).T
        right = -flat @ residual.reshape(-1) - coupling.reshape(5, -1) @ solved[0].reshape(-1)
        p = np.linalg.solve(schur.double().cpu().numpy(), right.double().cpu().numpy())
        delta = np.eye(4)
        delta[:3, :3] = axes @ Rotation.from_rotvec(p[:3]).as_matrix() @ axes.T
        pivot = to[:3, 3] + axes @ centre
        delta[:3, 3] = pivot + axes @ np.r_[0, p[3:]] - delta[:3, :3] @ pivot
        change = solved[0] - torch.tensordot(self._tensor(p), solved[1:], 1)
        length = 1.0
        while np.isinf(self._energy(u + length * change)[0]) and length > MIN_STEP:
            length /= 2
        return u + length * change, move @ delta


def _interpolate(at, x, y):
    """Interpolate each row linearly at `at`, for ascending x."""
    import torch

    right = torch.searchsorted(x.contiguous(), at).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1), x.gather(1, right)
    y0, y1 = y.gather(1, right - 1), y.gather(1, right)
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0, 1)
