"""DWI preprocessed elsewhere: BIDS derivatives (QSIPrep and others), HCP-YA, UK Biobank; and masks.

BIDS derivatives: `sub-*/[ses-*/]dwi/*_desc-preproc_dwi.nii[.gz]` with .bval and .bvec beside it
and, if there is one, `*_[desc-brain_]mask.nii[.gz]`. HCP-YA: `SUBJ/T1w/Diffusion/data.nii.gz`.
UK Biobank: `SUBJ[_SESSION]/dMRI/dMRI/data_ud.nii.gz` (SUBJ_20250_SESSION_0, as bulk files are
named, too). Both with `bvals`, `bvecs` and `nodif_brain_mask[_ud].nii.gz` in the same folder.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bidsapp.bids.inherit import entities_of, here, nearest, sidecar, stem_of, suffix_of
from bidsapp.bids.names import ENTITIES
from bidsapp.dwi import Part, Run
from bidsapp.errors import DataError, UsageError

log = logging.getLogger(__name__)

IMAGES = (".nii.gz", ".nii")
FSL_LAYOUTS = {
    "T1w/Diffusion": ("data.nii.gz", "nodif_brain_mask.nii.gz"),
    "dMRI/dMRI": ("data_ud.nii.gz", "nodif_brain_mask_ud.nii.gz"),
}
"""Folder below a participant's: image and mask. The tables are called bvals and bvecs."""


@dataclass(frozen=True)
class Tree:
    """One folder of --derivatives.

    fsl: (entities, folder, image, mask name) of HCP-YA and UK Biobank participants.
    """

    name: str
    root: Path
    participants: frozenset[str]
    fsl: tuple[tuple[Mapping[str, str], Path, str, str], ...]

    @classmethod
    def of(cls, name: str, path: Path) -> Tree:
        """Raises UsageError: the folder is missing, or holds none of the known layouts."""
        root = path.absolute()
        if not root.is_dir():
            raise UsageError(f"--derivatives {name}={path}: is not a folder that exists.")
        fsl = tuple(_fsl(root))
        labels = {entities["sub"] for entities, *_ in fsl}
        labels.update(p.name[4:] for p in root.glob("sub-*") if p.is_dir() and
                      (any(p.glob("dwi")) or any(p.glob("ses-*/dwi"))))
        masks = any(suffix_of(p.name) == "mask" for p in root.glob("sub-*_mask.nii*"))
        if not labels and not masks and not any(root.glob("sub-*/")):
            raise UsageError(
                f"--derivatives {name}={path}: holds no preprocessed DWI and no masks. Understood "
                "are sub-*/[ses-*/]dwi/*_desc-preproc_dwi.nii.gz (QSIPrep and others), "
                "SUBJ/T1w/Diffusion/data.nii.gz (HCP-YA), SUBJ/dMRI/dMRI/data_ud.nii.gz "
                "(UK Biobank), and sub-*_mask.nii.gz.")
        return cls(name, root, frozenset(labels), fsl)


def runs(trees: Mapping[str, Tree], participant: str, problems: list[str]) -> list[Run]:
    """Preprocessed runs of a participant; of each session, those of the first tree that has any.

    What cannot be used is added to `problems`.
    """
    found: list[Run] = []
    for tree in trees.values():
        taken = {run.session for run in found}
        new = [*_bids_runs(tree, participant, problems), *_fsl_runs(tree, participant, problems)]
        for run in new:
            if run.session in taken:
                log.warning("%s: %s holds it too; the runs of %s are used.", run.name, tree.name,
                            next(r.dataset[0] for r in found if r.session == run.session))
            else:
                found.append(run)
    return found


def with_mask(run: Run, trees: Mapping[str, Tree]) -> Run:
    """The run with the mask of its own dataset, else of the first derivative that has one.

    A mask belongs to a run when all its entities, desc and label aside, are the run's (or its
    first part's), in the same space; the one with most entities wins.
    """
    if run.mask is not None:
        return run
    own = entities_of(run.parts[0].image.name)
    for tree in trees.values():
        matches = []
        for path in _masks(tree.root, run.participant, run.session):
            entities = _plain(entities_of(path.name))
            if entities.get("space") == run.entities.get("space") and (
                    entities.items() <= run.entities.items() or entities.items() <= own.items()):
                matches.append((len(entities), path))
        if matches:
            best = max(n for n, _ in matches)
            return replace(run, mask=min(path for n, path in matches if n == best))
    return run


def _masks(root: Path, participant: str, session: str | None) -> list[Path]:
    folders = [root, root / f"sub-{participant}", root / f"sub-{participant}" / "dwi"]
    if session is not None:
        folders += [root / f"sub-{participant}" / f"ses-{session}" / s for s in ("", "dwi")]
    return [path for folder in folders
            for path in folder.glob(f"sub-{participant}_*mask.nii*")
            if suffix_of(path.name) == "mask" and path.name.endswith(IMAGES) and path.exists()
            and entities_of(path.name).get("desc", "brain") == "brain"
            and "label" not in entities_of(path.name)]


def _plain(entities: Mapping[str, str]) -> dict[str, str]:
    """In BIDS order, without desc."""
    return {k: entities[k] for k in ENTITIES if k in entities and k != "desc"}


def _bids_runs(tree: Tree, participant: str, problems: list[str]) -> Iterator[Run]:
    folder = tree.root / f"sub-{participant}"
    for image in sorted([*folder.glob("dwi/*_dwi.nii*"), *folder.glob("ses-*/dwi/*_dwi.nii*")]):
        entities = entities_of(image.name)
        if not image.name.endswith(IMAGES) or entities.get("desc") != "preproc":
            continue
        try:
            stem = stem_of(image)
            btens = stem.with_name(stem.name + ".btens")
            part = Part(here(image), nearest(image, tree.root, ".bval"),
                        nearest(image, tree.root, ".bvec"),
                        btens if btens.exists() else None, sidecar(image, tree.root))
        except DataError as error:
            problems.append(str(error))
            continue
        run = Run(_plain(entities), (part,), dataset=(tree.name, tree.root))
        yield with_mask(run, {tree.name: tree})


def _fsl(root: Path) -> Iterator[tuple[Mapping[str, str], Path, str, str]]:
    for below, (image, mask) in FSL_LAYOUTS.items():
        for folder in sorted(root.glob(f"*/{below}")):
            match = re.fullmatch(r"(?:sub-)?([0-9A-Za-z]+?)(?:_20250_(\d+)_\d+|_(?:ses-)?"
                                 r"([0-9A-Za-z]+))?", folder.parents[1].name)
            if match is None:
                log.warning("%s: the participant's folder is not named SUBJ or SUBJ_SESSION; left "
                            "out.", folder)
                continue
            session = match[2] or match[3]
            yield ({"sub": match[1], **({"ses": session} if session else {})}, folder, image, mask)


def _fsl_runs(tree: Tree, participant: str, problems: list[str]) -> Iterator[Run]:
    for entities, folder, image, mask in tree.fsl:
        if entities["sub"] != participant:
            continue
        try:
            part = Part(*(here(folder / n) for n in (image, "bvals", "bvecs")),
                        metadata=_json(folder / image))
        except DataError as error:
            problems.append(str(error))
            continue
        yield Run(entities, (part,), folder / mask if (folder / mask).exists() else None,
                  (tree.name, tree.root))


def _json(image: Path) -> dict[str, Any]:
    path = stem_of(image).with_suffix(".json")
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as JSON ({error}). Correct or remove it.") \
            from error
