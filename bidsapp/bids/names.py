"""The one table of output names: which entities a name may hold, and in which order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

ENTITIES = ("sub", "ses", "sample", "task", "tracksys", "acq", "ce", "trc", "stain", "rec", "dir",
            "run", "echo", "part", "chunk", "from", "to", "mode", "space", "cohort",
            "res", "label", "model", "param", "stat", "desc")
"""BIDS order, with the entities of BEP016 (model, param) and `stat` before `desc`."""

BIDSIGNORE = ("*.html", "logs", "log", "figures", "group", "*_dwimap.*", "*_dwi.bval",
              "*_dwi.bvec", "*_dwi.b", "*_dwi.btens", "*_qc.*", "*_truth.*", "*_xfm.*",
              "*_cohort-*")
"""What the validator's schema does not know yet."""


def output(entities: Mapping[str, str], suffix: str, extension: str, folder: str = "dwi",
           **more: str) -> PurePosixPath:
    """Path below OUTPUT_DIR, e.g. sub-01/ses-a/dwi/sub-01_ses-a_desc-brain_mask.nii.gz.

    `figures` and `log` lie below the participant, other folders below the session.

    Raises:
        ValueError: an entity is unknown or its label is not alphanumeric.
    """
    labels = {**entities, **more}
    for key, value in labels.items():
        if key not in ENTITIES or not value.replace("+", "").isalnum():
            raise ValueError(f"{key}-{value} cannot stand in a file name")
    stem = "_".join(f"{k}-{labels[k]}" for k in ENTITIES if k in labels)
    session = "ses" in labels and folder not in ("figures", "log")
    parts = [f"sub-{labels['sub']}", *([f"ses-{labels['ses']}"] if session else []), folder]
    return PurePosixPath(*parts, f"{stem}_{suffix}{extension}")
