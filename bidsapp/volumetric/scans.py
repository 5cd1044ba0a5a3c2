"""Runs on the grid of a network, and crops of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from bidsapp.acquisition import Acquisition, Shell
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.networks.volumetric import Table
from bidsapp.volumetric import inputs
from bidsapp.volumetric.corruption import Corruption
from bidsapp.volumetric.inputs import Grid

log = logging.getLogger("qsphere")

SAME_DIRECTION = 1.0
"""Largest angle between a direction of a run and one of the network's table that count as the same,
degrees."""

CHUNK = 8
"""Volumes that are put on the grid at a time."""


@dataclass(frozen=True)
class Channels:
    """The voxel size and the gradient table of a network, kept among the constants of its card.

    Parameters
    ----------
    voxel : float
        Edge of the network's voxels, mm.
    directions : sequence of sequence of float
        Unit vectors of the table relative to the axes of the grid; empty for any table.
    b : float
        b-value of the table, s/mm².
    """

    voxel: float
    directions: Sequence[Sequence[float]] = ()
    b: float = 0.0

    def nearest(self, shells: Sequence[Shell]) -> Shell:
        """Find the shell that is nearest to the table in b."""
        return min(shells, key=lambda s: abs(s.b - self.b))

    def interpolate(self, acquisition: Acquisition, grid: Grid
                    ) -> tuple[Float[torch.Tensor, "n channel"], int | None]:
        """Compute the matrix from weighted measurements to the directions of the table.

        The shell nearest in b is used. If it has the directions of the table, within
        SAME_DIRECTION, they are selected; otherwise they are interpolated by SH.

        Returns
        -------
        matrix : (n, channel)
        degree : int or None
            Degree of the SH, 8 or what the directions determine; None without interpolation.
        """
        wanted = np.array(self.directions)
        shell = self.nearest(acquisition.shells)
        axes = grid.directions(acquisition.bvecs[shell.indices])
        cosine = np.abs(wanted @ axes.T)
        if cosine.max(1).min() >= math.cos(math.radians(SAME_DIRECTION)):
            selected = torch.from_numpy(shell.indices[cosine.argmax(1)])
            return torch.eye(len(acquisition))[:, selected], None
        return inputs.interpolation(inputs.describe_table(acquisition, grid), wanted, self.b)


@dataclass(frozen=True)
class Labelled:
    """A run with the target of a training.

    Parameters
    ----------
    dwi : Dwi
    target : (voxel, t) float32, optional
        None if the network learns S/S0 itself.
    valid : (voxel,) bool, optional
        Voxels whose target is known; None for all with signal at b = 0.
    """

    dwi: Dwi
    target: Float[np.ndarray, "voxel t"] | None = None
    valid: Bool[np.ndarray, " voxel"] | None = None


@dataclass(frozen=True, eq=False)
class Scan:
    """A run on the grid of a network, in a training.

    Parameters
    ----------
    ratio : (n, x, y, z) float16
        S/S0 in a file: of the measurements, or along the directions of the network's table.
    acquisition : Acquisition, optional
        The n measurements; None for the directions of the network's table.
    grid : Grid
    target : (t, x, y, z) float32 tensor
        What the network learns to predict, if not S/S0.
    valid : (x, y, z) bool tensor
        Voxels whose target is known.
    degree : int, optional
        Degree of the SH by which it was interpolated to the network's table, if it was.
    """

    ratio: np.ndarray
    acquisition: Acquisition | None
    grid: Grid
    target: Float[torch.Tensor, "t x y z"]
    valid: Bool[torch.Tensor, "x y z"]
    degree: int | None = None


class Example(NamedTuple):
    """A crop of a scan with part of its measurements.

    Attributes
    ----------
    ratio, clean : (n, x, y, z) tensor
        S/S0 as the network sees them, and without corruption.
    table : Table, optional
        The n measurements; None for the directions of the network's table.
    target : (t, x, y, z) tensor
    valid : (x, y, z) bool tensor
        Voxels on which the loss is computed.
    """

    ratio: torch.Tensor
    clean: torch.Tensor
    table: Table | None
    target: torch.Tensor
    valid: torch.Tensor

    def to(self, device: str | torch.device) -> Example:
        """Move to a device."""
        return self._replace(
            ratio=self.ratio.to(device), clean=self.clean.to(device),
            table=None if self.table is None else self.table.to(device),
            target=self.target.to(device), valid=self.valid.to(device))


def prepare(labelled: Labelled, channels: Channels, folder: Path, name: str) -> Scan:
    """Put a run and its target on the grid of a network; interpolate it to the network's table.

    Parameters
    ----------
    labelled : Labelled
    channels : Channels
        Voxel and table of the network.
    folder, name
        Where the attenuations are kept.

    Raises
    ------
    Refusal
        The run has no b0 or too few directions, or no voxel has a label.
    """
    dwi = labelled.dwi
    grid = Grid.over(dwi, channels.voxel)
    measurements = inputs.weighted(dwi.acquisition)
    acquisition: Acquisition | None = dwi.acquisition[measurements]
    values = inputs.attenuation(torch.from_numpy(dwi.signal[:, measurements]),
                                torch.from_numpy(dwi.signal[:, dwi.acquisition.b0]))
    degree = None
    if channels.directions:
        matrix, degree = channels.interpolate(dwi.acquisition[measurements], grid)
        values, acquisition = (values @ matrix).clip(0, 1), None
        if degree is not None and degree < inputs.DEGREE:
            log.info("%s: interpolated to the table of the network with SH of degree %d, since its "
                     "directions determine no more", name, degree)
    ratio = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.float16,
                                      (values.shape[1], *grid.shape))
    for i in range(0, len(ratio), CHUNK):
        ratio[i:i + CHUNK] = grid.volumes(values[:, i:i + CHUNK]).numpy()
    ratio.flush()
    known = torch.from_numpy(dwi.mean_b0 > 0 if labelled.valid is None else labelled.valid)[:, None]
    weight = grid.volumes(known.float())
    if not (weight > 0.5).any():
        raise Refusal("no voxel has a label. Check the alignment with the T1w image.")
    target = torch.zeros(len(known), 0) if labelled.target is None else torch.from_numpy(
        labelled.target)
    # the mean over known voxels
    return Scan(ratio, acquisition, grid, grid.volumes(target * known) / weight.clamp(min=1e-6),
                weight[0] > 0.5, degree)


def cut(scan: Scan, crop: inputs.Block, chosen: Int[np.ndarray, " n"] | None = None,
        corruption: Corruption | None = None, generator: torch.Generator | None = None) -> Example:
    """Cut a crop of a scan, with some of its measurements; corrupt it, if asked.

    chosen: measurements; default: all.
    """
    every = np.arange(len(scan.ratio)) if chosen is None else chosen
    clean = torch.from_numpy(scan.ratio[(slice(None), *crop)][every].astype(np.float32))
    table = None if scan.acquisition is None else inputs.describe_table(
        scan.acquisition[every], scan.grid)
    valid, ratio = scan.valid[crop], clean
    if corruption is not None:
        assert generator is not None
        ratio, counted = corruption(clean, generator)
        ratio, valid = ratio * scan.grid.mask[crop], valid & counted
    return Example(ratio, clean, table, scan.target[(slice(None), *crop)], valid)


def cut_middle(scan: Scan, patch: int, corruption: Corruption | None = None, seed: int = 0
               ) -> Example:
    """Cut the crop in the middle of a scan, with all measurements."""
    x, y, z = (slice(max(0, (n - patch) // 2), max(0, (n - patch) // 2) + patch)
               for n in scan.grid.shape)
    return cut(scan, (x, y, z), None, corruption, torch.Generator().manual_seed(seed))
