"""Where voxels are computed, and in blocks of how many."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

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
    out: dict[str, np.ndarray] = {}

    @torch.inference_mode()
    def compute(rows: range) -> None:
        nonlocal size
        while rows:
            part = rows[:size]
            chosen = slice(part.start, part.stop)
            try:
                values = function(torch.from_numpy(signal[chosen].copy("K")).to(device))
            except torch.OutOfMemoryError:
                if size <= 64:
                    raise
                size //= 2
                torch.cuda.empty_cache()
                log.warning("the GPU is out of memory; the block is halved to %d voxels.", size)
                continue
            for name, value in values.items():
                found = value.cpu().numpy()
                if name not in out:
                    out.setdefault(name, np.empty((len(signal), *found.shape[1:]), found.dtype))
                out[name][chosen] = found
            rows = rows[len(part):]

    blocks = [range(len(signal))[i:i + size] for i in range(0, len(signal), size)]
    workers = min(torch.get_num_threads(), WORKERS) if device == "cpu" else 1
    with one_thread(), ThreadPoolExecutor(workers) as pool:
        for _ in pool.map(compute, blocks):
            pass
    return out


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
