"""Worker processes that end on SIGTERM, or when their parent ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import starmap
from typing import Any

TERMINATED = 128 + signal.SIGTERM
"""Exit code of a program that SIGTERM ended, as in shells."""

GRACE = 20.0
"""Time for a worker whose parent died to remove unfinished files, in seconds."""


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143) inside the block, so that staged files are removed.

    By default SIGTERM ends a process at once, or is ignored if the process is the first of a
    container. Only the main thread can change that; in other threads the block has no effect.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def pool(workers: int, threads: int = 1) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes that end with this one, however it ends.

    Parameters
    ----------
    workers : int
        Number of processes.
    threads : int
        Threads of BLAS in each of them, or fewer if OMP_NUM_THREADS is lower.

    Yields
    ------
    ProcessPoolExecutor
        Executor of the processes; functions are submitted through `task`.
    """
    spawn = multiprocessing.get_context("spawn")
    inherited = os.environ.get("OMP_NUM_THREADS")
    limit = int(inherited) if inherited and inherited.isdecimal() else threads
    os.environ["OMP_NUM_THREADS"] = str(min(threads, limit))
    try:
        with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent) as executor:
            try:
                yield executor
            except BaseException:
                for child in multiprocessing.active_children():
                    child.terminate()
                raise
    finally:
        if inherited is None:
            del os.environ["OMP_NUM_THREADS"]
        else:
            os.environ["OMP_NUM_THREADS"] = inherited


def task(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a worker, so that SIGTERM ends the worker and not only the call."""
    try:
        return function(*args)
    except SystemExit:
        os._exit(TERMINATED)  # the executor would catch the exception and start the next task


@contextmanager
def spread(workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """Start processes of one thread each, for calls that do not depend on each other.

    Parameters
    ----------
    workers
        Number of processes; with 1 the calls are made in this one.

    Yields
    ------
    callable
        Takes a function and the tuples of its arguments, and iterates over its results in their
        order. The first exception, in this order, is raised, and MemoryError where a process died,
        of which too little memory is the usual cause.
    """
    if workers == 1:
        yield starmap
        return
    with pool(workers) as executor:

        def results(function: Callable[..., Any], calls: Iterable[tuple[Any, ...]]
                    ) -> Iterator[Any]:
            futures = [executor.submit(task, _single_threaded, function, *args) for args in calls]
            try:
                yield from (future.result() for future in futures)
            except BrokenProcessPool as error:
                raise MemoryError("a process that worked for this one died") from error

        yield results


def _single_threaded(function: Callable[..., Any], *args: Any) -> Any:
    import torch

    torch.set_num_threads(1)
    return function(*args)


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second signal would interrupt the cleaning
    raise SystemExit(TERMINATED)


def _follow_parent() -> None:
    signal.signal(signal.SIGTERM, _leave)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()  # waits for a pipe that the system closes when the parent ends
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(TERMINATED)

    threading.Thread(target=watch, daemon=True).start()
