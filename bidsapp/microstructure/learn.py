"""From simulation to a network, its calibration and its card."""

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
    bundled_weights,
    calibrated,
    clamped,
    coherence,
    interpolated,
    known_power,
    misfit,
    predicted_sd,
    sharpness,
    takes_hint,
)
from bidsapp.networks.scnn import Estimate
from bidsapp.simulate import odf, protocols
from bidsapp.simulate.likelihood import Likelihood, hint, searches
from bidsapp.simulate.protocols import Protocols
from bidsapp.simulate.tissue import TissueModel

L_SIMULATED = 16
"""Degree of the densities and signals that are simulated; fits and maps go to 8. What the signal of
sharp bundles has above 8 folds into a fit, in training as in a scan."""

SHARPENED = (1, 2, 4)
"""Powers to which measured densities are raised, each for a third of them: deconvolution to degree
8 cannot show how sharp they are."""

CASES = 3
"""Powers of the densities that a hint has to reckon with, beside that of a single fibre."""

HINT_BLOCK = 256
"""Voxels whose lattices fit the cache."""

LEVEL = 0.9
"""Share of truths that ± QUANTILE SDs shall cover."""

BIAS_BANDS = (4, 4, 3)
"""Of coherence, sharpness and noise, in which a training looks at the mean error."""

BANDS, CELLS = 24, (8, 5)
"""Of predicted SD, and of estimated coherence and noise, in each of which SDs are calibrated."""

MIN_SHELLS = 2
"""A network for all protocols is used with so many shells at least. It is trained with single ones,
too, but one shell tells a diffusivity from a fraction by its prior alone."""

USUAL, NOISE_BANDS = 0.995, 8
"""Share of simulated signals whose misfit is not strange; bands of noise in which it holds."""


@dataclass(frozen=True)
class Recipe:
    """What is learned and how: a method's training.toml beside its `TissueModel`.

    network: `architecture` and its arguments (`networks.builder`); `shells`, where it is one of
    them, is that of the acquisition. trained_for: with `shell_count`, what protocols are drawn
    from. acquisition: the only one that is learned, instead. s0_known: whether its S0 is. groups:
    protocols side by side in a batch. pool: batches simulated at once, which costs less than one by
    one. beta: weight of a voxel's error, SD^(2 beta − 2): 1 for the least mean square error, 0 for
    the likelihood, between them where the noise varies. density: weight of the density's mean
    square error over the sphere. unbiased: weight of the squared mean error in bands of dispersion
    and noise (`loss_of`). held_out: voxels of a validation; 8 times as many calibrate, 4 times as
    many measure.
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
            raise ValueError("a recipe needs a range of SNR to draw from")
        if self.acquisition is None and (self.trained_for.shell_count is None or len(
                {(s.b, s.directions) for s in self.trained_for.shells}) > 1):
            raise ValueError("a recipe without an acquisition needs shell_count, and shells whose "
                             "b and directions are the same for each b_delta")


def read_recipe(tissue: TissueModel, table: Mapping[str, Any]) -> Recipe:
    """A recipe from a training.toml."""
    rest = {k: v for k, v in table.items() if k not in ("schedule", "trained_for")}
    return Recipe(tissue, schedule=training.Schedule(**table["schedule"]),
                  trained_for=TrainingDomain(**table["trained_for"]), **rest)


class SimulatedMinibatch(NamedTuple):
    """Simulated voxels: what a network sees, and what it should say.

    x: (coefficient, voxel, shell) of S/S0. noise: (voxel, 2). shells: (group, shell, 3). hint:
    (voxel, value). parameters: (voxel, parameter). odf: (voxel, coefficient) of the density, up to
    degree 8.
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
    """Draws what a network sees and what it should say, from a generator and nothing else.

    power: of the densities, that hints are made with, where a network knows others already.
    """

    def __init__(self, recipe: Recipe, table: torch.Tensor | None = None,
                 power: torch.Tensor | None = None) -> None:
        self.recipe = recipe
        self.table = None if table is None else torch.cat(
            [odf.sharpened(table, power, L_SIMULATED) for power in SHARPENED])
        known = recipe.acquisition
        self.fixed = None if known is None else protocols.from_acquisition(
            known, known.shells, L_SIMULATED, s0_known=recipe.s0_known)
        self.power = density_power(recipe, self.table) if power is None else power
        self.hinted = takes_hint(recipe.network)

    def protocols(self, groups: int, generator: torch.Generator) -> Protocols:
        drawn = self.fixed or self._draw(groups, generator)
        return drawn.to(torch.zeros((), device=generator.device))

    def _draw(self, groups: int, generator: torch.Generator) -> Protocols:
        domain = self.recipe.trained_for
        assert domain.shell_count
        low, high = domain.shells[0].b
        return protocols.draw(
            groups, generator, l_max=L_SIMULATED, shells=domain.shell_count, b0=domain.b0,
            b=(low / 1000, high / 1000), directions=domain.shells[0].directions,
            b_delta=tuple(s.b_delta for s in domain.shells))

    def __call__(self, count: int, groups: int, generator: torch.Generator) -> SimulatedMinibatch:
        """Draw `count` voxels."""
        side = self.protocols(groups, generator)
        tissue = self.recipe.tissue
        parameters = tissue.draw(count, generator)
        s, odfs = tissue.simulate(side, parameters, generator, L_SIMULATED, table=self.table,
                                  **self.recipe.odfs)
        assert self.recipe.trained_for.snr
        low, high = map(math.log, self.recipe.trained_for.snr)
        snr = torch.exp(low + (high - low) * torch.rand(count, generator=generator,
                                                        device=generator.device))
        x, noise = protocols.measure(side, side.signals(s), 1 / snr, generator)
        found = self.hints(x, noise, side.shells) if self.hinted else x.new_zeros(count, 0)
        return SimulatedMinibatch(x, noise, side.shells, found, parameters,
                                  odfs[:, :sh.size(protocols.L_FIT)])

    def hints(self, x: torch.Tensor, noise: torch.Tensor, shells: torch.Tensor) -> torch.Tensor:
        """Hints of all voxels, in blocks of whole groups that fit the cache."""
        power, per_group = self.power.to(x), x.shape[1] // len(shells)
        groups = max(1, HINT_BLOCK // per_group)
        each = shells.split(groups)
        size = min(per_group, HINT_BLOCK) if len(shells) == 1 else groups * per_group
        parts = zip(x.split(size, 1), noise.split(size), strict=True)
        return torch.cat([hint(Likelihood(self.recipe.tissue, power, *part, each[i % len(each)]))
                          for i, part in enumerate(parts)])

    def batches(self, generator: torch.Generator) -> list[SimulatedMinibatch]:
        """Draw the minibatches of the next steps of a training."""
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
    """Mean square of a coefficient of the densities that are drawn, by degree 2, 4, 6, 8: where
    hints are posterior means, quantiles over densities and, last, the most that any density can
    have, that of a single fibre; else its mean."""
    generator = torch.Generator().manual_seed(0)
    drawn = recipe.tissue.densities(4096, generator, protocols.L_FIT, table=table, **recipe.odfs)
    power = torch.stack([drawn[:, sh.size(l - 2):sh.size(l)].square().mean(1)
                         for l in range(2, protocols.L_FIT + 1, 2)], 1)
    if searches(recipe.tissue):
        return power.mean(0, keepdim=True)
    return torch.cat([torch.quantile(power, (torch.arange(CASES) + 0.5) / CASES, dim=0),
                      torch.full((1, power.shape[1]), 1 / (4 * math.pi))])


def loss_of(recipe: Recipe, estimate: Estimate, parameters: torch.Tensor, odf: torch.Tensor,
            noise: torch.Tensor) -> torch.Tensor:
    """Gaussian likelihood of the parameters, weighed by SD^(2 beta) (Seitzer et al. 2022,
    arXiv:2203.09168), mean square error of the density over the sphere, and squared mean error in
    bands of dispersion and noise, in units of the SD.

    The last term keeps apart what the posterior mean mixes: over all densities it errs to one side
    for coherent bundles and to the other for dispersed ones, since noise hides which is which.
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
    """Band of each voxel: `coherence` of its density; the square root of `sharpness`, which tells
    bundles that cross from one that is dispersed; and σ/S0 in its logarithm, 0.01 to 0.1."""
    level = noise.clamp(0.01, 0.1).log10() + 2
    found = torch.zeros_like(noise, dtype=torch.long)
    values = coherence(odf), sharpness(odf).sqrt(), level
    for count, value in zip(BIAS_BANDS, values, strict=True):
        found = count * found + (count * value).long().clamp(0, count - 1)
    return found


def density_error(found: Float[torch.Tensor, "voxel size"],
                  truth: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Mean square over the sphere (Parseval), (1/sr)²."""
    return (found - truth).square().sum(1) / (4 * math.pi)


def initial_weights(method: str, recipe: Recipe, init: Path | None) -> Checkpoint | None:
    """What a training starts from: the checkpoint in the folder `init`; without one the weights
    that ship, where there are any for this network; else None, chance.

    Raises:
        UsageError: `init` cannot be read, or belongs to another method, network or version.
    """
    network = build(recipe.tissue, recipe.network)
    if init:
        try:
            given = load(init, method)
            given.into(network)
            known_power(given.card)
        except DataError as error:
            raise UsageError(f"--init: {error}") from error
        return given
    found = bundled_weights(method)
    shapes = {k: v.shape for k, v in network.state_dict().items()}
    return found if found and shapes == {k: v.shape for k, v in found.tensors.items()} else None


def train(method: str, recipe: Recipe, *, seed: int, device: str, saved: Path | None = None,
          table: torch.Tensor | None = None, intended_use: str = "",
          start: Checkpoint | None = None, devices: tuple[int, int] = (1, 1),
          new_hints: bool = False) -> Checkpoint:
    """Train, calibrate and measure a network; its weights and card.

    saved: state file, from which an interrupted training goes on. table: (row, 45) densities.
    start: weights at the start, and the power of densities that they know from their hints.
    devices: as of `training.train`. new_hints: hints are made for the densities drawn now, even
    where `start` knows others.
    """
    with training.seeded(seed):
        network = build(recipe.tissue, recipe.network)
    if start:
        start.into(network)
    simulate = Simulator(recipe, table,
                         known_power(start.card) if start and not new_hints else None)
    batches = _held_out(simulate, recipe, recipe.held_out, seed + 1, device)

    def validate(model: nn.Module) -> float:
        # beta = 0, the likelihood: the loss of another beta does not fall with the error
        plain = replace(recipe, beta=0.0)
        return float(np.mean([float(loss_of(plain, model(*b.inputs), b.parameters, b.odf, b.noise))
                              for b in batches]))

    history = training.train(
        network, simulate.batches,
        lambda model, b: loss_of(recipe, model(*b.inputs), b.parameters, b.odf, b.noise),
        recipe.schedule, seed=seed, device=device, validate=validate, saved=saved, name=method,
        devices=devices)
    constants = calibrate(network, recipe, _held_out(
        simulate, recipe, 8 * recipe.held_out, seed + 2, device))
    constants["density_power"] = simulate.power.tolist()
    metrics = measure(network, recipe, constants, _held_out(simulate, recipe, 4 * recipe.held_out,
                                                            seed + 3, device))
    domain = recipe.trained_for
    if domain.shell_count:
        fewest, most = domain.shell_count
        domain = replace(domain, shell_count=(max(MIN_SHELLS, fewest), max(MIN_SHELLS, most)))
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


def train_for_acquisition(method: str, recipe: Recipe, acquisitions: Mapping[str, Acquisition],
            snr: Sequence[float], *, steps: int | None, seed: int, device: str,
            states: Path | None, intended_use: str, init: Path | None = None,
            table: torch.Tensor | None = None, devices: tuple[int, int] = (1, 1)
            ) -> tuple[str, Checkpoint]:
    """A network for the acquisition that all runs share, and a name that says which.

    snr: S0 over the noise SD of the runs; trained for half the least to twice the greatest.
    steps: at most, else the recipe's. states: folder of the state from which a training goes on.
    init: as of `initial_weights`. table, devices: as of `train`.

    Raises:
        UsageError: acquisitions differ in their shells, or have none; or as of `initial_weights`.
    """
    kinds: dict[str, list[str]] = {}
    for run, acquisition in acquisitions.items():
        kinds.setdefault("_".join(
            f"b{round(s.b, -2):.0f}n{len(s)}"
            + ("" if s.b_delta > 0.95 else f"d{round(100 * s.b_delta)}")
            for s in acquisition.shells), []).append(run)
    if len(kinds) != 1 or "" in kinds:
        told_runs = "; ".join(f"{kind or 'no shell'}: {', '.join(runs[:3])}"
                              + (", …" if len(runs) > 3 else "") for kind, runs in kinds.items())
        raise UsageError(f"--train {method} learns one acquisition, that all runs share; found are "
                         f"{len(kinds)} ({told_runs}). Choose runs with --participant-label, "
                         "--session-label or --bids-filter-file.")
    (kind,) = kinds
    acquisition = next(iter(acquisitions.values()))
    levels = [float(v) for v in snr if v is not None and math.isfinite(v)]
    snr_range = (min(levels) / 2, 2 * max(levels)) if levels else recipe.trained_for.snr
    shells = {"shells": len(acquisition.shells)} if "shells" in recipe.network else {}
    recipe = replace(
        recipe, groups=1, network={**recipe.network, **shells},
        schedule=replace(recipe.schedule, steps=steps or recipe.schedule.steps),
        acquisition=acquisition, trained_for=TrainingDomain.from_acquisitions(
            list(acquisitions.values()), snr=snr_range))
    name, start = f"{method}_{kind}", initial_weights(method, recipe, init)
    if states:
        states.mkdir(parents=True, exist_ok=True)
    # the state of a training of other people, weights at the start, or recipe is not this one's
    of = hashlib.sha256(repr((
        __version__, recipe.network, recipe.batch, recipe.pool, recipe.passes, recipe.beta,
        recipe.density, recipe.unbiased, recipe.odfs, recipe.trained_for.snr, recipe.held_out,
        replace(recipe.schedule, steps=1), start and start.card.sha256)).encode())
    for array in (acquisition.bvals, acquisition.bvecs, () if table is None else table.numpy()):
        of.update(np.ascontiguousarray(array).tobytes())
    saved = states / f"{name}.{of.hexdigest()[:8]}.ckpt" if states else None
    return name, train(method, recipe, seed=seed, device=device, intended_use=intended_use,
                       table=table, saved=saved, start=start, devices=devices)


def _held_out(simulate: Simulator, recipe: Recipe, count: int, seed: int, device: str
              ) -> list[SimulatedMinibatch]:
    generator = torch.Generator(device).manual_seed(seed)
    return [simulate(1024, recipe.groups if recipe.groups == 1 else 64, generator)
            for _ in range(count // 1024)]


@torch.no_grad()
def predictions(network: nn.Module, batches: Sequence[SimulatedMinibatch]
                ) -> tuple[Estimate, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Estimates, true parameters, density errors (voxel,) and noise (voxel, 2) over batches."""
    parts = []
    for b in batches:
        e = network(*b.inputs)
        parts.append((*e, b.parameters, density_error(e.odf, b.odf), b.noise))
    mean, log_sd, odfs, truth, error, noise = (torch.cat(p) for p in zip(*parts, strict=True))
    return Estimate(mean, log_sd, odfs), truth, error, noise


def calibrate(network: nn.Module, recipe: Recipe, batches: Sequence[SimulatedMinibatch]
              ) -> dict[str, Any]:
    """By parameter, factors for the SD so that ± 1.645 SD cover 90 % of held-out truths (split
    conformal prediction in bands: Vovk et al. 2005; Romano et al. 2019, arXiv:1905.03222), first in
    every band of predicted SD, then in every band of estimated coherence and noise; and, by noise,
    the misfit that 99.5 % of signals stay below."""
    found, truth, _, noise = predictions(network, batches)
    sd = predicted_sd(found)
    score = (clamped(recipe.tissue, found.mean) - truth).abs() / sd / QUANTILE
    with torch.no_grad():
        misfits = torch.cat([misfit(recipe.tissue, b.x, b.noise, b.shells, network(*b.inputs))
                             for b in batches])
    by_sd = {name: _in_bands(sd[:, i], score[:, i], LEVEL, BANDS)
             for i, name in enumerate(recipe.tissue.names)}
    where = {name: _in_cells(coherence(found.odf), noise[:, 0],
                             score[:, i] / interpolated(by_sd[name], sd[:, i]))
             for i, name in enumerate(recipe.tissue.names)}
    return {"sd": by_sd, "sd_where": where,
            "misfit": _in_bands(noise[:, 0], misfits, USUAL, NOISE_BANDS)}


def _in_bands(x: torch.Tensor, value: torch.Tensor, level: float, bands: int
              ) -> dict[str, list[float]]:
    """What a share `level` of the values stays below, in bands of x of equal counts."""
    order = x.argsort()
    return {"at": [float(v.median()) for v in x[order].tensor_split(bands)],
            "value": [_below(v, level) for v in value[order].tensor_split(bands)]}


def _in_cells(x: torch.Tensor, y: torch.Tensor, value: torch.Tensor) -> dict[str, Any]:
    """What a share LEVEL of the values stays below, in bands of x of equal width within 0–1, which
    keep the factor from changing steeply, and in bands of y of equal counts."""
    row = (CELLS[0] * x).long().clamp(0, CELLS[0] - 1)
    edges = torch.quantile(y, torch.linspace(0, 1, CELLS[1] + 1)[1:-1].to(y))
    column = torch.bucketize(y.contiguous(), edges)
    return {"rows": [(k + 0.5) / CELLS[0] for k in range(CELLS[0])],
            "columns": [float(v.median()) for v in y.sort().values.tensor_split(CELLS[1])],
            "value": [[_below(value[(row == i) & (column == k)], LEVEL) for k in range(CELLS[1])]
                      for i in range(CELLS[0])]}


def _below(values: torch.Tensor, level: float) -> float:
    """Quantile that a new value stays below with probability `level`; 1 of no value."""
    return float(torch.quantile(values, min(1.0, level * (1 + 1 / len(values))))
                 ) if len(values) else 1.0


def measure(network: nn.Module, recipe: Recipe, constants: Mapping[str, Any],
            batches: Sequence[SimulatedMinibatch]) -> dict[str, Any]:
    """On held-out simulation: mean square errors, and the share of truths within ± 1.645 SD."""
    found, truth, density, noise = predictions(network, batches)
    sd = calibrated(recipe.tissue, found, noise, constants)
    error = clamped(recipe.tissue, found.mean) - truth
    return {"samples": len(truth), "mse_density": float(density.mean())} | {
        f"{key}_{name}": float(value[:, i].mean()) for i, name in enumerate(recipe.tissue.names)
        for key, value in (("mse", error**2),
                           ("coverage90", (error.abs() <= QUANTILE * sd).float()))}
