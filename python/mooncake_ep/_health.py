"""What a buffer tells about itself and its peers, without stopping what is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ._ffi import ffi
from ._lib import check, int32, lib, struct

_EVENTS_AT_ONCE = 64
_PHASES = {
    lib.MEP_WAIT_COUNTS: "counts",
    lib.MEP_WAIT_ROWS: "rows",
    lib.MEP_WAIT_WEIGHTS: "weights",
    lib.MEP_WAIT_SUMS: "sums",
    lib.MEP_WAIT_BEGIN: "begin",
    lib.MEP_WAIT_FENCE: "fence",
    lib.MEP_WAIT_EXCHANGE: "exchange",
}
_REASONS = {lib.MEP_EVENT_LATE: "late", lib.MEP_EVENT_LIMIT: "limit"}


@dataclass(frozen=True)
class BufferCounters:
    """What a buffer has counted since its creation.

    invalid_expert_ids: expert ids other than -1 outside [0, experts), each treated as -1;
    invalid_messages: messages of peers that broke a limit and were ignored.
    """

    dispatches_sent: int
    combines_sent: int
    invalid_expert_ids: int
    invalid_messages: int


@dataclass(frozen=True)
class PeerCounters:
    """What a buffer has counted of one peer since its creation.

    rows_sent, rows_received: by dispatch, a token at two experts there is two rows; waited_s: how
    long this rank was ready and the peer was not, in seconds. The rank that all others wait for is
    a straggler.
    """

    rows_sent: int
    rows_received: int
    waited_s: float


@dataclass(frozen=True)
class Event:
    """A peer was masked.

    phase: what was waited for: "counts" or "rows" of a dispatch, "weights", "sums" or "begin" of a
    combine, "fence" or "exchange" of either; reason: "late", or "limit" if what came broke one;
    round: of the buffer's dispatches, or its combines, from 1 on; waited_s: in seconds.
    """

    peer: int
    phase: str
    reason: str
    round: int
    waited_s: float


def read_counters(c_buffer: Any) -> BufferCounters:
    """Read the counters; waits for a GPU."""
    counters = struct("mep_buffer_counters_t")
    check(lib.mep_buffer_query_counters(c_buffer, counters))
    return BufferCounters(
        counters.dispatches_sent,
        counters.combines_sent,
        counters.invalid_expert_ids,
        counters.invalid_messages,
    )


def read_peer(c_buffer: Any, peer: int) -> PeerCounters:
    """Read what was counted of a peer."""
    counters = struct("mep_peer_counters_t")
    check(lib.mep_buffer_query_peer(c_buffer, int32(peer, "peer"), counters))
    return PeerCounters(counters.rows_sent, counters.rows_received, counters.waited_us / 1e6)


def read_expert_rows(c_buffer: Any, expert_count: int) -> list[int]:
    """Read how many rows each local expert has received."""
    rows = ffi.new("uint64_t[]", expert_count)
    check(lib.mep_buffer_query_expert_rows(c_buffer, rows, expert_count))
    return [rows[expert] for expert in range(expert_count)]


def read_events(c_buffer: Any, cursor: Any) -> list[Event]:
    """Read the events behind ``cursor``, a ``uint64_t *``, and move it behind them."""
    events, count = ffi.new("mep_event_t[]", _EVENTS_AT_ONCE), ffi.new("int32_t *")
    check(lib.mep_buffer_read_events(c_buffer, cursor, events, _EVENTS_AT_ONCE, count))
    return [
        Event(one.peer, _PHASES[one.phase], _REASONS[one.reason], one.round, one.waited_us / 1e6)
        for one in events[0 : count[0]]
    ]


def read_mask(c_buffer: Any, rank_count: int) -> list[bool]:
    """Read who is active in the buffer's own mask."""
    active = ffi.new("int32_t[]", rank_count)
    check(lib.mep_buffer_query_mask(c_buffer, active, rank_count))
    return [active[rank] != 0 for rank in range(rank_count)]


def write_mask(c_buffer: Any, active: list[bool]) -> None:
    """Change it."""
    try:
        check(lib.mep_buffer_set_mask(c_buffer, ffi.new("int32_t[]", active), len(active)))
    except ValueError as error:  # which has the names of that function's arguments
        raise ValueError(f"mask: {error}") from None
