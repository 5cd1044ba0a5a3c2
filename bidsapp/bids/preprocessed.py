"""Find preprocessed runs, brain masks and T1w images: BIDS derivatives, HCP-YA, UK Biobank.

- BIDS derivatives (QSIPrep and others): `sub-*/[ses-*/]dwi/*_desc-preproc_dwi.nii[.gz]`, and masks
  `*_mask.nii[.gz]` in the same folder or at the root of the dataset.
- HCP-YA: `SUBJ/T1w/Diffusion/data.nii.gz`.
- UK Biobank: `SUBJ[_SESSION]/dMRI/dMRI/data_ud.nii.gz`, or SUBJ_20250_SESSION_0, the name of its
  bulk files.

HCP-YA and UK Biobank have `bvals`, `bvecs` and `nodif_brain_mask[_ud].nii.gz` in the same folder.
T1w images are in `anat/`, or are HCP-YA's `SUBJ/T1w/T1w_acpc_dc_restore.nii.gz`. They are looked up
for each run, since an index of anat/ would take longer than everything else.
"""

from __future__ import annotations

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from bidsapp.bids.index import build_index, find_files, label_order, list_participants
from bidsapp.bids.inherit import entities_of, ordered, read_json, read_part, require_file, stem_of
from bidsapp.dwi import Part, Run
from bidsapp.errors import UsageError

log = logging.getLogger(__name__)
T = TypeVar("T")

FSL_LAYOUTS = {
    "T1w/Diffusion": ("data.nii.gz", "nodif_brain_mask.nii.gz"),
    "dMRI/dMRI": ("data_ud.nii.gz", "nodif_brain_mask_ud.nii.gz"),
}
"""Layouts of HCP-YA and UK Biobank: file names of image and mask, by folder below the
participant's. The tables have FSL's names, bvals and bvecs."""

FSL_NAME = re.compile(r"(?:sub-)?([0-9A-Za-z]+?)(?:_20250_(\d+)_\d+|_(?:ses-)?([0-9A-Za-z]+))?")
"""Name of a participant's folder in these layouts, with its label and session as groups."""


@dataclass(frozen=True)
class Derivative:
    """A dataset of --derivatives, or BIDS_DIR if it is a derivative: preprocessed runs and masks.

    Parameters
    ----------
    name : str
        Its name in --derivatives; `raw` for BIDS_DIR.
    root : Path
        Its root.
    labels : frozenset of str
        Labels of its participants.
    images, masks : mapping
        DWIs and brain masks with BIDS names, by participant.
    fsl : mapping
        Entities, folder, image and mask of the runs in the layouts of HCP-YA and UK Biobank, by
        participant.
    """

    name: str
    root: Path
    labels: frozenset[str]
    images: Mapping[str, Sequence[Path]]
    masks: Mapping[str, Sequence[Path]]
    fsl: Mapping[str, Sequence[tuple[dict[str, str], Path, str, str]]]

    @classmethod
    def read(cls, name: str, path: Path, wanted: Collection[str], filters: Mapping[str, Any]
             ) -> Derivative:
        """Read a dataset of --derivatives NAME=PATH.

        Parameters
        ----------
        name, path
            Name and root of the dataset.
        wanted : collection of str
            Labels of the participants whose DWIs and masks are needed; empty: all.
        filters : mapping
            Filters of the DWIs, from --bids-filter-file.

        Returns
        -------
        Derivative

        Raises
        ------
        UsageError
            The folder is missing, cannot be indexed, or has none of the known layouts.
        """
        root = path.absolute()
        if not root.is_dir():
            raise UsageError(f"--derivatives {name}={path}: is not a folder that exists.")
        fsl = _by_label(_fsl_folders(root), lambda item: item[0])
        labels = list_participants(root).union(fsl)
        layout = build_index(root, participants=wanted, validate=False, derivative=True)
        images = find_files(layout, "dwi", {"desc": "preproc", **filters})
        masks = [m for m in find_files(layout, "mask", {}) if m.exists()
                 and {"desc": "brain", **entities_of(m.name)}["desc"] == "brain"
                 and "label" not in entities_of(m.name)]
        if not wanted and not (images or masks or fsl):
            raise UsageError(
                f"--derivatives {name}={path}: holds no preprocessed DWI and no masks. Supported "
                "are sub-*/[ses-*/]dwi/*_desc-preproc_dwi.nii.gz (QSIPrep and others), "
                "SUBJ/T1w/Diffusion/data.nii.gz (HCP-YA), SUBJ/dMRI/dMRI/data_ud.nii.gz "
                "(UK Biobank), and sub-*_mask.nii.gz.")
        if not (images or masks or fsl):
            log.warning("--derivatives %s: has no data of sub-%s.", name, ", sub-".join(wanted))
        return cls(name, root, frozenset(labels), by_label(images), by_label(masks), fsl)

    def sources(self, label: str) -> list[tuple[str | None, Callable[[], Run]]]:
        """List the session of each preprocessed run of a participant, and a function that reads it.

        The function raises DataError if a file is missing or a sidecar cannot be read.
        """
        return [*((entities_of(path.name).get("ses"), partial(self._bids_run, path))
                  for path in self.images.get(label, ())),
                *((item[0].get("ses"), partial(self._fsl_run, *item))
                  for item in self.fsl.get(label, ()))]

    def mask_of(self, run: Run) -> Path | None:
        """Find the brain mask of a run.

        All entities of the mask, except desc, must be those of the run or of its first part, and
        both must have the same `space` or none. Of several masks the one with the most entities is
        returned; None if there is none.
        """
        part_entities = entities_of(run.parts[0].image.name).items()
        matches = []
        for path in self.masks.get(run.participant, ()):
            entities = without_desc(entities_of(path.name))
            if entities.get("space") == run.entities.get("space") and (
                    entities.items() <= run.entities.items() or entities.items() <= part_entities):
                matches.append((-len(entities), path))
        return min(matches)[1] if matches else None

    def _bids_run(self, image: Path) -> Run:
        part = read_part(image, self.root)
        run = Run(without_desc(entities_of(image.name)), (part,), dataset=(self.name, self.root),
                  preprocessed=True)
        return replace(run, mask=self.mask_of(run))

    def _fsl_run(self, entities: dict[str, str], folder: Path, image: str, mask: str) -> Run:
        sidecar = stem_of(folder / image).with_suffix(".json")
        part = Part(require_file(folder / image), require_file(folder / "bvals"),
                    require_file(folder / "bvecs"),
                    metadata=read_json(sidecar) if sidecar.exists() else {})
        t1w = folder.parent / "T1w_acpc_dc_restore.nii.gz"
        return Run(entities, (part,), folder / mask if (folder / mask).exists() else None,
                   t1w if t1w.exists() else None, dataset=(self.name, self.root),
                   preprocessed=True)


def with_anatomy(run: Run, roots: Iterable[Path]) -> Run:
    """Add a T1w image to a run, with the tissue probabilities beside it if there are any.

    The first dataset that has one is used, and in it the first of these folders: that of the run's
    session, that of the participant, those of other sessions. An image with `desc-preproc` is
    preferred. Images are not used if they name another `space` than the run, another `desc`, a
    contrast agent (`ce`), or a `part` other than `mag`.

    Parameters
    ----------
    run : Run
        A run with or without a T1w image.
    roots : iterable of Path
        Roots of the datasets, the preferred first.

    Returns
    -------
    Run
    """
    if run.t1w:
        return run
    for root in roots:
        participant = root / f"sub-{run.participant}"
        same_session = [participant / f"ses-{run.session}/anat"] if run.session else []
        for folder in dict.fromkeys([*same_session, participant / "anat",
                                     *sorted(participant.glob("ses-*/anat"))]):
            images = [p for p in folder.glob("*_T1w.nii*")
                      if _is_usable_t1w(entities_of(p.name), run)]
            if images:
                t1w = min(images, key=lambda p: ("desc" not in entities_of(p.name),
                                                 len(entities_of(p.name)), label_order(p.name)))
                return replace(run, t1w=t1w, probsegs=_probsegs(t1w))
    return run


def _is_usable_t1w(entities: Mapping[str, str], run: Run) -> bool:
    return (entities.get("desc", "preproc") == "preproc" and "ce" not in entities
            and entities.get("part", "mag") == "mag"
            and entities.get("space") in (None, run.entities.get("space")))


def _probsegs(t1w: Path) -> tuple[Path, ...]:
    """Find the grey matter, white matter and CSF probabilities beside a T1w image; () unless all
    three exist."""
    entities = {k: v for k, v in entities_of(t1w.name).items() if k != "desc"}
    probsegs = {tuple(sorted(entities_of(p.name).items())): p
                for p in t1w.parent.glob("*_probseg.nii*")}
    maps = [probsegs.get(tuple(sorted({**entities, "label": label}.items())))
            for label in ("GM", "WM", "CSF")]
    return tuple(m for m in maps if m) if all(maps) else ()


def by_label(paths: Iterable[Path]) -> dict[str, list[Path]]:
    """Group BIDS files by the label of their participant."""
    return _by_label(paths, lambda path: entities_of(path.name))


def _by_label(items: Iterable[T], entities: Callable[[T], Mapping[str, str]]) -> dict[str, list[T]]:
    groups: dict[str, list[T]] = defaultdict(list)
    for item in items:
        groups[entities(item).get("sub", "")].append(item)
    return dict(groups)


def without_desc(entities: Mapping[str, str]) -> dict[str, str]:
    """Sort entities in BIDS order and remove desc, since outputs have one of their own."""
    return {k: v for k, v in ordered(entities).items() if k != "desc"}


def _fsl_folders(root: Path) -> Iterator[tuple[dict[str, str], Path, str, str]]:
    """Yield entities, folder, and names of image and mask of each run in FSL_LAYOUTS."""
    for below, (image, mask) in FSL_LAYOUTS.items():
        for folder in sorted(root.glob(f"*/{below}")):
            match = FSL_NAME.fullmatch(folder.parents[1].name)
            if match is None:
                log.warning("%s: left out, since the participant's folder is not named SUBJ or "
                            "SUBJ_SESSION.", folder)
                continue
            session = match[2] or match[3]
            yield {"sub": match[1], **({"ses": session} if session else {})}, folder, image, mask
