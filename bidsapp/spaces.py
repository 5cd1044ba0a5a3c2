"""Output spaces: what --output-spaces names, and the templates behind the names.

niworkflows reads the names as fMRIPrep does; TemplateFlow says which template files a folder
holds. Both are imported only where an output space is named, and neither may use the network.
"""

from __future__ import annotations

import argparse
import difflib
import os
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from bidsapp.errors import UsageError

DWI, T1W, ACPC = "dwi", "T1w", "ACPC"
"""Spaces of the participant: of the diffusion images, of the T1w image, and of the T1w image turned
to the axes of MNI (`registration.acpc`)."""

HOME = "TEMPLATEFLOW_HOME"
"""Variable of the environment that names the folder of templates."""


@dataclass(frozen=True)
class Space:
    """A space that maps are resampled to.

    Parameters
    ----------
    name : str
        T1w, ACPC, or a template's name.
    cohort, res : str
        Labels of the template's cohort and resolution; empty where none was named.
    image, mask : Path, optional
        The template's T1w image and its brain mask.
    """

    name: str
    cohort: str = ""
    res: str = ""
    image: Path | None = None
    mask: Path | None = None

    @property
    def entities(self) -> dict[str, str]:
        """BIDS entities of the images in this space."""
        named = {"space": self.name, "cohort": self.cohort, "res": self.res}
        return {key: value for key, value in named.items() if value}

    def __str__(self) -> str:
        return ":".join([self.name, *(f"{k}-{v}" for k, v in self.entities.items()
                                      if k != "space")])


def home() -> Path:
    """Find the folder of templates as TemplateFlow does."""
    from platformdirs import user_cache_dir

    return Path(os.environ.get(HOME) or user_cache_dir("templateflow")).absolute()


@cache
def parse(names: tuple[str, ...]) -> tuple[Space, ...]:
    """Read the values of --output-spaces.

    Parameters
    ----------
    names : tuple of str
        `dwi`, `T1w`, `acpc`, or a template's name with `:res-N` and `:cohort-N` where wanted.

    Returns
    -------
    tuple of Space
        Each once, without `dwi`, in which all maps are written anyway.

    Raises
    ------
    UsageError
        A name means no space, or the files of a template are not here.
    """
    named = [name.rstrip(":") for name in names]
    asked = [name for name in named if name.lower() != ACPC.lower()]  # niworkflows lacks it
    aligned = (Space(ACPC),) * (len(asked) < len(named))
    if not set(asked) - {DWI}:
        return aligned
    niworkflows = _niworkflows()
    known = [DWI, T1W, ACPC, *niworkflows.SpatialReferences.standard_spaces]
    for name in (text.partition(":")[0] for text in asked):
        if name not in known:
            near = ([k for k in known if k.lower().startswith(name.lower())][:3]
                    or difflib.get_close_matches(name, known, 3, 0.5))
            raise UsageError(
                f"--output-spaces {name}: no such space. Needed is {DWI}, {T1W}, {ACPC} or a "
                f"template that {home()} ({HOME}) lists."
                + f" Did you mean {' or '.join(near)}?" * bool(near)
                + f" Another template of TemplateFlow must be fetched first. {_fetch(name)}")
    given = argparse.Namespace(spaces=None)
    try:
        niworkflows.OutputReferencesAction(["--output-spaces"], "spaces", nargs="+")(
            None, given, asked)
    except (ValueError, KeyError) as error:
        raise UsageError(f"--output-spaces {' '.join(names)}: "
                         f"{' '.join(str(error).split())}") from error
    return aligned + tuple(_space(reference) for reference in given.spaces.references
                           if reference.space != DWI)


def _space(reference: Any) -> Space:
    """The space of a reference of niworkflows, with its template's files."""
    if reference.dim != 3:
        raise UsageError(f"--output-spaces {reference.space} is a surface. Needed is a volume: "
                         f"{T1W} or the T1w image of a template.")
    if not reference.standard:
        return Space(reference.space)
    if unknown := reference.spec.keys() - {"cohort", "res", "resolution"}:
        raise UsageError(f"--output-spaces {reference}: {', '.join(unknown)} is not known. Needed "
                         "is res-N or cohort-N after the template's name.")
    cohort = str(reference.spec.get("cohort", ""))
    res = str(reference.spec.get("res", reference.spec.get("resolution", "native")))
    space = Space(reference.space, cohort, "" if res == "native" else res)
    if space.res and not space.res.isdecimal():
        raise UsageError(f"--output-spaces {space}: the resolution is a number of the template's "
                         f"own, as res-1. For a size in mm give {space.name} and "
                         "--output-resolution MM.")
    from templateflow import api

    query = {"cohort": cohort} if cohort else {}
    images = api.ls(space.name, suffix="T1w", desc=None, extension=".nii.gz", **query)
    wanted = [image for image in images if not space.res or _resolution(image) == int(space.res)]
    for image in wanted:
        mask = image.with_name(image.name.replace("_T1w.nii.gz", "_desc-brain_mask.nii.gz"))
        if _is_here(image) and _is_here(mask):
            return Space(space.name, cohort, space.res, image, mask)
    if not wanted:
        raise UsageError(
            f"--output-spaces {space}: {home()} ({HOME}) lists no T1w image of it. "
            + (f"There is res-{', res-'.join(str(_resolution(i)) for i in images)}."
               if images else "Name another template."))
    raise UsageError(
        f"--output-spaces {space}: {wanted[0].name} or its brain mask (desc-brain_mask) is not in "
        f"{home()}. Needed are both, for nothing is downloaded at run time. "
        + _fetch(space.name, resolution=_resolution(wanted[0]), cohort=cohort))


def _fetch(template: str, **more: Any) -> str:
    """Say how a template is fetched. more: keys of the query, left out where they are empty."""
    keys = "".join(f", {key}={value}" for key, value in more.items() if value)
    return (f"On a machine with network run: {HOME}={home()} python -c \"from templateflow.api "
            f"import get; get('{template}', suffix=['T1w', 'mask'], desc=[None, 'brain'], "
            f"extension='.nii.gz'{keys})\", and let {HOME} name that folder here.")


def _resolution(image: Path) -> int:
    """N of res-N in the name of a template; 0 where it has none."""
    label = next((part[4:] for part in image.name.split("_") if part.startswith("res-")), "0")
    return int(label) if label.isdecimal() else 0


def _is_here(path: Path) -> bool:
    """TemplateFlow keeps an empty file in the place of one that was not fetched."""
    return path.is_file() and path.stat().st_size > 0


def _niworkflows() -> ModuleType:
    """Import niworkflows.utils.spaces, which lists the templates of TEMPLATEFLOW_HOME.

    TemplateFlow fills an empty folder with 2,500 empty files; it gets a temporary one for that.
    """
    here = home()
    with warnings.catch_warnings(), tempfile.TemporaryDirectory() as empty:
        warnings.simplefilter("ignore")
        before = os.environ.get(HOME)
        if not (here.is_dir() and any(here.iterdir())):
            os.environ[HOME] = empty
        try:
            from niworkflows.utils import spaces
        finally:
            os.environ.pop(HOME, None)
            if before is not None:
                os.environ[HOME] = before
    return spaces


