"""Smooth random fields whose values do not depend on the grid on which they are evaluated."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage

HALF_WIDTH = 160.0
"""Fields are drawn for the cube |x| ≤ HALF_WIDTH (mm), which holds a head in any pose."""

COEFFICIENT_SD = 3.0
"""SD of the coefficients of a field of SD 1: (Σ_i B(t − i)²)^(−3/2), averaged over t, with the
cubic B-spline B."""


def stream(seed: int, *names: object) -> np.random.Generator:
    """Create a random generator that depends on the seed and the names alone.

    Draws from one stream do not change when other streams are added.

    Parameters
    ----------
    seed : int
        Seed of the phantom.
    *names : object
        Words that identify the stream, such as ("person", label).

    Returns
    -------
    numpy.random.Generator
    """
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


@dataclass(frozen=True, eq=False)
class SplineField:
    """k scalar fields as uniform cubic B-splines.

    Parameters
    ----------
    coefficients : (k, n, n, n) ndarray
    spacing : float
        Distance between coefficients (mm).
    """

    coefficients: np.ndarray
    spacing: float

    @classmethod
    def draw(cls, rng: np.random.Generator, sd: Float[np.ndarray, " k"], spacing: float,
             limit: float = np.inf) -> SplineField:
        """Draw fields with independent normal coefficients and mean 0.

        Parameters
        ----------
        rng : numpy.random.Generator
        sd : (k,) ndarray
            SD of each field.
        spacing : float
            Distance between coefficients (mm).
        limit : float
            Largest absolute value of a coefficient.

        Returns
        -------
        SplineField
        """
        n = 2 * int(np.ceil(HALF_WIDTH / spacing) + 2) + 1
        normal = rng.standard_normal((len(sd), n, n, n))
        coefficients = COEFFICIENT_SD * sd[:, None, None, None] * normal
        return cls(np.clip(coefficients, -limit, limit), spacing)

    def at(self, points: Float[np.ndarray, "n 3"], which: slice = slice(None)
           ) -> Float[np.ndarray, "k n"]:
        """Evaluate the fields `which` (default: all) at points (mm). The origin is at the central
        coefficient; outside of the cube the nearest coefficients continue."""
        index = points.T / self.spacing + self.coefficients.shape[1] // 2
        return np.stack([ndimage.map_coordinates(c, index, order=3, prefilter=False,
                                                 mode="nearest", output=np.float32)
                         for c in self.coefficients[which]])
