"""Noise of magnitude and complex images, with known moments.

σ is the standard deviation of the noise of one real channel, in units of the signal. It is a number
or a tensor that broadcasts against the signal, for example (voxel, 1) if it varies in space
(`smooth_field`). All random numbers come from the torch.Generator given, on its device. Magnitudes
of n coils combined by root sum of squares (Constantinides et al. 1997,
doi:10.1002/mrm.1910380524; n = 1 is Rician) follow

    M² = |S + ε_1|² + |ε_2|² + … + |ε_n|²,    ε_i complex,
    E[M²] = S² + 2nσ²,   E[M] = σ √(π/2) L_½^(n−1)(−S²/2σ²) (`mean`).
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
    """Add Gaussian noise: S + σ ε."""
    return signal + sigma * _normal(signal, generator)


def rician(signal: torch.Tensor, sigma: torch.Tensor | float, generator: torch.Generator
           ) -> torch.Tensor:
    """Add Rician noise: |S + σ (ε1 + i ε2)|, the magnitude of one coil or of coils combined with
    known phases."""
    return noncentral_chi(signal, sigma, 1, generator)


def noncentral_chi(signal: torch.Tensor, sigma: torch.Tensor | float, coils: int,
                   generator: torch.Generator) -> torch.Tensor:
    """Add non-central χ noise: the root sum of squares over `coils` independent coils whose
    combined noise-free signal is S."""
    square = gaussian(signal, sigma, generator) ** 2
    for _ in range(2 * coils - 1):  # the other real channels contain noise only
        square = square + (sigma * _normal(signal, generator)) ** 2
    return torch.sqrt(square)


def complex_noise(signal: Float[torch.Tensor, "voxel n"], phase: Float[torch.Tensor, "voxel _"],
                  sigma: torch.Tensor | float, generator: torch.Generator
                  ) -> Complex[torch.Tensor, "voxel n"]:
    """Add complex noise: S exp(iφ) + σ (ε1 + i ε2), φ in radian. Its magnitude is Rician."""
    return torch.complex(gaussian(signal * torch.cos(phase), sigma, generator),
                         gaussian(signal * torch.sin(phase), sigma, generator))


def smooth_field(position: Float[torch.Tensor, "voxel 3"], order: int, fields: int,
                 generator: torch.Generator) -> Float[torch.Tensor, "voxel fields"]:
    """Draw smooth fields for background phase (times π), noise level and coil profiles.

    Parameters
    ----------
    position : (voxel, 3) tensor
        Positions within [−1, 1]³.
    order : int
        Highest total degree of the polynomials; the lowest is 1.
    fields : int
        Number of fields.
    generator : torch.Generator

    Returns
    -------
    (voxel, fields) tensor
        Sums of products of Legendre polynomials with normal coefficients whose SD is 1/degree. The
        largest absolute value of each field is 1.
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
    """Draw the phase of rigid motion during diffusion weighting.

    Every shot of every measurement has its own constant and linear ramp (Anderson and Gore 1994,
    doi:10.1002/mrm.1910320313).

    Parameters
    ----------
    position : (voxel, 3) tensor
    shot : (voxel,) tensor
        Number of the shot (slice or multiband group), from 0.
    measurements : int
    generator : torch.Generator
    offset : float
        The constant is uniform in −offset to offset (radian).
    gradient : float
        SD of the normal slopes of the ramp (radian per unit of position).

    Returns
    -------
    (voxel, measurements) tensor
        Phase (radian).
    """
    shape = (int(shot.max()) + 1, measurements)
    constant = 2 * torch.rand(shape, dtype=position.dtype, device=position.device,
                              generator=generator) - 1
    slopes = _normal(position.new_empty(*shape, 3), generator)
    ramp = (slopes[shot] * position[:, None]).sum(-1)
    return offset * constant[shot] + gradient * ramp


def mean(signal: np.ndarray | float, sigma: np.ndarray | float, coils: int = 1) -> np.ndarray:
    """Compute the mean of `noncentral_chi` (of `rician` for one coil).

    E[M] = σ √2 Γ(n + ½)/Γ(n) 1F1(−½; n; −S²/2σ²) (Constantinides et al. 1997).
    """
    from scipy.special import gammaln, hyp1f1

    factor = math.sqrt(2) * math.exp(gammaln(coils + 0.5) - gammaln(coils))
    return np.asarray(factor * sigma * hyp1f1(-0.5, coils, -((signal / sigma) ** 2) / 2))
