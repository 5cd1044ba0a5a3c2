"""Layers on the sphere: tensors (coefficient, voxel, channel) of SH coefficients (`bidsapp.sh`).

A layer is equivariant where turning its input turns its output: with D_l(R) the matrix that turns
the 2l + 1 coefficients c_lm of degree l, layer(D x) = D layer(x). Coefficients come first because
then every step is a matrix product without a transpose: channels are mixed by one batched product,
and the passage to points on the sphere is one product over all voxels and channels together.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh

CACHE = 2**19
"""Numbers on a grid at once, on a CPU: they stay in its cache from one product to the next."""


def by_degree(values: Float[torch.Tensor, "degree ..."]) -> Float[torch.Tensor, "coef ..."]:
    """One value per even degree → one per coefficient, along the first axis."""
    return torch.cat([v.expand(4 * i + 1, *v.shape[1:])
                      for i, v in enumerate(values.split(1, 0))])


def truncate(x: Float[torch.Tensor, "coef voxel channel"], l_max: int
             ) -> Float[torch.Tensor, "_ voxel channel"]:
    """Spectral pooling: the coefficients up to degree l_max."""
    size = sh.size(l_max)
    return x if len(x) <= size else x[:size]


def mean(x: Float[torch.Tensor, "coef voxel channel"]) -> Float[torch.Tensor, "voxel channel"]:
    """Mean over the sphere, c_00/√(4π): does not change with rotation."""
    pick = x.new_zeros(1, len(x))  # a product, whose backward step is cheaper than that of a slice
    pick[0, 0] = 1 / math.sqrt(4 * math.pi)
    return (pick @ x.flatten(1)).view(x.shape[1:])


def power(x: Float[torch.Tensor, "coef voxel channel"]
          ) -> Float[torch.Tensor, "degree voxel channel"]:
    """Σ_m c_lm²/(2l + 1) of the degrees 2, 4, …: does not change with rotation. With linear layers
    before it, it gives every quadratic invariant of two channels."""
    l = torch.arange(0, sh.l_max_of(len(x)) + 1, 2, dtype=x.dtype, device=x.device)
    average = by_degree(torch.diag(1 / (2 * l + 1)))[:, 1:].T
    return (average @ (x * x).flatten(1)).unflatten(1, x.shape[1:])


class ZonalConvolution(nn.Module):
    """y_lm,d = Σ_c scale_l w_l,cd x_lm,c + √(4π) bias_d δ_l0: convolution with zonal filters
    (Esteves et al. 2018, doi:10.1007/978-3-030-01261-8_4), exactly equivariant. A bias at another
    degree would not be.

    Args:
        l_max: even degree of the input that is used; higher ones are left out.
        scale: (degree,) constants in front of the weights; by default 1/√in.
    """

    scale: torch.Tensor

    def __init__(self, channels_in: int, channels_out: int, l_max: int, *, bias: bool = True,
                 scale: Float[torch.Tensor, " degree"] | None = None) -> None:
        super().__init__()
        self.l_max = l_max
        degrees = l_max // 2 + 1
        self.weight = nn.Parameter(torch.randn(degrees, channels_in, channels_out))
        self.bias = nn.Parameter(torch.zeros(channels_out)) if bias else None
        if scale is None:
            scale = torch.full((degrees,), channels_in**-0.5)
        self.register_buffer("scale", scale.view(-1, 1, 1), persistent=False)

    def forward(self, x: Float[torch.Tensor, "coef voxel channel"]
                ) -> Float[torch.Tensor, "_ voxel out"]:
        weight = by_degree(self.weight * self.scale)
        if self.bias is None:
            return torch.bmm(truncate(x, self.l_max), weight)
        offset = nn.functional.pad(math.sqrt(4 * math.pi) * self.bias[None, None],
                                   (0, 0, 0, 0, 0, len(weight) - 1))
        return torch.baddbmm(offset, truncate(x, self.l_max), weight)


class Pointwise(nn.Module):
    """A nonlinearity applied to the function's values on an antipodal half grid.

    The values a = σ(f) at the points n_i are projected back, c_lm = Σ_i w_i a(n_i) Y_lm(n_i). σ(f)
    has degrees above those of f; the grid, exact to `grid` (`sh.half_grid`), keeps those up to
    grid − l_out out of the result, and the ones above are mirrored into it: the aliasing error,
    the only departure from equivariance. The default, 2 l_in + l_out, is exact for a quadratic σ.
    Relative SD of the result over rotations, for the signal of crossing fibres with mean 0 and
    SD 1 (tested):

        degree of the grid       17       23       29       47
        points                   55       97       151      385
        SiLU, l 8 → 8            9e-3     2e-4     1e-5     7e-10
        leaky ReLU, l 8 → 8      3e-2     1e-2     7e-3     2e-3

    A kink makes the error fall with a power of the degree, a smooth σ exponentially: hence SiLU.
    """

    to_grid: torch.Tensor
    back: torch.Tensor

    def __init__(self, l_in: int, l_out: int, *, grid: int | None = None,
                 function: Callable[[torch.Tensor], torch.Tensor] = nn.functional.silu) -> None:
        super().__init__()
        points, weights = sh.half_grid(2 * l_in + l_out if grid is None else grid)
        to_grid = torch.from_numpy(sh.basis(l_in, points))
        back = torch.from_numpy(sh.basis(l_out, points) * weights[:, None]).T
        dtype = torch.get_default_dtype()
        self.register_buffer("to_grid", to_grid.to(dtype), persistent=False)
        self.register_buffer("back", back.contiguous().to(dtype), persistent=False)
        self.function = function

    def forward(self, x: Float[torch.Tensor, "coef voxel channel"]
                ) -> Float[torch.Tensor, "_ voxel channel"]:
        flat = x.flatten(1)
        columns = CACHE // len(self.to_grid) if flat.device.type == "cpu" else flat.shape[1]
        parts = [self.back @ self.function(self.to_grid @ part) for part in flat.split(columns, 1)]
        return torch.cat(parts, 1).unflatten(1, x.shape[1:])
