"""Smooth random fields, the same wherever and on whatever grid they are evaluated."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from scipy import ndimage

HALF_WIDTH = 160.0
"""mm: fields are drawn for the cube |x| ≤ HALF_WIDTH, which holds a head in any pose."""

UNIT = 3.0
"""Of independent coefficients, for a field of unit SD: (Σ_i B(t − i)²)^(−3/2) averaged over t."""


def stream(seed: int, *names: object) -> np.random.Generator:
    """A random generator of its own for what is named; adding names elsewhere does not move it."""
    return np.random.default_rng([seed, zlib.crc32("/".join(map(str, names)).encode())])


@dataclass(frozen=True, eq=False)
class SplineField:
    """Uniform cubic B-spline: k fields with coefficients (k, n, n, n) every `spacing` mm."""

    coefficients: np.ndarray
    spacing: float

    @classmethod
    def draw(cls, rng: np.random.Generator, sd: Float[np.ndarray, " k"], spacing: float,
             limit: float = np.inf) -> SplineField:
        """Independent normal coefficients, for fields of the given SDs and mean 0; |coefficient| at
        most `limit`."""
        n = 2 * int(np.ceil(HALF_WIDTH / spacing) + 2) + 1
        normal = rng.standard_normal((len(sd), n, n, n))
        return cls(np.clip(UNIT * sd[:, None, None, None] * normal, -limit, limit), spacing)

    def at(self, points: Float[np.ndarray, "n 3"], which: slice = slice(None)
           ) -> Float[np.ndarray, "k n"]:
        """Values of `which` fields, all by default, at world points (mm)."""
        index = points.T / self.spacing + self.coefficients.shape[1] // 2
        return np.stack([ndimage.map_coordinates(c, index, order=3, prefilter=False,
                                                 mode="nearest", output=np.float32)
                         for c in self.coefficients[which]])
