"""What the methods share that learn a voxel of the reference from the patch around it in another
batch, of people who were scanned in both (Koppers et al. 2018, arXiv:1808.01595)."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from bidsapp import __version__, sh, training
from bidsapp.acquisition import Acquisition
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.methods import Fitted, Harmonized, Study
from bidsapp.methods import harmonizer as shared
from bidsapp.networks.shresnet import CENTRE, NETWORKS, neighbours, patches
from bidsapp.preprocess import pairs, tissue

BLOCK = 4096
"""Voxels that pass a network at a time."""


class Samples:
    """Training voxels of one shell of aligned pairs.

    Images and targets go to files in `folder`, of which the system keeps in memory what fits.
    directions: most of any target. tissue: (voxel,) label; pair: (voxel,) which it is of.
    """

    def __init__(self, folder: Path, directions: int, l_max: int) -> None:
        self.directions, self.l_max = directions, l_max
        self.files = folder / "image", folder / "target"
        self.rows = 0
        self.centres: list[np.ndarray] = []
        self.pairs: list[np.ndarray] = []
        self.labels: list[np.ndarray] = []
        self.bases: list[np.ndarray] = []
        self.steps: list[np.ndarray] = []

    def add(self, aligned: pairs.Aligned, shell: int, acquisition: Acquisition) -> None:
        """A pair, and the b-table of its target."""
        image, indices = aligned.image[shell], acquisition.shells[shell].indices
        kept = (aligned.labels > 0)[aligned.where]
        inside = np.pad(aligned.labels > 0, 1)
        self.centres.append(self.rows + np.flatnonzero(inside))
        self.pairs.append(np.full(int(inside.sum()), len(self.bases)))
        self.labels.append(aligned.labels[aligned.labels > 0])
        self.steps.append(neighbours(inside.shape))
        basis = np.zeros((self.directions, image.shape[-1]))
        basis[:len(indices)] = sh.basis(self.l_max, acquisition.bvecs[indices])
        self.bases.append(basis)
        target = np.zeros((int(kept.sum()), self.directions), np.float32)
        target[:, :len(indices)] = aligned.target[kept][:, indices]
        for path, values in zip(self.files, (image, target), strict=True):
            with path.open("ab") as file:
                file.write(np.ascontiguousarray(values).data)
        self.rows += inside.size

    def close(self) -> None:
        """No more pairs: from now on voxels can be drawn."""
        width = self.bases[0].shape[1]
        self.image, self.target = (torch.from_file(
            str(path), size=path.stat().st_size // 4).view(-1, columns)
            for path, columns in zip(self.files, (width, self.directions), strict=True))
        self.centre, self.pair, self.tissue = (torch.from_numpy(np.concatenate(v)) for v in (
            self.centres, self.pairs, self.labels))
        self.step = torch.from_numpy(np.stack(self.steps))
        self.basis = torch.from_numpy(np.stack(self.bases)).float()
        self.count = (self.basis != 0).any(2).sum(1)

    def __call__(self, voxels: torch.Tensor, device: str | torch.device) -> training.Batch:
        """Patches, the basis along each target's directions, its S/S0, and 1 over their number."""
        pair = self.pair[voxels]
        return tuple(v.to(device) for v in (
            patches(self.image, self.centre[voxels], self.step[pair]), self.basis[pair],
            self.target[voxels], 1 / self.count[pair]))


def errors(found: torch.Tensor, batch: training.Batch) -> torch.Tensor:
    """(voxel,) mean square error of the signal S/S0 that coefficients stand for."""
    _, basis, target, weight = batch
    return ((basis @ found[..., None])[..., 0] - target).square().sum(1) * weight


def over_volume(network: nn.Module, image: np.ndarray, mask: np.ndarray, device: str,
                block: int = BLOCK) -> np.ndarray:
    """(voxel, coefficient): the network at each voxel of the mask, in blocks.

    image: (x + 2, y + 2, z + 2, coefficient), the mask's grid with a margin of one voxel. Every
    voxel sees its 3×3×3 patch and nothing else, so that blocks give what single patches give.
    """
    flat = torch.from_numpy(image.reshape(-1, image.shape[-1])).to(device)
    steps = torch.from_numpy(neighbours(image.shape))[None].to(device)
    network = network.to(device)
    with torch.inference_mode():
        return map_voxels(lambda centres: {"c": network(patches(flat, centres[:, 0], steps))},
                          np.flatnonzero(np.pad(mask, 1))[:, None], device, block)["c"]


class PairedHarmonizer(shared.Harmonizer):
    """A network per shell from SH coefficients of S/S0 to those of the reference batch.

    network: its name in NETWORKS. projects: whether what is harmonized keeps the shape of every
    degree of the input and takes only its size from the network (RISH projection).
    """

    network: ClassVar[str]
    projects: ClassVar[bool]
    intended_use: ClassVar[str]

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where there is no b0, or a shell is not linear or has fewer directions
        than coefficients."""
        super().check(acquisition)
        least = sh.size(self.settings("training")["l_max"])
        if bad := [s for s in acquisition.shells if len(s) < least or s.b_delta < 0.95]:
            raise Refusal(f"{self.name} found {shared.shown(bad)}. Needed are {least} or more "
                          "directions on every shell, linear encoding. Leave the shell out with "
                          "--bids-filter-file, or harmonize with harmonize_mica.")

    def build(self, arguments: Mapping[str, Any]) -> nn.Module:
        return NETWORKS[self.network](**arguments)

    def fit(self, study: Study) -> Fitted:
        """A checkpoint for every batch but the reference.

        Raises:
            UsageError: as of `harmonizer.members`; a batch has fewer than two participants that
                the reference has, too; a scan cannot be used, or a pair not be aligned.
        """
        batches = shared.members(self, study)
        reference, *targets = batches
        found = pairs.find(study.statistics, reference)
        for batch in targets:
            self._enough(batch, reference, found[batch])
        checkpoints = {}
        for batch in targets:
            name = (f"{shared.model_name(self, batch)}-to-"
                    + shared.model_name(self, reference).removeprefix(f"{self.name}_"))
            rows = {b: batches[b][batches[b]["run"].isin(
                [r for p in found[batch] for r in (p.source, p.target)])]
                for b in (reference, batch)}
            checkpoints[name] = self._one(study, name, found[batch], {
                "trained_for": shared.trained_for(study, rows), "reference_batch": reference,
                "batches": (batch,), "hashed": shared.hashed(rows)})
        model = {"Method": self.name, "Model": self.outputs["model"], "ReferenceBatch": reference,
                 "Batches": targets,
                 "Metrics": {n: dict(c.card.metrics) for n, c in checkpoints.items()}}
        return Fitted({}, model, checkpoints)

    def _enough(self, batch: str, reference: str, found: Sequence[pairs.Pair]) -> None:
        people = sorted({p.participant for p in found})
        if len(people) < 2:
            who = f"sub-{people[0]} alone was" if people else "nobody was"
            raise UsageError(
                f"--train {self.name} learns from people scanned in both batches, and {who} "
                f"scanned in {batch} and in {reference}. Needed are two or more: one to learn "
                "from, one to validate. Give scans of one person the same participant label, or "
                "train a method that needs no pairs (harmonize_mica).")

    def _one(self, study: Study, name: str, found: Sequence[pairs.Pair], known: Mapping[str, Any]
             ) -> Checkpoint:
        recipe = self.settings("training")
        people = sorted({p.participant for p in found})
        held = sorted(np.random.default_rng(study.seed).permutation(people)[
            :max(1, round(recipe["held_out"] * len(people)))].tolist())
        learned, start = [p for p in found if p.participant not in held], self._start(study)
        ordered = [*learned, *(p for p in found if p.participant in held)]
        tensors: dict[str, torch.Tensor] = {}
        metrics: dict[str, float] = {}
        steps: list[list[int]] = []
        reached: list[list[float]] = []
        began = time.monotonic()
        if study.states:
            study.states.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=study.states) as folder:
            shells = known["trained_for"]["shells"]
            samples = []
            for k, shell in enumerate(shells):
                (own := Path(folder) / str(k)).mkdir()
                samples.append(Samples(own, shell["directions"][1], recipe["l_max"]))
            for pair in ordered:
                aligned = self._aligned(study, pair, recipe, Path(folder))
                for k, own_samples in enumerate(samples):
                    own_samples.add(aligned, k, study.acquisitions[pair.target])
            for k, (shell, own_samples) in enumerate(zip(shells, samples, strict=True)):
                own_samples.close()
                network, history = self._train(
                    study, f"{name}.{shared.short(shell)}", recipe, own_samples,
                    len(learned), start, f"shell{k}.")
                tensors |= {f"shell{k}.{n}": v for n, v in network.state_dict().items()}
                metrics |= self._measured(network, own_samples, len(learned),
                                          f"_{shared.short(shell)}", study.device)
                steps.append([int(h[-1]["step"]) for h in history])
                reached.append([min(row["validation"] for row in h) for h in history])
        return Checkpoint(tensors, Card(
            method=self.name, network=dict(recipe["network"]), trained_for=known["trained_for"],
            training={"participants": known["hashed"], "held_out": len(held), "pairs": len(found),
                      "steps": steps, "validation": reached,
                      "seconds": round(time.monotonic() - began), "device": study.device,
                      "data": "pairs of scans, grey and white matter",
                      "start": start.card.sha256 if start else "identity or chance"},
            intended_use=self.intended_use, seed=study.seed,
            versions={"qsphere": __version__, "torch": torch.__version__},
            constants={"smoothing": pairs.SMOOTHING, "l_max": recipe["l_max"]}, metrics=metrics,
            reference_batch=known["reference_batch"], batches=known["batches"]))

    def _start(self, study: Study) -> Checkpoint | None:
        try:
            start = load(study.init, self.name) if study.init else None
            if start:
                replace(start, tensors=_part(start, "shell0.")).into(
                    self.build(self.settings("training")["network"]))
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        return start

    def _aligned(self, study: Study, pair: pairs.Pair, recipe: Mapping[str, Any], folder: Path
                 ) -> pairs.Aligned:
        assert study.load is not None
        source, target = (shared.usable(self, study.load(run), run)
                          for run in (pair.source, pair.target))
        try:
            found = pairs.align(source, target, l_max=recipe["l_max"], device=study.device,
                                deformable=recipe["deformable"], work_dir=folder)
        except DataError as error:
            raise UsageError(f"--train {self.name}: {pair.source} and {pair.target}: {error} Or "
                             "leave one out with --participant-label.") from error
        if min((found.labels == k).sum() for k in (tissue.GREY, tissue.WHITE)) < tissue.MIN_VOXELS:
            raise UsageError(
                f"--train {self.name}: {pair.target} shows {int((found.labels > 0).sum())} voxels "
                f"of grey and white matter, fewer than {tissue.MIN_VOXELS} of one of them. Check "
                "the brain mask, or leave the participant out with --participant-label.")
        return found

    def _train(self, study: Study, name: str, recipe: Mapping[str, Any], samples: Samples,
               learned: int, start: Checkpoint | None, prefix: str
               ) -> tuple[nn.Module, list[list[dict[str, float]]]]:
        """The stages one after another, each from the best of the one before."""
        with training.seeded(study.seed):
            network = self.build(recipe["network"])
        if start:
            replace(start, tensors=_part(start, prefix)).into(network)
        mine = torch.nonzero(samples.pair < learned)[:, 0]
        others = torch.nonzero(samples.pair >= learned)[:, 0]
        others = others[::math.ceil(len(others) / recipe["validation"])]

        def validate(model: nn.Module) -> float:
            return float(torch.cat([errors(model(b[0]), b)
                                    for b in _blocks(samples, others, study.device)]).mean())

        histories: list[list[dict[str, float]]] = []
        best, kept = math.inf, network.state_dict()
        for number, stage in enumerate(recipe["stages"], 1):
            options = dict(stage)
            size, epochs = options.pop("batch"), options.pop("epochs")
            every = math.ceil(min(len(mine), recipe["epoch"]) / size)
            steps = min(epochs * every, study.max_steps or epochs * every)
            schedule = training.Schedule(steps, validate_every=min(every, steps), **options)

            def batch(generator: torch.Generator, size: int = size) -> training.Batch:
                drawn = torch.randint(len(mine), (size,), generator=generator,
                                      device=generator.device).cpu()
                return samples(mine[drawn], generator.device)

            histories.append(training.train(
                network, batch, lambda model, b: errors(model(b[0]), b).mean(), schedule,
                seed=study.seed, device=study.device, validate=validate,
                saved=study.states / f"{name}.{number}.ckpt" if study.states else None, name=name))
            if (found := min(row["validation"] for row in histories[-1])) < best:
                best = found
                kept = {k: v.detach().clone() for k, v in network.state_dict().items()}
        network.load_state_dict(kept)
        return network, histories

    def _measured(self, network: nn.Module, samples: Samples, learned: int, shell: str, device: str
                  ) -> dict[str, float]:
        """Mean square error of S/S0 of the held-out participants, by tissue: before, and after as
        applied."""
        held = torch.nonzero(samples.pair >= learned)[:, 0]
        parts = []
        with torch.no_grad():
            for b in _blocks(samples, held, device):
                own = b[0][:, CENTRE]
                parts.append(torch.stack([errors(own, b), errors(
                    self._projected(network(b[0]), own), b)]).cpu())
        values = torch.cat(parts, 1)
        return {f"mse_{when}_{name}{shell}": float(row[samples.tissue[held] == label].mean())
                for when, row in zip(("before", "after"), values, strict=True)
                for name, label in (("gm", tissue.GREY), ("wm", tissue.WHITE))}

    def _projected(self, found: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        return sh.with_rish(own, sh.rish(found)) if self.projects else found

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """S0 times the harmonized SH series of every shell, at the run's directions and not below
        0. b0 volumes stay, and voxels without S0.

        Raises:
            Refusal: as of `check`, or a shell of another b-tensor shape.
        """
        self.check(dwi.acquisition)
        card = model.card
        nearest = shared.matched(self, dwi.acquisition, card.trained_for["shells"])
        l_max, smoothing = card.constants["l_max"], card.constants["smoothing"]
        values, usable = pairs.coefficients(dwi, l_max, smoothing)
        if not usable.any():
            raise Refusal(f"{self.name} found no b0 signal above 0. Check image and mask.")
        signal, s0, where = dwi.signal.copy("K"), dwi.mean_b0[usable], dwi.mask.copy()
        where[dwi.mask] = usable
        clipped = 0
        for shell, own, k in zip(dwi.acquisition.shells, values, nearest, strict=True):
            network = replace(model, tensors=_part(model, f"shell{k}.")).into(
                self.build(card.network))
            own = own[usable]
            found = over_volume(network, pairs.filled(own, where, margin=1), where, device)
            c = self._projected(torch.from_numpy(found), torch.from_numpy(own)).numpy()
            basis = sh.basis(l_max, dwi.acquisition.bvecs[shell.indices]).astype(np.float32)
            for i, direction in zip(shell.indices, basis, strict=True):
                column = c @ direction
                clipped += int((column < 0).sum())
                signal[usable, i] = s0 * np.maximum(column, 0)
        return Harmonized(signal, {
            f"{self.network}_unchanged": int((~usable).sum()),
            f"{self.network}_clipped_values": clipped},
            {"SphericalHarmonicDegree": l_max, "Smoothing": smoothing,
             "RISHProjection": self.projects})


def _part(model: Checkpoint, prefix: str) -> dict[str, torch.Tensor]:
    """The tensors of one shell's network."""
    return {k.removeprefix(prefix): v for k, v in model.tensors.items() if k.startswith(prefix)}


def _blocks(samples: Samples, voxels: torch.Tensor, device: str) -> Iterator[training.Batch]:
    return (samples(part, device) for part in voxels.split(BLOCK))
