"""Processes that work side by side, and what ends them: SIGTERM, or the end of their parent."""

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
"""Exit code of a program that SIGTERM ended, as shells count."""

GRACE = 20.0
"""Seconds in which a worker whose parent died may remove what it has half-written."""


@contextmanager
def sigterm_exits() -> Iterator[None]:
    """Make SIGTERM raise SystemExit(143) inside, so that staged files are swept on the way out.

    Python leaves SIGTERM to the system, which ends a process at once and, where the process is the
    first of a container, ignores the signal. Threads other than the main one cannot change that.
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
    """Start processes that end with this one, however it ends; run tasks in them by `task`."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=spawn, initializer=_follow_parent) as executor:
        try:
            yield executor
        except BaseException:
            for child in multiprocessing.active_children():
                child.terminate()
            raise


def task(function: Callable[..., Any], *args: Any) -> Any:
    """Call a function in a worker; SIGTERM ends the worker, not the call alone."""
    try:
        return function(*args)
    except SystemExit:
        os._exit(TERMINATED)  # the executor would note the exception and go on with the next task


def _leave(*_: Any) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one would interrupt the sweeping
    raise SystemExit(TERMINATED)


def _follow_parent() -> None:
    signal.signal(signal.SIGTERM, _leave)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        parent.join()  # of a pipe, which the system closes when the parent ends
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(GRACE)
        os._exit(TERMINATED)

    threading.Thread(target=watch, daemon=True).start()
