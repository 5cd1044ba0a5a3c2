"""Devices, blocks and memory."""

import threading

import numpy as np
import pytest
import torch

from bidsapp.blocks import choose_device, map_voxels, memory_limit, one_thread


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cpu_where_there_is_no_gpu(caplog):
    assert choose_device("auto") == choose_device("cpu") == "cpu"
    assert not caplog.records
    assert choose_device("cuda:3") == "cpu"
    assert "no usable GPU was found" in caplog.text


@pytest.mark.parametrize("block", [1, 3, 7, 1000, None])
def test_blocks_join_to_the_whole(rng, block):
    signal = rng.normal(size=(50, 7)).astype(np.float32)
    out = map_voxels(lambda x: {"sum": x.sum(1), "two": x[:, :2], "large": x[:, 0] > 1}, signal,
                     "cpu", block)
    np.testing.assert_allclose(out["sum"], signal.sum(1), rtol=1e-5, atol=1e-6)
    assert np.array_equal(out["two"], signal[:, :2]) and out["large"].dtype == bool


def test_every_thread_has_blocks_of_its_own():
    signal = np.arange(3000, dtype=np.float32)[:, None]
    met = threading.Barrier(3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        def function(x):
            met.wait(60)  # three blocks are under way at once
            return {"twice": 2 * x, "alone": torch.full((len(x),), torch.get_num_threads() == 1),
                    "graph": torch.full((len(x),), torch.is_grad_enabled())}

        out = map_voxels(function, signal, "cpu", 100)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(out["twice"], 2 * signal)
    assert out["alone"].all() and not out["graph"].any()


def test_failure_in_one_block_ends_all():
    begun = []

    def function(x):
        begun.append(int(x[0, 0]))
        threading.Event().wait(0.01)  # or all blocks could have begun before the first is heard of
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        map_voxels(function, np.arange(1000, dtype=np.float32)[:, None], "cpu", 1)
    assert len(begun) < 1000


def test_block_is_halved_when_memory_is_out(rng, caplog):
    signal = rng.normal(size=(1000, 7)).astype(np.float32)
    sizes = []

    def hungry(x):
        sizes.append(len(x))
        if len(x) > 130:
            raise torch.OutOfMemoryError
        return {"same": x}

    with one_thread():
        assert np.array_equal(map_voxels(hungry, signal, "cpu", 512)["same"], signal)
    assert sizes[:3] == [512, 256, 128] and "halved to 128" in caplog.text


def test_out_of_memory_with_the_smallest_block_is_told():
    def hopeless(x):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        map_voxels(hopeless, np.zeros((1000, 2), np.float32), "cpu", 256)


def test_memory_limit():
    assert memory_limit(250) == 250e6
    assert 1e8 < memory_limit(None) < 1e14
