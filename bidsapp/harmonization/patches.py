"""Voxels that a network of patches learns from and is applied to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh, tensor, training
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.blocks import map_volume
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, UsageError
from bidsapp.harmonization import intensity, pairs
from bidsapp.harmonization.harmonizer import Harmonizer
from bidsapp.kinds import Cohort, TrainingSettings
from bidsapp.networks.shresnet import CENTRE, SHResNet, neighbours, patches
from bidsapp.progress import track

BLOCK = 1024
"""Voxels that pass a network at a time: what they become stays in the cache."""

HALF_OF_CHI_SQUARE = 0.4549
"""Median of χ² with one degree of freedom."""

MEASURES = ("signal", "fa", "md")


class PatchDataset:
    """Voxels of one shell of aligned pairs.

    Images and targets go to files in `folder`, of which the system keeps in memory what fits.
    directions: most of any target. series: whether a target's signal is that of its SH series,
    smoothed as the source's. tissue: (voxel,) label, 0 of neither grey nor white matter: those
    serve, too, since a network is applied in the whole mask. pair: (voxel,) which it is of.
    """

    def __init__(self, folder: Path, directions: int, l_max: int, series: bool = False) -> None:
        self.directions, self.l_max, self.series = directions, l_max, series
        self.folder = folder
        self.rows = 0
        self.centres: list[np.ndarray] = []
        self.pairs: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.bases: list[np.ndarray] = []
        self.fits: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []

    def add(self, aligned: pairs.AlignedPair, shell: int, acquisition: Acquisition) -> None:
        """A pair, and the b-table of its target."""
        image, indices = aligned.image[shell], acquisition.shells[shell].indices
        inside = np.pad(aligned.overlap, 1)
        self.centres.append(self.rows + np.flatnonzero(inside))
        self.pairs.append(np.full(int(inside.sum()), len(self.bases)))
        self.labels.append(aligned.labels[aligned.overlap])
        self.steps.append(neighbours(inside.shape))
        basis = np.zeros((self.directions, image.shape[-1]))
        basis[:len(indices)] = sh.basis(self.l_max, acquisition.bvecs[indices])
        self.bases.append(basis)
        fit = np.zeros((6, self.directions))
        fit[:, :len(indices)] = tensor.attenuation_fit(acquisition.btensors[indices])
        self.fits.append(fit)
        target = np.zeros((len(aligned.target), self.directions), np.float32)
        values = aligned.target[:, indices]
        if self.series:
            smooth = sh.smooth_fit(self.l_max, acquisition.bvecs[indices], pairs.SMOOTHING)
            values = values @ (basis[:len(indices)] @ smooth).T
        target[:, :len(indices)] = values
        _append(self.folder / "image", image)
        _append(self.folder / "target", target)
        self.rows += inside.size

    def close(self) -> None:
        """No more pairs: from now on voxels can be drawn."""
        self.image = _read(self.folder / "image", self.bases[0].shape[1])
        self.target = _read(self.folder / "target", self.directions)
        self.centre, self.pair, self.tissue = (torch.from_numpy(np.concatenate(v)) for v in (
            self.centres, self.pairs, self.labels))
        self.step = torch.from_numpy(np.stack(self.steps))
        self.basis = torch.from_numpy(np.stack(self.bases)).float()
        self.fit = torch.from_numpy(np.stack(self.fits)).float()
        self.count = (self.basis != 0).any(2).sum(1)

    def seen_as(self, image: Path) -> PatchDataset:
        """The same voxels, their source in another file."""
        other = copy(self)
        other.image = _read(image, self.basis.shape[2])
        return other

    def of(self, chosen: set[int], most: int | None = None) -> torch.Tensor:
        """Indices of the voxels of some pairs, every n-th where there are more than `most`."""
        found = torch.nonzero(torch.isin(self.pair, torch.tensor(sorted(chosen))))[:, 0]
        return found[::max(1, -(-len(found) // (most or len(found) or 1)))]

    def __call__(self, voxels: torch.Tensor, device: str | torch.device) -> training.Minibatch:
        """Patches, the basis along each target's directions, its S/S0, 1 over their number, and
        the tensor fit along them."""
        pair = self.pair[voxels]
        return tuple(v.to(device) for v in (
            patches(self.image, self.centre[voxels], self.step[pair]), self.basis[pair],
            self.target[voxels], 1 / self.count[pair], self.fit[pair]))

    def blocks(self, voxels: torch.Tensor, device: str) -> Iterator[training.Minibatch]:
        return (self(part, device) for part in voxels.split(BLOCK))


def _append(path: Path, values: np.ndarray) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(values).data)


def _read(path: Path, columns: int) -> torch.Tensor:
    return torch.from_file(str(path), size=path.stat().st_size // 4).view(-1, columns)


def signal_error(found: torch.Tensor, batch: training.Minibatch) -> torch.Tensor:
    """(voxel,) mean square error of the signal S/S0 that coefficients stand for."""
    _, basis, target, weight, _ = batch
    return ((basis @ found[..., None])[..., 0] - target).square().sum(1) * weight


def tensor_errors(found: torch.Tensor, batch: training.Minibatch) -> torch.Tensor:
    """(2, voxel) square errors of FA and of MD ((µm²/ms)²) of the shell's tensor."""
    _, basis, target, _, fit = batch
    signal = (basis @ found[..., None])[..., 0]
    return torch.stack([(a - b).square() for a, b in zip(
        tensor.of_attenuation(signal, fit), tensor.of_attenuation(target, fit), strict=True)])


def all_errors(found: torch.Tensor, batch: training.Minibatch) -> torch.Tensor:
    """(measure, voxel) of MEASURES."""
    return torch.cat([signal_error(found, batch)[None], tensor_errors(found, batch)])


def weighted_loss(weights: Mapping[str, float], samples: PatchDataset, voxels: torch.Tensor,
                  least: int, device: str
                  ) -> Callable[[torch.Tensor, training.Minibatch], torch.Tensor]:
    """(coefficients found, batch) → (voxel,) Σ_m w_m e_m / ē_m over MEASURES: square errors in
    units of their mean ē before the network, over every n-th of the voxels, one at least: n as
    large as leaves `least` of them."""
    few = voxels[::max(1, len(voxels) // least)]
    before = torch.cat([all_errors(b[0][:, CENTRE], b) for b in samples.blocks(few, device)], 1)
    weight = torch.tensor([weights[m] for m in MEASURES], device=device)
    weight = weight / before.mean(1).clamp(min=1e-12)
    return lambda found, batch: weight @ all_errors(found, batch)


class PairedScans:
    """Pairs of scans (`pairs.Pair`), each brought together once.

    pairs: their order is that of `PatchDataset.pair`. samples: one for each shell.
    """

    def __init__(self, method: Harmonizer, cohort: Cohort, settings: TrainingSettings,
                 found: list[pairs.Pair], directions: list[int], l_max: int, deformable: bool,
                 folder: Path, series: bool = False) -> None:
        self.method, self.cohort, self.pairs, self.folder = method, cohort, found, folder
        self.l_max = l_max
        self.samples: list[PatchDataset] = []
        for k, most in enumerate(directions):
            (own := folder / str(k)).mkdir()
            self.samples.append(PatchDataset(own, most, l_max, series))
        kept = settings.states or folder
        if (together := math.prod(settings.devices)) > 1:
            # each process registers its share, and finds those of the others
            share = found[training.processes()[0]::together]
            for pair in track(share, f"{method.name}: registering, this process:"):
                method.register(cohort, pair, deformable, kept, settings.device)
        method.register_all(cohort, found, deformable, kept, settings)
        for i, pair in enumerate(track(found, f"{method.name}: registering")):
            source, target, registration = method.register(cohort, pair, deformable, kept,
                                                   settings.device)
            registration.save(folder / f"{i}.npz")
            aligned = pairs.AlignedPair(
                **vars(registration), image=pairs.resample(source, l_max, registration),
                target=pairs.attenuation(target, registration))
            for k, samples in enumerate(self.samples):
                samples.add(aligned, k, target.acquisition)
        for samples in self.samples:
            samples.close()

    def registration(self, pair: int) -> pairs.Registration:
        """Where the target of a pair lies in its source."""
        registration = pairs.Registration.load(self.folder / f"{pair}.npz")
        assert registration
        return registration

    def of(self, people: set[str], kind: int = pairs.BOTH) -> set[int]:
        """Indices of their pairs."""
        return {i for i, pair in enumerate(self.pairs)
                if pair.participant in people and pair.kind == kind}

    def quantiles(self, people: set[str]) -> np.ndarray:
        """(2, shell, GRID): mean over people of those of their scans in the batch, and in the
        reference."""
        own = [p for p in self.pairs if p.participant in people]
        runs = {run for p in own for run in (p.source, p.target)}
        of = {run: self._quantiles(run)
              for run in track(sorted(runs), f"{self.method.name}: intensities")}
        return np.mean([np.mean([(of[p.source], of[p.target]) for p in own
                                 if p.participant == person], axis=0)
                        for person in sorted(people)], axis=0)

    def warped(self, quantiles: np.ndarray) -> list[PatchDataset]:
        """The samples with every source's intensities warped from the first quantiles to the
        second."""
        files = [self.folder / str(k) / "warped" for k in range(len(self.samples))]
        for file in files:
            file.unlink(missing_ok=True)
        for i, pair in enumerate(track(self.pairs, f"{self.method.name}: warping intensities")):
            dwi = self.method.load(self.cohort, pair.source)
            new = replace(dwi, signal=intensity.warped(dwi, quantiles[1], quantiles[0])[0])
            moved = pairs.resample(new, self.l_max, self.registration(i))
            for file, image in zip(files, moved, strict=True):
                _append(file, image)
        return [s.seen_as(file) for s, file in zip(self.samples, files, strict=True)]

    def _quantiles(self, run: str) -> np.ndarray:
        try:
            return intensity.quantiles(self.method.load(self.cohort, run))
        except DataError as error:
            raise UsageError(f"--train {self.method.name}: {run} {error}") from error


def map_differences(source: Dwi, target: Dwi, registration: pairs.Registration
                    ) -> Float[np.ndarray, "shell 2 voxel"]:
    """FA and MD (µm²/ms) of every shell's tensor in a source less those in the target, at the
    voxels of `overlap`: of the signals as they are, not of a series."""
    ratios = (pairs.resample_measurements(source, registration),
              pairs.attenuation(target, registration))
    differences = []
    for shells in zip(source.acquisition.shells, target.acquisition.shells, strict=True):
        maps = [torch.stack(tensor.of_attenuation(
            torch.from_numpy(values[:, shell.indices]), torch.from_numpy(tensor.attenuation_fit(
                dwi.acquisition.btensors[shell.indices])).float()))
            for values, shell, dwi in zip(ratios, shells, (source, target), strict=True)]
        differences.append((maps[0] - maps[1]).numpy())
    return np.stack(differences)


def mean_errors(source: Dwi, target: Dwi, registration: pairs.Registration) -> list[float]:
    """Per shell, the SD of a harmonized source's mean over directions of S/S0 about the target's,
    relative to it, less what the noise of both would give: the harmonizer's own error.

    Over the voxels of grey and white matter, by the median of squares, which edges of tissue that
    do not lie on each other leave alone.
    """
    where = registration.labels[registration.overlap] > 0
    ratios = (pairs.resample_measurements(source, registration)[where],
              pairs.attenuation(target, registration)[where])
    found = []
    for shells in zip(source.acquisition.shells, target.acquisition.shells, strict=True):
        means = [r[:, shell.indices].mean(1) for r, shell in zip(ratios, shells, strict=True)]
        level = float(np.median(means[1]))
        noise = sum(_noise_of_ratio(dwi, shell, level)
                    for dwi, shell in zip((source, target), shells, strict=True))
        square = float(np.median(np.square(means[0] - means[1]))) / HALF_OF_CHI_SQUARE
        found.append(math.sqrt(max(square - noise, 0)) / level)
    return found


def _noise_of_ratio(dwi: Dwi, shell: Shell, level: float) -> float:
    """Variance of the mean over directions of S/S0, which is about `level`."""
    b0 = np.flatnonzero(dwi.acquisition.b0)
    s0 = float(np.median(dwi.mean_b0))
    return ((dwi.noise_of(shell.indices) or 0.0) ** 2 / len(shell)
            + (level * (dwi.noise_of(b0) or 0.0)) ** 2 / len(b0)) / s0**2


@dataclass(frozen=True, eq=False)
class Trained:
    """A network per shell, what it saw, who validated, and each stage's history."""

    tensors: Mapping[str, torch.Tensor]
    networks: Sequence[nn.Module]
    samples: Sequence[PatchDataset]
    held: Sequence[str]
    histories: Sequence[list[list[dict[str, float]]]]


def apply_to_volume(network: nn.Module, image: np.ndarray, mask: np.ndarray, device: str,
                block: int = BLOCK, slab: int | None = None) -> np.ndarray:
    """(voxel, coefficient): the network at each voxel of the mask, in blocks of slabs.

    image: (x + 2, y + 2, z + 2, coefficient), the mask's grid with a margin of one voxel. Every
    voxel sees its 3×3×3 patch and nothing else, so that blocks give what single patches give.
    slab: of `map_volume`.
    """
    with torch.inference_mode():
        network = network.to(device)
        function = network.folded() if isinstance(network, SHResNet) else network

    def of_slab(values: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
        inside[[0, -1]] = False  # halo, or the margin of the grid
        steps = torch.from_numpy(neighbours(values.shape))[None].to(device)
        flat = values.flatten(0, 2)
        out = torch.zeros_like(flat)
        for centres in torch.nonzero(inside.flatten())[:, 0].split(block):
            out[centres] = function(patches(flat, centres, steps))
        return {"c": out.view_as(values)}

    inside = np.pad(mask, 1)
    return map_volume(of_slab, (image, inside), 1, device, slab)["c"][inside]
