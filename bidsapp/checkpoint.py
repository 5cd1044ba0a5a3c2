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

from bidsapp.domain import TrainingDomain
from bidsapp.errors import DataError

WEIGHTS, CARD = "model.safetensors", "model.json"


@dataclass(frozen=True)
class Card:
    """What is known of trained weights; plain values, as JSON holds them.

    method: folder of the method. network: its architecture and the arguments of its constructor
    (`networks.builder`); empty where the weights are no network's. trained_for: what it may be used
    for; of a harmonizer, with the sites that it maps to reference_batch. training: schedule,
    samples, device, duration and what the data were. constants: numbers learned in training
    that are not weights. metrics: on held-out data. intended_use: a sentence or two, limits
    included. sha256: of the weights' file and of the rest of the card, set when they are
    packed. warnings: sentences that are told wherever a harmonizer is applied.

    Raises:
        ValueError: a field has another type, or a harmonizer does not say which sites it maps.
    """

    method: str
    network: Mapping[str, Any]
    trained_for: TrainingDomain
    training: Mapping[str, Any]
    intended_use: str
    seed: int
    versions: Mapping[str, str]
    constants: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    reference_batch: str | None = None
    warnings: tuple[str, ...] = ()
    sha256: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "warnings", tuple(self.warnings))
        if not all(isinstance(value, str) for value in self.warnings):
            raise ValueError(f"warnings are {self.warnings!r}, not text")
        for kind, names in ((str, ("method", "intended_use", "sha256")), (int, ("seed",)),
                            (str | None, ("reference_batch",)),
                            (TrainingDomain, ("trained_for",)),
                            (Mapping, ("network", "training", "versions", "constants",
                                       "metrics"))):
            for name in names:
                if not isinstance(value := getattr(self, name), kind):
                    raise ValueError(f"{name} is {value!r}, which has another type than a card's")
        if self.method.startswith("harmonize_") and not (self.reference_batch and self.batches):
            raise ValueError("a harmonizer needs reference_batch and the sites it is trained for")

    @property
    def batches(self) -> tuple[str, ...]:
        """The sites that a harmonizer maps to its reference."""
        return self.trained_for.sites


@dataclass(frozen=True)
class Checkpoint:
    """Weights by name, and their card.

    What stands before the first dot of a name is a part: `encoder`, `head`, `shell-1000`.
    """

    tensors: Mapping[str, torch.Tensor]
    card: Card

    def part(self, name: str) -> Checkpoint:
        """Select the weights of one part, by their names inside it.

        So a pretrained encoder starts another network:
        `checkpoint.part("encoder").into(network.encoder)`.
        """
        prefix = f"{name}."
        return replace(self, tensors={k.removeprefix(prefix): v for k, v in self.tensors.items()
                                      if k.startswith(prefix)})

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
        card = Card(**{**told, "trained_for": TrainingDomain(**told["trained_for"])})
        digest = _digest(weights, told)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{folder} holds no checkpoint that can be read ({error}). Needed is a "
                        f"folder with {WEIGHTS} and {CARD}, as group --train writes it, with all "
                        f"of {', '.join(f.name for f in fields(Card))}. If another version wrote "
                        "it, train again.") from error
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
