"""The plan of a run: its steps in order. Nothing else in the program knows that order.

`execute.py` does the steps, --dry-run prints their descriptions (`Step.describe`), and the page
holds their paragraphs for a methods section (`Step.paragraphs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bidsapp import methods
from bidsapp.bids import btable
from bidsapp.dwi import peak_memory
from bidsapp.errors import DataError, QSphereError, Refusal, UsageError
from bidsapp.kinds import Denoiser, Estimator, FromSignal, Method, MethodContext, Upsampler
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.preprocess import CORRECTION_COPIES, Preprocess, paragraphs
from bidsapp.recipe.signals import Denoise, Harmonize, Upsample, with_predicted
from bidsapp.recipe.spaces import Register, Resample, paragraph
from bidsapp.recipe.steps import PREPARATION, Estimate, Measure, RunContext, Step, lacks
from bidsapp.report import boilerplate
from bidsapp.spaces import parse

DEFAULT_ESTIMATES = ("dti", "smt", "scnn2")
"""Estimators that run without --estimate, as far as their folders exist."""


@dataclass(frozen=True)
class Chosen:
    """The methods that the options name.

    Parameters
    ----------
    methods : sequence of FromSignal
        Estimators and the synthesizer, in order.
    denoiser : Denoiser, optional
    models : sequence of harmonize.Model
        Models that --harmonize names; the one for the site of a run is applied.
    upsampler : Upsampler, optional
    """

    methods: Sequence[FromSignal] = ()
    denoiser: Denoiser | None = None
    models: Sequence[harmonize.Model] = ()
    upsampler: Upsampler | None = None

    @property
    def all(self) -> list[Method]:
        """Each method once, in the order of a plan."""
        return [*([self.denoiser] if self.denoiser else []),
                *{m.method.name: m.method for m in self.models}.values(),
                *([self.upsampler] if self.upsampler else []), *self.methods]


def choose(options: Options) -> Chosen:
    """Load the methods and models that the options name.

    Raises
    ------
    UsageError
        A method or model does not exist, no method has a hyper-parameter that --set names, or the
        table of --target-bvecs cannot be read.
    """
    if options.target_bvecs:
        try:
            btable.read_target(options.target_bvecs, np.eye(4))
        except DataError as error:
            raise UsageError(f"--target-bvecs: {error}") from error
    available = methods.names("estimate_")
    estimates = options.estimate or [n for n in DEFAULT_ESTIMATES if f"estimate_{n}" in available]
    named = [*(methods.get(name, "estimate") for name in dict.fromkeys(estimates)),
             *([methods.get("synthesize")] if options.synthesize else []),
             *([methods.get(options.denoise, "denoise")] if options.denoise else []),
             *([methods.get(options.upsample, "upsample")] if options.upsample else [])]
    context = MethodContext(
        options.sloppy, options.output_dir / harmonize.MODELS,
        methods.read_settings(options.set, named, training=False, sloppy=options.sloppy),
        allow_extrapolation=options.allow_extrapolation)
    loaded = [methods.get(method.name, context=context) for method in named]
    return Chosen([m for m in loaded if isinstance(m, FromSignal)],
                  next((m for m in loaded if isinstance(m, Denoiser)), None),
                  harmonize.load_models(options),
                  next((m for m in loaded if isinstance(m, Upsampler)), None))


def plan(context: RunContext, chosen: Chosen) -> list[Step]:
    """List the steps of a run.

    Each step that changes the signal takes that of the one before. Estimators are applied to the
    measured signal and to each changed one; the synthesizer is applied to the measured signal only.

    Parameters
    ----------
    context : RunContext
        The run and what its steps share.
    chosen : Chosen
        The methods that the options name.

    Returns
    -------
    list of Step
        In the order of execution: each step comes after the one whose signal it takes.
    """
    preprocess = Preprocess(context) if context.corrections else None
    measured: Step = Measure(context, preprocess)
    signals: list[Step] = [measured]
    changed: list[Step] = []
    if chosen.denoiser:
        changed.append(Denoise(context, measured, chosen.denoiser))
        signals.append(changed[-1])
    if chosen.models:
        harmonized = Harmonize(context, signals[-1], chosen.models)
        signals.append(harmonized)
        changed += [harmonized] if harmonized.changes else []
    if chosen.upsampler:
        changed.append(Upsample(context, changed[-1] if changed else measured, chosen.upsampler))
        signals.append(changed[-1])
    steps, estimates = [*filter(None, [preprocess]), *signals], list[Estimate]()
    for method in chosen.methods:
        of_method = [Estimate(context, measured, method)]
        if isinstance(method, Estimator):
            of_method += [Estimate(context, signal, method) for signal in changed]
            estimates += of_method
        steps += of_method
    for space in parse(context.options.output_spaces):
        registered = Register(context, measured, space)
        steps += [registered, *(Resample(context, registered, estimate) for estimate in estimates)]
    return steps


def describe(context: RunContext, chosen: Chosen) -> list[str]:
    """Describe the steps of a run and its predicted memory, in lines."""
    name = context.run.name
    steps = plan(context, chosen)
    measured = next(step for step in steps if isinstance(step, Measure))
    try:
        size = context.like.shape[0] * context.like.shape[1] * context.like.shape[2]
        copies = CORRECTION_COPIES if context.corrections else 1
        most = peak_memory(size, max(copies * len(context.acquisition), with_predicted(
            context.acquisition, context.options))) / 1e9
        lines = [f"{name}: {measured.describe()}; batch {context.run.batch}; at most "
                 f"{most:.1f} GB"]
    except QSphereError as error:
        return [f"{name}: would fail: {error}"]
    refused: list[Step] = []
    for step in steps:
        if step is measured:
            continue
        if lacking := [other for other in step.needs if other in refused]:
            refused.append(step)
            if step.desc:
                lines.append(f"  {step.title}: {lacks(lacking[0])}")
            continue
        try:
            lines.append(f"  {step.describe()}")
        except Refusal as refusal:
            refused.append(step)
            lines.append(f"  {step.title}: refused: {refusal}")
    return lines


def methods_text(options: Options, chosen: Chosen) -> str:
    """Write the methods text of all steps that a plan may hold, with references."""
    return boilerplate.markdown([
        *paragraphs(options.corrections(preprocessed=False)), *PREPARATION,
        *map(boilerplate.of_method, chosen.all),
        *map(paragraph, parse(options.output_spaces))], chosen.all)
