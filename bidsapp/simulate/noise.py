"""Noise of magnitude and complex images, with known moments.

σ is the standard deviation of the noise of one real channel, in units of the signal: a number, or
a tensor that broadcasts against the signal, (voxel, 1) where it varies in space (`smooth_field`).
Every law draws from the torch.Generator it is given, on the generator's device, and from nothing
else. For magnitudes of n coils combined by root sum of squares (Constantinides et al. 1997,
doi:10.1002/mrm.1910380524; n = 1 is Rice's law)

    M² = |S + ε|² + Σ …,   E[M²] = S² + 2nσ²,   E[M] = σ √(π/2) L_½^(n−1)(−S²/2σ²) (`mean`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Complex, Float, Int


def _normal(like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def gaussian(signal: torch.Tensor, sigma: torch.Tensor | float, generator: torch.Generator
             ) -> torch.Tensor:
    """S + σ ε."""
    return signal + sigma * _normal(signal, generator)


def rician(signal: torch.Tensor, sigma: torch.Tensor | float, generator: torch.Generator
           ) -> torch.Tensor:
    """|S + σ (ε1 + i ε2)|: the magnitude of one coil, or of coils combined with known phases."""
    return noncentral_chi(signal, sigma, 1, generator)


def noncentral_chi(signal: torch.Tensor, sigma: torch.Tensor | float, coils: int,
                   generator: torch.Generator) -> torch.Tensor:
    """Root sum of squares over `coils` independent coils whose combined clean signal is S."""
    square = gaussian(signal, sigma, generator) ** 2
    for _ in range(2 * coils - 1):  # the other real channels hold noise alone
        square = square + (sigma * _normal(signal, generator)) ** 2
    return torch.sqrt(square)


def complex_noise(signal: Float[torch.Tensor, "voxel n"], phase: Float[torch.Tensor, "voxel _"],
                  sigma: torch.Tensor | float, generator: torch.Generator
                  ) -> Complex[torch.Tensor, "voxel n"]:
    """S exp(iφ) + σ (ε1 + i ε2), φ in radian; its magnitude follows Rice's law."""
    return torch.complex(gaussian(signal * torch.cos(phase), sigma, generator),
                         gaussian(signal * torch.sin(phase), sigma, generator))


def smooth_field(position: Float[torch.Tensor, "voxel 3"], order: int, fields: int,
                 generator: torch.Generator) -> Float[torch.Tensor, "voxel fields"]:
    """Random polynomials of total degree 1 … `order` in positions within [−1, 1]³ (products of
    Legendre polynomials, coefficients normal and smaller with the degree), each scaled to a
    greatest absolute value of 1. For background phase (times π), σ and coil profiles.
    """
    legendre = [torch.ones_like(position), position]
    for k in range(1, order):
        legendre.append(((2 * k + 1) * position * legendre[k] - k * legendre[k - 1]) / (k + 1))
    terms, scale = [], []
    for i in range(order + 1):
        for j in range(order + 1 - i):
            for k in range(order + 1 - i - j):
                if i + j + k:
                    terms.append(legendre[i][:, 0] * legendre[j][:, 1] * legendre[k][:, 2])
                    scale.append(1 / (i + j + k))
    weight = position.new_tensor(scale)[:, None] * _normal(
        position.new_empty(len(scale), fields), generator)
    field = torch.stack(terms, 1) @ weight
    return field / field.abs().amax(0).clamp(min=1e-12)


def shot_phase(position: Float[torch.Tensor, "voxel 3"], shot: Int[torch.Tensor, " voxel"],
               measurements: int, generator: torch.Generator, *, offset: float = math.pi,
               gradient: float = 1.0) -> Float[torch.Tensor, "voxel measurements"]:
    """Phase (radian) of rigid motion during diffusion weighting: a constant U(−offset, offset) and
    a linear ramp of normal slopes with SD `gradient` per unit of position, drawn anew for every
    shot (slice or multiband group, numbered 0, 1, …) of every measurement (Anderson and Gore 1994,
    doi:10.1002/mrm.1910320313)."""
    shape = (int(shot.max()) + 1, measurements)
    constant = 2 * torch.rand(shape, dtype=position.dtype, device=position.device,
                              generator=generator) - 1
    slopes = _normal(position.new_empty(*shape, 3), generator)
    ramp = (slopes[shot] * position[:, None]).sum(-1)
    return offset * constant[shot] + gradient * ramp


def mean(signal: np.ndarray | float, sigma: np.ndarray | float, coils: int = 1) -> np.ndarray:
    """E[M] of `noncentral_chi` (`rician` for one coil): σ √2 Γ(n + ½)/Γ(n) 1F1(−½; n; −S²/2σ²)."""
    from scipy.special import gammaln, hyp1f1

    factor = math.sqrt(2) * math.exp(gammaln(coils + 0.5) - gammaln(coils))
    return np.asarray(factor * sigma * hyp1f1(-0.5, coils, -((signal / sigma) ** 2) / 2))
