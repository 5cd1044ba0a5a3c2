"""Brain mask and tissues of the T1w images of a participant, written once for all runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath

from bidsapp import __version__
from bidsapp.anatomy import t1w
from bidsapp.bids import names
from bidsapp.bids.inherit import entities_of
from bidsapp.bids.writer import Dataset, sha256, to_json
from bidsapp.dwi import Run, open_image
from bidsapp.errors import describe
from bidsapp.recipe.steps import RunContext

log = logging.getLogger("qsphere")


def write_anatomy(contexts: Sequence[RunContext]) -> None:
    """Write `anat/` for the T1w images of runs that are corrected.

    An image that is complete and unchanged is skipped. One that cannot be used costs nothing but
    its own files, with a warning.

    Parameters
    ----------
    contexts : sequence of RunContext
        The runs of one participant.
    """
    images = {c.run.t1w: c for c in contexts if c.run.t1w and c.corrections}
    for image, context in images.items():
        try:
            _write(image, context)
        except Exception as error:  # the runs say what they miss
            log.warning("%s: no brain mask and tissues of it are written: %s", image,
                        describe(error))


def with_tissues(dataset: Dataset, run: Run) -> Run:
    """Add the tissue probabilities that `write_anatomy` wrote of the T1w image of a run.

    Returns
    -------
    Run
        As it is if its image has probabilities beside it, or if none are written that are complete
        and of this image.
    """
    if run.t1w is None or run.probsegs:
        return run
    record, fingerprint = _record(run.t1w)
    if not dataset.is_complete(dataset.record(record), fingerprint):
        return run
    return replace(run, probsegs=tuple(dataset.root / _path(run.t1w, "probseg", label=tissue)
                                       for tissue in t1w.TISSUES))


def _record(image: Path) -> tuple[PurePosixPath, str]:
    """Path of the record of an image below OUTPUT_DIR, and the fingerprint that it must have."""
    content = {"version": __version__, "image": sha256(image) if image.is_file() else str(image)}
    return (names.output_path(_entities(image), "T1w", ".json", "log"),
            hashlib.sha256(to_json(content).encode()).hexdigest())


def _entities(image: Path) -> dict[str, str]:
    return {k: v for k, v in entities_of(image.name).items() if k in names.ENTITIES}


def _path(image: Path, suffix: str, **more: str) -> PurePosixPath:
    return names.output_path(_entities(image), suffix, ".nii.gz", "anat", **more)


def _write(image: Path, context: RunContext) -> None:
    dataset, path = context.dataset, partial(_path, image)
    record, fingerprint = _record(image)
    if dataset.is_complete(dataset.record(record), fingerprint):
        return
    log.info("%s: brain and tissues", image.name)
    brain, tissues = t1w.describe(image, context.device, context.options.work_dir)
    like, source = open_image(image), dataset.uri(image)
    with dataset.transaction(record, fingerprint) as transaction:
        transaction.image(path("mask", desc="brain"), brain.astype("uint8"), like, {
            "Description": "Brain mask of the T1w image, by deepbet", "Type": "Brain",
            "Sources": [source]})
        mask = dataset.uri(dataset.root / path("mask", desc="brain"))
        for tissue, values in zip(t1w.TISSUES, tissues, strict=True):
            transaction.image(path("probseg", label=tissue), values, like, {
                "Description": f"Probability of {tissue} in the T1w image, by Atropos",
                "SkullStripped": True, "Sources": [source, mask], "SpatialReference": source})
