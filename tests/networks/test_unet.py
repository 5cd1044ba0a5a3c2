"""U-Net: against torch's own functions, grids of any size, and what it may depend on."""

import pytest
import torch
from torch.nn import functional

from bidsapp.errors import DataError
from bidsapp.networks.builder import build_network
from bidsapp.networks.unet import UNet
from bidsapp.training import seeded


def trained_like(dimension=2, levels=2, width=4):
    """A network in eval mode whose normalisation is not the identity."""
    with seeded(1):
        network = UNet(inputs=3, outputs=2, width=width, levels=levels, dimension=dimension)
        for _ in range(3):
            network(2 + torch.randn(4, 3, *[16] * dimension))
    return network.eval()


def published(network, x, convolve, pool, levels):
    """Figure 1 of the paper with zero padding, from the network's weights by name."""
    weights = network.state_dict()

    def block(y, name):
        for k in (0, 3):
            mean, variance, gain, shift = (
                weights[f"{name}.{k + 1}.{v}"][(None, slice(None), *[None] * (x.ndim - 2))]
                for v in ("running_mean", "running_var", "weight", "bias"))
            y = convolve(y, weights[f"{name}.{k}.weight"], padding=1)
            y = torch.relu((y - mean) / torch.sqrt(variance + 1e-5) * gain + shift)
        return y

    features = [block(x, "down.0")]
    for k in range(1, levels + 1):
        features.append(block(pool(features[-1], 2), f"down.{k}"))
    y = features.pop()
    for k in range(levels - 1, -1, -1):
        for axis in range(2, x.ndim):
            y = y.repeat_interleave(2, axis)
        y = block(torch.cat([features.pop(), y], 1), f"up.{k}")
    return convolve(y, weights["final.weight"], weights["final.bias"])


@pytest.mark.parametrize("dimension,levels", [(2, 1), (2, 3), (3, 2)])
def test_is_the_published_architecture(dimension, levels):
    network = trained_like(dimension, levels)
    x = torch.randn(2, 3, *[16] * dimension, generator=torch.Generator().manual_seed(3))
    convolve = {2: functional.conv2d, 3: functional.conv3d}[dimension]
    pool = {2: functional.max_pool2d, 3: functional.max_pool3d}[dimension]
    with torch.no_grad():
        torch.testing.assert_close(network(x), published(network, x, convolve, pool, levels))


def test_channels_double_with_each_level():
    network = UNet(inputs=30, outputs=60, width=8, levels=2)
    assert [block[0].out_channels for block in network.down] == [8, 16, 32]
    assert [(block[0].in_channels, block[0].out_channels) for block in network.up] == [
        (24, 8), (48, 16)]


@pytest.mark.parametrize("dimension,grid", [(2, (5, 11)), (2, (1, 3)), (3, (5, 6, 9))])
def test_grids_that_no_stride_divides_are_padded_with_zeros_and_cropped(dimension, grid):
    network = trained_like(dimension)
    x = torch.randn(2, 3, *grid, generator=torch.Generator().manual_seed(4))
    whole = torch.zeros(2, 3, *[-(-n // 4) * 4 for n in grid])
    box = (..., *(slice(n) for n in grid))
    whole[box] = x
    with torch.no_grad():
        found, wanted = network(x), network(whole)[box]
    assert found.shape == (2, 2, *grid)
    torch.testing.assert_close(found, wanted)


def test_images_do_not_influence_each_other():
    network = trained_like()
    x = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        torch.testing.assert_close(network(x)[1:2], network(x[1:2]))


def test_is_known_to_the_builder():
    network = build_network({"architecture": "unet", "width": 2, "levels": 1}, inputs=5, outputs=1)
    assert network(torch.zeros(1, 5, 4, 4)).shape == (1, 1, 4, 4)
    with pytest.raises(DataError, match="unet"):
        build_network({"architecture": "u-net"})
