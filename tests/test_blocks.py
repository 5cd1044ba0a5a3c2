"""Devices, blocks and memory."""

import numpy as np
import pytest
import torch

from bidsapp.blocks import choose_device, map_voxels, memory_limit


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


def test_block_is_halved_when_memory_is_out(rng, caplog):
    signal = rng.normal(size=(1000, 7)).astype(np.float32)
    sizes = []

    def hungry(x):
        sizes.append(len(x))
        if len(x) > 130:
            raise torch.OutOfMemoryError
        return {"same": x}

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
