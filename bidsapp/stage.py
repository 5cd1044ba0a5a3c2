"""Stage: a signal between the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bidsapp.dwi import Dwi


@dataclass(frozen=True, eq=False)
class Stage:
    """A signal, with what later steps need for the sidecars and intervals of maps made from it.

    Parameters
    ----------
    dwi : Dwi
        The signal inside the brain mask.
    desc : str
        `desc` entity of all outputs of this signal; empty for the measured signal.
    sources : tuple of str
        `bids:` URIs of the images of the signal, besides the files of the run.
    about : mapping
        Entries in the sidecars of all outputs of this signal.
    no_intervals : str
        Reason, as a clause, why no estimator can give an interval from this signal; empty if
        estimators can.
    widening : float
        Factor of the standard deviations of all maps, for the error of the harmonizer; 1 without.
    tissue : callable, optional
        Returns (voxel, 3) probabilities of grey matter, white matter and CSF, or None, and a
        sentence on them. It is called if a method needs them.
    anatomy : callable, optional
        Returns the T1w image of the run and where the diffusion images lie in it
        (`anatomy.t1w.Anatomy`); raises DataError if there is none that can be used.
    """

    dwi: Dwi
    desc: str = ""
    sources: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    no_intervals: str = ""
    widening: float = 1.0
    tissue: Callable[[], tuple[np.ndarray | None, str]] = lambda: (None, "")
    anatomy: Callable[[], Any] = lambda: None
