"""Build any network of the package from its description in a recipe or a card."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from bidsapp.errors import DataError
from bidsapp.networks.autoencoder import Autoencoder
from bidsapp.networks.cyclic import Generator
from bidsapp.networks.mlp import Perceptron
from bidsapp.networks.scnn import SphericalNetwork
from bidsapp.networks.shresnet import HybridCNN, QSpacePerceptron, SHResNet
from bidsapp.networks.unet import UNet
from bidsapp.networks.upsampling import UpsamplingNetwork
from bidsapp.networks.volumetric import VolumeNetwork

ARCHITECTURES: Mapping[str, type[nn.Module]] = {
    "spherical": SphericalNetwork, "perceptron": Perceptron, "shresnet": SHResNet,
    "golkov": QSpacePerceptron, "hybrid": HybridCNN, "cyclic": Generator, "unet": UNet,
    "autoencoder": Autoencoder, "upsampling": UpsamplingNetwork,
    "volumetric": VolumeNetwork}


def build_network(description: Mapping[str, Any], **more: Any) -> nn.Module:
    """Build a network by the name of its architecture.

    Parameters
    ----------
    description : mapping
        `architecture`, one of ARCHITECTURES, and the arguments of its constructor: the table
        `network` of a training.toml, or of a card.
    **more
        Further arguments of the constructor.

    Returns
    -------
    torch.nn.Module
        The network, with random weights.

    Raises
    ------
    DataError
        The architecture is unknown.
    """
    name = description.get("architecture", "")
    if name not in ARCHITECTURES:
        raise DataError(f"the network has the architecture {name!r}; known are "
                        f"{', '.join(ARCHITECTURES)}. The weights belong to another version: "
                        "train again, or use that version.")
    arguments = {k: v for k, v in description.items() if k != "architecture"}
    return ARCHITECTURES[name](**arguments, **more)
