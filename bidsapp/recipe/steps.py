"""The steps of a run: their dependencies, their work and their descriptions.

A step takes the signal (`Stage`) of another step and writes images; some steps return a signal of
their own. `plan.py` puts them in order. `execute.py` does them and keeps a record (JSON) of each; a
step whose record is complete is not done again.
"""

from __future__ import annotations

import hashlib
import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, partial
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar, NamedTuple

import numpy as np

from bidsapp import __version__
from bidsapp.acquisition import Acquisition
from bidsapp.anatomy import t1w
from bidsapp.anatomy.mask import median_otsu, read_mask
from bidsapp.bids import btable, names, sidecar
from bidsapp.bids.writer import Dataset, Transaction, sha256, to_json
from bidsapp.checkpoint import CARD
from bidsapp.dwi import Dwi, Part, Run, noise_sd, open_image
from bidsapp.errors import DataError
from bidsapp.evaluate import gradients, plausibility, quality
from bidsapp.evaluate.quality import DROPOUT_LOSS, DROPOUT_Z
from bidsapp.kinds import Estimator, FromSignal, Method, Synthesizer
from bidsapp.options import Options
from bidsapp.recipe import harmonize
from bidsapp.recipe.outputs import Outputs
from bidsapp.report import boilerplate, figures
from bidsapp.selection import WEIGHTS
from bidsapp.series import Series
from bidsapp.stage import Stage

log = logging.getLogger("qsphere")

UNCORRECTED = ("The images are raw and were not corrected (--preprocess none). Data with noise, "
               "Gibbs ringing, motion, eddy currents or distortion need it: leave the option out, "
               "or give data that were preprocessed elsewhere (--derivatives).")
"""Notice of a run that was not preprocessed."""

ROUNDING = 1e-3
"""Largest difference of the b-tensors of a gradient table and of its text, relative to the highest
b-value."""

MADE_MASK = "median-Otsu of the mean b0"
"""Source in the sidecar of a brain mask that was computed, since none came with the data."""

PREPARATION = [
    ("Preparation", (
    "Diffusion MRI in BIDS (doi:10.1038/sdata.2016.44) was processed with QSphere "
    f"{__version__}, a BIDS App (doi:10.1371/journal.pcbi.1005209); data were indexed with "
    "PyBIDS (doi:10.21105/joss.01294). b-vectors were turned from image into world axes. "
    "Volumes with b < 50 s/mm² counted as b = 0; the others were grouped in shells by b-value "
    "and b-tensor shape. Everything was computed inside a brain mask: the one that came with the "
    "data; where none did, the brain that was segmented in the T1w image, for runs that were "
    "corrected and have one; otherwise a mask of the mean b = 0 image. The latter is, after a "
    "median filter (radius 4 voxels; scikit-image, doi:10.7717/peerj.453), the largest component "
    "above Otsu's threshold (doi:10.1109/TSMC.1979.4310076), with its holes filled slice by slice; "
    "it equals the median-Otsu mask of DIPY (doi:10.3389/fninf.2014.00008) but for rounding. "
    "Where one acquisition was split in several runs, they were concatenated and scaled to the "
    "mean b = 0 signal of the first. NaN and infinite "
    "values were set to 0 and counted.")),
    ("Quality", (
    "The noise standard deviation is the residual of a spherical harmonics fit "
    "(doi:10.1002/mrm.21277) to each shell, pooled over shells, as the median over voxels; SNR "
    "is signal divided by it. The neighbouring DWI correlation "
    "(doi:10.1016/j.neuroimage.2019.116131) is Pearson's correlation over the mask of each "
    "weighted volume with the one of the nearest b-tensor, averaged. A slice of a volume was "
    f"reported as corrupted where its mean signal lay {DROPOUT_LOSS:.0%} or more, and "
    f"{DROPOUT_Z:g} robust standard deviations or more, below what the other volumes of its "
    "shell predict; this check changes no slice."))]
"""Sections of the methods text that hold for every run."""


@dataclass(frozen=True)
class RunContext:
    """The run and what all its steps share.

    Parameters
    ----------
    options : Options
    dataset : Dataset
        OUTPUT_DIR.
    run : Run
    device : str
        cpu, cuda or cuda:N.
    memory : float
        Bytes that the process may use.
    """

    options: Options
    dataset: Dataset
    run: Run
    device: str
    memory: float

    @cached_property
    def acquisition(self) -> Acquisition:
        """Gradient table of the run, read from its files."""
        return btable.load_acquisition(self.run)

    @cached_property
    def like(self) -> Any:
        """First image of the run, on whose grid all images are written."""
        return open_image(self.run.parts[0].image)

    def path(self, suffix: str, extension: str = ".nii.gz", folder: str = "dwi",
             **entities: str) -> PurePosixPath:
        """Name an output of the run, below OUTPUT_DIR."""
        return names.output_path(self.run.entities, suffix, extension, folder, **entities)

    @property
    def mask(self) -> PurePosixPath:
        """Path of the brain mask below OUTPUT_DIR."""
        return self.path("mask", desc="brain")

    @property
    def corrections(self) -> tuple[str, ...]:
        """Corrections that the options ask for on this run."""
        return self.options.corrections(self.run.preprocessed)

    @property
    def signal(self) -> Run:
        """The run whose images are masked and measured: the corrected one, if it is corrected."""
        return corrected_run(self.dataset, self.run) if self.corrections else self.run


@dataclass
class StepReport:
    """Results of a step beside its images; its record keeps them for the page and the tables.

    Parameters
    ----------
    qc : dict
        Columns of the quality table.
    figures : list of Figure
    warnings : list of str
        Sentences on what is probably wrong, which the page shows as such.
    notices : list of str
        Other sentences for the page.
    facts : dict
        Further entries of the record. `Step.reload` needs some of them to read the signal back.
    """

    qc: dict[str, Any] = field(default_factory=dict)
    figures: list[figures.Figure] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Step(ABC):
    """One step of a run.

    Parameters
    ----------
    context : RunContext
        The run and what its steps share.
    takes : Step, optional
        The step whose signal it takes; None for the files of the run.
    """

    name: str
    desc: ClassVar[str] = ""
    """Entity of the images of the signal that the step makes, and of the maps of that signal."""

    def __init__(self, context: RunContext, takes: Step | None = None) -> None:
        self.context, self.takes = context, takes

    @property
    def needs(self) -> list[Step]:
        """The steps without whose results it cannot be done."""
        return [self.takes] if self.takes else []

    @property
    @abstractmethod
    def parameters(self) -> Mapping[str, Any]:
        """All that the result depends on, apart from the signal that the step takes; hashed."""

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over version, name, parameters and the fingerprint of the step it takes."""
        content = {"version": __version__, "name": self.name, "parameters": self.parameters,
                   "takes": self.takes.fingerprint if self.takes else None}
        return hashlib.sha256(to_json(content).encode()).hexdigest()

    @property
    def record(self) -> PurePosixPath:
        """Path of the record below OUTPUT_DIR."""
        return self.context.path("step", ".json", "log", desc=self.name.replace("_", ""))

    @property
    def title(self) -> str:
        """Name of the step in messages."""
        return self.name

    @property
    def required(self) -> bool:
        """Whether the user asked for the step by name, so that a refusal is a failure."""
        return True

    @abstractmethod
    def describe(self) -> str:
        """Describe the step in a line.

        Raises
        ------
        Refusal
            The run does not allow the step.
        """

    @property
    @abstractmethod
    def paragraphs(self) -> list[tuple[str, str]]:
        """Sections of the methods text: (heading, text)."""

    @abstractmethod
    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport
              ) -> Stage | None:
        """Do the step.

        Parameters
        ----------
        stage : Stage or None
            The signal that it takes.
        transaction : Transaction
            Receives the images and their sidecars.
        report : StepReport
            Receives quality measures, figures, sentences and further entries of the record.

        Returns
        -------
        Stage or None
            The signal that the step makes, if it makes one.

        Raises
        ------
        Refusal
            The run does not allow the step; nothing was written.
        DataError
            The data cannot be used.
        """

    def reload(self, stage: Stage | None, facts: Mapping[str, Any]) -> Stage:
        """Read back the signal that this step wrote before.

        Parameters
        ----------
        stage : Stage or None
            The signal that the step took.
        facts : mapping
            Record of the step, which includes `StepReport.facts`.
        """
        raise NotImplementedError(f"{self.name} makes no signal")


class Measure(Step):
    """Mask the brain, load the signal inside, estimate its noise and check its quality.

    Parameters
    ----------
    context : RunContext
        The run and what its steps share.
    preprocess : Step, optional
        The step that corrects the images; None if they are measured as they are.
    """

    name = "measured"

    def __init__(self, context: RunContext, preprocess: Step | None = None) -> None:
        super().__init__(context)
        self.preprocess = preprocess

    @property
    def needs(self) -> list[Step]:
        return [self.preprocess] if self.preprocess else []

    @property
    def parameters(self) -> Mapping[str, Any]:
        if self.preprocess:
            return {"preprocessed": self.preprocess.fingerprint}
        run = self.context.run
        return {"entities": run.entities, "inputs": [sha256(f) for f in run.files],
                "metadata": [part.metadata for part in run.parts],
                "gradient_check": self.context.options.gradient_check}

    def describe(self) -> str:
        image, acquisition = self.context.like, self.context.acquisition
        table = ", ".join(f"{len(s)} × {quality.shell_name(s)}" for s in acquisition.shells)
        return f"{'x'.join(map(str, image.shape[:3]))} voxels, {acquisition.b0.sum()} × b0, {table}"

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return PREPARATION

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> Stage:
        context, run = self.context, self.context.signal
        dwi, mean_b0 = load_run(run, memory=context.memory, work_dir=context.options.work_dir)
        report.warnings = check_plausibility(run, dwi, mean_b0)
        about: dict[str, Any] = {}
        if self.preprocess:
            corrected = context.dataset.record(self.preprocess.record)
            source, about = corrected["mask_source"], corrected["about"]
            dwi = replace(dwi, magnitude=corrected["magnitude"])
        else:
            source = context.dataset.uri(run.mask) if run.mask else MADE_MASK
            transaction.image(context.mask, dwi.mask.astype("uint8"), context.like,
                              sidecar.mask(run, context.dataset, source))
            checked = check_gradients(run, dwi, context.options.gradient_check,
                                      corrected=run.preprocessed)
            dwi, about = replace(dwi, acquisition=checked.acquisition), checked.about
            report.warnings += checked.warnings
            report.notices += checked.notices
            report.qc |= checked.qc
        report.qc |= quality.measure_quality(dwi)
        if not run.preprocessed:
            report.notices.append(UNCORRECTED)
        report.figures += figures.of_signal(dwi, mean_b0)
        acquisition = dwi.acquisition
        report.facts = {
            "noise_sd": dwi.noise_sd, "invalid": dwi.invalid, "mask_source": source,
            "about": about, "magnitude": dwi.magnitude, "corrected": bool(self.preprocess),
            "bvecs": dwi.acquisition.bvecs.tolist(),
            "n_voxels": len(dwi.signal), "n_volumes": len(acquisition),
            "n_b0": int(acquisition.b0.sum()),
            "voxel_size": [float(z) for z in context.like.header.get_zooms()[:3]],
            "shells": [{"b": s.b, "b_delta": s.b_delta, "n_directions": len(s)}
                       for s in acquisition.shells]}
        return self._stage(dwi, about)

    def reload(self, stage: Stage | None, facts: Mapping[str, Any]) -> Stage:
        context = self.context
        return self._stage(load_measured(context.dataset, context.run, memory=context.memory,
                                         work_dir=context.options.work_dir), facts["about"])

    def _stage(self, dwi: Dwi, about: Mapping[str, Any]) -> Stage:
        # cached: several methods and spaces may use them
        record = self.context.dataset.record(self.preprocess.record) if self.preprocess else {}
        anatomy = cache(partial(register_t1w, self.context.run, dwi, self.context.device,
                                *_earlier_registration(record)))
        tissue = cache(partial(find_tissue, self.context.run, dwi, self.context.options.work_dir,
                               anatomy))
        return Stage(dwi, about=about, tissue=tissue, anatomy=anatomy)


class Estimate(Step):
    """Estimate maps from a signal, or synthesize signals that are modelled on it."""

    def __init__(self, context: RunContext, takes: Step, method: FromSignal) -> None:
        super().__init__(context, takes)
        self.method = method
        self.signal = takes.desc
        self.name = "_".join(filter(None, (self.signal, method.name)))

    @property
    def required(self) -> bool:
        return bool(self.context.options.estimate) or isinstance(self.method, Synthesizer)

    @property
    def parameters(self) -> Mapping[str, Any]:
        options = self.context.options
        anatomy = self.context.run.anatomy if self.method.wants_tissue else ()
        synthesis = [options.synthesize, options.synthesize_voxels, options.synthesize_image]
        return {"method": self.method.name, **depends_on_weights(options, self.method),
                "anatomy": [sha256(f) if f.is_file() else str(f) for f in anatomy],
                "synthesis": synthesis if isinstance(self.method, Synthesizer) else None,
                "sloppy": options.sloppy, "seed": options.random_seed}

    def describe(self) -> str:
        self.method.check(self.context.acquisition)
        violations = (self.method.violations(self.context.acquisition)
                      if isinstance(self.method, Estimator) else [])
        image = self.context.run.t1w
        source = image.name if image else "the DWI alone, no T1w"
        return (self.method.name + f" of the {self.signal} signal" * bool(self.signal)
                + f": tissue from {source}" * self.method.wants_tissue
                + "".join(f"; {k} = {v}" for k, v in self.method.changed_settings.items())
                + f", outside of its training: {'; '.join(violations)}" * bool(violations))

    @property
    def paragraphs(self) -> list[tuple[str, str]]:
        return [boilerplate.of_method(self.method)]

    def apply(self, stage: Stage | None, transaction: Transaction, report: StepReport) -> None:
        assert stage
        context, method = self.context, self.method
        method.check(stage.dwi.acquisition)
        if method.wants_tissue:
            tissue, sentence = stage.tissue()
            log.info("%s: %s", context.run.name, sentence)
            report.notices.append(sentence)
            stage = replace(stage, dwi=replace(stage.dwi, tissue=tissue))
        log.info("%s: %s on %d voxels", context.run.name, self.name, len(stage.dwi.signal))
        derived = method.run(stage.dwi, context.options, context.device)
        if settings := method.changed_settings:
            derived = replace(derived, parameters={**derived.parameters, "Settings": settings})
        if stage.no_intervals:
            derived = derived.without_intervals(stage.no_intervals)
        elif stage.widening > 1:
            derived = derived.widen_intervals(stage.widening, method.ranges)
        outputs(context, transaction, stage).write(method, derived)
        prefix = f"{self.signal}_" if self.signal else ""
        report.qc |= {f"{prefix}{key}": value for key, value in
                      {**derived.counts, **quality.summarize_maps(method, derived)}.items()}
        for notice in derived.notices:
            log.info("%s: %s", context.run.name, notice)
        report.notices += derived.notices
        if not self.signal:
            report.facts = {"method": method.name, "estimates": isinstance(method, Estimator)}
            report.figures += figures.of_maps(method, derived, stage.dwi)
        if derived.synthetic:
            report.facts["scores"] = {"columns": method.outputs["scores"],
                                      "rows": derived.synthetic.scores}


def lacks(needed: Step) -> str:
    """Say that a step is left out because one that it needs was."""
    return (f"left out, since {needed.title} was, whose signal it takes. Correct that, or leave "
            f"{needed.title} out.")


def depends_on_weights(options: Options, method: Method) -> dict[str, Any]:
    """List what the result of a method with weights depends on.

    These are the cards of all its weights, since the method selects among them (a card holds a hash
    of its weights), its hyper-parameters, and whether weights may be used outside of their domain.
    """
    cards = [WEIGHTS / method.name / CARD,
             *sorted((options.output_dir / harmonize.MODELS).glob(f"{method.name}_*/{CARD}"))]
    hashes = [sha256(f) for f in cards if f.is_file()]
    return {"weights": hashes, "settings": method.changed_settings,
            "allow_extrapolation": bool(hashes) and options.allow_extrapolation}


def reload_signal(context: RunContext, stage: Stage, desc: str, facts: Mapping[str, Any]) -> Stage:
    """Read back a signal that a step wrote before.

    stage: the signal that the step took. facts: the record of the step.
    """
    image, bval, bvec, btens = (context.dataset.root / context.path("dwi", extension, desc=desc)
                                for extension in (".nii.gz", ".bval", ".bvec", ".btens"))
    part = Part(image, bval, bvec, btens if btens.exists() else None)
    written = replace(context.run, parts=(part,))
    acquisition = btable.load_acquisition(written)
    taken = stage.dwi.acquisition
    if len(acquisition) == len(taken) and np.allclose(
            acquisition.btensors, taken.btensors, rtol=0, atol=ROUNDING * taken.bvals.max()):
        acquisition = taken  # the table that was written is this one, rounded
    dwi = Series.from_run(written, acquisition).within(
        stage.dwi.mask, memory=context.memory, work_dir=context.options.work_dir)
    gain = facts["noise_gain"]
    dwi = replace(dwi, affine=stage.dwi.affine, invalid=stage.dwi.invalid,
                  noise_sd=facts.get("noise_sd", stage.dwi.noise_sd),
                  magnitude=facts.get("magnitude", stage.dwi.magnitude),
                  noise_gain=None if gain is None else np.array(gain))
    return replace(stage, dwi=dwi, desc=desc, sources=(context.dataset.uri(image),),
                   about=facts["about"], no_intervals=facts["no_intervals"],
                   widening=facts["widening"])


def outputs(context: RunContext, transaction: Transaction, stage: Stage) -> Outputs:
    """Make the writer of all images that are computed from a signal."""
    return Outputs(transaction, context.signal, stage, context.like, context.mask,
                   context.options.random_seed, context.device)


def load_run(run: Run, *, memory: float = math.inf, work_dir: Path | None = None
             ) -> tuple[Dwi, np.ndarray]:
    """Load the signal of a run inside its brain mask, and estimate its noise.

    The mask is the one that came with the data, else one is made from the mean b0.

    Parameters
    ----------
    run : Run
        Paths of the images and tables.
    memory : float
        Bytes that may be used; a signal that needs more goes to a file in `work_dir`.
    work_dir : Path, optional
        Default: the temporary folder of the system.

    Returns
    -------
    dwi : Dwi
        The signal, with noise_sd.
    mean_b0 : (x, y, z) float32
        Mean over the b0 volumes.

    Raises
    ------
    DataError
        A file is missing or damaged, files contradict each other, or no mask can be made.
    """
    if is_real(run) and not run.preprocessed:
        raise DataError(f"{run.parts[0].image}: is the real part of complex images, of which the "
                        "magnitude or a corrected signal is needed. Leave out --preprocess none.")
    series = Series.from_run(run, btable.load_acquisition(run))
    mean_b0 = series.mean(series.acquisition.b0)
    try:
        mask = (read_mask(run.mask, series.shape, series.affine) if run.mask
                else median_otsu(mean_b0))
    except DataError as error:
        raise DataError(f"{run.mask or run.parts[0].image}: {error}") from error
    dwi = series.within(mask, memory=memory, work_dir=work_dir)
    return replace(dwi, noise_sd=noise_sd(dwi)), mean_b0


def is_real(run: Run) -> bool:
    """Tell whether the images of a run are the real parts of complex ones."""
    return run.entities.get("part") == "real"


def load_measured(dataset: Dataset, run: Run, *, memory: float = math.inf,
                  work_dir: Path | None = None) -> Dwi:
    """Load the signal that the step `measured` of an earlier invocation measured.

    Parameters
    ----------
    dataset : Dataset
        OUTPUT_DIR, with the record of that step.
    run : Run
        The run as it was found.
    memory, work_dir
        Those of `load_run`.

    Raises
    ------
    DataError
        A file is missing or damaged.
    """
    images, acquisition, facts = read_measured(dataset, run)
    series = Series.from_run(images, acquisition)
    mask = read_mask(dataset.root / names.output_path(run.entities, "mask", ".nii.gz",
                                                      desc="brain"), series.shape, series.affine)
    return replace(series.within(mask, memory=memory, work_dir=work_dir),
                   noise_sd=facts["noise_sd"], magnitude=facts["magnitude"])


def load_tissue(dataset: Dataset, run: Run, device: str, *, memory: float = math.inf,
                work_dir: Path | None = None) -> np.ndarray | None:
    """Compute the tissue probabilities of a run that an earlier invocation measured.

    The run is registered to its T1w image, unless the correction of its images did so before. A
    T1w image that cannot be used is reported in the log.

    Parameters
    ----------
    dataset : Dataset
        OUTPUT_DIR, with the records of the run.
    run : Run
        The run as it was found.
    device : str
        Device of torch, for the brain extraction.
    memory, work_dir
        Those of `load_run`.

    Returns
    -------
    (voxel, 3) float32 or None
        Probabilities of grey matter, white matter and CSF, Σ ≤ 1, of the voxels of
        `load_measured`; None if the run has no T1w image that can be used.

    Raises
    ------
    DataError
        A file of the run is missing or damaged.
    """
    if run.t1w is None:
        return None
    dwi = load_measured(dataset, run, memory=memory, work_dir=work_dir)
    *_, facts = read_measured(dataset, run)
    records = [dataset.record(names.output_path(run.entities, "step", ".json", "log", desc=name))
               for name in facts["takes"]]  # the step that corrected the images, if one did
    earlier = _earlier_registration(records[0] if records else {})
    tissue, sentence = find_tissue(run, dwi, work_dir,
                                   partial(register_t1w, run, dwi, device, *earlier))
    log.info("%s: %s", run.name, sentence)
    return tissue


def _earlier_registration(record: Mapping[str, Any]) -> tuple[np.ndarray | None, str | None]:
    """Transform to the T1w image and problem with it in the record of the correction of images."""
    transform = record.get("t1w_transform")
    return None if transform is None else np.array(transform), record.get("t1w_problem")


def read_measured(dataset: Dataset, run: Run) -> tuple[Run, Acquisition, dict[str, Any]]:
    """Read from which images an earlier invocation measured a run, and with which gradient table.

    Returns
    -------
    images : Run
        The run, or that of its corrected images.
    acquisition : Acquisition
        After corrections of the b-vectors.
    facts : dict
        Record of the step `measured`.
    """
    facts = dataset.record(names.output_path(run.entities, "step", ".json", "log",
                                             desc=Measure.name))
    if "bvecs" not in facts:
        raise DataError(f"{run.name}: its record is missing or of an earlier version. Run the "
                        "participant level again.")
    images = corrected_run(dataset, run) if facts["corrected"] else run
    return (images, replace(btable.load_acquisition(images), bvecs=np.array(facts["bvecs"])),
            facts)


def check_plausibility(run: Run, dwi: Dwi, mean_b0: np.ndarray) -> list[str]:
    """Check the signal for errors; return sentences on probable ones, which are logged.

    Raises
    ------
    DataError
        The signal cannot be a diffusion signal (`plausibility.check`).
    """
    try:
        warnings = plausibility.check(dwi, mean_b0)
    except DataError as error:
        raise DataError(f"{', '.join(str(p.image) for p in run.parts)}: {error}") from error
    for sentence in warnings:
        log.warning("%s: %s", run.name, sentence)
    return warnings


class GradientCheck(NamedTuple):
    """Result of `check_gradients`.

    Attributes
    ----------
    acquisition : Acquisition
        The acquisition of the signal, with another table of b-vectors if they were fixed.
    table : (3, 3)
        The flip or swap of the rows of the .bvec that was applied; the identity if none was.
    about : dict
        Sidecar keys: GradientTableCorrection, if the table was fixed.
    warnings : list of str
    notices : list of str
        That the check cannot tell.
    qc : dict
        Fibre coherence of the table as given, and the highest of all flips and swaps; None if it
        cannot be computed.
    """

    acquisition: Acquisition
    table: np.ndarray
    about: dict[str, Any]
    warnings: list[str]
    notices: list[str]
    qc: dict[str, float | None]


def check_gradients(run: Run, dwi: Dwi, mode: str, *, corrected: bool) -> GradientCheck:
    """Check whether the b-vectors are flipped or permuted, and do what --gradient-check says.

    Parameters
    ----------
    run : Run
    dwi : Dwi
        Its signal.
    mode : str
        One of `options.GRADIENT_CHECKS`.
    corrected : bool
        Whether motion is corrected. Where it is not, it can mislead the check, and `stop` only
        warns.

    Raises
    ------
    DataError
        The b-vectors are probably wrong, and the mode is `stop`.
    """
    axes = btable.fsl_axes(dwi.affine)
    coherence = gradients.measure_coherence(dwi, axes) if mode != "off" else None
    qc = {"fibre_coherence": coherence.given if coherence else None,
          "fibre_coherence_best": coherence.best if coherence else None}
    acquisition, table = dwi.acquisition, np.eye(3)
    if coherence is None or not coherence.better:
        notices = [gradients.describe_unclear(coherence)] if coherence and coherence.unclear else []
        for notice in notices:
            log.info("%s: %s", run.name, notice)
        return GradientCheck(acquisition, table, {}, [], notices, qc)
    sentence = gradients.describe_mismatch(coherence)
    if corrected and (mode == "stop" or (mode == "fix" and coherence.rival)):
        remedy = ("Or give --gradient-check warn." if coherence.rival else
                  "Or give --gradient-check fix, which applies and records this correction, or "
                  "--gradient-check warn.")
        raise DataError(f"{', '.join(str(p.bvec) for p in run.parts)}: {sentence} {remedy}")
    log.warning("%s: %s", run.name, sentence)
    about = {}
    if mode == "fix" and not coherence.rival:
        table = coherence.table
        acquisition = replace(acquisition, bvecs=acquisition.bvecs @ (axes @ table @ axes.T).T)
        about = {"GradientTableCorrection": coherence.better}
        sentence = (f"The b-vectors were corrected: {coherence.better} in the .bvec. Fibre "
                    f"coherence rose from {coherence.given:.3f} to {coherence.best:.3f}. Every "
                    "sidecar says so (GradientTableCorrection).")
    return GradientCheck(acquisition, table, about, [sentence], [], qc)


def corrected_run(dataset: Dataset, run: Run) -> Run:
    """Describe the corrected images of a run in OUTPUT_DIR, which may not exist yet, as a run."""
    image, bval, bvec, btens = (
        dataset.root / names.output_path(run.entities, "dwi", extension, desc="preproc")
        for extension in (".nii.gz", ".bval", ".bvec", ".btens"))
    part = Part(image, bval, bvec, btens if btens.exists() else None, run.metadata)
    mask = dataset.root / names.output_path(run.entities, "mask", ".nii.gz", desc="brain")
    return replace(run, parts=(part,), mask=mask, dataset=("", dataset.root), preprocessed=True,
                   phase_encoding=None, field_maps=(), phase=(), notices=())


def register_t1w(run: Run, dwi: Dwi, device: str, transform: np.ndarray | None = None,
                 problem: str | None = None) -> t1w.Anatomy:
    """Read the T1w image of a run and register the run to it, unless an earlier step did so.

    transform: that of the earlier step (`t1w.Anatomy`). problem: why that step failed.

    Raises
    ------
    DataError
        There is no T1w image, or it cannot be used.
    """
    if run.t1w is None:
        raise DataError("no T1w image was found for this run.")
    if problem is not None:
        raise DataError(problem)
    return t1w.register(dwi, run.t1w, device, transform)


def find_tissue(run: Run, dwi: Dwi, work_dir: Path | None, anatomy: Callable[[], t1w.Anatomy]
                ) -> tuple[np.ndarray | None, str]:
    """Compute tissue probabilities from the T1w image of a run, and say where they come from.

    Returns
    -------
    tissue : (voxel, 3) float32 or None
        Grey matter, white matter and CSF; None if no T1w image can be used.
    sentence : str
        For the log and the page.
    """
    if run.t1w is None:
        return None, "No T1w image was found: tissue comes from the DWI alone."
    try:
        tissue = t1w.posteriors(dwi, run.t1w, run.probsegs, work_dir, anatomy())
    except DataError as error:
        return None, f"The T1w image is not used, tissue comes from the DWI alone: {error}"
    return tissue, f"Tissue was segmented in {run.t1w.name}."


def voxel_size(run: Run) -> tuple[float, ...]:
    """Read the voxel size in mm from the header of the image."""
    return tuple(float(z) for z in open_image(run.parts[0].image).header.get_zooms()[:3])
