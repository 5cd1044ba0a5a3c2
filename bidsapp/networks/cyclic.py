"""A cycle-consistent adversarial network: two generators that map between scanners, two critics.

The participants of the two scanners may differ. Critics and generators see rotation invariants of
patches of 3×3×3 voxels. With c_lm the coefficients of a voxel and s_l their root mean square,

    I_0 = c_00/s_0,   I_l = √(Σ_m c_lm²/(2l + 1))/s_l.

A generator multiplies each degree by a gain, so that it is exactly equivariant and single fibres
keep their directions. The log gains, in units of 0.01, are a coarse g and a fine f. g depends on
the means Ī_l over the patch and is the same for all its voxels. f, if any, depends on all voxels of
the patch and applies to its central voxel:

    patch   c_lm exp(0.01 g_l(Ī)),      centre   c_lm exp(0.01 [g_l(Ī) + f_l(I)]).

G maps from A to B, and F from B to A. Scans of different participants train the coarse gains. With
x a patch of A and y a patch of B, the losses are

    adversarial   C_B(G x) − C_B(y) + C_A(F y) − C_A(x), minimised by critics, maximised by G, F,
    cycle         |F G x − x| + |G F y − y|,
    identity      |G y − y| + |F x − x|

(Zhu et al. 2017, arXiv:1703.10593), with the gradient penalty of Gulrajani et al. 2017
(arXiv:1704.00028), which keeps the slope of the critics near 1. Generators and critics share one
loss: a gradient reversal between them changes the sign for the generators.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import nn

from bidsapp.networks.mlp import mlp
from bidsapp.networks.shresnet import CENTRE, PATCH
from bidsapp.networks.spherical import by_degree

CRITIC_NOISE = 0.1
"""SD of the noise that is added to the invariants that critics see. Without it, critics would
separate scans with little noise too easily."""

SLOW = 0.01
"""Unit of the log gains. It is small because generators must change more slowly than critics; else
the training oscillates."""


def invariants(x: Float[torch.Tensor, "voxel 27 coef"], scale: Float[torch.Tensor, " degree"]
               ) -> Float[torch.Tensor, "voxel invariant"]:
    """Compute the invariants I_0, I_2, … of all voxels of each patch.

    Parameters
    ----------
    x : (voxel, 27, coefficient)
        Patches.
    scale : (degree,)
        Root mean square s_l of the coefficients of each degree.

    Returns
    -------
    (voxel, 27 · degree)
        I_0 of the 27 voxels of the patch, then I_2 of them, and so on.
    """
    parts = x[..., 1:].split([4 * i + 1 for i in range(1, len(scale))], 2)
    powers = [(part / s).square().mean(2) for part, s in zip(parts, scale[1:], strict=True)]
    return torch.cat([x[..., 0] / scale[0], *((p + 1e-6).sqrt() for p in powers)], 1)


class Generator(nn.Module):
    """A generator: perceptrons that give the log gain of each degree. It starts as the identity.

    Parameters
    ----------
    hidden : int
        Units of each of the two hidden layers.
    l_max : int
        Degree of the coefficients.
    fine : bool
        Whether it has fine gains, which only paired scans can train.

    Attributes
    ----------
    scale : (degree,)
        Root mean square of the training data's coefficients; the training sets it.
    """

    scale: torch.Tensor

    def __init__(self, *, hidden: int = 96, l_max: int = 4, fine: bool = True) -> None:
        super().__init__()
        degrees = l_max // 2 + 1
        self.register_buffer("scale", torch.ones(degrees))
        self.coarse = _build_gain(degrees, hidden, degrees)
        self.fine = _build_gain(PATCH * degrees, hidden, degrees) if fine else None

    def patch(self, x: Float[torch.Tensor, "voxel 27 coef"]
              ) -> Float[torch.Tensor, "voxel 27 coef"]:
        """Apply the coarse gains to all voxels of each patch."""
        return x * _factors(self.coarse(self._means(invariants(x, self.scale))))[:, None]

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"]) -> Float[torch.Tensor, "voxel coef"]:
        """Apply all gains to the central voxel of each patch, as harmonization does."""
        features = invariants(x, self.scale)
        g = self.coarse(self._means(features))
        return x[:, CENTRE] * _factors(g if self.fine is None else g + self.fine(features))

    def _means(self, features: Float[torch.Tensor, "voxel invariant"]
               ) -> Float[torch.Tensor, "voxel degree"]:
        return features.unflatten(1, (len(self.scale), PATCH)).mean(2)


def _build_gain(features: int, hidden: int, degrees: int) -> nn.Sequential:
    layers = mlp([features, hidden, hidden, degrees], nn.SiLU)
    nn.init.zeros_(layers[-1].weight)  # type: ignore[arg-type]
    nn.init.zeros_(layers[-1].bias)  # type: ignore[arg-type]
    return layers


def _factors(g: Float[torch.Tensor, "voxel degree"]) -> Float[torch.Tensor, "voxel coef"]:
    """Compute the factor of each coefficient from the log gain of its degree."""
    return by_degree((SLOW * g).exp().T).T


class Cycle(nn.Module):
    """Generators in both directions with their critics, (voxel, invariant) → (voxel, 1).

    Parameters
    ----------
    to_b, to_a : Generator
        Generators from A to B and from B to A; `to_a` gets the scale of `to_b`.
    critic : int
        Units of each of the two hidden layers of a critic.
    """

    def __init__(self, to_b: Generator, to_a: Generator, *, critic: int) -> None:
        super().__init__()
        self.to_b, self.to_a = to_b, to_a
        to_a.scale.copy_(to_b.scale)
        widths = [PATCH * len(to_b.scale), critic, critic, 1]
        # the critics C_B and C_A; their names are keys of saved trainings
        self.real_b, self.real_a = (mlp(widths, lambda: nn.LeakyReLU(0.2)) for _ in range(2))

    def forward(self, x: Float[torch.Tensor, "voxel 27 coef"],
                y: Float[torch.Tensor, "voxel 27 coef"]) -> dict[str, torch.Tensor]:
        """Compute the losses: adversarial, cycle, identity, and slope (the gradient penalty).

        All are means over patches; cycle and identity are in units of s_l.
        """
        scale, each = self.to_b.scale, by_degree(self.to_b.scale)
        fake_y, fake_x = self.to_b.patch(x), self.to_a.patch(y)
        adversarial, slope = x.new_zeros(()), x.new_zeros(())
        for critic, real, fake in ((self.real_b, y, fake_y), (self.real_a, x, fake_x)):
            measured, generated = (_add_noise(invariants(v, scale)) for v in (real, fake))
            adversarial = adversarial + (critic(GradientReversal.apply(generated))
                                         - critic(measured)).mean()
            slope = slope + gradient_penalty(critic, measured, generated.detach())
        return {"adversarial": adversarial, "slope": slope,
                "cycle": scaled_l1(self.to_a.patch(fake_y), x, each)
                + scaled_l1(self.to_b.patch(fake_x), y, each),
                "identity": scaled_l1(self.to_b.patch(y), y, each)
                + scaled_l1(self.to_a.patch(x), x, each)}


class GradientReversal(torch.autograd.Function):
    """The identity, whose gradient has the opposite sign."""

    @staticmethod
    def forward(_, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(_, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


def _add_noise(features: torch.Tensor) -> torch.Tensor:
    return features + CRITIC_NOISE * torch.randn_like(features)


def scaled_l1(a: torch.Tensor, b: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Compute the mean absolute difference of coefficients, in units of `scale`."""
    return ((a - b) / scale).abs().mean()


def gradient_penalty(critic: nn.Module, real: torch.Tensor, generated: torch.Tensor
                     ) -> torch.Tensor:
    """Compute the mean of (|∂C| − 1)² at random points between real and generated patches."""
    with torch.enable_grad():
        share = torch.rand(len(real), 1, device=real.device)
        between = (share * real + (1 - share) * generated).requires_grad_()
        (gradient,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (gradient.norm(dim=1) - 1).square().mean()
