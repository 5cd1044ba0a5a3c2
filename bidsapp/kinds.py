"""The kinds of method, with their inputs and results.

A method is a folder of `bidsapp.methods` with one class, which derives from one of the kinds here:
`Estimator`, `Synthesizer`, `Denoiser`, `Upsampler`, `SiteHarmonizer` or `GroupAnalysis`.
`Trainable` adds `fit`.
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
from bidsapp.acquisition import SAME_SHAPE, Acquisition, Shell
from bidsapp.dwi import Dwi
from bidsapp.errors import Refusal, UsageError
from bidsapp.options import Options

if TYPE_CHECKING:
    import pandas as pd

    from bidsapp.checkpoint import Checkpoint


@dataclass(frozen=True)
class Derived:
    """Result of a method for one Dwi.

    Parameters
    ----------
    maps : mapping of str to ndarray
        (voxel,) or (voxel, k) float32, by key of the method's outputs.json.
    counts : mapping
        Entries of the QC table: numbers of voxels that are flagged or have no estimate, and the
        shells that were used.
    parameters : mapping
        Content of Model.Parameters in the sidecar.
    valid : (voxel,) bool, optional
        Voxels with an estimate; the maps are 0 elsewhere. None for all voxels.
    notices : sequence of str
        Sentences for the report.
    synthetic : Synthetic, optional
        Signals that were computed, not measured.
    """

    maps: Mapping[str, np.ndarray]
    counts: Mapping[str, int | str] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    valid: np.ndarray | None = None
    notices: Sequence[str] = ()
    synthetic: Synthetic | None = None

    def without_intervals(self, reason: str) -> Derived:
        """Remove the maps of standard deviations (`…_std`), and record the reason, a clause."""
        return replace(self, maps={k: v for k, v in self.maps.items() if not k.endswith("_std")},
                       parameters={**self.parameters, "Uncertainty": f"not given: {reason}"})

    def widen_intervals(self, factor: float, ranges: Mapping[str, Sequence[float | None]]
                        ) -> Derived:
        """Multiply the standard deviations (`…_std`) by a factor, up to the maximum of their range.

        Parameters
        ----------
        factor : float
        ranges : mapping
            Minimum and maximum of each map (`Method.ranges`).

        Returns
        -------
        Derived
        """
        most = {k: np.inf if ranges[k][1] is None else ranges[k][1] for k in self.maps
                if k.endswith("_std")}
        return replace(self, maps={k: np.minimum(v * np.float32(factor), np.float32(most[k]))
                                   if k in most else v for k, v in self.maps.items()},
                       parameters={**self.parameters, "UncertaintyFactor": factor})


@dataclass(frozen=True)
class Harmonized:
    """A signal as the reference site would have measured it.

    Parameters
    ----------
    signal : (voxel, measurement) float32
        In the gradient table and units of the run.
    reapply : callable
        Dwi → (voxel, measurement) signal: applies the same harmonization to another signal of the
        run, or to a part of its voxels. What was determined for this run, such as a registration,
        stays fixed.
    counts, parameters, notices
        As in `Derived`.
    errors : sequence of float
        For each shell of the run, the SD of the error that the method itself makes in the mean over
        directions, as a share of that mean.
    no_intervals : str
        Reason, as a clause, why no estimator can give an interval from this signal; empty if
        estimators can.

    Raises
    ------
    ValueError
        There are neither errors nor a reason for no intervals.
    """

    signal: np.ndarray
    reapply: Callable[[Dwi], np.ndarray]
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
class Denoised:
    """A signal with less noise.

    Parameters
    ----------
    signal : (voxel, measurement) float32
        In the gradient table and units of the run.
    counts, parameters, notices
        As in `Derived`.
    warnings : sequence of str
        Sentences for the report and the log: reasons to doubt the result.
    magnitude : bool
        Whether a magnitude still has its noise floor (`Dwi.magnitude`), in the weighted volumes
        that were denoised. It holds for the whole signal. b0 volumes, which keep their floor, are
        far above it: at SNR 10 it raises them by 0.5 %.
    """

    signal: np.ndarray
    counts: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    magnitude: bool = True
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Predicted:
    """Signals of measurements that were not acquired.

    Parameters
    ----------
    signal : (voxel, m) float32
        Expected values of the m measurements, in the units of the run.
    sd : (voxel, m) float32, optional
        SD of the error of `signal`, without the noise that a measurement would add; None if the
        method does not estimate it.
    counts, parameters, notices
        As in `Derived`.
    warnings : sequence of str
        Sentences for the report and the log: reasons to doubt the result.
    """

    signal: np.ndarray
    sd: np.ndarray | None = None
    counts: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    warnings: Sequence[str] = ()


@dataclass(frozen=True)
class Cohort:
    """The participants and runs of the group level.

    Parameters
    ----------
    statistics : DataFrame
        One row per run: participant, session, run, batch (the site), the covariates, features.
    features : tuple of str
        Columns of `statistics` with map statistics.
    covariates : tuple of str
        Columns of `statistics` with covariates (age, sex, …).
    reference_batch : str, optional
        Site that the others are mapped to.
    acquisitions : mapping
        Acquisition of every run, by its name.
    load : callable, optional
        Reads a run, given its name.
    voxel_sizes : mapping
        Voxel size in mm of every run, by its name.
    paired_by : str, optional
        `session` if only scans of the same session are paired.
    tissue : callable, optional
        Segments the T1w image of a run, given its name. Returns the (voxel, 3) float32
        probabilities of grey matter, white matter and CSF in the voxels of `load`, or None if the
        run has no T1w image that can be used. It takes up to minutes.
    """

    statistics: pd.DataFrame
    features: tuple[str, ...] = ()
    covariates: tuple[str, ...] = ()
    reference_batch: str | None = None
    acquisitions: Mapping[str, Acquisition] = field(default_factory=dict)
    load: Callable[[str], Dwi] | None = None
    voxel_sizes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    paired_by: str | None = None
    tissue: Callable[[str], np.ndarray | None] | None = None

    def hold_out(self, share: float, seed: int, method: str, runs: Sequence[str]) -> set[str]:
        """Choose the runs of a random share of the participants, at least one, for validation.

        Parameters
        ----------
        share : float
        seed : int
        method : str
            Name of the method, for messages.
        runs : sequence of str
            Runs that the training uses.

        Raises
        ------
        UsageError
            The runs have fewer than two participants.
        """
        person = self.statistics.set_index("run")["participant"].astype(str)
        people = sorted({person[run] for run in runs})
        if len(people) < 2:
            raise UsageError(f"--train {method} found {len(people)} participant. At least 2 that "
                             "it can learn from are needed, one of them for the validation. Add "
                             "participants.")
        count = min(max(1, round(share * len(people))), len(people) - 1)
        held = set(np.random.default_rng(seed).permutation(people)[:count].tolist())
        return {run for run in runs if person[run] in held}


@dataclass(frozen=True)
class TrainingSettings:
    """Settings that all trainings of a command share. Those of a method are in its training.toml.

    Parameters
    ----------
    max_steps : int, optional
        Maximum number of optimiser steps of each stage; None for those of training.toml.
    folds : int, optional
        Number of folds of the cross-validation; None for no cross-validation.
    seed : int
        Seed of all random numbers.
    device : str
        cpu, cuda or cuda:N.
    devices : tuple of int
        Number of devices per node, and of nodes, that train together.
    workers : int
        Number of processes that register scans side by side.
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
    """Result of `Trainable.fit`.

    Parameters
    ----------
    tables : mapping of str to DataFrame
        Tables by output name (`desc-combat_dwimap`).
    model : mapping
        Description of the model, for its JSON file.
    checkpoints : mapping of str to Checkpoint
        Checkpoints by their folder under group/models.
    notices : sequence of str
        Sentences for the report.
    """

    tables: Mapping[str, pd.DataFrame]
    model: Mapping[str, Any]
    checkpoints: Mapping[str, Checkpoint] = field(default_factory=dict)
    notices: Sequence[str] = ()


@dataclass(frozen=True)
class SyntheticImage:
    """One synthetic image in the anatomy of a run.

    Parameters
    ----------
    signal : (voxel, measurement) float32
    truth : mapping of str to (voxel, k) ndarray
        Ground truth by key of `truth` in outputs.json.
    volumes : mapping of str to sequence of str
        Names of the k volumes of each ground truth.
    parameters : mapping
        As in `Derived`.
    """

    signal: np.ndarray
    truth: Mapping[str, np.ndarray]
    volumes: Mapping[str, Sequence[str]]
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Synthetic:
    """Signals that were computed, not measured, with their ground truth, by mode.

    Parameters
    ----------
    signals : mapping of str to (voxel, measurement) ndarray
        float32, in the gradient table of the run.
    truth : mapping of str to DataFrame
        Ground truth, one row per voxel.
    columns : mapping
        Description and Units of each column of the ground truth.
    derived : Derived
        Maps of the run's properties that the signals are modelled on.
    parameters, notices
        As in `Derived`.
    images : mapping of str to SyntheticImage
        Whole images, if they were requested.
    scores : mapping
        Similarity of the signals of each mode to the run, by mode and key of "scores" in
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
    """Settings of a command for its methods.

    Parameters
    ----------
    sloppy : bool
        Whether trainings are cut short, in order to test everything else.
    models : Path, optional
        Folder of the checkpoints that the group level wrote.
    settings : mapping
        Hyper-parameters that differ from those of training.toml, by their paths there
        (`hyperparameters.resolve`), by the method's name.
    allow_extrapolation : bool
        Whether weights may be used for a run outside their training domain.
    """

    sloppy: bool = False
    models: Path | None = None
    settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    allow_extrapolation: bool = False


class Method(ABC):
    """A published method, which is a folder of `bidsapp.methods` (`methods.get` loads it).

    Parameters
    ----------
    context : MethodContext, optional
        Settings of the command.
    """

    def __init__(self, context: MethodContext | None = None) -> None:
        self.folder = Path(importlib.import_module(type(self).__module__).__file__ or "").parent
        self.context = context or MethodContext()

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def short(self) -> str:
        """The name without its kind: `dti` for `estimate_dti`."""
        return self.name.partition("_")[2] or self.name

    @property
    def outputs(self) -> dict[str, Any]:
        """Content of outputs.json: {"model": {...}, "maps": {key: {"entities", "Description",
        "Units", "range", …}}}; for a harmonizer also "signal": {"Description", "Units"}."""
        return json.loads((self.folder / "outputs.json").read_text())

    def name_map(self, entry: Mapping[str, Any]) -> tuple[str, dict[str, str]]:
        """Find what names the files of a map.

        Parameters
        ----------
        entry : mapping
            Entry of the map in outputs.json. Without "suffix" it is a parameter of the model
            (`dwimap`). `dseg` is a segmentation by the labels of BIDS (0 background, 1 grey matter,
            2 white matter, 3 CSF), whose Units are "label"; `probseg` is the probability of the
            tissue that the entity `label` names (GM, WM, CSF). These two follow from no model.

        Returns
        -------
        suffix : str
        entities : dict
            Entities of the file, with `model` for `dwimap` alone, besides those of the run.
        """
        suffix = entry.get("suffix", "dwimap")
        model = {"model": self.outputs["model"]["name"]} if suffix == "dwimap" else {}
        return suffix, {**model, **entry["entities"]}

    @property
    def ranges(self) -> dict[str, tuple[float | None, float | None]]:
        """Minimum and maximum of every map; None for no limit."""
        return {key: tuple(entry["range"]) for key, entry in self.outputs["maps"].items()}

    @property
    def changed_settings(self) -> dict[str, Any]:
        """Hyper-parameters that `--set` changes, by their paths in training.toml."""
        return dict(self.context.settings.get(self.name, {}))

    def paths(self, key: str) -> list[str]:
        """List the hyper-parameters of training.toml that a key names (`hyperparameters.paths`)."""
        return hyperparameters.paths(hyperparameters.read(self.folder), key, self.context.sloppy)

    def settings(self, table: str, *variants: str) -> dict[str, Any]:
        """Read a table of training.toml.

        Values of VARIANT.TABLE replace those of the table, in the order of the variants and the
        sloppy variant last. Values of `--set` replace all others.
        """
        if self.context.sloppy:
            variants = (*variants, hyperparameters.SLOPPY)
        return hyperparameters.select(hyperparameters.read(self.folder), table, variants,
                                      self.changed_settings)

    @abstractmethod
    def check(self, acquisition: Acquisition) -> None:
        """Refuse an acquisition that the method does not support.

        Raises
        ------
        Refusal
            The method cannot be applied; the message says what was found and what is needed.
        """


class FromSignal(Method):
    """A method that computes maps or synthetic signals from a signal, which stays as it is.

    Attributes
    ----------
    wants_tissue : bool
        Whether the method uses `Dwi.tissue`, which is computed only then.
    """

    wants_tissue: ClassVar[bool] = False

    @abstractmethod
    def run(self, dwi: Dwi, options: Options, device: str) -> Derived:
        """Process one Dwi, unmodified, as the options of the participant level request."""


class Estimator(FromSignal):
    """A method that estimates maps from a signal."""

    def run(self, dwi: Dwi, options: Options, device: str) -> Derived:
        return self.apply(dwi, device, options.random_seed)

    def violations(self, acquisition: Acquisition) -> list[str]:
        """List the properties of a supported acquisition that lie outside the training domain."""
        return []

    @abstractmethod
    def apply(self, dwi: Dwi, device: str, seed: int = 0) -> Derived:
        """Estimate maps from one Dwi, unmodified, in blocks of voxels.

        Parameters
        ----------
        dwi : Dwi
        device : str
            cpu, cuda or cuda:N.
        seed : int
            Seed of all random numbers, such as those of a training for this Dwi alone.
        """


class Synthesizer(FromSignal):
    """A method that synthesizes signals with known ground truth, modelled on a measured run."""

    @abstractmethod
    def synthesize(self, dwi: Dwi, modes: Sequence[str], seed: int, device: str, *,
                   voxels: int = 10_000, image: bool = False) -> Synthetic:
        """Synthesize signals modelled on one Dwi, which is not modified.

        Parameters
        ----------
        dwi : Dwi
        modes : sequence of str
            Modes of the synthesis.
        seed : int
        device : str
            cpu, cuda or cuda:N.
        voxels : int
            Number of signals of each mode.
        image : bool
            Whether a whole image is synthesized, too.

        Raises
        ------
        Refusal
            The Dwi cannot serve as a model; the message says what was found and what is needed.
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
            Length, device and initial weights of the training.

        Returns
        -------
        Fitted

        Raises
        ------
        UsageError
            The cohort does not allow a training; the message says what was found and what is
            needed.
        """


class SignalStep(Method):
    """A method that replaces the signal of a run by a computed one, for the methods that follow.

    Its outputs.json has a "signal".
    """


class Denoiser(SignalStep):
    """A method that removes noise from a signal."""

    def violations(self, acquisition: Acquisition) -> list[str]:
        """List the properties of a supported acquisition that lie outside the training domain."""
        return []

    @abstractmethod
    def denoise(self, dwi: Dwi, device: str, seed: int = 0) -> Denoised:
        """Remove noise from a Dwi, which is not modified.

        Raises
        ------
        Refusal
            The signal cannot be used; the message says what was found and what is needed.
        """


class Upsampler(SignalStep):
    """A method that predicts measurements that were not acquired from those that were.

    Attributes
    ----------
    any_table : bool
        Whether any part of a supported gradient table is supported, too, as long as it is large
        enough. Then each volume can be predicted from the others (`upsample.round_trip`).
    """

    any_table: ClassVar[bool] = True

    def shells(self, acquisition: Acquisition) -> list[Shell]:
        """List the shells to which directions can be added; by default all with directions."""
        return [s for s in acquisition.shells if abs(s.b_delta) > SAME_SHAPE]

    def target(self, acquisition: Acquisition) -> Acquisition | None:
        """Return the measurements that the method can add to an acquisition, if they are fixed.

        None if it can predict any direction.
        """
        return None

    def check_target(self, acquisition: Acquisition, target: Acquisition) -> None:
        """Refuse measurements that cannot be predicted from a supported acquisition.

        Raises
        ------
        Refusal
            The message says what was found and what is needed.
        """

    def violations(self, acquisition: Acquisition, target: Acquisition,
                   voxel_size: Sequence[float] | None = None) -> list[str]:
        """List the properties of a supported run, or of the measurements that are to be added,
        that lie outside the training domain.

        Parameters
        ----------
        acquisition : Acquisition
        target : Acquisition
            The measurements that are to be added.
        voxel_size : sequence of float, optional
            Edges of the voxel in any order, mm; default: they are not checked.
        """
        return []

    @abstractmethod
    def predict(self, dwi: Dwi, target: Acquisition, device: str, seed: int = 0) -> Predicted:
        """Predict the signal of further measurements. `dwi` is not modified.

        Parameters
        ----------
        dwi : Dwi
            The measured signal.
        target : Acquisition
            The m measurements that are predicted; all are diffusion-weighted.
        device : str
            cpu, cuda or cuda:N.
        seed : int
            Seed of all random numbers.

        Raises
        ------
        Refusal
            The signal or the target cannot be used; the message says what was found and what is
            needed.
        """


class SiteHarmonizer(SignalStep, Trainable):
    """A method that maps the signal of other sites to that of the reference site."""

    @abstractmethod
    def harmonize(self, dwi: Dwi, model: Checkpoint, batch: str, device: str) -> Harmonized:
        """Map a Dwi to the reference site of a model. The Dwi is not modified.

        The caller checks that the Dwi is within the TrainingDomain of the model's card.

        Parameters
        ----------
        dwi : Dwi
        model : Checkpoint
        batch : str
            Site of the Dwi, one of those of the model.
        device : str
            cpu, cuda or cuda:N.

        Raises
        ------
        Refusal
            The Dwi cannot be harmonized, even outside the training domain; the message says what is
            needed.
        """


class GroupAnalysis(Trainable):
    """A method of the group level that works on tables of map statistics, not on images."""

    def check(self, acquisition: Acquisition) -> None:
        raise Refusal(f"{self.name} works on tables of map statistics, not on images. Use "
                      f"`group --train {self.name}` after the participant level.")
