"""Layers on the sphere: tensors (coefficient, voxel, channel) of SH coefficients (`bidsapp.sh`).

A layer is equivariant if a rotation of its input rotates its output: layer(D x) = D layer(x), with
D_l(R) the Wigner matrix of the 2l + 1 coefficients c_lm of degree l. Coefficients are the first
axis because each step is then a matrix product without a transpose: one batched product mixes the
channels, and one product over all voxels and channels gives the values at points on the sphere.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh

CACHE = 2**19
"""Number of grid values that are computed at once on a CPU, so that they fit in its cache."""


def by_degree(values: Float[torch.Tensor, "degree ..."]) -> Float[torch.Tensor, "coef ..."]:
    """Repeat one value per even degree for each coefficient of that degree, along the first axis.

    Parameters
    ----------
    values : (degree, …)
        Values of the degrees 0, 2, ….

    Returns
    -------
    (coefficient, …)
    """
    return torch.cat([v.expand(4 * i + 1, *v.shape[1:])
                      for i, v in enumerate(values.split(1, 0))])


def truncate(x: Float[torch.Tensor, "coef voxel channel"], l_max: int
             ) -> Float[torch.Tensor, "_ voxel channel"]:
    """Keep the coefficients up to degree l_max (spectral pooling)."""
    size = sh.size(l_max)
    return x if len(x) <= size else x[:size]


def mean(x: Float[torch.Tensor, "coef voxel channel"]) -> Float[torch.Tensor, "voxel channel"]:
    """Compute the mean over the sphere, c_00/√(4π), a rotation invariant."""
    # a product is used because its backward step is cheaper than that of a slice
    pick = x.new_zeros(1, len(x))
    pick[0, 0] = 1 / math.sqrt(4 * math.pi)
    return (pick @ x.flatten(1)).view(x.shape[1:])


def power(x: Float[torch.Tensor, "coef voxel channel"]
          ) -> Float[torch.Tensor, "degree voxel channel"]:
    """Compute the power Σ_m c_lm²/(2l + 1) of the degrees 2, 4, …, a rotation invariant.

    After a linear layer, these powers can express every quadratic invariant of two channels.
    """
    l = torch.arange(0, sh.l_max_of(len(x)) + 1, 2, dtype=x.dtype, device=x.device)
    average = by_degree(torch.diag(1 / (2 * l + 1)))[:, 1:].T
    return (average @ (x * x).flatten(1)).unflatten(1, x.shape[1:])


class ZonalConvolution(nn.Module):
    """Convolution with zonal filters, y_lm,d = Σ_c scale_l w_l,cd x_lm,c + √(4π) bias_d δ_l0.

    It is exactly equivariant (Esteves et al. 2018, doi:10.1007/978-3-030-01261-8_4). It would not
    be with a bias at another degree.

    Parameters
    ----------
    channels_in, channels_out : int
        Number of channels of the input and of the output.
    l_max : int
        Even degree; coefficients of higher degrees are left out.
    bias : bool
        Whether the layer has a bias.
    scale : (degree,), optional
        Constant factors of the weights; default: 1/√channels_in.
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
    """A nonlinearity σ, applied to the values of a function on an antipodal half grid.

    The values a = σ(f) at the points n_i are projected back, c_lm = Σ_i w_i a(n_i) Y_lm(n_i). σ(f)
    has higher degrees than f. The half grid is exact up to degree `grid` (`sh.half_grid`), so that
    degrees of σ(f) up to grid − l_out are projected exactly. Higher ones alias into the result,
    which is the only deviation from equivariance. The default grid, of degree 2 l_in + l_out, is
    exact for a quadratic σ. The relative SD of the result over rotations, for the signal of
    crossing fibres with mean 0 and SD 1 (tested), is

        degree of the grid       17       23       29       47
        points                   55       97       151      385
        SiLU, l 8 → 8            9e-3     2e-4     1e-5     7e-10
        leaky ReLU, l 8 → 8      3e-2     1e-2     7e-3     2e-3

    The error falls exponentially with the degree for a smooth σ, such as SiLU, but only with a
    power of it for a σ with a kink.

    Parameters
    ----------
    l_in, l_out : int
        Degree of the input and of the output.
    grid : int, optional
        Degree of the half grid.
    function : callable
        The nonlinearity.
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
