"""Stage: a signal between the steps of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from bidsapp.dwi import T1W, Dwi


class Tissue(NamedTuple):
    """Tissue probabilities of the voxels of a signal.

    Attributes
    ----------
    values : (voxel, 3) float32, optional
        Grey matter, white matter and CSF; None: tissue comes from MD and FA.
    source : str
        `Dwi.tissue_source`.
    sentence : str
        Where they come from, for the log and the page.
    """

    values: np.ndarray | None = None
    source: str = T1W
    sentence: str = ""


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
        Returns Tissue. It is called if a method needs it.
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
    tissue: Callable[[], Tissue] = Tissue
    anatomy: Callable[[], Any] = lambda: None
