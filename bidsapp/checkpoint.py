"""Trained weights with their card: intended use, training, and a checksum.

A checkpoint is a folder with model.safetensors and model.json. Loading is strict: anything missing,
changed or unknown is an error, so that a network never runs with the weights of another.
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
"""File names of the weights and of the card in the folder of a checkpoint."""


@dataclass(frozen=True)
class Card:
    """The description of trained weights, in plain values that JSON can hold.

    Parameters
    ----------
    method : str
        Name of the method.
    network : mapping
        Architecture and arguments of its constructor (`networks.builder`); empty if the weights do
        not belong to a network.
    trained_for : TrainingDomain
        Acquisitions that the weights may be used for; for a harmonizer, with the sites that it maps
        to `reference_batch`.
    training : mapping
        Schedule, number of samples, device, duration and data of the training.
    intended_use : str
        One or two sentences, with limits.
    seed : int
        Seed of the training.
    versions : mapping
        Versions of the software.
    constants : mapping
        Numbers that were learned in training and are not weights.
    metrics : mapping
        Results on held-out data.
    reference_batch : str, optional
        Site that a harmonizer maps to.
    warnings : tuple of str
        Sentences that are reported wherever a harmonizer is applied.
    sha256 : str
        Digest of the file of the weights and of the rest of the card, set by `pack`.

    Raises
    ------
    ValueError
        A field has another type, or a harmonizer lacks its sites or its reference site.
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
        for type_, names in ((str, ("method", "intended_use", "sha256")), (int, ("seed",)),
                            (str | None, ("reference_batch",)),
                            (TrainingDomain, ("trained_for",)),
                            (Mapping, ("network", "training", "versions", "constants",
                                       "metrics"))):
            for name in names:
                if not isinstance(value := getattr(self, name), type_):
                    raise ValueError(f"{name} is {value!r}, which is not of the type of this field")
        if self.method.startswith("harmonize_") and not (self.reference_batch and self.batches):
            raise ValueError("a harmonizer needs reference_batch and the sites it is trained for")

    @property
    def batches(self) -> tuple[str, ...]:
        """The sites that a harmonizer maps to its reference."""
        return self.trained_for.sites


@dataclass(frozen=True)
class Checkpoint:
    """Trained weights with their card.

    Parameters
    ----------
    tensors : mapping
        Weights by name. The name begins with that of a part and a dot, such as `encoder`, `head` or
        `shell-1000`.
    card : Card
        Description of the weights.
    """

    tensors: Mapping[str, torch.Tensor]
    card: Card

    def part(self, name: str) -> Checkpoint:
        """Select the weights of one part, with their names inside it.

        A pretrained encoder can start another network:
        `checkpoint.part("encoder").into(network.encoder)`.
        """
        prefix = f"{name}."
        return replace(self, tensors={k.removeprefix(prefix): v for k, v in self.tensors.items()
                                      if k.startswith(prefix)})

    def into(self, network: nn.Module) -> nn.Module:
        """Load the weights into a network, and return it in eval mode.

        Raises
        ------
        DataError
            Names or shapes are not those of the network.
        """
        try:
            network.load_state_dict(dict(self.tensors))
        except RuntimeError as error:
            raise DataError(f"the weights of {self.card.method} do not fit its network ({error}). "
                            "They belong to another version: train again, or use that "
                            "version.") from error
        return network.eval()


def pack(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Convert a checkpoint to the contents of its files.

    Parameters
    ----------
    checkpoint : Checkpoint
        Weights and card; the digest is computed, whatever the card holds.

    Returns
    -------
    dict
        Bytes by file name.
    """
    from safetensors.torch import save

    weights = save({k: v.detach().cpu().contiguous() for k, v in checkpoint.tensors.items()})
    card = replace(checkpoint.card, sha256=_digest(weights, asdict(checkpoint.card)))
    text = json.dumps(asdict(card), indent=2, allow_nan=False) + "\n"
    return {WEIGHTS: weights, CARD: text.encode()}


def _digest(weights: bytes, card: Mapping[str, Any]) -> str:
    """SHA-256 of the file of the weights and of all fields of the card but the digest itself."""
    fields = json.dumps({**card, "sha256": ""}, sort_keys=True, allow_nan=False)
    return hashlib.sha256(weights + fields.encode()).hexdigest()


def load(folder: Path, method: str | None = None) -> Checkpoint:
    """Load a checkpoint.

    Parameters
    ----------
    folder : Path
        Folder of the checkpoint.
    method : str, optional
        Method that it must belong to; default: any.

    Returns
    -------
    Checkpoint

    Raises
    ------
    DataError
        A file is missing, broken or changed, or belongs to another method.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load as read

    try:
        content = json.loads((folder / CARD).read_text())
        weights = (folder / WEIGHTS).read_bytes()
        card = Card(**{**content, "trained_for": TrainingDomain(**content["trained_for"])})
        digest = _digest(weights, content)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise DataError(f"{folder} holds no checkpoint that can be read ({error}). A folder with "
                        f"{WEIGHTS} and {CARD} is needed, as group --train writes it. The card "
                        f"must have the fields {', '.join(f.name for f in fields(Card))}. If "
                        "another version wrote it, train again.") from error
    if method not in (None, card.method):
        raise DataError(f"{folder} holds weights of {card.method}; those of {method} are needed.")
    if digest != card.sha256:
        raise DataError(f"{folder}: the SHA-256 of {WEIGHTS} and {CARD} is {digest}, but {CARD} "
                        f"says {card.sha256 or 'nothing'}. One of the two was changed or damaged: "
                        "copy or train both again.")
    try:
        return Checkpoint(read(weights), card)
    except SafetensorError as error:
        raise DataError(f"{folder / WEIGHTS}: is not a safetensors file ({error}). "
                        "Train again.") from error
