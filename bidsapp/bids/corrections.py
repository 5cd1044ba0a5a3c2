"""Find the images that can correct a raw run: EPIs and DWIs with the opposite phase encoding, GRE
field maps, and phase images.

Field maps are read from the folders `fmap` and `dwi` of the run's session, not from the index of
the dataset. The first rule that gives one that can be used applies:
1. those whose B0FieldIdentifier the B0FieldSource of the run names;
2. those whose IntendedFor names the run;
3. those of the session that are not intended for another image, with a notice.
If a file is broken, its field map is not used, and a notice says so.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bidsapp.acquisition import PhaseEncoding, read_partial_fourier
from bidsapp.bids.btable import read_acquisition
from bidsapp.bids.index import label_order
from bidsapp.bids.inherit import entities_of, name_of, read_part, read_sidecar, require_file
from bidsapp.dwi import FIELD_MAPS, FieldMap, ImageFile, Part, Run, open_image
from bidsapp.errors import DataError

SAME_AXIS = np.cos(np.radians(10))
"""Cosine of the largest angle in the world (10°) between the phase-encoding axes of images that
correct one another."""

GRE_KINDS = {"phasediff": "phasediff", "phase1": "phases", "phase2": "phases",
             "fieldmap": "fieldmap"}
"""Kind of GRE field map (`dwi.FIELD_MAPS`) by BIDS suffix."""

MAGNITUDES = ("magnitude", "magnitude1", "magnitude2")
"""BIDS suffixes of magnitude images."""


@dataclass(frozen=True)
class Candidate:
    """A field map, with the images that its sidecars assign it to.

    Parameters
    ----------
    field_map : FieldMap
        The field map. An EPI or DWI has the kind `opposite`, although `_usable` is where its phase
        encoding is compared with others.
    identifiers : frozenset of str
        The B0FieldIdentifier of its images.
    intended : frozenset of Path
        The existing files that its IntendedFor names.
    """

    field_map: FieldMap
    identifiers: frozenset[str]
    intended: frozenset[Path]


@dataclass(frozen=True)
class Session:
    """The candidates for field maps of a session, with notices on those that cannot be used."""

    candidates: Sequence[Candidate]
    notices: tuple[str, ...]


def read_session(folder: Path, root: Path, parts: Iterable[Part]) -> Session:
    """Read the field maps of a session, and its DWIs as candidates for field maps.

    Parameters
    ----------
    folder : Path
        `sub-<label>` or `sub-<label>/ses-<label>`.
    root : Path
        Root of the dataset.
    parts : iterable of Part
        DWIs that were already read. Other DWIs of the session, which a filter left out, are read as
        well, since they may correct them.

    Returns
    -------
    Session
        A candidate for each GRE field map, each EPI, and each DWI with a phase encoding.
    """
    candidates: list[Candidate] = []
    notices: list[str] = []
    # images of GRE field maps, and magnitudes, by the entities that a field map's images share
    groups: dict[tuple[Any, ...], list[ImageFile]] = defaultdict(list)
    magnitudes: dict[tuple[tuple[str, str], ...], list[ImageFile]] = defaultdict(list)
    for path in _images(folder / "fmap"):
        suffix, entities = _suffix(path), tuple(sorted(entities_of(path.name).items()))
        try:
            image = ImageFile(require_file(path), read_sidecar(path, root))
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
    parts_by_image = {part.image: part for part in parts}
    for path in _images(folder / "dwi"):
        if _suffix(path) == "dwi" and entities_of(path.name).get("part", "mag") == "mag":
            try:
                part = parts_by_image.get(path) or read_part(path, root)
                if PhaseEncoding.from_sidecar(part.metadata):
                    candidates.append(_candidate(FieldMap("opposite", (part,)), root, notices))
            except DataError:  # reported elsewhere if it is a run
                continue
    return Session(candidates, tuple(notices))


def find_corrections(run: Run, root: Path, session: Session) -> Run:
    """Add phase encoding, field maps, phase images and notices to a raw run.

    Parameters
    ----------
    run : Run
        A raw run.
    root : Path
        Root of its dataset.
    session : Session
        The run's session, from `read_session`.

    Returns
    -------
    Run
    """
    notices = list(session.notices)
    reference = next((part for part in run.parts if _has_b0(part)), run.parts[0])
    try:
        encoding = PhaseEncoding.from_sidecar(reference.metadata)
        run = replace(run, phase_encoding=encoding)
        if encoding is None:
            notices.append("Distortion cannot be corrected: the sidecar has no "
                           "PhaseEncodingDirection. Add it.")
    except DataError as error:
        notices.append(f"Distortion cannot be corrected: {reference.image}: {error}")
    try:
        read_partial_fourier(run.metadata)
    except DataError as error:
        notices.append(f"{run.parts[0].image}: {error}")
    field_maps: list[FieldMap] = []
    if encoding := run.phase_encoding:
        opposite = tuple(part for part in run.parts if part is not reference and _has_b0(part)
                         and encoding.opposes(PhaseEncoding.from_sidecar(part.metadata)))
        field_maps = ([FieldMap("opposite", opposite, rule="run")] if opposite  # merged runs
                      else _field_maps(run, session.candidates, notices))
    phase = _phase(run, root, notices)
    return replace(run, field_maps=tuple(field_maps), phase=phase, notices=tuple(notices))


def _has_b0(part: Part) -> bool:
    """Tell whether a part has b0 volumes; it counts as such if its table cannot be read."""
    try:
        return bool(read_acquisition(part).b0.any())
    except DataError:  # reported when the run is loaded
        return True


def _field_maps(run: Run, candidates: Sequence[Candidate], notices: list[str]) -> list[FieldMap]:
    """Find the field maps by the first rule that gives any, the most trusted first."""
    images, encoding = {part.image for part in run.parts}, run.phase_encoding
    assert encoding
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
        used = [replace(m, rule=rule) for group in groups
                for m in _usable(group, run, notices)]
        if used:
            if rule == "session":
                notices.append("No sidecar assigns to this run a field map that can be used, so "
                               "those of its session are used. Assign one by IntendedFor or "
                               "B0FieldSource.")
            return sorted(used, key=lambda m: ([*FIELD_MAPS].index(m.kind), -_shared(m, run)))
        if rule != "session" and any(groups):
            named = [c.field_map.images[0] for group in groups for c in group]
            notices.append(
                f"{rule} assigns {', '.join(map(_describe_encoding, named))} to the run, which is "
                f"encoded along {encoding.direction}. An image that is encoded along "
                f"{replace(encoding, sign=-encoding.sign).direction} on the same axis of the head "
                "is needed. Correct PhaseEncodingDirection, or acquire one.")
    notices.append("No field map was found: no image of the session has the opposite phase "
                   "encoding, and none is a GRE field map.")
    return []


def _describe_encoding(image: ImageFile | Part) -> str:
    encoding = PhaseEncoding.from_sidecar(image.metadata)
    return name_of(image.image) + (f" (encoded along {encoding.direction})" if encoding else "")


def _shared(field_map: FieldMap, run: Run) -> int:
    """Number of entities that its first image shares with the run, to prefer its own protocol."""
    return len(run.entities.items() & entities_of(field_map.images[0].image.name).items())


def _usable(group: Sequence[Candidate], run: Run, notices: list[str]) -> Iterator[FieldMap]:
    """Yield the GRE field maps of a group, and one field map of its EPIs and DWIs that have the
    opposite phase encoding of the run along the same axis in the world."""
    yield from (c.field_map for c in group if c.field_map.kind != "opposite")
    opposite: list[ImageFile | Part] = []
    for candidate in group:
        (image, *_) = candidate.field_map.images
        if (candidate.field_map.kind == "opposite" and run.phase_encoding
                and run.phase_encoding.opposes(PhaseEncoding.from_sidecar(image.metadata))):
            axis = run.phase_encoding.axis
            try:
                cosine = _axes(image.image)[:, axis] @ _axes(run.parts[0].image)[:, axis]
            except DataError as error:
                notices.append(f"A field map is not used: {error}")
                continue
            if cosine > SAME_AXIS:
                opposite.append(image)
    if opposite:
        yield FieldMap("opposite", tuple(opposite))


def _axes(image: Path) -> np.ndarray:
    """Unit vectors of the voxel axes of an image in world RAS+, as columns (3, 3)."""
    linear = open_image(image).affine[:3, :3]
    return np.asarray(linear / np.linalg.norm(linear, axis=0))


def _phase(run: Run, root: Path, notices: list[str]) -> tuple[ImageFile, ...]:
    """Find the phase image beside each magnitude, or the imaginary beside each real part; empty if
    one is missing or cannot be read."""
    phases: list[ImageFile] = []
    for part in run.parts:
        entities = entities_of(part.image.name)
        entities["part"] = "imag" if entities.get("part") == "real" else "phase"
        beside = [p for p in _images(part.image.parent)
                  if _suffix(p) == "dwi" and entities_of(p.name) == entities]
        try:
            phases += [ImageFile(require_file(p), read_sidecar(p, root)) for p in beside[:1]]
        except (DataError, OSError) as error:
            notices.append(f"The phase is not used: {error}")
            return ()
    if phases and len(phases) < len(run.parts):
        notices.append(f"The phase is not used: {len(phases)} of the {len(run.parts)} files of "
                       "this run have a phase image.")
        return ()
    return tuple(phases)


def _candidate(field_map: FieldMap, root: Path, notices: list[str]) -> Candidate:
    """Read what the sidecars of a field map assign it to."""
    images = (*field_map.images, *field_map.magnitudes)
    identifiers = {s for i in images for s in _strings(i.metadata.get("B0FieldIdentifier"))}
    named = [p for i in images for p in _intended(i.image, i.metadata, root)]
    intended = {p for p in named if os.path.exists(p)}  # noqa: PTH110 (Path's raises on long names)
    if named and not intended:
        notices.append(f"{name_of(images[0].image)}: IntendedFor names no file that exists, so it "
                       "is ignored. Correct it.")
    return Candidate(field_map, frozenset(identifiers), frozenset(intended))


def _intended(image: Path, metadata: Mapping[str, Any], root: Path) -> Iterator[Path]:
    """Yield the files that IntendedFor may mean: a `bids::` URI, or a path relative to the
    participant's folder or, which violates BIDS, to the root of the dataset."""
    participant = root / f"sub-{entities_of(image.name).get('sub')}"
    for name in _strings(metadata.get("IntendedFor")):
        if name.startswith("bids::"):
            yield root / name.removeprefix("bids::").lstrip("/")
        elif not name.startswith("bids:"):
            yield from (folder / name.lstrip("/") for folder in (participant, root))


def _strings(value: Any) -> list[str]:
    """Convert a string or a list of strings to a list, without anything else."""
    return [v for v in (value if isinstance(value, list) else [value]) if isinstance(v, str)]


def _images(folder: Path) -> list[Path]:
    paths = [p for pattern in ("*.nii", "*.nii.gz") for p in folder.glob(pattern)]
    return sorted(paths, key=lambda p: label_order(p.name))


def _suffix(path: Path) -> str:
    return name_of(path).rsplit("_", 1)[-1]
