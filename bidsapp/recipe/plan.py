"""The plan of a run: its steps in order. Nothing else in the program knows that order.

`execute.py` does the steps, --dry-run prints their descriptions (`Step.describe`), and the page
holds their paragraphs for a methods section (`Step.paragraphs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from bidsapp import methods
from bidsapp.bids.inherit import entities_of, name_of
from bidsapp.dwi import FIELD_MAPS, FieldMap, Run, peak_memory
from bidsapp.errors import QSphereError, Refusal
from bidsapp.kinds import Estimator, FromSignal, Method, MethodContext, Upsampler
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.spaces import Register, Resample, paragraph
from bidsapp.recipe.steps import (
    PREPARATION,
    Estimate,
    Harmonize,
    Measure,
    RunContext,
    Step,
    Upsample,
)
from bidsapp.report import boilerplate
from bidsapp.spaces import Space, parse

DEFAULT_ESTIMATES = ("dti", "smt", "scnn2")
"""Estimators that run without --estimate, as far as their folders exist."""


def plan(context: RunContext, models: Sequence[harmonize.Model], chosen: Sequence[FromSignal],
         upsampler: Upsampler | None = None) -> list[Step]:
    """List the steps of a run.

    Estimators are applied to the measured signal and to each signal that harmonization or
    upsampling changes; the synthesizer is applied to the measured signal only.

    Parameters
    ----------
    context : RunContext
        The run and what its steps share.
    models : sequence of harmonize.Model
        Models that --harmonize names; the one for the site of the run is applied.
    chosen : sequence of FromSignal
        Estimators and the synthesizer, as `chosen_methods` returns them.
    upsampler : Upsampler, optional
        Method that --upsample names. It takes the harmonized signal, if that was changed.

    Returns
    -------
    list of Step
        In the order of execution: each step comes after the one whose signal it takes.
    """
    measured: Step = Measure(context)
    signals: list[Step] = [measured]
    changed: list[Step] = []
    if models:
        harmonized = Harmonize(context, measured, models)
        signals.append(harmonized)
        changed += [harmonized] if harmonized.changes else []
    if upsampler:
        upsampled = Upsample(context, changed[-1] if changed else measured, upsampler)
        signals.append(upsampled)
        changed.append(upsampled)
    steps, estimates = [*signals], list[Estimate]()
    for method in chosen:
        of_method = [Estimate(context, measured, method)]
        if isinstance(method, Estimator):
            of_method += [Estimate(context, signal, method) for signal in changed]
            estimates += of_method
        steps += of_method
    for space in parse(context.options.output_spaces):
        registered = Register(context, measured, space)
        steps += [registered, *(Resample(context, registered, estimate) for estimate in estimates)]
    return steps


def chosen_methods(options: Options) -> list[FromSignal]:
    """Load the estimators and the synthesizer that the options ask for, in order.

    Raises
    ------
    UsageError
        A method does not exist, or none of them has a hyper-parameter that --set names.
    """
    return [m for m in _methods(options) if isinstance(m, FromSignal)]


def chosen_upsampler(options: Options) -> Upsampler | None:
    """Load the method that --upsample names; None without the option.

    Raises
    ------
    UsageError
        As of `chosen_methods`.
    """
    return next((m for m in _methods(options) if isinstance(m, Upsampler)), None)


def _methods(options: Options) -> list[Method]:
    """Load the methods that the options name, harmonizers apart, with what the command tells
    them."""
    available = methods.names("estimate_")
    estimates = options.estimate or [n for n in DEFAULT_ESTIMATES if f"estimate_{n}" in available]
    chosen = [*(methods.get(name, "estimate") for name in dict.fromkeys(estimates)),
              *([methods.get("synthesize")] if options.synthesize else []),
              *([methods.get(options.upsample, "upsample")] if options.upsample else [])]
    context = MethodContext(
        options.sloppy, options.output_dir / harmonize.MODELS,
        methods.read_settings(options.set, chosen, training=False, sloppy=options.sloppy),
        allow_extrapolation=options.allow_extrapolation)
    return [methods.get(method.name, context=context) for method in chosen]


def describe(context: RunContext, models: Sequence[harmonize.Model], chosen: Sequence[FromSignal],
             upsampler: Upsampler | None = None) -> list[str]:
    """Describe the steps of a run and its predicted memory, in lines."""
    name = context.run.name
    steps = plan(context, models, chosen, upsampler)
    try:
        size = context.like.shape[0] * context.like.shape[1] * context.like.shape[2]
        most = peak_memory(size, len(context.acquisition)) / 1e9
        lines = [f"{name}: {steps[0].describe()}; batch {context.run.batch}; at most "
                 f"{most:.1f} GB"]
    except QSphereError as error:
        return [f"{name}: would fail: {error}"]
    refused: list[Step] = []
    for step in steps[1:]:
        if any(other in refused for other in step.needs):
            refused.append(step)
            continue
        try:
            lines.append(f"  {step.describe()}")
        except Refusal as refusal:
            refused.append(step)
            lines.append(f"  {step.title}: refused: {refusal}")
    return lines + describe_corrections(context.run)


def describe_corrections(run: Run) -> list[str]:
    """Describe the data that could correct a raw run, in lines; none if it is preprocessed.

    These are its phase encoding, field maps (with the rule that assigns each), phase images and T1w
    image.
    """
    if run.preprocessed:
        return []
    encoding = run.phase_encoding
    readout = ("TotalReadoutTime unknown" if encoding is None or encoding.readout is None
               else f"readout {1000 * encoding.readout:.4g} ms")
    lines = [f"phase encoding {encoding.direction}, {readout}" if encoding
             else "phase encoding unknown", *map(_describe_field_map, run.field_maps)]
    if run.phase:
        lines.append(f"phase {', '.join(name_of(p.image) for p in run.phase)}: complex data")
    if run.t1w:
        session = entities_of(run.t1w.name).get("ses")
        lines.append(f"T1w {name_of(run.t1w)}: of the "
                     f"{'same session' if session == run.session else 'participant'}")
    return ["  for corrections, which no step applies yet:",
            *(f"    {line}" for line in (*lines, *run.notices))]


def _describe_field_map(field_map: FieldMap) -> str:
    names = ", ".join(name_of(image.image) for image in field_map.images)
    magnitudes = ", ".join(name_of(image.image) for image in field_map.magnitudes)
    rule = ("of the same session" if field_map.rule == "session" else f"by {field_map.rule}")
    return (f"field map {names}" + f" with {magnitudes}" * bool(magnitudes)
            + f": {FIELD_MAPS[field_map.kind]}, {rule}")


def methods_text(models: Sequence[harmonize.Model], chosen: Sequence[FromSignal],
                 upsampler: Upsampler | None = None, spaces: Sequence[Space] = ()) -> str:
    """Write the methods text of all steps that a plan may hold, with references."""
    used = [*{m.method.name: m.method for m in models}.values(),
            *([upsampler] if upsampler else []), *chosen]
    return boilerplate.markdown([*PREPARATION, *map(boilerplate.of_method, used),
                                 *map(paragraph, spaces)], used)
