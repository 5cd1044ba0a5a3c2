"""Sidecars of the derivatives: description, units, sources and processing of each image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bidsapp.acquisition import read_partial_fourier
from bidsapp.bids.writer import Dataset
from bidsapp.dwi import Run
from bidsapp.errors import DataError

ACQUISITION = (
    "Manufacturer", "ManufacturersModelName", "SoftwareVersions", "MagneticFieldStrength",
    "ReceiveCoilName", "EchoTime", "RepetitionTime", "FlipAngle", "PhaseEncodingDirection",
    "TotalReadoutTime", "EffectiveEchoSpacing", "MultibandAccelerationFactor", "PartialFourier",
    "ParallelReductionFactorInPlane", "SliceThickness", "InstitutionName",
)
"""Keys on the acquisition that are copied from the run's sidecar to that of each output image."""

SPATIAL = ("PhaseEncodingDirection", "TotalReadoutTime", "EffectiveEchoSpacing",
           "MultibandAccelerationFactor", "PartialFourier", "ParallelReductionFactorInPlane",
           "SliceThickness")
"""Those of ACQUISITION on the spatial encoding. They are left out for synthetic signals, whose
voxels have no position in space."""


def base(run: Run, dataset: Dataset, description: str) -> dict[str, Any]:
    """Make the keys that the sidecars of all output images share.

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
        Description, Sources (URIs of the run's files), ACQUISITION (without a PartialFourier that
        is no share) and the space of the image.
    """
    metadata = run.metadata
    keys: dict[str, Any] = {
        "Description": description,
        "SkullStripped": True,
        "Sources": [dataset.uri(f) for f in run.files],
        **{k: metadata[k] for k in ACQUISITION if metadata.get(k) is not None},
    }
    try:
        read_partial_fourier(keys)
    except DataError:
        del keys["PartialFourier"]
    keys["SpatialReference"] = metadata.get("SpatialReference", keys["Sources"][0])
    if "res" in run.entities:
        keys["Resolution"] = metadata.get("Resolution", f"as {keys['Sources'][0]}")
    return keys


def mask(run: Run, dataset: Dataset, source: str, more_sources: Sequence[str] = ()
         ) -> dict[str, Any]:
    """Make the sidecar keys of a brain mask.

    source: URI of the mask, or how it was computed. more_sources: URIs besides the run.
    """
    keys = base(run, dataset, f"Brain mask: {source}")
    return {**keys, "Sources": [*keys["Sources"], *more_sources], "Type": "Brain"}


def derived(run: Run, dataset: Dataset, *, model: Mapping[str, Any], output: Mapping[str, Any],
            parameters: Mapping[str, Any], more_sources: Sequence[str], seed: int, device: str
            ) -> dict[str, Any]:
    """Make the sidecar keys of an image that a method computed: a map or a synthetic signal.

    Parameters
    ----------
    run : Run
        Run that the image was made from.
    dataset : Dataset
        Output dataset.
    model, output : mapping
        `model` and the entry of the image in the method's outputs.json. Keys of the latter that
        serve its file name or the report are not copied.
    parameters : mapping
        Parameters of the model.
    more_sources : sequence of str
        URIs of the image's sources besides the run.
    seed, device
        Seed and device of the computation.

    Returns
    -------
    dict
    """
    keys = base(run, dataset, output["Description"])
    keys["Sources"] = [*keys["Sources"], *more_sources]
    not_copied = ("suffix", "entities", "Description", "range", "cmap", "report", "display",
                  "background")
    return {
        **keys,
        **{k: v for k, v in output.items() if k not in not_copied},
        "Model": {"Description": model["Description"], "URL": model["URL"],
                  "Parameters": dict(parameters)},
        "ParameterURL": model["URL"],
        "RandomSeed": seed,
        "Device": device,
    }
