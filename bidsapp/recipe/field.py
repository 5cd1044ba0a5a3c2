"""Find the susceptibility field of a run by the images that its sidecars assign to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from bidsapp.acquisition import PhaseEncoding
from bidsapp.anatomy import t1w
from bidsapp.bids import btable
from bidsapp.bids.inherit import entities_of, name_of
from bidsapp.dwi import FIELD_MAPS, FieldMap, ImageFile, Part, Run, open_image, read_array
from bidsapp.errors import DataError
from bidsapp.preprocess import distortion
from bidsapp.recipe.steps import RunContext

FIELD_SOURCES = {**FIELD_MAPS, "t1w": "registration to the T1w image"}
"""Names of what gives the susceptibility field, the most trusted first."""

RULES = {"session": "of the same session, since no sidecar assigns one", "run": "a merged run"}
"""Words for `FieldMap.rule`; others are sidecar keys."""

FieldFinder = Callable[[np.ndarray, np.ndarray, np.ndarray],
                       tuple[distortion.Field, tuple[np.ndarray, ...] | None]]
"""Finds a field for a b0 image, its affine and its brain mask. Returns it, and both b0 images as
measured and corrected if it comes of opposite phase encodings."""


def field_sources(context: RunContext, encoding: PhaseEncoding,
                  register_t1w: Callable[[], t1w.Anatomy]
                  ) -> Iterator[tuple[str, list[Path], FieldFinder]]:
    """Yield what gives the susceptibility field, the most trusted first: its kind (a key of
    FIELD_SOURCES), its images and a function.

    encoding: that of the b0 image which the field undistorts. register_t1w: registers the series
    to the T1w image.
    """
    run, fallback = context.run, context.options.fallback_total_readout_time
    for field_map in run.field_maps:
        if field_map.kind == "opposite":
            for image in field_map.images:
                if encoding.opposes(PhaseEncoding.from_sidecar(image.metadata)):
                    yield (field_map.kind, [image.image],
                           partial(_field_from_pair, image, encoding, fallback, context.device))
        else:
            yield (field_map.kind, [i.image for i in (*field_map.images, *field_map.magnitudes)],
                   partial(_field_from_gre, field_map, encoding))
    if run.t1w:
        yield "t1w", [run.t1w], partial(_field_from_t1w, register_t1w, encoding, context.device)


def _field_from_pair(image: ImageFile | Part, encoding: PhaseEncoding, fallback: float | None,
                     device: str, b0: np.ndarray, affine: np.ndarray, mask: np.ndarray
                     ) -> tuple[distortion.Field, tuple[np.ndarray, ...]]:
    opposite = PhaseEncoding.from_sidecar(image.metadata)
    assert opposite
    if opposite.readout is None:
        opposite = replace(opposite, readout=fallback)
    second = open_image(image.image)
    volumes = read_array(second, np.float32)
    if isinstance(image, Part):
        volumes = volumes[..., btable.read_acquisition(image).b0]
    if not volumes.size:
        raise DataError(f"{image.image}: has no b0 volume. One is needed: name another image.")
    other = volumes.reshape(*second.shape[:3], -1).mean(axis=-1)
    found = distortion.field_from_pair(b0, other, affine, encoding, opposite,
                                       second_affine=second.affine, device=device)
    return found, (b0, other, *found.corrected)


def _field_from_gre(field_map: FieldMap, encoding: PhaseEncoding, b0: np.ndarray,
                    affine: np.ndarray, mask: np.ndarray) -> tuple[distortion.Field, None]:
    images = [open_image(image.image) for image in field_map.images]
    metadata = [image.metadata for image in field_map.images]
    magnitude = read_array(open_image(field_map.magnitudes[-1].image), np.float32)
    return distortion.field_from_gre(
        field_map.kind, [read_array(image, np.float32) for image in images], magnitude,
        images[0].affine, b0, affine, encoding, units=metadata[0].get("Units"),
        echo_times=field_map.echo_times), None


def _field_from_t1w(register_t1w: Callable[[], t1w.Anatomy], encoding: PhaseEncoding, device: str,
                    b0: np.ndarray, affine: np.ndarray, mask: np.ndarray
                    ) -> tuple[distortion.Field, None]:
    anatomy = register_t1w()
    if anatomy.brain is None:
        raise DataError(anatomy.notice)
    return distortion.field_from_t1w(
        b0, affine, encoding, np.where(anatomy.brain, anatomy.image, 0),
        np.linalg.inv(anatomy.transform) @ anatomy.affine, mask, device=device), None


def describe_run(run: Run, corrections: Sequence[str], fallback: float | None) -> list[str]:
    """Describe what can correct a run, in lines: its phase encoding, field maps (with the rule that
    assigns each), phase images and T1w image.

    corrections: those that are asked for. fallback: readout time (s) where the sidecar has none.
    """
    encoding = run.phase_encoding
    if encoding and encoding.readout is not None:
        readout = f"readout {1000 * encoding.readout:.4g} ms"
    elif fallback is not None:
        readout = f"readout {1000 * fallback:.4g} ms, by --fallback-total-readout-time"
    else:
        readout = ("TotalReadoutTime unknown: distortion and eddy currents cannot be corrected. "
                   "Add it to the sidecar, or give --fallback-total-readout-time")
    lines = [f"phase encoding {encoding.direction}, {readout}" if encoding
             else "phase encoding unknown", *map(_describe_field_map, run.field_maps)]
    if run.phase:
        lines.append(f"phase {', '.join(name_of(p.image) for p in run.phase)}: complex data")
    if run.t1w:
        session = entities_of(run.t1w.name).get("ses")
        serves = "distortion" in corrections and encoding and not run.field_maps
        lines.append(f"T1w {name_of(run.t1w)}: of the "
                     f"{'same session' if session == run.session else 'participant'}"
                     + "; the field comes from it, since no field map does" * bool(serves))
    return [*lines, *run.notices]


def _describe_field_map(field_map: FieldMap) -> str:
    images = ", ".join(name_of(image.image) for image in field_map.images)
    magnitudes = ", ".join(name_of(image.image) for image in field_map.magnitudes)
    rule = RULES.get(field_map.rule, f"by {field_map.rule}")
    return (f"field map {images}" + f" with {magnitudes}" * bool(magnitudes)
            + f": {FIELD_MAPS[field_map.kind]}, {rule}")
