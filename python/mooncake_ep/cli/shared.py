"""Memory that the ranks of one machine share, for bench: windows, and a barrier of microseconds.

The memory has no name: a rank opens its peer's through /proc, so nothing can be left behind in
/dev/shm.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import RankFailedError

if TYPE_CHECKING:
    import numpy.typing as npt

    from mooncake_ep import Group

_BARRIER_TIMEOUT_S = 100.0
_CACHE_LINE_WORDS = 8
_CLOCK_INTERVAL = 1024


def share(group: Group, byte_count: int) -> list[npt.NDArray[np.uint8]]:
    """Map `byte_count` zeroed bytes of each rank; the list is ordered by rank. Collective."""
    descriptor = os.memfd_create("mooncake-ep-bench")
    try:
        os.ftruncate(descriptor, byte_count)
        windows = []
        for place in group.all_gather(struct.pack("<qq", os.getpid(), descriptor)):
            process, number = struct.unpack("<qq", place)
            windows.append(_map(f"/proc/{process}/fd/{number}", byte_count))
        # A peer may still be opening this rank's descriptor.
        group.barrier()
    finally:
        os.close(descriptor)
    return windows


def _map(path: str, byte_count: int) -> npt.NDArray[np.uint8]:
    descriptor = os.open(path, os.O_RDWR)
    try:
        return np.frombuffer(mmap.mmap(descriptor, byte_count), np.uint8)
    finally:
        os.close(descriptor)


class FlagBarrier:
    """Waits for all ranks by words in shared memory, so that all leave at the same time."""

    def __init__(self, group: Group) -> None:
        """Share the words. Collective."""
        self._rank = group.rank
        (first, *_) = share(group, group.rank_count * _CACHE_LINE_WORDS * 8)
        self._arrived: npt.NDArray[Any] = first.view(np.int64)[::_CACHE_LINE_WORDS]
        self._round = 0
        # Python has no fence, but taking a lock is one: what was written before is seen by who sees
        # the flag.
        self._fence = threading.Lock()

    def wait(self) -> None:
        """Return when every rank is here."""
        self._round += 1
        deadline = time.monotonic() + _BARRIER_TIMEOUT_S
        with self._fence:
            self._arrived[self._rank] = self._round
        spins = 0
        while self._arrived.min() < self._round:
            os.sched_yield()
            spins += 1
            if spins % _CLOCK_INTERVAL == 0 and time.monotonic() > deadline:
                raise RankFailedError(
                    f"a rank did not reach the barrier within {_BARRIER_TIMEOUT_S:g} s"
                )
        with self._fence:
            pass
