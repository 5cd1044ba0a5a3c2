"""Sidecars of the derivatives: description, units, sources and processing of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bidsapp.bids.writer import Dataset
from bidsapp.dwi import Run

CARRIED = (
    "Manufacturer", "ManufacturersModelName", "SoftwareVersions", "MagneticFieldStrength",
    "ReceiveCoilName", "EchoTime", "RepetitionTime", "FlipAngle", "PhaseEncodingDirection",
    "TotalReadoutTime", "EffectiveEchoSpacing", "MultibandAccelerationFactor", "PartialFourier",
    "ParallelReductionFactorInPlane", "SliceThickness", "InstitutionName",
)
"""Acquisition keys that each image made from a run inherits."""

SPATIAL = ("PhaseEncodingDirection", "TotalReadoutTime", "EffectiveEchoSpacing",
           "MultibandAccelerationFactor", "PartialFourier", "ParallelReductionFactorInPlane",
           "SliceThickness")
"""Those of CARRIED that describe the spatial encoding, which voxels without a position lack."""


def base(run: Run, dataset: Dataset, description: str) -> dict[str, Any]:
    """Make the sidecar keys of any image: Description, Sources, acquisition keys and space.

    Parameters
    ----------
    run : Run
        Run that the image was made from.
    dataset : Dataset
        Output dataset.
    description : str
        Description of the image.

    Returns
    -------
    dict
    """
    metadata = run.metadata
    keys: dict[str, Any] = {
        "Description": description,
        "SkullStripped": True,
        "Sources": [dataset.uri(f) for f in run.files],
        **{k: metadata[k] for k in CARRIED if metadata.get(k) is not None},
    }
    keys["SpatialReference"] = metadata.get("SpatialReference", keys["Sources"][0])
    if "res" in run.entities:
        keys["Resolution"] = metadata.get("Resolution", f"as {keys['Sources'][0]}")
    return keys


def mask(run: Run, dataset: Dataset, source: str) -> dict[str, Any]:
    """Make the sidecar keys of a brain mask. source: its origin, a phrase."""
    return {**base(run, dataset, f"Brain mask: {source}"), "Type": "Brain"}


def derived(run: Run, dataset: Dataset, *, model: Mapping[str, Any], output: Mapping[str, Any],
            parameters: Mapping[str, Any], more_sources: Sequence[str], seed: int, device: str
            ) -> dict[str, Any]:
    """Make the sidecar keys of a map.

    Parameters
    ----------
    run : Run
        Run that the map was made from.
    dataset : Dataset
        Output dataset.
    model, output : mapping
        Entries of the method's outputs.json.
    parameters : mapping
        Parameters of the model.
    more_sources : sequence of str
        URIs of its sources besides the run.
    seed, device
        Seed and device of the computation.

    Returns
    -------
    dict
    """
    keys = base(run, dataset, output["Description"])
    keys["Sources"] = [*keys["Sources"], *more_sources]
    for_display = ("entities", "Description", "range", "cmap", "report", "display", "background")
    return {
        **keys,
        **{k: v for k, v in output.items() if k not in for_display},
        "Model": {"Description": model["Description"], "URL": model["URL"],
                  "Parameters": dict(parameters)},
        "ParameterURL": model["URL"],
        "RandomSeed": seed,
        "Device": device,
    }
