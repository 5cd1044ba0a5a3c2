"""The training domain of a checkpoint: acquisitions, voxel sizes, sites and participants.

Each method with trained weights checks a run against it before it uses them. b-values are in s/mm².
A domain has one of two forms. Training for one protocol (`shell_count` is None) gives the shells of
its runs. Training for many, by simulation, draws `shell_count` shells from the ranges `shells`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bidsapp.acquisition import (
    SAME_B,
    SAME_SHAPE,
    Acquisition,
    Shell,
    describe_shape,
    describe_shells,
)
from bidsapp.errors import Refusal

RANGE_TOLERANCE = 0.01
"""Share by which the mean b of a shell may lie outside a range that shells are drawn from, such as
499.6 for 500 s/mm²."""

DIRECTIONS = 0.1
"""Share by which a shell may have fewer or more directions than in training, as if a volume was
dropped."""

VOXEL = 0.05
"""Share by which an edge of the voxel may be shorter or longer than in training."""

OVERRIDE = "To continue, give --allow-extrapolation, which is noted in every sidecar."
"""Sentence for messages about a run outside the training domain."""


@dataclass(frozen=True)
class ShellRange:
    """The range of one shell over the training runs, or from which simulated shells are drawn.

    Parameters
    ----------
    b : tuple of float
        Smallest and largest mean b-value, s/mm².
    b_delta : float
        Shape of the b-tensors: 1 linear, 0 spherical, −0.5 planar.
    directions : tuple of int
        Smallest and largest number of volumes.

    Raises
    ------
    ValueError
        A range is invalid, or b_delta lies outside [−0.5, 1].
    """

    b: tuple[float, float]
    b_delta: float
    directions: tuple[int, int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "b", _range("b", self.b, float, 0))
        object.__setattr__(self, "directions", _range("directions", self.directions, int, 1))
        if not -0.5 - SAME_SHAPE <= self.b_delta <= 1 + SAME_SHAPE:
            raise ValueError(f"b_delta is {self.b_delta!r}; a number from -0.5 to 1 is needed")

    @property
    def middle(self) -> float:
        """Middle of the range of b-values, s/mm²."""
        return sum(self.b) / 2

    @property
    def name(self) -> str:
        """Name of the shell in tables and metrics: `b1000`, with `d0` after it for b_delta 0."""
        shape = "" if abs(self.b_delta - 1) <= SAME_SHAPE else f"d{100 * self.b_delta:.0f}"
        return f"b{self.middle:.0f}{shape}"

    @property
    def part(self) -> str:
        """Name of the part of a checkpoint that belongs to the shell: `shell-1000`."""
        return f"shell-{self.name.removeprefix('b')}"

    def holds(self, shell: Shell, tolerance: float) -> bool:
        """Tell whether a shell has this b-tensor shape and lies in the range of b.

        Parameters
        ----------
        shell : Shell
            Shell of a run.
        tolerance : float
            Share of b by which it may lie outside the range.
        """
        low, high = self.b
        return ((1 - tolerance) * low <= shell.b <= (1 + tolerance) * high
                and abs(shell.b_delta - self.b_delta) <= SAME_SHAPE)


@dataclass(frozen=True)
class TrainingDomain:
    """Acquisitions, sites and participants that a checkpoint may be used for.

    Parameters
    ----------
    shells : tuple of ShellRange
        Without `shell_count`: the shells that a run must have, no more and no fewer, ascending in
        b. With `shell_count`: ranges of shells; a shell is used if it lies in one of them.
    b0 : tuple of int
        Smallest and largest number of b0 volumes in training. If the smallest is 1 or more, a run
        must have a b0 volume, whatever their number.
    shell_count : tuple of int, optional
        Smallest and largest number of shells in training. A run must have the smallest number
        within `shells`; more than the largest is no violation.
    snr : tuple of float, optional
        Smallest and largest SNR of the b0 signal.
    voxel_size : tuple of (float, float)
        Ranges of the shortest, middle and longest edge of the voxel, mm; empty for any.
    sites : tuple of str
        Sites of the runs that the checkpoint may be applied to; empty for any.
    covariates : mapping
        Covariates of the participants: the range of a number, such as age, or the categories.

    Raises
    ------
    ValueError
        A value has another form.
    """

    shells: tuple[ShellRange, ...]
    b0: tuple[int, int]
    shell_count: tuple[int, int] | None = None
    snr: tuple[float, float] | None = None
    voxel_size: tuple[tuple[float, float], ...] = ()
    sites: tuple[str, ...] = ()
    covariates: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        put("shells", tuple(s if isinstance(s, ShellRange) else ShellRange(**s)
                            for s in self.shells))
        put("b0", _range("b0", self.b0, int, 0))
        if self.shell_count is not None:
            put("shell_count", _range("shell_count", self.shell_count, int, 1))
        if self.snr is not None:
            put("snr", _range("snr", self.snr, float, 0))
        put("voxel_size", tuple(_range("voxel_size", edge, float, 0) for edge in self.voxel_size))
        put("sites", tuple(self.sites))
        put("covariates", {name: tuple(values) if all(isinstance(v, str) for v in values) and values
                           else _range(name, values, float, -math.inf)
                           for name, values in self.covariates.items()})
        if not self.shells or len(self.voxel_size) not in (0, 3):
            raise ValueError(f"there are {len(self.shells)} shells and {len(self.voxel_size)} "
                             "edges of the voxel; at least one shell and 0 or 3 edges are needed")
        if not all(isinstance(site, str) for site in self.sites):
            raise ValueError(f"sites are {self.sites!r}, not text")

    @classmethod
    def from_acquisitions(cls, acquisitions: Sequence[Acquisition], **more: Any) -> TrainingDomain:
        """Describe acquisitions that have the same shells, without `shell_count`.

        Parameters
        ----------
        acquisitions : sequence of Acquisition
            Acquisitions of the runs of a training. Their shells are matched in order; the caller
            ensures that they are alike.
        **more
            Other fields of the domain.

        Returns
        -------
        TrainingDomain

        Raises
        ------
        ValueError
            The numbers of shells differ.
        """
        shells = tuple(
            ShellRange((round(min(s.b for s in same), 1), round(max(s.b for s in same), 1)),
                       round(sum(s.b_delta for s in same) / len(same), 3),
                       (min(map(len, same)), max(map(len, same))))
            for same in zip(*(a.shells for a in acquisitions), strict=True))
        b0 = [int(a.b0.sum()) for a in acquisitions]
        return cls(shells, (min(b0), max(b0)), **more)

    def violations(self, acquisition: Acquisition, voxel_size: Sequence[float] | None = None,
                   site: str | None = None) -> list[str]:
        """List the violations of the training domain by a run.

        Parameters
        ----------
        acquisition : Acquisition
            Acquisition of the run.
        voxel_size : sequence of float, optional
            Edges of the voxel in any order, mm; default: they are not checked.
        site : str, optional
            Site of the run; default: it is not checked.

        Returns
        -------
        list of str
            Clauses that say what was found and what is needed; empty for a run in the domain.
        """
        violations = []
        if self.sites and site is not None and site not in self.sites:
            violations.append(f"the batch is {site}, known are {', '.join(self.sites)}")
        if self.b0[0] and not acquisition.b0.any():
            violations.append("the run has 0 volumes without weighting, needed is a b0")
        shells, usable = acquisition.shells, self.usable_shells(acquisition)
        if self.shell_count is not None:
            complete = len(usable) >= self.shell_count[0]
        else:
            complete = len(usable) == len(shells) == len(self.shells)
        if not complete:
            violations.append(f"the run has {describe_shells(shells)} s/mm², needed are "
                              f"{self._describe_shells()}")
        elif self.shell_count is None:
            for shell, trained in zip(shells, self.shells, strict=True):
                fewest, most = trained.directions
                if not (1 - DIRECTIONS) * fewest <= len(shell) <= (1 + DIRECTIONS) * most:
                    violations.append(f"{len(shell)} directions at b = {shell.b:.0f} s/mm², "
                                      f"{describe_range(fewest, most)} were seen in training")
        edges = list(zip(sorted(() if voxel_size is None else voxel_size), self.voxel_size,
                         strict=False))
        if any(not (1 - VOXEL) * low <= edge <= (1 + VOXEL) * high for edge, (low, high) in edges):
            violations.append(
                "the voxel is " + " × ".join(f"{edge:.3g}" for edge, _ in edges)
                + " mm, seen in training were "
                + " × ".join(describe_range(low, high) for _, (low, high) in edges) + " mm")
        return violations

    def warnings(self, snr: float | None, covariates: Mapping[str, Any]) -> list[str]:
        """List differences from the training that are worth a check but no violation.

        Parameters
        ----------
        snr : float, optional
            SNR of the run.
        covariates : mapping
            Covariates of the participant; unknown ones are not checked.

        Returns
        -------
        list of str
            Sentences.
        """
        ranges = {**({"SNR": self.snr} if self.snr else {}), **self.covariates}
        warnings = []
        for name, trained in ranges.items():
            value = snr if name == "SNR" else covariates.get(name)
            if value is None or value != value:
                continue
            if isinstance(trained[0], str):
                within, among = str(value) in trained, ", ".join(trained)
            else:
                low, high = trained
                within = not isinstance(value, int | float) or low <= value <= high
                among = describe_range(low, high)
            if not within:
                text = f"{value:.3g}" if isinstance(value, float) else value
                warnings.append(f"{name} is {text}, and {among} in the training.")
        return warnings

    def usable_shells(self, acquisition: Acquisition) -> list[Shell]:
        """Select the shells of a run that lie in the training domain.

        Without `shell_count`, the first shell of the run is compared with the first of the
        training, and so on, whatever their number of directions. With it, a shell may lie in any of
        the ranges, and needs at least the smallest number of directions of that range, unless its
        b-tensors are spherical. More directions than in training do no harm, since they carry less
        noise.

        Parameters
        ----------
        acquisition : Acquisition
            Acquisition of the run.

        Returns
        -------
        list of Shell
        """
        if self.shell_count is None:
            return [shell for shell, trained in zip(acquisition.shells, self.shells, strict=False)
                    if trained.holds(shell, SAME_B)]
        return [shell for shell in acquisition.shells if any(
            trained.holds(shell, RANGE_TOLERANCE)
            and (len(shell) >= trained.directions[0] or abs(shell.b_delta) < SAME_SHAPE)
            for trained in self.shells)]

    def nearest_shells(self, acquisition: Acquisition) -> list[int]:
        """Find the shell of the training that is nearest in b, for each shell of a run.

        Parameters
        ----------
        acquisition : Acquisition
            Acquisition of the run.

        Returns
        -------
        list of int
            Indices into `shells`, with the same b-tensor shape.

        Raises
        ------
        Refusal
            The training has no shell of that shape.
        """
        indices = []
        for shell in acquisition.shells:
            alike = [i for i, trained in enumerate(self.shells)
                     if abs(trained.b_delta - shell.b_delta) <= SAME_SHAPE]
            if not alike:
                raise Refusal(
                    f"the run has a shell of b_delta {shell.b_delta:.2g} at b = {shell.b:.0f} "
                    "s/mm², but the training had none of this b-tensor shape. Train on such runs.")
            indices.append(min(alike, key=lambda i: abs(self.shells[i].middle - shell.b)))
        return indices

    def describe_ranges(self) -> str:
        """Describe the ranges of shells for messages.

        An example is `b = 500–5000 s/mm², 6 or more directions, b_delta 1`.
        """
        shapes: dict[tuple[Any, int], list[str]] = {}
        for s in self.shells:
            shapes.setdefault((s.b, s.directions[0]), []).append(f"{s.b_delta:g}")
        return " or ".join(f"b = {low:.0f}–{high:.0f} s/mm², {fewest} or more directions, b_delta "
                           + ", ".join(texts) for ((low, high), fewest), texts in shapes.items())

    def _describe_shells(self) -> str:
        if self.shell_count is not None:
            return f"{self.shell_count[0]} or more shells of {self.describe_ranges()}"
        return ", ".join(f"{describe_range(*s.directions)} × b {s.middle:.0f}"
                         + describe_shape(s.b_delta) for s in self.shells) + " s/mm²"


def describe_range(low: float, high: float) -> str:
    """Describe a range for messages: `12–14`, or `12` if both ends are equal."""
    return f"{low:.3g}" if low == high else f"{low:.3g}–{high:.3g}"


def _range(name: str, values: Any, number: Any, minimum: float) -> tuple[Any, Any]:
    """Convert to an ascending pair of numbers, or raise ValueError."""
    pair = tuple(values) if isinstance(values, list | tuple) else ()
    if not (len(pair) == 2 and all(isinstance(v, int | float) and math.isfinite(v) for v in pair)
            and minimum <= pair[0] <= pair[1] and all(number(v) == v for v in pair)):
        raise ValueError(f"{name} is {values!r}; two ascending numbers of at least {minimum} are "
                         "needed")
    return number(pair[0]), number(pair[1])
