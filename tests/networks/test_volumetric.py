"""Networks on volumes: the matrix of a table, its equations, and what outputs depend on."""

import pytest
import torch

from bidsapp import sh
from bidsapp.networks.builder import build_network
from bidsapp.networks.volumetric import Table, TableEmbedding, TableReadout
from bidsapp.training import seeded


def table(counts=(20, 30), b=(1.0, 2.5), seed=0):
    """A table of random directions; its fit is the pseudoinverse."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(counts)
    axes = torch.nn.functional.normalize(torch.randn(n, 3, generator=generator), dim=1)
    basis = torch.from_numpy(sh.basis(8, axes.double().numpy())).float()
    shell = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    fit = torch.zeros(len(counts), 45, n)
    for i in range(len(counts)):
        fit[i][:15, shell == i] = torch.linalg.pinv(basis[shell == i][:, :15])
    shells = torch.tensor([[b_, 1.0, count**-0.5] for b_, count in zip(b, counts, strict=True)])
    return Table(fit, shells, basis, shell)


@pytest.fixture
def embedding():
    with seeded(1):
        return TableEmbedding(5)


def test_embedding_is_its_equation(embedding):
    one = table()
    matrix = embedding(one)
    weights = embedding.weights(one.shells)  # coefficient, shell, kernel
    for i in (0, 7, 33):  # a measurement, as a signal of 1
        want = torch.zeros(5)
        for s in range(2):
            for c in range(45):
                for k in range(4):
                    want += (embedding.mix[:, c, k] * weights[c, s, k] * one.fit[s, c, i]) / 2
        torch.testing.assert_close(matrix[i], want, atol=1e-5, rtol=1e-4)


def test_channels_do_not_depend_on_the_order_of_measurements_and_shells(embedding):
    one = table()
    order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
    other = Table(one.fit[[1, 0]][:, :, order], one.shells[[1, 0]], one.basis[order],
                  1 - one.shell[order])
    torch.testing.assert_close(embedding(other), embedding(one)[order])


def test_channels_of_a_signal_hardly_depend_on_its_directions(embedding):
    """A signal of degree 4 has the same coefficients on any table that carries degree 4."""
    c = torch.zeros(45)
    c[:15] = torch.randn(15, generator=torch.Generator().manual_seed(4))
    channels = []
    for seed in (0, 1):
        one = table((30,), (1.0,), seed)
        channels.append((one.basis @ c) @ embedding(one))
    torch.testing.assert_close(*channels, atol=1e-4, rtol=1e-3)


def test_signals_of_a_shell_have_its_weights():
    with seeded(1):
        readout = TableReadout(6)
    one = table()
    matrix = readout(one)
    for i in (3, 40):
        c = (readout.weights(one.shells)[:, one.shell[i]] * readout.mix).sum(-1)
        torch.testing.assert_close(matrix[:, i], c @ one.basis[i])


def small(**more):
    with seeded(2):
        return build_network({"architecture": "volumetric", "channels": 4, "width": 4,
                              "levels": 2, **more}).eval()


def test_images_of_one_size_do_not_change_each_other():
    network, generator = small(outputs=3), torch.Generator().manual_seed(5)
    tables = [table(), table((12,), (0.7,))]
    ratios = [torch.rand(len(t.shell), 9, 10, 11, generator=generator) for t in tables]
    both = network(ratios, tables)
    for ratio, one, together in zip(ratios, tables, both, strict=True):
        assert together.shape == (3, 9, 10, 11)
        torch.testing.assert_close(network([ratio], [one])[0], together, atol=1e-5, rtol=1e-4)


def test_smaller_images_keep_their_size():
    network = small(outputs=None)
    tables = [table(), table((12,), (0.7,))]
    outputs = network([torch.rand(50, 3, 10, 7), torch.rand(12, 9, 2, 4)], tables)
    assert [tuple(y.shape) for y in outputs] == [(50, 3, 10, 7), (12, 9, 2, 4)]
    assert all(y.isfinite().all() for y in outputs)


def test_without_a_table_the_input_is_the_channels():
    network = small(outputs=2, any_table=False)
    x = torch.rand(4, 8, 9, 10)
    assert network([x], [None])[0].shape == (2, 8, 9, 10)
    assert "embedding" not in network.encoder


def test_the_encoder_is_all_but_the_head():
    names = {k.split(".")[0] for k in small(outputs=2).state_dict()}
    assert names == {"encoder", "head"}
