"""Networks of patches: against torch's own convolutions; RISH projection."""

import numpy as np
import pytest
import torch
from torch import nn

from bidsapp import sh
from bidsapp.harmonization import patches
from bidsapp.networks import shresnet
from bidsapp.registration.geometry import fill_nearest
from bidsapp.training import seeded


def randomised(network):
    """Away from the identity that it starts as."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network.eval()


@pytest.fixture
def network():
    with seeded(1):
        return randomised(shresnet.SHResNet())


class Published(nn.Module):
    """The text of the paper in Conv3d, on (voxel, coefficient, 3, 3, 3), with a network's weights.
    """

    def __init__(self, network):
        super().__init__()
        self.network = network

    def convolve(self, layer, x):
        return nn.functional.conv3d(x, layer.weight, layer.bias, padding=1)

    def unit(self, unit, x):
        first, _, second, _, third = unit
        x = self.convolve(first, x).relu()
        return self.convolve(third, self.convolve(second, x).relu())

    def forward(self, x):
        n = self.network
        start = x = self.convolve(n.pre[1], self.convolve(n.pre[0], x))
        for block in n.blocks:
            x = x - torch.cat([self.unit(u, x) for u in block.units], 1)
        x = self.convolve(n.post[1], self.convolve(n.post[0], x)) - start
        last = n.final.weight.unflatten(1, (27, -1)).transpose(1, 2).unflatten(2, (3, 3, 3))
        return nn.functional.conv3d(x, last, n.final.bias)[..., 0, 0, 0]


def test_is_the_published_architecture_in_torchs_convolutions(network):
    x = torch.randn(5, 27, 15, generator=torch.Generator().manual_seed(0))
    volume = x.transpose(1, 2).unflatten(2, (3, 3, 3))
    with torch.no_grad():
        torch.testing.assert_close(network(x), Published(network)(volume), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("l_max,blocks", [(2, 1), (4, 2), (4, 3)])
def test_folded_it_is_the_same_function(l_max, blocks):
    """To rounding in float64, and in float32 to what that leaves."""
    with seeded(3):
        network = randomised(shresnet.SHResNet(blocks=blocks, l_max=l_max))
        x = torch.randn(6, 27, sh.size(l_max))
    with torch.no_grad():
        exact = network.double()(x.double())
        torch.testing.assert_close(network.folded()(x.double()), exact, rtol=1e-10, atol=1e-10)
        rough = network.float().folded()(x)
    assert rough.dtype == torch.float32
    assert (rough - exact).abs().max() < 1e-4 * exact.abs().max()


def test_hybrid_starts_as_no_harmonization_and_sees_neighbours():
    with seeded(4):
        network, x = shresnet.HybridCNN(), torch.randn(4, 27, 15)
        torch.testing.assert_close(network(x), x[:, 13], rtol=0, atol=0)
        randomised(network)
    other = x.clone()
    other[:, 0] += 1
    assert (network(x) - network(other)).abs().max() > 1e-3


@pytest.mark.parametrize("l_max,blocks", [(2, 1), (4, 2), (4, 3)])
def test_a_functional_unit_for_every_order(l_max, blocks):
    network = shresnet.SHResNet(blocks=blocks, l_max=l_max)
    size = (l_max + 1) * (l_max + 2) // 2
    assert len(network.blocks) == blocks
    for block in network.blocks:
        outs = [[tuple(c.weight.shape) for c in unit if hasattr(c, "weight")]
                for unit in block.units]
        assert outs == [[(size, size, 3, 3, 3)] * 2 + [(2 * l + 1, size, 3, 3, 3)]
                        for l in range(0, l_max + 1, 2)]
    convolution = 27 * size * size + size
    units = 2 * (l_max // 2 + 1) * convolution + convolution
    assert sum(p.numel() for p in network.parameters()) == 5 * convolution + blocks * units


def test_starts_as_no_harmonization():
    x = torch.randn(4, 27, 15)
    torch.testing.assert_close(shresnet.SHResNet()(x), x[:, 13], rtol=0, atol=1e-6)


def test_the_perceptron_sees_the_central_voxel_alone():
    with seeded(2):
        network, x = shresnet.QSpacePerceptron().eval(), torch.randn(4, 27, 15)
    other = torch.randn(4, 27, 15)
    other[:, 13] = x[:, 13]
    torch.testing.assert_close(network(x), network(other), rtol=0, atol=0)
    assert [tuple(m.weight.shape) for m in network.layers if isinstance(m, nn.Linear)] == [
        (150, 15), (150, 150), (150, 150), (15, 150)]


@pytest.mark.parametrize("block,slab", [(7, None), (4096, None), (7, 1), (4096, 3)])
def test_over_a_volume_as_patch_by_patch(network, rng, block, slab):
    """Blocks and slabs of any size give what single patches, cut out here by hand, give."""
    mask = rng.random((5, 6, 7)) < 0.4
    mask[0, 0, 0] = mask[-1, -1, -1] = True  # corners: patches reach into the margin
    network = network.double()  # so that rounding hides nothing
    values = rng.normal(size=(int(mask.sum()), 15))
    image = fill_nearest(values, mask, margin=1)
    found = patches.apply_to_volume(network, image, mask, "cpu", block, slab)
    with torch.no_grad():
        single = [network(torch.from_numpy(image[i:i + 3, j:j + 3, k:k + 3].reshape(1, 27, 15)))[0]
                  for i, j, k in np.argwhere(mask)]
    np.testing.assert_allclose(found, torch.stack(single).numpy(), rtol=1e-10, atol=1e-10)


def test_rish_does_not_change_with_rotation(rng):
    from scipy.spatial.transform import Rotation

    c = torch.from_numpy(rng.normal(size=(6, 15)))
    turn = torch.from_numpy(Rotation.random(random_state=3).as_matrix())
    torch.testing.assert_close(sh.rish(sh.rotate(c, turn)), sh.rish(c))
    torch.testing.assert_close(sh.rish(c).sum(1), c.square().sum(1))


def test_projection_takes_the_size_of_every_order_and_keeps_its_shape(rng):
    own, other = (torch.from_numpy(rng.normal(size=(6, 15))) for _ in range(2))
    own[2, 1:6] = 0  # no degree 2: nothing to scale
    found = sh.with_rish(own, sh.rish(other))
    expected = sh.rish(other)
    expected[2, 1] = 0
    torch.testing.assert_close(sh.rish(found), expected)
    for l in (0, 2, 4):
        part = sh.degrees(4) == l
        a, b = own[:, part], found[:, part]
        torch.testing.assert_close((a * b).sum(1), a.norm(dim=1) * b.norm(dim=1))
    assert torch.isfinite(sh.with_rish(torch.zeros(1, 15), torch.ones(1, 3))).all()


def test_projection_leaves_the_peak_of_a_single_fibre_where_it_is():
    """exp(−b D) of a tensor with one axis: least signal along that axis, whatever the network."""
    axis = np.array([2.0, 1.0, 3.0]) / np.sqrt(14)
    points, weights = sh.quadrature(40)
    signal = np.exp(-1.2 * (0.4 + 1.3 * (points @ axis) ** 2))
    own = torch.from_numpy(signal @ (weights[:, None] * sh.basis(4, points)))[None]
    features = sh.rish(own) * torch.tensor([[1.1, 0.7, 0.4]])
    found = sh.with_rish(own, features)
    # the gradient on the sphere vanishes at the axis, and the value there is the least
    near = torch.tensor(axis, requires_grad=True)
    value = (sh.evaluate(4, (near / near.norm())[None]) * found).sum()
    value.backward()
    assert near.grad.norm() < 1e-10
    assert float(value.detach()) <= 1e-12 + (sh.basis(4, points) @ found[0].numpy()).min()
