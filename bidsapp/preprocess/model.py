"""Geometry of a diffusion series: where each volume shows a point of the head.

The point x (world RAS+, mm) of the reference appears in volume v at

    φ_v(x) = y + p_v s_v T_v [h(x) + e_v(y)],    y = R_v x + t_v

with the rigid motion of the head (R_v, t_v), the susceptibility field h (Hz) that moves with the
head, and the field e_v (Hz) of eddy currents, a quadratic polynomial of the position y in the
scanner. p_v is the unit vector of the phase encoding with its sign, s_v the size of a voxel along
it (mm) and T_v the total readout time (s), so that T_v (h + e_v) is a shift in voxels. Signal that
is moved together is added up; since det R_v = 1, the intensity at the reference is

    S(x) = I_v(φ_v(x)) det ∂φ_v/∂x = I_v(φ_v(x)) (1 + s_v T_v [∇h(x) · R_vᵀ p_v + ∇e_v(y) · p_v])

(Andersson et al. 2003, doi:10.1016/S1053-8119(03)00336-7; Andersson and Sotiropoulos 2016,
doi:10.1016/j.neuroimage.2015.10.019).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Shaped

from bidsapp.acquisition import PhaseEncoding
from bidsapp.registration.geometry import grid_coordinates, transform_points, world_points

EDDY_TERMS = 10
"""Number of coefficients of the field of eddy currents."""

EDDY_SCALE = 100.0
"""Unit of length of the eddy basis, in mm."""

BLOCK = 2**18
"""Number of points that are resampled at once."""


def eddy_basis(points: Float[np.ndarray, "*grid 3"], centre: Float[np.ndarray, " 3"]
               ) -> Float[np.ndarray, "*grid 10"]:
    """Compute the quadratic polynomials of the position: 1, x, y, z, x², y², z², xy, xz, yz.

    Parameters
    ----------
    points : (…, 3)
        World points, mm.
    centre : (3,)
        Origin of x, y and z, world mm; their unit is 100 mm.
    """
    x, y, z = np.moveaxis((points - centre) / EDDY_SCALE, -1, 0)
    return np.stack([np.ones_like(x), x, y, z, x * x, y * y, z * z, x * y, x * z, y * z], -1)


def eddy_basis_along(points: Float[np.ndarray, "*grid 3"], centre: Float[np.ndarray, " 3"],
                     direction: Float[np.ndarray, " 3"]) -> Float[np.ndarray, "*grid 10"]:
    """Compute the derivatives of `eddy_basis` along a unit vector, 1/mm."""
    x, y, z = np.moveaxis((points - centre) / EDDY_SCALE, -1, 0)
    a, b, c = direction / EDDY_SCALE
    one = np.ones_like(x)
    return np.stack([0 * one, a * one, b * one, c * one, 2 * a * x, 2 * b * y, 2 * c * z,
                     a * y + b * x, a * z + c * x, b * z + c * y], -1)


@dataclass(frozen=True, eq=False)
class Geometry:
    """Positions of the reference in each volume of a series, as the module's equations say.

    All volumes lie on the grid of the reference.

    Parameters
    ----------
    affine : (4, 4)
        Voxel to world RAS+ of the grid, mm.
    shape : (x, y, z)
        Shape of the grid.
    encodings : tuple of PhaseEncoding or None
        Phase encoding of each volume.
    rotations : (n, 3, 3)
        R_v, about the origin of the world.
    translations : (n, 3)
        t_v, mm.
    eddy : (n, 10)
        Coefficients of `eddy_basis` about the centre of the grid, Hz.
    field : (x, y, z) float32, optional
        Susceptibility field h on the reference grid, Hz.

    Raises
    ------
    ValueError
        A shape is wrong, a number is not finite, a matrix is not a rotation, or a volume is
        distorted whose phase encoding or readout time is unknown.
    """

    affine: np.ndarray
    shape: tuple[int, int, int]
    encodings: tuple[PhaseEncoding | None, ...]
    rotations: np.ndarray
    translations: np.ndarray
    eddy: np.ndarray
    field: np.ndarray | None = None

    def __post_init__(self) -> None:
        n = len(self.encodings)
        for name, shape in (("affine", (4, 4)), ("rotations", (n, 3, 3)), ("translations", (n, 3)),
                            ("eddy", (n, EDDY_TERMS))):
            array = np.array(getattr(self, name), dtype=np.float64)
            if array.shape != shape or not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite, of shape {shape}, and has the shape "
                                 f"{array.shape}")
            array.flags.writeable = False
            object.__setattr__(self, name, array)
        r = self.rotations
        if not (np.allclose(r @ np.swapaxes(r, 1, 2), np.eye(3), atol=1e-5)
                and np.all(np.linalg.det(r) > 0)):
            raise ValueError("rotations must be orthogonal and proper")
        if self.field is not None:
            field = np.array(self.field, dtype=np.float32)
            if field.shape != tuple(self.shape) or not np.isfinite(field).all():
                raise ValueError(f"field must be finite, of shape {self.shape}, and has the shape "
                                 f"{field.shape}")
            field.flags.writeable = False
            object.__setattr__(self, "field", field)
        for v, encoding in enumerate(self.encodings):
            if ((self.field is not None or self.eddy[v].any())
                    and (encoding is None or encoding.readout is None)):
                raise ValueError(f"volume {v} is distorted, but its phase encoding or readout time "
                                 "is unknown")

    @classmethod
    def static(cls, affine: np.ndarray, shape: Sequence[int],
               encodings: Sequence[PhaseEncoding | None], field: np.ndarray | None = None
               ) -> Geometry:
        """Describe a series without motion and eddy currents."""
        n, (x, y, z) = len(encodings), shape
        return cls(affine, (x, y, z), tuple(encodings), np.tile(np.eye(3), (n, 1, 1)),
                   np.zeros((n, 3)), np.zeros((n, EDDY_TERMS)), field)

    def __len__(self) -> int:
        return len(self.encodings)

    @property
    def centre(self) -> Float[np.ndarray, " 3"]:
        """(3,) centre of the grid, world mm: the origin of the eddy basis."""
        return transform_points(self.affine, (np.array(self.shape) - 1) / 2)

    def shift_per_hertz(self, v: int) -> Float[np.ndarray, " 3"]:
        """(3,) p_v s_v T_v: displacement by a field of 1 Hz, mm; 0 without a readout time."""
        encoding = self.encodings[v]
        if encoding is None or encoding.readout is None:
            return np.zeros(3)
        return encoding.sign * encoding.readout * self.affine[:3, encoding.axis]

    def coordinates(self, v: int, points: Float[np.ndarray, "*grid 3"]
                    ) -> tuple[Float[np.ndarray, "*grid 3"], Float[np.ndarray, "*grid"]]:
        """Find where volume v shows points of the reference.

        Parameters
        ----------
        v : int
            The volume.
        points : (…, 3)
            World points x of the reference, mm.

        Returns
        -------
        (…, 3)
            Voxel coordinates of φ_v(x) in the volume.
        (…)
            Intensity factor det ∂φ_v/∂x.
        """
        return self._displace(v, points, *self.field_at(points))

    def reference_points(self, v: int, points: Float[np.ndarray, "*grid 3"], iterations: int = 8
                         ) -> Float[np.ndarray, "*grid 3"]:
        """Find the points of the reference that volume v shows at some points, x = φ_v⁻¹(points).

        The fixed-point iteration y ← points − p_v s_v T_v [h(x) + e_v(y)] converges as long as the
        distortion does not fold, |∂_p φ_v − 1| < 1.

        Parameters
        ----------
        v : int
            The volume.
        points : (…, 3)
            World points in the volume, mm.
        iterations : int
            Number of iterations.

        Returns
        -------
        (…, 3)
            World points of the reference, mm.
        """
        shift = self.shift_per_hertz(v)
        y = points
        for _ in range(iterations):
            hertz = eddy_basis(y, self.centre) @ self.eddy[v]
            if self.field is not None:
                hertz = hertz + self.field_at((y - self.translations[v]) @ self.rotations[v])[0]
            y = points - hertz[..., None] * shift
        return (y - self.translations[v]) @ self.rotations[v]

    def field_at(self, points: Float[np.ndarray, "*grid 3"]
                 ) -> tuple[Float[np.ndarray, "*grid"], Float[np.ndarray, "*grid 3"]]:
        """Interpolate h (Hz) and ∇h (Hz/mm, world) linearly; constant beyond the grid."""
        from scipy.ndimage import map_coordinates

        if self._field_and_gradient is None:
            return np.zeros(points.shape[:-1]), np.zeros(points.shape)
        at = grid_coordinates(self.affine, points)
        h, *gradient = (map_coordinates(values, at, np.float64, order=1, mode="nearest")
                        for values in self._field_and_gradient)
        return h, np.stack(gradient, -1)

    @cached_property
    def _field_and_gradient(self) -> list[np.ndarray] | None:
        """h and the three components of its gradient in the world, on the grid."""
        if self.field is None:
            return None
        by_axis = [np.gradient(self.field, axis=a) if self.shape[a] > 1
                   else np.zeros_like(self.field) for a in range(3)]
        gradient = np.tensordot(np.linalg.inv(self.affine)[:3, :3].T, np.stack(by_axis), 1)
        return [self.field, *gradient.astype(np.float32)]

    def _displace(self, v: int, points: np.ndarray, h: np.ndarray, gradient: np.ndarray
                  ) -> tuple[np.ndarray, np.ndarray]:
        rotation, shift = self.rotations[v], self.shift_per_hertz(v)
        y = points @ rotation.T + self.translations[v]
        hertz, slope = h, gradient @ (rotation.T @ shift)
        if self.eddy[v].any():
            hertz = hertz + eddy_basis(y, self.centre) @ self.eddy[v]
            slope = slope + eddy_basis_along(y, self.centre, shift) @ self.eddy[v]
        at = transform_points(np.linalg.inv(self.affine), y + hertz[..., None] * shift)
        return at, 1 + slope


def resample(volumes: Iterable[Shaped[np.ndarray, "x y z"]], geometry: Geometry,
             shape: Sequence[int], affine: np.ndarray, *, order: int = 3,
             to_reference: np.ndarray | Callable[[np.ndarray], np.ndarray] | None = None
             ) -> Iterator[Shaped[np.ndarray, "i j k"]]:
    """Resample each volume of a series to a grid, through all transforms in one interpolation.

    The interpolation is a spline through the voxels. Up to half a voxel beyond the outer voxels
    their value is continued; farther outside the result is 0. Where no value of a real volume is
    negative, no result is.

    Parameters
    ----------
    volumes : iterable of (x, y, z), real or complex
        As many volumes as the geometry has, on its grid.
    geometry : Geometry
        Position of the reference in each volume.
    shape : (i, j, k)
        Shape of the output grid.
    affine : (4, 4)
        Voxel to world of the output grid, mm.
    order : int
        Degree of the spline.
    to_reference : (4, 4) or callable, optional
        Maps world points of the output (…, 3) to those of the reference; default: they are equal.

    Yields
    ------
    (i, j, k) float32 or complex64

    Raises
    ------
    ValueError
        The number of volumes, or the shape of one, is not that of the geometry.
    """
    from scipy.ndimage import map_coordinates, spline_filter

    points = world_points(shape, affine).reshape(-1, 3)
    if callable(to_reference):
        points = to_reference(points)
    elif to_reference is not None:
        points = transform_points(to_reference, points)
    blocks = [slice(first, first + BLOCK) for first in range(0, len(points), BLOCK)]
    fields = [geometry.field_at(points[block]) for block in blocks]
    last = np.array(geometry.shape) - 1
    for v, volume in zip(range(len(geometry)), volumes, strict=True):
        if volume.shape != tuple(geometry.shape):
            raise ValueError(f"volume {v} has the shape {volume.shape}; {geometry.shape} is needed")
        is_complex = np.iscomplexobj(volume)
        coefficients = spline_filter(volume, order, np.complex128 if is_complex else np.float64,
                                     mode="mirror") if order > 1 else volume
        result = np.zeros(len(points), np.complex64 if is_complex else np.float32)
        for block, (h, gradient) in zip(blocks, fields, strict=True):
            at, factor = geometry._displace(v, points[block], h, gradient)
            inside = np.all((at >= -0.5) & (at <= last + 0.5), axis=-1)
            values = map_coordinates(coefficients, at[inside].clip(0, last).T, order=order,
                                     mode="mirror", prefilter=False)
            result[block][inside] = values * np.maximum(factor[inside], 0)
        if not is_complex and volume.min() >= 0:
            np.maximum(result, 0, out=result)
        yield result.reshape(tuple(shape))
