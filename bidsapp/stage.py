"""Stage: a signal on its way through the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bidsapp.dwi import Dwi


@dataclass(frozen=True, eq=False)
class Stage:
    """A signal, and what the sidecars of all images made from it must say.

    Parameters
    ----------
    dwi : Dwi
        The signal inside the brain mask.
    desc : str
        `desc` entity of everything made from this signal; empty for the signal as measured.
    sources : tuple of str
        `bids:` URIs of the images that hold it, beside the files of the run.
    about : mapping
        Sidecar keys of everything made from it.
    no_intervals : str
        Why no estimator can give an interval from this signal, as a clause; empty where it can.
    widening : float
        Factor of all standard deviations, for the error of the steps before.
    tissue : callable, optional
        Gives (voxel, 3) probabilities of grey matter, white matter and CSF, or None, and a
        sentence on them; called where a method wants them.
    anatomy : callable, optional
        Gives the run's T1w image and where the diffusion images lie in it
        (`anatomy.t1w.Anatomy`); raises DataError where that cannot be had.
    """

    dwi: Dwi
    desc: str = ""
    sources: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    no_intervals: str = ""
    widening: float = 1.0
    tissue: Callable[[], tuple[np.ndarray | None, str]] = lambda: (None, "")
    anatomy: Callable[[], Any] = lambda: None
