"""Denoising of a series by local principal components with optimally shrunk singular values.

The N voxels of a patch make a matrix Y of N rows and n volumes: a signal of low rank and white
noise of SD σ. With the mean of each volume removed, M = max(N − 1, n), m = min(N − 1, n), β = m/M
and the singular values s_i of Y, the estimate keeps the singular vectors and shrinks each

    y = s / (σ √M),  q = y² − β − 1:    √((q + √(q² − 4β)) / 2)   for least error in operator norm,
                                        √(q² − 4β) / y            for least squared error,

and 0 for y ≤ 1 + √β (Gavish and Donoho 2017, doi:10.1109/TIT.2017.2653801). The first restores the
singular values of the signal. The second also lowers those whose vectors are uncertain, and FA with
them, so that the first is the default (benchmarks/denoise.py).

σ is found for each patch, with r = 0 at first: noise alone has M − r by m − r singular values with

    median s_i² over i > r  =  σ² (M − r) μ((m − r)/(M − r)),

μ(β) the median of the Marchenko–Pastur distribution, and r is the number of s_i above
σ √M (1 + √β), until r stays. Patches overlap; each voxel is the mean over its patches, weighted by
1/(1 + r).

Magnitudes M of Rician noise keep a floor: the denoised value is E[M | S], √(π/2) σ where S = 0
(Gudbjartsson and Patz 1995, doi:10.1002/mrm.1910340618). It is replaced by the mean of S given
E[M], with a flat prior over S ≥ 0 and an error of E[M] of FLOOR_SD σ. The SD of magnitudes is below
σ, too, by the factor √ξ(S/σ), ξ(θ) = 2 + θ² − E[M]² in units of σ² (Koay and Basser 2006,
doi:10.1016/j.jmr.2006.01.016), by which the noise map is divided.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped

from bidsapp.acquisition import B0_MAX
from bidsapp.blocks import map_volume
from bidsapp.errors import Refusal
from bidsapp.simulate.noise import mean as rician_mean

STRIDE = 2
"""Distance of neighbouring patches along each axis, in voxels. On the phantom the squared error of
the signal was 4 % lower with 1, which takes four times as long, and 10 % higher with 3."""

MIN_PATCH = 3
"""Edge of the smallest patch, in voxels."""

ROUNDS = 10
"""Largest number of rounds that look for the noise level of a patch."""

FLOOR_SD = 0.15
"""Error of a denoised magnitude that the removal of the floor assumes, in units of σ."""

FLOOR_ROUNDS = 6
"""Rounds that correct the noise map of magnitudes."""

LOSSES = ("operator", "frobenius")
"""Names of the losses whose best shrinkage is known here: operator norm and squared error."""

CHUNK = 2**21
"""Numbers in the patches that are decomposed at a time."""

SLABS = 4
"""Thickness of a slab over that of a patch."""

METHODS = ("pca", "mppca", "patch2self")
"""Names of the methods: this module's; dipy's MP-PCA (Veraart et al. 2016, doi:10.1002/mrm.26059;
patented in the USA, US10698065B2); dipy's Patch2Self (Fadnavis et al. 2020)."""


@dataclass(frozen=True, eq=False)
class Denoised:
    """A denoised series.

    Parameters
    ----------
    signal : (x, y, z, n) float32 or complex64
        Denoised volumes; outside of the mask those that were measured.
    sigma : (x, y, z) float32 or None
        Noise SD of the measured series, of one real channel, in its units; 0 where nothing was
        denoised, None if the method does not estimate it.
    rank : (x, y, z) float32 or None
        Mean number of components of the patches that hold a voxel, without the mean.
    patch : (3,) tuple of int or None
        Voxels along the edges of a patch; None if the method has no patches.
    law : str
        `gaussian` or `rician`: noise law of the denoised signal. A Rician signal has a noise floor
        of `sigma`.
    """

    signal: np.ndarray
    sigma: np.ndarray | None
    rank: np.ndarray | None
    patch: tuple[int, ...] | None
    law: str


def denoise(volumes: Shaped[np.ndarray, "x y z n"], mask: Bool[np.ndarray, "x y z"] | None = None,
            *, method: str = "pca", patch: Sequence[int] | None = None, stride: int = STRIDE,
            loss: str = "operator", rician: bool = True,
            bvals: Float[np.ndarray, " n"] | None = None, device: str = "cpu") -> Denoised:
    """Denoise a series.

    Parameters
    ----------
    volumes : (x, y, z, n) float32 or complex64
        Measured series, before any interpolation. NaN and Inf count as 0.
    mask : (x, y, z) bool, optional
        Voxels that are denoised, with all patches that touch them; default: all.
    method : str
        One of METHODS.
    patch : (3,) int, optional
        Voxels along the edges of a patch, at most those of the grid. Default: see `choose_patch`.
    stride : int
        Distance of neighbouring patches along each axis, in voxels, at most the patch's edge (`pca`
        only).
    loss : str
        One of LOSSES (`pca` only).
    rician : bool
        Whether real volumes are magnitudes, whose noise floor is removed. Without an estimate of
        the noise (`patch2self`) it stays. Must be False for real-valued signals with negative
        noise, such as the real part after removal of the phase.
    bvals : (n,), optional
        b-values in s/mm², which `patch2self` needs.
    device : str
        Device of the computation.

    Returns
    -------
    Denoised

    Raises
    ------
    Refusal
        There are fewer than two volumes, or volumes are complex and the method takes magnitudes.
    """
    if volumes.shape[3] < 2:
        raise Refusal("the series has one volume, and denoising needs several of the same object. "
                      "Leave denoising out.")
    if method not in METHODS or loss not in LOSSES:
        raise ValueError(f"{method}, {loss}: one of {', '.join(METHODS)}, and of "
                         f"{', '.join(LOSSES)} is needed")
    magnitudes = rician and not np.iscomplexobj(volumes)
    edges = tuple(patch) if patch is not None else choose_patch(volumes.shape)
    inside = np.ones(volumes.shape[:3], bool) if mask is None else mask
    sigma: np.ndarray | None
    rank: np.ndarray | None
    if method == "pca":
        signal, sigma, rank = _pca(volumes, inside, edges, stride, loss, magnitudes, device)
    else:
        signal, sigma = _dipy(method, volumes, inside, edges, bvals)
        rank = None
        if magnitudes and sigma is not None:
            floor = map_volume(remove_floor, [signal, sigma], 0, device)
            signal, sigma = floor["signal"], floor["sigma"]
        signal = np.where(inside[..., None], signal, volumes)
    law = "rician" if magnitudes and sigma is None else "gaussian"
    return Denoised(signal, sigma, rank, None if method == "patch2self" else edges, law)


def choose_patch(shape: Sequence[int]) -> tuple[int, int, int]:
    """Choose a patch with at least as many voxels as there are volumes.

    It grows from 3 × 3 × 3 voxels, its shortest edge by two at a time, within the grid.

    Parameters
    ----------
    shape : (4,) int
        x, y, z and number of volumes.

    Returns
    -------
    tuple of int

    >>> choose_patch((96, 96, 60, 100)), choose_patch((96, 96, 1, 30))
    ((5, 5, 5), (7, 5, 1))
    """
    edges = [min(MIN_PATCH, size) for size in shape[:3]]
    while math.prod(edges) < shape[3]:
        free = [axis for axis in (0, 1, 2) if edges[axis] < shape[axis]]
        if not free:
            break
        axis = min(free, key=lambda a: edges[a])
        edges[axis] = min(edges[axis] + 2, shape[axis])
    return edges[0], edges[1], edges[2]


def _pca(volumes: np.ndarray, mask: np.ndarray, patch: tuple[int, ...], stride: int,
         loss: str, magnitudes: bool, device: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Denoise slabs of the grid. Patches start where they would for the whole grid."""
    starts = [sorted({*range(0, size - edge + 1, min(stride, edge)), size - edge})
              for size, edge in zip(volumes.shape, patch, strict=False)]
    planes = np.broadcast_to(np.arange(volumes.shape[0], dtype=np.int32)[:, None, None], mask.shape)

    def apply(plane: torch.Tensor, series: torch.Tensor, inside: torch.Tensor
              ) -> dict[str, torch.Tensor]:
        first = int(plane[0, 0, 0])
        own = [x - first for x in starts[0] if first <= x <= int(plane[-1, 0, 0]) + 1 - patch[0]]
        return _denoise_slab(series, inside, [own, *starts[1:]], patch, loss, magnitudes)

    out = map_volume(apply, [planes, volumes, mask], patch[0] - 1, device, SLABS * patch[0])
    return out["signal"], out["sigma"], out["rank"]


def _denoise_slab(volumes: torch.Tensor, mask: torch.Tensor, starts: list[list[int]],
                  patch: tuple[int, ...], loss: str, magnitudes: bool) -> dict[str, torch.Tensor]:
    """Denoise the patches (x, y, z) of a slab, and average them."""
    clean = torch.nan_to_num(volumes, nan=0.0, posinf=0.0, neginf=0.0)
    n = clean.shape[-1]
    total = torch.zeros_like(clean)
    scores = clean.real.new_zeros(*clean.shape[:3], 3)  # weight, variance, rank
    median = _noise_medians(math.prod(patch) - 1, n).to(clean.device)
    y, z = (torch.as_tensor(s, device=clean.device) for s in starts[1:])
    rows = max(1, CHUNK // (math.prod(patch) * n * len(z)))
    for x in starts[0]:
        for y_part in y.split(rows):
            windows = (clean[x:x + patch[0]].unfold(1, patch[1], 1)[:, y_part]
                       .unfold(2, patch[2], 1)[:, :, z])  # x, Y, Z, volume, y, z
            touched = (mask[x:x + patch[0]].unfold(1, patch[1], 1)[:, y_part]
                       .unfold(2, patch[2], 1)[:, :, z]).amax((0, 3, 4))
            if not bool(touched.any()):
                continue
            rows_of = windows.permute(1, 2, 0, 4, 5, 3)[touched].flatten(1, 3)
            estimate, variance, rank = _shrink(rows_of, median, loss)
            weight = 1 / (1 + rank)
            j, k = touched.nonzero(as_tuple=True)
            estimate = (weight[:, None, None] * estimate).unflatten(1, patch)
            score = torch.stack([weight, weight * variance, weight * rank], 1)
            for dx, dy, dz in np.ndindex(*patch):  # a voxel is at most once in each
                at = (x + dx, y_part[j] + dy, z[k] + dz)
                total[at] += estimate[:, dx, dy, dz]
                scores[at] += score
    weight, variance, rank = scores.unbind(-1)
    divisor = torch.where(weight > 0, weight, 1)
    sigma, signal = (variance / divisor).sqrt(), total / divisor[..., None]
    if clean.is_complex():
        sigma = sigma / math.sqrt(2)
    elif magnitudes:
        floor = remove_floor(signal, sigma)
        signal, sigma = floor["signal"], floor["sigma"]
    use = mask & (weight > 0)
    return {"signal": torch.where(use[..., None], signal, volumes),
            "sigma": torch.where(use, sigma, 0), "rank": torch.where(use, rank / divisor, 0)}


def _shrink(rows: Shaped[torch.Tensor, "patch voxel n"], median: Float[torch.Tensor, " m"],
            loss: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimate the signal, the noise variance (of complex numbers: of both channels) and the number
    of components of patches."""
    m, large = len(median), max(rows.shape[1] - 1, rows.shape[2])
    centre = rows.mean(1, keepdim=True)
    rows = rows - centre
    double = rows.to(torch.complex128 if rows.is_complex() else torch.float64)
    tall = rows.shape[1] >= rows.shape[2]
    values, vectors = torch.linalg.eigh(double.mH @ double if tall else double @ double.mH)
    squares = values.clamp(min=0)
    noise = squares[:, -m:]  # the others are zero by construction
    edge = large * (1 + math.sqrt(m / large)) ** 2
    rank = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
    variance = squares.new_zeros(len(rows))
    for _ in range(ROUNDS):
        left = m - rank
        middle = torch.stack([(left - 1) // 2, left // 2], 1)
        variance = noise.gather(1, middle).mean(1) / median[rank]
        above = (noise > edge * variance[:, None]).sum(1).clamp(max=m - 1)
        if bool((above == rank).all()):
            break
        rank = above
    beta = m / large
    # without noise, as where a scanner set most voxels to 0, everything is signal
    y2 = (squares / (large * variance).clamp(min=1e-30)[:, None]).clamp(max=1e30)
    q = y2 - beta - 1
    root = (q.square() - 4 * beta).clamp(min=0).sqrt()
    share = root / y2 if loss == "frobenius" else ((q + root) / (2 * y2)).clamp(min=0).sqrt()
    share = torch.where(y2 > (1 + math.sqrt(beta)) ** 2, share, 0)
    projection = (vectors * share[:, None].to(vectors.dtype)) @ vectors.mH
    projection = projection.to(rows.dtype)
    estimate = centre + (rows @ projection if tall else projection @ rows)
    return estimate, variance.to(centre.real.dtype), rank.to(centre.real.dtype)


def _noise_medians(voxels: int, volumes: int) -> Float[torch.Tensor, " m"]:
    """(M − r) μ((m − r)/(M − r)) for r = 0, …, m − 1."""
    m, large = min(voxels, volumes), max(voxels, volumes)
    r = np.arange(m)
    return torch.as_tensor((large - r) * marchenko_pastur_median((m - r) / (large - r)))


def marchenko_pastur_median(beta: Float[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Compute the median of the Marchenko–Pastur distribution of variance 1.

    With x = 1 + β − 2√β cos θ its density becomes 2 sin²θ / (π x) over 0 ≤ θ ≤ π.

    Parameters
    ----------
    beta : (k,)
        Ratios of the matrix' edges, 0 < β ≤ 1.

    Returns
    -------
    (k,)
    """
    edges = np.linspace(0, np.pi, 2001)
    theta = (edges[1:] + edges[:-1]) / 2
    root = np.sqrt(beta)[:, None]
    density = np.sin(theta) ** 2 / (1 + root**2 - 2 * root * np.cos(theta))
    total = np.cumsum(density, 1)
    half = np.array([np.interp(t[-1] / 2, t, edges[1:]) for t in total])
    return 1 + root[:, 0] ** 2 - 2 * root[:, 0] * np.cos(half)


def remove_floor(magnitude: Float[torch.Tensor, "*grid n"], sd: Float[torch.Tensor, "*grid"]
                 ) -> dict[str, torch.Tensor]:
    """Remove the Rician floor of denoised magnitudes.

    Parameters
    ----------
    magnitude : (x, …, n) tensor
    sd : (x, …) tensor
        SD of the magnitudes before they were denoised.

    Returns
    -------
    dict
        `signal` (x, …, n), and `sigma` (x, …), the noise SD of one real channel.
    """
    planes = [_plane_without_floor(m, s) for m, s in zip(magnitude, sd, strict=True)]
    return {name: torch.stack([plane[i] for plane in planes])
            for i, name in enumerate(("signal", "sigma"))}


def _plane_without_floor(magnitude: torch.Tensor, sd: torch.Tensor
                         ) -> tuple[torch.Tensor, torch.Tensor]:
    """Remove the floor of magnitudes (…, n); return the signal and the noise SD (…)."""
    signal, spread = (torch.as_tensor(t).to(magnitude) for t in _floor_tables())
    sigma = sd / math.sqrt(2 - math.pi / 2)  # as if there were no signal
    for _ in range(FLOOR_ROUNDS):
        ratio = magnitude / sigma.clamp(min=1e-30)[..., None]
        sigma = sd / _lookup(spread, ratio).mean(-1).sqrt()
    ratio = magnitude / sigma.clamp(min=1e-30)[..., None]
    high = (ratio.square() - 1).clamp(min=0).sqrt()
    inverse = torch.where(ratio < FLOOR_TOP - 1, _lookup(signal, ratio), high)
    # without noise there is no floor
    return torch.where(sigma[..., None] > 0, sigma[..., None] * inverse, magnitude), sigma


FLOOR_STEPS, FLOOR_TOP = 64, 12
"""Entries of the tables per unit of E[M]/σ, and its largest value."""


def _lookup(table: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Interpolate a table of `_floor_tables`; outside of it are its ends."""
    scaled = (position * FLOOR_STEPS).clamp(0, len(table) - 1.001)
    index = scaled.long()
    return torch.lerp(table[index], table[index + 1], scaled - index)


def _floor_tables() -> tuple[np.ndarray, np.ndarray]:
    """Tables of the mean of S/σ and of ξ for E[M]/σ = 0, 1/FLOOR_STEPS, …, FLOOR_TOP."""
    s = np.linspace(0, FLOOR_TOP + 2, 100 * (FLOOR_TOP + 2) + 1)
    magnitude = rician_mean(s, 1.0)
    measured = np.arange(FLOOR_STEPS * FLOOR_TOP + 1) / FLOOR_STEPS
    exponent = -((measured[:, None] - magnitude) ** 2) / (2 * FLOOR_SD**2)
    likelihood = np.exp(exponent - exponent.max(1, keepdims=True))
    spread = np.interp(measured, magnitude, 2 + s**2 - magnitude**2)
    return likelihood @ s / likelihood.sum(1), spread


def _dipy(method: str, volumes: np.ndarray, mask: np.ndarray, patch: tuple[int, ...],
          bvals: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Denoise magnitudes with dipy; return the signal and, of MP-PCA, the noise SD."""
    if np.iscomplexobj(volumes):
        raise Refusal(f"{method} takes magnitudes, and the series is complex. Denoise it with pca.")
    if method == "mppca":
        from dipy.denoise.localpca import mppca

        with warnings.catch_warnings():  # 0/0 outside of the mask
            warnings.simplefilter("ignore", RuntimeWarning)
            signal, sigma = mppca(np.nan_to_num(volumes), mask=mask, return_sigma=True,
                                  patch_radius=(np.array(patch) - 1) // 2, suppress_warning=True)
        return signal.astype(np.float32), np.nan_to_num(sigma).astype(np.float32)
    from dipy.denoise.patch2self import patch2self

    if bvals is None:
        raise ValueError("patch2self needs the b-values")
    options: dict[str, Any] = {"model": "ols", "b0_threshold": B0_MAX, "verbose": False}
    with contextlib.redirect_stderr(io.StringIO()):  # its progress
        signal = patch2self(np.nan_to_num(volumes), bvals, **options)
    return np.asarray(signal, np.float32), None
