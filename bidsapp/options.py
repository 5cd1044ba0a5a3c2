"""Every choice of one invocation, checked at birth."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bidsapp.errors import UsageError

MODES = ("syn", "sample-mean", "sample", "random-wm")
"""Of --synthesize."""

OTHER_LEVEL = {
    "participant": ("train", "reference_batch", "folds", "epochs", "blocks", "max_steps",
                    "init", "paired_by"),
    "group": ("harmonize", "upsample", "estimate", "synthesize", "synthesize_voxels",
              "synthesize_image", "allow_extrapolation",
              "reports_only", "boilerplate_only"),
}
"""What a level has no use for."""


@dataclass(frozen=True)
class Options:
    """Every choice of one invocation; passed explicitly to whatever needs it."""

    bids_dir: Path
    output_dir: Path
    analysis_level: str
    participant_label: tuple[str, ...] = ()
    session_label: tuple[str, ...] = ()
    bids_filter_file: Path | None = None
    bids_database_dir: Path | None = None
    skip_bids_validation: bool = False
    derivatives: tuple[tuple[str, Path], ...] = ()
    harmonize: str | None = None
    upsample: str | None = None
    estimate: tuple[str, ...] = ()
    synthesize: tuple[str, ...] = ()
    synthesize_voxels: int = 10_000
    synthesize_image: bool = False
    train: tuple[str, ...] = ()
    reference_batch: str | None = None
    folds: int | None = None
    epochs: int | None = None
    blocks: int | None = None
    max_steps: int | None = None
    init: Path | None = None
    paired_by: str | None = None
    batch_file: Path | None = None
    batch_column: str | None = None
    device: str = "auto"
    nprocs: int = 1
    omp_nthreads: int = 1
    mem_mb: int | None = None
    work_dir: Path | None = None
    random_seed: int = 0
    dry_run: bool = False
    reports_only: bool = False
    boilerplate_only: bool = False
    stop_on_first_crash: bool = False
    sloppy: bool = False
    allow_extrapolation: bool = False
    config_file: Path | None = None
    verbose: int = 0
    notrack: bool = False

    def __post_init__(self) -> None:
        bids, out = self.bids_dir.resolve(), self.output_dir.resolve()
        if out == bids:
            raise UsageError(f"OUTPUT_DIR is BIDS_DIR ({out}); results would mix with the data. "
                             f"Give another folder, e.g. {bids / 'derivatives' / 'qsphere'}.")
        if out.is_relative_to(bids) and out.relative_to(bids).parts[0] != "derivatives":
            raise UsageError(f"OUTPUT_DIR {out} lies inside BIDS_DIR. Inside it only derivatives/ "
                             f"may hold results, e.g. {bids / 'derivatives' / 'qsphere'}.")
        if bids.is_relative_to(out):
            raise UsageError(f"BIDS_DIR {bids} lies inside OUTPUT_DIR {out}. Give an OUTPUT_DIR "
                             "that does not hold the input.")
        for name in ("nprocs", "omp_nthreads", "mem_mb", "folds", "epochs", "blocks",
                     "max_steps", "synthesize_voxels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
        if self.folds == 1:
            raise UsageError("--folds 1: at least 2 are needed, or none at all.")
        defaults = {f.name: f.default for f in fields(self)}
        for name in OTHER_LEVEL[self.analysis_level]:
            if getattr(self, name) != defaults[name]:
                raise UsageError(f"--{name.replace('_', '-')} does not belong to the "
                                 f"{self.analysis_level} level. Leave it out, or change the level.")
        for name in ("synthesize_voxels", "synthesize_image"):
            if getattr(self, name) != defaults[name] and not self.synthesize:
                raise UsageError(f"--{name.replace('_', '-')} belongs to --synthesize. Give a "
                                 f"MODE with it ({' '.join(MODES)}), or leave it out.")
        for name in ("folds", "epochs", "blocks"):
            if getattr(self, name) and not self.train:
                raise UsageError(f"--{name} {getattr(self, name)}: of a training. Give a METHOD "
                                 "with --train, or leave it out.")
        if self.init and not self.train:
            raise UsageError(f"--init {self.init}: weights that a training starts from. Give a "
                             "METHOD with --train, or leave it out.")
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UsageError(f"--device {self.device}: needed is auto, cpu, cuda or cuda:N.")
        names = Counter(["raw", *(name for name, _ in self.derivatives)])
        for name, count in names.items():
            if count > 1:
                raise UsageError(f"--derivatives: two datasets are called {name!r}"
                                 f"{' (BIDS_DIR itself is)' if name == 'raw' else ''}. Give each a "
                                 "name of its own, as NAME=PATH.")

    def as_dict(self) -> dict[str, Any]:
        """Plain values, without those that are unset: what --config-file can read again."""
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


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class PhantomOptions:
    """Every choice of a multi-site phantom. An effect's size is the difference of a site from the
    reference (the first site); ± U(0.75, 1.25) times it is drawn for each site.

    With the defaults the mean over voxels of |site − reference| / reference of FA (tensor up to
    b 1500, averaged over draws of each site's noise) is near 5 % in white and 10 to 15 % in grey
    matter (benchmarks/phantom.py), as Vollmar et al. 2010 found between two scanners
    (doi:10.1016/j.neuroimage.2010.03.046).
    """

    output_dir: Path
    participants: int = _option(4, "people; in designs other than travelling, of all sites")
    sites: int = _option(2, "scanners; the first, A, is the reference")
    design: str = _option("travelling", "; ".join(f"{k}: {v}" for k, v in DESIGNS.items()))
    random_seed: int = _option(0, "same seed, same bytes")
    sloppy: bool = _option(False, "6 mm voxels and 16 directions unless given, for tests")

    shells: tuple[float, ...] = _option((1000.0, 2000.0), "b-values, s/mm²")
    directions: int | None = _option(None, "per shell; default: 30, or 16 with --sloppy")
    voxel_size: float | None = _option(None, "mm; default: 3, or 6 with --sloppy")
    snr: float = _option(25.0, "of white matter at b = 0; inf for no noise")
    echo_time: float = _option(80.0, "ms, of the reference")
    repetition_time: float = _option(6.0, "s, of the reference")

    ages: tuple[float, float] = _option((20.0, 80.0), "youngest and oldest, years")
    age_slope_f: float = _option(-0.001, "change of the neurite fraction of white matter per year")
    age_slope_d: float = _option(0.002, "change of d in white and grey matter, um^2/ms per year")
    person_sd: float = _option(1.0, "multiplies all differences between people but age and lesions")
    lesions: float = _option(0.25, "share of people with a white-matter lesion")
    pose_rotation: float = _option(3.0, "degrees about each axis (SD) by which heads turn")
    pose_shift: float = _option(2.0, "mm along each axis (SD) by which heads lie elsewhere")

    effects: float = _option(1.0, "multiplies all site effects below; 0 for none")
    effect_gain: float = _option(0.3, "log of the signal's unit")
    effect_coil: float = _option(0.3, "SD of the log of the coil profile, which shapes the noise")
    effect_bias: float = _option(0.1, "SD of the log of the bias field left in the images")
    effect_snr: float = _option(0.2, "log of the SNR")
    effect_coils: int = _option(4, "coils of every second site: non-central chi noise; 1: Rician")
    effect_psf: float = _option(1.2, "mm, full width at half maximum of the point spread")
    effect_echo_time: float = _option(15.0, "ms: weights compartments and tissues by their T2")
    effect_repetition_time: float = _option(0.6, "log of it: weights tissues by their T1")
    effect_miscalibration: float = _option(0.03, "relative error of b")
    effect_nonlinearity: float = _option(0.03, "SD over the head of the relative change of b")
    effect_directions: int = _option(3, "directions per shell")
    effect_voxel: float = _option(0.0, "mm; 0, so that scans of a person pair voxel by voxel")

    def __post_init__(self) -> None:
        if self.design not in DESIGNS:
            raise UsageError(f"--design {self.design}: needed is one of {', '.join(DESIGNS)}.")
        apart = self.design != "travelling"
        for name, least in (("participants", self.sites if apart else 1), ("sites", 1),
                            ("random_seed", 0), ("directions", 6), ("effect_coils", 1),
                            ("effect_directions", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"{_flag(name)} {value}: at least {least} is needed"
                                 + (", one person per site." if name == "participants" and apart
                                    else "."))
        for name in ("voxel_size", "snr", "echo_time", "repetition_time"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"{_flag(name)} {value:g}: more than 0 is needed.")
        for name in (f.name for f in fields(self)):
            value = getattr(self, name)
            if isinstance(value, float) and not (math.isfinite(value) or name == "snr"):
                raise UsageError(f"{_flag(name)} {value}: a finite number is needed.")
            if name.startswith(("effect", "pose", "person_sd")) and value < 0:
                raise UsageError(f"{_flag(name)} {value:g}: 0 or more is needed (signs are drawn).")
        if not self.shells or min(self.shells) < 50 or max(self.shells) > 10000:
            raise UsageError(f"--shells {' '.join(f'{b:g}' for b in self.shells)}: b-values from "
                             "50 to 10000 s/mm² are needed.")
        if len(set(self.shells)) < len(self.shells):
            raise UsageError("--shells: each b-value once; for more volumes, raise --directions.")
        if not 0 <= self.lesions <= 1:
            raise UsageError(f"--lesions {self.lesions:g}: a share from 0 to 1 is needed.")
        low, high = self.ages
        if not 0 < low <= high <= 110:
            raise UsageError(f"--ages {low:g} {high:g}: the youngest and the oldest are needed, "
                             "within 1 to 110 years.")
        if not 1.5 <= self.voxel <= 12:
            raise UsageError(f"--voxel-size {self.voxel:g}: 1.5 to 12 mm are needed.")

    @property
    def voxel(self) -> float:
        """mm."""
        return self.voxel_size or (6.0 if self.sloppy else 3.0)

    @property
    def per_shell(self) -> int:
        return self.directions or (16 if self.sloppy else 30)

    @property
    def step(self) -> float:
        """mm, of the grid on which the anatomy is simulated."""
        return 4.0 if self.sloppy else min(3.0, self.voxel * 2 / 3)


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
