"""The only optimisation loop: seeded, resumable, on one device or several (Lightning Fabric).

The minibatches that rank r draws at step k, and the dropout of the network in step k, come from
generators seeded by (seed, k, r) alone. A training that was interrupted and resumed therefore gives
the same weights as one that was not.
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
from typing import Any, TypeVar

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from bidsapp.errors import DataError, UsageError
from bidsapp.progress import time_left

log = logging.getLogger("qsphere")

Minibatch = TypeVar("Minibatch")
"""The training data of one step: each training has a type of its own, usually a NamedTuple."""

LOG_EVERY = 60.0
"""Seconds between two lines in the log if no terminal shows a progress bar."""

OPTIMIZERS = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
DECAYS = ("constant", "step", "cosine", "plateau")


@dataclass(frozen=True)
class Schedule:
    """Length, optimiser and learning rate of a training: a table of a method's training.toml.

    Parameters
    ----------
    steps : int
        Number of optimiser steps.
    learning_rate : float
        Learning rate of the first step.
    optimizer : str
        `adam`, `adamw` or `sgd`.
    decay : str
        `constant`; `step` (÷ 10 after 50 % and after 75 % of the steps); `cosine` (to 0 at the
        end); `plateau` (× `factor` after `plateau` validations without progress).
    weight_decay : float
        Weight decay of the optimiser.
    validate_every : int
        Steps between validations. The state is saved at each validation.
    patience : int, optional
        Validations without progress after which the training stops; None: it never stops early, nor
        does a training without validation.
    clip : float, optional
        Largest norm of the gradient; None: no limit.
    precision : str
        Precision of the computation, as Lightning Fabric names it.
    factor : float
        Factor of the learning rate at a plateau, between 0 and 1.
    plateau : int
        Validations without progress (of the training loss, if there is no validation) that make a
        plateau.
    betas : sequence of float
        β₁ and β₂ of Adam; β₁ is also the momentum of `sgd`.

    Raises
    ------
    UsageError
        A value is outside of these.
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
            raise UsageError(f"the schedule has optimizer {self.optimizer!r} and decay "
                             f"{self.decay!r}. The optimizer must be one of "
                             f"{', '.join(OPTIMIZERS)}, the decay one of {', '.join(DECAYS)}.")
        if (min(self.steps, self.validate_every, self.patience or 1, self.plateau) < 1
                or self.learning_rate <= 0 or not 0 < self.factor < 1):
            raise UsageError(f"the schedule has steps {self.steps}, validate_every "
                             f"{self.validate_every}, patience {self.patience}, learning_rate "
                             f"{self.learning_rate}, factor {self.factor} and plateau "
                             f"{self.plateau}. All must be positive, and the factor must be below "
                             "1.")


def processes() -> tuple[int, tuple[int, int]]:
    """Read from the environment how torchrun or srun started the processes of one training.

    Returns
    -------
    rank : int
        Rank of this process; 0 if it is alone.
    devices : tuple of int
        Devices per node, and number of nodes; (1, 1) for a process that is alone.

    Raises
    ------
    UsageError
        srun was not told how many processes each node runs.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        rank, world, devices = (int(env[k]) for k in ("RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        return rank, (devices, world // devices)
    # a SLURM batch script has a rank as well, but no job step
    world, nodes = (int(env.get(f"SLURM_STEP_NUM_{k}", 1)) for k in ("TASKS", "NODES"))
    if world == 1:
        return 0, (1, 1)
    if "SLURM_NTASKS_PER_NODE" not in env:  # Fabric would refuse it later
        raise UsageError(f"srun started {world} processes on {nodes} nodes, but not with "
                         "--ntasks-per-node. Start the training with "
                         f"srun --nodes {nodes} --ntasks-per-node {world // nodes}.")
    return int(env["SLURM_PROCID"]), (world // nodes, nodes)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed torch's global generator inside the block, and restore its state afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def train(model: nn.Module, draw: Callable[[torch.Generator], Sequence[Minibatch]],
          loss: Callable[[nn.Module, Minibatch], torch.Tensor], schedule: Schedule, *, seed: int,
          device: str, validate: Callable[[nn.Module], float] | None = None,
          saved: Path | None = None, devices: tuple[int, int] = (1, 1), name: str = "training"
          ) -> list[dict[str, float]]:
    """Optimise a model in place, and leave it in eval mode with its best weights.

    The best weights are those of the best validation; without validation they are the last ones.

    Parameters
    ----------
    model : torch.nn.Module
        Model to optimise.
    draw : callable
        generator → minibatches of the next steps, one or more. They are drawn from the generator
        alone, on its device.
    loss : callable
        (model, minibatch) → scalar to minimise.
    schedule : Schedule
        Length, optimiser and learning rate.
    seed : int
        Seed of everything that is random.
    device : str
        `cpu`, `cuda` or `cuda:N`.
    validate : callable, optional
        Model in eval mode → scalar to minimise. It must return the same value on every rank.
    saved : Path, optional
        File of the training's state. If it exists, the training is resumed from it. The number of
        steps may then differ: cosine and step decay follow the new number from the step of the
        state on, and a state of that many steps or more is the result as it is.
    devices : tuple of int
        Devices per node, and number of nodes, as `processes` returns them. Each device draws its
        own minibatches, and the gradients are averaged.
    name : str
        Name of the training in the log.

    Returns
    -------
    list of dict
        One row for each validation: `step`, `loss` (mean since the previous row), `learning_rate`,
        `validation`, `seconds` (without interruptions).

    Raises
    ------
    DataError
        The mean loss between two validations is not finite.
    UsageError
        `saved` cannot be read, or belongs to another training.
    """
    fabric = _fabric(device, devices, schedule.precision)

    def generator_at(step: int) -> torch.Generator:
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
            _resume(fabric, saved, state, schedule, decay, name)
        minibatches = _minibatches(draw, generator_at, state)
        began = time.monotonic() - (state["history"][-1]["seconds"] if state["history"] else 0)
        with _Progress(name, schedule, state, fabric.is_global_zero) as progress:
            loss_sum, count = 0.0, 0  # since the last validation
            for step in range(state["step"], schedule.steps):
                if schedule.patience and state["waited"] >= schedule.patience:
                    break
                model.train()
                minibatch = next(minibatches)
                torch.manual_seed(generator_at(step).initial_seed())
                loss_sum += _step(fabric, wrapped, stepper, loss, minibatch, schedule.clip)
                count += 1
                if schedule.decay != "plateau":
                    decay.step()
                state["step"] = step + 1
                progress.advance(loss_sum / count)
                if (step + 1) % schedule.validate_every and step + 1 < schedule.steps:
                    continue
                if not math.isfinite(loss_sum):
                    raise DataError(f"{name}: the loss is {loss_sum} at step {step + 1}. Lower the "
                                    f"learning rate (now {schedule.learning_rate:g}), or check the "
                                    "training data for values that are not finite.")
                row = {"step": step + 1.0, "loss": loss_sum / count,
                       "learning_rate": stepper.param_groups[0]["lr"]}
                loss_sum, count = 0.0, 0
                if validate:
                    row["validation"] = _validate(model, validate, state)
                if schedule.decay == "plateau":
                    decay.step(row.get("validation", row["loss"]))
                row["seconds"] = time.monotonic() - began
                progress.show(row)
                state["history"].append(row)
                state["decay"] = decay.state_dict()
                if saved:
                    _save(fabric, saved, state)
    if state["best_model"]:
        model.load_state_dict(state["best_model"])
    model.eval()
    return state["history"]


def _minibatches(draw: Callable[[torch.Generator], Sequence[Minibatch]],
                 generator_at: Callable[[int], torch.Generator], state: dict[str, Any]
                 ) -> Iterator[Minibatch]:
    """Yield the minibatches from the step of the state on.

    `drawn` in the state is the step of the last call of `draw`, so that a resumed training can draw
    the same minibatches again.
    """
    queue: deque[Minibatch] = deque()
    if state["step"] > state["drawn"]:
        queue.extend(draw(generator_at(state["drawn"]))[state["step"] - state["drawn"]:])
    while True:
        if not queue:
            state["drawn"] = state["step"]
            queue.extend(draw(generator_at(state["drawn"])))
        yield queue.popleft()


def _step(fabric: Any, model: nn.Module, optimizer: Any,
          loss: Callable[[nn.Module, Minibatch], torch.Tensor], minibatch: Minibatch,
          clip: float | None) -> float:
    """Take one step of the optimiser, and return the loss before it."""
    optimizer.zero_grad()
    value = loss(model, minibatch)
    fabric.backward(value)
    if clip:
        fabric.clip_gradients(model, optimizer, max_norm=clip)
    optimizer.step()
    return float(value.detach())


def _save(fabric: Any, saved: Path, state: dict[str, Any]) -> None:
    """Replace the file of the state."""
    part = saved.with_suffix(".part")
    fabric.save(part, state)
    if fabric.is_global_zero:
        part.replace(saved)
    fabric.barrier()


class _Progress:
    """The progress of a training: a bar on a terminal, else lines in the log."""

    def __init__(self, name: str, schedule: Schedule, state: Mapping[str, Any], is_first: bool
                 ) -> None:
        self.name, self.steps, self.state = name, schedule.steps, state
        self.first_step = state["step"]
        self.bar = tqdm(total=schedule.steps, initial=self.first_step, desc=name,
                        disable=None if is_first else True)
        self.began = self.logged = time.monotonic()
        self.logs = self.bar.disable and is_first
        if self.logs and self.first_step == 0:
            log.info("%s: training for %d steps%s", name, schedule.steps,
                     " at most" if schedule.patience else "")

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def advance(self, loss: float) -> None:
        """Report one more step. loss: mean since the last validation."""
        self.bar.update()
        now, step = time.monotonic(), self.state["step"]
        if self.logs and now - self.logged >= LOG_EVERY:
            self.logged = now
            log.info("%s: step %d of %d, loss %.4g%s%s", self.name, step, self.steps, loss,
                     _describe_validation(self.state),
                     time_left(now - self.began, step - self.first_step,
                               self.steps - self.first_step))

    def show(self, row: Mapping[str, float]) -> None:
        """Show the values of a validation beside the bar."""
        self.bar.set_postfix({k: f"{v:.3g}" for k, v in row.items() if k != "step"})


def _fabric(device: str, devices: tuple[int, int], precision: str) -> Any:
    """Set up the devices of a training; launch it in each process if there are several."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments import LightningEnvironment

    accelerator, _, number = device.partition(":")
    several = devices != (1, 1)
    fabric = Fabric(accelerator=accelerator, num_nodes=devices[1],
                    devices=[int(number)] if number and not several else devices[0],
                    precision=precision,  # type: ignore[arg-type]
                    # a single process must ignore the SLURM job that it runs in
                    plugins=None if several else LightningEnvironment())
    if several:
        fabric.launch()
    return fabric


def _optimizer(schedule: Schedule, model: nn.Module) -> torch.optim.Optimizer:
    betas = ({"momentum": schedule.betas[0]} if schedule.optimizer == "sgd"
             else {"betas": tuple(schedule.betas)})
    optimizer: Any = OPTIMIZERS[schedule.optimizer]
    return optimizer(model.parameters(), lr=schedule.learning_rate,
                     weight_decay=schedule.weight_decay, **betas)


def _validate(model: nn.Module, validate: Callable[[nn.Module], float], state: dict[str, Any]
              ) -> float:
    """Validate the model, and keep its weights in the state if they are the best so far."""
    model.eval()
    with torch.no_grad():
        value = float(validate(model))
    better = value < state["best"]
    state["waited"] = 0 if better else state["waited"] + 1
    if better:
        state["best"] = value
        state["best_model"] = {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
    return value


def _decay(schedule: Schedule, optimizer: torch.optim.Optimizer) -> Any:
    rates = torch.optim.lr_scheduler
    if schedule.decay == "plateau":
        return rates.ReduceLROnPlateau(optimizer, factor=schedule.factor,
                                       patience=schedule.plateau - 1)
    if schedule.decay == "cosine":
        return rates.CosineAnnealingLR(optimizer, schedule.steps)
    return rates.MultiStepLR(optimizer, _drops(schedule) if schedule.decay == "step" else [])


def _rate(schedule: Schedule, step: int) -> float:
    """Learning rate at a step, for cosine and step decay."""
    if schedule.decay == "cosine":
        return schedule.learning_rate * (1 + math.cos(math.pi * step / schedule.steps)) / 2
    return schedule.learning_rate * 0.1 ** sum(step >= at for at in _drops(schedule))


def _drops(schedule: Schedule) -> list[int]:
    """Steps at which step decay divides the learning rate by 10."""
    return [schedule.steps // 2, schedule.steps * 3 // 4]


def _describe_validation(state: Mapping[str, Any]) -> str:
    """Describe the last and the best validation; empty before the first."""
    rows = [row for row in state["history"] if "validation" in row]
    return (f", validation {rows[-1]['validation']:.4g} at step {rows[-1]['step']:.0f} (best "
            f"{state['best']:.4g})") if rows else ""


def _resume(fabric: Any, saved: Path, state: dict[str, Any], schedule: Schedule, decay: Any,
            name: str) -> None:
    """Load the state of an interrupted training, and adapt the decay to the new number of steps."""
    new = state["of"]
    try:
        old = fabric.load(saved, {}, weights_only=True)["of"]
        # fields that were added to Schedule after the state was saved have their defaults
        old = {**old, "schedule": asdict(Schedule(**old["schedule"]))}
    except Exception as error:  # pickle and zip raise many kinds on a broken file
        raise UsageError(f"{saved}: cannot be read as the state of a training ({error}). Remove "
                         "the file to start again.") from error
    if {**old, "schedule": {**old["schedule"], "steps": schedule.steps}} != new:
        differences = {k: (v, new["schedule"].get(k)) for k, v in old["schedule"].items()
                       if v != new["schedule"].get(k) and k != "steps"} or {
                           "seed": (old["seed"], new["seed"])}
        raise UsageError(f"{saved}: belongs to another training. The values (in the file, now) "
                         f"differ: {differences}. Remove the file to start again, or give the "
                         "values in it.")
    fabric.load(saved, state, weights_only=True)
    state["of"] = new
    before, step = old["schedule"]["steps"], state["step"]
    if fabric.is_global_zero and step >= schedule.steps:
        log.info("%s: %s holds %d steps, %d were asked for; it is used as it is, without further "
                 "training", name, saved, step, schedule.steps)
    elif fabric.is_global_zero:
        log.info("%s: resumed at step %d of %d%s from %s", name, step, schedule.steps,
                 f" (before: of {before})" if before != schedule.steps else "", saved)
    length = {k: v for k, v in decay.state_dict().items() if k in ("T_max", "milestones")}
    decay.load_state_dict({**state["decay"], **length})
    if before != schedule.steps and schedule.decay in ("step", "cosine"):
        for group in state["optimizer"].param_groups:
            group["lr"] = _rate(schedule, step)
