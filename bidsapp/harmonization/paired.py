"""Base class of the methods that predict a reference site's voxel from a patch of another site.

They learn from participants who were scanned at both sites (Koppers et al. 2018, arXiv:1808.01595).
"""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar

import numpy as np
import pandas as pd
import torch
from torch import nn

from bidsapp import __version__, scratch, sh, training
from bidsapp.acquisition import Acquisition, describe_shells
from bidsapp.anatomy import tissue
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import ShellRange
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.harmonization import harmonizer as shared
from bidsapp.harmonization import intensity, pairs, scope
from bidsapp.harmonization.patches import (
    PairedScans,
    PatchDataset,
    PatchMinibatch,
    Trained,
    apply_to_volume,
    map_differences,
    mean_errors,
    signal_error,
)
from bidsapp.kinds import Cohort, Fitted, Harmonized, TrainingSettings
from bidsapp.networks.builder import build_network
from bidsapp.registration.geometry import canonical, fill_nearest

log = logging.getLogger("qsphere")

SCAN = ("run", "n_voxels", "n_volumes", "noise_sd", "snr_b0", "ndc")
"""Columns of a cohort's statistics that change if a scan changes. If none has changed, an earlier
checkpoint is kept."""

UNVALIDATED = ("no participant scanned at both sites validated the model, so that its own error is "
               "unknown")
"""Reason why maps have no confidence interval."""


@dataclass(frozen=True)
class Objective:
    """Objective of the training of a network.

    Parameters
    ----------
    model : Module
        The module that is optimised. It is or contains the network.
    draw : callable
        (number of voxels, generator) → minibatch.
    loss : callable
        (model, minibatch) → loss.
    score : callable
        (coefficients, minibatch) → (voxel,) error by which the network is validated on pairs.
    """

    model: nn.Module
    draw: Callable[[int, torch.Generator], Any]
    loss: Callable[[nn.Module, Any], torch.Tensor]
    score: Callable[[torch.Tensor, PatchMinibatch], torch.Tensor]


class PairedHarmonizer(shared.Harmonizer):
    """A network per shell that maps SH coefficients of S/S0 to those of the reference site.

    `output` of training.toml (`harmonizer.OUTPUTS`) says how the harmonized series becomes a
    signal. If its change is added, the training replaces the signals of targets by their series,
    which are as smooth as the input. Otherwise the network would learn the smoothing as a
    difference between scanners.

    Attributes
    ----------
    min_pairs : int
        Minimum number of participants scanned at both sites.
    learns_from : str
        Participants that the method learns from, for the card.
    rish_projection : bool
        Whether every degree gets its size from the network, and keeps the shape of the input.
    warps_intensity : bool
        Whether intensities are first warped from the site's distribution to the reference's.
    intended_use : str
        For the card.
    """

    min_pairs: ClassVar[int] = 2
    learns_from: ClassVar[str] = "participants at both sites"
    rish_projection: ClassVar[bool] = False
    warps_intensity: ClassVar[bool] = False
    intended_use: ClassVar[str]

    def check(self, acquisition: Acquisition) -> None:
        """Refuse an acquisition without a b0, or with an unsuitable shell.

        Raises
        ------
        Refusal
            There is no b0, or a shell has no linear encoding or fewer directions than coefficients.
        """
        super().check(acquisition)
        minimum = sh.size(self.settings("training")["l_max"])
        if refused := [s for s in acquisition.shells if len(s) < minimum or s.b_delta < 0.95]:
            raise Refusal(f"{self.name} found {describe_shells(refused)}. Needed are {minimum} or "
                          "more directions on every shell, with linear encoding. Leave the shell "
                          "out with --bids-filter-file, or harmonize with harmonize_mica.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """Check the cohort, and that enough participants of each site were also scanned at the
        reference site."""
        reference, *sources = shared.runs_by_site(self, cohort)
        for batch in sources:
            people = sorted({p.participant for p in self.scans(cohort, batch, reference)
                             if p.kind == pairs.BOTH})
            if len(people) < self.min_pairs:
                scanned = f"only sub-{people[0]} was" if people else "nobody was"
                raise UsageError(
                    f"--train {self.name} learns from participants scanned at both sites, but "
                    f"{scanned} scanned at {batch} and at {reference}. Needed are two or more: one "
                    "to learn from, one to validate. Give the scans of one person the same "
                    "participant label, or train a method that needs no pairs (harmonize_mica).")
        return []

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a checkpoint for every site but the reference.

        A checkpoint in `context.models` that was trained on the same scans in the same way is kept,
        so that a new site costs its own training alone. Raise UsageError if a scan cannot be used
        or a pair cannot be registered.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *sources = batches
        checkpoints = {}
        for batch in sources:
            scans = self.scans(cohort, batch, reference)
            name = (f"{shared.model_name(self, batch)}-to-"
                    + shared.model_name(self, reference).removeprefix(f"{self.name}_"))
            rows = {b: batches[b][batches[b]["run"].isin(
                [r for p in scans for r in (p.source, p.target)])] for b in (reference, batch)}
            checkpoints[name] = self._train_site(cohort, settings, name, scans, {
                "trained_for": scope.training_domain(cohort, rows, (batch,)),
                "reference_batch": reference,
                "participants": scope.hash_participants(rows),
                "digest": self._digest(settings, scans, pd.concat(rows.values()))})
        model = {"Method": self.name, "Model": self.outputs["model"], "ReferenceBatch": reference,
                 "Batches": sources,
                 "Metrics": {n: {k: v for k, v in c.card.metrics.items() if k.startswith("mse")}
                             for n, c in checkpoints.items()}}
        return Fitted({}, model, checkpoints, [
            f"{name}: {worse} (mse_… in model.json). The report of every run that the model is "
            "applied to says so. Train longer, or with more participants."
            for name, c in checkpoints.items() if (worse := _describe_worse(c.card.metrics))])

    def scans(self, cohort: Cohort, batch: str, reference: str) -> list[pairs.Pair]:
        """List the pairs of scans to learn from."""
        return pairs.pair_runs(cohort.statistics, reference, cohort.paired_by == "session")[batch]

    def _train_site(self, cohort: Cohort, settings: TrainingSettings, name: str,
                    scans: Sequence[pairs.Pair], facts: Mapping[str, Any]) -> Checkpoint:
        """Train the model of a site; `facts` are what its card says of the cohort."""
        if kept := self._load_kept(name, facts["digest"]):
            log.info("%s: was already trained on these scans; it is kept", name)
            return kept
        recipe = self._recipe(scans)
        start = self._start(settings, recipe)
        people = sorted({p.participant for p in scans})
        began = time.monotonic()
        shells = facts["trained_for"].shells
        names = [shell.name for shell in shells]
        with scratch.temporary(settings.states) as folder:
            paired = PairedScans(
                self, cohort, settings, list(scans), [s.directions[1] for s in shells],
                recipe["l_max"], recipe["deformable"], folder, recipe["output"] == shared.CHANGE)
            trained = self._train_shells(settings, name, shells, recipe, paired, people, start)
            checkpoint = self._checkpoint(settings, recipe, trained, facts, scans, start, began)
            metrics = {**self._signal_metrics(trained, paired, names, settings.device),
                       **self._map_metrics(cohort, settings, checkpoint, paired,
                                           trained.held_out, names)}
        return replace(checkpoint, card=replace(checkpoint.card, metrics=metrics))

    def _checkpoint(self, settings: TrainingSettings, recipe: Mapping[str, Any], trained: Trained,
                    facts: Mapping[str, Any], scans: Sequence[pairs.Pair],
                    start: Checkpoint | None, began: float) -> Checkpoint:
        """Create the checkpoint, without metrics."""
        return Checkpoint(trained.tensors, Card(
            method=self.name, network=dict(recipe["network"]), trained_for=facts["trained_for"],
            training={"participants": facts["participants"], "held_out": len(trained.held_out),
                      "pairs": sum(p.kind == pairs.BOTH for p in scans), "scans": len(
                          {r for p in scans for r in (p.source, p.target)}), "of": facts["digest"],
                      "steps": [[int(h[-1]["step"]) for h in stages]
                                for stages in trained.histories],
                      "validation": [[min(row.get("validation", math.nan) for row in h)
                                      for h in stages] for stages in trained.histories
                                     ] if trained.held_out else [],
                      "seconds": round(time.monotonic() - began), "device": settings.device,
                      "data": "brain mask of " + self.learns_from,
                      "start": start.card.sha256 if start else "identity or chance"},
            intended_use=self.intended_use, seed=settings.seed,
            versions={"qsphere": __version__, "torch": torch.__version__},
            constants={"smoothing": pairs.SMOOTHING, "l_max": recipe["l_max"],
                       "output": recipe["output"]},
            reference_batch=facts["reference_batch"]))

    def _recipe(self, scans: Sequence[pairs.Pair]) -> dict[str, Any]:
        """Read the settings of the training, given the pairs to learn from."""
        recipe = self.settings("training")
        if recipe["l_max"] % 2:
            raise UsageError(f"--set {self.name}.l_max={recipe['l_max']}: the degree is odd; an "
                             "even degree is needed.")
        if "training.l_max" in self.changed_settings:
            recipe["network"] = {**recipe["network"], "l_max": recipe["l_max"]}
        return recipe

    def _digest(self, settings: TrainingSettings, scans: Sequence[pairs.Pair], rows: pd.DataFrame
                ) -> str:
        """Hash all that determines a training: pairs, statistics of the scans, settings, start."""
        table = rows[[c for c in SCAN if c in rows]].sort_values("run").to_csv(index=False)
        recipe = self._recipe(scans)
        start = self._start(settings, recipe)
        return hashlib.sha256(repr((
            scans, table, recipe, settings.seed, settings.max_steps,
            start and start.card.sha256, __version__)).encode()).hexdigest()[:16]

    def _load_kept(self, name: str, digest: str) -> Checkpoint | None:
        """Load an earlier checkpoint of the same training; None if there is none."""
        try:
            folder = self.context.models
            kept = load(folder / name, self.name) if folder else None
        except DataError:
            return None
        return kept if kept and kept.card.training.get("of") == digest else None

    def _train_shells(self, settings: TrainingSettings, name: str, shells: Sequence[ShellRange],
                      recipe: Mapping[str, Any], paired: PairedScans, people: Sequence[str],
                      start: Checkpoint | None) -> Trained:
        """Train a network for each shell, and validate it on participants scanned at both sites.

        A share of them is held out, at most half; with one or none, nobody is.
        """
        both = [p for p in people if paired.indices({p})]
        count = min(max(1, round(recipe["held_out"] * len(both))), len(both) // 2)
        held = set(np.random.default_rng(settings.seed).permutation(both)[:count].tolist())
        learned = set(people) - held
        tensors, samples = {}, paired.samples
        if self.warps_intensity:
            quantiles = paired.quantiles(learned)
            tensors["quantiles"] = torch.from_numpy(quantiles.astype(np.float32))
            samples = paired.warp(quantiles)
        # but the number of epochs may change then
        lasting = {**recipe, "stages": [{k: v for k, v in stage.items() if k != "epochs"}
                                        for stage in recipe["stages"]]}
        networks, histories = [], []
        for shell, dataset in zip(shells, samples, strict=True):
            # an interrupted training continues only with the same split, recipe and version
            state = hashlib.sha256(repr((sorted(learned), sorted(held), paired.pairs, lasting,
                                         settings.init, __version__)).encode()).hexdigest()[:8]
            network, history = self._train(
                settings, f"{name}.{shell.name}.{state}", recipe, dataset,
                [dataset.select(paired.indices(learned, kind)) for kind in pairs.KINDS],
                dataset.select(paired.indices(held), recipe["validation"]),
                start and _part(start, shell))
            tensors |= {f"{shell.part}.{n}": v for n, v in network.state_dict().items()}
            networks.append(network)
            histories.append(history)
        return Trained(tensors, networks, samples, sorted(held), histories)

    def _start(self, settings: TrainingSettings, recipe: Mapping[str, Any]
               ) -> Checkpoint | None:
        """Load the checkpoint of `--init`; raise UsageError unless it fits the network."""
        try:
            start = load(settings.init, self.name) if settings.init else None
            if start:
                _part(start, start.card.trained_for.shells[0]).into(
                    build_network(recipe["network"]))
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        return start

    def loss(self, samples: PatchDataset, voxels: torch.Tensor, recipe: Mapping[str, Any],
             device: str) -> Callable[[torch.Tensor, PatchMinibatch], torch.Tensor]:
        """Create the loss of pairs, (coefficients, minibatch) → (voxel,), given the voxels to
        learn from."""
        return signal_error

    def objective(self, network: nn.Module, samples: PatchDataset, voxels: Sequence[torch.Tensor],
                  recipe: Mapping[str, Any], device: str, fresh: bool) -> Objective:
        """Create the objective of a training.

        Parameters
        ----------
        network : Module
        samples : PatchDataset
        voxels : sequence of (voxel,) tensor
            Voxels to learn from, by kind of pair (`pairs.KINDS`).
        recipe : mapping
            Settings of the training.
        device : str
        fresh : bool
            Whether the network has its initial weights rather than those of `--init`.
        """
        both = voxels[pairs.BOTH]
        loss = self.loss(samples, both, recipe, device)
        return Objective(network, lambda size, g: samples(draw_voxels(both, size, g), g.device),
                       lambda model, b: loss(model(b.patches), b).mean(), loss)

    def _train(self, settings: TrainingSettings, name: str, recipe: Mapping[str, Any],
               samples: PatchDataset, voxels: Sequence[torch.Tensor], held_out: torch.Tensor,
               start: Checkpoint | None
               ) -> tuple[nn.Module, list[list[dict[str, float]]]]:
        """Train the stages one after another, each from the best weights of the one before.

        `voxels` are those to learn from, by kind of pair; `held_out` are those to validate on. If
        there are none, the last weights are kept.
        """
        with training.seeded(settings.seed):
            network = build_network(recipe["network"])
            if start:
                start.into(network)
            objective = self.objective(network, samples, voxels, recipe, settings.device,
                                       not start)

        def validate(_: nn.Module) -> float:
            return float(torch.cat([objective.score(network(b.patches), b)
                                    for b in samples.blocks(held_out, settings.device)]).mean())

        histories: list[list[dict[str, float]]] = []
        best, kept = math.inf, network.state_dict()
        for number, stage in enumerate(recipe["stages"], 1):
            options = dict(stage)
            size, epochs = options.pop("batch"), options.pop("epochs")
            every = math.ceil(min(max(map(len, voxels)), recipe["epoch"]) / size)
            steps = min(epochs * every, settings.max_steps or epochs * every)
            schedule = training.Schedule(steps, validate_every=every, **options)

            def draw(generator: torch.Generator, size: int = size) -> list[Any]:
                return [objective.draw(size, generator)]

            histories.append(training.train(
                objective.model, draw, objective.loss, schedule, seed=settings.seed,
                device=settings.device, validate=validate if len(held_out) else None,
                saved=settings.states / f"{name}.{number}.ckpt" if settings.states else None,
                name=f"{name}, stage {number} of {len(recipe['stages'])}",
                devices=settings.devices))
            error = min(row.get("validation", -math.inf) for row in histories[-1])
            if error < best or not len(held_out):
                best = error
                kept = {k: v.detach().clone() for k, v in network.state_dict().items()}
        network.load_state_dict(kept)
        return network, histories

    def _signal_metrics(self, trained: Trained, paired: PairedScans, shells: Sequence[str],
                        device: str) -> dict[str, float]:
        """Compute the mean square error of S/S0 in the validation, by tissue and shell, before and
        after harmonization."""
        metrics: dict[str, float] = {}
        for k, shell in enumerate(shells if trained.held_out else ()):
            raw, warped = paired.samples[k], trained.samples[k]
            voxels, parts = raw.select(paired.indices(set(trained.held_out))), []
            with torch.no_grad():
                for measured, source in zip(raw.blocks(voxels, device),
                                            warped.blocks(voxels, device), strict=True):
                    predicted = trained.networks[k](source.patches)
                    if self.rish_projection:
                        predicted = sh.with_rish(source.centre, sh.rish(predicted))
                    parts.append(torch.stack([signal_error(measured.centre, measured),
                                              signal_error(predicted, measured)]).cpu())
            for when, values in zip(("before", "after"), torch.cat(parts, 1), strict=True):
                for name, value in tissue.NAMES.items():
                    metrics[f"mse_{when}_{name}_{shell}"] = float(
                        values[raw.tissue[voxels] == value].mean())
        return metrics

    def _map_metrics(self, cohort: Cohort, settings: TrainingSettings, model: Checkpoint,
                     paired: PairedScans, held_out: Sequence[str], shells: Sequence[str]
                     ) -> dict[str, float]:
        """Apply the model to the scans of the validation and compare them with their targets.

        The metrics are the mean square error and the bias (mean difference) of FA and MD (µm²/ms)
        by tissue and shell, before and after harmonization, and error_SHELL, the relative error of
        the mean over directions that remains (`mean_errors`).
        """
        differences: dict[str, list[np.ndarray]] = {"before": [], "after": []}
        labels, errors = [], []
        for i in sorted(paired.indices(set(held_out))):
            pair = paired.pairs[i]
            source, target = (self.load(cohort, run) for run in (pair.source, pair.target))
            registration = paired.registration(i)
            result = self.harmonize(source, model, model.card.batches[0], settings.device)
            harmonized = replace(source, signal=result.signal,
                                 noise_gain=shared.noise_gain(source, result))
            for when, dwi in (("before", source), ("after", harmonized)):
                differences[when].append(map_differences(dwi, target, registration))
            labels.append(registration.labels[registration.overlap])
            errors.append(mean_errors(harmonized, target, registration))
        metrics: dict[str, float] = {
            f"error_{shell}": float(np.mean(values))
            for shell, values in zip(shells, np.transpose(errors), strict=True)} if errors else {}
        for when, maps in differences.items():
            for (k, shell), (m, measure), (name, label) in product(
                    enumerate(shells), enumerate(("fa", "md")),
                    tissue.NAMES.items() if labels else ()):
                difference = np.concatenate(maps, 2)[k, m, np.concatenate(labels) == label]
                metrics[f"mse_{measure}_{when}_{name}_{shell}"] = float(
                    np.square(difference).mean())
                metrics[f"bias_{measure}_{when}_{name}_{shell}"] = float(difference.mean())
        return metrics

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Add S0 times the change of each shell's SH series to the signal, or replace the signal by
        the harmonized series (`output`).

        The result has the run's directions and is not below 0. b0 volumes and voxels without S0
        are unchanged.

        Raises
        ------
        Refusal
            `check` refuses the acquisition, a shell has another b-tensor shape than in the
            training, or no voxel has a b0 signal.
        """
        self.check(dwi.acquisition)
        card = model.card
        nearest = card.trained_for.nearest_shells(dwi.acquisition)
        usable = dwi.mean_b0 > 0
        if not usable.any():
            raise Refusal(f"{self.name} found no b0 signal above 0. Check image and mask.")
        signal, clipped = self._apply(dwi, model, nearest, device)
        output, names = card.constants["output"], [
            f"error_{shell.name}" for shell in card.trained_for.shells]
        errors = [card.metrics[names[k]] for k in nearest] if names[0] in card.metrics else []
        no_intervals = (shared.SMOOTHED if output == shared.SERIES
                        else "" if errors else UNVALIDATED)
        worse = _describe_worse(card.metrics)
        return Harmonized(
            signal, reapply=lambda other: self._apply(other, model, nearest, device)[0],
            counts={f"{self.short}_unchanged": int((~usable).sum()),
                    f"{self.short}_clipped_values": clipped},
            parameters={"SphericalHarmonicDegree": card.constants["l_max"], "Output": output,
                        "Smoothing": card.constants["smoothing"],
                        "RISHProjection": self.rish_projection,
                        "IntensityWarping": self.warps_intensity},
            notices=(f"Harmonization: {worse} when {card.method} was trained. Do not use this "
                     "model. Train longer, or with more participants.",) if worse else (),
            errors=errors, no_intervals=no_intervals)

    def _apply(self, dwi: Dwi, model: Checkpoint, nearest: Sequence[int], device: str
               ) -> tuple[np.ndarray, int]:
        """Compute the harmonized signal and the number of values raised to 0, given the index of
        the trained shell for each shell of the run."""
        constants = model.card.constants
        l_max, smoothing, output = (constants[k] for k in ("l_max", "smoothing", "output"))
        if self.warps_intensity:
            site, reference = model.tensors["quantiles"].numpy().astype(np.float64)[:, nearest]
            signal, _ = intensity.warp(dwi, reference, site)
            dwi = replace(dwi, signal=signal)
        else:
            signal = dwi.signal.copy("K")
        values, usable = pairs.coefficients(dwi, l_max, smoothing)
        mask = dwi.mask.copy()
        mask[dwi.mask] = usable
        mask, _, order = canonical(mask, dwi.affine)
        rows = np.flatnonzero(usable)[order]
        s0, clipped = dwi.mean_b0[rows], 0
        for shell, coefficients, k in zip(dwi.acquisition.shells, values, nearest, strict=True):
            network = model.part(model.card.trained_for.shells[k].part).into(
                build_network(model.card.network))
            source = coefficients[rows]
            predicted = apply_to_volume(network, fill_nearest(source, mask, margin=1), mask, device)
            basis = sh.basis(l_max, dwi.acquisition.bvecs[shell.indices])
            if output == shared.CHANGE:
                # undo the smoothing of the fit
                fit = sh.smooth_fit(l_max, dwi.acquisition.bvecs[shell.indices], smoothing)
                sharpen = np.linalg.inv(fit @ basis).astype(np.float32).T
                before = source @ sharpen
                series = (before * _gain(predicted, source) if self.rish_projection
                          else predicted @ sharpen)
                series -= before
            else:
                series = source * _gain(predicted, source) if self.rish_projection else predicted
            clipped += shared.write_series(signal, rows, shell.indices, s0, series, basis, output)
        return signal, clipped


def _gain(predicted: np.ndarray, source: np.ndarray) -> np.ndarray:
    """Compute the gain that gives every degree of `source` the RISH of `predicted`."""
    return sh.rish_gain(torch.from_numpy(source), sh.rish(torch.from_numpy(predicted))).numpy()


def _part(start: Checkpoint, shell: ShellRange) -> Checkpoint:
    """Select the part of a checkpoint that was trained on the shell nearest in b."""
    return start.part(min(start.card.trained_for.shells,
                          key=lambda trained: abs(trained.middle - shell.middle)).part)


def draw_voxels(voxels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """Draw voxels at random, with replacement."""
    return voxels[torch.randint(len(voxels), (size,), generator=generator,
                                device=generator.device).cpu()]


def _describe_worse(metrics: Mapping[str, float]) -> str:
    """Describe which errors of signal, FA or MD rose in the validation, as the start of a sentence.

    It is empty if none did.
    """
    after = [k for k in metrics if k.startswith("mse_") and "after_" in k]
    worse = [_describe_metric(k) for k in after
             if metrics[k] > metrics[k.replace("after_", "before_")]]
    return (f"the error in participants held out of the training rose ({'; '.join(worse)})"
            if worse else "")


def _describe_metric(key: str) -> str:
    """Describe a metric: `FA in white matter, b1000` for `mse_fa_after_wm_b1000`."""
    *measure, tissue, shell = key.removeprefix("mse_").replace("after_", "").split("_")
    tissue_name = {"wm": "white matter", "gm": "grey matter"}[tissue]
    return f"{'_'.join(measure).upper() or 'signal'} in {tissue_name}, {shell}"
