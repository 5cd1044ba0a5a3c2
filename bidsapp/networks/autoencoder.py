"""Denoising autoencoder of single voxels, with exchangeable layers and nonlinearities.

Sadegheih et al. 2023, work package 5; Vincent et al. 2008 (doi:10.1145/1390156.1390294). The input
is S/S0 along the measured directions, the output the same signal without noise. Between them are
layers of the given widths, the narrowest of which is the bottleneck, and a linear layer at the end:

    layer      input of a layer                     product                          equivariant
    zonal      SH coefficients                      channels, per degree                  yes
    local      SH coefficients, sampled along the   channels, per sample of the ring,      no
               directions of a grid and on a ring   and SH refit
               around each
    signal     values along the directions, in      channels, per place in a window        no
               the order of the table               of the table
    connected  values along the directions          all values                             no

`zonal` and `local` fit spherical harmonics first and evaluate them along the directions last.
The nonlinearity of `zonal` and `local` acts on values on the sphere (space `signal`) or on the
coefficients (space `coefficient`). The second is not equivariant, whatever the layer: rotations mix
the coefficients of a degree. `signal` and `connected` have no coefficients.

A channel is a function on the sphere, or along the table. A channel of `connected` is one number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.networks.scnn import ShellEmbedding, shell_properties
from bidsapp.networks.spherical import Pointwise, ZonalConvolution, by_degree

LAYERS = ("zonal", "local", "signal", "connected")
NONLINEARITIES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": nn.functional.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
SPACES = ("signal", "coefficient")

SMOOTHING = 0.006
"""Weight λ of l²(l+1)² in the SH fits."""

RING, RING_ANGLE = 5, math.pi / 10
"""Number of samples on the ring around a direction, and their angle to it."""

LEVELS = 2
"""Number of noise levels of a voxel: σ, and the noise floor's, which is σ for a magnitude."""


def is_equivariant(layer: str, space: str) -> bool:
    """Tell whether a rotation of the input of a network rotates its output."""
    return layer == "zonal" and space == "signal"


def needs_table(layer: str) -> bool:
    """Tell whether a network serves a single gradient table."""
    return layer in ("signal", "connected")


def ring_samples(points: Float[torch.Tensor, "n 3"]) -> Float[torch.Tensor, "_ n 3"]:
    """Compute directions and the samples on a ring around each.

    A ring has no first sample that would rotate with the directions: here it lies towards the z
    axis (towards the x axis for directions near z). The layer is therefore not equivariant.

    Parameters
    ----------
    points : (n, 3)
        Unit vectors.

    Returns
    -------
    (1 + RING, n, 3)
        The directions, and for each sample of the ring the unit vectors at RING_ANGLE.
    """
    near_pole = points[:, 2:].abs() > 0.99
    x, z = torch.eye(3, dtype=points.dtype)[[0, 2]]
    pole = torch.where(near_pole, x, z)
    u = nn.functional.normalize(pole - (pole * points).sum(1, keepdim=True) * points, dim=1)
    v = torch.linalg.cross(points, u)
    azimuth = 2 * math.pi / RING * torch.arange(RING, dtype=points.dtype)[:, None, None]
    ring = (math.cos(RING_ANGLE) * points
            + math.sin(RING_ANGLE) * (torch.cos(azimuth) * u + torch.sin(azimuth) * v))
    return torch.cat([points[None], ring])


class LocalConvolution(nn.Module):
    """Local spherical convolution: weights of a direction and of the samples on a ring around it.

    a_d(n_i) = Σ_k Σ_c w_k,cd x_c(n_ik) + bias_d at the points n_i of a half grid, with the samples
    n_ik of `ring_samples`; σ(a), if there is a nonlinearity; and an SH fit with SMOOTHING.

    Parameters
    ----------
    channels_in, channels_out : int
    l_max : int
    grid : int
        Degree of the half grid.
    function : callable, optional
        The nonlinearity of the values.
    """

    samples: torch.Tensor
    back: torch.Tensor

    def __init__(self, channels_in: int, channels_out: int, l_max: int, *, grid: int,
                 function: Callable[[torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        points, weights = sh.half_grid(grid)
        samples = sh.evaluate(l_max, ring_samples(torch.tensor(points)))
        # B'B is n/4π times the identity for n points with these weights
        l, norm = sh.degrees(l_max), len(points) / (4 * math.pi)
        damping = norm / (norm + SMOOTHING * (l * (l + 1.0)) ** 2)
        back = torch.from_numpy(damping[:, None] * sh.basis(l_max, points).T * weights)
        self.register_buffer("samples", samples.flatten(0, 1).float(), persistent=False)
        self.register_buffer("back", back.float(), persistent=False)
        self.weight = nn.Parameter(
            torch.randn((1 + RING) * channels_in, channels_out) * ((1 + RING) * channels_in)**-0.5)
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.function = function

    def forward(self, x: Float[torch.Tensor, "coef voxel channel"]
                ) -> Float[torch.Tensor, "_ voxel out"]:
        voxels, channels = x.shape[1:]
        out = len(self.bias)
        if channels <= out:  # sums over the fewer channels first
            values = (self.samples @ x.flatten(1)).view(1 + RING, -1, voxels, channels)
            a = values.permute(1, 2, 0, 3).flatten(2) @ self.weight
        else:
            weight = self.weight.view(1 + RING, channels, out)
            y = (x.flatten(0, 1) @ weight.transpose(0, 1).flatten(1)).view(len(x), voxels, -1, out)
            rows = self.samples.view(1 + RING, -1, len(x)).transpose(0, 1).flatten(1)
            a = (rows @ y.permute(2, 0, 1, 3).flatten(0, 1).flatten(1)).view(-1, voxels, out)
        a = a + self.bias
        if self.function:
            a = self.function(a)
        return (self.back @ a.flatten(1)).unflatten(1, a.shape[1:])


class Activation(nn.Module):
    """A nonlinearity of single numbers."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class TableConvolution(nn.Module):
    """Convolution over the volumes in the order of the table, which ignores the sphere.

    The window holds as many values as a direction and its ring in `LocalConvolution`. The table
    is closed to a circle. x, y: (voxel, channel, direction).
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.window = nn.Conv1d(channels_in, channels_out, 1 + RING)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        left = RING // 2
        around = torch.cat([x[..., x.shape[-1] - left:], x, x[..., :RING - left]], -1)
        return self.window(around)


class ShellReadout(nn.Module):
    """Turn channels into shells, the reverse of `ShellEmbedding`.

    x_lm,s = Σ_c W_l,c(shell s) y_lm,c. The weights are a small network of b, b_delta and
    1/√directions of the shell.
    """

    def __init__(self, channels: int, *, l_max: int = 8, hidden: int = 64) -> None:
        super().__init__()
        self.channels = channels
        self.net = _shell_network((l_max // 2 + 1) * channels, hidden)

    def forward(self, y: Float[torch.Tensor, "coef voxel channel"],
                shells: Float[torch.Tensor, "group shell 3"]
                ) -> Float[torch.Tensor, "coef voxel shell"]:
        weight = self.net(shell_properties(shells)).unflatten(-1, (-1, self.channels))
        weight = weight.movedim(2, 0) / self.channels
        scaled = torch.stack([w / c for w, c in zip(weight, ShellEmbedding.SCALE, strict=False)])
        return (y.unflatten(1, (len(shells), -1)) @ by_degree(scaled.mT)).flatten(1, 2)


def _shell_network(out: int, hidden: int = 64, inputs: int = 5) -> nn.Sequential:
    """Build a network of the properties of a shell, and of more inputs."""
    last = nn.Linear(hidden, out)
    nn.init.normal_(last.weight, std=1.5 / math.sqrt(hidden))
    return nn.Sequential(nn.Linear(inputs, hidden), nn.SiLU(), nn.Linear(hidden, hidden),
                         nn.SiLU(), last)


class Autoencoder(nn.Module):
    """Remove noise from the signal of single voxels (see the module).

    Parameters
    ----------
    layer : str
        One of LAYERS.
    nonlinearity : str
        One of NONLINEARITIES.
    space : str
        One of SPACES: where the nonlinearity acts.
    widths : sequence of int
        Channels of each hidden layer.
    l_max : int
        Degree of the fits and layers on the sphere.
    grid : int
        Degree of the half grids.
    shortcut : bool
        Whether a share of the input is added to the output (`zonal` and `local` only): one of each
        degree of the fit, and one of its residual, by the properties of the shell and the noise.
        With little noise a bottleneck loses more than it removes.
    shells : int
        Number of shells, in a fixed order; 0 for any shells, which are embedded by their
        properties (`zonal` and `local` only).
    directions : int
        Largest number of directions of a shell (`connected` only).

    Raises
    ------
    ValueError
        A value is unknown, or the layer does not support it.
    """

    def __init__(self, *, layer: str = "zonal", nonlinearity: str = "relu", space: str = "signal",
                 widths: Sequence[int] = (32, 16, 32), l_max: int = 8, grid: int = 21,
                 shortcut: bool = False, shells: int = 0, directions: int = 0) -> None:
        super().__init__()
        if layer not in LAYERS or nonlinearity not in NONLINEARITIES or space not in SPACES:
            raise ValueError(f"there is no layer {layer} with {nonlinearity} in {space} space")
        if needs_table(layer) and (space != "signal" or not shells):
            raise ValueError(f"the layer {layer} serves one table with a known number of shells, "
                             "and has no coefficients")
        self.layer = layer
        function = NONLINEARITIES[nonlinearity]

        def block(channels_in: int, channels_out: int, last: bool = False,
                  scale: torch.Tensor | None = None) -> list[nn.Module]:
            if layer == "connected":
                one: nn.Module = nn.Linear(channels_in, channels_out)
            elif layer == "signal":
                one = TableConvolution(channels_in, channels_out)
            elif layer == "zonal":
                one = ZonalConvolution(channels_in, channels_out, l_max, scale=scale)
            else:
                inside = function if space == "signal" and not last else None
                one = LocalConvolution(channels_in, channels_out, l_max, grid=grid,
                                       function=inside)
            if last or (layer == "local" and space == "signal"):
                return [one]
            if layer == "zonal" and space == "signal":
                return [one, Pointwise(l_max, l_max, grid=grid, function=function)]
            return [one, Activation(function)]

        self.shares = (_shell_network(l_max // 2 + 2, inputs=6)
                       if shortcut and not needs_table(layer) else None)
        per_shell = directions if layer == "connected" else 1
        sizes = [per_shell * shells or widths[0], *widths[not shells:]]
        self.embed = None if shells else ShellEmbedding(widths[0], l_max=l_max)
        self.start = None if shells else nn.Sequential(*block(widths[0], widths[0])[1:])
        size = torch.tensor(ShellEmbedding.SCALE[:l_max // 2 + 1])  # of coefficients, by degree
        hidden = [module for i, (a, b) in enumerate(pairwise(sizes)) for module in block(
            a + LEVELS * (i == 0), b, scale=size * a**-0.5 if shells and i == 0 else None)]
        if shells:
            last = block(widths[-1], per_shell * shells, last=True,
                         scale=1 / size * widths[-1]**-0.5)
            self.layers, self.readout = nn.Sequential(*hidden, *last), None
        else:
            self.layers, self.readout = nn.Sequential(*hidden), ShellReadout(widths[-1],
                                                                             l_max=l_max)

    def forward(self, signal: Float[torch.Tensor, "voxel shell direction"],
                noise: Float[torch.Tensor, "voxel 2"], shells: Float[torch.Tensor, "group shell 3"],
                fit: Float[torch.Tensor, "group shell coef direction"],
                basis: Float[torch.Tensor, "group shell direction coef"]
                ) -> Float[torch.Tensor, "voxel shell direction"]:
        """Compute S/S0 without noise.

        Parameters
        ----------
        signal : (voxel, shell, direction) tensor
            S/S0. Voxels are ordered by group, the same number in each. Shells and directions are
            padded with 0 to equal numbers.
        noise : (voxel, 2) tensor
            σ/S0 of one measurement; the same if the signal is a magnitude, otherwise 0.
        shells : (group, shell, 3) tensor
            b (ms/µm²), b_delta and 1/√directions of the shells of each group.
        fit, basis : tensor
            SH fit of each shell, and the SH functions along its directions; 0 where padded.

        Returns
        -------
        (voxel, shell, direction) tensor
        """
        levels = 10 * noise
        if self.layer == "connected":
            return self.layers(torch.cat([signal.flatten(1), levels], 1)).view(signal.shape)
        if self.layer == "signal":
            constant = levels[..., None].expand(-1, -1, signal.shape[2])
            return self.layers(torch.cat([signal, constant], 1))
        groups = signal.unflatten(0, (len(shells), -1)).transpose(1, 2)
        x = (groups @ fit.mT).movedim(3, 0).transpose(2, 3).flatten(1, 2)
        constant = nn.functional.pad(math.sqrt(4 * math.pi) * levels[None],
                                     (0, 0, 0, 0, 0, len(x) - 1))
        if self.embed is None or self.start is None or self.readout is None:
            y = self.layers(torch.cat([x, constant], 2))
        else:
            y, log_means = self.embed(x, shells)
            y = y + nn.functional.pad(math.sqrt(4 * math.pi) * log_means[None],
                                      (0, 0, 0, 0, 0, len(x) - 1))
            y = self.readout(self.layers(torch.cat([self.start(y), constant], 2)), shells)

        def along_directions(y: torch.Tensor) -> torch.Tensor:
            y = y.unflatten(1, (len(shells), -1)).movedim(0, 3).transpose(1, 2)
            return (y @ basis.mT).transpose(1, 2).flatten(0, 1)

        if self.shares is None:
            return along_directions(y)
        level = noise[:, :1].clamp(min=1e-3).log() + 3
        properties = shell_properties(shells).repeat_interleave(len(noise) // len(shells), 0)
        level = level[:, None].expand(-1, properties.shape[1], -1)
        shares = torch.sigmoid(self.shares(torch.cat([properties, level], 2)))
        degrees = by_degree(shares[..., :-1].movedim(2, 0))
        residual = (signal - along_directions(x)) * (basis[..., 0] != 0).repeat_interleave(
            len(noise) // len(shells), 0)
        return along_directions(y + degrees * x) + shares[..., -1:] * residual
