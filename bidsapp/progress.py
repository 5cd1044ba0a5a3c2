"""Progress of work that takes minutes: a bar on a terminal, otherwise lines in the log."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

log = logging.getLogger("qsphere")

T = TypeVar("T")


def track(items: Sequence[T], task: str) -> Iterator[T]:
    """Yield items that each take long to process, and report the progress.

    Parameters
    ----------
    items : sequence
        The steps of the work.
    task : str
        Name of the work, such as `harmonize_rish: registering`. Without a terminal, a line before
        each item says `harmonize_rish: registering 3 of 16, about 4 min left`.

    Yields
    ------
    item
    """
    began = time.monotonic()
    with tqdm(total=len(items), desc=task, disable=None) as bar:
        for k, item in enumerate(items):
            if bar.disable:
                log.info("%s %d of %d%s", task, k + 1, len(items),
                         time_left(time.monotonic() - began, k, len(items)))
            yield item
            bar.update()


def time_left(seconds: float, done: int, total: int) -> str:
    """Estimate the remaining time: `, about 4 min left`; empty if nothing is done yet.

    >>> time_left(60, 1, 5)
    ', about 4 min left'
    """
    if not done:
        return ""
    rest = seconds / done * (total - done)
    if rest < 90:
        return f", about {rest:.0f} s left"
    if rest < 5400:
        return f", about {rest / 60:.0f} min left"
    return f", about {rest / 3600:.1f} h left"
