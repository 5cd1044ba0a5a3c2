"""Tissue models: parameters with priors, their compartments, and the prior of fibre densities."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.simulate import forward, odf
from bidsapp.simulate.protocols import Protocols


@dataclass(frozen=True)
class TissueModel:
    """Parameters of a microstructure model, their prior, and the signal's compartments.

    Parameters
    ----------
    names : tuple of str
        Names of the n parameters.
    ranges : tuple of (float, float)
        Range of each parameter.
    prior : callable
        Function from uniform numbers (voxel, n) within 0–1 to parameters (voxel, n).
    compartments : callable
        Function from parameters to the compartments about each fibre axis of the density.
    watson : callable, optional
        Function from parameters to κ, if the model prescribes a Watson density. Without it,
        densities are arbitrary and drawn by `draw_odfs`.
    aligned : callable, optional
        Function from parameters to further compartments, which are not dispersed: all lie along
        the axis of the Watson density.
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    prior: Callable[[torch.Tensor], torch.Tensor]
    compartments: Callable[[torch.Tensor], list[forward.Compartment]]
    watson: Callable[[torch.Tensor], torch.Tensor] | None = None
    aligned: Callable[[torch.Tensor], list[forward.Compartment]] | None = None

    def draw(self, count: int, generator: torch.Generator) -> Float[torch.Tensor, "voxel n"]:
        """Draw the parameters of `count` voxels from the prior."""
        return self.prior(torch.rand(count, len(self.names), generator=generator,
                                     device=generator.device))

    def simulate(self, protocols: Protocols, parameters: Float[torch.Tensor, "voxel n"],
                 generator: torch.Generator, l_max: int, **odfs: Any
                 ) -> tuple[Float[torch.Tensor, "voxel shell _"], Float[torch.Tensor, "voxel _"]]:
        """Simulate noise-free signals.

        Parameters
        ----------
        protocols : Protocols
        parameters : (voxel, n) tensor
        generator : torch.Generator
        l_max : int
            Degree of densities and signals.
        **odfs
            Options of `draw_odfs`.

        Returns
        -------
        coefficients : (voxel, shell, size(l_max)) tensor
            Coefficients of S/S0 on every shell.
        densities : (voxel, size(l_max)) tensor
        """
        if self.watson is None:
            densities = draw_odfs(len(parameters), generator, l_max, **odfs)
            return protocols.coefficients(densities, self.compartments(parameters)), densities
        axis = odf.random_rotations(len(parameters), generator)[:, :, 0].to(parameters)
        densities = odf.watson(axis, self.watson(parameters), l_max)
        s = protocols.coefficients(densities, self.compartments(parameters))
        if self.aligned is not None:
            delta = sh.evaluate(l_max, axis)  # w_l = 1
            s = s + protocols.coefficients(delta, self.aligned(parameters))
        return s, densities

    def densities(self, count: int, generator: torch.Generator, l_max: int, **odfs: Any
                  ) -> Float[torch.Tensor, "voxel _"]:
        """Draw densities from the prior, without signals."""
        if self.watson is None:
            return draw_odfs(count, generator, l_max, **odfs)
        axis = odf.random_rotations(count, generator)[:, :, 0].float()
        return odf.watson(axis, self.watson(self.draw(count, generator)), l_max)


TWO_COMPARTMENTS = TissueModel(
    ("diffusivity", "neuritefraction"), ((0.0, 3.0), (0.0, 1.0)),
    lambda u: u * u.new_tensor([3.0, 1.0]),
    lambda p: forward.two_compartments(*p.unbind(1)))
"""Constrained two-compartment model, d ~ U(0, 3) µm²/ms, f ~ U(0, 1) (Kerkelä et al. 2024)."""


def _three_prior(u: torch.Tensor) -> torch.Tensor:
    d, f = 3 * u[:, 0], u[:, 1]
    return torch.stack([d, f, d.clamp(max=0.5) * u[:, 2], (1 - f) * u[:, 3]], 1)


def _three_parts(p: torch.Tensor) -> list[forward.Compartment]:
    d, f, d_sph, f_sph = p.unbind(1)  # estimates must meet f + f_sph ≤ 1, too
    return forward.three_compartments(d, f, d_sph, torch.minimum(f_sph, (1 - f) * (1 - 1e-6)))


THREE_COMPARTMENTS = TissueModel(
    ("diffusivity", "neuritefraction", "somadiffusivity", "somafraction"),
    ((0.0, 3.0), (0.0, 1.0), (0.0, 0.5), (0.0, 1.0)), _three_prior,
    _three_parts)
"""Constrained three-compartment model with the priors of `forward.three_compartments`."""


def _concentration(odi: torch.Tensor) -> torch.Tensor:
    """Compute κ from the orientation dispersion index."""
    return 1 / torch.tan(odi.clamp(0.0025, 0.999) * (math.pi / 2))


def _second_moment(kappa: torch.Tensor) -> torch.Tensor:
    """Compute ∫ (n·μ)² w(n) dn of a Watson density."""
    t, moments = odf.half_rule(0, odf.NODES, kappa)
    weight = torch.exp(kappa[:, None] * (t**2 - 1)) * moments[:, 0]
    return (weight * t**2).sum(1) / weight.sum(1)


def _noddi_outside(p: torch.Tensor) -> list[forward.Compartment]:
    """Compute the extra-neurite tensor: the average of zeppelins (d, d (1 − NDI)) over the Watson
    density."""
    ndi, odi, fiso = p.unbind(1)
    tau, radial = _second_moment(_concentration(odi)), NODDI_PARALLEL * (1 - ndi)
    difference = NODDI_PARALLEL - radial
    axial, across = radial + difference * tau, radial + difference * (1 - tau) / 2
    return [forward.zeppelin((1 - fiso) * (1 - ndi), axial, across)]


NODDI_PARALLEL, NODDI_FREE = 1.7, 3.0
"""Fixed diffusivities of tissue in vivo and of free water (µm²/ms)."""


def _noddi_prior(u: torch.Tensor) -> torch.Tensor:
    uniform_odi = 0.01 + 0.98 * 2 * u[:, 1]
    kappa = 256.0 ** (2 * u[:, 1] - 1)  # log-uniform in 1–256
    odi = torch.where(u[:, 1] < 0.5, uniform_odi, 2 / math.pi * torch.atan(1 / kappa))
    return torch.stack([u[:, 0], odi, u[:, 2]], 1)


NODDI = TissueModel(
    ("ndi", "odi", "fiso"), ((0.0, 1.0),) * 3, _noddi_prior,
    lambda p: [forward.stick((1 - p[:, 2]) * p[:, 0], torch.full_like(p[:, 0], NODDI_PARALLEL)),
               forward.ball(p[:, 2], torch.full_like(p[:, 0], NODDI_FREE))],
    watson=lambda p: _concentration(p[:, 1]), aligned=_noddi_outside)
"""NODDI (Zhang et al. 2012, doi:10.1016/j.neuroimage.2012.03.072): sticks with a Watson
distribution about an axis, κ = 1/tan(π ODI/2); outside of them one tensor about the axis, the
average of the dispersed zeppelins with tortuosity d (1 − NDI); and free water. NDI and FISO are
uniform. ODI is uniform in 0.01–0.99 in one half of the voxels, and log κ uniform with κ in 1–256 in
the other half, so that coherent bundles (κ ≥ 12, 5 % of a uniform ODI) are as frequent as dispersed
ones."""


DELTA, FANS, ISOTROPIC, MEASURED = 0.1, 0.1, 0.4, 0.3
"""Shares in `draw_odfs`: bundles without dispersion, fans, densities with an isotropic part, and
measured densities if there is a table."""

KAPPA = (0.5, 256.0)
"""Range of the concentration. It exceeds that of tissue at both ends, so that no tissue lies at the
edge of the training."""

ROTATIONS = 4
"""Number of random rotations of the measured densities of one draw."""


def draw_odfs(count: int, generator: torch.Generator, l_max: int, *,
              table: Float[torch.Tensor, "row size"] | None = None, measured: float = MEASURED
              ) -> Float[torch.Tensor, "voxel _"]:
    """Draw fibre orientation densities that cover those of brains, evenly in dispersion.

    A share FANS are Bingham fans with log κ1 uniform over KAPPA and κ2 a uniform share of κ1. The
    others hold one, two or three bundles with equal probability, at any angle and with shares
    uniform on the simplex. A bundle is a Watson density with log κ uniform over KAPPA, or, in a
    share DELTA, has no dispersion. A share ISOTROPIC of fans and bundles has an isotropic part,
    uniform in 0–0.8. In a share `measured` of the voxels the density is instead a row of `table`,
    rotated at random.

    Parameters
    ----------
    count : int
        Number of voxels.
    generator : torch.Generator
        Source of all random numbers; its device is used.
    l_max : int
        Even degree of the coefficients.
    table : (row, size) tensor, optional
        Coefficients of measured densities of any even degree, ∫ = 1.
    measured : float
        Share of voxels that take a row of `table`.

    Returns
    -------
    (voxel, size(l_max)) tensor
        Coefficients in the basis of `bidsapp.sh`, ∫ = 1, in random order.
    """
    device = generator.device
    measured_count = 0 if table is None else round(measured * count)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def log_uniform(*shape: int) -> torch.Tensor:
        return KAPPA[0] * (KAPPA[1] / KAPPA[0]) ** uniform(*shape)

    simulated_count = count - measured_count
    fans = round(FANS * simulated_count)
    bundles = torch.arange(simulated_count - fans, device=device) % 3 + 1
    axes = odf.random_rotations(3 * len(bundles), generator)[:, :, 0].float().view(-1, 3, 3)
    density = odf.watson(axes, log_uniform(*axes.shape[:2]), l_max)
    delta = sh.evaluate(l_max, axes)  # w_l = 1
    density = torch.where(uniform(*axes.shape[:2], 1) < DELTA, delta, density)
    share = -torch.log(uniform(*axes.shape[:2]).clamp(min=1e-7))
    share = share * (torch.arange(3, device=device) < bundles[:, None])
    kappa = log_uniform(fans).clamp(max=128)
    fan = odf.bingham(odf.random_rotations(fans, generator).float().mT[:, :2],
                      torch.stack([kappa, kappa * uniform(fans)], 1), l_max)
    densities = torch.cat([odf.mixture(share, density), fan])
    isotropic = 0.8 * uniform(simulated_count, 1) * (uniform(simulated_count, 1) < ISOTROPIC)
    densities[:, 1:] *= 1 - isotropic
    if table is not None and measured_count:
        rows = table.to(densities)[torch.randint(len(table), (measured_count,),
                                                 generator=generator, device=device)]
        rotated = torch.cat([sh.rotate(part, rotation) for part, rotation in zip(
            rows.tensor_split(ROTATIONS), odf.random_rotations(ROTATIONS, generator).float(),
            strict=True)])[:, :densities.shape[1]]
        padding = (0, densities.shape[1] - rotated.shape[1])
        densities = torch.cat([densities, nn.functional.pad(rotated, padding)])
    return densities[torch.randperm(count, generator=generator, device=device)]


def draw_bundles(count: int, generator: torch.Generator, l_max: int, *, bundles: int = 3,
                 kappa: tuple[float, float] = (1.0, 32.0)) -> Float[torch.Tensor, "voxel _"]:
    """Draw mixtures of a fixed number of Watson bundles, for tests in bands of dispersion.

    Parameters
    ----------
    count : int
    generator : torch.Generator
    l_max : int
    bundles : int
        Number of bundles; their shares are uniform on the simplex.
    kappa : (float, float)
        Range of κ; log κ is uniform.

    Returns
    -------
    (count, size(l_max)) tensor
        Coefficients, ∫ = 1.
    """
    axes = odf.random_rotations(count * bundles, generator)[:, :, 0].float().view(
        count, bundles, 3)

    def uniform() -> torch.Tensor:
        return torch.rand(count, bundles, generator=generator, device=generator.device)

    concentration = kappa[0] * (kappa[1] / kappa[0]) ** uniform()
    return odf.mixture(-torch.log(uniform().clamp(min=1e-7)),
                       odf.watson(axes, concentration, l_max))
