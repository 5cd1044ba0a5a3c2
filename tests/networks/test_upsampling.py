"""The network that predicts directions: equivariance, neighbours, and its start."""

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from bidsapp import sh
from bidsapp.networks import upsampling
from bidsapp.networks.upsampling import CENTRE, Neighbourhoods, Shells, UpsamplingNetwork

PROPERTIES = 5
GROUPS, VOXELS, SHELLS = 2, 40, 3


def network(seed=0, grid=35, start=False):
    """A small network; unless it is as at the start, no layer is 0."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = UpsamplingNetwork(properties=PROPERTIES, channels=6, heads=2, attention=8, hidden=16,
                                grid=grid).double()
        if not start:
            for weight in net.parameters():
                weight.data += 0.1 * torch.randn(weight.shape).double()
    return net.eval()


@pytest.fixture
def inputs():
    """Coefficients that fall with the degree, 27 random neighbours, and a shell less in a group."""
    g = torch.Generator().manual_seed(1)
    n = GROUPS * VOXELS
    size = torch.exp(-torch.from_numpy(sh.degrees(8)) / 3.0)
    x = size * torch.randn(n, SHELLS, 45, generator=g).double()
    x[..., 0] = 1 + 0.2 * torch.rand(n, SHELLS, generator=g)
    rows = torch.cat([k * VOXELS + torch.randint(VOXELS, (20, 27), generator=g)
                      for k in range(GROUPS)])
    present = torch.rand(rows.shape, generator=g) < 0.8
    present[:, CENTRE] = True
    properties = torch.randn(GROUPS, SHELLS, PROPERTIES, generator=g).double()
    properties[..., 0] = 1
    nearness = torch.tensor([[0.0, 1.0, 0.0], [0.7, 0.3, 0.0]]).double()
    variance = torch.rand(GROUPS, SHELLS, 5, generator=g).double()
    for values in (properties[1, 2], variance[1, 2], x[VOXELS:, 2]):
        values[:] = 0
    noise = torch.rand(n, 3, generator=g).double() / 5
    return (x, noise, torch.randn(n, generator=g).double(), Neighbourhoods(rows, present),
            Shells(properties, nearness, variance))


def test_is_equivariant(inputs):
    """Turned coefficients give the turned prediction and SD, to the aliasing of the half grid."""
    x, *others = inputs
    net = network()
    with torch.no_grad():
        one = net(x, *others)
        for r in torch.tensor(Rotation.random(3, random_state=0).as_matrix()):
            other = net(sh.rotate(x, r), *others)
            for name in ("mean", "log_sd"):
                expected = sh.rotate(getattr(one, name).T, r)
                scale = float(expected[:, 1:].abs().max())
                np.testing.assert_allclose(getattr(other, name).T, expected, atol=1e-5 * scale)


def test_absent_neighbours_have_no_influence(inputs):
    x, noise, log_s0, around, shells = inputs
    rows = around.rows.clone()
    rows[~around.present] = 0
    changed = Neighbourhoods(rows, around.present)
    with torch.no_grad():
        one, other = (network()(x, noise, log_s0, n, shells) for n in (around, changed))
    np.testing.assert_allclose(other.mean, one.mean, atol=1e-12)
    np.testing.assert_allclose(other.log_sd, one.log_sd, atol=1e-12)


def test_axes_of_the_grid_are_alike(inputs):
    """A mirror image of the neighbourhood gives the same result; a neighbour at a corner counts
    otherwise than one across a face."""
    x, noise, log_s0, around, shells = inputs

    def permuted(order):
        return Neighbourhoods(around.rows[:, order], around.present[:, order])

    cube = torch.arange(27).view(3, 3, 3)
    swapped = torch.arange(27)
    swapped[[0, 4]] = torch.tensor([4, 0])  # a corner and a face
    with torch.no_grad():
        one, mirror, other = (network()(x, noise, log_s0, n, shells).mean for n in (
            around, permuted(cube.flip(0).transpose(1, 2).flatten()), permuted(swapped)))
    np.testing.assert_allclose(mirror, one, atol=1e-12)
    assert (other - one).abs().max() > 1e-4


def test_groups_are_independent(inputs):
    x, noise, log_s0, around, shells = inputs
    with torch.no_grad():
        both = network()(*inputs)
        second = network()(x[VOXELS:], noise[VOXELS:], log_s0[VOXELS:], Neighbourhoods(
            around.rows[20:] - VOXELS, around.present[20:]), Shells(*(v[1:] for v in shells)))
    np.testing.assert_allclose(second.mean, both.mean[:, 20:], atol=1e-12)


def test_starts_as_the_average_of_the_nearest_shell(inputs):
    """The average over heads of a neighbourhood of equal voxels is the voxel itself; the SD starts
    at σ/e."""
    x, noise, log_s0, around, shells = inputs
    alike = Neighbourhoods(around.rows[:, CENTRE, None].expand(-1, 27), around.present)
    with torch.no_grad():
        found = network(start=True)(x, noise, log_s0, alike, shells)
    centre = x[alike.rows[:, CENTRE]]
    weight = shells.nearness.repeat_interleave(20, 0)[..., None]
    np.testing.assert_allclose(found.mean.T, (centre * weight).sum(1), atol=1e-9)
    sigma = noise[alike.rows[:, CENTRE], 0]
    np.testing.assert_allclose(found.log_sd[0] / np.sqrt(4 * np.pi),
                               sigma.log() - 1, atol=1e-9)
    assert not found.log_sd[1:].any()


def test_neighbours_that_differ_count_less(inputs):
    """A weight falls with the distance if the network says so: with hand-made weights that depend
    on the distance of degree 0 alone."""
    x, noise, log_s0, around, shells = inputs
    average = upsampling.NeighbourAverage(1, 2).double()
    for parameter in average.parameters():
        torch.nn.init.zeros_(parameter)
    average.net[0].weight.data[0, 0] = 1.0
    average.net[2].weight.data[0, 0] = 1.0
    average.net[4].weight.data[:, 0] = -1.0
    far = x.clone()
    neighbour = around.rows[0, 0]
    assert neighbour != around.rows[0, CENTRE] and around.present[0, 0]
    results = []
    for shift in (0.0, 30.0):
        far[neighbour, :, 0] = x[neighbour, :, 0] + shift
        with torch.no_grad():
            results.append(average(far, noise, log_s0, around, shells)[0][0, 0])
    # a neighbour 30 away in 1 of 27 with equal weight would change the average by about 1
    assert (results[1] - results[0]).abs().max() < 0.1
