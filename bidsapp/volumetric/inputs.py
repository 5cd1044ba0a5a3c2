"""Attenuations of a run on the grid of a network, and its gradient table as networks take it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bidsapp import sh
from bidsapp.acquisition import SAME_SHAPE, Acquisition, Shell, describe_shells
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.networks.volumetric import Table
from bidsapp.registration.geometry import canonical
from bidsapp.simulate import protocols

SAME_SIZE = 0.1
"""Share by which an edge of the voxel may differ from that of the network without resampling."""

DEGREE = protocols.L_FIT
"""Highest degree of the SH coefficients of a shell."""

MIN_DIRECTIONS = 6
"""Minimum number of directions of a shell: as many as degree 2 has coefficients."""

MIN_EXTENT = 4
"""Smallest number of voxels of a grid along an axis. With two slices of a real scan, the network
missed nearly all grey matter; with four it did not."""

Block = tuple[slice, slice, slice]
WHOLE: Block = (slice(None), slice(None), slice(None))


@dataclass(frozen=True, eq=False)
class Grid:
    """The grid of a network over the mask of a run, and the interpolation between both.

    The grid covers the bounding box of the mask. Interpolation is linear along each axis; larger
    voxels have the mean of the interpolated values over the voxel. Values outside the mask have no
    part in it.

    Parameters
    ----------
    rows : (x, y, z) int
        For each voxel of the bounding box, in RAS+ order, its row in the signal; −1 outside the
        mask.
    rotation : (3, 3)
        Unit vectors along the axes of the grid in the world, as columns.
    ratio : (3,)
        Edge of the grid's voxel over that of the run, for each axis; 1 without resampling.
    """

    rows: Int[np.ndarray, "x y z"]
    rotation: Float[np.ndarray, "3 3"]
    ratio: tuple[float, float, float]

    @classmethod
    def over(cls, dwi: Dwi, size: float | None = None) -> Grid:
        """Lay the grid over a run.

        Parameters
        ----------
        dwi : Dwi
        size : float, optional
            Edge of the grid's voxels, mm. None, or if no edge of the run differs by more than
            SAME_SIZE: the voxels of the run.

        Raises
        ------
        Refusal
            The grid has fewer than MIN_EXTENT voxels along an axis, or none of which more than
            half lies in the mask.
        """
        mask, affine, order = canonical(dwi.mask, dwi.affine)
        rows = np.full(mask.shape, -1)
        rows[mask] = order
        box = tuple(slice(int(i.min()), int(i.max()) + 1) for i in np.nonzero(mask))
        edges = np.linalg.norm(affine[:3, :3], axis=0)
        ratio = np.ones(3) if size is None else size / edges
        if (np.abs(ratio - 1) <= SAME_SIZE).all():
            ratio = np.ones(3)
        x, y, z = map(float, ratio)
        grid = cls(rows[box], affine[:3, :3] / edges, (x, y, z))
        if min(grid.shape) < MIN_EXTENT or not grid.mask.any():
            of_network = " × ".join(map(str, grid.shape))
            raise Refusal(f"the brain mask of {len(order)} voxels of {describe_edges(edges)} mm "
                          f"is on {of_network} voxels of the network. Needed are {MIN_EXTENT} or "
                          "more along each axis, since the network sees neighbourhoods: a larger "
                          "part of the brain, or a network of smaller voxels.")
        return grid

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Size of the grid in voxels."""
        x, y, z = (max(1, int(np.ceil(n / r - 1e-6)))
                   for n, r in zip(self.rows.shape, self.ratio, strict=True))
        return x, y, z

    @cached_property
    def mask(self) -> Bool[torch.Tensor, "x y z"]:
        """Voxels of the grid of which more than half lies in the mask of the run."""
        inside = torch.from_numpy((self.rows >= 0).astype(np.float32))
        return _along_axes(inside[None], self._to_grid)[0] > 0.5

    def volumes(self, values: Float[torch.Tensor, "voxel k"], block: Block = WHOLE
                ) -> Float[torch.Tensor, "k x y z"]:
        """Put values of the voxels of the run on the grid, or on a block of it.

        They are 0 outside the mask.
        """
        if self.ratio == (1, 1, 1):
            return _gather(values, self.rows[block])
        matrices = [m[part] for m, part in zip(self._to_grid, block, strict=True)]
        used = [m.any(0).nonzero()[:, 0] for m in matrices]
        x, y, z = (slice(int(u.min()), int(u.max()) + 1) if len(u) else slice(0) for u in used)
        matrices = [m[:, part] for m, part in zip(matrices, (x, y, z), strict=True)]
        rows = self.rows[x, y, z]
        weight = _along_axes(torch.from_numpy((rows >= 0).astype(np.float32))[None], matrices)
        mean = _along_axes(_gather(values, rows), matrices) / weight.clamp(min=1e-6)
        return mean * self.mask[block]

    def voxels(self, volumes: Float[torch.Tensor, "k x y z"]) -> Float[torch.Tensor, "voxel k"]:
        """Interpolate volumes on the grid at the voxels of the run's mask."""
        inside = torch.from_numpy(self.rows >= 0)
        if self.ratio != (1, 1, 1):
            matrices = [_interpolation(old, new, 1 / r) for old, new, r in zip(
                self.rows.shape, self.shape, self.ratio, strict=True)]
            known = self.mask[None].to(volumes.dtype)
            weight = _along_axes(known, matrices).clamp(min=1e-6)
            volumes = _along_axes(volumes * known, matrices) / weight
        result = volumes.new_empty(int(inside.sum()), len(volumes))
        result[torch.from_numpy(self.rows)[inside]] = volumes[:, inside].T
        return result

    def directions(self, vectors: Float[np.ndarray, "*n 3"]) -> Float[np.ndarray, "*n 3"]:
        """Rotate directions of the world to the axes of the grid."""
        return vectors @ self.rotation

    @cached_property
    def _to_grid(self) -> list[torch.Tensor]:
        return [_interpolation(new, old, r) for new, old, r in zip(
            self.shape, self.rows.shape, self.ratio, strict=True)]


def describe_edges(edges: Float[np.ndarray, " 3"]) -> str:
    """Write voxel edges in mm, as 2 × 2 × 2.5."""
    return " × ".join(f"{e:.3g}" for e in edges)


def _interpolation(new: int, old: int, ratio: float) -> Float[torch.Tensor, "new old"]:
    """Weights of old voxels j for a new voxel i, centred at x_i = ratio (i + ½) − ½: Λ(x_i − j), or
    the mean of Λ(x − j) over |x − x_i| < ratio/2 if ratio > 1, with Λ(x) = max(0, 1 − |x|)."""
    x = (ratio * (torch.arange(new) + 0.5) - 0.5)[:, None] - torch.arange(old)
    if ratio <= 1:
        return (1 - x.abs()).clamp(min=0)

    def integral(x: torch.Tensor) -> torch.Tensor:
        """∫ Λ from −∞."""
        return ((1 + x.clamp(-1, 0)) ** 2 + 1 - (1 - x.clamp(0, 1)) ** 2) / 2

    return (integral(x + ratio / 2) - integral(x - ratio / 2)) / ratio


def _along_axes(volumes: torch.Tensor, matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """Multiply the axes x, y, z of (k, x, y, z) volumes by matrices."""
    return torch.einsum("kxyz,ax,by,cz->kabc", volumes, *matrices)


def _gather(values: Float[torch.Tensor, "voxel k"], rows: Int[np.ndarray, "x y z"]
            ) -> Float[torch.Tensor, "k x y z"]:
    """Put rows of values on a grid; 0 where the row is −1."""
    volume = values.new_zeros(values.shape[1], *rows.shape)
    inside = torch.from_numpy(rows >= 0)
    volume[:, inside] = values[torch.from_numpy(rows)[inside]].T
    return volume


def attenuation(signal: Float[torch.Tensor, "voxel n"], b0: Float[torch.Tensor, "voxel m"]
                ) -> Float[torch.Tensor, "voxel n"]:
    """Divide measurements by the mean b0, and clip to [0, 1]; 0 where the mean is not above 0."""
    s0 = b0.mean(1, keepdim=True)
    return torch.where(s0 > 0, signal / s0, 0).clip(0, 1)


def weighted(acquisition: Acquisition) -> Int[np.ndarray, " n"]:
    """List the measurements that networks take: those of shells with directions.

    Raises
    ------
    Refusal
        There is no b0, or no shell with MIN_DIRECTIONS directions.
    """
    shells = usable_shells(acquisition)
    if not acquisition.b0.any() or not shells:
        raise Refusal(f"there are {int(acquisition.b0.sum())} b0 volumes and "
                      f"{describe_shells(acquisition.shells)}. Needed are a b0 and "
                      f"{MIN_DIRECTIONS} directions of linear encoding at one b-value.")
    return np.sort(np.concatenate([shell.indices for shell in shells]))


def usable_shells(acquisition: Acquisition) -> list[Shell]:
    """List the shells of linear encoding with MIN_DIRECTIONS directions or more."""
    return [s for s in acquisition.shells
            if s.b_delta > 1 - SAME_SHAPE and len(s) >= MIN_DIRECTIONS]


def describe_table(acquisition: Acquisition, grid: Grid) -> Table:
    """Describe weighted measurements, in the frame of a grid.

    Each shell is fitted by SH up to degree 8, or to what its directions determine
    (`simulate.protocols.build`).

    Parameters
    ----------
    acquisition : Acquisition
        Measurements of `weighted`.
    grid : Grid
        Grid, to whose axes directions are rotated.
    """
    turned = replace(acquisition, bvecs=grid.directions(acquisition.bvecs))
    shells = turned.shells
    stack = protocols.from_acquisition(turned, shells, DEGREE)
    fit = torch.zeros(len(shells), sh.size(DEGREE), len(turned))
    owner = torch.zeros(len(turned), dtype=torch.long)
    for i, shell in enumerate(shells):
        fit[i][:, shell.indices] = stack.fit[0, i, :, :len(shell)].float()
        owner[shell.indices] = i
    basis = torch.from_numpy(sh.basis(DEGREE, turned.bvecs)).float()
    return Table(fit, stack.shells[0].float(), basis, owner)


def interpolation(table: Table, directions: Float[np.ndarray, "channel 3"], b: float
                  ) -> tuple[Float[torch.Tensor, "n channel"], int]:
    """Make the matrix of the q-space interpolation to the directions of one table.

    Parameters
    ----------
    table : Table
        Measurements of the run; the shell nearest in b is used.
    directions : (channel, 3)
        Unit vectors in the frame of the grid.
    b : float
        b-value of the table, s/mm².

    Returns
    -------
    matrix : (n, channel)
    degree : int
        Degree of the interpolation, 8 or what the shell determines.
    """
    nearest = int((table.shells[:, 0] - b / 1000).abs().argmin())
    fit = table.fit[nearest]
    used = torch.from_numpy(sh.degrees(DEGREE))[fit.abs().sum(1) > 0]
    matrix = torch.from_numpy(sh.basis(DEGREE, directions)).float() @ fit
    return matrix.T.contiguous(), int(used.max())
