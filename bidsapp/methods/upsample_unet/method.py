"""New directions of a shell by U-Nets on axial slices (He et al. 2020, Proc. ISMRM 28)."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import nn

from bidsapp import __version__, scratch, training, upsample
from bidsapp.acquisition import (
    SAME_SHAPE,
    Acquisition,
    Shell,
    concatenate,
    describe_shells,
    same_shell,
)
from bidsapp.blocks import map_volume
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import OVERRIDE, TrainingDomain
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.kinds import Cohort, Fitted, Predicted, Trainable, TrainingSettings, Upsampler
from bidsapp.methods.upsample_unet import slices
from bidsapp.methods.upsample_unet.slices import Linear, Minibatch, SliceDataset
from bidsapp.networks.builder import build_network
from bidsapp.progress import track
from bidsapp.selection import find_weights

log = logging.getLogger("qsphere")

NETWORKS = JOINT, SINGLE = "joint", "single"
"""One network for all new directions, or one for each, as published."""

SAME_TABLE, SAME_DIRECTION = 2.0, 3.0
"""Largest angles in degrees: between directions of the runs of a training that count as the same,
and between those of a run and of the training of a network."""

MIN_INPUTS = 6
"""Minimum number of input directions: as many as a tensor needs."""

SLAB = 4
"""Slices per block of an application, so that activations stay small."""

NO_TRAINING = ("or use an upsampler that needs no training (upsample_scnn, upsample_gp or "
               "upsample_sh)")


@dataclass(frozen=True)
class ShellModel:
    """A trained model and the shell of a run to which it is applied.

    Parameters
    ----------
    shell : Shell
        Shell of the run.
    checkpoint : Checkpoint
    indices : (n,) int
        Measurements of the run in the order of the network's inputs.
    """

    shell: Shell
    checkpoint: Checkpoint
    indices: Int[np.ndarray, " n"]

    @property
    def targets(self) -> Float[np.ndarray, "m 3"]:
        """The directions that the model predicts."""
        return np.array(self.checkpoint.card.constants["targets"])


class UNetUpsampler(Upsampler, Trainable):
    """Prediction of the other directions of a training from those that a run has."""

    any_table = False
    intended_use = (
        "Predicts the signal along the directions `targets` of a shell from the directions "
        "`inputs`, on the voxel size and at the b-value under trained_for. What is rare in the "
        "training data, such as lesions, may be predicted as if it were common. Not for diagnosis.")

    @cached_property
    def weights(self) -> list[Checkpoint]:
        """Models trained at group level, loaded once."""
        return find_weights(self.name, self.context.models)

    def select(self, acquisition: Acquisition) -> list[ShellModel]:
        """Select a model for each shell of a run: of those with its directions, that of the nearest
        b.

        Raises
        ------
        Refusal
            There is no b0, no shell, no model, or a shell without one.
        """
        shells = acquisition.shells
        if not acquisition.b0.any() or not shells:
            raise Refusal(f"{self.name} found {int(acquisition.b0.sum())} b0 volumes and "
                          f"{describe_shells(shells)}. Needed are a b0 and the directions of a "
                          "trained model. Leave out --upsample, or acquire them.")
        if not self.weights:
            raise Refusal(
                f"{self.name} found no trained model in OUTPUT_DIR/group/models. Needed is one for "
                f"{describe_shells(shells)} s/mm². Train it on runs with more directions (qsphere "
                f"BIDS_DIR OUTPUT_DIR group --train {self.name}), {NO_TRAINING}.")
        selected = []
        for shell in shells:
            matched = [(abs(_trained_b(c) - shell.b), i, order) for i, c in enumerate(self.weights)
                       if shell.b_delta > 1 - SAME_SHAPE and (order := match_directions(
                           acquisition.bvecs[shell.indices],
                           np.array(c.card.constants["inputs"]), SAME_DIRECTION)) is not None]
            if not matched:
                known = "; ".join(f"{len(c.card.constants['inputs'])} × b {_trained_b(c):.0f}"
                                  for c in self.weights)
                raise Refusal(
                    f"{self.name} found {describe_shells([shell])} s/mm², and models for {known} "
                    "s/mm². Needed are the input directions of a model (OUTPUT_DIR/group/"
                    f"desc-unet…_directions.tsv), within {SAME_DIRECTION:g}°, and no others; runs "
                    "of the training have all directions already. Train on runs with these and "
                    f"more directions (group --train {self.name}), {NO_TRAINING}.")
            _, i, order = min(matched, key=lambda m: m[:2])
            selected.append(ShellModel(shell, self.weights[i], shell.indices[order]))
        return selected

    def check(self, acquisition: Acquisition) -> None:
        """Refuse an acquisition unless each shell has the directions of a trained model."""
        self.select(acquisition)

    def target(self, acquisition: Acquisition) -> Acquisition | None:
        """Return the directions of the training that a run does not have, at its own b-values.

        None if `check` refuses the acquisition.
        """
        try:
            models = self.select(acquisition)
        except Refusal:
            return None
        return concatenate([replace(
            acquisition, bvals=np.full(len(m.targets), m.shell.b), bvecs=m.targets,
            b_delta=np.ones(len(m.targets))) for m in models])

    def check_target(self, acquisition: Acquisition, target: Acquisition) -> None:
        """Raise Refusal if a target is none of those of the training."""
        self._assign(self.select(acquisition), target)

    def violations(self, acquisition: Acquisition, target: Acquisition,
                   voxel_size: Sequence[float] | None = None) -> list[str]:
        return list(dict.fromkeys(v for model in self.select(acquisition)
                                  for v in _violations(model, acquisition, voxel_size)))

    def predict(self, dwi: Dwi, target: Acquisition, device: str, seed: int = 0) -> Predicted:
        """Predict the signal along directions of the training (`Upsampler.predict`).

        The prediction is S0 ŷ, with S0 the mean b0 and ŷ the output of the networks. A magnitude is
        not below 0, and the prediction is 0 if S0 is not above 0.
        """
        models = self.select(dwi.acquisition)
        owners = self._assign(models, target)
        outside = self._check_domain(dwi, target)
        s0 = np.maximum(dwi.mean_b0, 0)[:, None]
        signal = np.zeros((len(dwi.signal), len(target)), np.float32)
        sd: np.ndarray | None = signal.copy()
        for k, model in enumerate(models):
            columns = np.flatnonzero(owners[0] == k)
            if not len(columns):
                continue
            directions, card = owners[1][columns], model.checkpoint.card
            ratio = _apply(model, dwi, directions, device)
            if dwi.magnitude:
                ratio = ratio.clip(0)
            signal[:, columns] = s0 * ratio
            noise = slices.relative_noise(dwi, model.shell.indices)
            if noise is None or "sd" not in card.constants:
                sd = None
            if sd is not None and noise is not None:
                sd[:, columns] = s0 * slices.error_sd(ratio, noise, card.constants["sd"],
                                                      directions)
        return Predicted(
            signal, sd, {f"{self.short}_no_b0_signal": int((s0 == 0).sum())},
            {"Weights": [m.checkpoint.card.sha256 for m in models],
             "Networks": [m.checkpoint.card.constants["networks"] for m in models],
             **({"OutOfDistribution": outside} if outside else {})},
            [f"{self.short}: used outside of the training domain because of "
             f"--allow-extrapolation: {'; '.join(outside)}."] if outside else [])

    def _assign(self, models: Sequence[ShellModel], target: Acquisition
                ) -> tuple[Int[np.ndarray, " m"], Int[np.ndarray, " m"]]:
        """Find the model and its direction for each measurement of the target."""
        owner, direction = np.full(len(target), -1), np.zeros(len(target), int)
        for shell in target.shells:
            for k, model in enumerate(models):
                if same_shell(shell, model.shell):
                    cosine = np.abs(target.bvecs[shell.indices] @ model.targets.T)
                    near = cosine.max(1) >= math.cos(math.radians(SAME_DIRECTION))
                    owner[shell.indices[near]] = k
                    direction[shell.indices] = cosine.argmax(1)
        if (strange := owner < 0).any():
            known = ", ".join(f"{len(m.targets)} × b {m.shell.b:.0f}" for m in models)
            raise Refusal(
                f"{self.name}: {int(strange.sum())} of the {len(target)} measurements to predict "
                f"are not among those that the networks were trained for ({known} s/mm², within "
                f"{SAME_DIRECTION:g}°). Needed are those alone. Leave out --target-directions and "
                f"--target-bvecs, {NO_TRAINING}.")
        return owner, direction

    def _check_domain(self, dwi: Dwi, target: Acquisition) -> list[str]:
        """List differences of a run from the training, voxel size included; refuse them unless
        they are allowed."""
        size = np.linalg.norm(dwi.affine[:3, :3], axis=0).tolist()
        violations = self.violations(dwi.acquisition, target, size)
        if violations and not self.context.allow_extrapolation:
            raise Refusal(f"{self.name} was not trained for this run: {'; '.join(violations)}. "
                          f"Train on such runs, {NO_TRAINING}. {OVERRIDE}")
        return violations

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a model for each shell of the table that all runs share."""
        tables = self._match_tables(cohort)
        validation = cohort.hold_out(self.settings("training")["held_out"], settings.seed,
                                     self.name, list(cohort.acquisitions))
        learners = [run for run in cohort.acquisitions if run not in validation]
        held = [run for run in cohort.acquisitions if run in validation]
        if settings.states:
            settings.states.mkdir(parents=True, exist_ok=True)
        checkpoints, directions = {}, {}
        for table in tables:
            with scratch.temporary(settings.states) as folder:
                name, checkpoint = self._fit_shell(cohort, settings, table, learners, held, folder)
            checkpoints[name] = checkpoint
            directions[f"desc-unet{name.removeprefix(f'{self.name}_')}_directions"] = table.listing
        summary = "; ".join(describe_errors(c) for c in checkpoints.values())
        files = ", ".join(f"group/{table}.tsv" for table in directions)
        return Fitted(directions, {
            "Method": self.name, "Model": self.outputs["model"], "Summary":
            f"On {len(held)} held-out runs of the cohort: {summary}.", "UsedFor":
            f"runs that have the input directions ({files}), and no others. Those of the training "
            "have all directions already", "Metrics": {
                f"{key}_{c.card.trained_for.shells[0].name}": value for c in checkpoints.values()
                for key, value in c.card.metrics.items()}}, checkpoints)

    def _match_tables(self, cohort: Cohort) -> list[ShellTable]:
        """Match the directions of each shell of all runs to those of the first run.

        Raises
        ------
        UsageError
            Runs differ, or the directions do not suffice.
        """
        runs = list(cohort.acquisitions)
        first = cohort.acquisitions[runs[0]]
        wanted = self.settings("training")["inputs"]
        tables = []
        for k, shell in enumerate(first.shells):
            count = wanted or round(len(shell) / 3)
            if shell.b_delta <= 1 - SAME_SHAPE or not MIN_INPUTS <= count < len(shell):
                raise UsageError(
                    f"--train {self.name}: {runs[0]} has {describe_shells([shell])} s/mm², of "
                    f"which {count} would be inputs. Needed are linear encoding, {MIN_INPUTS} or "
                    "more inputs, and more directions than inputs. Change --set "
                    f"{self.name}.inputs=N, or leave the shell out.")
            directions = first.bvecs[shell.indices]
            inputs = upsample.subset(directions, count)
            order = np.r_[inputs, np.setdiff1d(np.arange(len(shell)), inputs)]
            indices = {}
            for run in runs:
                shells = cohort.acquisitions[run].shells
                matched = (match_directions(cohort.acquisitions[run].bvecs[shells[k].indices],
                                            directions[order], SAME_TABLE)
                           if len(shells) == len(first.shells) and same_shell(shells[k], shell)
                           else None)
                if matched is None or not cohort.acquisitions[run].b0.any():
                    raise UsageError(
                        f"--train {self.name}: {run} has {describe_shells(shells)} s/mm² and "
                        f"{int(cohort.acquisitions[run].b0.sum())} b0 volumes; {runs[0]} has "
                        f"{describe_shells(first.shells)} s/mm². Needed are a b0 and the same "
                        f"directions in all runs, within {SAME_TABLE:g}°, since each direction has "
                        "a channel of its own. Leave runs out with --participant-label or "
                        "--bids-filter-file.")
                indices[run] = shells[k].indices[matched]
            tables.append(ShellTable(shell, count, directions[order], indices))
        if not tables:
            raise UsageError(f"--train {self.name}: {runs[0]} has no diffusion-weighted volume. "
                             "Leave it out with --participant-label.")
        return tables

    def _fit_shell(self, cohort: Cohort, settings: TrainingSettings, table: ShellTable,
                   learners: Sequence[str], held: Sequence[str], folder: Path
                   ) -> tuple[str, Checkpoint]:
        """Train and calibrate the networks of a shell; return the name of the model, too."""
        assert cohort.load is not None
        began, recipe, n = time.monotonic(), self.settings("training"), table.inputs
        learned, validated = (SliceDataset(folder, recipe["slices"], n) for folder in (
            folder / "learn", folder / "validate"))
        for dataset, runs in ((learned, learners), (validated, held)):
            dataset.folder.mkdir()
            for run in track(runs, f"{self.name}: reading"):
                dataset.add(cohort.load(run), table.indices[run])
        linear = slices.fit_linear(learned, constant=not recipe["linear"])
        groups = table.groups(recipe["networks"])
        start = self._start(settings, recipe, table)
        name = f"{self.name}_b{round(table.shell.b, -2):.0f}n{n}"
        digest = hashlib.sha256(repr((
            __version__, {**recipe, "schedule": {**recipe["schedule"], "steps": 0}},
            start and start.card.sha256, learners, held)).encode())
        for values in linear:  # they depend on all training data
            digest.update(values.numpy().tobytes())
        state = f"{name}.{digest.hexdigest()[:8]}"
        tensors = {f"linear.{k}": v for k, v in linear._asdict().items()}
        networks, histories = [], []
        for i, (part, group) in enumerate(groups.items()):
            network, history = _train(
                learned, validated, group, linear, recipe, settings,
                start and start.part(part),
                settings.states / f"{state}.{i}.ckpt" if settings.states else None,
                f"{name}, {part}")
            networks.append(network)
            histories.append(history)
            tensors |= {f"{part}.{k}": v for k, v in network.state_dict().items()}
        constants, metrics = _validate(networks, validated, linear, recipe["validation"],
                                       settings.device)
        runs = [*learners, *held]
        result = Checkpoint(tensors, Card(
            method=self.name, network={**recipe["network"], "inputs": n, "outputs": len(
                next(iter(groups.values())))},
            trained_for=_training_domain(cohort, table, runs),
            training={"runs": len(runs), "validation_runs": len(held), "slices": len(learned),
                      "batch": recipe["batch"],
                      "steps": [int(h[-1]["step"]) for h in histories],
                      "validation": [min(row["validation"] for row in h) for h in histories],
                      "seconds": round(time.monotonic() - began), "device": settings.device,
                      "start": start.card.sha256 if start else
                      "linear prediction" if recipe["linear"] else "mean",
                      "data": "axial slices of S/S0"},
            intended_use=self.intended_use, seed=settings.seed,
            versions={"qsphere": __version__, "torch": torch.__version__}, metrics=metrics,
            constants={"networks": recipe["networks"], "inputs": table.directions[:n].tolist(),
                       "targets": table.directions[n:].tolist(), **constants}))
        log.info("%s: on %d held-out runs: %s", name, len(held), describe_errors(result))
        return name, result

    def _start(self, settings: TrainingSettings, recipe: Mapping[str, Any], table: ShellTable
               ) -> Checkpoint | None:
        """Load the checkpoint of --init.

        Raises
        ------
        UsageError
            It cannot be read, or its networks or directions differ.
        """
        if settings.init is None:
            return None
        try:
            start = load(settings.init, self.name)
            for part, group in table.groups(recipe["networks"]).items():
                start.part(part).into(_build(recipe["network"], table.inputs, len(group)))
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        trained = np.array([v for k in ("inputs", "targets") for v in start.card.constants[k]])
        if (trained.shape != table.directions.shape
                or np.abs((trained * table.directions).sum(1)).min() < math.cos(
                    math.radians(SAME_DIRECTION))):
            raise UsageError(f"--init: {settings.init} was trained with other directions, or in "
                             "another order. Needed are those of the runs. Leave the option out.")
        return start


@dataclass(frozen=True)
class ShellTable:
    """The directions of a shell that all runs of a training share.

    Parameters
    ----------
    shell : Shell
        Shell of the first run.
    inputs : int
        Number n of input directions.
    directions : (n + m, 3)
        The input directions, then the targets.
    indices : mapping
        (n + m,) measurements of each run in this order, by its name.
    """

    shell: Shell
    inputs: int
    directions: Float[np.ndarray, "_ 3"]
    indices: Mapping[str, Int[np.ndarray, " _"]]

    @property
    def listing(self) -> pd.DataFrame:
        """The directions with their role and b-value, for the table at group level."""
        roles = ["input"] * self.inputs + ["target"] * (len(self.directions) - self.inputs)
        return pd.DataFrame({"role": roles, **dict(zip("xyz", self.directions.T, strict=True)),
                             "b": round(self.shell.b, 1)})

    def groups(self, networks: str) -> dict[str, list[int]]:
        """List the targets of each network, by the name of its part of the checkpoint."""
        targets = range(len(self.directions) - self.inputs)
        return {f"direction-{i}": [i] for i in targets} if networks == SINGLE else {
            JOINT: list(targets)}


def describe_errors(checkpoint: Checkpoint) -> str:
    """Describe the errors of a model on held-out runs in words."""
    constants, metrics = checkpoint.card.constants, checkpoint.card.metrics
    error, plain = (metrics[key]**0.5 for key in ("mse_signal", "mse_linear"))
    noise = metrics.get("noise")
    return (f"{len(constants['inputs'])} to {len(constants['targets'])} further directions of b "
            f"{_trained_b(checkpoint):.0f}, RMSE of S/S0 {error:.4f} against the measurements"
            + (f", whose noise is {noise**0.5:.4f}" if noise is not None else "")
            + f"; by the linear prediction alone {plain:.4f}")


def match_directions(directions: Float[np.ndarray, "n 3"], wanted: Float[np.ndarray, "k 3"],
                     tolerance: float) -> Int[np.ndarray, " k"] | None:
    """Match directions one to one, antipodes being equal.

    Parameters
    ----------
    directions, wanted : (n, 3) and (k, 3)
        Unit vectors.
    tolerance : float
        Largest angle of a match, degrees.

    Returns
    -------
    (k,) int or None
        Index into `directions` of each wanted one, with the largest sum of |cosines|; None if the
        numbers differ or a match is beyond the tolerance.
    """
    from scipy.optimize import linear_sum_assignment

    if len(directions) != len(wanted):
        return None
    cosine = np.abs(wanted @ directions.T)
    rows, columns = linear_sum_assignment(-cosine)
    near = cosine[rows, columns] >= math.cos(math.radians(tolerance))
    return columns if near.all() else None


def _trained_b(checkpoint: Checkpoint) -> float:
    """Mean b-value of the shell of a model, s/mm²."""
    return checkpoint.card.trained_for.shells[0].middle


def _violations(model: ShellModel, acquisition: Acquisition,
                voxel_size: Sequence[float] | None = None) -> list[str]:
    """List the violations of the training domain by the shell of a model and the b0."""
    part = np.sort(np.r_[np.flatnonzero(acquisition.b0), model.shell.indices])
    return model.checkpoint.card.trained_for.violations(acquisition[part], voxel_size)


def _training_domain(cohort: Cohort, table: ShellTable, runs: Sequence[str]) -> TrainingDomain:
    """Describe the runs that a model may be applied to: those of the training, with the input
    directions alone."""
    acquisitions = []
    for run in runs:
        acquisition = cohort.acquisitions[run]
        acquisitions.append(acquisition[np.r_[np.flatnonzero(acquisition.b0),
                                              table.indices[run][:table.inputs]]])
    sizes = [sorted(cohort.voxel_sizes[run]) for run in runs if run in cohort.voxel_sizes]
    snr = [float(v) for v in cohort.statistics.get("snr_b0", ()) if v is not None
           and math.isfinite(v)]
    return TrainingDomain.from_acquisitions(
        acquisitions, snr=(min(snr), max(snr)) if snr else None,
        voxel_size=tuple((round(float(min(edge)), 3), round(float(max(edge)), 3))
                         for edge in zip(*sizes, strict=True)))


def _build(description: Mapping[str, Any], inputs: int, outputs: int) -> nn.Module:
    return build_network(description, inputs=inputs, outputs=outputs)


def _train(learned: SliceDataset, validated: SliceDataset, group: Sequence[int],
           linear: Linear, recipe: Mapping[str, Any], settings: TrainingSettings,
           start: Checkpoint | None, saved: Path | None, name: str
           ) -> tuple[nn.Module, list[dict[str, float]]]:
    """Train a network U for some targets y, which are predicted as A x + a + s U(x).

    The loss is the mean of (U − (y − A x − a)/s)² inside the mask: the error of the prediction in
    units of that of the linear one. Without `start`, U starts at 0.
    """
    with training.seeded(settings.seed):
        network = _build(recipe["network"], learned.inputs, len(group))
    if start:
        start.into(network)
    else:
        for parameter in network.get_submodule("final").parameters():
            nn.init.zeros_(parameter)
    schedule = training.Schedule(**{**recipe["schedule"], **(
        {"steps": settings.max_steps} if settings.max_steps else {})})

    def draw(generator: torch.Generator) -> list[Minibatch]:
        numbers = torch.randint(len(learned), (recipe["batch"],), generator=generator,
                                device=generator.device)
        return [learned(numbers.tolist(), group, generator.device)]

    def square_error(model: nn.Module, minibatch: Minibatch) -> torch.Tensor:
        part = linear.select(group, minibatch.inputs.device)
        rest = (minibatch.targets - part.predict(minibatch.inputs)) / part.scale[:, None, None]
        return (model(minibatch.inputs) - rest).square().movedim(1, 3)[minibatch.mask]

    held = _in_blocks(validated, group, recipe["validation"], settings.device)
    history = training.train(
        network, draw, lambda model, m: square_error(model, m).mean(), schedule,
        seed=settings.seed, device=settings.device, saved=saved, devices=settings.devices,
        name=name, validate=lambda model: float(torch.cat(
            [square_error(model, m) for m in held()]).mean()))
    return network, history


def _in_blocks(dataset: SliceDataset, group: Sequence[int], most: int, device: str
               ) -> Callable[[], Iterator[Minibatch]]:
    """Load at most `most` slices, spread evenly, in blocks of SLAB."""
    numbers = slices.spread_evenly(len(dataset), most).tolist()
    return lambda: (dataset(numbers[i:i + SLAB], group, device)
                    for i in range(0, len(numbers), SLAB))


@torch.inference_mode()
def _validate(networks: Sequence[nn.Module], dataset: SliceDataset, linear: Linear,
              most: int, device: str) -> tuple[dict[str, Any], dict[str, float]]:
    """Calibrate the SD of the prediction's error on held-out slices, and measure the error.

    Returns
    -------
    constants : dict
        `sd` (`slices.calibrate`), if the noise of all runs is known.
    metrics : dict
        Mean square errors of S/S0 against the measurements, of the networks (`mse_signal`) and of
        the linear prediction (`mse_linear`), and `noise`, the mean variance of the noise.
    """
    count = len(linear.shift)
    linear = linear.select(range(count), device)
    predicted: list[np.ndarray] = []
    straight: list[np.ndarray] = []
    measured: list[np.ndarray] = []
    noise: list[np.ndarray] = []
    for block in _in_blocks(dataset, range(count), most, device)():
        plain = linear.predict(block.inputs)
        rest = torch.cat([network.to(device)(block.inputs) for network in networks], 1)
        for values, images in ((predicted, plain + linear.scale[:, None, None] * rest),
                               (straight, plain), (measured, block.targets)):
            values.append(images.movedim(1, 3)[block.mask].cpu().numpy())
        noise.append(block.noise[block.mask].cpu().numpy())
    p, y, nu = np.concatenate(predicted), np.concatenate(measured), np.concatenate(noise)
    metrics = {"mse_signal": float(np.square(p - y).mean()),
               "mse_linear": float(np.square(np.concatenate(straight) - y).mean())}
    if not np.isfinite(nu).all():
        return {}, metrics
    return {"sd": slices.calibrate(p, y, nu)}, {**metrics, "noise": float(np.square(nu).mean())}


def _apply(model: ShellModel, dwi: Dwi, directions: Int[np.ndarray, " m"], device: str
           ) -> Float[np.ndarray, "voxel m"]:
    """Predict S/S0 along some of the directions of a model."""
    card = model.checkpoint.card
    single = card.constants["networks"] == SINGLE
    parts = [f"direction-{d}" for d in directions] if single else [JOINT]
    networks = [model.checkpoint.part(part).into(build_network(card.network)).to(device)
                for part in parts]
    values, number = slices.attenuation(dwi, model.indices), slices.number_voxels(dwi)
    linear = Linear(**model.checkpoint.part("linear").tensors).select(directions.tolist(), device)
    chosen = list(range(len(directions))) if single else directions.tolist()

    def predict(block: torch.Tensor) -> dict[str, torch.Tensor]:
        inside = (block >= 0)[..., None]
        rows = torch.from_numpy(values[block.cpu().numpy()]).to(device)
        images = torch.where(inside, rows, 0).movedim(3, 1)
        rest = torch.cat([network(images) for network in networks], 1)[:, chosen]
        ratio = linear.predict(images) + linear.scale[:, None, None] * rest
        return {"ratio": ratio.movedim(1, 3)}

    grid = map_volume(predict, [number], 0, device, SLAB)["ratio"]
    result = np.zeros((len(dwi.signal), len(directions)), np.float32)
    inside = number >= 0
    result[number[inside]] = grid[inside]
    return result
