"""Real, antipodally symmetric spherical harmonics (even degrees) in the descoteaux07 basis.

f(n) = Σ_l Σ_m c_lm Y_lm(n), l = 0, 2, …, l_max; coefficients ordered by l, then m = −l … l.
Convention: dipy's `real_sh_descoteaux`, not legacy (Descoteaux et al. 2007,
doi:10.1002/mrm.21277).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def size(l_max: int) -> int:
    """Number of coefficients up to degree l_max: (l_max + 1)(l_max + 2)/2."""
    return (l_max + 1) * (l_max + 2) // 2


def degree_for(count: float, most: int = 8) -> int:
    """The largest even degree ≤ `most` that needs at most `count` coefficients (0 at least)."""
    return max((l for l in range(0, most + 1, 2) if size(l) <= count), default=0)


def basis(l_max: int, directions: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n _"]:
    """(n, size(l_max)) values of the basis functions along (n, 3) unit directions."""
    from dipy.core.geometry import cart2sphere
    from dipy.reconst.shm import real_sh_descoteaux

    _, theta, phi = cart2sphere(*np.asarray(directions, dtype=np.float64).T)
    return real_sh_descoteaux(l_max, theta, phi, legacy=False)[0]
