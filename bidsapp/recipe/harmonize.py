"""Select, check and apply the harmonizer of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from bidsapp import methods
from bidsapp.acquisition import Acquisition
from bidsapp.checkpoint import CARD, Checkpoint, load
from bidsapp.domain import OVERRIDE
from bidsapp.dwi import Dwi, Run
from bidsapp.errors import DataError, Refusal, UsageError
from bidsapp.harmonization import scope
from bidsapp.harmonization.harmonizer import noise_gain, widening
from bidsapp.kinds import MethodContext, SiteHarmonizer
from bidsapp.options import Options

MODELS = PurePosixPath("group/models")
"""Folder of the models that the group level trains, below OUTPUT_DIR."""

UNKNOWN_NOISE = ("the noise of the run could not be measured, and without it the weight of the "
                 "harmonizer's own error is unknown. Use the intervals of the measured signal")
"""Reason why no interval is given if the noise level is unknown."""


@dataclass(frozen=True)
class Model:
    """A trained harmonizer.

    Parameters
    ----------
    id : str
        Name of its folder.
    method : SiteHarmonizer
    checkpoint : Checkpoint
    """

    id: str
    method: SiteHarmonizer
    checkpoint: Checkpoint


@dataclass(frozen=True)
class Result:
    """A harmonized run.

    Parameters
    ----------
    model : Model
        The model that was selected.
    dwi : Dwi
        The harmonized signal.
    changed : bool
        False at the reference site, where `dwi` is the measured signal.
    about : mapping
        Entries in the sidecars of the signal and of all its maps.
    counts, parameters, notices
        Those of `kinds.Derived`.
    warnings : sequence of str
        Sentences on what is probably wrong.
    no_intervals : str
        Reason, as a clause, why no estimator can give an interval from this signal; empty if
        estimators can.
    widening : float
        Factor of the standard deviations of all maps, for the error of the harmonizer; 1 without.
    """

    model: Model
    dwi: Dwi
    changed: bool
    about: Mapping[str, Any]
    counts: Mapping[str, int] = field(default_factory=dict)
    parameters: Mapping[str, Any] = field(default_factory=dict)
    notices: Sequence[str] = ()
    warnings: Sequence[str] = ()
    no_intervals: str = ""
    widening: float = 1.0


def folders(options: Options) -> list[Path]:
    """Find the folders of the checkpoints that --harmonize names.

    The option holds a path, the name of a model under OUTPUT_DIR, or a method; a method stands for
    all its models under OUTPUT_DIR.

    Raises
    ------
    UsageError
        There is none. The message lists the available models and suggests the most similar name.
    """
    given, models = options.harmonize, options.output_dir / MODELS
    if not given:
        return []
    for folder in (Path(given), models / given):
        if folder.is_dir():
            return [folder]
    there = sorted(p.parent.name for p in models.glob(f"harmonize_*/{CARD}"))
    kinds = methods.names("harmonize_")
    name = next((k for k in (given, f"harmonize_{given}") if k in kinds), None)
    if name is None:
        raise UsageError(
            f"--harmonize {given}: no such folder, model or method. Available under {models} are: "
            f"{', '.join(there) or 'none'}; methods to train: {', '.join(kinds)}."
            + scope.suggest_name(given, [*there, *kinds, *(k.removeprefix("harmonize_")
                                                     for k in kinds)]))
    if not isinstance(methods.get(name), SiteHarmonizer):
        raise UsageError(f"{name} is not applied to images, but trained at group level: "
                         f"qsphere BIDS_DIR OUTPUT_DIR group --train {name}")
    if not (own := [models / n for n in there if n.startswith(f"{name}_")]):
        raise UsageError(f"--harmonize {given}: {models} holds no model of it. Train one: qsphere "
                         f"BIDS_DIR OUTPUT_DIR group --train {name} --reference-batch NAME")
    return own


def load_models(options: Options) -> list[Model]:
    """Load the models that --harmonize names; none without the option.

    Raises
    ------
    UsageError
        The option names no model, or one that cannot be read or is no harmonizer.
    """
    found = []
    for folder in folders(options):
        try:
            checkpoint = load(folder)
        except DataError as error:
            raise UsageError(f"--harmonize {options.harmonize}: {error}") from error
        name = checkpoint.card.method
        # a method is applied with the hyper-parameters that its model was trained with
        context = MethodContext(
            settings={name: checkpoint.card.training.get("settings", {})})
        method = (methods.get(name, "harmonize", context)
                  if name in methods.names("harmonize_") else None)
        if not isinstance(method, SiteHarmonizer):
            raise UsageError(f"--harmonize {options.harmonize}: {folder} holds weights of {name}, "
                             "which harmonizes nothing. Give a model that group --train "
                             "harmonize_… made.")
        found.append(Model(folder.resolve().name, method, checkpoint))
    return found


def select(models: Sequence[Model], batch: str) -> Model:
    """Select the model for a site.

    A single model is selected for any site; `check` decides whether it fits. Of several models, it
    is the one that maps this site to its reference, or the first of those whose reference is this
    site, since all of them leave the signal as it is.

    Parameters
    ----------
    models : sequence of Model
    batch : str
        The site.

    Raises
    ------
    Refusal
        Of several models none knows the site, more than one maps it, or it is mapped by one and the
        reference of another.
    """
    cards = [m.checkpoint.card for m in models]
    knowing = [m for m, c in zip(models, cards, strict=True) if batch in c.batches]
    of_reference = [m for m, c in zip(models, cards, strict=True) if batch == c.reference_batch]
    if len(models) == 1 or (of_reference and not knowing):
        return (of_reference or list(models))[0]
    if len(knowing) == 1 and not of_reference:
        return knowing[0]
    if several := knowing + of_reference:
        raise Refusal(f"{several[0].method.name}: {', '.join(m.id for m in several)} all know the "
                      f"batch {batch}. Give one of them to --harmonize.")
    known = sorted({b for c in cards for b in (*c.batches, str(c.reference_batch))})
    raise Refusal(f"{models[0].method.name} has no model for the batch {batch}; there are models "
                  f"for {', '.join(known)}.{scope.suggest_name(batch, known)} Train one with this "
                  "batch, or leave the run out; one given by its name can be used all the same "
                  "with --allow-extrapolation.")


def check(model: Model, acquisition: Acquisition, voxel_size: Sequence[float], batch: str,
          allow: bool) -> list[str]:
    """Check that a run lies within the training domain of a model.

    Runs of the reference site need no check: their signal stays as it is.

    Parameters
    ----------
    model : Model
    acquisition : Acquisition
    voxel_size : sequence of float
        mm.
    batch : str
        The site of the run.
    allow : bool
        Whether violations are allowed.

    Returns
    -------
    list of str
        Violations of the training domain; empty unless `allow`.

    Raises
    ------
    Refusal
        The run violates the training domain and that is not allowed, or the method does not support
        the acquisition at all.
    """
    card = model.checkpoint.card
    if batch == card.reference_batch:
        return []
    model.method.check(acquisition)
    violations = card.trained_for.violations(acquisition, voxel_size, batch)
    if violations and not allow:
        hint = scope.suggest_name(batch, card.batches) if batch not in card.batches else ""
        raise Refusal(f"{card.method}, trained to map {', '.join(card.batches)} to "
                      f"{card.reference_batch}, does not fit: {'; '.join(violations)}.{hint} Train "
                      f"on such runs (group --train {card.method} --reference-batch "
                      f"{card.reference_batch}), or leave the run out. {OVERRIDE}")
    return violations


def apply(models: Sequence[Model], dwi: Dwi, run: Run, *, allow: bool, device: str) -> Result:
    """Harmonize a run to the reference site of its model.

    Parameters
    ----------
    models : sequence of Model
    dwi : Dwi
        The measured signal.
    run : Run
    allow : bool
        Whether the run may lie outside of the training domain.
    device : str

    Returns
    -------
    Result

    Raises
    ------
    Refusal
        No model is for the site (`select`), the run is not fit for the model (`check`), or the
        method cannot harmonize it.
    """
    model = select(models, run.batch)
    card = model.checkpoint.card
    about: dict[str, Any] = {"HarmonizationModel": {
        "Id": model.id, "Version": card.versions.get("qsphere", "unknown"), "SHA256": card.sha256,
        "ReferenceBatch": card.reference_batch, "Batch": run.batch, "BatchSource": run.batch_source,
        "TrainingRange": asdict(card.trained_for),
        **({"Warnings": list(card.warnings)} if card.warnings else {})}}
    size = np.linalg.norm(dwi.affine[:3, :3], axis=0)
    violations = check(model, dwi.acquisition, size, run.batch, allow)
    if run.batch == card.reference_batch:
        return Result(model, dwi, False, {**about, "Unchanged": True}, notices=(
            f"Harmonization: {run.batch} is the reference site of {model.id}. The signal stays as "
            "it is, and each map is made once.",))
    harmonized = model.method.harmonize(dwi, model.checkpoint, run.batch, device)
    new = replace(dwi, signal=harmonized.signal,
                  noise_gain=noise_gain(dwi, harmonized))
    about["Noise"] = describe_noise(new)
    no_intervals = harmonized.no_intervals or ("" if dwi.noise_sd else UNKNOWN_NOISE)
    factor = 1.0 if no_intervals else round(widening(new, harmonized.errors), 3)
    if not no_intervals:
        about["HarmonizationError"] = {
            "RelativeSDByShell": list(harmonized.errors), "UncertaintyFactor": factor,
            "Source": "the model's card: error of the mean over directions of the people who "
                      "validated its training, beyond what noise explains"}
    snr = None if dwi.noise_sd is None else float(np.median(dwi.mean_b0) / dwi.noise_sd)
    notices = [f"Harmonized from {run.batch} to {card.reference_batch} by {model.id}."]
    warnings = [*harmonized.notices, *(f"Harmonization: {warning}" for warning in (
        *card.warnings, *card.trained_for.warnings(snr, run.covariates)))]
    if no_intervals:
        notices.append("Maps of the harmonized signal come without intervals (…_stat-std): "
                       f"{no_intervals}.")
    if violations:
        about["OutOfDistribution"] = violations
        warnings.append("Harmonized outside of what the model was trained for, as "
                       f"--allow-extrapolation asks: {'; '.join(violations)}.")
    return Result(model, new, True, about, harmonized.counts, harmonized.parameters, notices,
                  warnings, no_intervals, factor)


def describe_noise(dwi: Dwi) -> dict[str, Any]:
    """Describe the noise level of a harmonized signal and its derivation, for sidecars."""
    if dwi.noise_sd is None:
        return {"Level": "unknown: it could not be measured before harmonization"}
    b0 = np.flatnonzero(dwi.acquisition.b0)
    return {
        "SDWithoutWeighting": dwi.noise_of(b0),
        "SDByShell": [{"b": s.b, "b_delta": s.b_delta, "SD": dwi.noise_of(s.indices)}
                      for s in dwi.acquisition.shells],
        "Law": "Rician, as before harmonization, with the SD that follows",
        "Source": "residual of a spherical harmonics fit to each shell of the signal as measured, "
                  "times the gain of the mean over directions when noise is added to that signal "
                  "and it is harmonized again"}
