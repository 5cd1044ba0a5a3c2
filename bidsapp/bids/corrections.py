"""Find what corrects a raw run: opposite phase encodings, GRE field maps, phase images.

Field maps are read from the folders `fmap` and `dwi` of the run's session, not from the index of
the dataset. Those that B0FieldSource of the run names (by B0FieldIdentifier) are taken; where there
are none, those whose IntendedFor names the run; where there are none either, those of the session
that are not intended for another image, with a notice. Whatever is broken costs the field map to
which it belongs, with a notice, and nothing else.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp.acquisition import PhaseEncoding
from bidsapp.bids.index import label_order
from bidsapp.bids.inherit import entities_of, here, name_of, read_part, sidecar
from bidsapp.dwi import FIELD_MAPS, FieldMap, ImageFile, Part, Run, open_image
from bidsapp.errors import DataError

SAME_AXIS = np.cos(np.radians(10))
"""Image axes whose directions in the world differ by less count as the same."""

GRE_KINDS = {"phasediff": "phasediff", "phase1": "phases", "phase2": "phases",
             "fieldmap": "fieldmap"}
MAGNITUDES = ("magnitude", "magnitude1", "magnitude2")


@dataclass(frozen=True)
class Candidate:
    """A field map, and what its sidecars say of the images it is for.

    identifiers: its B0FieldIdentifier. intended: the files that its IntendedFor names and that
    exist.
    """

    field_map: FieldMap
    identifiers: frozenset[str]
    intended: frozenset[Path]

    @cached_property
    def axes(self) -> np.ndarray:
        """(3, 3): directions of the image axes of its first image, as columns.

        Raises
        ------
        DataError
            The image cannot be opened.
        """
        linear = open_image(self.field_map.images[0].image).affine[:3, :3]
        return np.asarray(linear / np.linalg.norm(linear, axis=0))


@dataclass(frozen=True)
class Session:
    """The candidates of a session, and notices on those that cannot be used."""

    candidates: Sequence[Candidate]
    notices: tuple[str, ...]


def read_session(folder: Path, root: Path, parts: Iterable[Part]) -> Session:
    """Read every field map of a session, and its DWIs as such.

    Parameters
    ----------
    folder : Path
        `sub-<label>` or `sub-<label>/ses-<label>`.
    root : Path
        Of the dataset.
    parts : iterable of Part
        DWIs that were read already; others of the session, which a filter left out, may correct
        them, too.

    Returns
    -------
    Session
        GRE field maps as wholes; EPIs and DWIs one by one.
    """
    candidates: list[Candidate] = []
    notices: list[str] = []
    # phases of two echoes, and magnitudes, by the entities that all of one field map share
    groups: dict[tuple[Any, ...], list[ImageFile]] = defaultdict(list)
    magnitudes: dict[tuple[tuple[str, str], ...], list[ImageFile]] = defaultdict(list)
    for path in _images(folder / "fmap"):
        suffix, entities = _suffix(path), tuple(sorted(entities_of(path.name).items()))
        try:
            image = ImageFile(here(path), sidecar(path, root))
            if suffix == "epi":
                candidates.append(_candidate(FieldMap("opposite", (image,)), root, notices))
            elif suffix in MAGNITUDES:
                magnitudes[entities].append(image)
            elif suffix in GRE_KINDS:
                groups[GRE_KINDS[suffix], entities].append(image)
        except (DataError, OSError) as error:
            notices.append(f"A field map is not used: {error}")
    for (kind, entities), images in groups.items():
        try:
            field_map = FieldMap(kind, tuple(images), tuple(magnitudes[entities]))
            candidates.append(_candidate(field_map, root, notices))
        except DataError as error:
            notices.append(f"A field map is not used: {error}")
    known = {part.image: part for part in parts}
    for path in _images(folder / "dwi"):
        if _suffix(path) == "dwi" and entities_of(path.name).get("part", "mag") == "mag":
            try:
                part = known.get(path) or read_part(path, root)
                if PhaseEncoding.of_sidecar(part.metadata):
                    candidates.append(_candidate(FieldMap("opposite", (part,)), root, notices))
            except DataError:  # it is a run, or left out on purpose: that is told elsewhere
                continue
    return Session(candidates, tuple(notices))


def find_corrections(run: Run, root: Path, session: Session) -> Run:
    """Add to a raw run its phase encoding, field maps and phase images, with notices.

    Parameters
    ----------
    run : Run
        As measured.
    root : Path
        Of its dataset.
    session : Session
        What `read_session` gave for the run's session.
    """
    notices = list(session.notices)
    try:
        encoding = PhaseEncoding.of_sidecar(run.metadata)
        run = replace(run, phase_encoding=encoding)
        if encoding is None:
            notices.append("Distortion cannot be corrected: the sidecar has no "
                           "PhaseEncodingDirection. Add it.")
    except DataError as error:
        notices.append(f"Distortion cannot be corrected: {run.parts[0].image}: {error}")
    field_maps = _field_maps(run, session.candidates, notices) if run.phase_encoding else ()
    phase = _phase(run, root, notices)
    return replace(run, field_maps=tuple(field_maps), phase=phase, notices=tuple(notices))


def _field_maps(run: Run, candidates: Sequence[Candidate], notices: list[str]) -> list[FieldMap]:
    """Those of the first rule that gives any, the most trusted first."""
    images = {part.image for part in run.parts}
    parts = [c for c in candidates if c.field_map.images[0].image in images]
    others = [c for c in candidates if c.field_map.images[0].image not in images]
    sources = _strings(run.metadata.get("B0FieldSource"))
    notices += [f"B0FieldSource names {source[:40]}, which is the B0FieldIdentifier of no other "
                "image of the session that can be used. Correct one of them."
                for source in sources if not any(source in c.identifiers for c in others)]
    for rule, groups in (
            ("B0FieldSource", [[c for c in others if source in c.identifiers]
                               for source in sources]),
            ("IntendedFor", [[c] for c in others if c.intended & images]),
            ("session", [[c] for c in others if not c.intended])):
        used = [replace(m, rule=rule) for group in groups for m in _usable(group, parts, notices)]
        if used:
            if rule == "session":
                notices.append("No sidecar says which field map belongs to this run; those of its "
                               "session are taken. Say it by IntendedFor or B0FieldSource.")
            return sorted(used, key=lambda m: ([*FIELD_MAPS].index(m.kind), -_shared(m, run)))
        if rule != "session" and any(groups):
            notices.append(f"What {rule} names does not encode phase in the opposite direction.")
    notices.append("No field map was found: no image of the session has the opposite phase "
                   "encoding, and none is a GRE field map.")
    return []


def _shared(field_map: FieldMap, run: Run) -> int:
    """How many entities its first image and the run share: images of one protocol share more."""
    return len(run.entities.items() & entities_of(field_map.images[0].image.name).items())


def _usable(group: Sequence[Candidate], parts: Sequence[Candidate], notices: list[str]
            ) -> Iterator[FieldMap]:
    """GRE field maps of a group, and one of its other images where two of them, or one and a DWI
    of the run, have opposite phase encodings."""
    yield from (c.field_map for c in group if c.field_map.kind != "opposite")
    epis = [c for c in group if c.field_map.kind == "opposite"]
    for first, second in combinations([*epis, *parts], 2):
        one, other = (PhaseEncoding.of_sidecar(c.field_map.images[0].metadata)
                      for c in (first, second))
        if one and one.opposes(other):
            try:
                cosine = first.axes[:, one.axis] @ second.axes[:, one.axis]
            except DataError as error:
                notices.append(f"A field map is not used: {error}")
                continue
            if cosine > SAME_AXIS:
                yield FieldMap("opposite", tuple(i for c in epis for i in c.field_map.images))
                return


def _phase(run: Run, root: Path, notices: list[str]) -> tuple[ImageFile, ...]:
    """The phase image beside each magnitude, or nothing where one is missing or broken."""
    phases: list[ImageFile] = []
    for part in run.parts:
        entities = {**entities_of(part.image.name), "part": "phase"}
        beside = [p for p in _images(part.image.parent)
                  if _suffix(p) == "dwi" and entities_of(p.name) == entities]
        try:
            phases += [ImageFile(here(p), sidecar(p, root)) for p in beside[:1]]
        except (DataError, OSError) as error:
            notices.append(f"The phase is not used: {error}")
            return ()
    if phases and len(phases) < len(run.parts):
        notices.append(f"The phase is not used: {len(phases)} of the {len(run.parts)} files of "
                       "this run have a phase image.")
        return ()
    return tuple(phases)


def _candidate(field_map: FieldMap, root: Path, notices: list[str]) -> Candidate:
    images = (*field_map.images, *field_map.magnitudes)
    identifiers = {s for i in images for s in _strings(i.metadata.get("B0FieldIdentifier"))}
    named = [p for i in images for p in _intended(i.image, i.metadata, root)]
    intended = {p for p in named if os.path.exists(p)}  # noqa: PTH110 (Path's raises on long names)
    if named and not intended:
        notices.append(f"{name_of(images[0].image)}: IntendedFor names no file that exists, as if "
                       "it were not there. Correct it.")
    return Candidate(field_map, frozenset(identifiers), frozenset(intended))


def _intended(image: Path, metadata: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """Files that IntendedFor may mean: a `bids::` URI, or a path relative to the participant's
    folder or, against BIDS, to the dataset's root."""
    participant = root / f"sub-{entities_of(image.name).get('sub')}"
    for name in _strings(metadata.get("IntendedFor")):
        if name.startswith("bids::"):
            yield root / name.removeprefix("bids::").lstrip("/")
        elif not name.startswith("bids:"):
            yield from (folder / name.lstrip("/") for folder in (participant, root))


def _strings(value: Any) -> list[str]:
    """A string or a list of strings, as a list; anything else is left out."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _images(folder: Path) -> list[Path]:
    names = [p for pattern in ("*.nii", "*.nii.gz") for p in folder.glob(pattern)]
    return sorted(names, key=lambda p: label_order(p.name))


def _suffix(path: Path) -> str:
    return name_of(path).rsplit("_", 1)[-1]
