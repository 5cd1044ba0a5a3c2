"""Simulate small patches of random tissue, without anatomy, for networks with spatial context.

A patch is a lattice of SIZE³ voxels of up to three materials. A material has a kernel (a stick-like
tensor, a zeppelin and a ball), up to three bundles of fibres (Watson densities), an isotropic part
and an S0. Diffusivities, fractions and dispersion are those of white or grey matter in vivo in a
share of the materials, and anything in a broad range in the others. With the position x of a voxel
and the share u_k of the materials there, its signal is

    S(g, x) = Σ_k u_k(x) S0_k ∫ w_k(n, x) K_k(g·n) dn
    u(x) = softmax_k s_k (r_k − |P_k (x − p_k)|)

P_k projects on a random line, plane or the space, so that a material fills a layer, a tube or a
ball, with a border that is sharp or gradual (s_k). The axes of the bundles bend along the patch, at
up to BENDING per voxel, and the shares of bundles vary by a few percent. No brain is simulated:
what a network learns from patches is that neighbours may be alike, not what a brain is like.

A measurement adds noise, which may differ from what the network is told, and, in a share of the
protocols, what corrections leave behind: each volume has a gain and a displacement of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float

from bidsapp import sh
from bidsapp.simulate import forward, odf
from bidsapp.simulate.protocols import Protocols

SIZE = 4
"""Voxels along the edge of a patch. The inner voxels have all of their neighbours in it."""

L_MAX = 12
"""Highest degree of the simulated signals. Degrees above that of a fit alias into it."""

MATERIALS, BUNDLES = 3, 3
"""Largest number of materials of a patch, and of bundles of a material."""

HOMOGENEOUS, TWO = 0.25, 0.45
"""Shares of patches with one and with two materials."""

BENDING, STRAIGHT = math.radians(15), 0.2
"""Largest typical angle by which an axis bends from a voxel to the next (rad), with a uniform
square root, and share of bundles that are straight."""

VARIATION = (0.005, 0.1)
"""SD of the logarithms of the shares of bundles from voxel to voxel; its logarithm is uniform."""

WHITE, GREY, WATER = 0.4, 0.15, 0.1
"""Shares of materials like white and grey matter, and of free water. The others are arbitrary."""

KAPPA = ((0.5, 256.0), (3.0, 48.0), (0.3, 3.0))
"""Ranges of the concentration of bundles in arbitrary materials, white and grey matter; its
logarithm is uniform."""

ISOTROPIC = 0.15
"""Share of arbitrary materials without preferred direction."""

CONTRAST = (0.5, 3.0)
"""Range of S0 of materials; its logarithm is uniform."""

CORRELATED, CORRELATION = 0.5, 0.5
"""Share of protocols whose noise is correlated between voxels, as after interpolation, and the
largest correlation of neighbours along each axis."""

LOCAL_NOISE = 0.15
"""SD of the logarithm of the noise from patch to patch."""

BAD, BAD_NOISE = 0.04, 2.3
"""Share of voxels with more noise than others, as at edges that move from volume to volume, and the
largest logarithm of the factor."""

RESIDUAL, GAIN, SHIFT = 0.4, 0.06, 0.3
"""Share of protocols whose volumes have gains and displacements of their own, and the largest SDs
of the gain and of the displacement (voxels) from volume to volume."""


@dataclass(frozen=True)
class Patches:
    """Noise-free signals of patches, ordered by protocol.

    Parameters
    ----------
    s0 : (group, patch, voxel) tensor
        Signal at b = 0.
    coefficients : (group, patch, voxel, shell, coefficient) tensor
        SH coefficients of S, not divided by S0, on each shell.
    """

    s0: Float[torch.Tensor, "group patch voxel"]
    coefficients: Float[torch.Tensor, "group patch voxel shell _"]


def positions(size: int = SIZE) -> Float[torch.Tensor, "voxel 3"]:
    """List the positions of the voxels of a patch in C order; the centre of the patch is 0."""
    axis = torch.arange(size) - (size - 1) / 2
    return torch.cartesian_prod(axis, axis, axis)


def draw(b: Float[torch.Tensor, "group shell"], patches: int, generator: torch.Generator
         ) -> Patches:
    """Draw patches of random tissue.

    Parameters
    ----------
    b : (group, shell) tensor
        b-values of linear encoding (ms/µm²) at which the signals of each group are computed.
    patches : int
        Number of patches of each group.
    generator : torch.Generator

    Returns
    -------
    Patches
    """
    count = len(b) * patches
    x = positions().to(generator.device)
    share = _material_shares(count, x, generator)
    low, high = map(math.log, CONTRAST)
    s0 = torch.exp(low + (high - low) * _uniform(generator, count, MATERIALS))
    share = share * (s0 / s0[:, :1])[..., None]  # the S0 of the first is 1
    share = share * torch.exp(0.03 * _normal(generator, count, 1, len(x)))
    tissue = torch.bucketize(_uniform(generator, count, MATERIALS), torch.tensor(
        [1 - WHITE - GREY, 1 - GREY], device=x.device))
    bundle, isotropic = _bundle_shares(tissue, len(x), generator)
    k = forward.kernel(_compartments(tissue.flatten(), generator),
                       1000 * b.repeat_interleave(patches * MATERIALS, 0),
                       torch.ones_like(b).repeat_interleave(patches * MATERIALS, 0), L_MAX)
    k = k.unflatten(0, (count, MATERIALS, 1))
    gain = k * _zonal(tissue, generator)[:, :, :, None]  # patch, material, bundle, shell, degree
    basis = sh.evaluate(L_MAX, _axes(count, x, generator))
    weight = (share[:, :, None] * bundle).flatten(1, 2)
    degrees = []
    start = 0
    for i in range(L_MAX // 2 + 1):
        part = basis[..., start:start + 4 * i + 1] * weight[..., None]
        g = gain[..., i].flatten(1, 2)  # patch, bundle, shell
        values = part.permute(0, 2, 3, 1).flatten(1, 2) @ g
        degrees.append(values.unflatten(1, (len(x), -1)))
        start += 4 * i + 1
    # the isotropic parts
    degrees[0] = degrees[0] + ((share * isotropic).mT @ k[:, :, 0, :, 0])[:, :, None] / math.sqrt(
        4 * math.pi)
    coefficients = torch.cat(degrees, 2).mT
    return Patches(share.sum(1).unflatten(0, (len(b), -1)),
                   coefficients.unflatten(0, (len(b), -1)))


def measure(patches: Patches, protocols: Protocols, sigma: Float[torch.Tensor, " group"],
            magnitude: Bool[torch.Tensor, " group"], generator: torch.Generator
            ) -> tuple[Float[torch.Tensor, "group patch voxel shell direction"],
                       Float[torch.Tensor, "group patch voxel"]]:
    """Simulate the measurement of patches, with noise.

    Parameters
    ----------
    patches : Patches
        Signals on the shells of the protocols, in the same order; more shells may follow.
    protocols : Protocols
        Its basis has the degree L_MAX.
    sigma : (group,) tensor
        σ of the noise, in units of the signal.
    magnitude : (group,) bool tensor
        Whether the noise is Rician, otherwise it is Gaussian.
    generator : torch.Generator

    Returns
    -------
    signal : (group, patch, voxel, shell, direction) tensor
    b0 : (group, patch, voxel) tensor
        Mean of the b0 volumes.
    """
    shells = protocols.b.shape[1]
    clean = torch.einsum("gpvsk,gsdk->gpvsd", patches.coefficients[:, :, :, :shells],
                         protocols.basis)
    mixing = _noise_mixing(len(sigma), generator)
    bad = (_uniform(generator, *patches.s0.shape) < BAD) * _uniform(generator, *patches.s0.shape)
    local = sigma.view(-1, 1, 1) * torch.exp(
        LOCAL_NOISE * _normal(generator, *patches.s0.shape[:2], 1) + BAD_NOISE * bad)

    def noise(like: torch.Tensor) -> torch.Tensor:
        flat = local[..., None] * _normal(generator, *like.shape).flatten(3)
        return (mixing[:, None] @ flat).view_as(like)

    real = _add_residual(clean, generator) + noise(clean)
    rician = magnitude.view(-1, 1, 1, 1, 1)
    signal = torch.where(rician, torch.hypot(real, noise(clean)), real)
    count = protocols.b0.view(-1, 1, 1)
    # the Rician excess of the mean b0 to first order, σ²/2S0, unless S0 is known
    excess = torch.where(rician[..., 0, 0] & torch.isfinite(count),
                         sigma.view(-1, 1, 1)**2 / (2 * patches.s0), 0)
    b0 = patches.s0 + excess + count.rsqrt() * noise(patches.s0[..., None])[..., 0]
    return signal, b0


def expected_magnitude(signal: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Compute the mean of Rician noise, E|S + σ(ε1 + iε2)| (`noise.mean`), differentiably.

    With y = S²/4σ² it is σ √(π/2) [(1 + 2y) I0(y) + 2y I1(y)] exp(−y).
    """
    y = (signal / sigma)**2 / 4
    return sigma * math.sqrt(math.pi / 2) * ((1 + 2 * y) * torch.special.i0e(y)
                                             + 2 * y * torch.special.i1e(y))


def _uniform(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=generator, device=generator.device)


def _normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, device=generator.device)


def _material_shares(count: int, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the shares (patch, material, voxel) of the materials."""
    shape = (count, MATERIALS)
    dimension = torch.randint(1, 4, shape, generator=generator, device=generator.device)
    axes = odf.random_rotations(count * MATERIALS, generator).float().view(*shape, 3, 3)
    kept = torch.arange(3, device=x.device) < dimension[..., None]
    point = 4 * _uniform(generator, *shape, 1, 3) - 2
    distance = torch.linalg.vector_norm(
        ((x - point) @ axes.mT) * kept[..., None, :], dim=-1)
    radius = 2.5 * _uniform(generator, *shape, 1)
    sharpness = 0.3 * 50 ** _uniform(generator, *shape, 1)
    logit = sharpness * (radius - distance)
    number = 1 + (_uniform(generator, count, 1, 1) > torch.tensor(
        [HOMOGENEOUS, HOMOGENEOUS + TWO], device=x.device)).sum(-1, keepdim=True)
    absent = torch.arange(MATERIALS, device=x.device)[:, None] >= number
    return torch.softmax(logit.masked_fill(absent, -math.inf), 1)


def _compartments(tissue: torch.Tensor, generator: torch.Generator) -> list[forward.Compartment]:
    """Draw the kernels (n,) of materials of some tissue: 0 arbitrary, 1 white, 2 grey matter."""
    u = _uniform(generator, 9, len(tissue))
    inner = 0.3 + 2.7 * u[0]
    outer = torch.where(u[1] < 0.5, inner, 0.3 + 2.7 * u[2])
    outer_radial = outer * (0.05 + 0.95 * u[7])
    ball = torch.where(u[3] < 0.3, 3.0, 3 * u[4])
    radial = inner * 0.2 * (u[5] - 0.5).clamp(min=0) * 2
    weight = -torch.log(_uniform(generator, 3, len(tissue)).clamp(min=1e-7))
    weight = weight * (_uniform(generator, 3, len(tissue)) < u.new_tensor([[0.8], [0.8], [0.4]]))
    weight[1] += (weight.sum(0) == 0)
    fraction = weight / weight.sum(0)
    # neurites, the space around them with tortuosity, and some free water
    white = tissue == 1
    d = torch.where(white, 1.5 + u[0], 0.8 + 1.2 * u[0])
    f = torch.where(white, 0.4 + 0.4 * u[1], 0.15 + 0.45 * u[1])
    free = 0.4 * u[2] * (u[3] < 0.3)
    brain = tissue > 0
    fraction = torch.where(brain, torch.stack([f * (1 - free), (1 - f) * (1 - free), free]),
                           fraction)
    inner, outer = torch.where(brain, d, inner), torch.where(brain, d, outer)
    radial = torch.where(brain, 0.0, radial)
    outer_radial = torch.where(brain, (d * (1 - f) * (0.7 + 0.6 * u[4])).minimum(d), outer_radial)
    water = (u[6] < WATER / (1 - WHITE - GREY)) & ~brain
    fraction = torch.where(water, u.new_tensor([[0.0], [0.0], [1.0]]), fraction)
    ball = torch.where(water | brain, 2.8 + 0.4 * u[8], ball)
    return [forward.Compartment(fraction[0], inner, radial),
            forward.zeppelin(fraction[1], outer, outer_radial),
            forward.ball(fraction[2], ball)]


def _bundle_shares(tissue: torch.Tensor, voxels: int, generator: torch.Generator
                   ) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the shares of bundles (patch, material, bundle, voxel) and of the isotropic part
    (patch, material, voxel), whose sum is 1."""
    shape = tissue.shape
    number = torch.randint(1, BUNDLES + 1, shape, generator=generator, device=generator.device)
    share = -torch.log(_uniform(generator, *shape, BUNDLES).clamp(min=1e-7))
    share = share * (torch.arange(BUNDLES, device=share.device) < number[..., None])
    share = share / share.sum(-1, keepdim=True)
    isotropic = 0.8 * _uniform(generator, *shape) * (_uniform(generator, *shape) < 0.4)
    isotropic = torch.where(_uniform(generator, *shape) < ISOTROPIC, 1.0, isotropic)
    isotropic = torch.where(tissue == 1, 0.0, isotropic)[..., None]
    both = torch.cat([share * (1 - isotropic), isotropic], -1)[..., None]
    low, high = map(math.log, VARIATION)
    variation = torch.exp(low + (high - low) * _uniform(generator, *shape, 1, 1))
    both = both * torch.exp(variation * _normal(generator, *shape, BUNDLES + 1, voxels))
    both = both / both.sum(2, keepdim=True)
    return both[:, :, :BUNDLES], both[:, :, BUNDLES]


def _zonal(tissue: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the dispersion of bundles: zonal coefficients (patch, material, bundle, degree) of
    Watson densities, or of arbitrary bundles without dispersion."""
    shape = (*tissue.shape, BUNDLES)
    low, high = torch.tensor(KAPPA, device=tissue.device).log()[tissue].unbind(-1)
    kappa = torch.exp(low[..., None] + (high - low)[..., None] * _uniform(generator, *shape))
    t, moments = odf.half_rule(L_MAX, odf.NODES, kappa)
    zonal = torch.exp(kappa[..., None] * (t**2 - 1)) @ moments
    zonal = zonal / zonal[..., :1]
    sharp = (_uniform(generator, *shape) < 0.1) & (tissue == 0)[..., None]
    return torch.where(sharp[..., None], 1.0, zonal)


def _axes(count: int, x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Draw the axes (patch, material × bundle, voxel, 3) of bundles, which bend along the patch."""
    n = count * MATERIALS * BUNDLES
    axis = torch.nn.functional.normalize(_normal(generator, n, 1, 3), dim=-1)
    scale = BENDING * _uniform(generator, n, 1, 1)**2 * (_uniform(generator, n, 1, 1) > STRAIGHT)
    # in the mean, the part of A x that is perpendicular to the axis has the length scale · |x|
    turn = x @ (scale / math.sqrt(2) * _normal(generator, n, 3, 3))
    moved = axis + torch.linalg.cross(turn, axis.expand_as(turn))
    return torch.nn.functional.normalize(moved, dim=-1).unflatten(0, (count, -1))


def _add_residual(clean: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Change each volume of the patches by a gain and a displacement along the first axis."""
    groups, count, _, *volumes = clean.shape
    gain, shift = (high * _uniform(generator, groups, 1, 1, 1, 1)**2 * (
        _uniform(generator, groups, 1, 1, 1, 1) < RESIDUAL) * _normal(
        generator, groups, count, 1, *volumes) for high in (GAIN, SHIFT))
    (slope,) = torch.gradient(clean.unflatten(2, (SIZE, -1)), dim=2)
    return clean * (1 + gain) + shift * slope.flatten(2, 3)


def _noise_mixing(groups: int, generator: torch.Generator) -> torch.Tensor:
    """Draw matrices (group, voxel, voxel) that mix independent noise; the SD of each voxel stays.

    The noise of voxels at the distance k along an axis has the correlation ρ^k, for each axis.
    """
    rho = CORRELATION * _uniform(generator, groups, 3) * (
        _uniform(generator, groups, 1) < CORRELATED)
    lag = (torch.arange(SIZE)[:, None] - torch.arange(SIZE)).abs().to(rho)
    # 0^0 is 1
    factor = torch.linalg.cholesky(rho[..., None, None] ** lag)
    a, b, c = factor.unbind(1)
    return torch.einsum("gij,gkl,gmn->gikmjln", a, b, c).reshape(groups, SIZE**3, SIZE**3)
