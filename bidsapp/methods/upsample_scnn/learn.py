"""Training of the network on simulated patches, the calibration of its SD, and its card."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bidsapp import __version__, sh, training
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.domain import TrainingDomain
from bidsapp.methods.upsample_scnn.shells import PROPERTIES, fit_shells
from bidsapp.networks.builder import build_network
from bidsapp.networks.shresnet import CENTRE, neighbours
from bidsapp.networks.upsampling import L_MAX, Coefficients, Neighbourhoods, Shells
from bidsapp.simulate import patches, protocols

MEASURED = 0.8
"""Share of queries on a measured shell; the b-value of the others is random."""

FEW = 32
"""Largest number of directions of a shell in one half of the minibatches."""

UNKNOWN_NOISE = 0.1
"""SD of the logarithm of the noise that the network is told, relative to the true one."""

GAUSSIAN = 0.25
"""Share of protocols with Gaussian noise, as of signals whose phase was removed."""

WRONG_S0, LOST = 0.03, 1.6
"""Share of voxels whose measured S0 is too small, and the largest logarithm of the factor."""

OUTSIDE = 0.25
"""Share of patches in which neighbours are missing, as at the edge of a mask."""


LARGE = 5.0
"""Errors (SD) beyond which the loss grows linearly, so that single voxels do not dominate it."""

COVERAGE, QUANTILE = 0.9, 1.6448536269514722
"""Share of errors that ± QUANTILE SDs are calibrated to cover."""

BANDS, ROUNDS = 10, 3
"""Bands of each feature in the calibration, and rounds of the search for their factors."""


@dataclass(frozen=True)
class Recipe:
    """Settings of a training (training.toml).

    Parameters
    ----------
    network : mapping
        `architecture` and its arguments (`networks.builder`).
    schedule : Schedule
    trained_for : TrainingDomain
        Domain from which protocols and noise are drawn.
    patches : int
        Patches of each protocol in a minibatch. Each has 8 central voxels.
    groups : int
        Protocols of a minibatch.
    pool, passes : int
        Minibatches that are simulated together, and number of times that they are used.
    targets : int
        Random directions in which the prediction is compared with the truth.
    beta : float
        Exponent of the weight SD^(2 beta) of the negative log likelihood of a voxel (Seitzer et al.
        2022, arXiv:2203.09168).
    held_out : int
        Minibatches of the validation; the calibration has 8 times as many, and the test 4 times.
    """

    network: Mapping[str, Any]
    schedule: training.Schedule
    trained_for: TrainingDomain
    patches: int = 8
    groups: int = 16
    pool: int = 4
    passes: int = 1
    targets: int = 24
    beta: float = 0.5
    held_out: int = 16


class PatchMinibatch(NamedTuple):
    """Simulated patches, ordered by protocol: input of the network, and truth in central voxels.

    `inputs` are the arguments of the network. scale: (group, 45), of `shells.ShellFits`. basis:
    (group, target, 45), SH functions along the target directions. truth: (centre, target), expected
    value of the measurement over the measured S0. sigma: (centre,), σ/S0 as the network is told.
    bands: (centre, 2), b-value of the query (ms/µm²), and directions of the nearest shell.
    """

    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor, Neighbourhoods, Shells]
    scale: torch.Tensor
    basis: torch.Tensor
    truth: torch.Tensor
    sigma: torch.Tensor
    bands: torch.Tensor


class Simulator:
    """Simulator of minibatches of patches. All random numbers come from the generator given."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        inner = torch.cartesian_prod(*[torch.arange(1, patches.SIZE - 1)] * 3)
        flat = inner @ torch.tensor([patches.SIZE**2, patches.SIZE, 1])
        self.index = flat[:, None] + torch.from_numpy(neighbours((patches.SIZE,) * 3))

    def draw_pool(self, generator: torch.Generator) -> list[PatchMinibatch]:
        """Simulate the minibatches of the next steps of a training: a pool, `passes` times."""
        return [self(generator) for _ in range(self.recipe.pool)] * self.recipe.passes

    def __call__(self, generator: torch.Generator, **domain: Any) -> PatchMinibatch:
        """Simulate a minibatch; `domain` replaces options of `protocols.draw`, snr and query."""
        recipe, device = self.recipe, generator.device
        trained = recipe.trained_for
        assert trained.shell_count and trained.snr
        b_range = tuple(v / 1000 for v in trained.shells[0].b)
        low, high = map(math.log, domain.pop("snr", trained.snr))

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=generator, device=device)

        fewest, most = trained.shells[0].directions
        most = most if uniform() < 0.5 else min(FEW, most)
        stack = protocols.draw(recipe.groups, generator, l_max=patches.L_MAX, **{
            "shells": trained.shell_count, "b": b_range, "b0": trained.b0,
            "directions": (fewest, most), "single": 2.0, "uneven": 0.3, **domain})

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=device)

        groups = recipe.groups
        count = (stack.count > 0).sum(1)
        chosen = (uniform(groups) * count).long()
        query = stack.b.gather(1, chosen[:, None])[:, 0]
        other = (b_range[0]**0.5 + (b_range[1]**0.5 - b_range[0]**0.5) * uniform(groups))**2
        query = torch.where(uniform(groups) < MEASURED, query, other)
        sigma = torch.exp(-low - (high - low) * uniform(groups))
        magnitude = uniform(groups) > GAUSSIAN
        told = sigma * torch.exp(UNKNOWN_NOISE * normal(groups))
        tissue = patches.draw(torch.cat([stack.b, query[:, None]], 1), recipe.patches, generator)
        signal, b0 = patches.measure(tissue, stack, sigma, magnitude, generator)
        # at edges the b0 volumes of real scans may show less of a voxel than the others
        lost = torch.exp(-LOST * uniform(*b0.shape)) * (uniform(*b0.shape) < WRONG_S0)
        b0 = torch.maximum(b0 * torch.where(lost > 0, lost, 1.0), sigma.view(-1, 1, 1))
        fits = fit_shells(stack, query, told, magnitude)
        x = torch.einsum("gskd,gpvsd->gpvsk", fits.matrix, signal / b0[..., None, None])
        noise = told.view(-1, 1, 1, 1) / b0[..., None] * torch.stack(
            [torch.ones_like(stack.b0), stack.b0.rsqrt()], 1)[:, None, None]
        left = torch.einsum("gsde,gpvse->gpvsd", fits.remainder, signal)
        misfit = left.square().sum((3, 4)) / told.view(-1, 1, 1).square()
        noise = torch.cat([noise, (misfit + 0.01).log()[..., None]], -1)
        index = self.index.to(device)
        centres = index[:, CENTRE]
        directions = nn.functional.normalize(normal(groups, recipe.targets, 3), dim=-1)
        basis = sh.evaluate(patches.L_MAX, directions)
        clean = tissue.coefficients[:, :, centres, -1] @ basis[:, None].mT
        floor = patches.expected_magnitude(clean.clamp(min=0), sigma.view(-1, 1, 1, 1))
        truth = torch.where(magnitude.view(-1, 1, 1, 1), floor, clean) / b0[:, :, centres, None]
        # a half space of a patch may be outside of the mask, but for the centres
        side = (patches.positions().to(device) @ nn.functional.normalize(
            normal(groups * recipe.patches, 3, 1), dim=1))[..., 0]
        depth = 2.5 * uniform(groups * recipe.patches, 1)
        inside = (side < depth) | (uniform(groups * recipe.patches, 1) > OUTSIDE)
        present = inside[:, index]
        present[:, :, CENTRE] = True
        start = torch.arange(groups * recipe.patches, device=device) * patches.SIZE**3
        rows = (start[:, None, None] + index).flatten(0, 1)
        per_group = recipe.patches * len(centres)
        nearest = (stack.b.log() - query.log()[:, None]).abs().masked_fill(
            stack.count == 0, math.inf).argmin(1, keepdim=True)
        bands = torch.stack([query, stack.count.gather(1, nearest)[:, 0]], 1)
        noise = noise.flatten(0, 2)
        return PatchMinibatch(
            (x.flatten(0, 2), noise, b0.log().flatten(),
             Neighbourhoods(rows, present.flatten(0, 1)), fits.shells),
            fits.scale, basis[..., :sh.size(L_MAX)], truth.flatten(0, 2),
            noise[rows[:, CENTRE], 0], bands.repeat_interleave(per_group, 0))


def evaluate(coefficients: Coefficients, scale: Float[torch.Tensor, "group 45"],
             basis: Float[torch.Tensor, "group target 45"]
             ) -> tuple[Float[torch.Tensor, "centre target"], Float[torch.Tensor, "centre target"]]:
    """Evaluate a prediction along directions: S/S0, and the logarithm of its SD."""
    def along(values: torch.Tensor, factor: torch.Tensor | float) -> torch.Tensor:
        groups = values.unflatten(1, (len(basis), -1)).permute(1, 2, 0) * factor
        return (groups @ basis[..., :len(values)].mT).flatten(0, 1)

    return along(coefficients.mean, scale[:, None]), along(coefficients.log_sd, 1.0)


def compute_loss(network: nn.Module, minibatch: PatchMinibatch, beta: float) -> torch.Tensor:
    """Compute the mean negative log likelihood, weighted by (SD/σ)^(2 beta).

    Beyond LARGE SDs the square of an error is continued by a straight line (Huber).
    """
    predicted, log_sd = evaluate(network(*minibatch.inputs), minibatch.scale, minibatch.basis)
    log_sd = log_sd.clamp(-9, 2)
    relative = log_sd - minibatch.sigma.clamp(min=1e-3).log()[:, None]
    error = nn.functional.huber_loss((predicted - minibatch.truth) * torch.exp(-log_sd),
                                     torch.zeros_like(log_sd), reduction="none", delta=LARGE)
    return (torch.exp(2 * beta * relative.detach()) * (error + relative)).mean()


class Predictions(NamedTuple):
    """Predictions of held-out minibatches, one row per central voxel and target direction.

    error, log_sd: (n,), of S/S0. features: (n, FEATURES), see `features`.
    """

    error: torch.Tensor
    log_sd: torch.Tensor
    features: torch.Tensor


FEATURES = ("sd", "noise", "anisotropy", "b", "directions")
"""Names of the features that the factors of the SD depend on (`features`)."""


def features(coefficients: Coefficients, log_sd: Float[torch.Tensor, "centre target"],
             sigma: Float[torch.Tensor, " centre"], bands: Float[torch.Tensor, "centre 2"],
             scale: Float[torch.Tensor, "centre 45"]) -> Float[torch.Tensor, "centre target 5"]:
    """Compute the features that the calibration of the SD depends on.

    They are the logarithms of the predicted SD over σ and of σ/S0, the anisotropy of the predicted
    signal (the power of its degrees above 0 over that of all, square root), b in ms/µm², and the
    number of directions of the nearest shell.
    """
    c = (coefficients.mean.T * scale).square()
    anisotropy = (c[:, 1:].sum(1) / c.sum(1).clamp(min=1e-12)).sqrt()
    log_sigma = sigma.clamp(min=1e-3).log()
    voxel = torch.stack([log_sigma, anisotropy, *bands.unbind(1)], 1)
    return torch.cat([(log_sd - log_sigma[:, None])[..., None],
                      voxel[:, None].expand(-1, log_sd.shape[1], -1)], 2)


@torch.no_grad()
def predict(network: nn.Module, minibatches: Sequence[PatchMinibatch]) -> Predictions:
    """Predict the signals of minibatches."""
    parts = []
    for m in minibatches:
        coefficients = network(*m.inputs)
        predicted, log_sd = evaluate(coefficients, m.scale, m.basis)
        scale = m.scale.repeat_interleave(len(m.truth) // len(m.scale), 0)
        parts.append(((predicted - m.truth).flatten(), log_sd.flatten(), features(
            coefficients, log_sd, m.sigma, m.bands, scale).flatten(0, 1)))
    return Predictions(*(torch.cat(p) for p in zip(*parts, strict=True)))


def calibrate(predictions: Predictions) -> dict[str, Any]:
    """Compute factors of the SD, so that ± QUANTILE SD cover COVERAGE of the errors in bands.

    The factor is a product of one factor for each of FEATURES, a linear function between bands
    with equal numbers of errors. The factors are found in turn, ROUNDS times (split conformal
    prediction in bands, Vovk et al. 2005).

    Returns
    -------
    dict
        For each of FEATURES, `at` and `value`, as `log_factor` takes them: positions and logarithms
        of factors.
    """
    score = predictions.error.abs().clamp(min=1e-9).log() - predictions.log_sd - math.log(QUANTILE)
    positions, members = [], []
    for x in predictions.features.unbind(1):
        edges = torch.quantile(x[:: max(1, len(x) // 100_000)], torch.linspace(
            0, 1, BANDS + 1)[1:-1].to(x))
        member = torch.bucketize(x.contiguous(), edges.unique())
        members.append(member)
        positions.append([float(x[member == k].median()) for k in member.unique()])
    factors = {name: {"at": at, "value": [0.0] * len(at)}
               for name, at in zip(FEATURES, positions, strict=True)}
    for _ in range(ROUNDS):
        for i, name in enumerate(FEATURES):
            rest = score - log_factor(predictions.features, factors)
            for j, k in enumerate(members[i].unique()):
                part = rest[members[i] == k]
                factors[name]["value"][j] += float(part.kthvalue(
                    max(1, round(COVERAGE * len(part))))[0])
    return factors


def log_factor(features: Float[torch.Tensor, "*batch 5"], factors: Mapping[str, Any]
               ) -> Float[torch.Tensor, "*batch"]:
    """Compute the logarithm of the factor of the SD: the sum over features of piecewise linear
    functions, constant outside of their bands."""
    total = torch.zeros_like(features[..., 0])
    for name, x in zip(FEATURES, features.unbind(-1), strict=True):
        at, value = (x.new_tensor(factors[name][k]) for k in ("at", "value"))
        if len(at) == 1:
            total = total + value
            continue
        right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
        share = ((x - at[right - 1]) / (at[right] - at[right - 1]).clamp(min=1e-9)).clamp(0, 1)
        total = total + torch.lerp(value[right - 1], value[right], share)
    return total


def measure(predictions: Predictions, factors: Mapping[str, Any]) -> dict[str, Any]:
    """Measure the errors, and the coverage of ± QUANTILE SD, in all and in bands of FEATURES."""
    log_sd = predictions.log_sd + log_factor(predictions.features, factors)
    covered = (predictions.error.abs() <= QUANTILE * log_sd.exp()).float()
    sigma = predictions.features[:, 1].exp()
    bands = {}
    for i, name in enumerate(FEATURES):
        order = predictions.features[:, i].argsort()
        bands[name] = [[round(float(predictions.features[part, i].median()), 4),
                        round(float(covered[part].mean()), 4)]
                       for part in order.tensor_split(5)]
    return {"errors": len(covered),
            "median_error_over_noise": float((predictions.error / sigma).abs().median()),
            "coverage90": float(covered.mean()), "coverage90_in_bands": bands}


def build(description: Mapping[str, Any], *, grid: int | None = None) -> nn.Module:
    """Build the network of a recipe or a card; `grid` replaces the degree of its half grids."""
    return build_network({**description, **({"grid": grid} if grid else {})},
                         properties=PROPERTIES)


def train(method: str, recipe: Recipe, *, seed: int, device: str, saved: Path | None = None,
          intended_use: str = "", start: Checkpoint | None = None) -> Checkpoint:
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
    intended_use : str
        For the card.
    start : Checkpoint, optional
        Initial weights; default: random.

    Returns
    -------
    Checkpoint
    """
    with training.seeded(seed):
        network = build(recipe.network)
    if start:
        start.into(network)
    simulate = Simulator(recipe)

    def hold_out(count: int, stream: int) -> list[PatchMinibatch]:
        generator = torch.Generator(device).manual_seed(stream)
        return [simulate(generator) for _ in range(count)]

    held_out = hold_out(recipe.held_out, seed + 1)

    def validate(model: nn.Module) -> float:
        with torch.no_grad():
            return float(np.mean([float(compute_loss(model, m, 0.0)) for m in held_out]))

    history = training.train(
        network, simulate.draw_pool, lambda model, m: compute_loss(model, m, recipe.beta),
        recipe.schedule, seed=seed, device=device, validate=validate, saved=saved, name=method)
    factors = calibrate(predict(network, hold_out(8 * recipe.held_out, seed + 2)))
    metrics = measure(predict(network, hold_out(4 * recipe.held_out, seed + 3)), factors)
    last = history[-1]
    voxels = recipe.groups * recipe.patches * len(simulate.index)
    return Checkpoint(network.state_dict(), Card(
        method=method, network=dict(recipe.network), seed=seed, trained_for=recipe.trained_for,
        training={"steps": int(last["step"]), "voxels": int(last["step"]) * voxels // recipe.passes,
                  "seconds": round(last["seconds"]), "device": device,
                  "threads": torch.get_num_threads() if device == "cpu" else None,
                  "start": start.card.sha256 if start else "random",
                  "start_training": dict(start.card.training) if start else None,
                  "data": "simulated patches of random tissue (simulate.patches)"},
        intended_use=intended_use, versions={"qsphere": __version__, "torch": torch.__version__},
        constants={"sd": factors}, metrics=metrics))
