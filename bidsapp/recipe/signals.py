"""The steps that replace the signal of a run: denoise, harmonize and upsample it."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from bidsapp import upsample
from bidsapp.acquisition import (
    SAME_B,
    SAME_SHAPE,
    Acquisition,
    Shell,
    concatenate,
    describe_shells,
)
from bidsapp.bids import btable
from bidsapp.bids.writer import Transaction, sha256
from bidsapp.domain import OVERRIDE
from bidsapp.dwi import noise_sd
from bidsapp.errors import Refusal
from bidsapp.evaluate import change
from bidsapp.kinds import Denoiser, Method, Upsampler
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.steps import (
    RunContext,
    Step,
    StepReport,
    depends_on_weights,
    outputs,
    reload_signal,
    voxel_size,
)
from bidsapp.report import boilerplate, comparison
from bidsapp.report.upsampling import of_prediction, of_round_trip
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")

DIRECTIONS = 90
"""Directions per shell after upsampling, unless the options say otherwise (He et al. 2020)."""

SAME_DIRECTION = 1.0
"""Angle in degrees below which a direction of a target table counts as measured."""

DENOISED = ("the errors of a denoised signal are not independent between measurements. Use the "
            "intervals of the measured signal")
"""Reason why no interval is given for maps of a denoised signal."""

UNLIKE_TRAINING = (
    "The harmonizer takes the denoised signal, and learned from signals that were not denoised "
    "(--denoise). Their noise differs, so that it may not fit. Compare with a run without "
    "--denoise.")
"""Warning if a denoised signal is harmonized."""

PREDICTED = ("predicted volumes add no measurement, so that their errors and those of the measured "
             "ones are not independent. Use the intervals of the measured signal")
"""Reason why no interval is given for maps of an upsampled signal."""


class ByMethod(Step):
    """A step that replaces the signal by that of one method, which is the same for all runs."""

    def __init__(self, context: RunContext, takes: Step, method: Denoiser | Upsampler) -> None:
        super().__init__(context, takes)
        self.method = method

    @property
    def title(self) -> str:
        return self.method.name

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return [boilerplate.of_method(self.method)]

    def reload(self, stage: Stage | None, facts: Mapping[str, Any]) -> Stage:
        assert stage
        return reload_signal(self.context, stage, self.name, facts)


class Denoise(ByMethod):
    """Remove noise from the signal."""

    method: Denoiser
    name = desc = "denoised"

    @property
    def parameters(self) -> Mapping[str, Any]:
        return parameters(self.context.options, self.method)

    def describe(self) -> str:
        violations = self._check(self.context.acquisition)
        return self.method.name + describe_violations(violations)

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> Stage:
        assert stage
        context, method = self.context, self.method
        violations = self._check(stage.dwi.acquisition)
        log.info("%s: %s on %d voxels", context.run.name, method.name, len(stage.dwi.signal))
        made = method.denoise(stage.dwi, context.device, context.options.random_seed)
        dwi = replace(stage.dwi, signal=made.signal,
                      magnitude=stage.dwi.magnitude and made.magnitude)
        dwi = replace(dwi, noise_sd=noise_sd(dwi), noise_gain=None)
        compared = change.compare_signals(stage.dwi, dwi, context.device)
        report.qc |= made.counts
        report.notices += [*made.notices, "Maps of the denoised signal come without intervals "
                           f"(…_stat-std): {DENOISED}."]
        report.warnings += warn_of(violations, "Denoised")
        report.figures += comparison.of_change(compared, stage.dwi, "denoising", self.name)
        denoised = replace(stage, dwi=dwi, desc=self.name, no_intervals=DENOISED,
                           about={**stage.about, **out_of_distribution(violations)})
        report.facts = describe_signal(method, denoised)
        return outputs(context, transaction, denoised).write_signal(
            method, method.outputs["signal"], made.parameters)

    def _check(self, acquisition: Acquisition) -> list[str]:
        self.method.check(acquisition)
        violations = self.method.violations(acquisition)
        require_domain(self.method, violations, self.context.options)
        return violations


class Harmonize(Step):
    """Map the signal to a reference site, by the model for the site of the run."""

    name = desc = "harmonized"

    def __init__(self, context: RunContext, takes: Step, models: Sequence[harmonize.Model]) -> None:
        super().__init__(context, takes)
        self.models = models

    @property
    def parameters(self) -> Mapping[str, Any]:
        run, options = self.context.run, self.context.options
        return {"models": [m.checkpoint.card.sha256 for m in self.models],
                "ids": [m.id for m in self.models], "batch": run.batch,
                "covariates": run.covariates, "allow_extrapolation": options.allow_extrapolation,
                "sloppy": options.sloppy, "seed": options.random_seed}

    @property
    def title(self) -> str:
        return self.models[0].method.name

    @property
    def changes(self) -> bool:
        """Whether the signal is to change: not at the reference site, nor if the site has no model.

        The training domain of the model plays no part; `apply` checks it.
        """
        try:
            model = harmonize.select(self.models, self.context.run.batch)
        except Refusal:
            return False
        return self.context.run.batch != model.checkpoint.card.reference_batch

    def describe(self) -> str:
        run = self.context.run
        model = harmonize.select(self.models, run.batch)
        violations = harmonize.check(
            model, self.context.acquisition, voxel_size(run), run.batch,
            self.context.options.allow_extrapolation)
        reference = model.checkpoint.card.reference_batch
        if run.batch == reference:
            return f"{model.id}: unchanged, since {reference} is the reference site"
        return (f"{model.id}: {run.batch} to {reference}"
                + (f", outside of its training: {'; '.join(violations)}" if violations else ""))

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return [boilerplate.of_method(self.models[0].method)]

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> Stage:
        assert stage
        context, run = self.context, self.context.run
        result = harmonize.apply(self.models, stage.dwi, run, device=context.device,
                                 allow=context.options.allow_extrapolation)
        for notice in result.notices:
            log.info("%s: %s", run.name, notice)
        for warning in result.warnings:
            log.warning("%s: %s", run.name, warning)
        compared = change.compare_signals(stage.dwi, result.dwi, context.device)
        report.qc |= {**result.counts, **change.summarize_change(compared, result.dwi)}
        report.notices += result.notices
        report.warnings += result.warnings
        if result.changed and stage.desc == Denoise.desc:
            log.warning("%s: %s", run.name, UNLIKE_TRAINING)
            report.warnings.append(UNLIKE_TRAINING)
        if result.changed:
            report.figures += comparison.of_change(compared, stage.dwi, "harmonization", "change")
        method = result.model.method
        entry = dict(method.outputs["signal"])
        if not result.changed:
            entry["Description"] = ("Signal as measured, within the mask: the run is of the "
                                    "reference batch")
        harmonized = replace(
            stage, dwi=result.dwi, desc=self.name, about={**stage.about, **result.about},
            no_intervals=stage.no_intervals or result.no_intervals, widening=result.widening)
        report.facts = {
            **describe_signal(method, harmonized), "unchanged": not result.changed,
            "harmonizer": f"{method.name} to {result.model.checkpoint.card.reference_batch}"}
        return outputs(context, transaction, harmonized).write_signal(method, entry,
                                                                    result.parameters)

    def reload(self, stage: Stage | None, facts: Mapping[str, Any]) -> Stage:
        assert stage
        return reload_signal(self.context, stage, self.name, facts)


class Upsample(ByMethod):
    """Add predicted volumes to the signal; the measured ones stay as they are."""

    method: Upsampler
    name = desc = "upsampled"

    @property
    def parameters(self) -> Mapping[str, Any]:
        options = self.context.options
        table = options.target_bvecs
        return {**parameters(options, self.method), "directions": options.target_directions,
                "table": [sha256(f) for f in btable.target_files(table)] if table else None}

    def describe(self) -> str:
        target, violations, _ = self._target(self.context.acquisition)
        return (f"{self.method.name} of the {self.takes.name if self.takes else ''} signal, adds "
                f"{describe_shells(target.shells)}" + describe_violations(violations))

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> Stage:
        assert stage
        context, method, dwi = self.context, self.method, stage.dwi
        target, violations, notices = self._target(dwi.acquisition)
        log.info("%s: %s predicts %d volumes of %d voxels", context.run.name, method.name,
                 len(target), len(dwi.signal))
        made = method.predict(dwi, target, context.device, context.options.random_seed)
        new = np.arange(len(dwi.acquisition), len(dwi.acquisition) + len(target))
        upsampled = replace(
            stage, desc=self.name, no_intervals=PREDICTED, dwi=replace(
                dwi, signal=np.concatenate([dwi.signal, made.signal], 1),
                acquisition=concatenate([dwi.acquisition, target]),
                noise_gain=None if dwi.noise_gain is None else
                np.r_[dwi.noise_gain, np.ones(len(target))]),
            about={**stage.about, "SynthesizedVolumes": new.tolist(),
                   **out_of_distribution(violations)})
        report.notices += [
            *notices, *made.notices, f"{len(target)} volumes were predicted "
            f"({describe_shells(target.shells)}), and follow the {len(dwi.acquisition)} measured "
            "ones. Maps of this signal come without intervals (…_stat-std): " f"{PREDICTED}."]
        report.warnings += warn_of(violations, "Upsampled")
        report.qc |= made.counts
        report.figures.append(of_prediction(made, target, dwi))
        if method.any_table:
            try:
                trip = upsample.round_trip(method, dwi, context.device,
                                           context.options.random_seed)
            except Refusal as refusal:  # nine tenths of the directions may be too few
                report.notices.append(f"No round trip: {refusal}")
            else:
                report.qc |= summarize_round_trip(trip, dwi.noise_sd)
                report.figures.append(of_round_trip(trip, dwi.noise_sd))
        report.facts = describe_signal(method, upsampled)
        written = outputs(context, transaction, upsampled)
        if made.sd is not None:
            written.write_sd(method, made.sd, new.tolist(), made.parameters)
        return written.write_signal(method, method.outputs["signal"], made.parameters)

    def _target(self, acquisition: Acquisition) -> tuple[Acquisition, list[str], list[str]]:
        """Choose the measurements to add, and check them: with violations and notices."""
        context, method = self.context, self.method
        method.check(acquisition)
        target, notices = choose_target(method, acquisition, context.like.affine, context.options)
        violations = method.violations(acquisition, target)
        require_domain(method, violations, context.options)
        return target, violations, notices


def choose_target(method: Upsampler, acquisition: Acquisition, affine: np.ndarray,
                  options: Options) -> tuple[Acquisition, list[str]]:
    """Choose the measurements that an upsampler adds to an acquisition.

    Parameters
    ----------
    method : Upsampler
    acquisition : Acquisition
        The measurements of the run.
    affine : (4, 4)
        Affine of the image of the run.
    options : Options
        `target_bvecs`: these directions. `target_directions`: so many for each shell with
        directions, the measured ones included; the new ones repel each other and the measured ones.
        Neither: those that the method was trained for, or DIRECTIONS for each shell.

    Returns
    -------
    target : Acquisition
        One or more measurements, none of them measured already.
    notices : list of str

    Raises
    ------
    Refusal
        Nothing is left to add, or the method adds other directions than the options ask for.
    DataError
        The table cannot be read.
    """
    shells = method.shells(acquisition)
    filled = {int(s.indices[0]) for s in shells}
    rest = [s for s in acquisition.shells if int(s.indices[0]) not in filled
            and abs(s.b_delta) > SAME_SHAPE]
    left = [f"{method.name} adds no directions to {describe_shells(rest)} s/mm², which it cannot "
            "predict."] if rest else []
    asked = options.target_directions or options.target_bvecs
    if fixed := method.target(acquisition):
        if asked:
            raise Refusal(f"{method.name} adds the {len(fixed)} directions that it was trained "
                          "for, and no others. Leave out --target-directions and --target-bvecs, "
                          "or take another method.")
        return fixed, []
    if options.target_bvecs:
        bvecs, bvals = btable.read_target(options.target_bvecs, affine)
        wanted = (Acquisition(bvals, bvecs) if bvals is not None else
                  concatenate([_along(shell, bvecs) for shell in shells]))
        wanted = wanted[~wanted.b0] if not wanted.b0.all() else wanted
        measured = _measured(wanted, acquisition)
        if measured.all() or wanted.b0.all():
            raise Refusal(f"{options.target_bvecs}: all {len(wanted)} measurements are b0 or were "
                          "acquired. A table with other directions is needed.")
        notices = [f"{measured.sum()} of {len(wanted)} measurements in "
                   f"{options.target_bvecs.name} were acquired, and are not predicted."]
        return wanted[~measured], notices if measured.any() else []
    count = options.target_directions or DIRECTIONS
    added = [_along(shell, upsample.spread(acquisition.bvecs[shell.indices], count - len(shell),
                                           options.random_seed))
             for shell in shells if len(shell) < count]
    if not added:
        raise Refusal(f"the run has {describe_shells(acquisition.shells)} s/mm², and {count} "
                      "directions per shell are asked for. Give a larger number to "
                      "--target-directions, or leave --upsample out.")
    return concatenate(added), left


def _along(shell: Shell, bvecs: np.ndarray) -> Acquisition:
    """Give all directions the b-value and the shape of a shell."""
    return Acquisition(np.full(len(bvecs), shell.b), bvecs, np.full(len(bvecs), shell.b_delta))


def _measured(wanted: Acquisition, acquisition: Acquisition) -> np.ndarray:
    """(len(wanted),) bool: a measurement of the same b (5 %), shape and direction was acquired."""
    angle = np.degrees(np.arccos(np.abs(wanted.bvecs @ acquisition.bvecs.T).clip(0, 1)))
    same = (np.abs(np.subtract.outer(wanted.bvals, acquisition.bvals)) <= SAME_B
            * wanted.bvals[:, None])
    shape = np.abs(np.subtract.outer(wanted.b_delta, acquisition.b_delta)) <= SAME_SHAPE
    return (same & shape & (angle < SAME_DIRECTION)).any(1)


def summarize_round_trip(trip: pd.DataFrame, noise: float | None) -> dict[str, float | None]:
    """Summarise the round trip for the quality table: medians over volumes."""
    rmse, coverage = float(trip["rmse"].median()), float(trip["coverage"].median())
    return {"roundtrip_rmse": rmse / noise if noise else None,
            "roundtrip_correlation": float(trip["correlation"].median()),
            "roundtrip_coverage": coverage if np.isfinite(coverage) else None}


def parameters(options: Options, method: Method) -> dict[str, Any]:
    """List what the result of a method depends on besides its signal, for the fingerprint."""
    return {"method": method.name, **depends_on_weights(options, method),
            "sloppy": options.sloppy, "seed": options.random_seed}


def describe_signal(method: Method, stage: Stage) -> dict[str, Any]:
    """List what `reload_signal` needs from the record of a step that made a signal."""
    gain = stage.dwi.noise_gain
    return {"method": method.name, "about": stage.about, "no_intervals": stage.no_intervals,
            "widening": stage.widening, "magnitude": stage.dwi.magnitude,
            "noise_sd": stage.dwi.noise_sd,
            "noise_gain": None if gain is None else [float(g) for g in gain]}


def require_domain(method: Method, violations: Sequence[str], options: Options) -> None:
    """Refuse a run outside the training domain of a method, unless extrapolation is allowed.

    Raises
    ------
    Refusal
    """
    if violations and not options.allow_extrapolation:
        raise Refusal(f"{method.name} was not trained for this run: {'; '.join(violations)}. Train "
                      f"on such runs, or leave the method out. {OVERRIDE}")


def describe_violations(violations: Sequence[str]) -> str:
    """Describe violations at the end of a line of the dry run; empty if there are none."""
    return f", outside of its training: {'; '.join(violations)}" * bool(violations)


def out_of_distribution(violations: Sequence[str]) -> dict[str, Any]:
    """Make the sidecar key of violations of a training domain; empty if there are none."""
    return {"OutOfDistribution": list(violations)} if violations else {}


def warn_of(violations: Sequence[str], done: str) -> list[str]:
    """Warn of violations that the user allowed."""
    return [f"{done} outside of what the method was trained for, as --allow-extrapolation asks: "
            f"{'; '.join(violations)}."] if violations else []
