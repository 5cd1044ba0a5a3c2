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
et al. 2012, doi:10.1088/0031-9155/57/18/5715; Julian and Ruthotto 2024,
doi:10.3389/fnins.2024.1406821).
The derivative of the data is the central difference, which the resampling of a series uses, too;
those of α and β are differences of neighbours, so that a line is monotone. The data couple voxels
of one line only: without the smoothness across lines, the Gauss–Newton matrix is pentadiagonal, and
its factors precondition conjugate gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from bidsapp.acquisition import PhaseEncoding
from bidsapp.dwi import FIELD_UNITS
from bidsapp.errors import DataError
from bidsapp.preprocess.phase import to_radians
from bidsapp.registration.geometry import grid_coordinates, transform_points, world_points

SMOOTHNESS, BARRIER = 0.05, 1e-3
"""Weights α of the field's gradient and β of the barrier, for images whose mean in the head is 1.
α was chosen by the error of the field on simulated heads (benchmarks/distortion.py)."""

LEVELS, MIN_SIZE = 3, 12
"""Number of resolutions, each with voxels of twice the size, and the fewest voxels along an axis
that is halved."""

ROUNDS, STILL = 10, 0.02
"""Most steps of the motion at a level (one at full resolution), and the motion in voxels that ends
them."""

MIN_SLICES, MIN_LINE = 4, 8
"""Fewest voxels along each axis that show the motion, and along the phase axis that show a
field."""

MIN_STEP, ARMIJO = 0.01, 1e-4
"""Shortest part of a Gauss–Newton step that is tried, and the least decrease of E as a share of
what its slope promises."""

STEPS, TOLERANCE = 8, 3e-3
"""Most Gauss–Newton steps in one alternation, and the relative decrease of E that ends them."""

MATCHING = 0.9
"""Correlation of the corrected images of a pair below which the user is told."""

FLOOR = 0.05
"""Signal added to the images before their cumulative intensities are matched."""

PLACINGS, PLACING_WIDTHS, CONTRAST, PLACING_POINTS = 2, (3.0, 1.5), 15.0, 20_000
"""Registrations of a magnitude to a b0; smoothing of its two searches and the scale of the local
mean that is subtracted (SD, mm); number of voxels that are compared."""

MOVED = 0.9
"""Largest ratio of 1 − ρ² after to before a registration that is believed. Without motion it was
0.93 to 0.95 for the images of siemens_xa30, and 0.65 with one of 3° and 4 mm."""

T1W_SMOOTHNESS, T1W_ROUNDS, T1W_WIDTH, T1W_STEEP = 1.0, 3, 0.7, 0.2
"""For a field from the T1w: weight α, rounds of prediction and estimate, smoothing of the T1w (SD,
mm), and the largest |∂d| of voxels to which the prediction is fitted."""

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
        The distorted volume; NaN and Inf count as 0.
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
    edge = np.array(image.shape).reshape(3, 1, 1, 1) - 0.5
    seen = ((where >= -0.5) & (where <= edge)).all(axis=0)
    factor = seen * (1 + np.gradient(shift, axis=encoding.axis))
    values = map_coordinates(np.nan_to_num(image.astype(np.float32), posinf=0, neginf=0), where,
                             order=3, mode="nearest")
    return (values * factor).astype(np.float32)


def field_from_pair(first: np.ndarray, second: np.ndarray, affine: Float[np.ndarray, "4 4"],
                    first_encoding: PhaseEncoding, second_encoding: PhaseEncoding, *,
                    second_affine: np.ndarray | None = None, device: str = "cpu",
                    smoothness: float = SMOOTHNESS) -> Field:
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
    _check_pair(first, second, first_encoding, second_encoding)
    second_affine = affine if second_affine is None else second_affine
    readout = np.array([_seconds(first_encoding), _seconds(second_encoding)])
    scale = float(np.abs(readout).mean())
    axis = first_encoding.axis
    images = [np.nan_to_num(np.asarray(i, np.float32), posinf=0, neginf=0).clip(0)
              for i in (first, second)]
    head = _head(images)
    images = [i / max(float(i[head].mean()), 1e-12) for i in images]
    u, move = _estimate(images, (affine, second_affine), axis, readout / scale, smoothness, device,
                        motion=True)
    hz = (u / scale).astype(np.float32)
    corrected = (undistort(first, hz, affine, first_encoding),
                 undistort(second, hz, affine, second_encoding, move, second_affine))
    slope = np.gradient(hz, axis=axis)[head]
    factors = [1 + r * slope for r in readout]
    before, after = (float(np.corrcoef(a[head], b[head])[0, 1]) for a, b in (images, corrected))
    notices = () if after >= MATCHING else (
        f"After the correction the two images correlate by {after:.2f} only ({before:.2f} before). "
        "Look at the figure: they may be of different heads or contrasts, or the phase encodings "
        "of the sidecars may be wrong.",)
    return Field(hz, move, corrected, before, after,
                 (float(np.min(factors)), float(np.max(factors))), notices)


def field_from_gre(kind: str, images: Sequence[np.ndarray], magnitude: np.ndarray,
                   affine: Float[np.ndarray, "4 4"],
                   b0: Float[np.ndarray, "u v w"], b0_affine: Float[np.ndarray, "4 4"],
                   encoding: PhaseEncoding, *, echo_times: tuple[float, float] | None = None,
                   units: str | None = None) -> Field:
    """Compute the field from a gradient-echo map, and place it on a b0 image.

    The phase Δφ between the echoes is unwrapped inside the head (Abdul-Rahman et al. 2005,
    doi:10.1117/12.611415), h = Δφ / (2π ΔTE), and the phase difference that Siemens writes has the
    same sign. Outside the head the field continues smoothly. The magnitude is registered rigidly to
    the b0 that the field undistorts, twice. It stays where the scanner put it unless the images
    match much better elsewhere, since they show too little in common for a small motion.

    Parameters
    ----------
    kind : str
        A key of `bidsapp.dwi.FIELD_MAPS`: `phasediff`, `phases` or `fieldmap`.
    images : sequence of (x, y, z)
        The phase difference, the phases of both echoes, or the field.
    magnitude : (x, y, z)
        Magnitude on the same grid.
    affine : (4, 4)
        Voxel indices of these images to world RAS+, mm.
    b0 : (u, v, w)
        The distorted image.
    b0_affine : (4, 4)
        Its voxel indices to world.
    encoding : PhaseEncoding
        Its phase encoding, with the readout time.
    echo_times : tuple of float, optional
        Echo times in s, the second larger; not for `fieldmap`.
    units : str, optional
        `Units` of the sidecar. Unless it is `rad`, the scale of a phase is recognised by its range
        (`phase.to_radians`).

    Returns
    -------
    Field
        The field on the grid of the b0; `move` is the world of the b0 → world of the magnitude.

    Raises
    ------
    DataError
        The unit is unknown, the grids differ, the magnitude is empty, or a time is missing.
    """
    from bidsapp.anatomy.mask import median_otsu
    from bidsapp.registration.image import sample

    _seconds(encoding)
    hz = _measured_field(kind, images, magnitude, echo_times, units)
    points = world_points(b0.shape, b0_affine)
    move = np.eye(4)
    for _ in range(PLACINGS):
        placed = sample(hz, affine, transform_points(move, points), beyond="nearest")
        undistorted = undistort(b0, placed, b0_affine, encoding)
        mask = median_otsu(undistorted)
        move = _place(undistorted, mask, b0_affine, magnitude, affine, move)
    placed = sample(hz, affine, transform_points(move, points), beyond="nearest")
    undistorted = undistort(b0, placed, b0_affine, encoding)
    return _single(placed.astype(np.float32), undistorted, move, encoding, mask)


def field_from_t1w(b0: Float[np.ndarray, "x y z"], affine: Float[np.ndarray, "4 4"],
                   encoding: PhaseEncoding, t1w: Float[np.ndarray, "u v w"],
                   t1w_affine: Float[np.ndarray, "4 4"], mask: Bool[np.ndarray, "x y z"] | None
                   = None, *, device: str = "cpu") -> Field:
    """Estimate the field by matching a b0 image to a b0 that is predicted from the T1w.

    The prediction is the b0's own local mean times a cubic polynomial of the T1w's local contrast,
    fitted to the b0 as it is undistorted so far. It takes the place of the second image in E, with
    the displacement 0 (as Schilling et al. 2019, doi:10.1016/j.mri.2019.05.008, do with a network's
    prediction). It is the least exact of the fields, since the prediction is. A constant field
    counts as an error of the rigid registration, and is left out.

    Parameters
    ----------
    b0 : (x, y, z)
        The distorted image.
    affine : (4, 4)
        Its voxel indices to world RAS+, mm.
    encoding : PhaseEncoding
        Its phase encoding, with the readout time.
    t1w : (u, v, w)
        The brain of the T1w, 0 outside.
    t1w_affine : (4, 4)
        Voxel indices of the T1w to the world of the b0: after a rigid registration.
    mask : (x, y, z) bool, optional
        Brain mask of the b0; default: median-Otsu.
    device : str
        Device of torch.

    Returns
    -------
    Field

    Raises
    ------
    DataError
        The readout time is unknown, or the T1w's brain does not overlap with the b0's.
    """
    from scipy.ndimage import binary_dilation, gaussian_filter

    from bidsapp.anatomy.mask import median_otsu
    from bidsapp.registration.image import sample

    seconds = _seconds(encoding)
    mask = median_otsu(b0) if mask is None else mask
    size = np.linalg.norm(affine[:3, :3], axis=0)
    points = world_points(b0.shape, affine)
    blur = size / np.linalg.norm(t1w_affine[:3, :3], axis=0) / 2.355
    reference = sample(gaussian_filter(t1w.astype(np.float32), blur), t1w_affine, points)
    brain = sample((t1w > 0).astype(np.float32), t1w_affine, points) > 0.5
    if not (brain & mask).sum() > 0.5 * mask.sum():
        raise DataError(f"the T1w's brain covers {(brain & mask).sum() / mask.sum():.0%} of the "
                        "b0's; at least half is needed. Check that both are of one person, and "
                        "their registration.")
    contrast = _contrast(reference, brain, affine, T1W_WIDTH)
    powers = np.stack([contrast**k for k in range(4)], -1)
    # the outline of the brain guides the field: both must have the same volume
    near = binary_dilation(mask, iterations=2)
    floor = np.sort(np.where(near, b0, 0).ravel())[-int(brain.sum())]
    image = np.where(near & (b0 >= floor), b0, 0) / b0[mask].mean()
    hz = np.zeros(b0.shape, np.float32)
    for _ in range(T1W_ROUNDS):
        undistorted = undistort(image, hz, affine, encoding)
        both = brain & (undistorted > 0)
        level = _local_mean(undistorted, both, affine, CONTRAST)
        ratio = (undistorted / np.maximum(level, 1e-6)).clip(0, 3)
        fit = both & (np.abs(np.gradient(seconds * hz, axis=encoding.axis)) < T1W_STEEP)
        polynomial = np.linalg.lstsq(powers[fit], ratio[fit], rcond=None)[0]
        prediction = np.where(brain, level * (powers @ polynomial).clip(0, 3), 0)
        u, _ = _estimate([image.astype(np.float32), prediction.astype(np.float32)],
                         (affine, affine), encoding.axis, np.array([1.0, 0.0]), T1W_SMOOTHNESS,
                         device, motion=False)
        hz = (u / seconds).astype(np.float32)
    hz -= np.median(hz[brain])
    return _single(hz, undistort(b0, hz, affine, encoding), np.eye(4), encoding, brain, (
        "The field was estimated from the T1w image, the least exact way. Acquire an image of "
        "opposite phase encoding or a field map where possible.",))


def _single(hz: np.ndarray, undistorted: np.ndarray, move: np.ndarray, encoding: PhaseEncoding,
            mask: np.ndarray, notices: tuple[str, ...] = ()) -> Field:
    """The Field of a single image."""
    factor = 1 + np.gradient(_seconds(encoding) * hz, axis=encoding.axis)[mask]
    if factor.min() <= 0:
        notices += (f"The field folds {(factor <= 0).mean():.1%} of the brain's voxels onto "
                    "others, where the signal cannot be recovered.",)
    return Field(hz, move, (undistorted,), np.nan, np.nan,
                 (float(factor.min()), float(factor.max())), notices)


def _place(b0: np.ndarray, mask: np.ndarray, b0_affine: np.ndarray, magnitude: np.ndarray,
           affine: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Register a magnitude to an undistorted b0: world of the b0 → world of the magnitude.

    The cost is 1 − ρ², with ρ the correlation of local contrast, whatever its sign.
    """
    from scipy.ndimage import binary_erosion, map_coordinates
    from scipy.optimize import minimize
    from scipy.spatial.transform import Rotation

    inside = binary_erosion(mask, border_value=1)
    points = transform_points(b0_affine, np.argwhere(inside))
    every = max(1, len(points) // PLACING_POINTS)
    centre, points = points.mean(axis=0), points[::every]
    head = _head([magnitude])
    inverse = np.linalg.inv(affine)

    def matrix(p: np.ndarray) -> np.ndarray:
        move = np.eye(4)
        move[:3, :3] = Rotation.from_rotvec(p[:3], degrees=True).as_matrix()
        move[:3, 3] = centre + p[3:] - move[:3, :3] @ centre
        return start @ move

    best = np.zeros(6)
    for width in PLACING_WIDTHS:
        fixed = _contrast(b0, mask, b0_affine, width)[inside][::every]
        moving = _contrast(magnitude, head, affine, width)

        def cost(p: np.ndarray, fixed: np.ndarray = fixed, moving: np.ndarray = moving) -> float:
            where = transform_points(inverse @ matrix(p), points)
            seen = map_coordinates(moving, where.T, order=1)
            return float(1 - np.corrcoef(fixed, seen)[0, 1] ** 2) if seen.std() > 0 else 1.0

        best = minimize(cost, best, method="Powell", options={
            "xtol": 0.02, "ftol": 1e-5, "direc": np.eye(6)}).x
    return matrix(best) if cost(best) < MOVED * cost(np.zeros(6)) else start


def _contrast(image: np.ndarray, mask: np.ndarray, affine: np.ndarray, width: float) -> np.ndarray:
    """The logarithm of an image between two scales: smoothed, less its mean over CONTRAST mm."""
    log = np.log(np.maximum(image, max(np.percentile(image[mask], 2), 1e-6)))
    scales = [_local_mean(log, mask, affine, sd) for sd in (width, CONTRAST)]
    return ((scales[0] - scales[1]) * mask).clip(-0.7, 0.7)


def _local_mean(image: np.ndarray, mask: np.ndarray, affine: np.ndarray, sd: float) -> np.ndarray:
    """Gaussian mean (SD in mm) over the voxels of a mask."""
    from scipy.ndimage import gaussian_filter

    sigma = sd / np.linalg.norm(affine[:3, :3], axis=0)
    weight = gaussian_filter(mask.astype(np.float32), sigma)
    return gaussian_filter(np.where(mask, image, 0), sigma) / np.maximum(weight, 0.05)


def _measured_field(kind: str, images: Sequence[np.ndarray], magnitude: np.ndarray,
                    echo_times: tuple[float, float] | None, units: str | None) -> np.ndarray:
    """The field in Hz on the grid of a gradient-echo map, continued outside the head."""
    from skimage.restoration import unwrap_phase

    if any(i.shape != magnitude.shape for i in images) or magnitude.ndim != 3:
        raise DataError(f"the field map has the shape {images[0].shape}, and its magnitude "
                        f"{magnitude.shape}; the same three sizes are needed. Export both again.")
    if not np.nan_to_num(magnitude).max() > 0:
        raise DataError("the magnitude of the field map holds no signal above 0. Convert it again.")
    if not any(np.nan_to_num(image).any() for image in images):
        raise DataError("the field map holds no values but 0. Convert it again.")
    head = _head([magnitude])
    if kind == "fieldmap":
        if units not in FIELD_UNITS:
            raise DataError(f"the field map has the unit {units!r}; Hz, rad/s or T is needed. "
                            "Correct Units in its sidecar.")
        return _continue(images[0] * FIELD_UNITS[units], magnitude * head)
    if echo_times is None or not 0 < echo_times[0] < echo_times[1]:
        raise DataError(f"the echo times of the field map are {echo_times}; two are needed, the "
                        "second larger than the first. Correct its sidecar.")
    phases = [to_radians(image, units) for image in images]
    wrapped = np.angle(np.exp(1j * (phases[0] if kind == "phasediff" else phases[1] - phases[0])))
    phase = np.ma.filled(unwrap_phase(np.ma.array(wrapped, mask=~head), rng=0), 0.0)
    phase -= 2 * np.pi * np.round(np.median(phase[head]) / (2 * np.pi))
    hz = phase / (2 * np.pi * (echo_times[1] - echo_times[0]))
    return _continue(hz, magnitude * head)


def _continue(hz: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Smooth a field with weights, and continue it where there are none, by Gaussians of growing
    width."""
    from scipy.ndimage import gaussian_filter

    weight = (weight / weight.max()).astype(np.float32) ** 2
    total, out = np.zeros_like(weight), np.zeros_like(weight)
    for width in (0.7, 2.0, 5.0, 12.0, 30.0):
        w = gaussian_filter(weight, width) + 1e-12
        part = gaussian_filter(weight * np.nan_to_num(hz).astype(np.float32), width) / w
        share = (1 - total) * np.clip(w / 0.02, 0, 1)
        out, total = out + share * part, total + share
    return out + (1 - total) * part


_HALF = np.diag([2.0, 2.0, 2.0, 1.0])
_HALF[:3, 3] = 0.5


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
    if first.shape[a.axis] < MIN_LINE:
        raise DataError(f"the images of the pair have {first.shape[a.axis]} voxels along the phase "
                        f"axis; {MIN_LINE} are needed. Check PhaseEncodingDirection.")
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


def _halve(image: np.ndarray) -> np.ndarray:
    """Means of 2 × 2 × 2 voxels; the last voxel of an odd axis is repeated."""
    image = np.pad(image, [(0, n % 2) for n in image.shape], mode="edge")
    x, y, z = (n // 2 for n in image.shape)
    return image.reshape(x, 2, y, 2, z, 2).mean((1, 3, 5))


def _double(u: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Displacements on a grid of half the size → those on a grid of `shape`."""
    fine = 2 * functional.interpolate(u[None, None], scale_factor=2, mode="trilinear")[0, 0]
    return fine[:shape[0], :shape[1], :shape[2]]


def _estimate(images: Sequence[np.ndarray], affines: tuple[np.ndarray, np.ndarray], axis: int,
              ratio: np.ndarray, alpha: float, device: str, *, motion: bool
              ) -> tuple[np.ndarray, np.ndarray]:
    """Minimise E coarse to fine: the displacement u (voxels), of which image k shows ratioₖ u, and
    the motion between the images."""
    # the phase axis comes first, so that all lines advance together
    order = [axis, *(a for a in range(3) if a != axis)]
    size = np.linalg.norm(affines[0][:3, :3], axis=0)[order]
    pyramid = [tuple(np.transpose(i, order) for i in images)]
    frames = [tuple(a[:, [*order, 3]] for a in affines)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape) >= 2 * MIN_SIZE:
        pyramid.append(tuple(_halve(i) for i in pyramid[-1]))
        frames.append(tuple(a @ _HALF for a in frames[-1]))
    move = np.eye(4)
    u: Tensor | None = None
    for level in reversed(range(len(pyramid))):
        shape = pyramid[level][0].shape
        problem = _Problem(pyramid[level], frames[level], size, ratio, alpha, device)
        u = problem.transport() if u is None else _double(u, shape)
        problem.place(move)
        u, energy = problem.solve(u)
        for _ in range(ROUNDS if level else 1):
            if not motion or min(shape) < MIN_SLICES:
                break
            trial, trial_move = problem.solve_with_motion(u, move)
            problem.place(trial_move)
            trial, trial_energy = problem.solve(trial)
            if trial_energy >= energy:
                break
            change = _distance(move, trial_move, frames[level][0], shape)
            u, move, energy = trial, trial_move, trial_energy
            if change < STILL * size.mean() * 2**level:
                break
    assert u is not None
    return np.transpose(u.cpu().numpy(), np.argsort(order)), move


class _Parts(NamedTuple):
    """The residual R of E at a displacement, its derivatives by the displacement of a voxel (a) and
    by the slope (c), and the differences of neighbours."""

    residual: Tensor
    a: Tensor
    c: Tensor
    steps: Tensor


_Bands = tuple[Tensor, Tensor, Tensor]
"""Diagonal of a symmetric pentadiagonal matrix of each line, and the two beside it."""

_Rows = tuple[Tensor, Tensor, Tensor]
"""Entries of the Jacobian before, at and behind each voxel of a line."""


class _Problem:
    """E and its minimisation on one grid; tensors are (phase axis, two other axes)."""

    def __init__(self, images: tuple[np.ndarray, ...], frames: tuple[np.ndarray, ...],
                 size: np.ndarray, ratio: np.ndarray, alpha: float, device: str) -> None:
        self.device = device
        self.first, self.second = images
        self.frames, self.ratio, self.alpha = frames, ratio, alpha
        self.shape = self.first.shape
        self.placed = self.second
        self.lines = [self._polynomials(i) for i in images]
        self.index = torch.arange(self.shape[0], device=device, dtype=torch.float32)[:, None, None]
        self.across = [alpha * (size[0] / s) ** 2 for s in size[1:]]

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.as_tensor(np.ascontiguousarray(array, np.float32), device=self.device)

    def _polynomials(self, image: np.ndarray) -> Tensor:
        """(n − 1, …, 4) coefficients of the cubic B-spline of each interval of each line."""
        from scipy.ndimage import spline_filter1d

        c = self._tensor(spline_filter1d(image, axis=0, output=np.float32))
        c = torch.cat([c[1:2], c, c[-2:-1]])  # mirrored
        a, b, c, d = c[:-3], c[1:-2], c[2:-1], c[3:]
        return torch.stack([(a + 4 * b + c) / 6, (c - a) / 2, (a - 2 * b + c) / 2,
                            (d - 3 * c + 3 * b - a) / 6], -1)

    def _evaluate(self, lines: Tensor, where: Tensor) -> tuple[Tensor, Tensor]:
        """Values and slopes at positions along the lines; the edge continues beyond a line."""
        inside = where.clamp(0, self.shape[0] - 1)
        left = inside.floor().clamp(max=self.shape[0] - 2)
        t = inside - left
        lane = torch.arange(where[0].numel(), device=self.device).reshape(where[0].shape)
        rows = lines.reshape(-1, 4)[(left.long() * where[0].numel() + lane).reshape(-1)]
        p0, p1, p2, p3 = rows.reshape(*where.shape, 4).unbind(-1)
        value = ((p3 * t + p2) * t + p1) * t + p0
        slope = (3 * p3 * t + 2 * p2) * t + p1
        return value, slope * (inside == where)

    def place(self, move: np.ndarray) -> None:
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
        self.lines[1] = self._polynomials(second)

    def transport(self) -> Tensor:
        """Match the cumulative intensities of each line: optimal transport in one dimension (Chang
        and Fitzpatrick 1992, doi:10.1109/42.158935)."""
        from scipy.ndimage import gaussian_filter

        n = self.shape[0]
        flat = [torch.as_tensor(i, dtype=torch.float32).reshape(n, -1).T + FLOOR
                for i in (self.first, self.second)]
        mass = [functional.pad(i.cumsum(1) / i.sum(1, keepdim=True), (1, 0)) for i in flat]
        face = torch.arange(n + 1, dtype=torch.float32).expand_as(mass[0]).contiguous()
        share = torch.linspace(0, 1, 4 * n + 1).expand(len(face), -1).contiguous()
        q1, q2 = (_interpolate(share, m, face) for m in mass)
        r1, r2 = self.ratio
        shift = (q1 - q2) / (r1 - r2)
        u = _interpolate(face[:, :-1] + 0.5, q1 - r1 * shift, shift)
        smooth = gaussian_filter(u.T.reshape(self.shape).numpy(), 1.0)
        steepest = np.abs(self.ratio).max() * np.abs(np.diff(smooth, axis=0)).max()
        return self._tensor(smooth * min(1, 0.95 / max(steepest, 1e-6)))

    def _energy(self, u: Tensor) -> tuple[float, _Parts | None]:
        """E at u, with what its derivatives need."""
        r1, r2 = self.ratio
        steps = u.diff(dim=0)
        if not float(steps.abs().max()) * max(abs(r1), abs(r2)) < 1:
            return np.inf, None
        slope = torch.gradient(u, dim=0)[0]
        w1, g1 = self._evaluate(self.lines[0], self.index + r1 * u)
        w2, g2 = self._evaluate(self.lines[1], self.index + r2 * u)
        j1, j2 = 1 + r1 * slope, 1 + r2 * slope
        residual = w1 * j1 - w2 * j2
        energy = 0.5 * residual.square().sum() + self.alpha / 2 * steps.square().sum()
        for axis, weight in enumerate(self.across, 1):
            energy = energy + weight / 2 * u.diff(dim=axis).square().sum()
        for r in self.ratio:
            t = (r * steps).square()
            energy = energy + BARRIER * (t * t / (1 - t)).sum()
        return float(energy), _Parts(residual, r1 * g1 * j1 - r2 * g2 * j2, r1 * w1 - r2 * w2,
                                     steps)

    def _laplace(self, u: Tensor) -> Tensor:
        """α times the transposed gradient of the gradient across lines."""
        out = torch.zeros_like(u)
        for axis, weight in zip((-2, -1), self.across, strict=True):
            step = weight * u.diff(dim=axis)
            n = u.shape[axis] - 1
            out.narrow(axis, 1, n).add_(step)
            out.narrow(axis, 0, n).sub_(step)
        return out

    def _normal_equations(self, u: Tensor, parts: _Parts) -> tuple[Tensor, _Bands, _Rows]:
        """Gradient of E, the three bands of its Gauss–Newton matrix along the lines, and the
        Jacobian's entries before, at and behind each voxel."""
        residual, a, c, steps = parts
        stiff = torch.full_like(steps, self.alpha)
        force = self.alpha * steps
        for r in self.ratio:
            t = r * steps
            gap = 1 - t * t
            force += BARRIER * r * 2 * t * (1 / gap**2 - 1)
            stiff += BARRIER * r * r * (2 / gap**2 - 2 + 8 * t * t / gap**3)
        before, at, behind = -c / 2, a.clone(), c / 2
        before[0], at[0], behind[0] = 0, a[0] - c[0], c[0]
        before[-1], at[-1], behind[-1] = -c[-1], a[-1] + c[-1], 0
        rows = before, at, behind
        gradient = self._laplace(u) + _transposed(rows, residual)
        gradient[:-1] -= force
        gradient[1:] += force
        diagonal = at.square()
        diagonal[1:] += behind[:-1].square() + stiff
        diagonal[:-1] += before[1:].square() + stiff
        beside = at[:-1] * behind[:-1] + before[1:] * at[1:] - stiff
        beyond = before[1:-1] * behind[1:-1]
        return gradient, (diagonal, beside, beyond), rows

    def solve(self, u: Tensor) -> tuple[Tensor, float]:
        """Minimise E over the field by Gauss–Newton steps from u."""
        energy, parts = self._energy(u)
        for _ in range(STEPS):
            assert parts is not None
            gradient, bands, _ = self._normal_equations(u, parts)
            step = self._conjugate_gradients(-gradient, bands)
            slope, length = float((gradient * step).sum()), 1.0
            trial, parts = self._energy(u + step)
            while trial > energy + ARMIJO * length * slope and length > MIN_STEP:
                length /= 2
                trial, parts = self._energy(u + length * step)
            if trial > energy:
                break
            u, decrease, energy = u + length * step, energy - trial, trial
            if decrease < TOLERANCE * energy:
                break
        return u, energy

    def _conjugate_gradients(self, right: Tensor, bands: _Bands) -> Tensor:
        """Solve for right sides (…, x, y, z)."""
        diagonal, beside, beyond = bands

        def product(v: Tensor) -> Tensor:
            out = self._laplace(v)
            out.addcmul_(diagonal, v)
            for band in (beside, beyond):
                n = len(band)
                out[..., :n, :, :].addcmul_(band, v[..., -n:, :, :])
                out[..., -n:, :, :].addcmul_(band, v[..., :n, :, :])
            return out

        def dot(a: Tensor, b: Tensor) -> Tensor:
            return (a * b).sum((-3, -2, -1), keepdim=True)

        precondition = self._factorise(bands)
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

    def _factorise(self, bands: _Bands) -> Callable[[Tensor], Tensor]:
        """Factorise the matrix of each line, with the diagonal of the smoothness across lines, as
        L D Lᵀ; the result solves with it."""
        d, e, f = (band.clone() for band in bands)
        for axis, weight in enumerate(self.across, 1):
            d += 2 * weight
            for end in (0, -1):
                d.select(axis, end).sub_(weight)
        n = len(d)
        near, far = torch.empty_like(e), torch.empty_like(f)
        for i in range(n - 1):
            near[i] = e[i] / d[i]
            d[i + 1].addcmul_(near[i], e[i], value=-1)
            if i < n - 2:
                far[i] = f[i] / d[i]
                e[i + 1].addcmul_(near[i], f[i], value=-1)
                d[i + 2].addcmul_(far[i], f[i], value=-1)

        def solve(b: Tensor) -> Tensor:
            x = b.movedim(-3, 0).clone()
            for i in range(n - 1):
                x[i + 1].addcmul_(near[i], x[i], value=-1)
                if i < n - 2:
                    x[i + 2].addcmul_(far[i], x[i], value=-1)
            x = x.movedim(0, -3) / d
            lines = x.movedim(-3, 0)
            for i in reversed(range(n - 1)):
                lines[i].addcmul_(near[i], lines[i + 1], value=-1)
                if i < n - 2:
                    lines[i].addcmul_(far[i], lines[i + 2], value=-1)
            return x

        return solve

    def solve_with_motion(self, u: Tensor, move: np.ndarray) -> tuple[Tensor, np.ndarray]:
        """Take one Gauss–Newton step of field and motion together.

        The motion's columns are δ(x) = ω × x + τ without τ along the phase axis. The field is
        eliminated by the Schur complement, since it can follow any motion locally.
        """
        from scipy.spatial.transform import Rotation

        r2 = self.ratio[1]
        parts = self._energy(u)[1]
        assert parts is not None
        gradient, bands, rows = self._normal_equations(u, parts)
        to = self.frames[0]
        spacing = np.linalg.norm(to[:3, :3], axis=0)
        axes = to[:3, :3] / spacing  # the axes of the image in the world
        centre = (np.array(self.shape) - 1) / 2 * spacing
        where = self.index + r2 * u
        g = [self._evaluate(self.lines[1], where)[1] / spacing[0]]
        g += [self._evaluate(self._polynomials(np.gradient(self.placed, spacing[a], axis=a)),
                             where)[0] for a in (1, 2)]
        x = [self._tensor((np.arange(n) * s - c).reshape([-1 if a == k else 1 for a in range(3)]))
             for k, (n, s, c) in enumerate(zip(self.shape, spacing, centre, strict=True))]
        x[0] = x[0] + r2 * u * spacing[0]
        columns = -(1 + r2 * torch.gradient(u, dim=0)[0]) * torch.stack([
            g[2] * x[1] - g[1] * x[2], g[0] * x[2] - g[2] * x[0], g[1] * x[0] - g[0] * x[1],
            g[1], g[2]])
        coupling = torch.stack([_transposed(rows, c) for c in columns])
        solved = self._conjugate_gradients(torch.cat([-gradient[None], coupling]), bands)
        flat = columns.reshape(5, -1)
        schur = flat @ flat.T - coupling.reshape(5, -1) @ solved[1:].reshape(5, -1).T
        right = -flat @ parts.residual.reshape(-1) - coupling.reshape(5, -1) @ solved[0].reshape(-1)
        p = np.linalg.lstsq(schur.double().cpu().numpy(), right.double().cpu().numpy(),
                            rcond=1e-9)[0]
        delta = np.eye(4)
        delta[:3, :3] = axes @ Rotation.from_rotvec(p[:3]).as_matrix() @ axes.T
        pivot = to[:3, 3] + axes @ centre
        delta[:3, 3] = pivot + axes @ np.r_[0, p[3:]] - delta[:3, :3] @ pivot
        change = solved[0] - torch.tensordot(self._tensor(p), solved[1:], 1)
        length = 1.0
        while np.isinf(self._energy(u + length * change)[0]) and length > MIN_STEP:
            length /= 2
        return u + length * change, move @ delta


def _transposed(rows: _Rows, v: Tensor) -> Tensor:
    """Apply the transposed Jacobian of entries (before, at, behind) the voxels of a line."""
    before, at, behind = rows
    out = at * v
    out[1:] += behind[:-1] * v[:-1]
    out[:-1] += before[1:] * v[1:]
    return out


def _interpolate(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Interpolate each row linearly at `at`, for ascending x."""
    right = torch.searchsorted(x.contiguous(), at).clamp(1, x.shape[1] - 1)
    x0, x1 = x.gather(1, right - 1), x.gather(1, right)
    y0, y1 = y.gather(1, right - 1), y.gather(1, right)
    return y0 + (y1 - y0) * ((at - x0) / (x1 - x0).clamp(min=1e-9)).clamp(0, 1)
