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
from bidsapp.kinds import Denoiser, Method, Trainable, Upsampler
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.steps import (
    Measure,
    RunContext,
    Step,
    StepReport,
    depends_on_weights,
    outputs,
    reload_signal,
    voxel_size,
)
from bidsapp.report import boilerplate, comparison
from bidsapp.report.upsampling import of_directions, of_prediction, of_round_trip
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")

DIRECTIONS = 90
"""Directions per shell after upsampling, unless the options say otherwise (He et al. 2020)."""

DENOISED = ("the errors of a denoised signal are not independent between measurements. Use the "
            "intervals of the measured signal")
"""Reason why no interval is given for maps of a denoised signal."""

DENOISED_TWICE = (
    "The corrections removed noise before (--preprocess denoise), and the residuals from which a "
    "second denoiser measures the noise hide it. The signal may be further from the truth than "
    "after the first one. Leave --denoise out, or name corrections without denoise.")
"""Warning if a signal is denoised that the corrections denoised."""

PREDICTED_FROM_DENOISED = (
    "The directions are predicted from the denoised signal, whose errors are not independent "
    "between measurements, as all upsamplers assume, and larger than its residuals show. No SD is "
    "given for the predictions, and they may be further from the truth than those from the "
    "measured signal. Compare with a run without --denoise.")
"""Warning if an upsampler takes a denoised signal."""

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
        again = "denoise" in self.context.corrections
        return (self.method.name + describe_violations(violations)
                + "; the corrections denoise, too, which may make the signal worse" * again)

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
        if "denoise" in self._corrected():
            log.warning("%s: %s", context.run.name, DENOISED_TWICE)
            report.warnings.append(DENOISED_TWICE)
        log_warnings(context, made.warnings)
        report.warnings += [*warn_of(violations, "Denoised"), *made.warnings]
        report.figures += comparison.of_change(compared, stage.dwi, "denoising", self.name)
        denoised = replace(stage, dwi=dwi, desc=self.name, no_intervals=DENOISED,
                           about={**stage.about, **out_of_distribution(violations),
                                  "Denoiser": {"Name": method.name, **made.parameters}})
        report.facts = describe_signal(method, denoised)
        return outputs(context, transaction, denoised).write_signal(
            method, method.outputs["signal"], made.parameters)

    def _corrected(self) -> list[str]:
        """Names of the corrections that were done."""
        preprocess = self.takes.preprocess if isinstance(self.takes, Measure) else None
        record = self.context.dataset.record(preprocess.record) if preprocess else {}
        return [entry["name"] for entry in record.get("corrections", ())]

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
    """Add predicted volumes to the signal; those that it has stay as they are."""

    method: Upsampler
    name = desc = "upsampled"

    @property
    def parameters(self) -> Mapping[str, Any]:
        options = self.context.options
        table = options.target_bvecs
        return {**parameters(options, self.method), "directions": options.target_directions,
                "table": [sha256(f) for f in btable.target_files(table)] if table else None}

    def describe(self) -> str:
        target, violations, notices = self._target(self.context.acquisition)
        of_denoised = self.takes is not None and any(
            isinstance(step, Denoise) for step in (self.takes, self.takes.takes))
        return (f"{self.method.name} of the {self.takes.name if self.takes else ''} signal, adds "
                f"{describe_shells(target.shells)}" + describe_violations(violations)
                + "; without SD, and maybe worse than from the measured signal" * of_denoised
                + "".join(f"\n    {notice}" for notice in notices))

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
        signal = stage.desc or "measured"
        report.notices += [
            *notices, *made.notices, f"{len(target)} volumes were predicted "
            f"({describe_shells(target.shells)}), and follow the {len(dwi.acquisition)} of the "
            f"{signal} signal. Maps of this signal come without intervals (…_stat-std): "
            f"{PREDICTED}."]
        if stage.no_intervals:
            report.notices.append("The predicted volumes come without SD (…_stat-std): "
                                  f"{stage.no_intervals}.")
        if stage.no_intervals == DENOISED:
            log.warning("%s: %s", context.run.name, PREDICTED_FROM_DENOISED)
            report.warnings.append(PREDICTED_FROM_DENOISED)
        log_warnings(context, made.warnings)
        report.warnings += [*warn_of(violations, "Upsampled"), *made.warnings]
        report.qc |= made.counts
        sd = None if made.sd is None or stage.no_intervals else (
            made.sd * np.float32(stage.widening))
        report.figures += [of_directions(dwi.acquisition, target),
                           of_prediction(made.signal, sd, target, dwi, signal)]
        if method.any_table:
            self._round_trip(stage, report)
        report.facts = describe_signal(method, upsampled)
        written = outputs(context, transaction, upsampled)
        if sd is not None:
            written.write_sd(method, sd, new.tolist(), made.parameters)
        entry = dict(method.outputs["signal"])
        entry["Description"] = (f"Volumes of the {signal} signal, unchanged inside of the brain "
                                f"mask and 0 outside, and after them {entry['Description']}")
        return written.write_signal(method, entry, made.parameters)

    def _round_trip(self, stage: Stage, report: StepReport) -> None:
        """Predict each volume from others, or say why that would show nothing."""
        context, dwi = self.context, stage.dwi
        if stage.desc:
            report.notices.append(
                f"No round trip: each volume of the {stage.desc} signal was made from all measured "
                "ones, so that its prediction from the others would look better than it is.")
            return
        try:
            trip = upsample.round_trip(self.method, dwi, context.device,
                                       context.options.random_seed)
        except Refusal as refusal:  # nine tenths of the directions may be too few
            report.notices.append(f"No round trip: {refusal}")
            return
        if "denoise" in context.corrections:
            report.notices.append(
                "Round trip: the corrections denoised the images, which carries some of each "
                "volume to the others. Its errors are smaller than those of new volumes.")
        report.qc |= summarize_round_trip(trip, dwi.noise_sd)
        report.figures.append(of_round_trip(trip, dwi.noise_sd))

    def _target(self, acquisition: Acquisition) -> tuple[Acquisition, list[str], list[str]]:
        """Choose the measurements to add, and check them: with violations and notices."""
        context, method = self.context, self.method
        method.check(acquisition)
        target, notices = choose_target(method, acquisition, context.like.affine, context.options)
        method.check_target(acquisition, target)
        violations = method.violations(acquisition, target, voxel_size(context.run))
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
        Antipodes and repeated directions count once.
        Neither: those that the method was trained for, or DIRECTIONS for each shell.

    Returns
    -------
    target : Acquisition
        One or more measurements, none of them measured already, and none twice.
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
        measured = _alike(wanted, acquisition).any(1)
        if measured.all() or wanted.b0.all():
            raise Refusal(f"{options.target_bvecs}: all {len(wanted)} measurements are b0 or were "
                          "acquired. A table with other directions is needed.")
        repeated = np.tril(_alike(wanted, wanted), -1).any(1) & ~measured
        counted = f"of {len(wanted)} measurements in {options.target_bvecs.name}"
        notices = [*([f"{measured.sum()} {counted} were acquired, and are not predicted."]
                     if measured.any() else []),
                   *([f"{repeated.sum()} {counted} repeat another one or its antipode, and are not "
                      "predicted again."] if repeated.any() else []),
                   *(left if bvals is None else [])]
        return wanted[~measured & ~repeated], notices
    count = options.target_directions or DIRECTIONS
    axes = [acquisition.bvecs[shell.indices][upsample.distinct(acquisition.bvecs[shell.indices])]
            for shell in shells]
    added = [_along(shell, upsample.spread(given, count - len(given), options.random_seed))
             for shell, given in zip(shells, axes, strict=True) if len(given) < count]
    if not added:
        raise Refusal(f"the run has {describe_shells(acquisition.shells)} s/mm², and {count} "
                      "directions per shell are asked for. Give a larger number to "
                      "--target-directions, or leave --upsample out.")
    return concatenate(added), left


def _along(shell: Shell, bvecs: np.ndarray) -> Acquisition:
    """Give all directions the b-value and the shape of a shell."""
    return Acquisition(np.full(len(bvecs), shell.b), bvecs, np.full(len(bvecs), shell.b_delta))


def _alike(a: Acquisition, b: Acquisition) -> np.ndarray:
    """(len(a), len(b)) bool: measurements of the same b (5 %), shape and direction."""
    angle = np.degrees(np.arccos(np.abs(a.bvecs @ b.bvecs.T).clip(0, 1)))
    same = np.abs(np.subtract.outer(a.bvals, b.bvals)) <= SAME_B * a.bvals[:, None]
    shape = np.abs(np.subtract.outer(a.b_delta, b.b_delta)) <= SAME_SHAPE
    return same & shape & (angle < upsample.SAME_DIRECTION)


def count_predicted(acquisition: Acquisition, options: Options) -> int:
    """Count the volumes that --upsample may add to an acquisition, at most.

    Neither the method nor its weights are loaded. The table of --target-bvecs counts for each
    shell; without an option, so many directions as DIRECTIONS.

    Raises
    ------
    DataError
        The table cannot be read.
    """
    if not options.upsample:
        return 0
    shells = acquisition.shells
    if options.target_bvecs:
        bvecs, bvals = btable.read_target(options.target_bvecs, np.eye(4))
        return len(bvecs) * (len(shells) if bvals is None else 1)
    count = options.target_directions or DIRECTIONS
    return sum(max(0, count - len(shell)) for shell in shells)


def with_predicted(acquisition: Acquisition, options: Options) -> int:
    """Count volumes for the memory (`peak_memory`): those predicted count twice, with their SD."""
    return len(acquisition) + 2 * count_predicted(acquisition, options)


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
    """Refuse a run outside the domain of a method, unless extrapolation is allowed.

    Raises
    ------
    Refusal
    """
    if violations and not options.allow_extrapolation:
        advice = ("Train it on such runs, or leave it out." if isinstance(method, Trainable) else
                  "Choose other targets or another method, or leave it out.")
        raise Refusal(f"{method.name} does not serve this run: {'; '.join(violations)}. {advice} "
                      f"{OVERRIDE}")


def describe_violations(violations: Sequence[str]) -> str:
    """Describe violations at the end of a line of the dry run; empty if there are none."""
    return f", outside of its domain: {'; '.join(violations)}" * bool(violations)


def out_of_distribution(violations: Sequence[str]) -> dict[str, Any]:
    """Make the sidecar key of violations of a domain; empty if there are none."""
    return {"OutOfDistribution": list(violations)} if violations else {}


def log_warnings(context: RunContext, warnings: Sequence[str]) -> None:
    """Log the warnings of a method about a run."""
    for warning in warnings:
        log.warning("%s: %s", context.run.name, warning)


def warn_of(violations: Sequence[str], done: str) -> list[str]:
    """Warn of violations that the user allowed."""
    return [f"{done} outside of the domain of the method, as --allow-extrapolation asks: "
            f"{'; '.join(violations)}."] if violations else []
