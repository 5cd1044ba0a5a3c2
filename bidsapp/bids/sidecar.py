"""Sidecar JSON of the derivatives: what each image is, its units, what it was made from and how."""

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
"""Acquisition keys that every image made from a run inherits."""

SPATIAL = ("PhaseEncodingDirection", "TotalReadoutTime", "EffectiveEchoSpacing",
           "MultibandAccelerationFactor", "PartialFourier", "ParallelReductionFactorInPlane",
           "SliceThickness")
"""Of these, what says how the image was encoded in space: nothing of voxels in no place."""


def base(run: Run, dataset: Dataset, description: str) -> dict[str, Any]:
    """The keys of every image: Description, Sources, carried acquisition keys, space."""
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
    return {**base(run, dataset, f"Brain mask: {source}"), "Type": "Brain"}


def derived(run: Run, dataset: Dataset, *, model: Mapping[str, Any], output: Mapping[str, Any],
            parameters: Mapping[str, Any], more_sources: Sequence[str], seed: int, device: str
            ) -> dict[str, Any]:
    """A map of a method. model and output are the entries of its outputs.json; more_sources are
    URIs of what it was made from beside the run."""
    keys = base(run, dataset, output["Description"])
    keys["Sources"] = [*keys["Sources"], *more_sources]
    shown = ("entities", "Description", "range", "cmap", "report", "display", "background")
    return {
        **keys,
        **{k: v for k, v in output.items() if k not in shown},
        "Model": {"Description": model["Description"], "URL": model["URL"],
                  "Parameters": dict(parameters)},
        "ParameterURL": model["URL"],
        "RandomSeed": seed,
        "Device": device,
    }
