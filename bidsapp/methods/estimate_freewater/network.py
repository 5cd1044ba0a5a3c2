"""The network of the free-water fraction: what it learns from, and how."""

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
"""Least width of a hidden layer."""

CHUNK = 10_000
"""Mixtures that are computed at a time."""

MOST_NOISE = 0.2
"""Greatest noise SD over S0 that is learned from; voxels with more are background."""


class Network(nn.Module):
    """S/S0 (voxel, n) of the weighted volumes → fraction and its SD, (voxel,) each.

    n → n/2 → n/4 → n/8 → 2, tanh; `mean` and `scale` (n,) are of the training signals. Both
    outputs are logistic, for a fraction lies within 0–1 and no SD of one is above ½.
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


def mixtures(measured: Diffusivities, acquisition: Acquisition, count: int, seed: int, device: str
             ) -> tuple[torch.Tensor, torch.Tensor]:
    """(count, measurement) S/S0 without noise, and the (count,) fraction of free water.

    Every other voxel is a mixture as in `mixture.draw` (mode `sample`). In the rest, water is
    uniform on 0–1 and any tissue may be absent (each is kept with a probability that is itself
    uniform on ¼–1, one at least), so that pure tissue and pure water are seen, too.
    """
    signals, water = [], []
    for i in range(-(-count // CHUNK)):
        entropy = np.random.SeedSequence([seed, i]).generate_state(1)[0]
        fractions, _, tensors = mixture.draw("sample", measured, CHUNK, int(entropy))
        rng = np.random.default_rng([seed, i])
        tissue = fractions[1::2, :-1]
        keep = rng.uniform(size=tissue.shape) < rng.uniform(0.25, 1, (len(tissue), 1))
        keep[np.arange(len(tissue)), rng.integers(tissue.shape[1], size=len(tissue))] = True
        tissue = tissue * keep
        share = rng.uniform(size=(len(tissue), 1))
        fractions[1::2] = np.hstack([tissue / tissue.sum(1, keepdims=True) * (1 - share), share])
        made = mixture.attenuation(fractions, tensors, acquisition, device)
        signals.append(torch.as_tensor(made, dtype=torch.float32, device=device))
        water.append(torch.as_tensor(fractions[:, -1], dtype=torch.float32, device=device))
    return torch.cat(signals)[:count], torch.cat(water)[:count]


def relative(signal: torch.Tensor, b0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What the network sees: S/S0 (voxel, n) of the weighted volumes within 0–1; and S0 (voxel,).

    S0 is the mean over the volumes `b0` (measurement,); where it is not positive, S/S0 is 0.
    """
    s0 = signal[:, b0].mean(1)
    level = torch.where(s0 > 0, s0, torch.inf)
    return (signal[:, ~b0] / level[:, None]).clamp(0, 1), s0


def learn(measured: Diffusivities, acquisition: Acquisition, noise: np.ndarray, known: bool,
          seed: int, device: str, options: Mapping[str, Any]) -> tuple[Network, float]:
    """A network for one acquisition, and the RMSE of its fraction on mixtures that it never saw.

    noise: (k,) SDs of the noise over S0, of which each voxel draws one. known: S0 is, so that the
    b0 volumes are without noise.

    The loss is (f − f̂)²/2 + σ² log σ + …, the Gaussian likelihood weighted by its own variance
    (Seitzer et al. 2022, β = 1): its gradient for f̂ is that of the squared error, and its minimum
    for σ is the SD of what is left.
    """
    b0 = torch.as_tensor(acquisition.b0, device=device)
    levels = torch.as_tensor(noise, dtype=torch.float32, device=device).clamp(max=MOST_NOISE)
    clean, water = mixtures(measured, acquisition, options["samples"], 2 * seed, device)

    def seen(signal: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        pick = torch.randint(len(levels), (len(signal), 1), generator=generator, device=device)
        noisy = rician(signal, levels[pick], generator)
        if known:
            noisy[:, b0] = 1
        return relative(noisy, b0)[0]

    first = seen(clean[:CHUNK], torch.Generator(device).manual_seed(seed))
    with seeded(seed):
        network = Network(first.mean(0), first.std(0).clamp(min=1e-3)).to(device)

    def draw(generator: torch.Generator) -> list[tuple[torch.Tensor, torch.Tensor]]:
        pick = torch.randint(len(clean), (options["batch"],), generator=generator, device=device)
        return [(seen(clean[pick], generator), water[pick])]

    def loss(model: nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        signal, truth = drawn
        fraction, sd = model(signal)
        square = (fraction - truth) ** 2
        spread = sd.detach() ** 2 * torch.log(sd) + square.detach() * (sd.detach() / sd) ** 2 / 2
        return (square / 2 + spread).mean()

    with one_thread():
        train(network, draw, loss, Schedule(**options["schedule"]), seed=seed, device=device,
              name="free water")
    other, truth = mixtures(measured, acquisition, CHUNK, 2 * seed + 1, device)
    with torch.no_grad():
        found, _ = network(seen(other, torch.Generator(device).manual_seed(seed + 1)))
    return network, float((found - truth).square().mean().sqrt())
