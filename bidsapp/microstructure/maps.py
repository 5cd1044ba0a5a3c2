"""From a Dwi to maps: the check, the preparation, the network and its calibrated SDs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import nn

from bidsapp import sh
from bidsapp.acquisition import Acquisition, Shell, describe_shells
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import OVERRIDE
from bidsapp.dwi import Dwi
from bidsapp.errors import DataError, Refusal
from bidsapp.networks.builder import build_network
from bidsapp.networks.scnn import Estimate
from bidsapp.simulate import forward, protocols
from bidsapp.simulate.likelihood import Likelihood, hint, searches
from bidsapp.simulate.tissue import TissueModel

QUANTILE = 1.6448536269514722
"""A normal number is within ± this many SDs with probability LEVEL."""

TOLERANCE = 0.01
"""Of S0: misfit of the network's own reconstruction that is no sign of a strange signal."""

ASSUMED_SNR = 20.0
"""Stands for S0 over noise SD where the noise could not be measured."""

GRID = 95
"""Degree of the half grids where a network is applied (1537 points). Densities turn with the head
within 2e-4, those of strange signals too, which take the finest grid (their SDs within 3e-4); on
the coarse grid that is enough to train on, within 2 %."""

TINY = 200.0
"""s/mm²: b-values that are all below may be in ms/µm²."""

BLOCK = 512
"""Voxels whose layers fit the cache."""

WEIGHTS = Path(__file__).parent.parent / "weights"


def build(tissue: TissueModel, description: Mapping[str, Any], *, grid: int | None = None
          ) -> nn.Module:
    """Build the network that a recipe or a card describes. grid: of a spherical one, instead of its
    own."""
    if grid and description.get("architecture") == "spherical":
        description = {**description, "grid": grid}
    return build_network(description, parameters=len(tissue.names))


def takes_hint(description: Mapping[str, Any]) -> bool:
    """Tell whether that network looks at the hint, which costs more than the rest of a
    simulation."""
    return bool(description.get("hinted", description["architecture"] == "spherical"))


def check(card: Card, acquisition: Acquisition, *, allow: bool = False
          ) -> tuple[list[Shell], list[str]]:
    """Select the shells of a run that a network uses.

    Parameters
    ----------
    card : Card
        Of the network.
    acquisition : Acquisition
        Of the run.
    allow : bool
        Use a run that lies outside of the training, too, with all its shells, where the network
        can take them.

    Returns
    -------
    shells : list of Shell
    violations : list of str
        In what the run lies outside of the training; empty unless that is allowed.

    Raises
    ------
    Refusal
        The run lies outside, and that is not allowed, or the network cannot take it.
    """
    violations = card.trained_for.violations(acquisition)
    if not violations:
        return card.trained_for.usable_shells(acquisition), []
    shells, count = list(acquisition.shells), card.network.get("shells")
    possible = bool(shells) and acquisition.b0.any() and count in (None, len(shells))
    if not (allow and possible):
        tiny = max((s.b for s in shells), default=math.inf) < TINY
        raise Refusal(
            f"{card.method} does not fit: {'; '.join(violations)}. "
            + "Check that b-values are in s/mm², not ms/µm²; " * tiny
            + f"{'t' if tiny else 'T'}rain on such runs (group --train {card.method}), or leave it "
            f"out of --estimate.{f' {OVERRIDE}' if possible else ''}")
    return shells, violations


def describe_shells_used(card: Card, acquisition: Acquisition, shells: Sequence[Shell],
                         violations: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Describe in what an estimate departs from the training of its network.

    More shells than in training are all used: on simulated signals of five shells, weights
    trained with one to four had smaller errors than on any four of them, at the same coverage.

    Parameters
    ----------
    card : Card
        Of the network.
    acquisition : Acquisition
        Of the run.
    shells, violations
        As `check` returned them for it.

    Returns
    -------
    parameters : dict
        Keys for the sidecar.
    notices : list of str
        The same in sentences.
    """
    domain, short = card.trained_for, card.method.removeprefix("estimate_")
    parameters: dict[str, Any] = {}
    outside, notices = list(violations), list[str]()
    used = {tuple(s.indices) for s in shells}
    if dropped := [s for s in acquisition.shells if tuple(s.indices) not in used]:
        parameters["ShellsLeftOut"] = [round(s.b) for s in dropped]
        notices.append(f"{short}: left out {describe_shells(dropped)} s/mm². The network was "
                       f"trained for {domain.describe_ranges()}.")
    if violations:
        notices.append(f"{short}: used outside of what the network was trained for, as "
                       f"--allow-extrapolation asks: {'; '.join(violations)}. The intervals were "
                       "not calibrated for that.")
    most = domain.shell_count[1] if domain.shell_count else len(shells)
    if len(shells) > most:
        outside.append(f"{len(shells)} shells, trained with up to {most}")
        notices.append(
            f"{short}: used {len(shells)} shells, and was trained with up to {most}. The intervals "
            f"were not calibrated for that. Compare with an estimate from {most} shells, or train "
            f"a network for this acquisition (group --train {card.method}).")
    if outside:
        parameters["OutOfDistribution"] = outside
    return parameters, notices


def known_power(card: Card) -> Float[torch.Tensor, "case degree"]:
    """Of the densities, that the hints of a network's training were made with.

    Raises:
        DataError: the card holds one power, as before there were several.
    """
    power = torch.tensor(card.constants["density_power"])
    if power.ndim != 2:
        raise DataError(f"weights of {card.method} whose card holds densities' powers of shape "
                        f"{tuple(power.shape)}; needed is (case, degree). They belong to another "
                        "version: train again, or take them away to use those that ship.")
    return power


def find_weights(name: str, models: Path | None = None) -> list[Checkpoint]:
    """Load all weights of a method: those in `models`, each trained for one acquisition alone, then
    those that come with the program."""
    folders = sorted(models.glob(f"{name}_*")) if models else []
    return [load(f, name) for f in (*folders, WEIGHTS / name) if f.is_dir()]


def select_weights(name: str, weights: Sequence[Checkpoint], acquisition: Acquisition, *,
                   allow: bool = False) -> Checkpoint:
    """Select the weights for a run.

    Parameters
    ----------
    name : str
        Of the method.
    weights : sequence of Checkpoint
        As `find_weights` gives them.
    acquisition : Acquisition
        Of the run.
    allow : bool
        As of `check`.

    Returns
    -------
    Checkpoint
        The one that was trained for shells with just these numbers of directions, or nearly; else
        the one for all protocols; else, where that is allowed, the last that can be used, since
        those that come with the program know the most acquisitions.

    Raises
    ------
    Refusal
        There are none.
    """
    def unlike(checkpoint: Checkpoint) -> float:
        domain = checkpoint.card.trained_for
        return math.inf if domain.shell_count else float(sum(
            abs(len(shell) - trained.directions[0])
            for shell, trained in zip(acquisition.shells, domain.shells, strict=True)))

    if fitting := [c for c in weights if not c.card.trained_for.violations(acquisition)]:
        return min(fitting, key=unlike)
    refusals = []
    for checkpoint in weights[::-1]:
        try:
            check(checkpoint.card, acquisition, allow=allow)
        except Refusal as refusal:
            refusals.append(refusal)
        else:
            return checkpoint
    raise refusals[0] if refusals else Refusal(
        f"{name} found no weights: none ship, and none are in OUTPUT_DIR/group/models. Needed is a "
        f"training: qsphere BIDS_DIR OUTPUT_DIR group --train {name}")


def bundled_weights(name: str) -> Checkpoint | None:
    """Load the weights of a method that come with the program, if any do."""
    folder = WEIGHTS / name
    return load(folder, name) if folder.is_dir() else None


def estimate(checkpoint: Checkpoint, tissue: TissueModel, dwi: Dwi, device: str, *,
             allow: bool = False
             ) -> tuple[dict[str, np.ndarray], dict[str, int], dict[str, Any], np.ndarray,
                        list[str]]:
    """Maps, counts of special voxels, parameters for the sidecar, where there is an estimate, and
    notices.

    Maps are the parameters, NAME_std, odf (coefficients up to degree 8) and flag: 1 where the
    signal does not look like the simulated ones, 2 where the noise lies above their range. allow:
    as of `check`.
    """
    card, acquisition = checkpoint.card, dwi.acquisition
    shells, violations = check(card, acquisition, allow=allow)
    domain = card.trained_for
    network = checkpoint.into(build(tissue, card.network, grid=GRID)).to(device)
    side = protocols.from_acquisition(acquisition, shells, protocols.L_FIT, s0_known=dwi.s0_known)
    fits = [side.fit[0, i, :, :len(s)].to(device, torch.float32) for i, s in enumerate(shells)]
    index = [torch.as_tensor(s.indices, device=device) for s in shells]
    b0 = torch.as_tensor(np.flatnonzero(acquisition.b0), device=device)
    told = side.shells.to(device, torch.float32)
    # where shells have noise of their own, one has as many directions as would give it that
    gain = dwi.gain(np.concatenate([s.indices for s in shells]))
    told[..., 2] *= told.new_tensor([dwi.gain(s.indices) / gain for s in shells])
    if domain.shell_count:
        told[..., 2] = told[..., 2].clamp(min=max(s.directions[1] for s in domain.shells) ** -0.5)
    assert domain.snr
    least, most = (1 / snr for snr in reversed(domain.snr))
    # a search needs double precision: else rounding decides which way it goes on a flat ridge
    power = known_power(card).to(device, torch.float64 if searches(tissue) else torch.float32)
    hinted = takes_hint(card.network)
    of_mean = 0.0 if dwi.s0_known else len(b0) ** -0.5 * dwi.gain(b0.cpu().numpy()) / gain

    def of_block(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        level = signal[:, b0].mean(1)
        usable = level > 0
        level = torch.where(usable, level, 1)
        # no signal is below 0 or at twice S0: such voxels are flagged, and must not run away
        ratio = (signal / level[:, None]).clamp(0, 2)
        x = torch.stack([fit @ ratio[:, i].T for fit, i in zip(fits, index, strict=True)], 2)
        sigma = (dwi.noise_sd * gain / level if dwi.noise_sd
                 else torch.full_like(level, 1 / ASSUMED_SNR))
        within = sigma.clamp(least, most)[:, None]
        noise = torch.cat([within, of_mean * within], 1)
        seen = (v.to(power) for v in (x, noise, told))
        likely = (hint(Likelihood(tissue, power, *seen)).float() if hinted
                  else x.new_zeros(len(signal), 0))
        found = network(x, noise, told, likely)
        sd = calibrated(tissue, found, noise, card.constants)
        strange = misfit(tissue, x, noise, told, found) > interpolated(
            card.constants["misfit"], noise[:, 0])
        flag = torch.where(sigma > 1.001 * most, 2.0, torch.where(strange, 1.0, 0.0))
        return {"mean": clamped(tissue, found.mean), "sd": sd, "odf": bounded(found.odf),
                "flag": flag, "usable": usable}

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
    outside, notices = describe_shells_used(card, acquisition, shells, violations)
    return maps, counts, {
        "Weights": card.sha256, "Shells": [round(s.b) for s in shells], **outside,
        "Uncertainty": "± 1.645 SD cover 90 % of held-out simulated truths, by predicted SD, "
                       "estimated coherence of fibres and noise",
        "NoiseSD": dwi.noise_sd * gain if dwi.noise_sd else f"assumed: S0 / {ASSUMED_SNR:.0f}",
        "TrainedFor": asdict(domain)}, usable, notices


def clamped(tissue: TissueModel, mean: Float[torch.Tensor, "voxel n"]
            ) -> Float[torch.Tensor, "voxel n"]:
    low, high = mean.new_tensor(tissue.ranges).T
    return torch.minimum(torch.maximum(mean, low), high)


def bounded(odf: Float[torch.Tensor, "voxel coef"]) -> Float[torch.Tensor, "voxel coef"]:
    """No degree stronger than that of a single fibre, Σ_m c_lm² ≤ (2l + 1)/4π, which holds for
    every density: where noise lies above its range a network can say anything."""
    parts = [odf[:, :1]]
    for l in range(2, sh.l_max_of(odf.shape[1]) + 1, 2):
        part, most = odf[:, sh.size(l - 2):sh.size(l)], math.sqrt((2 * l + 1) / (4 * math.pi))
        parts.append(part * (most / part.norm(dim=1, keepdim=True).clamp(min=most)))
    return torch.cat(parts, 1)


def coherence(odf: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Compute how much densities point one way: the norm of degree 2, 0 of an isotropic density and
    1 of a single fibre."""
    return odf[:, 1:6].norm(dim=1) / math.sqrt(5 / (4 * math.pi))


def sharpness(odf: Float[torch.Tensor, "voxel size"]) -> Float[torch.Tensor, " voxel"]:
    """Compute how sharp the bundles of densities are, however many: the norm of degrees 6 and 8
    relative to that of a single fibre without dispersion."""
    return odf[:, sh.size(4):sh.size(8)].norm(dim=1) / math.sqrt((13 + 17) / (4 * math.pi))


def calibrated(tissue: TissueModel, estimate: Estimate, noise: Float[torch.Tensor, "voxel 2"],
               constants: Mapping[str, Any]) -> Float[torch.Tensor, "voxel n"]:
    """Compute posterior SDs: those predicted times their factors by predicted SD and by estimated
    coherence and noise, at most half the range of each parameter."""
    sd, where = predicted_sd(estimate), (coherence(estimate.odf), noise[:, 0])
    return torch.stack([
        (sd[:, i] * interpolated(constants["sd"][name], sd[:, i])
         * bilinear(constants["sd_where"][name], *where)).clamp(max=(high - low) / 2)
        for i, (name, (low, high)) in enumerate(zip(tissue.names, tissue.ranges, strict=True))], 1)


def predicted_sd(estimate: Estimate) -> Float[torch.Tensor, "voxel n"]:
    """Bound the SDs that a network says, before their calibration."""
    return estimate.log_sd.clamp(-7, 2).exp()


def interpolated(table: Mapping[str, Any], x: Float[torch.Tensor, " voxel"]
                 ) -> Float[torch.Tensor, " voxel"]:
    """"value" at x, linear between the points "at", constant beyond them."""
    value = x.new_tensor(table["value"])
    right, share = _between(x.new_tensor(table["at"]), x)
    return torch.lerp(value[right - 1], value[right], share)


def bilinear(table: Mapping[str, Any], x: Float[torch.Tensor, " voxel"],
             y: Float[torch.Tensor, " voxel"]) -> Float[torch.Tensor, " voxel"]:
    """"value" (row, column) at x and y, linear between the points "rows" and "columns"."""
    value = x.new_tensor(table["value"])
    row, down = _between(x.new_tensor(table["rows"]), x)
    column, across = _between(x.new_tensor(table["columns"]), y)
    upper, lower = (torch.lerp(value[r, column - 1], value[r, column], across)
                    for r in (row - 1, row))
    return torch.lerp(upper, lower, down)


def _between(at: Float[torch.Tensor, " point"], x: Float[torch.Tensor, " voxel"]
             ) -> tuple[torch.Tensor, Float[torch.Tensor, " voxel"]]:
    """Index of the point to the right of x, 1 at least, and where x lies on the way there, 0–1."""
    right = torch.searchsorted(at, x.contiguous()).clamp(1, len(at) - 1)
    share = (x - at[right - 1]) / (at[right] - at[right - 1]).clamp(min=1e-9)
    return right, share.clamp(0, 1)


def misfit(tissue: TissueModel, x: Float[torch.Tensor, "coef voxel shell"],
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
