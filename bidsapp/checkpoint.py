"""Trained weights and their card: what they are for, what made them, and a checksum.

A checkpoint is a folder with model.safetensors and model.json. Loading is strict: whatever is
missing, changed or unknown is an error, so that no network ever runs with weights that are not its
own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bidsapp.errors import DataError

WEIGHTS, CARD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Card:
    """What is known of trained weights; plain values, as JSON holds them.

    method: folder of the method. network: its architecture, where there are several, and arguments
    of its constructor. trained_for: acquisitions and ranges outside of which it must refuse.
    training: schedule, samples, device, duration and what the data were. constants: numbers learned
    in training that are not weights. metrics: on held-out data. intended_use: a sentence or two,
    limits included. sha256: of the weights' file and of the rest of the card, set when they are
    packed. Of a harmonizer, reference_batch and batches: those that it maps there; warnings:
    sentences that are told wherever it is applied.

    Raises:
        ValueError: a field has another type, or a harmonizer does not say which sites it maps.
    """

    method: str
    network: Mapping[str, Any]
    trained_for: Mapping[str, Any]
    training: Mapping[str, Any]
    intended_use: str
    seed: int
    versions: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reference_batch: str | None = None
    batches: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    sha256: str = ""

    def __post_init__(self) -> None:
        for name in ("batches", "warnings"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
            if not all(isinstance(value, str) for value in getattr(self, name)):
                raise ValueError(f"{name} are {getattr(self, name)!r}, not text")
        for kind, names in ((str, ("method", "intended_use", "sha256")), (int, ("seed",)),
                            (str | None, ("reference_batch",)),
                            (Mapping, ("network", "trained_for", "training", "versions",
                                       "constants", "metrics"))):
            for name in names:
                if not isinstance(value := getattr(self, name), kind):
                    raise ValueError(f"{name} is {value!r}, which has another type than a card's")
        if self.method.startswith("harmonize_") and not (self.reference_batch and self.batches):
            raise ValueError("a harmonizer needs reference_batch and batches")


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, and their card."""

    tensors: Mapping[str, torch.Tensor]
    card: Card

    def into(self, network: nn.Module) -> nn.Module:
        """The network with these weights, in eval mode.

        Raises:
            DataError: names or shapes are not those of the network.
        """
        try:
            network.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise DataError(f"the weights of {self.card.method} do not fit its network ({error}). "
                            "They belong to another version; train again, or use that "
                            "version.") from error
        return network.eval()


def pack(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Content of the files of a checkpoint, by name."""
    from safetensors.torch import save

    weights = save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    card = replace(checkpoint.card, sha256=_digest(weights, asdict(checkpoint.card)))
    text = json.dumps(asdict(card), indent=2, allow_nan=False) + "\n"
    return {WEIGHTS: weights, CARD: text.encode()}


def _digest(weights: bytes, card: Mapping[str, Any]) -> str:
    """SHA-256 over the weights' file and all fields of the card but this digest."""
    fields = json.dumps({**card, "sha256": ""}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(weights + fields.encode()).hexdigest()


def load(folder: Path, method: str | None = None) -> Checkpoint:
    """The checkpoint in a folder, of that method or, with None, of any.

    Raises:
        DataError: a file is missing, broken or changed, or belongs to another method.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as read

    try:
        told = json.loads((folder / CARD).read_text())
        weights = (folder / WEIGHTS).read_bytes()
        card = Card(**told)
        digest = _digest(weights, told)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise DataError(f"{folder} holds no checkpoint that can be read ({error}). Needed is a "
                        f"folder with {WEIGHTS} and {CARD}, as group --train writes it, with all "
                        f"of {', '.join(f.name for f in fields(Card))}.") from error
    if method not in (None, card.method):
        raise DataError(f"{folder} holds weights of {card.method}; those of {method} are needed.")
    if digest != card.sha256:
        raise DataError(f"{folder}: the SHA-256 of {WEIGHTS} and {CARD} is {digest}, but {CARD} "
                        f"says {card.sha256 or 'nothing'}. One of the two was changed or damaged; "
                        "copy or train both again.")
    try:
        return Checkpoint(read(weights), card)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS}: is no safetensors file ({error}). Train "
                        "again.") from error
