"""The options of both programs: frozen dataclasses that check their values when they are made."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bidsapp import spaces
from bidsapp.errors import UsageError

MODES = ("syn", "sample-mean", "sample", "random-wm")
"""Modes of --synthesize."""

CORRECTIONS = ("denoise", "gibbs", "motion", "distortion", "bias")
"""Corrections of raw images, in the order in which --preprocess lists them."""

DENOISERS = ("denoise", "mppca", "patch2self")
"""Denoising methods of --preprocess: QSphere's own, and those of DIPY by name."""

GRADIENT_CHECKS = ("stop", "fix", "warn", "off")
"""Values of --gradient-check."""

MAX_DIRECTIONS = 1000
"""Largest value of --target-directions."""

LEVELS = ("participant", "group")


def option(default: Any, text: str, **more: Any) -> Any:
    """Declare an option as a field of a dataclass.

    Parameters
    ----------
    default : Any
        Value where the option is not given.
    text : str
        Help text; the default is appended unless the text mentions it.
    **more
        `group`: title of the group of options that begins here. `level`: the only analysis level
        at which the option is valid. `aliases`: other names, with their dashes. `metavar`,
        `choices`, `action`: those of argparse. `read`: function that converts the text of a value,
        where the field's type does not.
    """
    return field(default=default, metadata={"help": text, **more})


def positional(text: str, **more: Any) -> Any:
    """Declare a positional argument; the parameters are those of `option`."""
    return field(metadata={"help": text, **more})


def participant_label(text: str) -> str:
    """Remove `sub-` from a label, if it is there."""
    return text.removeprefix("sub-")


def session_label(text: str) -> str:
    """Remove `ses-` from a label, if it is there."""
    return text.removeprefix("ses-")


def named_path(text: str) -> tuple[str, Path]:
    """Split NAME=PATH; without NAME, the name of the folder is used."""
    if named := re.fullmatch(r"([A-Za-z0-9_-]+)=(.+)", text):
        return named[1], Path(named[2])
    return Path(text).resolve().name, Path(text)


def megabytes(text: str) -> int:
    """Read a number of MB. 8GB and 8G are 8000 MB, as in fMRIPrep."""
    number = text.upper().removesuffix("B")
    return int(float(number[:-1]) * 1000) if number.endswith("G") else int(number.rstrip("M"))


def flag(name: str) -> str:
    """Translate the name of a field to its option: `mem_mb` to --mem-mb."""
    return f"--{name.replace('_', '-')}"


def invalid_options(level: str) -> list[str]:
    """List the fields of options that are invalid at an analysis level."""
    return [f.name for f in fields(Options) if f.metadata.get("level", level) != level]


@dataclass(frozen=True)
class Options:
    """Options of one invocation of `qsphere`, passed explicitly to whatever needs them.

    The command line and the Boutiques descriptors are generated from these fields, in this order;
    the keys of --config-file are their names.

    Raises
    ------
    UsageError
        A value is out of range, belongs to the other analysis level or contradicts another one.
    """

    bids_dir: Path = positional("root folder of a BIDS dataset", metavar="BIDS_DIR")
    output_dir: Path = positional("where the derivatives dataset is written", metavar="OUTPUT_DIR")
    analysis_level: str = positional(
        "participant: process each participant; group: compare and train across sites",
        choices=LEVELS)

    participant_label: tuple[str, ...] = option(
        (), "participants, with or without sub-; default: all", group="input data",
        aliases=("--participant_label",), metavar="LABEL", read=participant_label)
    session_label: tuple[str, ...] = option(
        (), "sessions, with or without ses-; default: all",
        aliases=("--session_label", "--session-id"), metavar="LABEL", read=session_label)
    bids_filter_file: Path | None = option(
        None, 'pybids filters, e.g. {"dwi": {"acquisition": "x"}}', metavar="JSON")
    bids_database_dir: Path | None = option(
        None, "folder in which the pybids index is kept for later runs", metavar="DIR")
    skip_bids_validation: bool = option(
        False, "also index files whose names are not valid BIDS",
        aliases=("--skip_bids_validation",))
    derivatives: tuple[tuple[str, Path], ...] = option(
        (), "preprocessed input: derivatives with desc-preproc_dwi such as QSIPrep's, HCP-YA or UK "
        "Biobank folders, or brain masks", aliases=("-d",), metavar="NAME=PATH", read=named_path)
    batch_file: Path | None = option(
        None, "table with participant_id, optionally session_id, and the site", metavar="TSV")
    batch_column: str | None = option(
        None, "column of --batch-file or participants.tsv that names the site", metavar="NAME")

    preprocess: tuple[str, ...] = option(
        ("auto",), "corrections of the images. auto (default): all that raw images allow, none for "
        f"preprocessed ones; none; or some of {' '.join(CORRECTIONS)}, where mppca or patch2self "
        "may replace denoise", level="participant", group="participant level", metavar="STEP",
        choices=("auto", "none", *CORRECTIONS, *DENOISERS[1:]))
    fallback_total_readout_time: float | None = option(
        None, "TotalReadoutTime of raw images whose sidecar has none", level="participant",
        metavar="SECONDS")
    merge_distortion_groups: bool = option(
        False, "join runs that differ in the direction of phase encoding, once corrected, to one",
        level="participant")
    gradient_check: str = option(
        "stop", "what to do with b-vectors that are probably flipped or permuted: stop (default) "
        "fails the run, unless its motion was not corrected; fix corrects and records them; warn; "
        "off", level="participant",
        choices=GRADIENT_CHECKS)
    estimate: tuple[str, ...] = option(
        (), "microstructure methods; default: dti smt scnn2, where the acquisition allows",
        level="participant", metavar="NAME")
    denoise: str | None = option(
        None, "trained denoiser of the signal, e.g. spherical; --preprocess denoise is another "
        "one, of raw images", level="participant", metavar="METHOD")
    harmonize: str | None = option(
        None, "a trained harmonizer: its folder, its name under OUTPUT_DIR/group/models, or a "
        "method name: uses its model for the run's site", level="participant", metavar="MODEL")
    upsample: str | None = option(
        None, "method that predicts the signal along more gradient directions: scnn, gp, sh, or "
        "unet once it was trained", level="participant", metavar="MODEL")
    target_directions: int | None = option(
        None, "directions of each shell after --upsample, measured ones included; default: 90",
        level="participant", metavar="N")
    target_bvecs: Path | None = option(
        None, "directions that --upsample adds: a .bvec, of the image beside it or else of the "
        "run, for each shell or for the b-values of the .bval beside it; or a .b, as MRtrix "
        "writes it", level="participant", metavar="FILE")
    synthesize: tuple[str, ...] = option(
        (), f"synthetic signals with known ground truth: {' '.join(MODES)}", level="participant",
        metavar="MODE", choices=MODES)
    synthesize_voxels: int = option(
        10_000, "number of synthetic signals of each mode", level="participant")
    synthesize_image: bool = option(
        False, "also synthesize a whole image of each mode, in the participant's anatomy",
        level="participant")
    output_spaces: tuple[str, ...] = option(
        (), "spaces in which maps are written too: T1w, acpc, or TemplateFlow names with :res-N "
        "where wanted; default: dwi", level="participant", aliases=("--output_spaces",),
        metavar="SPACE")
    output_resolution: float | None = option(
        None, "voxel size in the output spaces that name no res-N; default: the smallest edge of "
        "the run's voxels", level="participant", metavar="MM")
    allow_extrapolation: bool = option(
        False, "apply models outside of their training domain; noted in every sidecar",
        level="participant")

    train: tuple[str, ...] = option(
        (), "methods to train, e.g. harmonize_shresnet or shresnet", group="group level",
        level="group", metavar="METHOD")
    reference_batch: str | None = option(
        None, "the site to which the others are harmonized", level="group", metavar="NAME")
    folds: int | None = option(
        None, "K-fold cross-validation over participants scanned at both sites; default: none",
        level="group", metavar="K")
    epochs: int | None = option(
        None, "epochs of each training stage, as --set METHOD.stages.epochs=N; default: that of "
        "the method",
        level="group")
    blocks: int | None = option(
        None, "residual blocks of harmonize_shresnet; default: 2; replaced by --set "
        "harmonize_shresnet.network.blocks=N", level="group")
    max_steps: int | None = option(
        None, "maximum of optimiser steps of each training stage; an interrupted training goes on "
        "from its last step", level="group")
    init: Path | None = option(
        None, "folder of weights from which to start; default: bundled weights, if compatible",
        level="group", metavar="CHECKPOINT")
    paired_by: str | None = option(
        None, "scans that harmonizers pair: all of a participant at two sites (default), or only "
        "those of the same session", level="group", choices=("participant", "session"))

    device: str = option("auto", "auto (default), cpu, cuda or cuda:N", group="resources",
                         metavar="NAME")
    nprocs: int = option(1, "number of CPUs to use; default: all",
                         aliases=("--nthreads", "--n-cpus"))
    omp_nthreads: int | None = option(
        None, "CPUs per participant; nprocs / omp-nthreads participants are processed at a time; "
        "default: as many participants at a time as CPUs and memory allow")
    mem_mb: int | None = option(
        None, "memory limit in MB; signals that exceed it go through a file in the work folder; "
        "default: all available memory", aliases=("--mem",), metavar="MB", read=megabytes)
    work_dir: Path | None = option(
        None, "folder for temporary files; default: a temporary folder",
        aliases=("-w",), metavar="DIR")
    random_seed: int = option(0, "seed of the random numbers")

    set: tuple[str, ...] = option(
        (), "hyper-parameters that replace those of a method's training.toml, e.g. "
        "harmonize_shresnet.network.blocks=4; may be repeated", group="other",
        metavar="METHOD.KEY=VALUE", action="extend")
    dry_run: bool = option(
        False, "print the steps of every run and the predicted memory; write nothing")
    reports_only: bool = option(
        False, "regenerate the reports from existing outputs", level="participant")
    boilerplate_only: bool = option(
        False, "write the methods text with its references, and nothing else", level="participant",
        aliases=("--boilerplate_only",))
    stop_on_first_crash: bool = option(
        False, "stop after the first participant that fails")
    sloppy: bool = option(False, "train briefly, for tests")
    config_file: Path | None = option(
        None, "file of options by their long names; the command line takes precedence",
        metavar="TOML")
    verbose: int = option(0, "print more messages; -vv: also tracebacks",
                          aliases=("-v",), action="count")
    notrack: bool = option(False, "accepted for compatibility; QSphere never tracks usage")

    def __post_init__(self) -> None:
        bids, out = self.bids_dir.resolve(), self.output_dir.resolve()
        if out == bids:
            raise UsageError(f"OUTPUT_DIR is BIDS_DIR ({out}); results would mix with the data. "
                             f"Give a separate folder, e.g. {bids / 'derivatives' / 'qsphere'}.")
        if out.is_relative_to(bids) and out.relative_to(bids).parts[0] != "derivatives":
            raise UsageError(f"OUTPUT_DIR {out} lies inside BIDS_DIR. Inside it only derivatives/ "
                             f"may hold results, e.g. {bids / 'derivatives' / 'qsphere'}.")
        if bids.is_relative_to(out):
            raise UsageError(f"BIDS_DIR {bids} lies inside OUTPUT_DIR {out}. Give an OUTPUT_DIR "
                             "that does not hold the input.")
        for name in ("nprocs", "omp_nthreads", "mem_mb", "folds", "epochs", "blocks",
                     "max_steps", "synthesize_voxels", "target_directions"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{flag(name)} {value}: at least 1 is needed.")
        if self.folds == 1:
            raise UsageError("--folds 1: at least 2 are needed, or none at all.")
        defaults = {f.name: f.default for f in fields(self)}
        for name in invalid_options(self.analysis_level):
            if getattr(self, name) != defaults[name]:
                raise UsageError(f"{flag(name)} does not belong to the "
                                 f"{self.analysis_level} level. Leave it out, or change the level.")
        for name in ("synthesize_voxels", "synthesize_image"):
            if getattr(self, name) != defaults[name] and not self.synthesize:
                raise UsageError(f"{flag(name)} belongs to --synthesize. Give --synthesize a MODE "
                                 f"({' '.join(MODES)}), or leave the option out.")
        for name in ("target_directions", "target_bvecs"):
            if getattr(self, name) != defaults[name] and not self.upsample:
                raise UsageError(f"{flag(name)} belongs to --upsample. Give --upsample a METHOD, "
                                 "or leave the option out.")
        if self.target_directions and self.target_bvecs:
            raise UsageError("--target-directions and --target-bvecs: both say which directions "
                             "are added. Give one of them.")
        if self.target_directions and self.target_directions > MAX_DIRECTIONS:
            raise UsageError(f"--target-directions {self.target_directions}: at most "
                             f"{MAX_DIRECTIONS} are allowed. Give a smaller number.")
        for name in ("folds", "epochs", "blocks"):
            if getattr(self, name) and not self.train:
                raise UsageError(f"--{name} {getattr(self, name)} belongs to a training. Give a "
                                 "METHOD with --train, or leave the option out.")
        if self.init and not self.train:
            raise UsageError(f"--init {self.init} belongs to a training. Give a METHOD with "
                             "--train, or leave the option out.")
        if self.output_resolution is not None and not 0.2 <= self.output_resolution <= 20:
            raise UsageError(f"--output-resolution {self.output_resolution:g}: a size between 0.2 "
                             "and 20 mm is needed.")
        if not spaces.parse(self.output_spaces) and self.output_resolution:
            raise UsageError("--output-resolution belongs to --output-spaces. Give a SPACE with "
                             "it (T1w or a template), or leave the option out.")
        self._check_preprocessing()
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: auto, cpu, cuda or cuda:N is needed.")
        for text in self.set:
            if not re.fullmatch(r"[^.=\s]+\.[^=\s]+=.+", text, re.DOTALL):
                raise UsageError(f"--set {text}: METHOD.KEY=VALUE is needed, e.g. "
                                 "harmonize_shresnet.network.blocks=4.")
        names = Counter(["raw", *(name for name, _ in self.derivatives)])
        for name, count in names.items():
            if count > 1:
                raise UsageError(f"--derivatives: two datasets are called {name!r}"
                                 f"{' (BIDS_DIR has this name)' if name == 'raw' else ''}. "
                                 "Give each a name of its own, as NAME=PATH.")

    def corrections(self, preprocessed: bool) -> tuple[str, ...]:
        """List the corrections that --preprocess asks for, in the order of CORRECTIONS.

        Parameters
        ----------
        preprocessed : bool
            Whether the images are preprocessed already; then `auto` asks for none.
        """
        if self.preprocess == ("auto",):
            return () if preprocessed else CORRECTIONS
        order = (*DENOISERS, *CORRECTIONS[1:])
        return tuple(sorted(set(self.preprocess) - {"none"}, key=order.index))

    def _check_preprocessing(self) -> None:
        named = " ".join(self.preprocess)
        if len(self.preprocess) > 1 and {"auto", "none"} & set(self.preprocess):
            raise UsageError(f"--preprocess {named}: auto and none stand alone. Give one of them, "
                             f"or name corrections: {' '.join(CORRECTIONS)}.")
        if len(set(DENOISERS) & set(self.preprocess)) > 1:
            raise UsageError(f"--preprocess {named}: one denoising method is needed. Give one of "
                             f"{', '.join(DENOISERS)}.")
        seconds = self.fallback_total_readout_time
        if seconds is not None and not 0 < seconds < 1:
            raise UsageError(f"--fallback-total-readout-time {seconds:g}: a number of "
                             "seconds between 0 and 1 is needed. Divide milliseconds by 1000.")
        if self.merge_distortion_groups and not {"auto", "distortion"} & set(self.preprocess):
            raise UsageError(f"--merge-distortion-groups: the runs must be corrected first, and "
                             f"--preprocess {named} does not correct distortion. Add distortion, "
                             "or leave the option out.")

    def as_dict(self) -> dict[str, Any]:
        """Return the options as plain values that --config-file can read.

        Options that are None, empty, False or 0 are left out.
        """
        def plain(value: Any) -> Any:
            if isinstance(value, Path):
                return str(value)
            return [plain(v) for v in value] if isinstance(value, tuple) else value

        table = {k: plain(v) for k, v in asdict(self).items()
                 if v not in (None, (), False) and k != "config_file"}
        if self.derivatives:
            table["derivatives"] = {name: str(path) for name, path in self.derivatives}
        return table


DESIGNS = {
    "travelling": "everyone is scanned at every site",
    "matched": "each site has its own people, of the same ages",
    "confounded": "each site has its own people, older from site to site",
}
"""Designs of a phantom study, with their help texts."""

ARTIFACTS = {
    "distortion": "a susceptibility field; DWIs AP, b0 images PA and a GRE field map",
    "motion": "of the head between volumes",
    "eddy": "fields of eddy currents, up to quadratic",
    "dropout": "signal lost in slices of weighted volumes",
    "gibbs": "ringing by truncation of k-space",
    "partial-fourier": "a quarter of k-space is not acquired, and filled with zeros",
    "complex": "magnitude and phase, with a phase of each shot",
    "skull": "skull and scalp",
}
"""Artifacts of a phantom's raw images, with their help texts."""

ARTIFACT_OPTIONS = ("artifacts", "field_scale", "motion_mm", "motion_degrees", "eddy_hz", "dropout")
"""Fields of PhantomOptions that matter only with artifacts."""


@dataclass(frozen=True)
class PhantomOptions:
    """Options of a multi-site phantom.

    The size of an effect is the difference of a site from the reference, which is the first site.
    Each site gets this size times a factor from U(0.75, 1.25), with a random sign; signs are
    balanced over sites. With the defaults the mean over voxels of |site − reference| / reference of
    FA (tensor up to b 1500, averaged over draws of each site's noise) is near 5 % in white and 10
    to 15 % in grey matter (benchmarks/phantom.py), as Vollmar et al. 2010 found between two
    scanners (doi:10.1016/j.neuroimage.2010.03.046).

    Raises
    ------
    UsageError
        A value is out of range.
    """

    output_dir: Path = positional(
        "a new or empty folder, or an earlier phantom, which is replaced", metavar="OUTPUT_DIR")
    participants: int = option(4, "number of participants; unless the design is travelling, of all "
                               "sites together", group="participants and sites")
    sites: int = option(2, "number of sites; the first, A, is the reference")
    design: str = option("travelling", "; ".join(f"{k}: {v}" for k, v in DESIGNS.items()),
                         choices=tuple(DESIGNS))
    random_seed: int = option(0, "the same seed gives the same bytes")
    sloppy: bool = option(False, "6 mm voxels and 16 directions, unless given; for tests")

    shells: tuple[float, ...] = option((1000.0, 2000.0), "b-values, s/mm²", group="protocol")
    directions: int | None = option(None, "directions per shell; default: 30, or 16 with --sloppy")
    voxel_size: float | None = option(None, "voxel size in mm; default: 3, or 6 with --sloppy")
    snr: float = option(25.0, "SNR of white matter at b = 0; inf for no noise")
    echo_time: float = option(80.0, "echo time of the reference, ms")
    repetition_time: float = option(6.0, "repetition time of the reference, s")

    ages: tuple[float, float] = option(
        (20.0, 80.0), "youngest and oldest, years", group="differences between participants")
    age_slope_f: float = option(-0.001, "change of the neurite fraction of white matter per year")
    age_slope_d: float = option(0.002, "change of d in white and grey matter, um^2/ms per year")
    person_sd: float = option(
        1.0, "factor of all differences between participants but age and lesions")
    lesions: float = option(0.25, "share of participants with a white-matter lesion")
    pose_rotation: float = option(3.0, "rotation of the head about each axis, SD in degrees")
    pose_shift: float = option(2.0, "shift of the head along each axis, SD in mm")

    effects: float = option(1.0, "factor of all site effects below; 0 for none",
                            group="differences between sites")
    effect_gain: float = option(0.3, "log of the signal's unit")
    effect_coil: float = option(0.3, "SD of the log of the coil profile, which shapes the noise")
    effect_bias: float = option(0.1, "SD of the log of the bias field left in the images")
    effect_snr: float = option(0.2, "log of the SNR")
    effect_coils: int = option(4, "coils of every second site: non-central chi noise; 1: Rician")
    effect_psf: float = option(1.2, "full width at half maximum of the point spread, mm")
    effect_echo_time: float = option(
        15.0, "change of the echo time, ms: weights compartments and tissues by their T2")
    effect_repetition_time: float = option(
        0.6, "log of the repetition time: weights tissues by their T1")
    effect_miscalibration: float = option(0.03, "relative error of b")
    effect_nonlinearity: float = option(0.03, "SD over the head of the relative change of b")
    effect_directions: int = option(3, "change of the number of directions per shell")
    effect_voxel: float = option(
        0.0, "change of the voxel size, mm; 0 keeps scans of a participant paired voxel by voxel")

    artifacts: tuple[str, ...] = option(
        (), "artifacts to simulate, so that there is something to correct; default: none; all, or: "
        + "; ".join(f"{k}: {v}" for k, v in ARTIFACTS.items()), choices=("all", *ARTIFACTS),
        group="artifacts of raw images")
    field_scale: float = option(1.0, "factor of the susceptibility field")
    motion_mm: float = option(3.0, "largest translation of the head, mm")
    motion_degrees: float = option(3.0, "largest rotation of the head, degrees")
    eddy_hz: float = option(
        10.0, "SD of the coefficients of an eddy-current field at b = 1000, Hz: its linear terms "
        "100 mm from the centre; half of it is the SD of the constant and of the quadratic terms")
    dropout: float = option(0.02, "share of the slices of weighted volumes that lose signal")

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise UsageError(f"--design {self.design}: one of {', '.join(DESIGNS)} is needed.")
        separate = self.design != "travelling"  # each person is scanned at one site
        for name, minimum in (("participants", self.sites if separate else 1), ("sites", 1),
                              ("random_seed", 0), ("directions", 6), ("effect_coils", 1),
                              ("effect_directions", 0)):
            value = getattr(self, name)
            if value is not None and value < minimum:
                raise UsageError(f"{flag(name)} {value}: at least {minimum} is needed"
                                 + (", one person per site." if name == "participants" and separate
                                    else "."))
        for name in ("voxel_size", "snr", "echo_time", "repetition_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{flag(name)} {value:g}: more than 0 is needed.")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) or name == "snr"):
                raise UsageError(f"{flag(name)} {value}: a finite number is needed.")
            if name.startswith(("effect", "pose", "person_sd", "motion", "eddy")) and value < 0:
                raise UsageError(f"{flag(name)} {value:g}: 0 or more is needed (signs are drawn).")
        if not self.shells or min(self.shells) < 50 or max(self.shells) > 10000:
            raise UsageError(f"--shells {' '.join(f'{b:g}' for b in self.shells)}: b-values from "
                             "50 to 10000 s/mm² are needed.")
        if len(set(self.shells)) < len(self.shells):
            raise UsageError("--shells: each b-value once; for more volumes, raise --directions.")
        for name in ("lesions", "dropout"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise UsageError(f"--{name} {value:g}: a share from 0 to 1 is needed.")
        if unknown := [a for a in self.artifacts if a not in ("all", *ARTIFACTS)]:
            raise UsageError(f"--artifacts {unknown[0]}: all, or some of {', '.join(ARTIFACTS)} "
                             "are needed.")
        if self.motion_mm > 20 or self.motion_degrees > 20:
            raise UsageError(f"--motion-mm {self.motion_mm:g}, --motion-degrees "
                             f"{self.motion_degrees:g}: at most 20 mm and 20 degrees are needed.")
        low, high = self.ages
        if not 0 < low <= high <= 110:
            raise UsageError(f"--ages {low:g} {high:g}: the youngest and the oldest are needed, "
                             "within 1 to 110 years.")
        if not 1.5 <= self.voxel <= 12:
            raise UsageError(f"--voxel-size {self.voxel:g}: 1.5 to 12 mm are needed.")

    def has(self, artifact: str) -> bool:
        """Tell whether an artifact, one of ARTIFACTS, is simulated."""
        return artifact in self.artifacts or "all" in self.artifacts

    @property
    def voxel(self) -> float:
        """Voxel size, mm."""
        return self.voxel_size or (6.0 if self.sloppy else 3.0)

    @property
    def per_shell(self) -> int:
        """Number of directions per shell."""
        return self.directions or (16 if self.sloppy else 30)

    @property
    def step(self) -> float:
        """Voxel size of the grid on which the anatomy is simulated, mm."""
        return 4.0 if self.sloppy else min(3.0, self.voxel * 2 / 3)
