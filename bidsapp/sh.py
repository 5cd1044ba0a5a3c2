"""Real, antipodally symmetric spherical harmonics (even degrees) in the descoteaux07 basis.

f(n) = Σ_l Σ_m c_lm Y_lm(n), l = 0, 2, …, l_max; coefficients are ordered by l, then m = −l … l. The
basis is `real_sh_descoteaux` of dipy with legacy=False (Descoteaux et al. 2007,
doi:10.1002/mrm.21277). It is orthonormal, so that Σ_m Y_lm(n) Y_lm(μ) = (2l+1)/(4π) P_l(n·μ).
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int

MAX_CONDITION = 1e3
"""Condition number from which the columns of a basis count as linearly dependent. Directions that
are spread over the sphere, as in the protocols of scanners, give less than 3."""


def size(l_max: int) -> int:
    """Number of coefficients up to degree l_max: (l_max + 1)(l_max + 2)/2.

    >>> size(8)
    45
    """
    return (l_max + 1) * (l_max + 2) // 2


def degree_for(count: float, l_max: int = 8) -> int:
    """Largest even degree up to `l_max` that has at most `count` coefficients; at least 0.

    >>> degree_for(30)
    6
    """
    return max((l for l in range(0, l_max + 1, 2) if size(l) <= count), default=0)


def degrees(l_max: int) -> Int[np.ndarray, " _"]:
    """List the degree l of each coefficient, (size(l_max),)."""
    return np.repeat(np.arange(0, l_max + 1, 2), 2 * np.arange(0, l_max + 1, 2) + 1)


def per_coefficient(values: Float[torch.Tensor, "*batch degree"]
                    ) -> Float[torch.Tensor, "*batch _"]:
    """Repeat one value per degree, (…, l_max/2 + 1), for each coefficient, (…, size(l_max))."""
    # this is faster than indexing by the degree of each coefficient
    return torch.cat([v.expand(*v.shape[:-1], 4 * i + 1)
                      for i, v in enumerate(values.split(1, -1))], -1)


def l_max_of(coefficients: int) -> int:
    """Find the even degree whose basis has a number of coefficients.

    Raises
    ------
    ValueError
        There is no such degree.
    """
    l_max = (math.isqrt(8 * coefficients + 1) - 3) // 2
    if l_max % 2 or size(l_max) != coefficients:
        raise ValueError(f"no even degree has {coefficients} coefficients; 1, 6, 15, 28, 45, "
                         "… (l + 1)(l + 2)/2 are needed")
    return l_max


def basis(l_max: int, directions: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n _"]:
    """Evaluate the basis functions along unit directions.

    Parameters
    ----------
    l_max : int
        Even degree.
    directions : (n, 3)
        Unit vectors.

    Returns
    -------
    (n, size(l_max))
    """
    from dipy.core.geometry import cart2sphere
    from dipy.reconst.shm import real_sh_descoteaux

    _, theta, phi = cart2sphere(*np.asarray(directions, dtype=np.float64).T)
    return real_sh_descoteaux(l_max, theta, phi, legacy=False)[0]


def independent(basis: Float[np.ndarray, "n p"]) -> Float[np.ndarray, "n _"]:
    """Find linearly independent columns with the same span as those of a basis.

    Parameters
    ----------
    basis : (n, p)
        Values of basis functions. If the directions lie in a plane, or too few of them differ, the
        columns are linearly dependent, so that the normal equations cannot be solved.

    Returns
    -------
    (n, q)
        The basis itself if its condition number is below MAX_CONDITION; otherwise an orthonormal
        basis with fewer columns.
    """
    if np.linalg.cond(basis) < MAX_CONDITION:
        return basis
    from scipy.linalg import orth

    return orth(basis, rcond=1 / MAX_CONDITION)


def evaluate(l_max: int, directions: Float[torch.Tensor, "*batch 3"]
             ) -> Float[torch.Tensor, "*batch _"]:
    """Evaluate the basis functions differentiably, on any device.

    Y_lm = q_l|m|(z) · {√2 Re (x + iy)^|m|, 1, √2 (−1)^m Im (x + iy)^m} for m < 0, = 0, > 0, where
    q_lm (1 − z²)^(m/2) is the normalised associated Legendre function, by its recursion in l.

    Parameters
    ----------
    l_max : int
        Even degree.
    directions : (…, 3)
        Unit vectors.

    Returns
    -------
    (…, size(l_max))
    """
    x, y, z = (axis.contiguous() for axis in directions.unbind(-1))
    out: list[torch.Tensor] = [z] * size(l_max)
    sectoral = torch.full_like(z, math.sqrt(1 / (4 * math.pi)))
    cosine, sine = torch.ones_like(z), torch.zeros_like(z)
    for m in range(l_max + 1):
        before, q = torch.zeros_like(z), sectoral
        for l in range(m, l_max + 1):
            if l > m:
                a = math.sqrt((4 * l * l - 1) / (l * l - m * m))
                b = math.sqrt(((l - 1) ** 2 - m * m) / (4 * (l - 1) ** 2 - 1))
                before, q = q, a * (z * q - b * before)
            if l % 2 == 0:
                centre = l * (l + 1) // 2
                if m == 0:
                    out[centre] = q
                else:
                    out[centre - m] = math.sqrt(2) * q * cosine
                    out[centre + m] = (-1) ** m * math.sqrt(2) * q * sine
        cosine, sine = x * cosine - y * sine, x * sine + y * cosine
        sectoral = math.sqrt((2 * m + 3) / (2 * m + 2)) * sectoral
    return torch.stack(out, -1)


@lru_cache
def quadrature(degree: int) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Make a quadrature that is exact for antipodally symmetric polynomials up to a degree.

    It is the product of a Gauss–Legendre rule in z, of which antipodal symmetry saves half of the
    nodes, and equal steps in azimuth.

    Parameters
    ----------
    degree : int
        Degree of the polynomials.

    Returns
    -------
    points : (n, 3)
        Unit vectors on the half sphere z ≥ 0; read-only.
    weights : (n,)
        Weights, whose sum is 4π; read-only.
    """
    z, w = np.polynomial.legendre.leggauss(degree // 2 + 1)
    upper = z > -1e-12
    z, w = z[upper], w[upper] * np.where(np.abs(z[upper]) < 1e-12, 1, 2)
    phi = 2 * np.pi * np.arange(degree + 1) / (degree + 1)
    r = np.sqrt(1 - z**2)[:, None]
    points = np.stack([r * np.cos(phi), r * np.sin(phi), z[:, None] + 0 * phi], -1).reshape(-1, 3)
    weights = np.repeat(w * 2 * np.pi / len(phi), len(phi))
    points.flags.writeable = weights.flags.writeable = False
    return points, weights


@lru_cache
def projection(l_max: int, degree: int) -> Float[np.ndarray, "n _"]:
    """Make the matrix from values at the points of `quadrature(degree)` to coefficients.

    It is exact for functions whose degree is at most `degree` − l_max.

    Returns
    -------
    (n, size(l_max))
        Read-only.
    """
    points, weights = quadrature(degree)
    matrix = basis(l_max, points) * weights[:, None]
    matrix.flags.writeable = False
    return matrix


LEBEDEV = (3, 5, 7, 9, 11, 15, 17, 19, 21, 23, 29, 31, 35, 41, 47, 53, 59, 65, 71, 77, 83, 89, 95)
"""Degrees of the Lebedev rules with positive weights."""


@lru_cache
def half_grid(degree: int) -> tuple[Float[np.ndarray, "n 3"], Float[np.ndarray, " n"]]:
    """Make a quadrature with two thirds of the points of `quadrature`, not clustered at the poles.

    It is one half of the smallest Lebedev rule (octahedral symmetry) that is exact up to `degree`
    (Lebedev & Laikov 1999; scipy.integrate.lebedev_rule), with about (degree + 2)²/6 points.

    Parameters
    ----------
    degree : int
        Degree of the polynomials, at most 95.

    Returns
    -------
    points : (n, 3)
        Unit vectors on a half sphere; read-only.
    weights : (n,)
        Weights, whose sum is 4π; read-only.

    Raises
    ------
    ValueError
        There is no rule of that degree.
    """
    from scipy.integrate import lebedev_rule

    exact = next((d for d in LEBEDEV if d >= degree), None)
    if exact is None:
        raise ValueError(f"no Lebedev rule is exact for degree {degree}; {LEBEDEV[-1]} is the "
                         "highest")
    points, weights = lebedev_rule(exact)
    z, y, x = points[::-1].round(12)
    half = (z > 0) | ((z == 0) & ((y > 0) | ((y == 0) & (x > 0))))
    points, weights = points.T[half].copy(), 2 * weights[half]
    points.flags.writeable = weights.flags.writeable = False
    return points, weights


def rotate(coefficients: Float[torch.Tensor, "*batch size"],
           rotation: Float[torch.Tensor, "*batch 3 3"] | Float[torch.Tensor, "3 3"]
           ) -> Float[torch.Tensor, "*batch size"]:
    """Rotate functions: compute the coefficients of n ↦ f(R⁻¹ n).

    f is sampled at R⁻¹ of the points of an exact quadrature and projected back. The result is
    exact, since each degree is closed under rotation (the product is the Wigner matrix of R).

    Parameters
    ----------
    coefficients : (…, size)
        Coefficients of the functions f.
    rotation : (3, 3) or (…, 3, 3)
        One rotation R for all functions, or one for each.

    Returns
    -------
    (…, size)
    """
    l_max = l_max_of(coefficients.shape[-1])
    points, _ = quadrature(2 * l_max)
    rotated = evaluate(l_max, coefficients.new_tensor(points) @ rotation.to(coefficients))
    project = coefficients.new_tensor(projection(l_max, 2 * l_max))
    if rotation.ndim == 2:
        return coefficients @ (rotated.mT @ project)
    return (rotated @ coefficients[..., None])[..., 0] @ project


def smooth_fit(l_max: int, directions: Float[np.ndarray, "n 3"], smoothing: float = 0.0
               ) -> Float[np.ndarray, "_ n"]:
    """Make the matrix of a least squares fit with Laplace–Beltrami penalty.

    The penalty of a coefficient is `smoothing` · l²(l+1)² (Descoteaux et al. 2007).

    Parameters
    ----------
    l_max : int
        Even degree.
    directions : (n, 3)
        Unit vectors.
    smoothing : float
        Weight of the penalty.

    Returns
    -------
    (size(l_max), n)
        Matrix from values along the directions to coefficients.

    Raises
    ------
    ValueError
        The directions do not determine the coefficients.
    """
    b, l = basis(l_max, directions), degrees(l_max)
    normal = b.T @ b + smoothing * np.diag((l * (l + 1.0)) ** 2)
    if np.linalg.cond(normal) > 1e10:
        raise ValueError(f"{len(directions)} directions do not determine {len(l)} coefficients of "
                         f"degree {l_max}: lower the degree or use smoothing")
    return np.linalg.solve(normal, b.T)


def rish(coefficients: Float[torch.Tensor, "*batch size"]) -> Float[torch.Tensor, "*batch _"]:
    """Compute the rotation-invariant SH features (RISH) Σ_m c_lm² of the degrees 0, 2, ….

    Source: Mirzaalian et al. 2015, doi:10.1007/978-3-319-24553-9_2.

    Parameters
    ----------
    coefficients : (…, size)

    Returns
    -------
    (…, degree)
    """
    sizes = [4 * i + 1 for i in range(l_max_of(coefficients.shape[-1]) // 2 + 1)]
    return torch.stack([c.square().sum(-1) for c in coefficients.split(sizes, -1)], -1)


def rish_gain(coefficients: Float[torch.Tensor, "*batch size"],
              features: Float[torch.Tensor, "*batch degree"]) -> Float[torch.Tensor, "*batch size"]:
    """Compute the gain √(features_l / RISH_l) of each coefficient (Koppers et al. 2018, eq. 1).

    The coefficients times their gains have the given features; within each degree the coefficients
    keep their proportions.

    Parameters
    ----------
    coefficients : (…, size)
        Coefficients of a function.
    features : (…, degree)
        RISH features that the coefficients shall have, one per degree.

    Returns
    -------
    (…, size)
        The gains, equal within each degree; 0 for a degree whose coefficients are all 0.
    """
    power = rish(coefficients)
    scale = torch.where(power > 0, features / power.clamp(min=torch.finfo(power.dtype).tiny), 0)
    return per_coefficient(scale.sqrt())


def with_rish(coefficients: Float[torch.Tensor, "*batch size"],
              features: Float[torch.Tensor, "*batch degree"]) -> Float[torch.Tensor, "*batch size"]:
    """Scale each degree of coefficients to the given RISH features (`rish_gain`)."""
    return coefficients * rish_gain(coefficients, features)
