"""Network of the free-water fraction: training data and training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from bidsapp.acquisition import Acquisition
from bidsapp.blocks import one_thread
from bidsapp.networks.mlp import mlp
from bidsapp.simulate import mixture
from bidsapp.simulate.mixture import Diffusivities
from bidsapp.simulate.noise import rician
from bidsapp.training import Schedule, seeded, train

NARROWEST = 8
"""Minimum width of a hidden layer."""

CHUNK = 10_000
"""Number of mixtures that are simulated at a time."""

MAX_NOISE = 0.2
"""Maximum noise SD over S0 in the training; voxels with more noise are background."""


class Network(nn.Module):
    """Perceptron from S/S0 (voxel, n) of the weighted volumes to the fraction and its SD (voxel,).

    Its widths are n → n/2 → n/4 → n/8 → 2, with tanh. Both outputs are logistic, because a fraction
    lies within 0–1 and its SD cannot exceed ½.

    Parameters
    ----------
    mean, scale : (n,) tensor
        Mean and SD of the training signals.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor) -> None:
        super().__init__()
        n = len(mean)
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = mlp([n, *(max(n // k, NARROWEST) for k in (2, 4, 8)), 2], nn.Tanh)

    def forward(self, signal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = torch.sigmoid(self.layers((signal - self.mean) / self.scale))
        return out[:, 0], 0.5 * out[:, 1]


def draw_mixtures(diffusivities: Diffusivities, acquisition: Acquisition, count: int, seed: int,
                  device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Simulate mixtures without noise for the training.

    One half of the voxels are mixtures of `mixture.draw` (mode `sample`). In the other half, water
    is uniform on 0–1 and any tissue may be absent, so that pure tissue and pure water occur, too:
    each tissue is kept with a probability that is itself uniform on ¼–1, but at least one is kept.

    Parameters
    ----------
    diffusivities : Diffusivities
    acquisition : Acquisition
    count : int
        Number of voxels.
    seed : int
    device : str

    Returns
    -------
    signal : (count, measurement) tensor
        S/S0.
    water : (count,) tensor
        Fraction of free water.
    """
    signals, water = [], []
    for i in range(-(-count // CHUNK)):
        entropy = np.random.SeedSequence([seed, i]).generate_state(1)[0]
        fractions, _, tensors = mixture.draw("sample", diffusivities, CHUNK, int(entropy))
        rng = np.random.default_rng([seed, i])
        tissue = fractions[1::2, :-1]
        keep = rng.uniform(size=tissue.shape) < rng.uniform(0.25, 1, (len(tissue), 1))
        keep[np.arange(len(tissue)), rng.integers(tissue.shape[1], size=len(tissue))] = True
        tissue = tissue * keep
        free = rng.uniform(size=(len(tissue), 1))
        fractions[1::2] = np.hstack([tissue / tissue.sum(1, keepdims=True) * (1 - free), free])
        attenuation = mixture.attenuation(fractions, tensors, acquisition, device)
        signals.append(torch.as_tensor(attenuation, dtype=torch.float32, device=device))
        water.append(torch.as_tensor(fractions[:, -1], dtype=torch.float32, device=device))
    return torch.cat(signals)[:count], torch.cat(water)[:count]


def normalise(signal: torch.Tensor, b0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalise signals to the input of the network.

    Parameters
    ----------
    signal : (voxel, measurement) tensor
    b0 : (measurement,) bool tensor
        Volumes whose mean is S0.

    Returns
    -------
    attenuation : (voxel, n) tensor
        S/S0 of the weighted volumes, clipped to 0–1; 0 if S0 is not positive.
    s0 : (voxel,) tensor
    """
    s0 = signal[:, b0].mean(1)
    divisor = torch.where(s0 > 0, s0, torch.inf)
    return (signal[:, ~b0] / divisor[:, None]).clamp(0, 1), s0


def train_network(diffusivities: Diffusivities, acquisition: Acquisition, noise: np.ndarray,
                  s0_known: bool, seed: int, device: str, options: Mapping[str, Any]
                  ) -> tuple[Network, float]:
    """Train a network for one acquisition.

    With fraction f, estimate f̂ and SD σ, the loss is the Gaussian negative log likelihood times σ²,
    (f − f̂)²/2 + σ² log σ (Seitzer et al. 2022, arXiv:2203.09168, β = 1), where the factor σ² has no
    gradient. The gradient for f̂ is thus that of the squared error, and the minimum over σ is at
    the SD of f − f̂.

    Parameters
    ----------
    diffusivities : Diffusivities
        Diffusivities of the mixtures.
    acquisition : Acquisition
    noise : (k,) ndarray
        SDs of the noise over S0, one of which is drawn for each voxel.
    s0_known : bool
        Whether S0 is known, so that the b0 volumes have no noise.
    seed : int
    device : str
    options : mapping
        Table `network` of training.toml.

    Returns
    -------
    network : Network
    error : float
        RMSE of its fraction on held-out mixtures.
    """
    b0 = torch.as_tensor(acquisition.b0, device=device)
    levels = torch.as_tensor(noise, dtype=torch.float32, device=device).clamp(max=MAX_NOISE)
    clean, water = draw_mixtures(diffusivities, acquisition, options["samples"], 2 * seed, device)

    def noisy_input(signal: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(levels), (len(signal), 1), generator=generator, device=device)
        noisy = rician(signal, levels[pick], generator)
        if s0_known:
            noisy[:, b0] = 1
        return normalise(noisy, b0)[0]

    first = noisy_input(clean[:CHUNK], torch.Generator(device).manual_seed(seed))
    with seeded(seed):
        network = Network(first.mean(0), first.std(0).clamp(min=1e-3)).to(device)

    def draw(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pick = torch.randint(len(clean), (options["batch"],), generator=generator, device=device)
        return [(noisy_input(clean[pick], generator), water[pick])]

    def loss(model: nn.Module, minibatch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        signal, truth = minibatch
        fraction, sd = model(signal)
        square = (fraction - truth) ** 2
        spread = sd.detach() ** 2 * torch.log(sd) + square.detach() * (sd.detach() / sd) ** 2 / 2
        return (square / 2 + spread).mean()

    with one_thread():
        train(network, draw, loss, Schedule(**options["schedule"]), seed=seed, device=device,
              name="free water")
    held_out, truth = draw_mixtures(diffusivities, acquisition, CHUNK, 2 * seed + 1, device)
    with torch.no_grad():
        predicted, _ = network(noisy_input(held_out, torch.Generator(device).manual_seed(seed + 1)))
    return network, float((predicted - truth).square().mean().sqrt())
