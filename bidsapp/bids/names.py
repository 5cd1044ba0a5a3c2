"""The table of output names: the allowed entities and their order."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath

ENTITIES = ("sub", "ses", "sample", "task", "tracksys", "acq", "ce", "trc", "stain", "rec", "dir",
            "run", "echo", "part", "chunk", "from", "to", "mode", "space", "cohort",
            "res", "label", "model", "param", "stat", "desc")
"""Entities in BIDS order, with those of BEP016 (model, param) and `stat` before `desc`."""

MAPS = ("dwimap", "dseg", "probseg")
"""Suffixes of the maps of estimators: parameters, labels of tissues, probabilities of tissues."""

BIDSIGNORE = ("*.html", "logs", "log", "figures", "group", "*_dwimap.*", "*_dwi.bval",
              "*_dwi.bvec", "*_dwi.b", "*_dwi.btens", "*_qc.*", "*_truth.*", "*_xfm.*",
              "*_cohort-*", "*_fieldmap.*", "*_dwiref.*",
              "*_timeseries.*")
"""Patterns of outputs that the BIDS validator would refuse, since its schema lacks them."""


def output_path(entities: Mapping[str, str], suffix: str, extension: str, folder: str = "dwi",
           **more: str) -> PurePosixPath:
    """Make the path of an output.

    Parameters
    ----------
    entities : mapping
        Labels by entity.
    suffix, extension : str
        BIDS suffix, and extension with its dot.
    folder : str
        Folder below the session; `figures` and `log` are below the participant.
    **more
        Further entities.

    Returns
    -------
    PurePosixPath
        Path below OUTPUT_DIR, such as sub-01/ses-a/dwi/sub-01_ses-a_desc-brain_mask.nii.gz.

    Raises
    ------
    ValueError
        An entity is unknown, or its label is not alphanumeric.
    KeyError
        There is no entity `sub`.
    """
    labels = {**entities, **more}
    for key, value in labels.items():
        if key not in ENTITIES or not value.replace("+", "").isalnum():
            raise ValueError(f"{key}-{value} cannot stand in a file name")
    stem = "_".join(f"{k}-{labels[k]}" for k in ENTITIES if k in labels)
    session = "ses" in labels and folder not in ("figures", "log")
    parts = [f"sub-{labels['sub']}", *([f"ses-{labels['ses']}"] if session else []), folder]
    return PurePosixPath(*parts, f"{stem}_{suffix}{extension}")
