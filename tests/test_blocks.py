"""Devices, blocks and memory."""

import threading

import numpy as np
import pytest
import torch

from bidsapp.blocks import choose_device, map_volume, map_voxels, memory_limit, one_thread


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


def box(kernel, image):
    """A convolution that zeros surround, of whole numbers: exact, in whatever order it adds up."""
    weight = torch.from_numpy(kernel)[None, None]
    return torch.nn.functional.conv3d(image[None, None], weight, padding=kernel.shape[0] // 2)[0, 0]


@pytest.fixture
def kernel(rng):
    return rng.integers(-9, 10, (5, 5, 5)).astype(float)


@pytest.fixture
def image(rng):
    return rng.integers(-99, 100, (11, 6, 7)).astype(float)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("slab", [1, 2, 3, 10, 11, 50, None])
def test_slabs_with_a_halo_join_to_the_whole(kernel, image, slab, threads):
    """Exactly, at the faces of the grid and of slabs, which may be thinner than the halo."""
    whole = box(kernel, torch.from_numpy(image)).numpy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        out = map_volume(lambda part: {"box": box(kernel, part), "signs": part[..., None] > 0},
                         [image], 2, "cpu", slab)
    finally:
        torch.set_num_threads(before)
    np.testing.assert_array_equal(out["box"], whole)
    np.testing.assert_array_equal(out["signs"][..., 0], image > 0)


@pytest.mark.parametrize("halo", [0, 1])
def test_a_halo_that_is_too_thin_shows(kernel, image, halo):
    """Results are wrong where slabs meet, and nowhere else."""
    whole = box(kernel, torch.from_numpy(image)).numpy()
    found = map_volume(lambda part: {"box": box(kernel, part)}, [image], halo, "cpu", 6)["box"]
    wrong = (found != whole).any((1, 2))
    assert np.flatnonzero(wrong).tolist() == list(range(4 + halo, 8 - halo))


def test_every_thread_has_a_slab_of_its_own(image):
    met = threading.Barrier(3)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        def function(part):
            met.wait(60)  # three slabs are under way at once
            return {"same": part}

        np.testing.assert_array_equal(map_volume(function, [image], 1, "cpu")["same"], image)
    finally:
        torch.set_num_threads(before)


def test_slabs_of_several_volumes_that_stay_as_they_are(image):
    other = np.arange(11 * 6 * 7 * 2).reshape(11, 6, 7, 2)
    other.flags.writeable = False
    before = image.copy()

    def function(one, two):
        two += 1
        return {"sum": one.mul_(2) + two[..., 1]}

    out = map_volume(function, [image, other], 1, "cpu", 4)
    np.testing.assert_array_equal(out["sum"], 2 * before + other[..., 1] + 1)
    np.testing.assert_array_equal(image, before)


def test_slabs_are_halved_when_memory_is_out(kernel, image, caplog):
    def hungry(part):
        if len(part) > 7:
            raise torch.OutOfMemoryError
        return {"box": box(kernel, part)}

    with one_thread():
        found = map_volume(hungry, [image], 2, "cpu", 8)["box"]
    np.testing.assert_array_equal(found, box(kernel, torch.from_numpy(image)).numpy())
    assert "halved to 4 planes" in caplog.text and "halved to 2 planes" in caplog.text


def test_memory_limit():
    assert memory_limit(250) == 250e6
    assert 1e8 < memory_limit(None) < 1e14
