"""Two generators and two critics, that learn the way between two scanners from unlike people.

What a critic sees of a patch of 3×3×3 voxels, and what a generator goes by, is what does not change
when fibres turn: of the coefficients c_lm of every voxel, in units of their root mean square s_l,

    I_0 = c_00/s_0,   I_l = √(Σ_m c_lm²/(2l + 1))/s_l.

A generator multiplies every degree by a number, so it is exactly equivariant and single fibres keep
their directions. Its coarse gains go by the means Ī_l over the patch and are the same for all its
voxels; the fine ones, if any, go by every voxel of the patch and are for the one in its centre:

    patch   c_lm exp(0.01 g_l(Ī)),      centre   c_lm exp(0.01 [g_l(Ī) + f_l(I)]).

G maps from A to B, F back. Unlike people teach the coarse gains; for x of A and y of B

    adversarial   C_B(G x) − C_B(y) + C_A(F y) − C_A(x), which critics make small, generators great,
    cycle         |F G x − x| + |G F y − y|,
    identity      |G y − y| + |F x − x|,

critics held to a slope of one (Gulrajani et al. 2017, arXiv:1704.00028), the rest of Zhu et al.
2017 (arXiv:1703.10593). One loss serves both sides: on the way to the generators the gradient of a
critic changes its sign.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import nn

from bidsapp.networks.mlp import mlp
from bidsapp.networks.shresnet import CENTRE, PATCH
from bidsapp.networks.spherical import by_degree

BLUR = 0.1
"""SD of the noise on what critics see: of scans with little noise they would else see too much."""

SLOW = 0.01
"""Of the gains' logarithms: generators must move slower than critics, else both go in circles."""


def invariants(x: Float[torch.Tensor, "voxel 27 coef"], scale: Float[torch.Tensor, " degree"]
               ) -> Float[torch.Tensor, "voxel seen"]:
    """I_0, I_2, … of all voxels of a patch."""
    parts = x[..., 1:].split([4 * i + 1 for i in range(1, len(scale))], 2)
    powers = [(part / s).square().mean(2) for part, s in zip(parts, scale[1:], strict=True)]
    return torch.cat([x[..., 0] / scale[0], *((p + 1e-6).sqrt() for p in powers)], 1)


class Generator(nn.Module):
    """Gains by perceptrons. It starts as the identity.

    fine: whether it has fine gains, which pairs alone teach.
    scale: (degree,) the root mean square of coefficients that was learned from, set by training.
    """

    scale: torch.Tensor

    def __init__(self, *, hidden: int = 96, l_max: int = 4, fine: bool = True) -> None:
        super().__init__()
        degrees = l_max // 2 + 1
        self.register_buffer("scale", torch.ones(degrees))
        self.coarse = _gain(degrees, hidden, degrees)
        self.fine = _gain(PATCH * degrees, hidden, degrees) if fine else None

    def patch(self, x: Float[torch.Tensor, "voxel 27 coef"]
              ) -> Float[torch.Tensor, "voxel 27 coef"]:
        """All voxels, by the coarse gains."""
        return x * _factors(self.coarse(self._means(invariants(x, self.scale))))[:, None]

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        """The voxel in the centre, by all gains, as it is applied."""
        seen = invariants(x, self.scale)
        g = self.coarse(self._means(seen))
        return x[:, CENTRE] * _factors(g if self.fine is None else g + self.fine(seen))

    def _means(self, seen: Float[torch.Tensor, "voxel seen"]
               ) -> Float[torch.Tensor, "voxel degree"]:
        return seen.unflatten(1, (len(self.scale), PATCH)).mean(2)


def _gain(seen: int, hidden: int, degrees: int) -> nn.Sequential:
    layers = mlp([seen, hidden, hidden, degrees], nn.SiLU)
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return layers


def _factors(g: Float[torch.Tensor, "voxel degree"]) -> Float[torch.Tensor, "voxel coef"]:
    return by_degree((SLOW * g).exp().T).T


class Cycle(nn.Module):
    """Both ways, with their critics, (voxel, invariant) → (voxel, 1). critic: their width. The way
    back takes the scale of the way there."""

    def __init__(self, to_b: Generator, to_a: Generator, *, critic: int) -> None:
        super().__init__()
        self.to_b, self.to_a = to_b, to_a
        to_a.scale.copy_(to_b.scale)
        widths = [PATCH * len(to_b.scale), critic, critic, 1]
        self.real_b, self.real_a = (mlp(widths, lambda: nn.LeakyReLU(0.2)) for _ in range(2))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"],
                y: Float[torch.Tensor, "voxel 27 coef"]) -> dict[str, torch.Tensor]:
        """The three losses and (|∂C| − 1)² of the critics, means over patches in units of s_l."""
        scale, each = self.to_b.scale, by_degree(self.to_b.scale)
        fake_y, fake_x = self.to_b.patch(x), self.to_a.patch(y)
        adversarial, slope = x.new_zeros(()), x.new_zeros(())
        for critic, real, fake in ((self.real_b, y, fake_y), (self.real_a, x, fake_x)):
            told, made = (_blurred(invariants(v, scale)) for v in (real, fake))
            adversarial = adversarial + (critic(GradientReversal.apply(made)) - critic(told)).mean()
            slope = slope + gradient_penalty(critic, told, made.detach())
        return {"adversarial": adversarial, "slope": slope,
                "cycle": scaled_l1(self.to_a.patch(fake_y), x, each)
                + scaled_l1(self.to_b.patch(fake_x), y, each),
                "identity": scaled_l1(self.to_b.patch(y), y, each)
                + scaled_l1(self.to_a.patch(x), x, each)}


class GradientReversal(torch.autograd.Function):
    """The identity, with the gradient turned around."""

    @staticmethod
    def forward(_, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def _blurred(seen: torch.Tensor) -> torch.Tensor:
    return seen + BLUR * torch.randn_like(seen)


def scaled_l1(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return ((a - b) / scale).abs().mean()


def gradient_penalty(critic: nn.Module, real: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """At random points between real and generated patches."""
    with torch.enable_grad():
        share = torch.rand(len(real), 1, device=real.device)
        between = (share * real + (1 - share) * made).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()
