"""The plan of a run: its steps in order. Nothing else in the program knows that order.

`execute.py` does the steps, --dry-run prints their descriptions (`Step.describe`), and the page
holds their paragraphs for a methods section (`Step.paragraphs`).
"""

from __future__ import annotations

from collections.abc import Sequence

from bidsapp import methods
from bidsapp.dwi import peak_memory
from bidsapp.errors import QSphereError, Refusal
from bidsapp.kinds import Estimator, FromSignal, Method, MethodContext, Upsampler
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.preprocess import CORRECTION_COPIES, Preprocess, paragraphs
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
from bidsapp.spaces import parse

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
    preprocess = Preprocess(context) if context.corrections else None
    measured: Step = Measure(context, preprocess)
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
    steps, estimates = [*filter(None, [preprocess]), *signals], list[Estimate]()
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
    measured = next(step for step in steps if isinstance(step, Measure))
    try:
        size = context.like.shape[0] * context.like.shape[1] * context.like.shape[2]
        copies = CORRECTION_COPIES if context.corrections else 1
        most = peak_memory(size, copies * len(context.acquisition)) / 1e9
        lines = [f"{name}: {measured.describe()}; batch {context.run.batch}; at most "
                 f"{most:.1f} GB"]
    except QSphereError as error:
        return [f"{name}: would fail: {error}"]
    refused: list[Step] = []
    for step in steps:
        if step is measured:
            continue
        if any(other in refused for other in step.needs):
            refused.append(step)
            continue
        try:
            lines.append(f"  {step.describe()}")
        except Refusal as refusal:
            refused.append(step)
            lines.append(f"  {step.title}: refused: {refusal}")
    return lines


def methods_text(options: Options, models: Sequence[harmonize.Model],
                 chosen: Sequence[FromSignal], upsampler: Upsampler | None = None) -> str:
    """Write the methods text of all steps that a plan may hold, with references."""
    used = [*{m.method.name: m.method for m in models}.values(),
            *([upsampler] if upsampler else []), *chosen]
    return boilerplate.markdown([
        *paragraphs(options.corrections(preprocessed=False)), *PREPARATION,
        *map(boilerplate.of_method, used), *map(paragraph, parse(options.output_spaces))], used)
