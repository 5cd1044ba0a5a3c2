"""Quality score of synthetic signals: an autoencoder trained on them reproduces measured signals.

Sadegheih et al. 2023 (doi:10.1007/s13218-023-00811-y, WP2), after Weninger et al. 2021. The error
is large if the synthetic signals lack properties of the measured ones, and also if they contain
many others, because the capacity of the autoencoder is limited. The signal is S/S0 of the weighted
volumes, clipped to 0–1.
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
"""Minimum width of the code: the number of unknowns of the tensor fit, S0 among them."""

MIN_FA = 0.2
"""Measured FA above which directions are compared."""


def score_modes(dwi: Dwi, measured: Diffusivities, modes: Sequence[str], s0: float, sd: float,
                seed: int, device: str, options: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Compute the errors of each mode, and those of noise alone.

    Parameters
    ----------
    dwi : Dwi
    measured : Diffusivities
        Diffusivities from which the modes are simulated.
    modes : sequence of str
    s0, sd : float
        S0 and noise SD of the synthetic signals.
    seed : int
    device : str
    options : mapping
        Table `score` of training.toml.

    Returns
    -------
    dict
        Results of `compare` by mode; `noise` is that of the measured signal with noise added
        (`noise_model`).
    """
    out = {}
    for mode in modes:
        mixtures = mixture.mix(mode, measured, dwi.acquisition, options["samples"], seed, device)
        model = train_autoencoder(mixtures.attenuation[:, ~dwi.acquisition.b0], sd / s0, seed,
                                  device, options)
        out[mode] = compare(dwi, model, device)
    return {**out, "noise": compare(dwi, noise_model(sd, seed, device), device)}


def layer_widths(n: int) -> list[int]:
    """Compute layer widths n → n/2 → n/4 → n/2 → n of n volumes, none below min(CODE, n).

    >>> layer_widths(60)
    [60, 30, 15, 30, 60]
    """
    half, code = (min(n, max(n // k, CODE)) for k in (2, 4))
    return [n, half, code, half, n]


class Autoencoder(nn.Module):
    """Autoencoder of S/S0 (voxel, n) of the weighted volumes.

    Parameters
    ----------
    mean : (n,) tensor
        Mean of the training signals.
    scale : tensor
        SD of the training signals.
    slope : float
        Negative slope of the leaky ReLU.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor, slope: float) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("scale", scale)
        self.layers = mlp(layer_widths(len(mean)), partial(nn.LeakyReLU, slope))

    def forward(self, signal: torch.Tensor, s0: torch.Tensor | None = None) -> torch.Tensor:
        """Reproduce signals; `s0` is unused, as `compare` passes it to every model."""
        return self.layers((signal - self.mean) / self.scale) * self.scale + self.mean


def train_autoencoder(attenuation: np.ndarray, sd: float, seed: int, device: str,
                      options: Mapping[str, Any]) -> nn.Module:
    """Train an autoencoder to reproduce noisy signals, because it is tested on noisy signals.

    Parameters
    ----------
    attenuation : (sample, n) ndarray
        Noise-free S/S0. Every minibatch gets new Rician noise.
    sd : float
        Noise SD over S0.
    seed : int
    device : str
    options : mapping
        Table `score` of training.toml.

    Returns
    -------
    Module
    """
    clean = torch.as_tensor(attenuation, dtype=torch.float32, device=device)
    mean = clean.mean(0)
    scale = (clean - mean).square().mean().sqrt()
    with seeded(seed):
        model = Autoencoder(mean, scale, options["slope"]).to(device)

    def draw(generator: torch.Generator) -> list[tuple[torch.Tensor]]:
        pick = torch.randint(len(clean), (options["batch"],), generator=generator, device=device)
        return [(rician(clean[pick], sd, generator).clamp(0, 1),)]

    def loss(network: nn.Module, minibatch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        (signal,) = minibatch
        return ((network(signal) - signal) / scale).square().mean()

    with one_thread():
        train(model, draw, loss, Schedule(**options["schedule"]), seed=seed, device=device,
              name="quality score")
    return model


def noise_model(sd: float, seed: int, device: str) -> Callable[..., torch.Tensor]:
    """Create a model for `compare` that adds Rician noise of SD `sd` (signal units) instead of
    reproducing the signal, so that its errors are those of noise alone."""
    generator = torch.Generator(device).manual_seed(seed)
    return lambda signal, s0: rician(signal, sd / s0[:, None], generator)


def compare(dwi: Dwi, model: Callable[..., torch.Tensor], device: str) -> dict[str, float]:
    """Compute the errors of a model that reproduces the measured signal.

    FA, MD and direction are those of one tensor that is fitted to all volumes of each of the two
    signals. Voxels without b0 signal, or where no tensor fits the measured signal, are excluded.

    Parameters
    ----------
    dwi : Dwi
    model : callable
        Function of S/S0 (voxel, n) and S0 (voxel,) that returns the reproduced S/S0.
    device : str

    Returns
    -------
    dict
        Errors with the keys of outputs.json.
    """
    b0 = torch.as_tensor(dwi.acquisition.b0, device=device)
    x = tensor.design(dwi.acquisition.btensors)

    def errors(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        s0 = signal[:, b0].mean(1)
        usable, level = s0 > 0, torch.where(s0 > 0, s0, 1)
        measured = torch.ones_like(signal)
        measured[:, ~b0] = (signal[:, ~b0] / level[:, None]).clamp(0, 1)
        reproduced = measured.clone()
        reproduced[:, ~b0] = model(measured[:, ~b0], level)
        reference, fitted = tensor.fit(measured, x), tensor.fit(reproduced, x)
        usable = usable & ~reference["failed"]
        cosine = (reference["direction"] * fitted["direction"]).sum(1).abs().clamp(max=1)
        change = (reproduced - measured)[:, ~b0]
        return {"signal": change.abs().mean(1), "mean": change.mean(1),
                "square": change.square().mean(1), "fa": (reference["fa"] - fitted["fa"]).abs(),
                "md": (reference["md"] - fitted["md"]).abs(),
                "direction": torch.rad2deg(cosine.acos()),
                "usable": usable, "fibres": usable & (reference["fa"] > MIN_FA)}

    results = map_voxels(errors, dwi.signal, device)
    usable, fibres = results["usable"], results["fibres"]

    def mean_and_sd(values: np.ndarray) -> tuple[float, float]:
        values = values.astype(float)
        return (float(values.mean()), float(values.std())) if len(values) else (np.nan, np.nan)

    mean, square = (mean_and_sd(results[k][usable])[0] for k in ("mean", "square"))
    out = {"signal_error": mean_and_sd(results["signal"][usable])[0],
           "signal_error_sd": float(np.sqrt(max(square - mean**2, 0)))}
    for name, where in (("fa", usable), ("md", usable), ("direction", fibres)):
        out[f"{name}_error"], out[f"{name}_error_sd"] = mean_and_sd(results[name][where])
    return {**out, "n_voxels": int(usable.sum()), "n_fibre_voxels": int(fibres.sum())}
