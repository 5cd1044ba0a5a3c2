"""Patches of aligned scans, from which a network learns, and its application to a volume."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

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
"""Number of voxels that pass a network at a time: few enough to stay in the processor's cache."""

MEDIAN_CHI_SQUARE = 0.4549
"""Median of χ² with one degree of freedom."""

MEASURES = ("signal", "fa", "md")
"""Measures whose square errors the losses combine."""


class PatchMinibatch(NamedTuple):
    """Voxels to learn from: patches of the source, and the target's signal in their centres.

    patches: (voxel, 27, coefficient). basis: (voxel, direction, coefficient), along the target's
    directions, padded with zeros. target: (voxel, direction) S/S0. weight: (voxel,), 1 over the
    number of directions. fit: (voxel, 6, direction), `tensor.attenuation_fit` of the target.
    """

    patches: torch.Tensor
    basis: torch.Tensor
    target: torch.Tensor
    weight: torch.Tensor
    fit: torch.Tensor

    @property
    def centre(self) -> torch.Tensor:
        """(voxel, coefficient) of the source's voxels themselves."""
        return self.patches[:, CENTRE]


class PatchDataset:
    """Voxels of one shell of aligned pairs.

    Images and targets are mapped from files, so that they need not fit in memory. All voxels of
    the overlap serve, not grey and white matter alone, because a network is applied in the whole
    mask.

    Parameters
    ----------
    folder : Path
        Folder of the files.
    directions : int
        Maximum number of directions of a target.
    l_max : int
        Highest degree of the coefficients.
    series : bool
        Whether a target's signal is replaced by its SH series, smoothed as the source's is.

    Attributes
    ----------
    tissue : (voxel,) tensor
        Tissue label, 0 for neither grey nor white matter.
    pair : (voxel,) tensor
        Index of the voxel's pair.
    image : (row, coefficient) tensor
        SH coefficients of the sources, with their margins, one grid after another.
    centre : (voxel,) tensor
        Row of `image` that holds the voxel.
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
        """Add a shell of a pair.

        Parameters
        ----------
        aligned : AlignedPair
        shell : int
            Index of the shell.
        acquisition : Acquisition
            Gradient table of the target.
        """
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
        """Map the files after the last pair was added; voxels can be drawn from then on."""
        self.image = _read(self.folder / "image", self.bases[0].shape[1])
        self.target = _read(self.folder / "target", self.directions)
        self.centre, self.pair, self.tissue = (torch.from_numpy(np.concatenate(v)) for v in (
            self.centres, self.pairs, self.labels))
        self.step = torch.from_numpy(np.stack(self.steps))
        self.basis = torch.from_numpy(np.stack(self.bases)).float()
        self.fit = torch.from_numpy(np.stack(self.fits)).float()
        self.count = (self.basis != 0).any(2).sum(1)

    def with_source(self, image: Path) -> PatchDataset:
        """Copy the dataset with the source's coefficients in another file."""
        other = copy(self)
        other.image = _read(image, self.basis.shape[2])
        return other

    def select(self, chosen: set[int], most: int | None = None) -> torch.Tensor:
        """Select the voxels of some pairs.

        Parameters
        ----------
        chosen : set of int
            Indices of the pairs.
        most : int, optional
            Maximum number of voxels: every n-th is selected if there are more.

        Returns
        -------
        (voxel,) tensor
            Indices of the voxels.
        """
        voxels = torch.nonzero(torch.isin(self.pair, torch.tensor(sorted(chosen))))[:, 0]
        return voxels[::max(1, -(-len(voxels) // (most or len(voxels) or 1)))]

    def __call__(self, voxels: torch.Tensor, device: str | torch.device) -> PatchMinibatch:
        """Load voxels by their indices."""
        pair = self.pair[voxels]
        return PatchMinibatch(*(v.to(device) for v in (
            patches(self.image, self.centre[voxels], self.step[pair]), self.basis[pair],
            self.target[voxels], 1 / self.count[pair], self.fit[pair])))

    def blocks(self, voxels: torch.Tensor, device: str) -> Iterator[PatchMinibatch]:
        """Load voxels in blocks of BLOCK."""
        return (self(part, device) for part in voxels.split(BLOCK))


def _append(path: Path, values: np.ndarray) -> None:
    with path.open("ab") as file:
        file.write(np.ascontiguousarray(values).data)


def _read(path: Path, columns: int) -> torch.Tensor:
    return torch.from_file(str(path), size=path.stat().st_size // 4).view(-1, columns)


def signal_error(coefficients: torch.Tensor, minibatch: PatchMinibatch) -> torch.Tensor:
    """Compute the mean square error of S/S0, (voxel,), of predicted SH coefficients."""
    signal = (minibatch.basis @ coefficients[..., None])[..., 0]
    return (signal - minibatch.target).square().sum(1) * minibatch.weight


def tensor_errors(coefficients: torch.Tensor, minibatch: PatchMinibatch) -> torch.Tensor:
    """Compute the square errors, (2, voxel), of FA and of MD ((µm²/ms)²) of the shell's tensor."""
    signal = (minibatch.basis @ coefficients[..., None])[..., 0]
    return torch.stack([(a - b).square() for a, b in zip(
        tensor.fa_and_md(signal, minibatch.fit),
        tensor.fa_and_md(minibatch.target, minibatch.fit), strict=True)])


def all_errors(coefficients: torch.Tensor, minibatch: PatchMinibatch) -> torch.Tensor:
    """Compute the square errors, (measure, voxel), of MEASURES."""
    return torch.cat([signal_error(coefficients, minibatch)[None],
                      tensor_errors(coefficients, minibatch)])


def weighted_loss(weights: Mapping[str, float], samples: PatchDataset, voxels: torch.Tensor,
                  least: int, device: str
                  ) -> Callable[[torch.Tensor, PatchMinibatch], torch.Tensor]:
    """Create a loss Σ_m w_m e_m / ē_m over MEASURES.

    e_m is the square error of a measure, and ē_m its mean without a network (input as output).

    Parameters
    ----------
    weights : mapping of str to float
        w_m by measure.
    samples : PatchDataset
    voxels : (voxel,) tensor
        Voxels to learn from.
    least : int
        Minimum number of voxels over which ē_m is taken, if there are as many.
    device : str

    Returns
    -------
    callable
        (coefficients, minibatch) → (voxel,) loss.
    """
    few = voxels[::max(1, len(voxels) // least)]
    before = torch.cat([all_errors(b.centre, b) for b in samples.blocks(few, device)], 1)
    weight = torch.tensor([weights[m] for m in MEASURES], device=device)
    weight = weight / before.mean(1).clamp(min=1e-12)
    return lambda coefficients, minibatch: weight @ all_errors(coefficients, minibatch)


class PairedScans:
    """Registered pairs of scans, and their voxels by shell.

    Parameters
    ----------
    method : Harmonizer
        Loads and registers the scans.
    cohort : Cohort
    settings : TrainingSettings
    scans : list of Pair
    directions : list of int
        Maximum number of directions of each shell.
    l_max : int
        Highest degree of the coefficients.
    deformable : bool
        Whether SyN follows the rigid registration.
    folder : Path
        Folder of the files.
    series : bool
        Whether a target's signal is replaced by its SH series.

    Attributes
    ----------
    pairs : list of Pair
        In the order of `PatchDataset.pair`.
    samples : list of PatchDataset
        One for each shell.
    """

    def __init__(self, method: Harmonizer, cohort: Cohort, settings: TrainingSettings,
                 scans: list[pairs.Pair], directions: list[int], l_max: int, deformable: bool,
                 folder: Path, series: bool = False) -> None:
        self.method, self.cohort, self.pairs, self.folder = method, cohort, scans, folder
        self.l_max = l_max
        self.samples: list[PatchDataset] = []
        for k, most in enumerate(directions):
            (subfolder := folder / str(k)).mkdir()
            self.samples.append(PatchDataset(subfolder, most, l_max, series))
        states = settings.states or folder
        if (processes := math.prod(settings.devices)) > 1:
            # each process registers its share, and then reads the registrations of the others
            share = scans[training.processes()[0]::processes]
            for pair in track(share, f"{method.name}: registering, this process:"):
                method.register(cohort, pair, deformable, states, settings.device)
        method.register_all(cohort, scans, deformable, states, settings)
        for i, pair in enumerate(track(scans, f"{method.name}: registering")):
            source, target, registration = method.register(cohort, pair, deformable, states,
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
        """Read the registration of a pair, given its index."""
        registration = pairs.Registration.load(self.folder / f"{pair}.npz")
        assert registration
        return registration

    def indices(self, people: set[str], kind: int = pairs.BOTH) -> set[int]:
        """List the indices of the pairs of some participants, of one kind."""
        return {i for i, pair in enumerate(self.pairs)
                if pair.participant in people and pair.kind == kind}

    def quantiles(self, people: set[str]) -> np.ndarray:
        """Compute the mean quantiles of S/S0 of some participants.

        Returns
        -------
        (2, shell, GRID) ndarray
            Mean over the participants, at the site and at the reference site.
        """
        chosen = [p for p in self.pairs if p.participant in people]
        runs = {run for p in chosen for run in (p.source, p.target)}
        by_run = {run: self._quantiles(run)
                  for run in track(sorted(runs), f"{self.method.name}: intensities")}
        return np.mean([np.mean([(by_run[p.source], by_run[p.target]) for p in chosen
                                 if p.participant == person], axis=0)
                        for person in sorted(people)], axis=0)

    def warp(self, quantiles: np.ndarray) -> list[PatchDataset]:
        """Warp the intensities of every source from the first quantiles to the second.

        Parameters
        ----------
        quantiles : (2, shell, GRID)
            Quantiles of the site and of the reference site.

        Returns
        -------
        list of PatchDataset
            The samples with the warped sources.
        """
        files = [self.folder / str(k) / "warped" for k in range(len(self.samples))]
        for file in files:
            file.unlink(missing_ok=True)
        for i, pair in enumerate(track(self.pairs, f"{self.method.name}: warping intensities")):
            dwi = self.method.load(self.cohort, pair.source)
            warped = replace(dwi, signal=intensity.warp(dwi, quantiles[1], quantiles[0])[0])
            images = pairs.resample(warped, self.l_max, self.registration(i))
            for file, image in zip(files, images, strict=True):
                _append(file, image)
        return [s.with_source(file) for s, file in zip(self.samples, files, strict=True)]

    def _quantiles(self, run: str) -> np.ndarray:
        try:
            return intensity.quantiles(self.method.load(self.cohort, run))
        except DataError as error:
            raise UsageError(f"--train {self.method.name}: {run} {error}") from error


def map_differences(source: Dwi, target: Dwi, registration: pairs.Registration
                    ) -> Float[np.ndarray, "shell 2 voxel"]:
    """Compute the differences of FA and MD (µm²/ms) between a source and a target.

    They are those of the tensor of each shell, fitted to the signals themselves rather than to an
    SH series, at the voxels of `overlap`.
    """
    ratios = (pairs.resample_measurements(source, registration),
              pairs.attenuation(target, registration))
    differences = []
    for shells in zip(source.acquisition.shells, target.acquisition.shells, strict=True):
        maps = [torch.stack(tensor.fa_and_md(
            torch.from_numpy(values[:, shell.indices]), torch.from_numpy(tensor.attenuation_fit(
                dwi.acquisition.btensors[shell.indices])).float()))
            for values, shell, dwi in zip(ratios, shells, (source, target), strict=True)]
        differences.append((maps[0] - maps[1]).numpy())
    return np.stack(differences)


def mean_errors(source: Dwi, target: Dwi, registration: pairs.Registration) -> list[float]:
    """Estimate the harmonizer's own error of the mean over directions of S/S0, for each shell.

    It is the SD of the difference between the harmonized source and the target, without the part
    that the noise of both explains, relative to the target. The SD is estimated by the median of
    squares over the voxels of grey and white matter, which is robust against misregistered edges of
    tissue.
    """
    grey_or_white = registration.labels[registration.overlap] > 0
    ratios = (pairs.resample_measurements(source, registration)[grey_or_white],
              pairs.attenuation(target, registration)[grey_or_white])
    errors = []
    for shells in zip(source.acquisition.shells, target.acquisition.shells, strict=True):
        means = [r[:, shell.indices].mean(1) for r, shell in zip(ratios, shells, strict=True)]
        level = float(np.median(means[1]))
        noise = sum(_noise_of_ratio(dwi, shell, level)
                    for dwi, shell in zip((source, target), shells, strict=True))
        square = float(np.median(np.square(means[0] - means[1]))) / MEDIAN_CHI_SQUARE
        errors.append(math.sqrt(max(square - noise, 0)) / level)
    return errors


def _noise_of_ratio(dwi: Dwi, shell: Shell, level: float) -> float:
    """Compute the variance due to noise of the mean over directions of S/S0, given that mean."""
    b0 = np.flatnonzero(dwi.acquisition.b0)
    s0 = float(np.median(dwi.mean_b0))
    return ((dwi.noise_of(shell.indices) or 0.0) ** 2 / len(shell)
            + (level * (dwi.noise_of(b0) or 0.0)) ** 2 / len(b0)) / s0**2


@dataclass(frozen=True, eq=False)
class Trained:
    """Result of a training.

    Parameters
    ----------
    tensors : mapping of str to tensor
        Tensors of the checkpoint.
    networks, samples : sequence
        A network, and the dataset that it learned from, for each shell.
    held_out : sequence of str
        Participants on whom the training was validated.
    histories : sequence
        For each shell, the history of every stage.
    """

    tensors: Mapping[str, torch.Tensor]
    networks: Sequence[nn.Module]
    samples: Sequence[PatchDataset]
    held_out: Sequence[str]
    histories: Sequence[list[list[dict[str, float]]]]


def apply_to_volume(network: nn.Module, image: np.ndarray, mask: np.ndarray, device: str,
                block: int = BLOCK, slab: int | None = None) -> np.ndarray:
    """Apply a network at each voxel of a mask, in blocks of slabs.

    The output of a voxel depends on its 3×3×3 patch alone, so that blocks do not change it.

    Parameters
    ----------
    network : Module
    image : (x + 2, y + 2, z + 2, coefficient)
        The mask's grid with a margin of one voxel.
    mask : (x, y, z) bool
    device : str
    block : int
        Number of voxels at a time.
    slab : int, optional
        Argument of `map_volume`.

    Returns
    -------
    (voxel, coefficient) ndarray
    """
    with torch.inference_mode():
        network = network.to(device)
        function = network.folded() if isinstance(network, SHResNet) else network

    def apply_to_slab(values: torch.Tensor, inside: torch.Tensor) -> dict[str, torch.Tensor]:
        inside[[0, -1]] = False  # halo of the slab, or margin of the grid
        steps = torch.from_numpy(neighbours(values.shape))[None].to(device)
        flat = values.flatten(0, 2)
        out = torch.zeros_like(flat)
        for centres in torch.nonzero(inside.flatten())[:, 0].split(block):
            out[centres] = function(patches(flat, centres, steps))
        return {"c": out.view_as(values)}

    inside = np.pad(mask, 1)
    return map_volume(apply_to_slab, (image, inside), 1, device, slab)["c"][inside]
