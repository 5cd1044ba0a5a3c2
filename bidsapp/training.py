"""The only optimisation loop: seeded, resumable, on one device or many (Lightning Fabric).

Batches from step k on, drawn some at a time on rank r, and what the network itself leaves to chance
in step k (dropout), come from generators seeded by (seed, k, r) alone, so a training that was
interrupted and resumed gives the weights of one that was not.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bidsapp.errors import DataError, UsageError
from bidsapp.progress import time_left

log = logging.getLogger("qsphere")

Minibatch = tuple[torch.Tensor, ...]

LOG_EVERY = 60.0
"""Seconds between lines in the log, where no terminal shows a bar."""

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
DECAYS = ("constant", "step", "cosine", "plateau")


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: a table of a method's training.toml.

    steps: optimiser steps. learning_rate: at the start. optimizer: adam, adamw or sgd. decay:
    constant; step (÷ 10 after 50 % and 75 % of the steps); cosine (to 0 at the end); plateau (×
    factor after `plateau` validations without progress). validate_every: steps between validations,
    which are when the state is saved, too. patience: validations without progress after which to
    stop, None for never. clip: greatest norm of the gradient, None for any. precision: Fabric's.
    betas: Adam's; the first is also the momentum of sgd.

    Raises:
        UsageError: a value outside these.
    """

    steps: int
    learning_rate: float
    optimizer: str = "adam"
    decay: str = "constant"
    weight_decay: float = 0.0
    validate_every: int = 1000
    patience: int | None = None
    clip: float | None = None
    precision: str = "32-true"
    factor: float = 0.1
    plateau: int = 4
    betas: Sequence[float] = (0.9, 0.999)

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS or self.decay not in DECAYS:
            raise UsageError(f"a schedule with optimizer {self.optimizer!r} and decay "
                             f"{self.decay!r}: known are {', '.join(OPTIMIZERS)}; "
                             f"{', '.join(DECAYS)}.")
        if (min(self.steps, self.validate_every, self.patience or 1, self.plateau) < 1
                or self.learning_rate <= 0 or not 0 < self.factor < 1):
            raise UsageError(f"a schedule of {self.steps} steps, validated every "
                             f"{self.validate_every} with patience {self.patience}, at learning "
                             f"rate {self.learning_rate}, × {self.factor} after a plateau of "
                             f"{self.plateau}: all must be positive, the factor below 1.")


def processes() -> tuple[int, tuple[int, int]]:
    """Rank of this process, and devices per node and nodes, as torchrun or srun started them for
    one training; 0 and (1, 1) of a process alone.

    Raises:
        UsageError: srun was not told how many processes each node runs.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        rank, world, devices = (int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return rank, (devices, world // devices)
    # a batch script has a rank, too, but no step
    world, nodes = (int(env.get(f"SLURM_STEP_NUM_{k}", 1)) for k in ("TASKS", "NODES"))
    if world == 1:
        return 0, (1, 1)
    if "SLURM_NTASKS_PER_NODE" not in env:  # Fabric would refuse it, later
        raise UsageError(f"srun started {world} processes on {nodes} nodes by --ntasks. Needed is "
                         f"srun --nodes {nodes} --ntasks-per-node {world // nodes}.")
    return int(env["SLURM_PROCID"]), (world // nodes, nodes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's global generator seeded inside, and as it was afterwards: for initial weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(model: nn.Module, draw: Callable[[torch.Generator], Sequence[Minibatch]],
          loss: Callable[[nn.Module, Minibatch], torch.Tensor], schedule: Schedule, *, seed: int,
          device: str, validate: Callable[[nn.Module], float] | None = None,
          saved: Path | None = None, devices: tuple[int, int] = (1, 1), name: str = "training"
          ) -> list[dict[str, float]]:
    """Optimise `model` in place; it is left in eval mode, at its best validation if there is one.

    Args:
        draw: the batches of the next steps, one or more, from a generator, on its device.
        loss: (model, batch) → scalar to be made small.
        validate: model in eval mode → number to be made small, the same on every rank.
        saved: file in which the state is kept, and from which a training is taken up again, with
            the same or another number of steps: cosine and step decay then follow the new number
            from the step of the state on, and a state of as many steps or more is what results.
        devices: per node, and nodes, as of `processes`; each draws its own batches, and gradients
            are averaged.

    Returns:
        One row per validation: step, loss (mean since the last one), learning_rate, validation,
        seconds (interruptions left out).

    Raises:
        DataError: the loss is not finite.
        UsageError: `saved` holds another training.
    """
    fabric = _fabric(device, devices, schedule.precision)

    def chance(step: int) -> torch.Generator:
        state = np.random.SeedSequence([seed, step, fabric.global_rank]).generate_state(
            1, np.uint64)
        return torch.Generator(fabric.device).manual_seed(int(state[0] >> 1))

    with seeded(seed):
        optimizer = _optimizer(schedule, model)
        decay = _decay(schedule, optimizer)
        wrapped, stepper = fabric.setup(model, optimizer)
        state: dict[str, Any] = {
            "model": wrapped, "optimizer": stepper, "decay": decay.state_dict(), "step": 0,
            "drawn": 0, "best": math.inf, "best_model": {}, "waited": 0, "history": [],
            "of": {"schedule": asdict(schedule), "seed": seed}}
        if saved and saved.exists():
            other_length = _resume(fabric, saved, state, schedule, name)
            new = {k: v for k, v in decay.state_dict().items() if k in ("T_max", "milestones")}
            decay.load_state_dict({**state["decay"], **new})
            if other_length and schedule.decay in ("step", "cosine"):
                for group in stepper.param_groups:
                    group["lr"] = _rate(schedule, state["step"])
        with tqdm(total=schedule.steps, initial=state["step"], desc=name,
                  disable=None if fabric.is_global_zero else True) as bar:
            total = 0.0  # of the losses since the last validation
            queue: deque[Minibatch] = deque()
            if state["step"] > state["drawn"]:
                queue.extend(draw(chance(state["drawn"]))[state["step"] - state["drawn"]:])
            began = time.monotonic() - (state["history"][-1]["seconds"] if state["history"] else 0)
            last = start = state["step"]
            session = silent_since = time.monotonic()
            speaks = bar.disable and fabric.is_global_zero
            if speaks and start == 0:
                log.info("%s: training for %d steps%s", name, schedule.steps,
                         " at most" if schedule.patience else "")
            for step in range(state["step"], schedule.steps):
                if schedule.patience and state["waited"] >= schedule.patience:
                    break
                model.train()
                if not queue:
                    state["drawn"] = step
                    queue.extend(draw(chance(step)))
                torch.manual_seed(chance(step).initial_seed())
                stepper.zero_grad()
                value = loss(wrapped, queue.popleft())
                fabric.backward(value)
                if schedule.clip:
                    fabric.clip_gradients(wrapped, stepper, max_norm=schedule.clip)
                stepper.step()
                if schedule.decay != "plateau":
                    decay.step()
                total += float(value.detach())
                bar.update()
                state["step"] = step + 1
                if speaks and time.monotonic() - silent_since >= LOG_EVERY:
                    silent_since = time.monotonic()
                    log.info("%s: step %d of %d, loss %.4g%s%s", name, step + 1, schedule.steps,
                             total / (step + 1 - last), _validated(state),
                             time_left(time.monotonic() - session, step + 1 - start,
                                       schedule.steps - start))
                if (step + 1) % schedule.validate_every and step + 1 < schedule.steps:
                    continue
                if not math.isfinite(total):
                    raise DataError(f"{name}: the loss is {total} at step {step + 1}. Lower the "
                                    f"learning rate (now {schedule.learning_rate:g}), or check the "
                                    "training data for values that are not finite.")
                row = {"step": step + 1.0, "loss": total / (step + 1 - last),
                       "learning_rate": stepper.param_groups[0]["lr"]}
                total, last = 0.0, step + 1
                if validate:
                    row["validation"] = _validate(model, validate, state)
                if schedule.decay == "plateau":
                    decay.step(row.get("validation", row["loss"]))
                row["seconds"] = time.monotonic() - began
                bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "step"})
                state["history"].append(row)
                state["decay"] = decay.state_dict()
                if saved:
                    part = saved.with_suffix(".part")
                    fabric.save(part, state)
                    if fabric.is_global_zero:
                        part.replace(saved)
                    fabric.barrier()
    if state["best_model"]:
        model.load_state_dict(state["best_model"])
    model.eval()
    return state["history"]


def _fabric(device: str, devices: tuple[int, int], precision: str) -> Any:
    """Set up the devices of a training, and start the processes where there are several."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    kind, _, number = device.partition(":")
    several = devices != (1, 1)
    fabric = Fabric(accelerator=kind, num_nodes=devices[1],
                    devices=[int(number)] if number and not several else devices[0],
                    precision=precision,  # type: ignore[arg-type]
                    # one process alone must not take a SLURM job around it for its own
                    plugins=None if several else LightningEnvironment())
    if several:
        fabric.launch()
    return fabric


def _optimizer(schedule: Schedule, model: nn.Module) -> torch.optim.Optimizer:
    betas = ({"momentum": schedule.betas[0]} if schedule.optimizer == "sgd"
             else {"betas": tuple(schedule.betas)})
    kind: Any = OPTIMIZERS[schedule.optimizer]
    return kind(model.parameters(), lr=schedule.learning_rate,
                weight_decay=schedule.weight_decay, **betas)


def _validate(model: nn.Module, validate: Callable[[nn.Module], float], state: dict[str, Any]
              ) -> float:
    """Validate, and keep the weights in the state if they are the best so far."""
    model.eval()
    with torch.no_grad():
        found = float(validate(model))
    better = found < state["best"]
    state["waited"] = 0 if better else state["waited"] + 1
    if better:
        state["best"] = found
        state["best_model"] = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    return found


def _decay(schedule: Schedule, optimizer: torch.optim.Optimizer) -> Any:
    rates = torch.optim.lr_scheduler
    if schedule.decay == "plateau":
        return rates.ReduceLROnPlateau(optimizer, factor=schedule.factor,
                                       patience=schedule.plateau - 1)
    if schedule.decay == "cosine":
        return rates.CosineAnnealingLR(optimizer, schedule.steps)
    return rates.MultiStepLR(optimizer, _drops(schedule) if schedule.decay == "step" else [])


def _rate(schedule: Schedule, step: int) -> float:
    """Learning rate of `step` by a decay whose only argument is the number of steps."""
    if schedule.decay == "cosine":
        return schedule.learning_rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
    return schedule.learning_rate * 0.1 ** sum(step >= at for at in _drops(schedule))


def _drops(schedule: Schedule) -> list[int]:
    """Steps at which the `step` decay divides the learning rate by 10."""
    return [schedule.steps // 2, schedule.steps * 3 // 4]


def _validated(state: Mapping[str, Any]) -> str:
    """Say what the last validation gave, and the best; empty where there was none."""
    rows = [row for row in state["history"] if "validation" in row]
    return (f", validation {rows[-1]['validation']:.4g} at step {rows[-1]['step']:.0f} (best "
            f"{state['best']:.4g})") if rows else ""


def _resume(fabric: Any, saved: Path, state: dict[str, Any], schedule: Schedule, name: str
            ) -> bool:
    """Load the state of an interrupted training. True if it was to have another number of steps."""
    of = state["of"]
    try:
        found = fabric.load(saved, {}, weights_only=True)["of"]
        # fields that a schedule had not yet when the state was saved stand at their defaults
        found = {**found, "schedule": asdict(Schedule(**found["schedule"]))}
    except Exception as error:  # whatever pickle and zip make of a broken file
        raise UsageError(f"{saved}: cannot be read as the state of a training ({error}). Remove "
                         "it to start again.") from error
    if {**found, "schedule": {**found["schedule"], "steps": schedule.steps}} != of:
        differ = {k: (v, of["schedule"].get(k)) for k, v in found["schedule"].items()
                  if v != of["schedule"].get(k) and k != "steps"} or {
                      "seed": (found["seed"], of["seed"])}
        raise UsageError(f"{saved}: belongs to another training: (its, asked for) {differ}. Remove "
                         "it to start again, or ask for what it holds.")
    fabric.load(saved, state, weights_only=True)
    state["of"] = of
    before, step = found["schedule"]["steps"], state["step"]
    if fabric.is_global_zero and step >= schedule.steps:
        log.info("%s: %s holds %d steps, %d were asked for; it is taken as it is, without further "
                 "training", name, saved, step, schedule.steps)
    elif fabric.is_global_zero:
        log.info("%s: resumed at step %d of %d%s from %s", name, step, schedule.steps,
                 f" (before: of {before})" if before != schedule.steps else "", saved)
    return before != schedule.steps
