"""Training of networks on volumes: random crops, the start, the loop, the card."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from torch import nn

from bidsapp import __version__, scratch, training
from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import ShellRange, TrainingDomain
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.kinds import Cohort, Trainable, TrainingSettings
from bidsapp.networks.builder import build_network
from bidsapp.progress import track
from bidsapp.selection import bundled_weights
from bidsapp.volumetric import inputs
from bidsapp.volumetric.corruption import Corruption
from bidsapp.volumetric.inputs import MIN_DIRECTIONS, Grid
from bidsapp.volumetric.scans import Channels, Example, Labelled, Scan, cut, cut_middle, prepare

log = logging.getLogger("qsphere")

ANY, TABLE = "any", "table"
"""Inputs of a network: any gradient table, or one, to which others are interpolated in q-space."""

BUNDLED, RANDOM = "bundled", "random"
"""Weights that a task starts from without `--init`."""

PRETRAINING = "pretrain_artifacts"
"""Method of the bundled start."""

ENCODER = "encoder"
"""Part of a checkpoint that can start the network of another task."""

DRAWS = 4
"""Corruptions of each scan of a validation."""

WIDEN = 0.1
"""Share by which a network may be applied below and above the b-values of its training."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training: the table `training` of a method's training.toml.

    Parameters
    ----------
    network : mapping
        `architecture` and its arguments (`networks.volumetric.VolumeNetwork`).
    schedule : Schedule
    input : str
        ANY or TABLE.
    voxel : float
        Edge of the network's voxels, mm; 0 for the median edge of the cohort.
    patch : int
        Largest number of voxels of a crop along an axis.
    batch : int
        Crops of a minibatch.
    held_out : float
        Share of the participants (at least one) for validation.
    subsample : bool
        Whether each crop has a random part of the shells and directions of its run, for ANY.
    start : str
        BUNDLED: without `--init`, a task starts from the encoder of the bundled pretraining, if it
        has the same network. RANDOM: from random weights.

    Raises
    ------
    UsageError
        A value is outside of these.
    """

    network: Mapping[str, Any]
    schedule: training.Schedule
    input: str = ANY
    voxel: float = 0.0
    patch: int = 64
    batch: int = 3
    held_out: float = 0.2
    subsample: bool = True
    start: str = RANDOM

    def __post_init__(self) -> None:
        if (self.input not in (ANY, TABLE) or self.start not in (BUNDLED, RANDOM)
                or self.voxel < 0 or self.batch < 1 or self.patch < 16
                or not 0 < self.held_out < 1):
            raise UsageError(f"the training has input {self.input!r}, start {self.start!r}, voxel "
                             f"{self.voxel}, patch {self.patch}, batch {self.batch} and held_out "
                             f"{self.held_out}. The input must be {ANY} or {TABLE}, the start "
                             f"{BUNDLED} or {RANDOM}, the voxel 0 or more, the patch 16 or more, "
                             "the batch 1 or more, and held_out between 0 and 1.")


@dataclass(frozen=True, eq=False)
class Validation:
    """The crops in the middle of scans, with all measurements.

    They are cut anew in each iteration, so that one at a time is in memory. Each scan is corrupted
    in DRAWS ways, which are the same in each iteration.

    Parameters
    ----------
    scans : sequence of Scan
    patch : int
        Number of voxels of a crop along an axis.
    corruption : Corruption, optional
    seed : int
        Seed of the corruption.
    """

    scans: Sequence[Scan]
    patch: int
    corruption: Corruption | None = None
    seed: int = 0

    def __iter__(self) -> Iterator[Example]:
        draws = 1 if self.corruption is None else DRAWS
        for i, (scan, _) in enumerate(itertools.product(self.scans, range(draws))):
            yield cut_middle(scan, self.patch, self.corruption, 1000 * self.seed + i)


class Sampler:
    """Draws minibatches of random crops of scans.

    Parameters
    ----------
    scans : sequence of Scan
    recipe : Recipe
    corruption : Corruption, optional
        What is done to each crop.
    """

    def __init__(self, scans: Sequence[Scan], recipe: Recipe,
                 corruption: Corruption | None = None) -> None:
        self.scans, self.recipe, self.corruption = scans, recipe, corruption
        self.centres = [torch.nonzero(scan.valid) for scan in scans]

    def __call__(self, generator: torch.Generator) -> list[list[Example]]:
        """Draw one minibatch."""
        cpu = generator if generator.device.type == "cpu" else torch.Generator().manual_seed(
            int(torch.randint(2**62, (), generator=generator, device=generator.device)))
        return [[self._draw(cpu).to(generator.device) for _ in range(self.recipe.batch)]]

    def _draw(self, generator: torch.Generator) -> Example:
        def below(n: int) -> int:
            return int(torch.randint(n, (), generator=generator))

        number = below(len(self.scans))
        scan, centres = self.scans[number], self.centres[number]
        centre, patch = centres[below(len(centres))].tolist(), self.recipe.patch
        starts = [min(max(0, c - patch // 2), max(0, n - patch))
                  for c, n in zip(centre, scan.grid.shape, strict=True)]
        x, y, z = (slice(start, start + patch) for start in starts)
        chosen = (subsample(scan.acquisition, generator)
                  if self.recipe.subsample and scan.acquisition is not None else None)
        return cut(scan, (x, y, z), chosen, self.corruption, generator)


def subsample(acquisition: Acquisition, generator: torch.Generator) -> Int[np.ndarray, " n"]:
    """Choose random shells, at least one, and of each MIN_DIRECTIONS or more directions.

    The directions are uniformly random, so that tables are as uneven as they come.
    """
    shells = acquisition.shells
    count = 1 + int(torch.randint(len(shells), (), generator=generator))
    chosen = []
    for i in torch.randperm(len(shells), generator=generator)[:count].tolist():
        size = len(shells[i])
        keep = MIN_DIRECTIONS + int(torch.randint(size - MIN_DIRECTIONS + 1, (),
                                                  generator=generator))
        chosen.append(shells[i].indices[torch.randperm(size, generator=generator)[:keep].numpy()])
    return np.sort(np.concatenate(chosen))


@dataclass(frozen=True)
class Task:
    """The data, the outputs and the loss of a training.

    Parameters
    ----------
    read : callable
        Name of a run → Labelled. It raises Refusal for a run without labels.
    outputs : int, optional
        Number of outputs of a voxel; None for S/S0 of the measurements.
    loss : callable
        (output (out, x, y, z), example) → scalar to minimise.
    measure : callable
        (output, example) → metrics by name, of the validation.
    corruption : Corruption, optional
        What is done to the input.
    """

    read: Callable[[str], Labelled]
    outputs: int | None
    loss: Callable[[torch.Tensor, Example], torch.Tensor]
    measure: Callable[[torch.Tensor, Example], Mapping[str, float]]
    corruption: Corruption | None = None


def fit(method: Trainable, task: Task, cohort: Cohort, settings: TrainingSettings, *,
        intended_use: str, start: Checkpoint | None) -> tuple[str, Checkpoint]:
    """Train a network on the runs of a cohort.

    Parameters
    ----------
    method : Trainable
        Its training.toml has a Recipe.
    task : Task
    cohort : Cohort
    settings : TrainingSettings
    intended_use : str
        Text of the card.
    start : Checkpoint, optional
        Weights whose encoder starts the network.

    Returns
    -------
    name : str
        Name of the model.
    checkpoint : Checkpoint

    Raises
    ------
    UsageError
        Fewer than two participants have labels, or the table cannot be that of a network.
    """
    began = time.monotonic()
    table = method.settings("training")
    recipe = read_recipe(table)
    channels = choose_channels(recipe, cohort, start)
    with scratch.temporary(settings.states) as folder:
        scans = read_scans(method.name, task, cohort, channels, folder)
        held = cohort.hold_out(recipe.held_out, settings.seed, method.name, list(scans))
        learners = [scan for run, scan in scans.items() if run not in held]
        validation = Validation([scan for run, scan in scans.items() if run in held],
                                recipe.patch, task.corruption, settings.seed)
        network, description = initial_network(recipe, task.outputs, channels, settings.seed,
                                               start, method.name)
        kind = f"b{round(channels.b, -2):.0f}n{len(channels.directions)}" if (
            channels.directions) else ANY
        name = f"{method.name}_{kind}"
        digest = hashlib.sha256(repr((
            __version__, description, channels, {**table, "schedule": replace(
                recipe.schedule, steps=1)}, sorted(scans), sorted(held),
            start and start.card.sha256)).encode()).hexdigest()
        history = train(network, Sampler(learners, recipe, task.corruption), validation,
                        task.loss, recipe.schedule, settings,
                        settings.states / f"{name}.{digest[:8]}.ckpt" if settings.states else None,
                        name)
        metrics = evaluate(network, validation, task.measure)
    return name, Checkpoint(dict(network.state_dict()), Card(
        method=method.name, network=description,
        trained_for=describe_domain(cohort, scans, channels, recipe.subsample),
        training={"runs": len(scans), "validation_runs": len(held), "batch": recipe.batch,
                  "patch": recipe.patch, "steps": int(history[-1]["step"]),
                  "validation": min(row["validation"] for row in history),
                  "corruption": asdict(task.corruption) if task.corruption else None,
                  "degree": min((s.degree for s in scans.values() if s.degree is not None),
                                default=None),
                  "seconds": round(time.monotonic() - began), "device": settings.device,
                  "start": start.card.sha256 if start else "random", "data": "runs of the cohort"},
        intended_use=intended_use, seed=settings.seed,
        versions={"qsphere": __version__, "torch": torch.__version__}, metrics=metrics,
        constants={"channels": asdict(channels)}))


def read_recipe(table: Mapping[str, Any]) -> Recipe:
    """Read the Recipe in the table `training` of a training.toml; other keys are the method's."""
    names = {f.name for f in fields(Recipe)}
    return Recipe(**{**{k: v for k, v in table.items() if k in names},
                     "schedule": training.Schedule(**table["schedule"])})


def read_scans(name: str, task: Task, cohort: Cohort, channels: Channels, folder: Path
               ) -> dict[str, Scan]:
    """Read the runs of a cohort that have labels, each onto the grid of the network."""
    scans = {}
    for run in track(list(cohort.acquisitions), f"{name}: reading"):
        try:
            scans[run] = prepare(task.read(run), channels, folder, run)
        except Refusal as refusal:
            log.warning("--train %s: %s is left out: %s", name, run, refusal)
    return scans


def train(network: nn.Module, draw: Callable[..., Any],
          validation: Iterable[Example], loss: Callable[[torch.Tensor, Example], torch.Tensor],
          schedule: training.Schedule, settings: TrainingSettings, saved: Path | None, name: str
          ) -> list[dict[str, float]]:
    """Train a network in place (`training.train`), and validate on the mean loss of examples.

    Returns
    -------
    list of dict
        History of `training.train`.
    """
    def mean_loss(model: nn.Module, minibatch: Sequence[Example]) -> torch.Tensor:
        minibatch = [one.to(settings.device) for one in minibatch]
        outputs = model([one.ratio for one in minibatch], [one.table for one in minibatch])
        return torch.stack([loss(output, one) for output, one in zip(
            outputs, minibatch, strict=True)]).mean()

    schedule = replace(schedule, steps=settings.max_steps or schedule.steps)
    return training.train(
        network, draw, mean_loss, schedule, seed=settings.seed, device=settings.device,
        saved=saved, devices=settings.devices, name=name,
        validate=lambda model: float(np.mean([float(mean_loss(model, [one]))
                                              for one in validation])))


@torch.inference_mode()
def evaluate(network: nn.Module, examples: Iterable[Example],
             measure: Callable[[torch.Tensor, Example], Mapping[str, float]]) -> dict[str, float]:
    """Average the metrics of examples."""
    device = next(network.parameters()).device
    rows = [measure(network([one.ratio], [one.table])[0], one)
            for one in (example.to(device) for example in examples)]
    return {key: float(np.mean([row[key] for row in rows])) for key in rows[0]}


def load_start(folder: Path) -> Checkpoint:
    """Load the checkpoint of --init: of a pretraining, or of another task.

    Raises
    ------
    UsageError
        It cannot be read, or is not of a network on volumes.
    """
    try:
        start = load(folder)
    except DataError as error:
        raise UsageError(f"--init: {error}") from error
    if start.card.network.get("architecture") != "volumetric":
        raise UsageError(f"--init: {folder} holds weights of {start.card.method}, which has no "
                         "encoder of volumes. Needed are those of pretrain_artifacts, or of a "
                         "task that was trained from it.")
    return start


def choose_start(method: Trainable, init: Path | None) -> Checkpoint | None:
    """Load the checkpoint of --init, or else the bundled pretraining if the recipe of the method
    asks for it and has its network; None for random weights. The log names it.

    Raises
    ------
    UsageError
        --init cannot be used, or --set changes what it determines.
    """
    recipe = read_recipe(method.settings("training"))
    start = load_start(init) if init else None
    if start:
        of_table = not start.card.network["any_table"]
        fixed = ("training.network", "training.input", *["training.voxel"] * of_table)
        if changed := [path for path in method.changed_settings if path.startswith(fixed)]:
            raise UsageError(f"--set {method.name}.{changed[0].removeprefix('training.')}: the "
                             "network of --init determines it. Leave one of the two options out.")
    elif recipe.start == BUNDLED and recipe.input == ANY and (
            bundled := bundled_weights(PRETRAINING)) and (
            recipe.network.items() <= bundled.card.network.items()):
        start = bundled
    log.info("--train %s: starts from %s", method.name,
             init or f"the encoder of the bundled {PRETRAINING}" if start else "random weights")
    for warning in start.card.warnings if start else ():
        log.warning("--train %s: of the weights that it starts from: %s", method.name, warning)
    return start


def initial_network(recipe: Recipe, outputs: int | None, channels: Channels, seed: int,
                    start: Checkpoint | None, method: str = "") -> tuple[nn.Module, dict[str, Any]]:
    """Build a network, with the encoder of a checkpoint if there is one, and its head if that has
    the same outputs and is of the same method.

    The checkpoint also determines width, levels, channels and whether it takes any table.

    Returns
    -------
    network : torch.nn.Module
    description : dict
        Its architecture, for the card.
    """
    description = {**(start.card.network if start else recipe.network), "outputs": outputs}
    if not start:
        description |= {"any_table": not channels.directions}
        if channels.directions:
            description["channels"] = len(channels.directions)
    with training.seeded(seed):
        network = build_network(description)
    if start:
        same = start.card.method == method and start.card.network == description
        (start if same else start.part(ENCODER)).into(
            network if same else network.get_submodule(ENCODER))
    return network, description


def choose_channels(recipe: Recipe, cohort: Cohort, start: Checkpoint | None) -> Channels:
    """Choose voxel size and table of a network.

    They are those of the runs of --reference-batch, or of all runs: the voxel of the recipe, or
    the median of the runs' shortest edges; the table, if it is not any, is the largest shell of
    the first run. A checkpoint of one table determines both.

    Raises
    ------
    UsageError
        There is no run of the site, or the first one cannot serve as the table.
    """
    if start and not start.card.network["any_table"]:
        return Channels(**start.card.constants["channels"])
    site = cohort.statistics.set_index("run")["batch"].astype(str)
    runs = [run for run in cohort.acquisitions
            if cohort.reference_batch in (None, str(site[run]))]
    if not runs:
        raise UsageError(f"--reference-batch {cohort.reference_batch}: no run is of that site; "
                         f"there are {', '.join(sorted(set(site)))}. Name one of them, or leave "
                         "the option out.")
    voxel = recipe.voxel or float(np.median([min(cohort.voxel_sizes[run]) for run in runs]))
    if start or recipe.input == ANY:
        return Channels(round(voxel, 3))
    acquisition = cohort.acquisitions[runs[0]]
    shells = inputs.usable_shells(acquisition)
    if not shells:
        raise UsageError(f"{runs[0]} has no shell of {MIN_DIRECTIONS} directions, and its table "
                         "would be that of the network. Choose another site with "
                         "--reference-batch, or leave the run out.")
    assert cohort.load
    shell = max(shells, key=len)
    axes = Grid.over(cohort.load(runs[0])).directions(acquisition.bvecs[shell.indices])
    return Channels(round(voxel, 3), axes.round(6).tolist(), round(shell.b, 1))


def describe_domain(cohort: Cohort, runs: Collection[str], channels: Channels, subsampled: bool
                    ) -> TrainingDomain:
    """Describe the acquisitions that a network may be applied to."""
    of_runs = [inputs.usable_shells(cohort.acquisitions[run]) for run in runs]
    if channels.directions:
        of_runs = [[channels.nearest(shells)] for shells in of_runs]
    b = [channels.b] if channels.directions else [s.b for shells in of_runs for s in shells]
    sizes = [len(s) for shells in of_runs for s in shells]
    most = max(map(len, of_runs))
    snr = cohort.statistics.set_index("run").get("snr_b0", pd.Series(dtype=float))
    levels = [float(v) for run, v in snr.items() if run in runs and v is not None
              and math.isfinite(v)]
    fewest = MIN_DIRECTIONS if subsampled or channels.directions else min(sizes)
    return TrainingDomain(
        (ShellRange((round((1 - WIDEN) * min(b), 1), round((1 + WIDEN) * max(b), 1)), 1.0,
                    (fewest, max(sizes))),),
        b0=(1, max(int(cohort.acquisitions[run].b0.sum()) for run in runs)),
        shell_count=(1, most), snr=(min(levels), max(levels)) if levels else None)
