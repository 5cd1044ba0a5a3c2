"""Spherical networks from simulation to maps: what the methods of this family share.

A network is trained on simulated voxels (`simulate`), for one acquisition or for protocols at
large, and its posterior SDs are calibrated on held-out simulation. The same preparation, an SH fit
of every shell over the mean b0, serves training and application.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bidsapp import __version__, sh, training
from bidsapp.acquisition import Acquisition, Shell
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.networks.scnn import Estimate, SphericalNetwork
from bidsapp.simulate import forward, protocols
from bidsapp.simulate.likelihood import Likelihood, hint
from bidsapp.simulate.protocols import Protocols
from bidsapp.simulate.tissue import Tissue

L_SIMULATED = 12
"""Degree of the densities and signals that are simulated; fits and maps go to 8."""

LEVEL = 0.9
QUANTILE = 1.6448536269514722
"""A normal number is within ± this many SDs with probability LEVEL."""

BANDS = 24
"""Of the predicted SD, in each of which SDs are calibrated."""

TOLERANCE = 0.01
"""Of S0: misfit of the network's own reconstruction that is no sign of a strange signal."""

ASSUMED_SNR = 20.0
"""Stands for S0 over noise SD where the noise could not be measured."""

GRID = 47
"""Degree of the half grids where a network is applied (385 points). Densities turn with the head
within 2e-4; on the coarse grid that is enough to train on, within 2 %."""

BLOCK = 512
"""Voxels whose layers fit the cache."""

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class Range:
    """What a network was trained for. snr: S0 over the noise SD. b in ms/µm². An acquisition
    stands here where it was trained for that alone."""

    snr: tuple[float, float] = (10.0, 100.0)
    b: tuple[float, float] = (0.5, 5.0)
    directions: tuple[int, int] = (6, 90)
    shells: tuple[int, int] = (1, 4)
    b_delta: tuple[float, ...] = (1.0,)
    b0: tuple[int, int] = (1, 16)
    acquisition: Acquisition | None = None
    s0_known: bool = False


@dataclass(frozen=True)
class Recipe:
    """What is learned and how: a method's training.toml beside its `Tissue`.

    groups: protocols side by side in a batch. beta: weight of a voxel's error, SD^(2 beta − 2):
    1 for the least mean square error, 0 for the likelihood, between them where the noise varies.
    density: weight of the density's mean square error over the sphere.
    """

    tissue: Tissue
    network: Mapping[str, Any]
    schedule: training.Schedule
    trained_for: Range
    batch: int = 512
    groups: int = 8
    beta: float = 0.5
    density: float = 1.0
    odfs: Mapping[str, Any] = field(default_factory=dict)


def read_recipe(tissue: Tissue, table: Mapping[str, Any]) -> Recipe:
    """A recipe from a training.toml."""
    rest = {k: v for k, v in table.items() if k not in ("schedule", "trained_for")}
    known: dict[str, Any] = {k: tuple(v) for k, v in table["trained_for"].items()}
    return Recipe(tissue, schedule=training.Schedule(**table["schedule"]),
                  trained_for=Range(**known), **rest)


class Simulator:
    """Draws what a network sees and what it should say, from a generator and nothing else."""

    def __init__(self, recipe: Recipe, table: torch.Tensor | None = None) -> None:
        self.recipe, self.table = recipe, table
        known = recipe.trained_for
        self.fixed = None if known.acquisition is None else protocols.of(
            known.acquisition, known.acquisition.shells, L_SIMULATED, s0_known=known.s0_known)
        self.power = density_power(recipe, table)

    def protocols(self, groups: int, generator: torch.Generator) -> Protocols:
        of = self.recipe.trained_for
        drawn = self.fixed or protocols.draw(
            groups, generator, l_max=L_SIMULATED, shells=of.shells, b=of.b, b0=of.b0,
            directions=of.directions, b_delta=of.b_delta)
        return drawn.to(torch.zeros((), device=generator.device))

    def __call__(self, count: int, groups: int, generator: torch.Generator) -> training.Batch:
        """(x, noise, shells, hint, parameters, density up to degree 8), `count` voxels."""
        side = self.protocols(groups, generator)
        tissue = self.recipe.tissue
        parameters = tissue.draw(count, generator)
        s, odfs = tissue.simulate(side, parameters, generator, L_SIMULATED, table=self.table,
                                  **self.recipe.odfs)
        low, high = map(math.log, self.recipe.trained_for.snr)
        snr = torch.exp(low + (high - low) * torch.rand(count, generator=generator,
                                                        device=generator.device))
        x, noise = protocols.measure(side, side.signals(s), 1 / snr, generator)
        found = hint(Likelihood(tissue, self.power.to(x), x, noise, side.shells))
        return x, noise, side.shells, found, parameters, odfs[:, :sh.size(protocols.L_FIT)]


def density_power(recipe: Recipe, table: torch.Tensor | None) -> Float[torch.Tensor, " degree"]:
    """Mean square of a coefficient of the densities that are drawn, by degree 2, 4, 6, 8."""
    generator = torch.Generator().manual_seed(0)
    drawn = recipe.tissue.densities(4096, generator, protocols.L_FIT, table=table, **recipe.odfs)
    return torch.stack([drawn[:, sh.size(l - 2):sh.size(l)].square().mean()
                        for l in range(2, protocols.L_FIT + 1, 2)])


def loss_of(recipe: Recipe, estimate: Estimate, parameters: torch.Tensor, odf: torch.Tensor
            ) -> torch.Tensor:
    """Gaussian likelihood of the parameters, weighed by SD^(2 beta) (Seitzer et al. 2022,
    arXiv:2203.09168), and mean square error of the density over the sphere."""
    log_sd = estimate.log_sd.clamp(-7, 2)
    error = estimate.mean - parameters
    weight = torch.exp(2 * recipe.beta * log_sd.detach())
    likelihood = weight * (0.5 * error**2 * torch.exp(-2 * log_sd) + log_sd)
    return likelihood.mean(0).sum() + recipe.density * density_error(estimate.odf, odf).mean()


def density_error(found: Float[torch.Tensor, "voxel 45"], truth: Float[torch.Tensor, "voxel 45"]
                  ) -> Float[torch.Tensor, " voxel"]:
    """Mean square over the sphere (Parseval), (1/sr)²."""
    return (found - truth).square().sum(1) / (4 * math.pi)


def train(method: str, recipe: Recipe, *, seed: int, device: str, saved: Path | None = None,
          table: torch.Tensor | None = None, held_out: int = 16384, intended_use: str = ""
          ) -> Checkpoint:
    """Train, calibrate and measure a network; its weights and card.

    saved: state file, from which an interrupted training goes on. table: (row, 45) densities.
    """
    with training.seeded(seed):
        network = SphericalNetwork(len(recipe.tissue.names), **recipe.network)
    simulate = Simulator(recipe, table)
    batches = _held_out(simulate, recipe, held_out, seed + 1, device)

    def validate(model: nn.Module) -> float:
        # beta = 0, the likelihood: the loss of another beta does not fall with the error
        plain = replace(recipe, beta=0.0)
        return float(np.mean([float(loss_of(plain, model(*b[:4]), *b[4:])) for b in batches]))

    start = time.monotonic()
    history = training.train(
        network, lambda g: simulate(recipe.batch, recipe.groups, g),
        lambda model, b: loss_of(recipe, model(*b[:4]), *b[4:]), recipe.schedule,
        seed=seed, device=device, validate=validate, saved=saved, name=method)
    seconds = time.monotonic() - start
    constants = calibrate(network, recipe, _held_out(simulate, recipe, 8 * held_out, seed + 2,
                                                     device))
    constants["density_power"] = simulate.power.tolist()
    metrics = measure(network, recipe, constants, _held_out(simulate, recipe, 4 * held_out,
                                                            seed + 3, device))
    known = recipe.trained_for
    return Checkpoint(network.state_dict(), Card(
        method=method, network=dict(recipe.network), seed=seed,
        trained_for={"SNR": list(known.snr), **(
            {"b": list(known.b), "directions": list(known.directions), "b0": list(known.b0),
             "shells": list(known.shells), "b_delta": list(known.b_delta)}
            if known.acquisition is None else told(known.acquisition))},
        training={"steps": int(history[-1]["step"]) if history else 0,
                  "samples": int(history[-1]["step"]) * recipe.batch if history else 0,
                  "seconds": round(seconds), "device": device,
                  "threads": torch.get_num_threads() if device == "cpu" else None,
                  "data": "simulated: " + ("Watson mixtures" if table is None else
                                           "Watson mixtures and measured densities")},
        intended_use=intended_use, versions={"qsphere": __version__, "torch": torch.__version__},
        constants=constants, metrics=metrics))


def told(acquisition: Acquisition) -> dict[str, Any]:
    """Shells of one acquisition, as a card holds them."""
    return {"acquisition": [{"b": s.b / 1000, "b_delta": s.b_delta, "directions": len(s)}
                            for s in acquisition.shells], "b0": int(acquisition.b0.sum())}


def _held_out(simulate: Simulator, recipe: Recipe, count: int, seed: int, device: str
              ) -> list[training.Batch]:
    generator = torch.Generator(device).manual_seed(seed)
    return [simulate(1024, recipe.groups if recipe.groups == 1 else 64, generator)
            for _ in range(count // 1024)]


@torch.no_grad()
def predictions(network: nn.Module, batches: Sequence[training.Batch]
                ) -> tuple[torch.Tensor, ...]:
    """Mean, SD, truth (voxel, parameter), density error and σ/S0 (voxel,) over batches."""
    parts = []
    for x, noise, shells, told, truth, odf in batches:
        e = network(x, noise, shells, told)
        parts.append((e.mean, e.log_sd.clamp(-7, 2).exp(), truth, density_error(e.odf, odf),
                      noise[:, 0]))
    return tuple(torch.cat(p) for p in zip(*parts, strict=True))


def calibrate(network: nn.Module, recipe: Recipe, batches: Sequence[training.Batch]
              ) -> dict[str, Any]:
    """By parameter, factors for the SD so that ± 1.645 SD cover 90 % of held-out truths in every
    band of predicted SD (split conformal prediction in bands: Vovk et al. 2005; Romano et al. 2019,
    arXiv:1905.03222), and the misfit that 99.9 % of signals stay below."""
    mean, sd, truth, *_ = predictions(network, batches)
    mean = clamped(recipe.tissue, mean)
    out: dict[str, Any] = {"sd": {}}
    for i, name in enumerate(recipe.tissue.names):
        order = sd[:, i].argsort()
        score = ((mean - truth).abs() / sd)[order, i]
        bands = score.tensor_split(BANDS)
        out["sd"][name] = {
            "predicted": [float(v.median()) for v in sd[order, i].tensor_split(BANDS)],
            "factor": [float(torch.quantile(v, min(1.0, LEVEL * (1 + 1 / len(v)))) / QUANTILE)
                       for v in bands]}
    with torch.no_grad():
        misfits = [misfit(recipe.tissue, x, noise, shells, network(x, noise, shells, told))
                   for x, noise, shells, told, *_ in batches]
    out["misfit"] = float(torch.quantile(torch.cat(misfits), 0.999))
    return out


def clamped(tissue: Tissue, mean: Float[torch.Tensor, "voxel n"]) -> Float[torch.Tensor, "voxel n"]:
    low, high = mean.new_tensor(tissue.ranges).T
    return torch.minimum(torch.maximum(mean, low), high)


def calibrated(tissue: Tissue, sd: Float[torch.Tensor, "voxel n"], constants: Mapping[str, Any]
               ) -> Float[torch.Tensor, "voxel n"]:
    """Predicted SDs times their factor, interpolated between bands; at most half the range."""
    columns = []
    for i, (name, (low, high)) in enumerate(zip(tissue.names, tissue.ranges, strict=True)):
        table = constants["sd"][name]
        at, factor = (sd.new_tensor(table[k]) for k in ("predicted", "factor"))
        right = torch.searchsorted(at, sd[:, i].contiguous()).clamp(1, len(at) - 1)
        step = (at[right] - at[right - 1]).clamp(min=1e-9)
        share = ((sd[:, i] - at[right - 1]) / step).clamp(0, 1)
        columns.append((sd[:, i] * torch.lerp(factor[right - 1], factor[right], share)
                        ).clamp(max=(high - low) / 2))
    return torch.stack(columns, 1)


def misfit(tissue: Tissue, x: Float[torch.Tensor, "coef voxel shell"],
           noise: Float[torch.Tensor, "voxel 2"], shells: Float[torch.Tensor, "group shell 3"],
           estimate: Estimate) -> Float[torch.Tensor, " voxel"]:
    """Root mean square of the coefficients less those of the signal that the estimate stands for,
    in units of their noise, √(4π (σ² + TOLERANCE²)/directions)."""
    per_group = x.shape[1] // len(shells)
    b, b_delta, scale = shells.repeat_interleave(per_group, 0).unbind(-1)
    p = clamped(tissue, estimate.mean)
    parts = tissue.compartments(p)
    if tissue.aligned is not None:  # as if they followed the density, too: the axis is not at hand
        parts = parts + tissue.aligned(p)
    k = forward.kernel(parts, 1000 * b, b_delta, protocols.L_FIT)
    residual = (x - forward.convolve(estimate.odf, k).permute(2, 0, 1)) * (x != 0)
    level = scale.clamp(min=1e-3) * (4 * math.pi * (noise[:, :1] ** 2 + TOLERANCE**2)).sqrt()
    return ((residual / level) ** 2).sum((0, 2)).div((x != 0).sum((0, 2)).clamp(min=1)).sqrt()


def measure(network: nn.Module, recipe: Recipe, constants: Mapping[str, Any],
            batches: Sequence[training.Batch]) -> dict[str, Any]:
    """On held-out simulation: mean square errors, and the share of truths within ± 1.645 SD."""
    mean, sd, truth, density, _ = predictions(network, batches)
    mean, sd = clamped(recipe.tissue, mean), calibrated(recipe.tissue, sd, constants)
    error = mean - truth
    return {"samples": len(mean), "mse_density": float(density.mean())} | {
        f"{key}_{name}": float(value[:, i].mean()) for i, name in enumerate(recipe.tissue.names)
        for key, value in (("mse", error**2),
                           ("coverage90", (error.abs() <= QUANTILE * sd).float()))}


def check(acquisition: Acquisition, known: Mapping[str, Any], name: str) -> list[Shell]:
    """The shells that a network may use: those within what it was trained for.

    Raises:
        Refusal: there is no b0, fewer than two such shells, or, for a network trained for one
            acquisition, not just its shells.
    """
    shells, one = acquisition.shells, known.get("acquisition")
    if one:
        wanted = ", ".join(f"{w['directions']} at b = {1000 * w['b']:.0f}" for w in one)
        usable = [s for s, w in zip(shells, one, strict=False)
                  if abs(s.b / 1000 - w["b"]) < 0.05 * w["b"] and len(s) == w["directions"]
                  and abs(s.b_delta - w["b_delta"]) < 0.05]
        fits = len(usable) == len(shells) == len(one)
        needed = f"just the shells it was trained for, {wanted} s/mm²"
    else:
        (low, high), least = known["b"], known["directions"][0]
        usable = [s for s in shells if low <= s.b / 1000 <= high
                  and (len(s) >= least or abs(s.b_delta) < protocols.ISOTROPIC)
                  and any(abs(s.b_delta - d) < 0.05 for d in known["b_delta"])]
        fits = len(usable) >= 2
        needed = (f"two or more shells of b = {1000 * low:.0f}–{1000 * high:.0f} s/mm² with "
                  f"{least} or more directions and b_delta "
                  f"{', '.join(f'{d:g}' for d in known['b_delta'])}")
    if not (fits and acquisition.b0.any()):
        found = ", ".join(f"{len(s)} at b = {s.b:.0f} s/mm² (b_delta {s.b_delta:.2g})"
                          for s in shells) or "none weighted"
        raise Refusal(
            f"{name} found {int(acquisition.b0.sum())} volumes without weighting and shells: "
            f"{found}. Needed are a b0 and {needed}. Check that b-values are in s/mm², not ms/µm²; "
            "or leave it out of --estimate.")
    return usable


def shipped(name: str) -> Checkpoint:
    """The weights of a method that come with the program.

    Raises:
        Refusal: none do.
    """
    folder = WEIGHTS / name
    if not folder.is_dir():
        raise Refusal(f"{name} has no weights in {folder}. Needed are those of the release, or "
                      f"new ones: python tools/train_weights.py {name} {folder}")
    return load(folder, name)


def estimate(checkpoint: Checkpoint, tissue: Tissue, dwi: Dwi, device: str
             ) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, Any], np.ndarray]:
    """Maps, counts of special voxels, parameters for the sidecar, and where there is an estimate.

    Maps are the parameters, NAME_std, odf (coefficients up to degree 8) and flag: 1 where the
    signal does not look like the simulated ones, 2 where the noise lies above their range.
    """
    card, acquisition = checkpoint.card, dwi.acquisition
    shells = check(acquisition, card.trained_for, card.method)
    arguments = {**card.network, "grid": GRID}
    network = checkpoint.into(SphericalNetwork(len(tissue.names), **arguments)).to(device)
    s0_known = bool((dwi.mean_b0 == 1).all())
    side = protocols.of(acquisition, shells, protocols.L_FIT, s0_known=s0_known)
    fits = [side.fit[0, i, :, :len(s)].to(device, torch.float32) for i, s in enumerate(shells)]
    index = [torch.as_tensor(s.indices, device=device) for s in shells]
    b0 = torch.as_tensor(np.flatnonzero(acquisition.b0), device=device)
    told = side.shells.to(device, torch.float32)
    if "directions" in card.trained_for:
        told[..., 2] = told[..., 2].clamp(min=card.trained_for["directions"][1] ** -0.5)
    least, most = (1 / snr for snr in reversed(card.trained_for["SNR"]))
    power = torch.tensor(card.constants["density_power"], device=device, dtype=torch.float64)
    of_mean = 0.0 if s0_known else len(b0) ** -0.5

    def of_block(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        level = signal[:, b0].mean(1)
        usable = level > 0
        level = torch.where(usable, level, 1)
        # no signal is below 0 or at twice S0: such voxels are flagged, and must not run away
        ratio = (signal / level[:, None]).clamp(0, 2)
        x = torch.stack([fit @ ratio[:, i].T for fit, i in zip(fits, index, strict=True)], 2)
        sigma = (dwi.noise_sd / level if dwi.noise_sd else torch.full_like(level, 1 / ASSUMED_SNR))
        bounded = sigma.clamp(least, most)[:, None]
        noise = torch.cat([bounded, of_mean * bounded], 1)
        # in double precision, else rounding decides which way the search goes on a flat ridge
        likely = hint(Likelihood(tissue, power, x.double(), noise.double(), told.double()))
        found = network(x, noise, told, likely.float())
        sd = calibrated(tissue, found.log_sd.clamp(-7, 2).exp(), card.constants)
        strange = misfit(tissue, x, noise, told, found) > card.constants["misfit"]
        flag = torch.where(sigma > 1.001 * most, 2.0, torch.where(strange, 1.0, 0.0))
        return {"mean": clamped(tissue, found.mean), "sd": sd, "odf": found.odf, "flag": flag,
                "usable": usable}

    with torch.inference_mode():
        found = map_voxels(of_block, dwi.signal, device, BLOCK)
    usable = found["usable"]
    maps = {key: np.where(usable, found[part][:, i], 0).astype(np.float32)
            for i, name in enumerate(tissue.names)
            for key, part in ((name, "mean"), (f"{name}_std", "sd"))}
    maps["odf"] = np.where(usable[:, None], found["odf"], 0).astype(np.float32)
    maps["flag"] = np.where(usable, found["flag"], 0).astype(np.float32)
    short = card.method.removeprefix("estimate_")
    counts = {f"{short}_no_b0_signal": int((~usable).sum()),
              f"{short}_strange_signal": int((maps["flag"] == 1).sum()),
              f"{short}_noise_out_of_range": int((maps["flag"] == 2).sum())}
    return maps, counts, {
        "Weights": card.sha256, "Shells": [round(s.b) for s in shells],
        "Uncertainty": "± 1.645 SD cover 90 % of held-out simulated truths",
        "NoiseSD": dwi.noise_sd if dwi.noise_sd else f"assumed: S0 / {ASSUMED_SNR:.0f}",
        "TrainedFor": dict(card.trained_for)}, usable
