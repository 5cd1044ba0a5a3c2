"""Worker processes that end on SIGTERM, or when their parent ends."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
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
def pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Start worker processes that end with this one, however it ends.

    Parameters
    ----------
    workers : int
        Number of processes.

    Yields
    ------
    ProcessPoolExecutor
        Executor of the processes; functions are submitted through `task`.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent) as executor:
        try:
            yield executor
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def task(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a worker, so that SIGTERM ends the worker and not only the call."""
    try:
        return function(*args)
    except SystemExit:
        os._exit(TERMINATED)  # the executor would catch the exception and start the next task


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
