"""Scalar images in world coordinates."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from bidsapp.registration.geometry import grid_coordinates


def sample(values: Float[np.ndarray, "x y z"], affine: np.ndarray,
           points: Float[np.ndarray, "*grid 3"], *, beyond: str = "constant"
           ) -> Float[np.ndarray, "*grid"]:
    """Interpolate an image linearly at world points.

    Parameters
    ----------
    values : (x, y, z)
        The image.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.
    points : (…, 3)
        World points, mm.
    beyond : str
        Value outside the image: `constant`, 0; `nearest`, that of the nearest edge.

    Returns
    -------
    (…)
        Values at the points.
    """
    from scipy.ndimage import map_coordinates

    return map_coordinates(values, grid_coordinates(affine, points), order=1, mode=beyond)


@dataclass(frozen=True, eq=False)
class Image:
    """A scalar image on its grid.

    Parameters
    ----------
    values : (x, y, z)
        Values, which are 0 outside the brain.
    affine : (4, 4)
        Voxel indices to world RAS+, mm.
    """

    values: np.ndarray
    affine: np.ndarray

    def at(self, points: Float[np.ndarray, "*grid 3"]) -> Float[np.ndarray, "*grid"]:
        """Interpolate linearly at world points (mm); the value outside the image is 0."""
        return sample(self.values, self.affine, points)

    @property
    def volume(self) -> float:
        """Volume of the voxels above 0, in mm³."""
        return float((self.values > 0).sum() * abs(np.linalg.det(self.affine[:3, :3])))
