"""What tissue may be: parameters with their priors, the compartments they stand for, and ODFs."""

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
    """names, ranges: of the parameters. prior: uniform numbers (voxel, n) within 0–1 → parameters
    (voxel, n). compartments: parameters → compartments along every fibre of the density.

    Where the model has its own density, watson: parameters → κ, and aligned: compartments along
    its axis alone; else the density is any, and `draw_odfs` makes them.
    """

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    prior: Callable[[torch.Tensor], torch.Tensor]
    compartments: Callable[[torch.Tensor], list[forward.Compartment]]
    watson: Callable[[torch.Tensor], torch.Tensor] | None = None
    aligned: Callable[[torch.Tensor], list[forward.Compartment]] | None = None

    def draw(self, count: int, generator: torch.Generator) -> Float[torch.Tensor, "voxel n"]:
        return self.prior(torch.rand(count, len(self.names), generator=generator,
                                     device=generator.device))

    def simulate(self, side: Protocols, parameters: Float[torch.Tensor, "voxel n"],
                 generator: torch.Generator, l_max: int, **odfs: Any
                 ) -> tuple[Float[torch.Tensor, "voxel shell _"], Float[torch.Tensor, "voxel _"]]:
        """Coefficients of S/S0 on every shell, without noise, and the densities; `odfs` as of
        `draw_odfs`."""
        if self.watson is None:
            densities = draw_odfs(len(parameters), generator, l_max, **odfs)
            return side.coefficients(densities, self.compartments(parameters)), densities
        axis = odf.random_rotations(len(parameters), generator)[:, :, 0].to(parameters)
        densities = odf.watson(axis, self.watson(parameters), l_max)
        s = side.coefficients(densities, self.compartments(parameters))
        if self.aligned is not None:
            one_axis = sh.evaluate(l_max, axis)  # w_l = 1
            s = s + side.coefficients(one_axis, self.aligned(parameters))
        return s, densities

    def densities(self, count: int, generator: torch.Generator, l_max: int, **odfs: Any
                  ) -> Float[torch.Tensor, "voxel _"]:
        """The densities alone, under the prior."""
        if self.watson is None:
            return draw_odfs(count, generator, l_max, **odfs)
        axis = odf.random_rotations(count, generator)[:, :, 0].float()
        return odf.watson(axis, self.watson(self.draw(count, generator)), l_max)


TWO_COMPARTMENTS = TissueModel(
    ("diffusivity", "neuritefraction"), ((0.0, 3.0), (0.0, 1.0)),
    lambda u: u * u.new_tensor([3.0, 1.0]),
    lambda p: forward.two_compartments(*p.unbind(1)))
"""d ~ U(0, 3) µm²/ms, f ~ U(0, 1) (Kerkelä et al. 2024)."""


def _three_prior(u: torch.Tensor) -> torch.Tensor:
    d, f = 3 * u[:, 0], u[:, 1]
    return torch.stack([d, f, d.clamp(max=0.5) * u[:, 2], (1 - f) * u[:, 3]], 1)


def _three_parts(p: torch.Tensor) -> list[forward.Compartment]:
    d, f, d_sph, f_sph = p.unbind(1)  # f + f_sph ≤ 1, in estimates too
    return forward.three_compartments(d, f, d_sph, torch.minimum(f_sph, (1 - f) * (1 - 1e-6)))


THREE_COMPARTMENTS = TissueModel(
    ("diffusivity", "neuritefraction", "somadiffusivity", "somafraction"),
    ((0.0, 3.0), (0.0, 1.0), (0.0, 0.5), (0.0, 1.0)), _three_prior,
    _three_parts)
"""Priors as `forward.three_compartments` says."""


def _concentration(odi: torch.Tensor) -> torch.Tensor:
    return 1 / torch.tan(odi.clamp(0.0025, 0.999) * (math.pi / 2))


def _second_moment(kappa: torch.Tensor) -> torch.Tensor:
    """∫ (n·μ)² w(n) dn of Watson's density."""
    t, moments = odf.half_rule(0, odf.NODES, kappa)
    weight = torch.exp(kappa[:, None] * (t**2 - 1)) * moments[:, 0]
    return (weight * t**2).sum(1) / weight.sum(1)


def _noddi_outside(p: torch.Tensor) -> list[forward.Compartment]:
    inside, odi, free = p.unbind(1)
    tau, radial = _second_moment(_concentration(odi)), NODDI_PARALLEL * (1 - inside)
    spread = NODDI_PARALLEL - radial
    axial, across = radial + spread * tau, radial + spread * (1 - tau) / 2
    return [forward.zeppelin((1 - free) * (1 - inside), axial, across)]


NODDI_PARALLEL, NODDI_FREE = 1.7, 3.0
"""µm²/ms: fixed in the model, for tissue in vivo."""

def _noddi_prior(u: torch.Tensor) -> torch.Tensor:
    spread = 0.01 + 0.98 * 2 * u[:, 1]
    kappa = 256.0 ** (2 * u[:, 1] - 1)  # log-uniform in 1–256
    odi = torch.where(u[:, 1] < 0.5, spread, 2 / math.pi * torch.atan(1 / kappa))
    return torch.stack([u[:, 0], odi, u[:, 2]], 1)


NODDI = TissueModel(
    ("ndi", "odi", "fiso"), ((0.0, 1.0),) * 3, _noddi_prior,
    lambda p: [forward.stick((1 - p[:, 2]) * p[:, 0], torch.full_like(p[:, 0], NODDI_PARALLEL)),
               forward.ball(p[:, 2], torch.full_like(p[:, 0], NODDI_FREE))],
    watson=lambda p: _concentration(p[:, 1]), aligned=_noddi_outside)
"""Zhang et al. 2012 (doi:10.1016/j.neuroimage.2012.03.072): sticks dispersed about an axis by
Watson's law, κ = 1/tan(π ODI/2); outside them, one tensor about the axis, the average of the
dispersed zeppelins with tortuosity d (1 − NDI); and free water. NDI and FISO are uniform; ODI is
uniform in 0.01–0.99 for a half and κ uniform in its logarithm in 1–256 for the other, so that
coherent bundles (κ of 12 and more, 5 % of a uniform ODI) are as frequent as dispersed ones."""


DELTA, FANS, ISOTROPIC, MEASURED = 0.1, 0.1, 0.4, 0.3
"""Of the densities that `draw_odfs` makes: share of bundles without dispersion, of fans, of those
with an isotropic part, and of measured ones where there is a table."""

KAPPA = (0.5, 256.0)
"""Concentrations, least and most: beyond those of tissue at both ends, so that none of tissue lies
at the edge of what was learned."""

TURNS = 4
"""Rotations by which the measured densities of one draw are turned."""


def draw_odfs(count: int, generator: torch.Generator, l_max: int, *,
              table: Float[torch.Tensor, "row size"] | None = None, measured: float = MEASURED
              ) -> Float[torch.Tensor, "voxel _"]:
    """Draw fibre orientation densities that cover what heads hold, evenly in dispersion.

    A share FANS are Bingham fans, κ1 uniform in its logarithm over KAPPA and κ2 a uniform share of
    it. The others hold one, two or three bundles, each as likely, at any angle and with shares
    uniform on the simplex; a bundle is a Watson density with κ uniform in its logarithm over KAPPA
    or, in a share DELTA, has no dispersion. A share ISOTROPIC of both has an isotropic part,
    uniform in 0–0.8. In a share `measured` of the voxels the density is a row of `table` instead
    (`sharpened`), turned at random.

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
        Coefficients in the basis of `bidsapp.sh`, ∫ = 1, in random order of kinds.
    """
    device = generator.device
    known = 0 if table is None else round(measured * count)

    def uniform(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    def log_uniform(*shape: int) -> torch.Tensor:
        return KAPPA[0] * (KAPPA[1] / KAPPA[0]) ** uniform(*shape)

    drawn = count - known
    fans = round(FANS * drawn)
    bundles = torch.arange(drawn - fans, device=device) % 3 + 1
    axes = odf.random_rotations(3 * len(bundles), generator)[:, :, 0].float().view(-1, 3, 3)
    density = odf.watson(axes, log_uniform(*axes.shape[:2]), l_max)
    single = sh.evaluate(l_max, axes)  # a delta: w_l = 1
    density = torch.where(uniform(*axes.shape[:2], 1) < DELTA, single, density)
    share = -torch.log(uniform(*axes.shape[:2]).clamp(min=1e-7))
    share = share * (torch.arange(3, device=device) < bundles[:, None])
    kappa = log_uniform(fans).clamp(max=128)
    fan = odf.bingham(odf.random_rotations(fans, generator).float().mT[:, :2],
                      torch.stack([kappa, kappa * uniform(fans)], 1), l_max)
    made = torch.cat([odf.mixture(share, density), fan])
    isotropic = 0.8 * uniform(drawn, 1) * (uniform(drawn, 1) < ISOTROPIC)
    made[:, 1:] *= 1 - isotropic
    if table is not None and known:
        rows = table.to(made)[torch.randint(len(table), (known,), generator=generator,
                                            device=device)]
        turned = torch.cat([sh.rotate(part, turn) for part, turn in zip(
            rows.tensor_split(TURNS), odf.random_rotations(TURNS, generator).float(),
            strict=True)])[:, :made.shape[1]]
        made = torch.cat([made, nn.functional.pad(turned, (0, made.shape[1] - turned.shape[1]))])
    return made[torch.randperm(count, generator=generator, device=device)]


def draw_bundles(count: int, generator: torch.Generator, l_max: int, *, bundles: int = 3,
                 kappa: tuple[float, float] = (1.0, 32.0)) -> Float[torch.Tensor, "voxel _"]:
    """Draw mixtures of a fixed number of Watson bundles: shares uniform on the simplex, κ uniform
    in its logarithm over `kappa`. For tests in bands of dispersion, not for training."""
    axes = odf.random_rotations(count * bundles, generator)[:, :, 0].float().view(
        count, bundles, 3)

    def uniform() -> torch.Tensor:
        return torch.rand(count, bundles, generator=generator, device=generator.device)

    own = kappa[0] * (kappa[1] / kappa[0]) ** uniform()
    return odf.mixture(-torch.log(uniform().clamp(min=1e-7)), odf.watson(axes, own, l_max))
