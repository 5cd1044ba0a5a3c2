"""Computation on voxels in blocks or slabs that fit in memory, the device, and the memory limit."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Shaped

from bidsapp.errors import UsageError

log = logging.getLogger(__name__)

WORKERS = 16
"""Largest number of blocks that are computed in parallel on a CPU. Each took 10 to 32 MB (smt, dti,
scnn2)."""


def choose_device(wanted: str) -> str:
    """Choose the device, with a warning if the CPU must replace a GPU that was asked for.

    Parameters
    ----------
    wanted : str
        `auto`, `cpu`, `cuda` or `cuda:N`.

    Returns
    -------
    str
        `cpu`, `cuda` or `cuda:N`.

    Raises
    ------
    UsageError
        There is no GPU of that number.
    """
    if wanted == "cpu":
        return "cpu"
    if not torch.cuda.is_available():
        if wanted != "auto":
            log.warning("--device %s: no usable GPU was found; the CPU is used.", wanted)
        return "cpu"
    if wanted.startswith("cuda:") and int(wanted[5:]) >= torch.cuda.device_count():
        raise UsageError(f"--device {wanted}: there are {torch.cuda.device_count()} GPUs, "
                         "counted from 0.")
    return "cuda" if wanted == "auto" else wanted


def map_voxels(
    function: Callable[[torch.Tensor], Mapping[str, torch.Tensor]],
    signal: np.ndarray,
    device: str,
    block: int | None = None,
) -> dict[str, np.ndarray]:
    """Apply a function to blocks of voxels, and join the results.

    On a CPU each thread has its own blocks, since threads that share a block wait for each other at
    each step. On a GPU that runs out of memory the block is halved.

    Parameters
    ----------
    function : callable
        (block, measurement) float32 on `device` → {name: (block, …)}, without gradients. The result
        of a voxel must not depend on other voxels.
    signal : (voxel, measurement) float32
        The signal.
    device : str
        Device of the computation.
    block : int, optional
        Number of voxels in a block. By default a block has a million numbers (16 million on a GPU),
        so that steps are long and still fit in the cache.

    Returns
    -------
    dict of (voxel, …)
        Results by name.
    """
    size = block or max(64, (2**20 if device == "cpu" else 2**24) // signal.shape[1])
    return _map(lambda rows: function(torch.from_numpy(
        signal[rows.start:rows.stop].copy("K")).to(device)), range(len(signal)), size, 64, device,
                "voxels")


def map_volume(
    function: Callable[..., Mapping[str, torch.Tensor]],
    volumes: Sequence[Shaped[np.ndarray, "x y z ..."]],
    halo: int,
    device: str,
    slab: int | None = None,
) -> dict[str, np.ndarray]:
    """Apply a function to slabs of a grid, and join the results as if it were applied to the whole.

    Parameters
    ----------
    function : callable
        Slabs (x', y, z, …) of the volumes on `device` → {name: (x', y, z, …)}, without gradients.
        The result of a voxel may depend only on voxels up to `halo` planes away. A slab at the
        first or last plane of the grid has no halo on that side, so that the function pads there as
        it would for the whole grid.
    volumes : sequence of (x, y, z, …)
        Volumes on one grid; they are not changed.
    halo : int
        Number of planes that are added to a slab on each side, if the grid has them. Their results
        are dropped.
    device : str
        Device of the computation. On a GPU that runs out of memory slabs are halved.
    slab : int, optional
        Number of planes along x in a slab, without the halo. By default a slab has up to a million
        numbers (16 million on a GPU), fewer if some threads would otherwise have no slab, but at
        least as many planes as the halo.

    Returns
    -------
    dict of (x, y, z, …)
        Results by name.
    """
    depth = len(volumes[0])
    plane = sum(v[:1].size for v in volumes) or 1
    size = slab or max(1, halo, min((2**20 if device == "cpu" else 2**24) // plane,
                                    -(-depth // _workers(device))))

    def apply(planes: range) -> dict[str, torch.Tensor]:
        low, high = max(planes.start - halo, 0), planes.stop + halo
        results = function(*(torch.from_numpy(v[low:high].copy()).to(device) for v in volumes))
        return {name: values[planes.start - low:planes.stop - low]
                for name, values in results.items()}

    return _map(apply, range(depth), size, 1, device, "planes")


def _map(apply: Callable[[range], Mapping[str, torch.Tensor]], every: range, size: int,
         min_size: int, device: str, unit: str) -> dict[str, np.ndarray]:
    """Apply a function to ranges of `size` units and join the results.

    Ranges are processed in parallel on a CPU, and one by one on a GPU, where a range that does not
    fit in memory is halved, down to `min_size`.
    """
    out: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def compute(rows: range) -> None:
        nonlocal size
        while rows:
            part = rows[:size]
            try:
                values = apply(part)
            except torch.OutOfMemoryError:
                if size <= min_size:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                log.warning("the GPU is out of memory; the block is halved to %d %s.", size,
                            unit)
                continue
            for name, value in values.items():
                result = value.cpu().numpy()
                if name not in out:
                    out.setdefault(name, np.empty((len(every), *result.shape[1:]), result.dtype))
                out[name][part.start:part.stop] = result
            rows = rows[len(part):]

    blocks = [every[i:i + size] for i in range(0, len(every), size)]
    workers = _workers(device)
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(compute, blocks):
            pass
    return out


def _workers(device: str) -> int:
    """Number of blocks that are computed in parallel."""
    return min(torch.get_num_threads(), WORKERS) if device == "cpu" else 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread inside the block.

    With small matrices several threads only wait for each other, especially if cores are busy.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_limit(mem_mb: int | None) -> float:
    """Find the memory that may be used, in bytes.

    It is --mem-mb if given; otherwise the smallest of physical memory and the limits of the control
    groups (containers, SLURM jobs) of this process.
    """
    if mem_mb is not None:
        return mem_mb * 1e6
    limits = [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    groups = Path("/proc/self/cgroup")
    for line in groups.read_text().splitlines() if groups.exists() else ():
        _, controllers, path = line.split(":", 2)
        root, name = Path("/sys/fs/cgroup"), "memory.max"
        if "memory" in controllers.split(","):
            root, name = root / "memory", "memory.limit_in_bytes"
        for folder in (inner := root / path.lstrip("/"), *inner.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                limits.append(float((folder / name).read_text()))
    return min(limits)
