"""What tissue may be: parameters with their priors, the compartments they stand for, and ODFs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float

from bidsapp import sh
from bidsapp.simulate import forward, odf
from bidsapp.simulate.protocols import Protocols


@dataclass(frozen=True)
class Tissue:
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


TWO_COMPARTMENTS = Tissue(
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


THREE_COMPARTMENTS = Tissue(
    ("diffusivity", "neuritefraction", "somadiffusivity", "somafraction"),
    ((0.0, 3.0), (0.0, 1.0), (0.0, 0.5), (0.0, 1.0)), _three_prior,
    _three_parts)
"""Priors as `forward.three_compartments` says."""


def _concentration(odi: torch.Tensor) -> torch.Tensor:
    return 1 / torch.tan(odi.clamp(0.01, 0.999) * (math.pi / 2))


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

NODDI = Tissue(
    ("ndi", "odi", "fiso"), ((0.0, 1.0),) * 3,
    lambda u: u * u.new_tensor([1.0, 0.98, 1.0]) + u.new_tensor([0.0, 0.01, 0.0]),
    lambda p: [forward.stick((1 - p[:, 2]) * p[:, 0], torch.full_like(p[:, 0], NODDI_PARALLEL)),
               forward.ball(p[:, 2], torch.full_like(p[:, 0], NODDI_FREE))],
    watson=lambda p: _concentration(p[:, 1]), aligned=_noddi_outside)
"""Zhang et al. 2012 (doi:10.1016/j.neuroimage.2012.03.072): sticks dispersed about an axis by
Watson's law, κ = 1/tan(π ODI/2); outside them, one tensor about the axis, the average of the
dispersed zeppelins with tortuosity d (1 − NDI); and free water. NDI, ODI and FISO uniform."""


def draw_odfs(count: int, generator: torch.Generator, l_max: int, *, peaks: int = 3,
              kappa: tuple[float, float] = (1.0, 32.0),
              table: Float[torch.Tensor, "row size"] | None = None, measured: float = 0.5
              ) -> Float[torch.Tensor, "voxel _"]:
    """Densities turned at random: mixtures of `peaks` Watson bundles (shares uniform on the
    simplex, κ uniform in its logarithm), and in a share of `measured` rows of a table of densities
    (from deconvolution), if there is one."""
    device = generator.device
    known = 0 if table is None else round(measured * count)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    drawn = count - known
    axes = odf.random_rotations(drawn * peaks, generator)[:, :, 0].float().view(drawn, peaks, 3)
    k = kappa[0] * torch.exp(uniform(drawn, peaks) * math.log(kappa[1] / kappa[0]))
    shares = -torch.log(uniform(drawn, peaks).clamp(min=1e-7))
    made = odf.mixture(shares, odf.watson(axes, k, l_max))
    if table is None or not known:
        return made
    rows = torch.randint(len(table), (known,), generator=generator, device=device)
    turned = sh.rotate(table.to(made)[rows], odf.random_rotations(known, generator).float())
    full = made.new_zeros(count, made.shape[1])
    place = torch.randperm(count, generator=generator, device=device)
    full[place[:drawn]] = made
    full[place[drawn:], :turned.shape[1]] = turned[:, :made.shape[1]]
    return full
