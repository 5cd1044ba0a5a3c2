"""Stage: a signal between the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bidsapp.dwi import Dwi


@dataclass(frozen=True, eq=False)
class Stage:
    """A signal, with the provenance that the sidecars of all images made from it must hold.

    Parameters
    ----------
    dwi : Dwi
        The signal inside the brain mask.
    desc : str
        `desc` entity of all outputs of this signal; empty for the measured signal.
    sources : tuple of str
        `bids:` URIs of the images of the signal, besides the files of the run.
    about : mapping
        Sidecar keys of all outputs of the signal.
    no_intervals : str
        Reason why estimators can give no intervals from this signal, as a clause; empty if they
        can.
    widening : float
        Factor of all standard deviations, which accounts for the error of the steps before.
    tissue : callable, optional
        Returns (voxel, 3) probabilities of grey matter, white matter and CSF, or None, and a
        sentence on them. It is called if a method needs them.
    """

    dwi: Dwi
    desc: str = ""
    sources: tuple[str, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    no_intervals: str = ""
    widening: float = 1.0
    tissue: Callable[[], tuple[np.ndarray | None, str]] = lambda: (None, "")
