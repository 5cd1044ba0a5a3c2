"""Training of a network on simulated voxels, its calibration and its card.

`bidsapp.microstructure` defines density, power, hint and protocol.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import nn

from bidsapp import __version__, sh, training
from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import TrainingDomain
from bidsapp.errors import DataError, UsageError
from bidsapp.microstructure.maps import (
    QUANTILE,
    build,
    calibrate_sd,
    clamp_parameters,
    coherence,
    interpolate,
    misfit,
    predicted_sd,
    read_density_power,
    sharpness,
    takes_hint,
)
from bidsapp.networks.scnn import Estimate
from bidsapp.selection import bundled_weights
from bidsapp.simulate import odf, protocols
from bidsapp.simulate.likelihood import Likelihood, compute_hint, needs_search
from bidsapp.simulate.protocols import Protocols
from bidsapp.simulate.tissue import TissueModel

L_SIMULATED = 16
"""Highest degree of simulated densities and signals; that of fits and maps is 8. The signal of
sharp bundles has parts above degree 8, which alias into the fit, in training as in a scan."""

SHARPENED = (1, 2, 4)
"""Exponents of the values of measured densities, because deconvolution to degree 8 underestimates
their sharpness. The training draws from the densities of all exponents alike."""

CASES = 3
"""Number of quantiles of the power of densities that a hint is averaged over, in addition to the
power of a single fibre."""

HINT_BLOCK = 256
"""Voxels whose hints are computed at a time, so that their likelihoods fit in the cache."""

COVERAGE = 0.9
"""Share of true parameters that ± QUANTILE SDs are calibrated to cover."""

BIAS_BANDS = (4, 4, 3)
"""Numbers of bands of coherence, sharpness and noise in which the loss contains the mean error."""

BANDS, CELLS = 24, (8, 5)
"""Numbers of bands of predicted SD, and of estimated coherence and noise, in which SDs are
calibrated."""

MIN_SHELLS = 2
"""Minimum number of shells of a run to which a network for all protocols is applied. It is trained
with single shells, too, but with one shell only the prior separates diffusivity and fraction."""

MISFIT_LEVEL, NOISE_BANDS = 0.995, 8
"""Share of simulated signals whose misfit is accepted, and number of bands of noise, each with a
limit of its own."""


@dataclass(frozen=True)
class Recipe:
    """Tissue model, network and settings of a training (a method's training.toml).

    Parameters
    ----------
    tissue : TissueModel
    network : mapping
        `architecture` and its arguments (`networks.builder`). `shells`, if it is one of them, is
        replaced by that of the acquisition.
    schedule : Schedule
    trained_for : TrainingDomain
        Training domain of the network. With `shell_count`, random protocols are drawn from it.
    acquisition : Acquisition, optional
        The only acquisition of the training, instead of random protocols.
    s0_known : bool
        Whether S0 of `acquisition` is known without noise.
    batch : int
        Voxels per minibatch.
    groups : int
        Protocols per minibatch, each with the same number of voxels.
    pool : int
        Minibatches that are simulated together, which is faster than one by one.
    passes : int
        Number of times that the minibatches of a pool are used.
    beta : float
        Exponent of the weight SD^(2 beta − 2) of a voxel's squared error: 1 minimises the mean
        square error, 0 maximises the likelihood.
    density : float
        Weight of the density's mean square error over the sphere.
    unbiased : float
        Weight of the squared mean error in bands (`compute_loss`, `bias_bands`).
    held_out : int
        Number of voxels of the validation. The calibration has 8 times as many, and the final test
        4 times.
    odfs : mapping
        Options of `simulate.tissue.draw_odfs`.
    """

    tissue: TissueModel
    network: Mapping[str, Any]
    schedule: training.Schedule
    trained_for: TrainingDomain
    acquisition: Acquisition | None = None
    s0_known: bool = False
    batch: int = 512
    groups: int = 8
    pool: int = 8
    passes: int = 1
    beta: float = 0.5
    density: float = 1.0
    unbiased: float = 0.0
    held_out: int = 16384
    odfs: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.trained_for.snr:
            raise ValueError("a recipe needs a range of SNR from which SNRs are drawn")
        if self.acquisition is None and (self.trained_for.shell_count is None or len(
                {(s.b, s.directions) for s in self.trained_for.shells}) > 1):
            raise ValueError("a recipe without an acquisition needs shell_count, and shells whose "
                             "b and directions are the same for each b_delta")


def read_recipe(tissue: TissueModel, table: Mapping[str, Any]) -> Recipe:
    """Create a recipe from the table `training` of a training.toml."""
    rest = {k: v for k, v in table.items() if k not in ("schedule", "trained_for")}
    return Recipe(tissue, schedule=training.Schedule(**table["schedule"]),
                  trained_for=TrainingDomain(**table["trained_for"]), **rest)


class SimulatedMinibatch(NamedTuple):
    """Simulated voxels, ordered by protocol: input of a network and true output.

    x: (coefficient, voxel, shell) of S/S0. noise: (voxel, 2), σ/S0 of one measurement and of the
    mean b0. shells: (group, shell, 3), b (ms/µm²), b_delta and 1/√directions of each protocol.
    hint: (voxel, value). parameters: (voxel, parameter), true. odf: (voxel, coefficient) of the
    true density, up to degree 8.
    """

    x: torch.Tensor
    noise: torch.Tensor
    shells: torch.Tensor
    hint: torch.Tensor
    parameters: torch.Tensor
    odf: torch.Tensor

    @property
    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of a network."""
        return self.x, self.noise, self.shells, self.hint


class Simulator:
    """Simulator of minibatches.

    All random numbers come from the generator passed to each call.

    Parameters
    ----------
    recipe : Recipe
    table : (row, 45) tensor, optional
        Coefficients of measured densities.
    power : (case, degree) tensor, optional
        Powers of the densities for the hints (`density_power`); default: those of the densities
        that are drawn. A trained network needs the powers of its training.
    """

    def __init__(self, recipe: Recipe, table: torch.Tensor | None = None,
                 power: torch.Tensor | None = None) -> None:
        self.recipe = recipe
        self.table = None if table is None else torch.cat(
            [odf.sharpen(table, exponent, L_SIMULATED) for exponent in SHARPENED])
        acquisition = recipe.acquisition
        self.fixed = None if acquisition is None else protocols.from_acquisition(
            acquisition, acquisition.shells, L_SIMULATED, s0_known=recipe.s0_known)
        self.power = density_power(recipe, self.table) if power is None else power
        self.hinted = takes_hint(recipe.network)

    def draw_protocols(self, groups: int, generator: torch.Generator) -> Protocols:
        """Draw `groups` random protocols, or return that of the recipe's acquisition."""
        stack = self.fixed or self._draw_random(groups, generator)
        return stack.to(torch.zeros((), device=generator.device))

    def _draw_random(self, groups: int, generator: torch.Generator) -> Protocols:
        domain = self.recipe.trained_for
        assert domain.shell_count
        low, high = domain.shells[0].b
        return protocols.draw(
            groups, generator, l_max=L_SIMULATED, shells=domain.shell_count, b0=domain.b0,
            b=(low / 1000, high / 1000), directions=domain.shells[0].directions,
            b_delta=tuple(s.b_delta for s in domain.shells))

    def __call__(self, count: int, groups: int, generator: torch.Generator) -> SimulatedMinibatch:
        """Simulate `count` voxels, the same number for each of `groups` protocols."""
        stack = self.draw_protocols(groups, generator)
        tissue = self.recipe.tissue
        parameters = tissue.draw(count, generator)
        s, odfs = tissue.simulate(stack, parameters, generator, L_SIMULATED, table=self.table,
                                  **self.recipe.odfs)
        assert self.recipe.trained_for.snr
        low, high = map(math.log, self.recipe.trained_for.snr)
        snr = torch.exp(low + (high - low) * torch.rand(count, generator=generator,
                                                        device=generator.device))
        x, noise = protocols.measure(stack, stack.signals(s), 1 / snr, generator)
        hint = self.compute_hints(x, noise, stack.shells) if self.hinted else x.new_zeros(count, 0)
        return SimulatedMinibatch(x, noise, stack.shells, hint, parameters,
                                  odfs[:, :sh.size(protocols.L_FIT)])

    def compute_hints(self, x: torch.Tensor, noise: torch.Tensor, shells: torch.Tensor
                      ) -> torch.Tensor:
        """Compute the hints of all voxels, in blocks of whole groups or of parts of the only
        group."""
        power, per_group = self.power.to(x), x.shape[1] // len(shells)
        groups = max(1, HINT_BLOCK // per_group)
        shell_blocks = shells.split(groups)
        size = min(per_group, HINT_BLOCK) if len(shells) == 1 else groups * per_group
        parts = zip(x.split(size, 1), noise.split(size), strict=True)
        tissue = self.recipe.tissue
        return torch.cat([
            compute_hint(Likelihood(tissue, power, *part, shell_blocks[i % len(shell_blocks)]))
            for i, part in enumerate(parts)])

    def draw_pool(self, generator: torch.Generator) -> list[SimulatedMinibatch]:
        """Simulate the minibatches of the next steps of a training: a pool, `passes` times."""
        recipe = self.recipe
        groups = recipe.groups if self.fixed is None else 1
        pool = self(recipe.pool * recipe.batch, recipe.pool * groups, generator)
        size = recipe.batch
        shells = (pool.shells.split(groups) if self.fixed is None
                  else [pool.shells] * recipe.pool)
        return [SimulatedMinibatch(*parts) for parts in zip(
            pool.x.split(size, 1), pool.noise.split(size), shells, pool.hint.split(size),
            pool.parameters.split(size), pool.odf.split(size), strict=True)] * recipe.passes


def density_power(recipe: Recipe, table: torch.Tensor | None
                  ) -> Float[torch.Tensor, "case degree"]:
    """Compute the powers for the hints from densities drawn from the prior of a training.

    Parameters
    ----------
    recipe : Recipe
    table : (row, size) tensor, optional
        Measured densities.

    Returns
    -------
    (case, degree) tensor
        Mean squares of the coefficients of degrees 2, 4, 6, 8. If hints are posterior means, rows
        are quantiles over densities and, last, the power of a single fibre, the largest possible.
        If hints maximise the likelihood (`needs_search`), the only row is the mean over densities.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = recipe.tissue.densities(4096, generator, protocols.L_FIT, table=table, **recipe.odfs)
    power = torch.stack([drawn[:, sh.size(l - 2):sh.size(l)].square().mean(1)
                         for l in range(2, protocols.L_FIT + 1, 2)], 1)
    if needs_search(recipe.tissue):
        return power.mean(0, keepdim=True)
    return torch.cat([torch.quantile(power, (torch.arange(CASES) + 0.5) / CASES, dim=0),
                      torch.full((1, power.shape[1]), 1 / (4 * math.pi))])


def compute_loss(recipe: Recipe, estimate: Estimate, parameters: torch.Tensor, odf: torch.Tensor,
                 noise: torch.Tensor) -> torch.Tensor:
    """Compute the loss of a minibatch.

    It is the sum of three terms: the negative Gaussian log likelihood of the parameters, weighted
    by SD^(2 beta) (Seitzer et al. 2022, arXiv:2203.09168); `recipe.density` times the mean square
    error of the density over the sphere; and `recipe.unbiased` times the squared mean error, in
    units of the SD, in each band of coherence, sharpness and noise (`bias_bands`).

    The last term counteracts a bias of the posterior mean over all densities. For coherent bundles
    it has one sign and for dispersed ones the other, because noise makes them hard to distinguish.

    Parameters
    ----------
    recipe : Recipe
    estimate : Estimate
        Output of the network.
    parameters : (voxel, n) tensor
        True parameters.
    odf : (voxel, 45) tensor
        True density.
    noise : (voxel, 2) tensor
        σ/S0 of one measurement and of the mean b0.

    Returns
    -------
    tensor
        Scalar.
    """
    log_sd = estimate.log_sd.clamp(-7, 2)
    error = estimate.mean - parameters
    weight = torch.exp(2 * recipe.beta * log_sd.detach())
    likelihood = weight * (0.5 * error**2 * torch.exp(-2 * log_sd) + log_sd)
    loss = likelihood.mean(0).sum() + recipe.density * density_error(estimate.odf, odf).mean()
    if recipe.unbiased:
        band = bias_bands(odf, noise[:, 0])
        member = nn.functional.one_hot(band, math.prod(BIAS_BANDS)).to(error)
        count = member.sum(0)[:, None].clamp(min=1)

        def mean(values: torch.Tensor) -> torch.Tensor:
            return member.T @ values / count

        bias = mean(error) / mean(log_sd.detach().exp()).clamp(min=1e-6)
        loss = loss + recipe.unbiased * (count / len(error) * mean(weight) * bias**2).sum()
    return loss


def bias_bands(odf: Float[torch.Tensor, "voxel size"], noise: Float[torch.Tensor, " voxel"]
               ) -> Int[torch.Tensor, " voxel"]:
    """Number the band of each voxel, 0 to ∏ BIAS_BANDS − 1.

    Bands have equal widths in the `coherence` of the density, in the square root of its
    `sharpness`, and in log σ/S0 from 0.01 to 0.1. Coherence alone does not distinguish crossing
    bundles from a dispersed one; sharpness does.
    """
    noise_level = noise.clamp(0.01, 0.1).log10() + 2  # 0–1
    band = torch.zeros_like(noise, dtype=torch.long)
    values = coherence(odf), sharpness(odf).sqrt(), noise_level
    for count, value in zip(BIAS_BANDS, values, strict=True):
        band = count * band + (count * value).long().clamp(0, count - 1)
    return band


def density_error(estimate: Float[torch.Tensor, "voxel size"],
                  truth: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Compute the mean square error of densities over the sphere (Parseval), (1/sr)²."""
    return (estimate - truth).square().sum(1) / (4 * math.pi)


def initial_weights(method: str, recipe: Recipe, init: Path | None) -> Checkpoint | None:
    """Load the weights from which a training starts.

    Parameters
    ----------
    method : str
    recipe : Recipe
    init : Path or None
        Folder of a checkpoint.

    Returns
    -------
    Checkpoint or None
        The checkpoint in `init`; without `init`, the bundled weights if their shapes are those of
        the network. None stands for random weights.

    Raises
    ------
    UsageError
        `init` cannot be read, or belongs to another method, network or version.
    """
    network = build(recipe.tissue, recipe.network)
    if init:
        try:
            checkpoint = load(init, method)
            checkpoint.into(network)
            read_density_power(checkpoint.card)
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        return checkpoint
    bundled = bundled_weights(method)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    same_shapes = bundled and shapes == {k: v.shape for k, v in bundled.tensors.items()}
    return bundled if same_shapes else None


def train(method: str, recipe: Recipe, *, seed: int, device: str, saved: Path | None = None,
          table: torch.Tensor | None = None, intended_use: str = "",
          start: Checkpoint | None = None, devices: tuple[int, int] = (1, 1),
          new_hints: bool = False) -> Checkpoint:
    """Train, calibrate and test a network.

    Parameters
    ----------
    method : str
        Name of the method.
    recipe : Recipe
    seed : int
    device : str
    saved : Path, optional
        State file, from which an interrupted training is resumed.
    table : (row, 45) tensor, optional
        Measured densities.
    intended_use : str
        Intended use, for the model card.
    start : Checkpoint, optional
        Initial weights; default: random. Hints are computed with the powers on their card.
    devices : (int, int)
        As in `training.train`.
    new_hints : bool
        Whether hints are computed with the powers of the densities of this training instead of
        those on the card of `start`.

    Returns
    -------
    Checkpoint
        Weights and card.
    """
    with training.seeded(seed):
        network = build(recipe.tissue, recipe.network)
    if start:
        start.into(network)
    simulate = Simulator(recipe, table,
                         read_density_power(start.card) if start and not new_hints else None)
    held_out = _held_out(simulate, recipe, recipe.held_out, seed + 1, device)

    def validate(model: nn.Module) -> float:
        # with beta = 0 the loss is the likelihood; with another beta, better estimates may have a
        # larger loss
        plain = replace(recipe, beta=0.0)
        return float(np.mean([
            float(compute_loss(plain, model(*b.inputs), b.parameters, b.odf, b.noise))
            for b in held_out]))

    history = training.train(
        network, simulate.draw_pool,
        lambda model, b: compute_loss(recipe, model(*b.inputs), b.parameters, b.odf, b.noise),
        recipe.schedule, seed=seed, device=device, validate=validate, saved=saved, name=method,
        devices=devices)
    constants = calibrate(network, recipe, _held_out(
        simulate, recipe, 8 * recipe.held_out, seed + 2, device))
    constants["density_power"] = simulate.power.tolist()
    metrics = measure(network, recipe, constants, _held_out(simulate, recipe, 4 * recipe.held_out,
                                                            seed + 3, device))
    domain = recipe.trained_for
    if domain.shell_count:
        low, high = domain.shell_count
        domain = replace(domain, shell_count=(max(MIN_SHELLS, low), max(MIN_SHELLS, high)))
    return Checkpoint(network.state_dict(), Card(
        method=method, network=dict(recipe.network), seed=seed, trained_for=domain,
        training={"steps": int(history[-1]["step"]) if history else 0,
                  "samples": (int(history[-1]["step"]) * recipe.batch * math.prod(devices)
                              // recipe.passes if history else 0),
                  "seconds": round(history[-1]["seconds"]) if history else 0, "device": device,
                  "threads": torch.get_num_threads() if device == "cpu" else None,
                  "start": start.card.sha256 if start else "random",
                  "start_training": dict(start.card.training) if start else None,
                  "data": "simulated: " + ("Watson mixtures" if table is None else
                                           "Watson mixtures and measured densities")},
        intended_use=intended_use, versions={"qsphere": __version__, "torch": torch.__version__},
        constants=constants, metrics=metrics))


def train_for_acquisition(
        method: str, recipe: Recipe, acquisitions: Mapping[str, Acquisition], snr: Sequence[float],
        *, steps: int | None, seed: int, device: str, states: Path | None, intended_use: str,
        init: Path | None = None, table: torch.Tensor | None = None,
        devices: tuple[int, int] = (1, 1)) -> tuple[str, Checkpoint]:
    """Train a network for the acquisition that all runs share.

    Runs share an acquisition if their shells have the same b (rounded to 100 s/mm²), b_delta and
    number of directions. The directions of the simulation are those of the first run.

    Parameters
    ----------
    method : str
        Name of the method.
    recipe : Recipe
    acquisitions : mapping
        Acquisition of each run.
    snr : sequence of float
        S0 over the noise SD of each run. The training covers half the smallest to twice the
        largest; the range of the recipe if no value is finite.
    steps : int or None
        Number of steps; None for that of the recipe.
    seed, device, intended_use, table, devices
        As in `train`.
    states : Path or None
        Folder of the state file, from which an interrupted training is resumed.
    init : Path, optional
        As in `initial_weights`.

    Returns
    -------
    name : str
        Name of the model: the method and the shells of the acquisition.
    checkpoint : Checkpoint

    Raises
    ------
    UsageError
        Acquisitions differ in their shells, or have none; or `init` cannot be used.
    """
    by_shells: dict[str, list[str]] = {}
    for run, acquisition in acquisitions.items():
        by_shells.setdefault("_".join(
            f"b{round(s.b, -2):.0f}n{len(s)}"
            + ("" if s.b_delta > 0.95 else f"d{round(100 * s.b_delta)}")
            for s in acquisition.shells), []).append(run)
    if len(by_shells) != 1 or "" in by_shells:
        listing = "; ".join(f"{shells or 'no shell'}: {', '.join(runs[:3])}"
                            + (", …" if len(runs) > 3 else "")
                            for shells, runs in by_shells.items())
        raise UsageError(f"--train {method} needs runs of one acquisition. Found: {len(by_shells)} "
                         f"acquisitions ({listing}). Choose runs with --participant-label, "
                         "--session-label or --bids-filter-file.")
    (shell_name,) = by_shells
    acquisition = next(iter(acquisitions.values()))
    levels = [float(v) for v in snr if v is not None and math.isfinite(v)]
    snr_range = (min(levels) / 2, 2 * max(levels)) if levels else recipe.trained_for.snr
    shell_count = {"shells": len(acquisition.shells)} if "shells" in recipe.network else {}
    recipe = replace(
        recipe, groups=1, network={**recipe.network, **shell_count},
        schedule=replace(recipe.schedule, steps=steps or recipe.schedule.steps),
        acquisition=acquisition, trained_for=TrainingDomain.from_acquisitions(
            list(acquisitions.values()), snr=snr_range))
    name, start = f"{method}_{shell_name}", initial_weights(method, recipe, init)
    if states:
        states.mkdir(parents=True, exist_ok=True)
    # the digest in the file name prevents a training from resuming the state of another one
    digest = hashlib.sha256(repr((
        __version__, recipe.network, recipe.batch, recipe.pool, recipe.passes, recipe.beta,
        recipe.density, recipe.unbiased, recipe.odfs, recipe.trained_for.snr, recipe.held_out,
        replace(recipe.schedule, steps=1), start and start.card.sha256)).encode())
    for array in (acquisition.bvals, acquisition.bvecs, () if table is None else table.numpy()):
        digest.update(np.ascontiguousarray(array).tobytes())
    saved = states / f"{name}.{digest.hexdigest()[:8]}.ckpt" if states else None
    return name, train(method, recipe, seed=seed, device=device, intended_use=intended_use,
                       table=table, saved=saved, start=start, devices=devices)


def _held_out(simulate: Simulator, recipe: Recipe, count: int, seed: int, device: str
              ) -> list[SimulatedMinibatch]:
    """Simulate `count` voxels in minibatches of 1024 voxels of 64 protocols or of the only one."""
    generator = torch.Generator(device).manual_seed(seed)
    return [simulate(1024, recipe.groups if recipe.groups == 1 else 64, generator)
            for _ in range(count // 1024)]


@torch.no_grad()
def predict(network: nn.Module, minibatches: Sequence[SimulatedMinibatch]
            ) -> tuple[Estimate, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the estimates of all minibatches.

    Parameters
    ----------
    network : Module
    minibatches : sequence of SimulatedMinibatch

    Returns
    -------
    estimates : Estimate
    truth : (voxel, n) tensor
        True parameters.
    error : (voxel,) tensor
        Mean square error of each density (`density_error`).
    noise : (voxel, 2) tensor
        σ/S0 of one measurement and of the mean b0.
    """
    parts = []
    for b in minibatches:
        e = network(*b.inputs)
        parts.append((*e, b.parameters, density_error(e.odf, b.odf), b.noise))
    mean, log_sd, odfs, truth, error, noise = (torch.cat(p) for p in zip(*parts, strict=True))
    return Estimate(mean, log_sd, odfs), truth, error, noise


def calibrate(network: nn.Module, recipe: Recipe, minibatches: Sequence[SimulatedMinibatch]
              ) -> dict[str, Any]:
    """Calibrate SDs and misfit on held-out simulation.

    Split conformal prediction in bands (Vovk et al. 2005; Romano et al. 2019, arXiv:1905.03222).

    Parameters
    ----------
    network : Module
    recipe : Recipe
    minibatches : sequence of SimulatedMinibatch

    Returns
    -------
    dict
        `sd`: for each parameter, factors of the SD in bands of predicted SD (`maps.interpolate`).
        `sd_where`: further factors in bands of estimated coherence and noise (`maps.bilinear`).
        With both, ± 1.645 SD cover 90 % of the true values (`maps.calibrate_sd`). `misfit`:
        quantile 0.995 of the misfit in bands of noise.
    """
    estimates, truth, _, noise = predict(network, minibatches)
    sd = predicted_sd(estimates)
    score = (clamp_parameters(recipe.tissue, estimates.mean) - truth).abs() / sd / QUANTILE
    with torch.no_grad():
        misfits = torch.cat([misfit(recipe.tissue, b.x, b.noise, b.shells, network(*b.inputs))
                             for b in minibatches])
    by_sd = {name: _in_bands(sd[:, i], score[:, i], COVERAGE, BANDS)
             for i, name in enumerate(recipe.tissue.names)}
    where = {name: _in_cells(coherence(estimates.odf), noise[:, 0],
                             score[:, i] / interpolate(by_sd[name], sd[:, i]))
             for i, name in enumerate(recipe.tissue.names)}
    return {"sd": by_sd, "sd_where": where,
            "misfit": _in_bands(noise[:, 0], misfits, MISFIT_LEVEL, NOISE_BANDS)}


def _in_bands(x: torch.Tensor, value: torch.Tensor, level: float, bands: int
              ) -> dict[str, list[float]]:
    """Compute the quantile `level` of values in bands of x with equal numbers of voxels."""
    order = x.argsort()
    return {"at": [float(v.median()) for v in x[order].tensor_split(bands)],
            "value": [_quantile(v, level) for v in value[order].tensor_split(bands)]}


def _in_cells(x: torch.Tensor, y: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """Compute the quantile COVERAGE of values in each cell of bands of x and y.

    Bands of x have equal widths within 0–1, so that the factor changes gradually. Bands of y have
    equal numbers of voxels.
    """
    row = (CELLS[0] * x).long().clamp(0, CELLS[0] - 1)
    edges = torch.quantile(y, torch.linspace(0, 1, CELLS[1] + 1)[1:-1].to(y))
    column = torch.bucketize(y.contiguous(), edges)
    return {"rows": [(k + 0.5) / CELLS[0] for k in range(CELLS[0])],
            "columns": [float(v.median()) for v in y.sort().values.tensor_split(CELLS[1])],
            "value": [[_quantile(value[(row == i) & (column == k)], COVERAGE)
                       for k in range(CELLS[1])] for i in range(CELLS[0])]}


def _quantile(values: torch.Tensor, level: float) -> float:
    """Compute the conformal quantile `level` of values; 1 if there are none."""
    return float(torch.quantile(values, min(1.0, level * (1 + 1 / len(values))))
                 ) if len(values) else 1.0


def measure(network: nn.Module, recipe: Recipe, constants: Mapping[str, Any],
            minibatches: Sequence[SimulatedMinibatch]) -> dict[str, Any]:
    """Measure mean square errors and the coverage of ± 1.645 SD on held-out simulation."""
    estimates, truth, density, noise = predict(network, minibatches)
    sd = calibrate_sd(recipe.tissue, estimates, noise, constants)
    error = clamp_parameters(recipe.tissue, estimates.mean) - truth
    return {"samples": len(truth), "mse_density": float(density.mean())} | {
        f"{key}_{name}": float(value[:, i].mean()) for i, name in enumerate(recipe.tissue.names)
        for key, value in (("mse", error**2),
                           ("coverage90", (error.abs() <= QUANTILE * sd).float()))}
