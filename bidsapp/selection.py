"""Which weights serve a run, and on which of its shells: those trained at group level, or the
bundled ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from bidsapp.acquisition import Acquisition, Shell, describe_shells
from bidsapp.checkpoint import Card, Checkpoint, load
from bidsapp.domain import OVERRIDE
from bidsapp.errors import Refusal
from bidsapp.kinds import Estimator, Trainable

WEIGHTS = Path(__file__).parent / "weights"
"""Folder of the bundled weights."""

SMALL_B = 200.0
"""b-value (s/mm²) below which all shells suggest that b-values are in ms/µm²."""


def find_weights(name: str, models: Path | None = None) -> list[Checkpoint]:
    """Load all weights of a method.

    Parameters
    ----------
    name : str
        Name of the method.
    models : Path, optional
        Folder of the models that were trained at group level.

    Returns
    -------
    list of Checkpoint
        Weights of `models`, then the bundled ones.
    """
    folders = sorted(models.glob(f"{name}_*")) if models else []
    return [load(f, name) for f in (*folders, WEIGHTS / name) if f.is_dir()]


def select_weights(name: str, weights: Sequence[Checkpoint], acquisition: Acquisition, *,
                   allow: bool = False) -> Checkpoint:
    """Select the weights for a run.

    Parameters
    ----------
    name : str
        Name of the method.
    weights : sequence of Checkpoint
        Result of `find_weights`.
    acquisition : Acquisition
        Acquisition of the run.
    allow : bool
        Whether a run outside of the training domain is accepted.

    Returns
    -------
    Checkpoint
        Among weights whose domain contains the acquisition: those trained for one acquisition with
        the most similar numbers of directions, or else those for all protocols. If no domain
        contains it and `allow`: the last weights that can be applied. The bundled ones are last,
        because they were trained for the most acquisitions.

    Raises
    ------
    Refusal
        No weights can be used.
    """
    def direction_difference(checkpoint: Checkpoint) -> float:
        domain = checkpoint.card.trained_for
        return math.inf if domain.shell_count else float(sum(
            abs(len(shell) - trained.directions[0])
            for shell, trained in zip(acquisition.shells, domain.shells, strict=True)))

    if suitable := [c for c in weights if not c.card.trained_for.violations(acquisition)]:
        return min(suitable, key=direction_difference)
    refusals = []
    for checkpoint in weights[::-1]:
        try:
            select_shells(checkpoint.card, acquisition, allow=allow)
        except Refusal as refusal:
            refusals.append(refusal)
        else:
            return checkpoint
    raise refusals[0] if refusals else Refusal(
        f"{name} found no weights: none are bundled, and none are in OUTPUT_DIR/group/models. "
        f"Train it first: qsphere BIDS_DIR OUTPUT_DIR group --train {name}")


def bundled_weights(name: str) -> Checkpoint | None:
    """Load the bundled weights of a method, if there are any."""
    folder = WEIGHTS / name
    return load(folder, name) if folder.is_dir() else None


class NetworkEstimator(Estimator, Trainable):
    """Estimator with a network that was trained at group level, or the bundled one."""

    @cached_property
    def weights(self) -> list[Checkpoint]:
        """All networks of the method (`find_weights`), loaded once."""
        return find_weights(self.name, self.context.models)

    def select(self, acquisition: Acquisition) -> Checkpoint:
        """Select the weights for a run (`select_weights`)."""
        return select_weights(self.name, self.weights, acquisition,
                              allow=self.context.allow_extrapolation)

    def check(self, acquisition: Acquisition) -> None:
        """Check that there are weights for an acquisition.

        Raises
        ------
        Refusal
            No network supports the acquisition.
        """
        self.select(acquisition)

    def violations(self, acquisition: Acquisition) -> list[str]:
        return self.select(acquisition).card.trained_for.violations(acquisition)


def select_shells(card: Card, acquisition: Acquisition, *, allow: bool = False
                  ) -> tuple[list[Shell], list[str]]:
    """Select the shells of a run that a network uses.

    Parameters
    ----------
    card : Card
        Card of the network.
    acquisition : Acquisition
        Acquisition of the run.
    allow : bool
        Whether a run outside of the training domain is accepted. All its shells are then used.

    Returns
    -------
    shells : list of Shell
    violations : list of str
        Differences between the run and the training domain; empty unless `allow`.

    Raises
    ------
    Refusal
        The run is outside of the training domain, and `allow` is not set or the network cannot be
        applied to its shells.
    """
    violations = card.trained_for.violations(acquisition)
    if not violations:
        return card.trained_for.usable_shells(acquisition), []
    shells, count = list(acquisition.shells), card.network.get("shells")
    possible = bool(shells) and acquisition.b0.any() and count in (None, len(shells))
    if not (allow and possible):
        small = max((s.b for s in shells), default=math.inf) < SMALL_B
        raise Refusal(
            f"{card.method} was not trained for this acquisition: {'; '.join(violations)}. "
            + "Check that b-values are in s/mm², not ms/µm²; " * small
            + f"{'l' if small else 'L'}eave it out of --estimate, or train it on such runs (group "
            f"--train {card.method}) if they determine its parameters."
            + (f" {OVERRIDE}" if possible else ""))
    return shells, violations


def describe_shells_used(card: Card, acquisition: Acquisition, shells: Sequence[Shell],
                         violations: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Describe which shells an estimate uses, and how they differ from those of the training.

    All shells within the ranges of the training are used even if there are more than in training.
    On simulated signals of five shells, weights trained with one to four had smaller errors with
    all shells than with any four, at the same coverage.

    Parameters
    ----------
    card : Card
        Card of the network.
    acquisition : Acquisition
        Acquisition of the run.
    shells, violations
        Results of `select_shells`.

    Returns
    -------
    parameters : dict
        Keys for the sidecar.
    notices : list of str
        Sentences for the report.
    """
    domain, short = card.trained_for, card.method.removeprefix("estimate_")
    parameters: dict[str, Any] = {}
    outside, notices = list(violations), list[str]()
    used = {tuple(s.indices) for s in shells}
    if dropped := [s for s in acquisition.shells if tuple(s.indices) not in used]:
        parameters["ShellsLeftOut"] = [round(s.b) for s in dropped]
        notices.append(f"{short}: left out {describe_shells(dropped)} s/mm². The network was "
                       f"trained for {domain.describe_ranges()}.")
    if violations:
        notices.append(f"{short}: used outside of the training domain because of "
                       f"--allow-extrapolation: {'; '.join(violations)}. Errors and intervals were "
                       "not measured for that.")
    max_shells = domain.shell_count[1] if domain.shell_count else len(shells)
    if len(shells) > max_shells:
        outside.append(f"{len(shells)} shells, trained with up to {max_shells}")
        notices.append(
            f"{short}: used {len(shells)} shells; the network was trained with up to {max_shells}. "
            "Errors and intervals were not measured for that. Compare with an estimate from "
            f"{max_shells} shells, or train a network for this acquisition (group --train "
            f"{card.method}).")
    if outside:
        parameters["OutOfDistribution"] = outside
    return parameters, notices
