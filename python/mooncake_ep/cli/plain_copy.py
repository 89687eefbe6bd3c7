"""The yardstick of bench: the same messages and rows moved by plain copies, all offsets known.

No counts, headers or flags. A dispatch copies each row once into the window of each other rank that
needs it, and from there, or from x, into the packed layout. A combine copies one packed row for
each message back into its owner's window, and from there (or from the packed rows, if no other rank
has an expert of the token) to the token's place.

NumPy's take and put move each row by memmove in a loop in C, at the speed of one large copy.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .routing import Routing
    from .shared import FlagBarrier

# Rows of this many bytes pass through the second-level cache where a row has to be both gathered
# and scattered.
_BLOCK_BYTES = 1 << 18


class PlainCopy:
    """Both operations of one rank."""

    name = "plain_copy"

    def __init__(
        self, routing: Routing, windows: list[npt.NDArray[np.uint8]], barrier: FlagBarrier
    ) -> None:
        """Take a routing, and windows [R source][bytes] that this rank and its peers may write."""
        self._routing = routing
        self._windows = windows
        self._barrier = barrier
        self._peers = [rank for rank in range(routing.rank_count) if rank != routing.rank]

    def dispatch(self, x: npt.NDArray[np.uint8], packed: npt.NDArray[np.uint8]) -> float:
        """Copy rows of x [T, row bytes] to packed [L, R*M, row bytes]; returns seconds."""
        routing, row_bytes = self._routing, x.shape[1]
        targets = [(self._slots(rank, routing.rank, row_bytes), rank) for rank in self._peers]
        sources = [self._slots(routing.rank, rank, row_bytes) for rank in range(routing.rank_count)]
        # This rank's own rows are not in its window: they come from x, and by token.
        sources[routing.rank] = x
        indices = [
            segment.token if segment.source == routing.rank else segment.message
            for segment in routing.segments
        ]
        self._barrier.wait()
        start = time.perf_counter()
        for slots, rank in targets:
            _gather(x, routing.sent[rank], slots)
        written = time.perf_counter()
        self._barrier.wait()
        read = time.perf_counter()
        for segment, index in zip(routing.segments, indices, strict=True):
            _gather(sources[segment.source], index, packed[segment.expert, segment.begin :])
        return time.perf_counter() - read + written - start

    def combine(self, y: npt.NDArray[Any], out: npt.NDArray[Any]) -> float:
        """Copy rows of y [L, R*M, H] to out [T, H]; returns seconds."""
        routing, target = self._routing, out.view(np.uint8)
        row_bytes = target.shape[1]
        rows = y.view(np.uint8).reshape(-1, row_bytes)
        targets = [self._slots(rank, routing.rank, row_bytes) for rank in self._peers]
        sources = [self._slots(routing.rank, rank, row_bytes) for rank in self._peers]
        first = [returned.rows.max(axis=1, initial=-1) for returned in routing.returned]
        stay = routing.local_only()
        self._barrier.wait()
        start = time.perf_counter()
        for slots, rank in zip(targets, self._peers, strict=True):
            _gather(rows, first[rank], slots)
        written = time.perf_counter()
        self._barrier.wait()
        read = time.perf_counter()
        for slots, rank in zip(sources, self._peers, strict=True):
            _scatter(slots, routing.sent[rank], target)
        _move(rows, first[routing.rank][stay], routing.sent[routing.rank][stay], target)
        return time.perf_counter() - read + written - start

    def close(self) -> None:
        """Do nothing; the windows go with the process."""

    def _slots(self, owner: int, writer: int, row_bytes: int) -> npt.NDArray[np.uint8]:
        """What `writer` may write in the window of `owner`, as rows."""
        mine = np.split(self._windows[owner], self._routing.rank_count)[writer]
        return mine[: mine.size // row_bytes * row_bytes].reshape(-1, row_bytes)


def _gather(
    source: npt.NDArray[np.uint8], index: npt.NDArray[np.intp], target: npt.NDArray[np.uint8]
) -> None:
    np.take(source, index, axis=0, out=target[: len(index)], mode="clip")


def _scatter(
    source: npt.NDArray[np.uint8], index: npt.NDArray[np.intp], target: npt.NDArray[np.uint8]
) -> None:
    # With no index at all put() would still insist on values.
    if len(index):
        np.put(_whole(target), index, _whole(source)[: len(index)], mode="clip")


def _move(
    source: npt.NDArray[np.uint8],
    rows: npt.NDArray[np.intp],
    places: npt.NDArray[np.intp],
    target: npt.NDArray[np.uint8],
) -> None:
    step = max(1, _BLOCK_BYTES // source.shape[1])
    block = np.empty((step, source.shape[1]), np.uint8)
    for begin in range(0, len(rows), step):
        some = rows[begin : begin + step]
        _gather(source, some, block)
        _scatter(block, places[begin : begin + step], target)


def _whole(rows: npt.NDArray[np.uint8]) -> npt.NDArray[Any]:
    """Rows as single elements, so that one index stands for one row."""
    return rows.view(f"V{rows.shape[1]}")[:, 0]
