"""The kinds of method: what each takes and what it returns.

A method is a folder of `bidsapp.methods` with one class, which derives from one of the kinds here:
`Estimator`, `Synthesizer`, `Upsampler`, `SiteHarmonizer` or `GroupAnalysis`; `Trainable` adds
`fit`.
"""

from __future__ import annotations

import importlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from bidsapp import hyperparameters
from bidsapp.acquisition import Acquisition
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal
from bidsapp.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from bidsapp.checkpoint import Checkpoint


@dataclass(frozen=True)
class Derived:
    """What a method makes of one Dwi.

    maps: (voxel,) or (voxel, k) float32 per key of the method's outputs.json.
    counts: voxels that were handled in a special way, and the shells used, for the QC table.
    parameters: what the sidecar's Model.Parameters should say.
    valid: (voxel,) bool, where there is an estimate (maps are 0 elsewhere); None for everywhere.
    notices: sentences for the report. synthetic: signals that were computed, not measured.
    """

    maps: Mapping[str, np.ndarray]
    counts: Mapping[str, int | str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    valid: np.ndarray | None = None
    notices: Sequence[str] = ()
    synthetic: Synthetic | None = None

    def without_intervals(self, reason: str) -> Derived:
        """The same without maps of standard deviations, which the reason forbids."""
        return replace(self, maps={k: v for k, v in self.maps.items() if not k.endswith("_std")},
                       parameters={**self.parameters, "Uncertainty": f"not told: {reason}"})

    def widened(self, factor: float, ranges: Mapping[str, Sequence[float | None]]) -> Derived:
        """Multiply standard deviations by a factor, up to the end of the range of their map."""
        most = {k: np.inf if ranges[k][1] is None else ranges[k][1] for k in self.maps
                if k.endswith("_std")}
        return replace(self, maps={k: np.minimum(v * np.float32(factor), np.float32(most[k]))
                                   if k in most else v for k, v in self.maps.items()},
                       parameters={**self.parameters, "UncertaintyFactor": factor})


@dataclass(frozen=True)
class Harmonized:
    """A Dwi as the reference batch would have measured it.

    signal: (voxel, measurement) float32, in the Dwi's own b-table and units. again: the same map,
    with everything that was found for this run (a registration, say) held fixed, of another signal
    of the run or of a part of its voxels. errors: per shell of the run, SD of the method's own
    error of the mean over directions, relative to that mean. no_intervals: why no estimator can
    give an interval from this signal, as a clause; empty where it can. counts, parameters,
    notices: as of `Derived`.

    Raises:
        ValueError: neither errors nor a reason for no intervals.
    """

    signal: np.ndarray
    again: Callable[[Dwi], np.ndarray]
    counts: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    errors: Sequence[float] = ()
    no_intervals: str = ""

    def __post_init__(self) -> None:
        if not self.errors and not self.no_intervals:
            raise ValueError("a harmonized signal needs the method's own error of every shell, or "
                             "a reason why no interval can be given")


@dataclass(frozen=True)
class Upsampled:
    """A signal with more measurements than were acquired.

    Parameters
    ----------
    dwi : Dwi
        With its own acquisition; the voxels are those of the signal it was made of.
    synthesized : sequence of int
        Its measurements that were computed.
    no_intervals : str
        Why no estimator can give an interval from it, as a clause; empty where it can.
    counts, parameters, notices
        As of `Derived`.
    """

    dwi: Dwi
    synthesized: Sequence[int]
    no_intervals: str = ""
    counts: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class Cohort:
    """The participants of the group level: who was scanned where, and how to load a scan.

    Parameters
    ----------
    statistics : DataFrame
        One row per run: participant, session, run, batch, the covariates, then features.
    features : tuple of str
        Its columns of map statistics.
    covariates : tuple of str
        Its columns of age, sex, ….
    reference_batch : str, optional
        The batch that others are mapped to.
    acquisitions : mapping
        Acquisition of every run, by its name.
    load : callable, optional
        Reads a run by its name.
    voxel_sizes : mapping
        Voxel size in mm of every run, by its name.
    paired_by : str, optional
        `session` where only scans of one session are pairs.
    """

    statistics: pd.DataFrame
    features: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    reference_batch: str | None = None
    acquisitions: Mapping[str, Acquisition] = field(default_factory=dict)
    load: Callable[[str], Dwi] | None = None
    voxel_sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    paired_by: str | None = None


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that all trainings of a command share; a method's own are in its training.toml.

    Parameters
    ----------
    max_steps : int, optional
        Optimiser steps of each stage, at most.
    folds : int, optional
        Parts of the cross-validation; None for no cross-validation.
    seed : int
        Of whatever is random.
    device : str
        cpu, cuda or cuda:N.
    devices : tuple of int
        Devices per node, and nodes, of the processes that train together.
    workers : int
        Processes that register scans side by side, for which memory suffices.
    states : Path, optional
        Folder in which the state of an interrupted training is kept.
    init : Path, optional
        Folder of the checkpoint that a training starts from, instead of the method's choice.
    """

    max_steps: int | None = None
    folds: int | None = None
    seed: int = 0
    device: str = "cpu"
    devices: tuple[int, int] = (1, 1)
    workers: int = 1
    states: Path | None = None
    init: Path | None = None


@dataclass(frozen=True)
class Fitted:
    """What `fit` leaves: tables by output name (`desc-combat_dwimap`), what it learned, and weights
    by the folder of group/models they belong in. notices: as of `Derived`."""

    tables: Mapping[str, pd.DataFrame]
    model: Mapping[str, Any]
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class SyntheticImage:
    """One synthetic image in a run's own anatomy.

    signal: (voxel, measurement) float32. truth: (voxel, k) per key of `truth` in outputs.json;
    volumes: what the k are. parameters: as of `Derived`.
    """

    signal: np.ndarray
    truth: Mapping[str, np.ndarray]
    volumes: Mapping[str, Sequence[str]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Synthetic:
    """Signals that were computed, not measured, and their truth, by mode.

    signals: (voxel, measurement) float32 in the run's own b-table. truth: one row per voxel.
    columns: Description and Units of each column of truth. derived: maps that show what of the
    run served as a model. parameters: as of `Derived`. notices: sentences for the report.
    images: whole images by mode, where they were asked for.
    scores: how well the signals of each mode stand for the run, by mode and key of "scores" in
    outputs.json.
    """

    signals: Mapping[str, np.ndarray]
    truth: Mapping[str, pd.DataFrame]
    columns: Mapping[str, Mapping[str, Mapping[str, str]]]
    derived: Derived
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    images: Mapping[str, SyntheticImage] = field(default_factory=dict)
    scores: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class MethodContext:
    """What a command tells its methods.

    Parameters
    ----------
    sloppy : bool
        What is trained is trained too briefly, to try everything else.
    models : Path, optional
        Folder of the checkpoints that the group level left.
    settings : mapping
        Hyper-parameters that differ from those of training.toml, by their paths there
        (`hyperparameters.resolve`), by the method's name.
    allow_extrapolation : bool
        Weights may be used for a run outside of what they were trained for.
    """

    sloppy: bool = False
    models: Path | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    allow_extrapolation: bool = False


class Method(ABC):
    """A method of the literature: a folder of this package. `get(name)` makes one.

    Parameters
    ----------
    context : MethodContext
        What the command tells its methods.
    """

    def __init__(self, context: MethodContext | None = None) -> None:
        self.folder = Path(importlib.import_module(type(self).__module__).__file__ or "").parent
        self.context = context or MethodContext()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def short(self) -> str:
        """The name without its kind: `dti` of `estimate_dti`."""
        return self.name.partition("_")[2] or self.name

    @property
    def outputs(self) -> dict[str, Any]:
        """outputs.json: {"model": {...}, "maps": {key: {"entities", "Description", "Units",
        "range", …}}}; of a harmonizer also "signal": {"Description", "Units"}."""
        return json.loads((self.folder / "outputs.json").read_text())

    @property
    def ranges(self) -> dict[str, tuple[float | None, float | None]]:
        """Least and greatest value of every map, None for no limit."""
        return {key: tuple(of["range"]) for key, of in self.outputs["maps"].items()}

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Hyper-parameters that `--set` changes, by their paths in training.toml."""
        return dict(self.context.settings.get(self.name, {}))

    def paths(self, key: str) -> list[str]:
        """The hyper-parameters of training.toml that a key names (`hyperparameters.paths`)."""
        return hyperparameters.paths(hyperparameters.read(self.folder), key, self.context.sloppy)

    def settings(self, table: str, *variants: str) -> dict[str, Any]:
        """A table of training.toml, with what VARIANT.TABLE says instead, sloppy last, and then
        what `--set` says."""
        if self.context.sloppy:
            variants = (*variants, hyperparameters.SLOPPY)
        return hyperparameters.select(hyperparameters.read(self.folder), table, variants,
                                      self.changed_settings)

    @abstractmethod
    def check(self, acquisition: Acquisition) -> None:
        """Raises Refusal, with what was found and what is needed, where the method cannot apply."""


class FromSignal(Method):
    """A method that makes images of one signal and leaves the signal as it is.

    wants_tissue: whether it uses `Dwi.tissue`, which is made only then.
    """

    wants_tissue: ClassVar[bool] = False

    @abstractmethod
    def run(self, dwi: Dwi, options: Options, device: str) -> Derived:
        """Process one Dwi as the options of the participant level say. Never modifies it."""


class Estimator(FromSignal):
    """A method that makes maps of a signal."""

    def run(self, dwi: Dwi, options: Options, device: str) -> Derived:
        return self.apply(dwi, device, options.random_seed)

    def violations(self, acquisition: Acquisition) -> list[str]:
        """List in what an acquisition that `check` lets pass lies outside of the training."""
        return []

    @abstractmethod
    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        """Process one Dwi, in blocks of voxels, on `device`. Never modifies it.

        seed: of whatever is random, as the training of a network for this Dwi alone.
        """


class Synthesizer(FromSignal):
    """A method that makes signals with known truth in the manner of a measured one."""

    @abstractmethod
    def synthesize(self, dwi: Dwi, modes: Sequence[str], seed: int, device: str, *,
                   voxels: int = 10_000, image: bool = False) -> Synthetic:
        """`voxels` signals with known truth in the manner of one Dwi, and a whole image of it.
        Never modifies it.

        Raises:
            Refusal: the Dwi cannot serve as a model; says what was found and what is needed.
        """


class Trainable(Method):
    """A method that learns from all participants."""

    @abstractmethod
    def fit(self, cohort: Cohort, settings: TrainingSettings) -> Fitted:
        """Learn from all participants.

        Parameters
        ----------
        cohort : Cohort
            The participants and their scans.
        settings : TrainingSettings
            How long, on which device, from which weights.

        Returns
        -------
        Fitted

        Raises
        ------
        UsageError
            The cohort does not allow it; says what was found and what is needed.
        """


class SignalStep(Method):
    """A method that gives a signal made of another one. Its outputs.json has a "signal"."""


class Upsampler(SignalStep):
    """A method that gives a signal more measurements."""

    @abstractmethod
    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Upsampled:
        """Compute the signal of an acquisition that holds more. Never modifies `dwi`.

        Raises
        ------
        Refusal
            The signal cannot serve; says what was found and what is needed.
        """


class SiteHarmonizer(SignalStep, Trainable):
    """A method that maps the signal of one site to that of another."""

    @abstractmethod
    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """The Dwi, of a batch that the model knows, mapped to the model's reference batch. Never
        modifies it. Whether the model may be used at all, its card's TrainingDomain says.

        Raises:
            Refusal: this Dwi cannot be harmonized whatever is allowed; says what is needed.
        """


class GroupAnalysis(Trainable):
    """A method that works on the tables of all participants, and on no image."""

    def check(self, acquisition: Acquisition) -> None:
        raise Refusal(f"{self.name} works on tables of map statistics, not on images. Use "
                      f"`group --train {self.name}` after the participants.")
