"""Training of the autoencoder: simulated voxels, or those of a cohort with added noise.

S/S0 is the signal over the mean b0 of the voxel. Signals of several gradient tables are padded with
0 to equal numbers of shells and directions, as in `simulate.protocols`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import nn

from bidsapp import __version__, sh, training
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.domain import TrainingDomain
from bidsapp.dwi import Dwi
from bidsapp.networks.autoencoder import SMOOTHING
from bidsapp.networks.builder import build_network
from bidsapp.simulate import forward, protocols
from bidsapp.simulate.protocols import Protocols
from bidsapp.simulate.tissue import TWO_COMPARTMENTS, draw_odfs

L_FIT = 8
"""Highest degree of the fits; that of a shell is the largest with no more coefficients than
directions."""

L_SIMULATED = 16
"""Highest degree of simulated densities and signals."""

WATER, FREE = 0.3, 3.0
"""Share of simulated voxels with free water, and its diffusivity (µm²/ms)."""

REAL = 0.2
"""Share of simulated voxels with Gaussian noise, as after removal of the phase, instead of
Rician."""

MAX_ATTENUATION = 2.0
"""S/S0 is clipped to 0–2 before it enters a network. Values outside come from artefacts or from
too small an S0. The lower limit holds for magnitudes only."""


class Minibatch(NamedTuple):
    """Voxels, ordered by gradient table: input of the network, and the signal it should return.

    signal, target: (voxel, shell, direction). noise, shells, fit, basis: as in
    `networks.autoencoder.Autoencoder`.
    """

    signal: torch.Tensor
    target: torch.Tensor
    noise: torch.Tensor
    shells: torch.Tensor
    fit: torch.Tensor
    basis: torch.Tensor

    def run(self, network: nn.Module) -> torch.Tensor:
        """Apply a network."""
        return network(self.signal, self.noise, self.shells, self.fit, self.basis)

    @property
    def measured(self) -> Bool[torch.Tensor, "voxel shell direction"]:
        """Entries of the signal that are not padding."""
        present = self.basis[..., 0] != 0
        return present.repeat_interleave(len(self.signal) // len(self.shells), 0)


def fit_matrices(stack: Protocols) -> Float[torch.Tensor, "group shell coef direction"]:
    """Make the matrices of the SH fits with SMOOTHING · l²(l+1)², 0 where there is no direction."""
    l = torch.from_numpy(sh.degrees(L_FIT)).to(stack.basis.device)
    sizes = (l + 1) * (l + 2) // 2  # number of coefficients up to the degree of each
    used = (sizes <= stack.count[..., None]).to(stack.basis)
    design = stack.basis[..., :len(l)] * used[..., None, :]
    penalty = SMOOTHING * (l * (l + 1.0)).square() * used + (1 - used)
    return torch.linalg.solve(design.mT @ design + torch.diag_embed(penalty), design.mT)


def select_stack(acquisition: Acquisition, shells: Sequence[Shell]) -> Protocols:
    """Create the stack of one table."""
    return protocols.from_acquisition(acquisition, shells, L_SIMULATED)


def simulate_tissue(count: int, generator: torch.Generator
                    ) -> tuple[Float[torch.Tensor, "voxel size"], list[forward.Compartment]]:
    """Draw densities and compartments of voxels.

    They are those of the constrained two-compartment model (`TWO_COMPARTMENTS`, `draw_odfs`). A
    share WATER of the voxels also has free water, its fraction uniform in 0–1.
    """
    parameters = TWO_COMPARTMENTS.draw(count, generator)
    odfs = draw_odfs(count, generator, L_SIMULATED)
    share, fraction = torch.rand(2, count, generator=generator, device=generator.device)
    water = fraction * (share < WATER)
    tissue = [c._replace(fraction=(1 - water) * c.fraction)
              for c in TWO_COMPARTMENTS.compartments(parameters)]
    return odfs, [*tissue, forward.ball(water, torch.full_like(water, FREE))]


def measure(stack: Protocols, clean: Float[torch.Tensor, "group voxels shell direction"],
            sigma: Float[torch.Tensor, " voxel"], magnitude: Bool[torch.Tensor, " voxel"],
            generator: torch.Generator) -> Minibatch:
    """Simulate measurements: noise, and division by the mean b0.

    The target is the noise-free signal, divided by the same mean b0. It has no noise floor.

    Parameters
    ----------
    stack : Protocols
    clean : (group, voxels, shell, direction) tensor
        Noise-free S/S0.
    sigma : (voxel,) tensor
        σ over the true S0.
    magnitude : (voxel,) bool tensor
        Whether the noise is Rician; if not, it is Gaussian.
    generator : torch.Generator

    Returns
    -------
    Minibatch
    """
    def normal(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)

    signal = clean.flatten(0, 1)
    level = sigma[:, None, None]
    real = signal + level * normal(signal)
    noisy = torch.where(magnitude[:, None, None], torch.hypot(real, level * normal(signal)), real)
    b0 = stack.b0.repeat_interleave(clean.shape[1])
    # the Rician excess of the mean b0 to first order, σ²/2S0
    s0 = 1 + sigma**2 / 2 * magnitude * (b0 < math.inf) + sigma * b0.rsqrt() * normal(sigma)
    return arrange(stack, noisy / s0[:, None, None], signal / s0[:, None, None], sigma / s0,
                   magnitude)


def arrange(stack: Protocols, noisy: Float[torch.Tensor, "voxel shell direction"],
            target: Float[torch.Tensor, "voxel shell direction"],
            sigma: Float[torch.Tensor, " voxel"], magnitude: Bool[torch.Tensor, " voxel"]
            ) -> Minibatch:
    """Arrange measurements as the input of a network.

    Parameters
    ----------
    stack : Protocols
    noisy, target : (voxel, shell, direction) tensor
        S/S0.
    sigma : (voxel,) tensor
        σ over the mean b0.
    magnitude : (voxel,) bool tensor
        Whether the signal is a magnitude.

    Returns
    -------
    Minibatch
    """
    present = stack.basis[..., 0] != 0
    present = present.repeat_interleave(len(noisy) // len(present), 0)
    low = torch.where(magnitude, 0.0, -MAX_ATTENUATION)[:, None, None]
    clipped = noisy.clamp(max=MAX_ATTENUATION).maximum(low) * present
    return Minibatch(clipped, target * present, torch.stack([sigma, sigma * magnitude], 1),
                     stack.shells, fit_matrices(stack),
                     stack.basis[..., :sh.size(L_FIT)])


def mean_square_error(output: torch.Tensor, b: Minibatch, exponent: float = 0.0) -> torch.Tensor:
    """Compute the mean square error of a signal along the measured directions.

    Parameters
    ----------
    output : (voxel, shell, direction) tensor
    b : Minibatch
    exponent : float
        Exponent p of the weight σ^−p of each voxel: 0 for the mean square error, 2 for errors
        relative to the noise. Weights have the mean 1.

    Returns
    -------
    tensor
        Scalar.
    """
    weight = b.noise[:, 0] ** -exponent
    weight = (weight / weight.mean())[:, None, None] * b.measured
    return (weight * (output - b.target).square()).sum() / b.measured.sum()


@dataclass(frozen=True)
class Simulator:
    """Simulator of minibatches of random tables, or of one.

    Parameters
    ----------
    domain : TrainingDomain
        Ranges of tables (with `shell_count`) and of SNR.
    acquisition : Acquisition, optional
        The only table, instead of random ones.
    batch, groups, pool : int
        Voxels and tables per minibatch, and minibatches that are simulated together.
    """

    domain: TrainingDomain
    acquisition: Acquisition | None = None
    batch: int = 512
    groups: int = 8
    pool: int = 8

    def draw_stack(self, groups: int, generator: torch.Generator) -> Protocols:
        """Draw random tables, or return the only one."""
        if self.acquisition is not None:
            stack = select_stack(self.acquisition, self.acquisition.shells)
        else:
            assert self.domain.shell_count
            low, high = self.domain.shells[0].b
            stack = protocols.draw(
                groups, generator, l_max=L_SIMULATED, shells=self.domain.shell_count,
                b=(low / 1000, high / 1000), directions=self.domain.shells[0].directions,
                b0=self.domain.b0, s0_known=0.0)
        return stack.to(torch.zeros((), device=generator.device))

    def __call__(self, count: int, groups: int, generator: torch.Generator) -> Minibatch:
        """Simulate `count` voxels of `groups` tables."""
        stack = self.draw_stack(groups, generator)
        clean = stack.signals(stack.coefficients(*simulate_tissue(count, generator)))
        assert self.domain.snr
        low, high = map(math.log, self.domain.snr)
        u, v = torch.rand(2, count, generator=generator, device=generator.device)
        return measure(stack, clean, torch.exp(-low - (high - low) * u), v >= REAL, generator)

    def draw(self, generator: torch.Generator) -> list[Minibatch]:
        """Simulate the minibatches of the next steps."""
        groups = self.groups if self.acquisition is None else 1
        return split(self(self.pool * self.batch, self.pool * groups, generator), self.pool)


def split(b: Minibatch, parts: int) -> list[Minibatch]:
    """Split a minibatch into parts of the same number of voxels; tables are split, too, unless
    there is one."""
    per_table = [[x] * parts if len(b.shells) == 1 else x.tensor_split(parts)
                 for x in (b.shells, b.fit, b.basis)]
    per_voxel = [x.tensor_split(parts) for x in (b.signal, b.target, b.noise)]
    return [Minibatch(*values) for values in zip(*per_voxel, *per_table, strict=True)]


@dataclass(frozen=True)
class CohortSampler:
    """Sampler of minibatches of measured signals.

    The target is the measured signal, noise included, and the input is the target with as much
    noise again. The network is told the noise of the target.

    Parameters
    ----------
    stacks : sequence of Protocols
        Table of each run.
    signals : sequence of (voxel, shell, direction) tensor
        S/S0 of voxels of each run.
    sigma : sequence of (voxel,) tensor
        Noise SD of the run over S0 of each voxel.
    magnitude : sequence of bool
        Whether each run is a magnitude.
    batch : int
        Voxels per minibatch, all of one run.
    """

    stacks: Sequence[Protocols]
    signals: Sequence[torch.Tensor]
    sigma: Sequence[torch.Tensor]
    magnitude: Sequence[bool]
    batch: int

    def draw(self, generator: torch.Generator) -> list[Minibatch]:
        """Draw a minibatch of a random run."""
        device = generator.device
        run = int(torch.randint(len(self.stacks), (), generator=generator, device=device))
        rows = torch.randint(len(self.signals[run]), (self.batch,), generator=generator,
                             device=device)
        target, sigma = (x[run].to(device)[rows] for x in (self.signals, self.sigma))
        level = sigma[:, None, None]

        def normal() -> torch.Tensor:
            return torch.randn(target.shape, generator=generator, device=device)

        noisy = target + level * normal()
        if self.magnitude[run]:
            noisy = torch.hypot(noisy, level * normal())
        magnitude = torch.full_like(sigma, self.magnitude[run], dtype=torch.bool)
        return [arrange(self.stacks[run].to(target), noisy, target, sigma, magnitude)]


def sample_run(dwi: Dwi, voxels: int, seed: int) -> tuple[Protocols, torch.Tensor, torch.Tensor]:
    """Sample voxels with b0 signal of a run.

    Parameters
    ----------
    dwi : Dwi
        Its noise SD is known.
    voxels : int
        Largest number of voxels.
    seed : int

    Returns
    -------
    stack : Protocols
    signal : (voxel, shell, direction) tensor
        S/S0.
    sigma : (voxel,) tensor
        Noise SD over S0.
    """
    shells = dwi.acquisition.shells
    s0 = dwi.mean_b0
    rows = np.flatnonzero(s0 > 0)
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:voxels])
    attenuation = torch.from_numpy(dwi.signal[rows] / s0[rows, None])
    sigma = dwi.noise_of(np.concatenate([s.indices for s in shells]))
    assert sigma is not None
    return (select_stack(dwi.acquisition, shells), pack(attenuation, shells),
            torch.from_numpy((sigma / s0[rows]).astype(np.float32)))


def pack(signal: Float[torch.Tensor, "voxel measurement"], shells: Sequence[Shell]
         ) -> Float[torch.Tensor, "voxel shell direction"]:
    """Arrange measurements by shell, padded with 0."""
    most = max(map(len, shells))
    return torch.stack([nn.functional.pad(
        signal[:, torch.as_tensor(s.indices, device=signal.device)], (0, most - len(s)))
        for s in shells], 1)


def train(method: str, network: Mapping[str, Any],
          draw: Callable[[torch.Generator], Sequence[Minibatch]], held_out: Sequence[Minibatch],
          schedule: training.Schedule, domain: TrainingDomain, *, seed: int, device: str,
          exponent: float, intended_use: str, data: Mapping[str, Any],
          constants: Mapping[str, Any] | None = None, start: Checkpoint | None = None,
          saved: Path | None = None,
          devices: tuple[int, int] = (1, 1)) -> Checkpoint:
    """Train a network, and describe it on a card.

    Parameters
    ----------
    method : str
        Name of the method.
    network : mapping
        `architecture` and its arguments.
    draw : callable
        As in `training.train`.
    held_out : sequence of Minibatch
        Voxels of the validation.
    schedule : Schedule
    domain : TrainingDomain
    seed, device, saved, devices
        As in `training.train`.
    exponent : float
        As in `mean_square_error`, for the training and for the choice of the best weights.
    intended_use : str
    data : mapping
        Description of the training data, for the card.
    constants : mapping, optional
        Constants of the card.
    start : Checkpoint, optional
        Initial weights.

    Returns
    -------
    Checkpoint
        Its metrics are the mean square errors of the held-out signal before and after, relative to
        the target. The weights of least error on it were chosen, and the target of a cohort holds
        the noise of the measurements.
    """
    with training.seeded(seed):
        model = build_network(network)
    if start:
        start.into(model)


    @torch.no_grad()
    def mean_error(function: Callable[[Minibatch], torch.Tensor], exponent: float = 0.0) -> float:
        return float(np.mean([float(mean_square_error(function(b), b, exponent))
                              for b in held_out]))

    history = training.train(
        model, draw, lambda model, b: mean_square_error(b.run(model), b, exponent), schedule,
        seed=seed, device=device, saved=saved, devices=devices, name=method,
        validate=lambda model: mean_error(lambda b: b.run(model), exponent))
    return Checkpoint(model.state_dict(), Card(
        method=method, network=dict(network), trained_for=domain, seed=seed,
        training={"steps": int(history[-1]["step"]), "seconds": round(history[-1]["seconds"]),
                  "device": device, "threads": torch.get_num_threads() if device == "cpu" else None,
                  "start": start.card.sha256 if start else "random",
                  "start_training": dict(start.card.training) if start else None, **data},
        intended_use=intended_use, versions={"qsphere": __version__, "torch": torch.__version__},
        constants=constants or {},
        metrics={"mse_input": mean_error(lambda b: b.signal),
                 "mse_output": mean_error(lambda b: b.run(model))}))
