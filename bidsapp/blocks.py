"""Compute on voxels: choice of the device, blocks of voxels, slabs of a grid with a halo."""

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
"""Blocks at a time, at most: each took 10 to 32 MB (smt, dti, scnn2)."""


def choose_device(wanted: str) -> str:
    """`auto`, `cpu`, `cuda` or `cuda:N` → the device to use; falls back to the CPU with a notice.

    Raises:
        UsageError: a GPU of that number does not exist.
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
    """Apply `function` to blocks of rows and stack what it returns, as numpy arrays.

    function: (block, measurement) float32 on `device` → {name: (block, …)}; each voxel must be
    treated independently of the others, without gradients. On a CPU every thread has blocks of its
    own: threads that share the steps of one wait for each other at each. block: voxels at a time;
    by default as many as hold a million numbers (16 million on a GPU), so that steps are long and
    still fit the cache. On a GPU that runs out of memory the block is halved.
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
    """Apply `function` to slabs of a grid and join what it returns, as if to the whole.

    Parameters
    ----------
    function : callable
        Slabs (x', y, z, …) of the volumes, on `device` → {name: (x', y, z, …)}, without gradients.
        What it returns for a voxel may depend on voxels up to `halo` planes away and on no
        others. At the faces of the grid a slab ends, as the whole does.
    volumes : sequence of arrays
        All on one grid; they stay as they are.
    halo : int
        Planes that a slab has more on each side, where the grid has them; what is returned for
        them is dropped.
    device : str
        Where to compute. On a GPU that runs out of memory slabs are halved.
    slab : int, optional
        Planes along x at a time, halo aside. Default: as many as hold a million numbers (16 million
        on a GPU), fewer where a thread would have none, and no fewer than the halo.

    Returns
    -------
    dict
        By name: (x, y, z, …).
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


def _map(apply: Callable[[range], Mapping[str, torch.Tensor]], every: range, size: int, least: int,
         device: str, unit: str) -> dict[str, np.ndarray]:
    """Apply to parts of `size` units and stack what is returned: in parallel on a CPU; one by one
    on a GPU, where a part that does not fit the memory is halved, down to `least`."""
    out: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def compute(rows: range) -> None:
        nonlocal size
        while rows:
            part = rows[:size]
            try:
                values = apply(part)
            except torch.OutOfMemoryError:
                if size <= least:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                log.warning("the GPU is out of memory; the block is halved to %d %s.", size,
                            unit)
                continue
            for name, value in values.items():
                found = value.cpu().numpy()
                if name not in out:
                    out.setdefault(name, np.empty((len(every), *found.shape[1:]), found.dtype))
                out[name][part.start:part.stop] = found
            rows = rows[len(part):]

    blocks = [every[i:i + size] for i in range(0, len(every), size)]
    workers = _workers(device)
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(compute, blocks):
            pass
    return out


def _workers(device: str) -> int:
    """How many blocks are computed at a time."""
    return min(torch.get_num_threads(), WORKERS) if device == "cpu" else 1


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """torch on one thread inside: over small matrices several only wait for each other, many times
    longer where cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_limit(mem_mb: int | None) -> float:
    """Bytes that may be used: --mem-mb, else the least of physical memory and the limits of the
    control groups (containers, SLURM jobs) that this process is in."""
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
            with contextlib.suppress(OSError, ValueError):  # not here; "max"
                limits.append(float((folder / name).read_text()))
    return min(limits)
