"""Write the brain mask and the tissues of the T1w images of a participant, once for all runs."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from bidsapp import __version__
from bidsapp.anatomy import t1w
from bidsapp.bids import names
from bidsapp.bids.inherit import entities_of
from bidsapp.bids.writer import sha256, to_json
from bidsapp.dwi import open_image
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


def _write(image: Path, context: RunContext) -> None:
    dataset, entities = context.dataset, entities_of(image.name)
    entities = {k: v for k, v in entities.items() if k in names.ENTITIES}
    record = names.output_path(entities, "T1w", ".json", "log")
    content = {"version": __version__, "image": sha256(image) if image.is_file() else str(image)}
    fingerprint = hashlib.sha256(to_json(content).encode()).hexdigest()
    if dataset.is_complete(dataset.record(record), fingerprint):
        return
    log.info("%s: brain and tissues", image.name)
    brain, tissues = t1w.describe(image, context.device, context.options.work_dir)
    like, source = open_image(image), dataset.uri(image)

    def path(suffix: str, **more: str) -> PurePosixPath:
        return names.output_path(entities, suffix, ".nii.gz", "anat", **more)

    with dataset.transaction(record, fingerprint) as transaction:
        transaction.image(path("mask", desc="brain"), brain.astype("uint8"), like, {
            "Description": "Brain mask of the T1w image, by deepbet", "Type": "Brain",
            "Sources": [source]})
        mask = dataset.uri(dataset.root / path("mask", desc="brain"))
        for tissue, values in zip(t1w.TISSUES, tissues, strict=True):
            transaction.image(path("probseg", label=tissue), values, like, {
                "Description": f"Probability of {tissue} in the T1w image, by Atropos",
                "SkullStripped": True, "Sources": [source, mask], "SpatialReference": source})
