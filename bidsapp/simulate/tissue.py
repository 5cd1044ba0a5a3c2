"""What tissue may be: parameters with their priors, the compartments they stand for, and ODFs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float

from bidsapp import sh
from bidsapp.simulate import forward, odf


@dataclass(frozen=True)
class Tissue:
    """names, ranges: of the parameters. prior: uniform numbers (voxel, n) within 0–1 → parameters
    (voxel, n). compartments: parameters → compartments along every fibre of the density."""

    names: tuple[str, ...]
    ranges: tuple[tuple[float, float], ...]
    prior: Callable[[torch.Tensor], torch.Tensor]
    compartments: Callable[[torch.Tensor], list[forward.Compartment]]

    def draw(self, count: int, generator: torch.Generator) -> Float[torch.Tensor, "voxel n"]:
        return self.prior(torch.rand(count, len(self.names), generator=generator,
                                     device=generator.device))


TWO_COMPARTMENTS = Tissue(
    ("diffusivity", "neuritefraction"), ((0.0, 3.0), (0.0, 1.0)),
    lambda u: u * u.new_tensor([3.0, 1.0]),
    lambda p: forward.two_compartments(*p.unbind(1)))
"""d ~ U(0, 3) µm²/ms, f ~ U(0, 1) (Kerkelä et al. 2024)."""


def _three_prior(u: torch.Tensor) -> torch.Tensor:
    d, f = 3 * u[:, 0], u[:, 1]
    return torch.stack([d, f, d.clamp(max=0.5) * u[:, 2], (1 - f) * u[:, 3]], 1)


THREE_COMPARTMENTS = Tissue(
    ("diffusivity", "neuritefraction", "somadiffusivity", "somafraction"),
    ((0.0, 3.0), (0.0, 1.0), (0.0, 0.5), (0.0, 1.0)), _three_prior,
    lambda p: forward.three_compartments(*p.unbind(1)))
"""Priors as `forward.three_compartments` says."""


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
