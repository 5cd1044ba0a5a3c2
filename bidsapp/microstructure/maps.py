"""Estimation of maps from a Dwi by a network, with calibrated SDs.

`bidsapp.microstructure` defines density, power, hint and protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.acquisition import Shell
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Card, Checkpoint
from bidsapp.domain import TrainingDomain
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError
from bidsapp.networks.builder import build_network
from bidsapp.networks.scnn import Estimate
from bidsapp.selection import describe_shells_used, select_shells
from bidsapp.simulate import forward, protocols
from bidsapp.simulate.likelihood import Likelihood, compute_hint, needs_search
from bidsapp.simulate.tissue import TissueModel

QUANTILE = 1.6448536269514722
"""Half width, in SDs, of the 90 % interval of a normal distribution."""

TOLERANCE = 0.01
"""Error of the predicted signal, relative to S0, that is tolerated in addition to the noise."""

ASSUMED_SNR = 20.0
"""S0 over the noise SD assumed if the noise could not be measured."""

GRID = 95
"""Degree of the half grids of an applied network: 1537 points, of which no two are antipodal.
Densities are then equivariant to rotations within 2e-4, and SDs within 3e-4, even for signals
unlike those of the training, which need the finest grid. On the coarse grid of the training they
are equivariant within 2 %."""

BLOCK = 512
"""Voxels per block, so that the layers fit in the cache."""


def build(tissue: TissueModel, description: Mapping[str, Any], *, grid: int | None = None
          ) -> nn.Module:
    """Build the network that a recipe or a card describes.

    Parameters
    ----------
    tissue : TissueModel
    description : mapping
        `architecture` and its arguments.
    grid : int, optional
        Degree of the half grid of a spherical network that replaces the one described.

    Returns
    -------
    torch.nn.Module
    """
    if grid and description.get("architecture") == "spherical":
        description = {**description, "grid": grid}
    return build_network(description, parameters=len(tissue.names))


def takes_hint(description: Mapping[str, Any]) -> bool:
    """Tell whether a network uses the hint, which costs more than the rest of a simulation."""
    return bool(description.get("hinted", description["architecture"] == "spherical"))


def read_density_power(card: Card) -> Float[torch.Tensor, "case degree"]:
    """Read from a card the powers with which the hints of the training were computed.

    Raises
    ------
    DataError
        The powers have one dimension, as on cards of earlier versions.
    """
    power = torch.tensor(card.constants["density_power"])
    if power.ndim != 2:
        raise DataError(f"weights of {card.method} hold density powers of shape "
                        f"{tuple(power.shape)}. The shape (case, degree) is required. The weights "
                        "belong to another version: train again, or remove them to use the "
                        "bundled ones.")
    return power


def estimate(checkpoint: Checkpoint, tissue: TissueModel, dwi: Dwi, device: str, *,
             allow: bool = False
             ) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, Any], np.ndarray,
                        list[str]]:
    """Estimate the maps of a tissue model.

    Parameters
    ----------
    checkpoint : Checkpoint
        Weights and card of the network.
    tissue : TissueModel
    dwi : Dwi
    device : str
    allow : bool
        Whether a run outside of the training domain is accepted (`selection.select_shells`).

    Returns
    -------
    maps : dict
        The parameters NAME and their SDs NAME_std, (voxel,); odf, (voxel, 45) coefficients; flag,
        (voxel,): 1 if the misfit is larger than in simulation, 2 if the noise is above the range
        of the training, else 0.
    counts : dict
        Numbers of voxels without b0 signal and with each flag.
    parameters : dict
        Keys for the sidecar.
    usable : (voxel,) bool ndarray
        Voxels with an estimate.
    notices : list of str
        Sentences for the report.

    Raises
    ------
    Refusal
        As `select_shells`.
    """
    card, acquisition = checkpoint.card, dwi.acquisition
    shells, violations = select_shells(card, acquisition, allow=allow)
    domain = card.trained_for
    network = checkpoint.into(build(tissue, card.network, grid=GRID)).to(device)
    protocol = protocols.from_acquisition(acquisition, shells, protocols.L_FIT,
                                          s0_known=dwi.s0_known)
    fits = [protocol.fit[0, i, :, :len(s)].to(device, torch.float32) for i, s in enumerate(shells)]
    index = [torch.as_tensor(s.indices, device=device) for s in shells]
    b0 = torch.as_tensor(np.flatnonzero(acquisition.b0), device=device)
    gain = dwi.gain(np.concatenate([s.indices for s in shells]))
    shell_input = _shell_input(protocol, shells, domain, dwi, gain).to(device)
    assert domain.snr
    low, high = (1 / snr for snr in reversed(domain.snr))
    # a search for the maximum likelihood needs double precision: else rounding decides its path
    # on a flat ridge
    precision = torch.float64 if needs_search(tissue) else torch.float32
    power = read_density_power(card).to(device, precision)
    hinted = takes_hint(card.network)
    # noise of the mean b0 relative to that of one weighted measurement
    b0_noise = 0.0 if dwi.s0_known else len(b0) ** -0.5 * dwi.gain(b0.cpu().numpy()) / gain

    def estimate_block(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        s0 = signal[:, b0].mean(1)
        usable = s0 > 0
        s0 = torch.where(usable, s0, 1)
        # S/S0 is clipped to 0–2; values outside come from artefacts or from too small an S0
        attenuation = (signal / s0[:, None]).clamp(0, 2)
        x = torch.stack([fit @ attenuation[:, i].T for fit, i in zip(fits, index, strict=True)], 2)
        sigma = (dwi.noise_sd * gain / s0 if dwi.noise_sd
                 else torch.full_like(s0, 1 / ASSUMED_SNR))
        clipped = sigma.clamp(low, high)[:, None]
        noise = torch.cat([clipped, b0_noise * clipped], 1)
        inputs = (v.to(power) for v in (x, noise, shell_input))
        hint = (compute_hint(Likelihood(tissue, power, *inputs)).float() if hinted
                else x.new_zeros(len(signal), 0))
        output = network(x, noise, shell_input, hint)
        sd = calibrate_sd(tissue, output, noise, card.constants)
        strange = misfit(tissue, x, noise, shell_input, output) > interpolate(
            card.constants["misfit"], noise[:, 0])
        flag = torch.where(sigma > 1.001 * high, 2.0, torch.where(strange, 1.0, 0.0))
        return {"mean": clamp_parameters(tissue, output.mean), "sd": sd,
                "odf": limit_degrees(output.odf), "flag": flag, "usable": usable}

    values = map_voxels(estimate_block, dwi.signal, device, BLOCK)
    maps, counts = _name_maps(values, tissue, card.method.removeprefix("estimate_"))
    outside, notices = describe_shells_used(card, acquisition, shells, violations)
    return maps, counts, {
        "Weights": card.sha256, "Shells": [round(s.b) for s in shells], **outside,
        "Uncertainty": "± 1.645 SD cover 90 % of held-out simulated truths, by predicted SD, "
                       "estimated coherence of fibres and noise",
        "NoiseSD": dwi.noise_sd * gain if dwi.noise_sd else f"assumed: S0 / {ASSUMED_SNR:.0f}",
        "TrainedFor": asdict(domain)}, values["usable"], notices


def _shell_input(protocol: protocols.Protocols, shells: Sequence[Shell], domain: TrainingDomain,
                 dwi: Dwi, gain: float) -> Float[torch.Tensor, "1 shell 3"]:
    """Compute the network's input of each shell: b, b_delta and 1/√directions.

    A shell of other noise than the mean (`gain`) gets the number of directions for which the mean
    over the shell would have the same SD. For networks of all protocols the number does not exceed
    the maximum of the training.
    """
    values = protocol.shells.to(torch.float32)
    values[..., 2] *= values.new_tensor([dwi.gain(s.indices) / gain for s in shells])
    if domain.shell_count:
        values[..., 2] = values[..., 2].clamp(
            min=max(s.directions[1] for s in domain.shells) ** -0.5)
    return values


def _name_maps(values: Mapping[str, np.ndarray], tissue: TissueModel, short: str
               ) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Name the maps, set voxels without b0 signal to 0, and count voxels with problems."""
    usable = values["usable"]
    maps = {key: np.where(usable, values[part][:, i], 0).astype(np.float32)
            for i, name in enumerate(tissue.names)
            for key, part in ((name, "mean"), (f"{name}_std", "sd"))}
    maps["odf"] = np.where(usable[:, None], values["odf"], 0).astype(np.float32)
    maps["flag"] = np.where(usable, values["flag"], 0).astype(np.float32)
    return maps, {f"{short}_no_b0_signal": int((~usable).sum()),
                  f"{short}_strange_signal": int((maps["flag"] == 1).sum()),
                  f"{short}_noise_out_of_range": int((maps["flag"] == 2).sum())}


def clamp_parameters(tissue: TissueModel, mean: Float[torch.Tensor, "voxel n"]
                     ) -> Float[torch.Tensor, "voxel n"]:
    """Clamp parameters to the ranges of the tissue model."""
    low, high = mean.new_tensor(tissue.ranges).T
    return torch.minimum(torch.maximum(mean, low), high)


def limit_degrees(odf: Float[torch.Tensor, "voxel coef"]) -> Float[torch.Tensor, "voxel coef"]:
    """Limit each degree to the power of a single fibre.

    Σ_m c_lm² ≤ (2l + 1)/4π holds for every density, but not for the output of a network at noise
    levels above its training.
    """
    parts = [odf[:, :1]]
    for l in range(2, sh.l_max_of(odf.shape[1]) + 1, 2):
        part, limit = odf[:, sh.size(l - 2):sh.size(l)], math.sqrt((2 * l + 1) / (4 * math.pi))
        parts.append(part * (limit / part.norm(dim=1, keepdim=True).clamp(min=limit)))
    return torch.cat(parts, 1)


def coherence(odf: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Compute the coherence of densities: the norm of degree 2, relative to that of a single fibre
    without dispersion. An isotropic density has 0."""
    return odf[:, 1:6].norm(dim=1) / math.sqrt(5 / (4 * math.pi))


def sharpness(odf: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Compute the sharpness of the bundles of densities, whatever their number.

    It is the norm of degrees 6 and 8 relative to that of a single fibre without dispersion.
    """
    return odf[:, sh.size(4):sh.size(8)].norm(dim=1) / math.sqrt((13 + 17) / (4 * math.pi))


def calibrate_sd(tissue: TissueModel, estimate: Estimate, noise: Float[torch.Tensor, "voxel 2"],
                 constants: Mapping[str, Any]) -> Float[torch.Tensor, "voxel n"]:
    """Compute calibrated posterior SDs.

    The predicted SDs are multiplied by two factors of the calibration (`learn.calibrate`): one
    depends on the predicted SD, the other on the coherence of the estimated density and on noise.

    Parameters
    ----------
    tissue : TissueModel
    estimate : Estimate
        Output of the network.
    noise : (voxel, 2) tensor
        σ/S0 of one measurement and of the mean b0.
    constants : mapping
        Constants of the card.

    Returns
    -------
    (voxel, n) tensor
        SDs, at most half the range of each parameter.
    """
    sd, where = predicted_sd(estimate), (coherence(estimate.odf), noise[:, 0])
    return torch.stack([
        (sd[:, i] * interpolate(constants["sd"][name], sd[:, i])
         * bilinear(constants["sd_where"][name], *where)).clamp(max=(high - low) / 2)
        for i, (name, (low, high)) in enumerate(zip(tissue.names, tissue.ranges, strict=True))], 1)


def predicted_sd(estimate: Estimate) -> Float[torch.Tensor, "voxel n"]:
    """Compute the SDs that a network predicts, before their calibration."""
    return estimate.log_sd.clamp(-7, 2).exp()


def interpolate(table: Mapping[str, Any], x: Float[torch.Tensor, " voxel"]
                 ) -> Float[torch.Tensor, " voxel"]:
    """Interpolate "value" at x, linear between the points "at", constant beyond them."""
    value = x.new_tensor(table["value"])
    right, share = _between(x.new_tensor(table["at"]), x)
    return torch.lerp(value[right - 1], value[right], share)


def bilinear(table: Mapping[str, Any], x: Float[torch.Tensor, " voxel"],
             y: Float[torch.Tensor, " voxel"]) -> Float[torch.Tensor, " voxel"]:
    """Interpolate "value" (row, column) at x and y, bilinear between "rows" and "columns"."""
    value = x.new_tensor(table["value"])
    row, down = _between(x.new_tensor(table["rows"]), x)
    column, across = _between(x.new_tensor(table["columns"]), y)
    upper, lower = (torch.lerp(value[r, column - 1], value[r, column], across)
                    for r in (row - 1, row))
    return torch.lerp(upper, lower, down)


def _between(at: Float[torch.Tensor, " point"], x: Float[torch.Tensor, " voxel"]
             ) -> tuple[torch.Tensor, Float[torch.Tensor, " voxel"]]:
    """Find the index (≥ 1) of the point right of x, and the position 0–1 of x in its interval."""
    right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    share = (x - at[right - 1]) / (at[right] - at[right - 1]).clamp(min=1e-9)
    return right, share.clamp(0, 1)


def misfit(tissue: TissueModel, x: Float[torch.Tensor, "coef voxel shell"],
           noise: Float[torch.Tensor, "voxel 2"], shells: Float[torch.Tensor, "group shell 3"],
           estimate: Estimate) -> Float[torch.Tensor, " voxel"]:
    """Compute the misfit between the measured signal and the signal predicted from the estimate.

    It is the root mean square difference of their SH coefficients in units of their noise SD,
    √(4π (σ² + TOLERANCE²)/directions).

    Parameters
    ----------
    tissue : TissueModel
    x : (coefficient, voxel, shell) tensor
        Fitted coefficients of S/S0.
    noise : (voxel, 2) tensor
        σ/S0 of one measurement and of the mean b0.
    shells : (group, shell, 3) tensor
        b (ms/µm²), b_delta and 1/√directions.
    estimate : Estimate
        Output of the network.

    Returns
    -------
    (voxel,) tensor
    """
    per_group = x.shape[1] // len(shells)
    b, b_delta, scale = shells.repeat_interleave(per_group, 0).unbind(-1)
    p = clamp_parameters(tissue, estimate.mean)
    parts = tissue.compartments(p)
    if tissue.aligned is not None:  # the axis is not estimated: approximated by the density
        parts = parts + tissue.aligned(p)
    k = forward.kernel(parts, 1000 * b, b_delta, protocols.L_FIT)
    residual = (x - forward.convolve(estimate.odf, k).permute(2, 0, 1)) * (x != 0)
    sd = scale.clamp(min=1e-3) * (4 * math.pi * (noise[:, :1] ** 2 + TOLERANCE**2)).sqrt()
    return ((residual / sd) ** 2).sum((0, 2)).div((x != 0).sum((0, 2)).clamp(min=1)).sqrt()
