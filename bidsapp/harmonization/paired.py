"""What the methods share that learn a voxel of the reference from the patch around it in another
batch, of people who were scanned in both (Koppers et al. 2018, arXiv:1808.01595)."""

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
    Trained,
    apply_to_volume,
    map_differences,
    mean_errors,
    signal_error,
)
from bidsapp.kinds import Cohort, Fitted, Harmonized, TrainingSettings
from bidsapp.networks.builder import build_network
from bidsapp.networks.shresnet import CENTRE
from bidsapp.registration.geometry import canonical, fill_nearest

log = logging.getLogger("qsphere")

SCAN = ("run", "n_voxels", "n_volumes", "noise_sd", "snr_b0", "ndc")
"""Columns of a cohort's statistics that change where a scan does."""


UNVALIDATED = ("nobody who was scanned in both batches validated the model, so that its own error "
               "is not known")
"""Why no interval can be given."""


@dataclass(frozen=True)
class Objective:
    """How a network learns: the model around it that is optimised, draw(size, generator) → batch,
    loss(model, batch), and score(coefficients found, batch) → (voxel,), by which it is validated on
    pairs."""

    model: nn.Module
    draw: Callable[[int, torch.Generator], training.Minibatch]
    loss: Callable[[nn.Module, training.Minibatch], torch.Tensor]
    score: Callable[[torch.Tensor, training.Minibatch], torch.Tensor]


class PairedHarmonizer(shared.Harmonizer):
    """A network per shell from SH coefficients of S/S0 to those of the reference batch.

    rish_projection: whether what is harmonized keeps the shape of every degree of the input and
    takes only its size from the network. warps_intensity: whether intensities are first warped from
    the batch's distribution to the reference's. min_pairs: people who must have been scanned in
    both batches. learns_from: whom, for the card.

    What becomes of the harmonized series is `output` of training.toml (`harmonizer.OUTPUTS`). Where
    its change is added, targets stand as their series in training, too, lest its smoothing be
    taken for a difference of scanners.
    """

    min_pairs: ClassVar[int] = 2
    learns_from: ClassVar[str] = "people in both batches"
    rish_projection: ClassVar[bool] = False
    warps_intensity: ClassVar[bool] = False
    intended_use: ClassVar[str]

    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal where there is no b0, or a shell is not linear or has fewer directions
        than coefficients."""
        super().check(acquisition)
        least = sh.size(self.settings("training")["l_max"])
        if bad := [s for s in acquisition.shells if len(s) < least or s.b_delta < 0.95]:
            raise Refusal(f"{self.name} found {describe_shells(bad)}. Needed are {least} or "
                          "more directions on every shell, linear encoding. Leave the shell out "
                          "with --bids-filter-file, or harmonize with harmonize_mica.")

    def preflight(self, cohort: Cohort) -> list[str]:
        """As of `Harmonizer.preflight`; or a batch has too few participants that the reference has,
        too."""
        reference, *targets = shared.runs_by_site(self, cohort)
        for batch in targets:
            people = sorted({p.participant for p in self.scans(cohort, batch, reference)
                             if p.kind == pairs.BOTH})
            if len(people) < self.min_pairs:
                who = f"sub-{people[0]} alone was" if people else "nobody was"
                raise UsageError(
                    f"--train {self.name} learns from people scanned in both batches, and {who} "
                    f"scanned in {batch} and in {reference}. Needed are two or more: one to learn "
                    "from, one to validate. Give scans of one person the same participant label, "
                    "or train a method that needs no pairs (harmonize_mica).")
        return []

    def _fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """A checkpoint for every batch but the reference; one of `models` that was trained on the
        same scans in the same way is kept, so that a new batch costs its own training alone.

        Raises:
            UsageError: a scan cannot be used, or a pair not be aligned.
        """
        batches = shared.runs_by_site(self, cohort)
        reference, *targets = batches
        checkpoints = {}
        for batch in targets:
            found = self.scans(cohort, batch, reference)
            name = (f"{shared.model_name(self, batch)}-to-"
                    + shared.model_name(self, reference).removeprefix(f"{self.name}_"))
            rows = {b: batches[b][batches[b]["run"].isin(
                [r for p in found for r in (p.source, p.target)])] for b in (reference, batch)}
            checkpoints[name] = self._one(cohort, settings, name, found, {
                "trained_for": scope.training_domain(cohort, rows, (batch,)),
                "reference_batch": reference, "hashed": scope.hash_participants(rows),
                "of": self._of(settings, found, pd.concat(rows.values()))})
        model = {"Method": self.name, "Model": self.outputs["model"], "ReferenceBatch": reference,
                 "Batches": targets,
                 "Metrics": {n: {k: v for k, v in c.card.metrics.items() if k.startswith("mse")}
                             for n, c in checkpoints.items()}}
        return Fitted({}, model, checkpoints, [
            f"{name}: {rose} (mse_… in model.json). Pages say so wherever it is applied. Train "
            "longer, or with more people."
            for name, c in checkpoints.items() if (rose := _rose(c.card.metrics))])

    def scans(self, cohort: Cohort, batch: str, reference: str) -> list[pairs.Pair]:
        """What is learned from."""
        return pairs.pair_runs(cohort.statistics, reference, cohort.paired_by == "session")[batch]

    def _one(self, cohort: Cohort, settings: TrainingSettings, name: str,
             found: Sequence[pairs.Pair], known: Mapping[str, Any]) -> Checkpoint:
        """The model of a batch."""
        if kept := self._kept(name, known["of"]):
            log.info("%s: was trained on these scans before, and is kept", name)
            return kept
        recipe = self._recipe(found)
        start = self._start(settings, recipe)
        people = sorted({p.participant for p in found})
        began = time.monotonic()
        shells = known["trained_for"].shells
        names = [shell.name for shell in shells]
        with scratch.temporary(settings.states) as folder:
            travellers = PairedScans(
                self, cohort, settings, list(found), [s.directions[1] for s in shells],
                recipe["l_max"], recipe["deformable"], folder, recipe["output"] == shared.CHANGE)
            trained = self._trained(settings, name, shells, recipe, travellers, people, start)
            checkpoint = self._checkpoint(settings, recipe, trained, known, found, start, began)
            metrics = {**self._measured(trained, travellers, names, settings.device),
                       **self._maps(cohort, settings, checkpoint, travellers, trained.held_out,
                                    names)}
        return replace(checkpoint, card=replace(checkpoint.card, metrics=metrics))

    def _checkpoint(self, settings: TrainingSettings, recipe: Mapping[str, Any], trained: Trained,
                    known: Mapping[str, Any], found: Sequence[pairs.Pair],
                    start: Checkpoint | None, began: float) -> Checkpoint:
        """Without metrics."""
        return Checkpoint(trained.tensors, Card(
            method=self.name, network=dict(recipe["network"]), trained_for=known["trained_for"],
            training={"participants": known["hashed"], "held_out": len(trained.held_out),
                      "pairs": sum(p.kind == pairs.BOTH for p in found), "scans": len(
                          {r for p in found for r in (p.source, p.target)}), "of": known["of"],
                      "steps": [[int(h[-1]["step"]) for h in own] for own in trained.histories],
                      "validation": [[min(row.get("validation", math.nan) for row in h)
                                      for h in own] for own in trained.histories
                                     ] if trained.held_out else [],
                      "seconds": round(time.monotonic() - began), "device": settings.device,
                      "data": "the brain mask of " + self.learns_from,
                      "start": start.card.sha256 if start else "identity or chance"},
            intended_use=self.intended_use, seed=settings.seed,
            versions={"qsphere": __version__, "torch": torch.__version__},
            constants={"smoothing": pairs.SMOOTHING, "l_max": recipe["l_max"],
                       "output": recipe["output"]},
            reference_batch=known["reference_batch"]))

    def _recipe(self, found: Sequence[pairs.Pair]) -> dict[str, Any]:
        recipe = self.settings("training")
        if recipe["l_max"] % 2:
            raise UsageError(f"--set {self.name}.l_max={recipe['l_max']}: an even degree is "
                             "needed.")
        if "training.l_max" in self.changed_settings:
            recipe["network"] = {**recipe["network"], "l_max": recipe["l_max"]}
        return recipe

    def _of(self, settings: TrainingSettings, found: Sequence[pairs.Pair], rows: pd.DataFrame
            ) -> str:
        """What tells one training from another: pairs, what is known of their scans, recipe."""
        scans = rows[[c for c in SCAN if c in rows]].sort_values("run").to_csv(index=False)
        recipe = self._recipe(found)
        start = self._start(settings, recipe)
        return hashlib.sha256(repr((
            found, scans, recipe, settings.seed, settings.max_steps,
            start and start.card.sha256, __version__)).encode()).hexdigest()[:16]

    def _kept(self, name: str, of: str) -> Checkpoint | None:
        try:
            folder = self.context.models
            kept = load(folder / name, self.name) if folder else None
        except DataError:
            return None
        return kept if kept and kept.card.training.get("of") == of else None

    def _trained(self, settings: TrainingSettings, name: str, shells: Sequence[ShellRange],
                 recipe: Mapping[str, Any], travellers: PairedScans, people: Sequence[str],
                 start: Checkpoint | None) -> Trained:
        """Networks of some people, a share of whom validate."""
        both = [p for p in people if travellers.indices({p})]
        count = min(max(1, round(recipe["held_out"] * len(both))), len(both) // 2)
        held = set(np.random.default_rng(settings.seed).permutation(both)[:count].tolist())
        learned = set(people) - held
        tensors, samples = {}, travellers.samples
        if self.warps_intensity:
            quantiles = travellers.quantiles(learned)
            tensors["quantiles"] = torch.from_numpy(quantiles.astype(np.float32))
            samples = travellers.warp(quantiles)
        # how long a training lasts may change while it is interrupted
        lasting = {**recipe, "stages": [{k: v for k, v in stage.items() if k != "epochs"}
                                        for stage in recipe["stages"]]}
        networks, histories = [], []
        for shell, own in zip(shells, samples, strict=True):
            # the state of another training, of other people, with another recipe or by another
            # version's loss, is not this one's
            state = hashlib.sha256(repr((sorted(learned), sorted(held), travellers.pairs, lasting,
                                         settings.init, __version__)).encode()).hexdigest()[:8]
            network, history = self._train(
                settings, f"{name}.{shell.name}.{state}", recipe, own,
                [own.select(travellers.indices(learned, kind)) for kind in pairs.KINDS],
                own.select(travellers.indices(held), recipe["validation"]),
                start and _part(start, shell))
            tensors |= {f"{shell.part}.{n}": v for n, v in network.state_dict().items()}
            networks.append(network)
            histories.append(history)
        return Trained(tensors, networks, samples, sorted(held), histories)

    def _start(self, settings: TrainingSettings, recipe: Mapping[str, Any]
               ) -> Checkpoint | None:
        try:
            start = load(settings.init, self.name) if settings.init else None
            if start:
                _part(start, start.card.trained_for.shells[0]).into(
                    build_network(recipe["network"]))
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        return start

    def loss(self, samples: PatchDataset, voxels: torch.Tensor, recipe: Mapping[str, Any],
             device: str) -> Callable[[torch.Tensor, training.Minibatch], torch.Tensor]:
        """(coefficients found, batch) → (voxel,) to be made small. voxels: to learn from."""
        return signal_error

    def objective(self, network: nn.Module, samples: PatchDataset, mine: Sequence[torch.Tensor],
                recipe: Mapping[str, Any], device: str, fresh: bool) -> Objective:
        """How the network learns. mine: voxels by kind of pair. fresh: not from given weights."""
        both = mine[pairs.BOTH]
        loss = self.loss(samples, both, recipe, device)
        return Objective(network, lambda size, g: samples(draw_voxels(both, size, g), g.device),
                       lambda model, b: loss(model(b[0]), b).mean(), loss)

    def _train(self, settings: TrainingSettings, name: str, recipe: Mapping[str, Any],
               samples: PatchDataset, mine: Sequence[torch.Tensor], others: torch.Tensor,
               start: Checkpoint | None
               ) -> tuple[nn.Module, list[list[dict[str, float]]]]:
        """The stages one after another, each from the best of the one before, with voxels to learn
        from, by kind of pair, and others to validate, if any. start: weights of this shell."""
        with training.seeded(settings.seed):
            network = build_network(recipe["network"])
            if start:
                start.into(network)
            learner = self.objective(network, samples, mine, recipe, settings.device, not start)

        def validate(_: nn.Module) -> float:
            return float(torch.cat([learner.score(network(b[0]), b)
                                    for b in samples.blocks(others, settings.device)]).mean())

        histories: list[list[dict[str, float]]] = []
        best, kept = math.inf, network.state_dict()
        for number, stage in enumerate(recipe["stages"], 1):
            options = dict(stage)
            size, epochs = options.pop("batch"), options.pop("epochs")
            every = math.ceil(min(max(map(len, mine)), recipe["epoch"]) / size)
            steps = min(epochs * every, settings.max_steps or epochs * every)
            schedule = training.Schedule(steps, validate_every=every, **options)

            def draw(generator: torch.Generator, size: int = size) -> list[training.Minibatch]:
                return [learner.draw(size, generator)]

            histories.append(training.train(
                learner.model, draw, learner.loss, schedule, seed=settings.seed,
                device=settings.device, validate=validate if len(others) else None,
                saved=settings.states / f"{name}.{number}.ckpt" if settings.states else None,
                name=f"{name}, stage {number} of {len(recipe['stages'])}",
                devices=settings.devices))
            found = min(row.get("validation", -math.inf) for row in histories[-1])
            if found < best or not len(others):
                best = found
                kept = {k: v.detach().clone() for k, v in network.state_dict().items()}
        network.load_state_dict(kept)
        return network, histories

    def _measured(self, trained: Trained, travellers: PairedScans, shells: Sequence[str],
                  device: str) -> dict[str, float]:
        """Mean square error of S/S0 of those who validated, by tissue, before and after."""
        found: dict[str, float] = {}
        for k, shell in enumerate(shells if trained.held_out else ()):
            raw, warped = travellers.samples[k], trained.samples[k]
            voxels, parts = raw.select(travellers.indices(set(trained.held_out))), []
            with torch.no_grad():
                for b, c in zip(raw.blocks(voxels, device), warped.blocks(voxels, device),
                                strict=True):
                    made = trained.networks[k](c[0])
                    if self.rish_projection:
                        made = sh.with_rish(c[0][:, CENTRE], sh.rish(made))
                    parts.append(torch.stack([signal_error(b[0][:, CENTRE], b),
                                              signal_error(made, b)]).cpu())
            for when, values in zip(("before", "after"), torch.cat(parts, 1), strict=True):
                for name, value in tissue.NAMES.items():
                    found[f"mse_{when}_{name}_{shell}"] = float(
                        values[raw.tissue[voxels] == value].mean())
        return found

    def _maps(self, cohort: Cohort, settings: TrainingSettings, model: Checkpoint,
              travellers: PairedScans, held: Sequence[str], shells: Sequence[str]
              ) -> dict[str, float]:
        """Mean square error and bias (mean difference) of FA and MD (µm²/ms) of those who
        validated, by tissue, before and after, as the model is applied to them; and error_SHELL,
        by how much the mean over directions still errs in them, relative to it."""
        differences: dict[str, list[np.ndarray]] = {"before": [], "after": []}
        labels, errors = [], []
        for i in sorted(travellers.indices(set(held))):
            pair = travellers.pairs[i]
            source, target = (self.load(cohort, run) for run in (pair.source, pair.target))
            registration = travellers.registration(i)
            made = self.harmonize(source, model, model.card.batches[0], settings.device)
            harmonized = replace(source, signal=made.signal,
                                 noise_gain=shared.noise_gain(source, made))
            for when, dwi in (("before", source), ("after", harmonized)):
                differences[when].append(map_differences(dwi, target, registration))
            labels.append(registration.labels[registration.overlap])
            errors.append(mean_errors(harmonized, target, registration))
        found: dict[str, float] = {
            f"error_{shell}": float(np.mean(own))
            for shell, own in zip(shells, np.transpose(errors), strict=True)} if errors else {}
        for when, values in differences.items():
            for (k, shell), (m, measure), (name, label) in product(
                    enumerate(shells), enumerate(("fa", "md")),
                    tissue.NAMES.items() if labels else ()):
                own = np.concatenate(values, 2)[k, m, np.concatenate(labels) == label]
                found[f"mse_{measure}_{when}_{name}_{shell}"] = float(np.square(own).mean())
                found[f"bias_{measure}_{when}_{name}_{shell}"] = float(own.mean())
        return found

    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """The signal with S0 times the change of the SH series of every shell added, or that series
        in its place, at the run's directions and not below 0. b0 volumes stay, and voxels without
        S0.

        Raises:
            Refusal: as of `check`, or a shell of another b-tensor shape.
        """
        self.check(dwi.acquisition)
        card = model.card
        nearest = card.trained_for.nearest_shells(dwi.acquisition)
        usable = dwi.mean_b0 > 0
        if not usable.any():
            raise Refusal(f"{self.name} found no b0 signal above 0. Check image and mask.")
        signal, clipped = self._applied(dwi, model, nearest, device)
        output, names = card.constants["output"], [
            f"error_{shell.name}" for shell in card.trained_for.shells]
        errors = [card.metrics[names[k]] for k in nearest] if names[0] in card.metrics else []
        no_intervals = (shared.SMOOTHED if output == shared.SERIES
                        else "" if errors else UNVALIDATED)
        rose = _rose(card.metrics)
        return Harmonized(
            signal, reapply=lambda other: self._applied(other, model, nearest, device)[0],
            counts={f"{self.short}_unchanged": int((~usable).sum()),
                    f"{self.short}_clipped_values": clipped},
            parameters={"SphericalHarmonicDegree": card.constants["l_max"], "Output": output,
                        "Smoothing": card.constants["smoothing"],
                        "RISHProjection": self.rish_projection,
                        "IntensityWarping": self.warps_intensity},
            notices=(f"Harmonization: {rose} when {card.method} was trained. Do not use it; train "
                     "longer, or with more people.",) if rose else (),
            errors=errors, no_intervals=no_intervals)

    def _applied(self, dwi: Dwi, model: Checkpoint, nearest: Sequence[int], device: str
                 ) -> tuple[np.ndarray, int]:
        """The harmonized signal, and how many values were raised to 0. nearest: the trained shell
        for each of the run's."""
        constants = model.card.constants
        l_max, smoothing, output = (constants[k] for k in ("l_max", "smoothing", "output"))
        if self.warps_intensity:
            start, end = model.tensors["quantiles"].numpy().astype(np.float64)[:, nearest]
            signal, _ = intensity.warp(dwi, end, start)
            dwi = replace(dwi, signal=signal)
        else:
            signal = dwi.signal.copy("K")
        values, usable = pairs.coefficients(dwi, l_max, smoothing)
        where = dwi.mask.copy()
        where[dwi.mask] = usable
        where, _, order = canonical(where, dwi.affine)
        rows = np.flatnonzero(usable)[order]
        s0, clipped = dwi.mean_b0[rows], 0
        for shell, own, k in zip(dwi.acquisition.shells, values, nearest, strict=True):
            network = model.part(model.card.trained_for.shells[k].part).into(
                build_network(model.card.network))
            own = own[rows]
            found = apply_to_volume(network, fill_nearest(own, where, margin=1), where, device)
            basis = sh.basis(l_max, dwi.acquisition.bvecs[shell.indices])
            if output == shared.CHANGE:
                # what the smoothing of the series would take from its change is given back
                fit = sh.smooth_fit(l_max, dwi.acquisition.bvecs[shell.indices], smoothing)
                sharp = np.linalg.inv(fit @ basis).astype(np.float32).T
                before = own @ sharp
                c = before * _gain(found, own) if self.rish_projection else found @ sharp
                c -= before
            else:
                c = own * _gain(found, own) if self.rish_projection else found
            clipped += shared.write_series(signal, rows, shell.indices, s0, c, basis, output)
        return signal, clipped


def _gain(found: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Of every coefficient, by RISH projection."""
    return sh.rish_gain(torch.from_numpy(own), sh.rish(torch.from_numpy(found))).numpy()


def _part(start: Checkpoint, shell: ShellRange) -> Checkpoint:
    """Select the weights of the shell that is nearest in b."""
    return start.part(min(start.card.trained_for.shells,
                          key=lambda known: abs(known.middle - shell.middle)).part)


def draw_voxels(voxels: torch.Tensor, size: int, generator: torch.Generator) -> torch.Tensor:
    """`size` of the voxels, at random."""
    return voxels[torch.randint(len(voxels), (size,), generator=generator,
                                device=generator.device).cpu()]


def _rose(metrics: Mapping[str, float]) -> str:
    """Where signal, FA or MD of those who validated lay further from the reference's than before,
    as the start of a sentence; empty where nowhere."""
    after = [k for k in metrics if k.startswith("mse_") and "after_" in k]
    worse = [_describe_metric(k) for k in after
             if metrics[k] > metrics[k.replace("after_", "before_")]]
    return f"the error of people not learned from rose ({'; '.join(worse)})" if worse else ""


def _describe_metric(key: str) -> str:
    """`FA in white matter, b1000` of `mse_fa_after_wm_b1000`."""
    *measure, tissue, shell = key.removeprefix("mse_").replace("after_", "").split("_")
    tissue_name = {"wm": "white matter", "gm": "grey matter"}[tissue]
    return f"{'_'.join(measure).upper() or 'signal'} in {tissue_name}, {shell}"
