"""Every choice of one invocation, checked at birth."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from bidsapp.errors import UsageError

MODES = ("syn", "sample-mean", "sample", "random-wm")
"""Of --synthesize."""

OTHER_LEVEL = {
    "participant": ("train", "reference_batch", "folds", "epochs", "max_steps", "init",
                    "paired_by"),
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
    folds: int = 5
    epochs: int | None = None
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
        for name in ("nprocs", "omp_nthreads", "mem_mb", "folds", "epochs", "max_steps",
                     "synthesize_voxels"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name.replace('_', '-')} {value}: at least 1 is needed.")
        defaults = {f.name: f.default for f in fields(self)}
        for name in OTHER_LEVEL[self.analysis_level]:
            if getattr(self, name) != defaults[name]:
                raise UsageError(f"--{name.replace('_', '-')} does not belong to the "
                                 f"{self.analysis_level} level. Leave it out, or change the level.")
        for name in ("synthesize_voxels", "synthesize_image"):
            if getattr(self, name) != defaults[name] and not self.synthesize:
                raise UsageError(f"--{name.replace('_', '-')} belongs to --synthesize. Give a "
                                 f"MODE with it ({' '.join(MODES)}), or leave it out.")
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
