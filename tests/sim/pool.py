"""Runs many small pieces of a campaign in processes of their own, and gives them back in order."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def settle_memory() -> None:
    """What has been imported lives for ever, and runs are short: the collector comes seldom."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 50)


def ordered(
    function: Callable[[T], R], items: Sequence[T], *, jobs: int, batch: int
) -> Iterator[R]:
    """``function`` of each item, in the items' order; stops working when nobody asks any more."""
    if jobs <= 1:
        settle_memory()
        yield from map(function, items)
        return
    with ProcessPoolExecutor(jobs, initializer=settle_memory) as pool:
        try:
            yield from pool.map(function, items, chunksize=batch)
        finally:
            pool.shutdown(cancel_futures=True)
