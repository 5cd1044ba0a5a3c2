"""Networks on volumes of diffusion signals.

A voxel has the attenuations S/S0 of the n weighted measurements of a gradient table. The input of
the U-Net is a linear function of them in every voxel: y = Mᵀ (S/S0), with a matrix M (n, channel)
that depends on the table alone. It interpolates in q-space to the directions of one table, as in
Weninger et al. 2022, or it is learned for any table (`TableEmbedding`). Since M is the same in all
voxels, it commutes with an interpolation in space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import nn

from bidsapp import sh
from bidsapp.networks.scnn import ShellEmbedding, shell_properties
from bidsapp.networks.spherical import by_degree
from bidsapp.networks.unet import UNet


class Table(NamedTuple):
    """The weighted measurements of a gradient table.

    Attributes
    ----------
    fit : (shell, coefficient, n) tensor
        Matrices from the n measurements to the SH coefficients of each shell; 0 for the
        measurements of other shells, and for degrees that a shell does not determine.
    shells : (shell, 3) tensor
        b (ms/µm²), b_delta and 1/√directions of each shell.
    basis : (n, coefficient) tensor
        SH functions along the direction of each measurement.
    shell : (n,) int tensor
        Shell of each measurement.
    """

    fit: Float[torch.Tensor, "shell coef n"]
    shells: Float[torch.Tensor, "shell 3"]
    basis: Float[torch.Tensor, "n coef"]
    shell: Int[torch.Tensor, " n"]

    def to(self, device: str | torch.device) -> Table:
        """Move to a device."""
        return Table(*(tensor.to(device) for tensor in self))


class ShellWeights(nn.Module):
    """Weights W_ck(shell) of SH coefficients c, equal within a degree: a smooth function, a small
    network, of b, b_delta and 1/√directions.

    Parameters
    ----------
    kernels : int
        Number of weights k of each degree.
    degree : int
        Highest degree.
    hidden : int
        Units of each hidden layer.
    """

    def __init__(self, kernels: int, degree: int, hidden: int = 64) -> None:
        super().__init__()
        self.kernels = kernels
        self.net = nn.Sequential(
            nn.Linear(5, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
            nn.Linear(hidden, (degree // 2 + 1) * kernels))

    def forward(self, shells: Float[torch.Tensor, "shell 3"]
                ) -> Float[torch.Tensor, "coef shell kernel"]:
        weights = self.net(shell_properties(shells[None])[0]).unflatten(-1, (-1, self.kernels))
        return by_degree(weights.movedim(1, 0))


class TableEmbedding(nn.Module):
    """The matrix M of any gradient table: y_j = 1/S Σ_s Σ_c Σ_k A_jck W_ck(shell s) x_cs.

    x_cs are the SH coefficients of S/S0 on the S shells.

    Parameters
    ----------
    channels : int
        Number of channels j.
    degree : int
        Highest degree of the coefficients.
    kernels : int
        Number of weights k of each degree and shell.
    """

    def __init__(self, channels: int, degree: int = 8, kernels: int = 4) -> None:
        super().__init__()
        self.weights = ShellWeights(kernels, degree)
        # coefficients of high degrees are small: without the scale they would hardly be learned
        scale = by_degree(torch.tensor(ShellEmbedding.SCALE[:degree // 2 + 1]))
        self.mix = nn.Parameter(torch.randn(channels, len(scale), kernels) * scale[:, None]
                                / (len(scale) * kernels) ** 0.5)

    def forward(self, table: Table) -> Float[torch.Tensor, "n channel"]:
        size = self.mix.shape[1]
        return torch.einsum("scn,csk,jck->nj", table.fit[:, :size], self.weights(table.shells),
                            self.mix) / len(table.shells)


class TableReadout(nn.Module):
    """The matrix D from features f to the S/S0 of the measurements of any gradient table.

    S/S0 along n on the shell s is Σ_c Y_c(n) Σ_k W_ck(shell s) Σ_j B_jck f_j.

    Parameters
    ----------
    features : int
        Number of features j.
    degree, kernels
        As in `TableEmbedding`.
    """

    def __init__(self, features: int, degree: int = 8, kernels: int = 4) -> None:
        super().__init__()
        size = sh.size(degree)
        self.weights = ShellWeights(kernels, degree)
        self.mix = nn.Parameter(torch.randn(features, size, kernels) / (features * kernels) ** 0.5)

    def forward(self, table: Table) -> Float[torch.Tensor, "feature n"]:
        size = self.mix.shape[1]
        shells = torch.einsum("csk,jck->sjc", self.weights(table.shells), self.mix)
        return torch.einsum("nc,njc->jn", table.basis[:, :size], shells[table.shell])


class VolumeNetwork(nn.Module):
    """The 3-D U-Net of Weninger et al. 2022 on channels of one table, or of any.

    Widths are `width` · 1, 2, 4, 8, with instance normalisation and transposed convolutions. The
    part `encoder` of its weights can start a network of other outputs; `head` is a 1×1×1
    convolution, or `TableReadout` if the outputs are the signals of the table.

    Parameters
    ----------
    outputs : int, optional
        Number of outputs of each voxel; None: the outputs are S/S0 of the measurements.
    channels : int
        Number of inputs of the U-Net.
    any_table : bool
        Whether the channels are learned for any gradient table (`TableEmbedding`); if not, the
        input is the channels.
    width : int
        Number of features.
    levels : int
        Number of times that the grid is halved.
    degree, kernels
        Those of `TableEmbedding` and `TableReadout`.
    """

    def __init__(self, *, outputs: int | None = None, channels: int = 64, any_table: bool = True,
                 width: int = 16, levels: int = 3, degree: int = 8, kernels: int = 4) -> None:
        super().__init__()
        self.min_size = 2 * 2**levels
        unet = UNet(inputs=channels, outputs=None, width=width, levels=levels, dimension=3,
                    normalisation="instance", enlarge="transposed")
        self.encoder = nn.ModuleDict({"unet": unet, **(
            {"embedding": TableEmbedding(channels, degree, kernels)} if any_table else {})})
        self.head = (TableReadout(width, degree, kernels) if outputs is None
                     else nn.Conv3d(width, outputs, 1))

    def matrix(self, table: Table) -> Float[torch.Tensor, "n channel"]:
        """Compute the matrix from the S/S0 of a table to the channels."""
        return self.encoder["embedding"](table)

    def forward(self, ratios: Sequence[Float[torch.Tensor, "_ _ _ _"]],
                tables: Sequence[Table | None]) -> list[Float[torch.Tensor, "_ _ _ _"]]:
        """Compute the outputs (out, x, y, z) of images, whose sizes and tables may differ.

        ratios: S/S0 of the measurements of each table, (n, x, y, z); without a table, the channels.
        """
        channels = [ratio if table is None else torch.einsum(
            "nc,nxyz->cxyz", self.matrix(table), ratio)
            for ratio, table in zip(ratios, tables, strict=True)]
        # one batch: PyTorch's convolutions on a CPU are several times slower on single images
        shape = [max(sizes) for sizes in zip(*(c.shape[1:] for c in channels), strict=True)]
        features = self.features(torch.stack([_pad(c, shape) for c in channels]))
        outputs = []
        for f, ratio, table in zip(features, ratios, tables, strict=True):
            x, y, z = ratio.shape[1:]
            f = f[:, :x, :y, :z]
            outputs.append(torch.einsum("fxyz,fn->nxyz", f, self.head(table))
                           if isinstance(self.head, TableReadout) else self.head(f[None])[0])
        return outputs

    def features(self, channels: Float[torch.Tensor, "image channel x y z"]
                 ) -> Float[torch.Tensor, "image feature x y z"]:
        """Compute the features of every voxel. Grids of fewer than 2 · 2^levels voxels along an
        axis are padded with zeros, since instance normalisation needs more than one voxel at the
        coarsest level."""
        x, y, z = channels.shape[2:]
        padded = _pad(channels, [max(n, self.min_size) for n in (x, y, z)])
        return self.encoder["unet"](padded)[..., :x, :y, :z]


def _pad(volumes: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Pad the last three axes with zeros at their ends."""
    return nn.functional.pad(volumes, [p for n, old in zip(
        reversed(shape), reversed(volumes.shape[-3:]), strict=True) for p in (0, n - old)])
