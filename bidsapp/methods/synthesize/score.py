"""The quality score: an autoencoder trained on synthetic signals reproduces the measured ones.

Sadegheih et al. 2023 (doi:10.1007/s13218-023-00811-y, WP2), after Weninger et al. 2021. Signals
that lack what is in the participant teach the network too little, signals that hold much else leave
no room for it; both raise the error. The signal is S/S0 of the weighted volumes, kept within 0–1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from bidsapp import tensor
from bidsapp.blocks import map_voxels, one_thread
from bidsapp.dwi import Dwi
from bidsapp.networks.mlp import mlp
from bidsapp.simulate import mixture
from bidsapp.simulate.mixture import Diffusivities
from bidsapp.simulate.noise import rician
from bidsapp.training import Schedule, seeded, train

CODE = 7
"""Least width of the code: the unknowns of the tensor that is compared."""

FIBRES = 0.2
"""Directions are compared where the measured FA is above."""


def scores(dwi: Dwi, measured: Diffusivities, modes: Sequence[str], s0: float, sd: float,
           seed: int, device: str, options: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """`compare` of each mode, and of `noise`.

    measured: what the modes are made from. s0, sd: of the synthetic signals. options: the table
    [score] of training.toml.
    """
    out = {}
    for mode in modes:
        mixtures = mixture.mix(mode, measured, dwi.acquisition, options["samples"], seed, device)
        model = learn(mixtures.attenuation[:, ~dwi.acquisition.b0], sd / s0, seed, device, options)
        out[mode] = compare(dwi, model, device)
    return {**out, "noise": compare(dwi, noise(sd, seed, device), device)}


def widths(n: int) -> list[int]:
    """n → n/2 → n/4 → n/2 → n for n weighted volumes; no layer is narrower than CODE, or n."""
    half, code = (min(n, max(n // k, CODE)) for k in (2, 4))
    return [n, half, code, half, n]


class Autoencoder(nn.Module):
    """S/S0 (voxel, n) → (voxel, n); `mean` (n,) and `scale` are of the training signals."""

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor, slope: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = mlp(widths(len(mean)), partial(nn.LeakyReLU, slope))

    def forward(self, signal: torch.Tensor, s0: torch.Tensor | None = None) -> torch.Tensor:
        return self.layers((signal - self.mean) / self.scale) * self.scale + self.mean


def learn(attenuation: np.ndarray, sd: float, seed: int, device: str,
          options: Mapping[str, Any]) -> nn.Module:
    """The autoencoder of (sample, n) S/S0 without noise, to which Rician noise of SD `sd` is added
    anew in every batch; it learns to reproduce the noisy signal, as it is tried on noisy ones."""
    clean = torch.as_tensor(attenuation, dtype=torch.float32, device=device)
    mean = clean.mean(0)
    scale = (clean - mean).square().mean().sqrt()
    with seeded(seed):
        model = Autoencoder(mean, scale, options["slope"]).to(device)

    def draw(generator: torch.Generator) -> list[tuple[torch.Tensor]]:
        pick = torch.randint(len(clean), (options["batch"],), generator=generator, device=device)
        return [(rician(clean[pick], sd, generator).clamp(0, 1),)]

    def loss(network: nn.Module, drawn: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (signal,) = drawn
        return ((network(signal) - signal) / scale).square().mean()

    with one_thread():
        train(model, draw, loss, Schedule(**options["schedule"]), seed=seed, device=device,
              name="quality score")
    return model


def noise(sd: float, seed: int, device: str) -> Callable[..., torch.Tensor]:
    """Adds Rician noise of the run's SD `sd` (signal units): what noise alone changes."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda signal, s0: rician(signal, sd / s0[:, None], generator)


def compare(dwi: Dwi, model: Callable[..., torch.Tensor], device: str) -> dict[str, float]:
    """Errors of `model`, (S/S0 (voxel, n), S0 (voxel,)) → (voxel, n), on the measured signal.

    FA, MD and direction are those of one tensor through all volumes, fitted to either signal.
    Voxels without S0 or without a tensor are left out. Keys are those of outputs.json.
    """
    b0 = torch.as_tensor(dwi.acquisition.b0, device=device)
    x = tensor.design(dwi.acquisition.btensors)

    def errors(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        s0 = signal[:, b0].mean(1)
        usable, level = s0 > 0, torch.where(s0 > 0, s0, 1)
        measured = torch.ones_like(signal)
        measured[:, ~b0] = (signal[:, ~b0] / level[:, None]).clamp(0, 1)
        found = measured.clone()
        found[:, ~b0] = model(measured[:, ~b0], level)
        one, other = tensor.fit(measured, x), tensor.fit(found, x)
        usable = usable & ~one["failed"]
        cosine = (one["direction"] * other["direction"]).sum(1).abs().clamp(max=1)
        change = (found - measured)[:, ~b0]
        return {"signal": change.abs().mean(1), "mean": change.mean(1),
                "square": change.square().mean(1), "fa": (one["fa"] - other["fa"]).abs(),
                "md": (one["md"] - other["md"]).abs(), "direction": torch.rad2deg(cosine.acos()),
                "usable": usable, "fibres": usable & (one["fa"] > FIBRES)}

    found = map_voxels(errors, dwi.signal, device)
    usable, fibres = found["usable"], found["fibres"]

    def of(values: np.ndarray) -> tuple[float, float]:
        values = values.astype(float)
        return (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)

    mean, square = (of(found[k][usable])[0] for k in ("mean", "square"))
    out = {"signal_error": of(found["signal"][usable])[0],
           "signal_error_sd": float(np.sqrt(max(square - mean**2, 0)))}
    for name, where in (("fa", usable), ("md", usable), ("direction", fibres)):
        out[f"{name}_error"], out[f"{name}_error_sd"] = of(found[name][where])
    return {**out, "n_voxels": int(usable.sum()), "n_fibre_voxels": int(fibres.sum())}
