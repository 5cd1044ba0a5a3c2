"""Denoising of single voxels by an autoencoder with layers on the sphere (networks.autoencoder)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bidsapp import __version__, sh, training
from bidsapp.acquisition import Acquisition, Shell, describe_shells
from bidsapp.blocks import map_voxels
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import OVERRIDE, TrainingDomain
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.kinds import Cohort, Denoised, Denoiser, Fitted, Trainable, TrainingSettings
from bidsapp.methods.denoise_spherical import learn
from bidsapp.microstructure.maps import ASSUMED_SNR
from bidsapp.networks.autoencoder import is_equivariant, needs_table
from bidsapp.networks.builder import build_network
from bidsapp.selection import find_weights

MIN_DIRECTIONS = 12
"""Smallest number of directions of a shell that the bundled weights denoise. With six, FA falls by
a quarter in real runs, and the error of the signal grows at SNR 30 (README)."""

FEWEST = 6
"""Smallest number of directions of a shell in any training, which determine degree 2."""

ENOUGH_DIRECTIONS = 30
"""Number of directions of b 1000 below which FA of the denoised signal had more error than that of
the measured one in all simulations of tissue unlike the training (README)."""

SAME_DIRECTION = 3.0
"""Largest angle in degrees between directions that count as the same."""

GRID = 47
"""Degree of the half grids of an applied network. The signal of a rotated head, measured with a
rotated table, is then the same within 1.7e-4 S0 (root mean square; 1.2e-3 on the grid of the
training), and the error of denoising is the same."""

BLOCK = 1024
"""Voxels per block, so that the layers fit in the cache."""

HELD_OUT = 0.2
"""Share of the participants of a cohort for the validation."""

FROM_RUNS = ("training.trained_for.", "training.groups", "training.network.shells")
"""Prefixes of hyper-parameters that a training on a cohort derives from the runs."""


class SphericalDenoiser(Denoiser, Trainable):
    """Denoiser of single voxels, trained on simulation, or on a cohort at group level."""

    intended_use = (
        "Removal of thermal noise and of the noise floor from diffusion signals, voxel by voxel. "
        "Not for signals with other artefacts, and not for the search for lesions whose signal is "
        "unlike that of the training.")

    @cached_property
    def weights(self) -> list[Checkpoint]:
        """Networks trained at group level, then the bundled one, loaded once."""
        return find_weights(self.name, self.context.models)

    def select(self, acquisition: Acquisition) -> Checkpoint:
        """Select the weights for a run.

        Parameters
        ----------
        acquisition : Acquisition

        Returns
        -------
        Checkpoint
            Among weights whose domain holds the run: those of a cohort that leave the smallest
            share of the noise of the validation, or else the bundled ones. If there are none and
            --allow-extrapolation is given: the last weights that can be applied.

        Raises
        ------
        Refusal
            No weights can be used.
        """
        require_directions(acquisition)
        found = [(c, find_violations(c.card, acquisition)) for c in self.weights]
        if suitable := [c for c, violations in found if not violations]:
            return min(suitable, key=lambda c: (c.card.trained_for.shell_count is not None,
                                                share_of_noise(c.card)))
        possible = [c for c, _ in found if can_apply(c.card, acquisition)]
        if self.context.allow_extrapolation and possible:
            return possible[-1]
        if not found:
            raise Refusal(f"{self.name} found no weights: none are bundled, and none are in "
                          "OUTPUT_DIR/group/models. Train it first: qsphere BIDS_DIR OUTPUT_DIR "
                          f"group --train {self.name}")
        _, violations = found[-1]
        raise Refusal(f"{self.name} was not trained for this acquisition: {'; '.join(violations)}. "
                      f"Leave --denoise out, or train it on such runs (group --train {self.name})."
                      + f" {OVERRIDE}" * bool(possible))

    def check(self, acquisition: Acquisition) -> None:
        """Check that there are weights for an acquisition.

        Raises
        ------
        Refusal
            There is no b0, or no shell of FEWEST directions; or no weights support the acquisition.
        """
        self.select(acquisition)

    def violations(self, acquisition: Acquisition) -> list[str]:
        return find_violations(self.select(acquisition).card, acquisition)

    def denoise(self, dwi: Dwi, device: str, seed: int = 0) -> Denoised:
        checkpoint = self.select(dwi.acquisition)
        card, shells = checkpoint.card, usable_shells(checkpoint.card, dwi.acquisition)
        signal, counts = apply_network(checkpoint, dwi, shells, device)
        network = card.network
        parameters: dict[str, Any] = {
            "Layer": network["layer"], "Nonlinearity": network["nonlinearity"],
            "NonlinearitySpace": network["space"],
            "RotationEquivariant": is_equivariant(network["layer"], network["space"]),
            "Training": card.training["data"], "Weights": card.sha256,
            "NoiseSD": dwi.noise_sd or f"assumed: S0 / {ASSUMED_SNR:.0f}",
            "NoiseFloor": card.training["floor"] if dwi.magnitude else "none in the input"}
        notices = []
        if not dwi.noise_sd:
            notices.append("spherical denoising: the noise could not be measured, and an SNR of "
                           f"{ASSUMED_SNR:.0f} was assumed.")
        used = {tuple(s.indices) for s in shells}
        if dropped := [s for s in dwi.acquisition.shells if tuple(s.indices) not in used]:
            parameters["ShellsLeftOut"] = [round(s.b) for s in dropped]
            notices.append(f"spherical denoising: {describe_shells(dropped)} s/mm² remain as "
                           "measured. The network was trained for "
                           f"{card.trained_for.describe_ranges()}.")
        if violations := find_violations(card, dwi.acquisition):
            parameters["OutOfDistribution"] = violations
            notices.append("spherical denoising: used outside of the training domain because of "
                           f"--allow-extrapolation: {'; '.join(violations)}.")
        return Denoised(signal, counts, parameters, notices,
                        magnitude=card.training["floor"] != "removed",
                        warnings=self._warnings(card, dwi, shells))

    def _warnings(self, card: Card, dwi: Dwi, shells: Sequence[Shell]) -> list[str]:
        """Give reasons to doubt a result."""
        snr = dwi.snr_of(np.concatenate([s.indices for s in shells]))
        warnings = [f"Spherical denoising: {text}" for text in card.trained_for.warnings(snr, {})]
        most = max(map(len, shells))
        if card.trained_for.shell_count is not None and most < ENOUGH_DIRECTIONS:
            warnings.append(
                f"Spherical denoising: the largest shell has {most} directions. From fewer than "
                f"{ENOUGH_DIRECTIONS} of b 1000, tensors of the denoised signal had a lower FA, "
                "with more error than those of the measured signal. Take FA from the measured "
                "signal.")
        return warnings

    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Train a network on measured signals with added noise.

        The target is the measured signal y = x + n, the input z = y + n' has as much noise again.
        The network gives E[y | z] = (E[x | z] + z)/2, as n and n' are alike, so that E[x | z] is
        2 E[y | z] − z (Moran et al. 2020, doi:10.1109/CVPR42600.2020.01208). This holds as far as
        the network can return its input, by a shortcut. `apply_network` does the same with y for z.
        """
        if changed := [path for path in self.changed_settings if path.startswith(FROM_RUNS)]:
            raise UsageError(f"--set {self.name}.{changed[0]}: a training at group level takes it "
                             "from the runs. Leave the option out.")
        recipe = self.settings("training")
        acquisition = require_one_acquisition(self.name, cohort, recipe["network"]["layer"])
        validation = cohort.hold_out(HELD_OUT, settings.seed, self.name,
                                     list(cohort.acquisitions))
        runs = list(cohort.acquisitions)
        assert cohort.load
        samples, magnitudes = [], []
        for i, run in enumerate(runs):
            dwi = cohort.load(run)
            if not dwi.noise_sd:
                raise UsageError(f"--train {self.name}: the noise of {run} could not be measured, "
                                 "and noise of that level must be added. Leave the run out, or "
                                 "give runs with more directions or b0 volumes.")
            samples.append(learn.sample_run(dwi, recipe["voxels"] // len(runs), settings.seed + i))
            magnitudes.append(dwi.magnitude)

        def sampler(chosen: Sequence[int], batch: int) -> learn.CohortSampler:
            stacks, signals, sigma = zip(*(samples[i] for i in chosen), strict=True)
            return learn.CohortSampler(stacks, signals, sigma, [magnitudes[i] for i in chosen],
                                       batch)

        train, test = ([i for i, run in enumerate(runs) if (run in validation) == held]
                       for held in (False, True))
        levels = [float(v) for v in cohort.statistics["snr_b0"] if v == v and math.isfinite(v)]
        domain = TrainingDomain.from_acquisitions(
            list(cohort.acquisitions.values()),
            snr=(min(levels) / 2, 2 * max(levels)) if levels else recipe["trained_for"]["snr"])
        network = {**recipe["network"], "shells": len(acquisition.shells),
                   "directions": max(map(len, acquisition.shells))}
        schedule = training.Schedule(**recipe["schedule"])
        schedule = replace(schedule, steps=settings.max_steps or schedule.steps)
        name = "_".join([self.name, *(network[k] for k in ("layer", "nonlinearity", "space")),
                         *(f"b{round(s.b, -2):.0f}n{len(s)}" for s in acquisition.shells)])
        start = read_start(self.name, settings.init, network)
        saved = None
        if settings.states:
            settings.states.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(repr((__version__, network, recipe["batch"], recipe["voxels"],
                                          replace(schedule, steps=1), sorted(runs), domain,
                                          start and start.card.sha256)).encode()).hexdigest()
            saved = settings.states / f"{name}.{digest[:8]}.ckpt"
        generator = torch.Generator().manual_seed(settings.seed + 1)
        held_out = [b for _ in range(max(1, recipe["held_out"] // 1024))
                    for b in sampler(test, 1024).draw(generator)]
        held_out = [learn.Minibatch(*(x.to(settings.device) for x in b)) for b in held_out]
        table = needs_table(network["layer"])
        constants: dict[str, Any] = {
            "half_of_the_noise": network["shortcut"] and not table,
            **({"directions": acquisition.bvecs.round(4).tolist()} if table else {})}
        checkpoint = learn.train(
            self.name, network, sampler(train, recipe["batch"]).draw, held_out, schedule, domain,
            seed=settings.seed, device=settings.device, exponent=recipe["exponent"],
            intended_use=self.intended_use,
            data={"data": "measured signals with added noise", "runs": len(runs),
                  "voxels": sum(len(signal) for _, signal, _ in samples),
                  "floor": "that of the measurements, as in the target"},
            constants=constants, start=start, saved=saved, devices=settings.devices)
        return Fitted({}, {"Method": self.name, "Model": self.outputs["model"],
                           "MetricsOf": "held-out runs of the cohort, against their noisy "
                           "measurements", "Metrics": dict(checkpoint.card.metrics)},
                      {name: checkpoint})

    def train_bundled(self, *, steps: int | None = None, learning_rate: float | None = None,
                      seed: int = 1, device: str = "cpu", start: Checkpoint | None = None,
                      saved: Path | None = None) -> Checkpoint:
        """Train a network for any table on simulated voxels: the bundled weights.

        Parameters
        ----------
        steps, learning_rate : optional
            Replace those of training.toml.
        seed, device, start, saved
            As in `learn.train`.

        Returns
        -------
        Checkpoint
        """
        recipe = self.settings("training")
        domain = TrainingDomain(**recipe["trained_for"])
        schedule = training.Schedule(**recipe["schedule"])
        schedule = replace(schedule, steps=steps or schedule.steps,
                           learning_rate=learning_rate or schedule.learning_rate)
        simulate = learn.Simulator(domain, None, recipe["batch"], recipe["groups"])
        generator = torch.Generator(device).manual_seed(seed + 1)
        held_out = [simulate(1024, 64, generator) for _ in range(recipe["held_out"] // 1024)]
        return learn.train(
            self.name, recipe["network"], simulate.draw, held_out, schedule, domain, seed=seed,
            device=device, exponent=recipe["exponent"], intended_use=self.intended_use,
            data={"data": "simulated voxels", "batch": recipe["batch"], "floor": "removed"},
            start=start, saved=saved)


def require_directions(acquisition: Acquisition) -> None:
    """Raise Refusal unless there is a b0, and a shell of FEWEST directions."""
    shells = acquisition.shells
    if not acquisition.b0.any():
        raise Refusal("the run has no volume without weighting, and signals are divided by the "
                      "mean b0. A b0 is needed: leave --denoise out.")
    if max(map(len, shells), default=0) < FEWEST:
        raise Refusal(f"the run has {describe_shells(shells)} s/mm². A shell of at least "
                      f"{FEWEST} directions is needed, which determine degree 2. Leave "
                      "--denoise out.")


def find_violations(card: Card, acquisition: Acquisition) -> list[str]:
    """List the violations of a network's training domain, with those of its gradient table."""
    violations = card.trained_for.violations(acquisition)
    if not violations and not _enough_directions(card, acquisition):
        violations.append(f"the run has {describe_shells(acquisition.shells)} s/mm², needed is a "
                          f"shell of {MIN_DIRECTIONS} directions: with fewer, FA falls")
    if not violations and "directions" in card.constants:
        angle = direction_difference(np.array(card.constants["directions"]), acquisition)
        if angle > SAME_DIRECTION:
            violations.append(f"directions of the table differ from those of the training by "
                              f"{angle:.0f}°, needed are at most {SAME_DIRECTION:.0f}° with the "
                              f"layer {card.network['layer']}")
    return violations


def direction_difference(bvecs: np.ndarray, acquisition: Acquisition) -> float:
    """Compute the largest angle between the axes of two tables in order, in degrees; 90 for
    tables of other lengths."""
    if len(bvecs) != len(acquisition):
        return 90.0
    weighted = ~acquisition.b0
    cosine = np.abs((bvecs * acquisition.bvecs).sum(1))[weighted].clip(0, 1)
    return float(np.degrees(np.arccos(cosine.min())))


def share_of_noise(card: Card) -> float:
    """Compute the mean square error of the validation after denoising over that before.

    The error itself would favour the cohort with the least noise, which is in its target.
    """
    return float(card.metrics["mse_output"] / card.metrics["mse_input"])


def usable_shells(card: Card, acquisition: Acquisition) -> list[Shell]:
    """Select the shells that a network is applied to: those of its training domain, for bundled
    weights with MIN_DIRECTIONS, or, if there is none, all of FEWEST directions."""
    if not card.trained_for.violations(acquisition) and (
            shells := _enough_directions(card, acquisition)):
        return shells
    return [s for s in acquisition.shells if len(s) >= FEWEST]


def _enough_directions(card: Card, acquisition: Acquisition) -> list[Shell]:
    """Select the shells of the training domain; of many protocols, those with MIN_DIRECTIONS."""
    fewest = FEWEST if card.trained_for.shell_count is None else MIN_DIRECTIONS
    return [s for s in card.trained_for.usable_shells(acquisition) if len(s) >= fewest]


def can_apply(card: Card, acquisition: Acquisition) -> bool:
    """Tell whether a network has inputs for the shells of a run, in its training domain or not."""
    shells, count = usable_shells(card, acquisition), card.network["shells"]
    if needs_table(card.network["layer"]):
        return len(card.constants["directions"]) == len(acquisition) and len(shells) == count
    return count in (0, len(shells))


def apply_network(checkpoint: Checkpoint, dwi: Dwi, shells: Sequence[Shell], device: str
                  ) -> tuple[np.ndarray, dict[str, int]]:
    """Denoise the volumes of shells.

    Parameters
    ----------
    checkpoint : Checkpoint
    dwi : Dwi
    shells : sequence of Shell
        Those that the network takes.
    device : str

    Returns
    -------
    signal : (voxel, measurement) float32
        In the units of the input. b0 volumes, other shells, and voxels without b0 signal are
        unchanged.
    counts : dict
        Numbers of voxels without b0 signal, and with more noise than in training.
    """
    description = dict(checkpoint.card.network)
    if description["layer"] == "zonal":  # others have no finer form
        description["grid"] = GRID
    network = checkpoint.into(build_network(description)).to(device)
    stack = learn.select_stack(dwi.acquisition, shells).to(torch.zeros(1, device=device))
    fit, basis = learn.fit_matrices(stack), stack.basis[..., :sh.size(learn.L_FIT)]
    weighted = np.concatenate([s.indices for s in shells])
    b0 = torch.as_tensor(np.flatnonzero(dwi.acquisition.b0), device=device)
    columns = [torch.as_tensor(s.indices, device=device) for s in shells]
    sd = dwi.noise_of(weighted)
    assert checkpoint.card.trained_for.snr
    low, high = (1 / snr for snr in reversed(checkpoint.card.trained_for.snr))
    half_of_the_noise = checkpoint.card.constants.get("half_of_the_noise", False)
    least = 0.0 if dwi.magnitude else -learn.MAX_ATTENUATION

    def denoise_block(signal: torch.Tensor) -> dict[str, torch.Tensor]:
        s0 = signal[:, b0].mean(1)
        usable = s0 > 0
        s0 = torch.where(usable, s0, 1)
        sigma = sd / s0 if sd else torch.full_like(s0, 1 / ASSUMED_SNR)
        noise = torch.stack([sigma, sigma * dwi.magnitude], 1).clamp(max=high)
        noise[:, 0].clamp_(min=low)
        attenuation = (signal / s0[:, None]).clamp(least, learn.MAX_ATTENUATION)
        x = learn.pack(attenuation, shells)
        out = network(x, noise, stack.shells, fit, basis)
        if half_of_the_noise:
            out = 2 * out - x
        result = signal.clone()
        for i, index in enumerate(columns):
            result[:, index] = out[:, i, :len(index)].clamp(min=0) * s0[:, None]
        return {"signal": torch.where(usable[:, None], result, signal),
                "no_b0": ~usable, "noisy": usable & (sigma > high)}

    values = map_voxels(denoise_block, dwi.signal, device, BLOCK)
    return values["signal"], {"spherical_no_b0_signal": int(values["no_b0"].sum()),
                              "spherical_noise_out_of_range": int(values["noisy"].sum())}


def require_one_acquisition(method: str, cohort: Cohort, layer: str) -> Acquisition:
    """Check that all runs share an acquisition, and return that of the first.

    Raises
    ------
    UsageError
        There is no run; runs differ in their shells; a shell has fewer than FEWEST
        directions; there is no b0; or directions differ and the layer serves one table.
    """
    by_shells: dict[str, list[str]] = {}
    for run, acquisition in cohort.acquisitions.items():
        by_shells.setdefault(describe_shells([replace(s, b=round(s.b, -2))
                                              for s in acquisition.shells]), []).append(run)
    if len(by_shells) != 1 or not cohort.load:
        listing = "; ".join(f"{shells}: {', '.join(runs[:3])}" for shells, runs in
                            by_shells.items()) or "no run"
        raise UsageError(f"--train {method} needs runs of one acquisition. Found: {listing}. "
                         "Choose runs with --participant-label, --session-label or "
                         "--bids-filter-file.")
    first = next(iter(cohort.acquisitions.values()))
    try:
        for acquisition in cohort.acquisitions.values():
            require_directions(acquisition)
    except Refusal as refusal:
        raise UsageError(f"--train {method}: {refusal}") from refusal
    if min(map(len, first.shells)) < FEWEST:
        raise UsageError(f"--train {method}: the runs have {describe_shells(first.shells)} s/mm². "
                         f"Each shell needs at least {FEWEST} directions.")
    angles = {run: direction_difference(first.bvecs, acquisition)
              for run, acquisition in cohort.acquisitions.items()}
    run = max(angles, key=lambda r: angles[r])
    if needs_table(layer) and angles[run] > SAME_DIRECTION:
        raise UsageError(f"--train {method}: directions of {run} differ by {angles[run]:.0f}° from "
                         f"those of the first run, and the layer {layer} serves one gradient "
                         "table. Choose a layer that serves any, such as "
                         f"--set {method}.network.layer=zonal, or runs of one table.")
    return first


def read_start(method: str, folder: Path | None, network: Mapping[str, Any]) -> Checkpoint | None:
    """Load the initial weights of --init.

    Raises
    ------
    UsageError
        They belong to another network.
    """
    if folder is None:
        return None
    start = load(folder, method)
    if dict(start.card.network) != dict(network):
        raise UsageError(f"--init {folder}: holds the network {dict(start.card.network)}, but "
                         f"{dict(network)} is trained. Leave the option out, or give weights of "
                         "the same network.")
    return start
