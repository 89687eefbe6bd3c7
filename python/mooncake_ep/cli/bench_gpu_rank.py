"""One rank of mooncake-ep bench on a GPU: rounds in a CUDA graph and as single calls, by events.

With --flush-l2 a graph is one round, and each round finds its inputs in memory, not in the L2.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from .arrays import random_choices, random_tokens
from .devices import Gpu
from .errors import CheckFailedError
from .routing import Routing
from .sizes import Sizes, counted_by, make_buffer, transport_names

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_ep import Buffer, Group

    from .rank import RankContext

# Enough that launching a graph takes less time than running it.
_ROUNDS_IN_GRAPH = 10
# Once the size of the L2 would do if it always gave up its oldest lines first.
_FLUSH_SIZE_IN_L2 = 2
_COPY_BYTES = 1 << 28
_COPY_COUNT = 10
# Of a round trip through experts that change nothing, relative to the value.
_TOLERANCE = 0.05


def run(context: RankContext) -> dict[str, Any]:
    """Time each number of tokens; returns what _run() does for each, and facts for the report."""
    sizes, sweep = Sizes(**context.options["sizes"]), context.options["sweep"]
    gpu = Gpu(context.group.device_id)
    report = {
        "peer_copy_gb_s": _peer_copy(gpu.torch, context.group),
        "gpu": gpu.torch.cuda.get_device_name(),
    }
    runs = []
    for number, tokens in enumerate(sweep):
        runs.append(_run(context.part(number, len(sweep)), replace(sizes, tokens=tokens), gpu))
        # What was cached for fewer tokens is of no use to more.
        gpu.torch.cuda.empty_cache()
    return {"runs": runs, "report": report}


def _run(context: RankContext, sizes: Sizes, gpu: Gpu) -> dict[str, Any]:
    """Time all rounds; returns the seconds of each, and how they were run."""
    group, clock = context.group, Clock(context, gpu.torch)
    choices = [
        random_choices(sizes, sizes.tokens, rank=rank, round_number=0)
        for rank in range(sizes.rank_count)
    ]
    with make_buffer(group, sizes, threads=1, max_sms=context.options["max_sms"]) as buffer:
        ours = _Ours(gpu, buffer, sizes, rank=group.rank)
        operations = {
            "dispatch": ours.dispatch,
            "combine": ours.combine,
            "dispatch+combine": ours.both,
        }
        times: dict[str, dict[str, list[float]]] = {"mooncake_ep": {}, "eager": {}}
        for number, (name, operation) in enumerate(operations.items()):
            graph = _capture(gpu.torch, operation, round_count=clock.rounds_in_graph)
            replays = clock.seconds(graph.replay)
            times["mooncake_ep"][name] = [seconds / clock.rounds_in_graph for seconds in replays]
            times["eager"][name] = clock.seconds(operation)
            ours.out.zero_()
            graph.replay()
            if name != "dispatch":
                ours.check()
            context.show_progress(number + 1, len(operations))
        # A peer may still be reading this rank's window.
        gpu.torch.cuda.synchronize()
        group.barrier()
        counted = counted_by(buffer)
        mode = {
            "transport": transport_names(group),
            "window_bytes": buffer.window_bytes,
            "sms": buffer.sms,
            "l2": clock.l2,
        }
    link_rows = Routing(sizes, choices, rank=group.rank).link_rows()
    return {"times": times, "mode": mode, "counted": counted, "link_rows": link_rows}


class _Ours:
    """This library, with outputs and handle made beforehand."""

    def __init__(self, gpu: Gpu, buffer: Buffer, sizes: Sizes, *, rank: int) -> None:
        tokens = random_tokens(sizes, sizes.tokens, rank=rank, round_number=0)
        self._buffer = buffer
        self._quant = sizes.quant
        self._x = gpu.put(tokens.x)
        self._topk_idx, self._topk_weights = gpu.put(tokens.topk_idx), gpu.put(tokens.topk_weights)
        self._dispatched = buffer.dispatch(
            self._x, self._topk_idx, self._topk_weights, quant=sizes.quant
        )
        # Experts that change nothing return what they received; but FP8 rows do not return as FP8.
        self._y, self._expected = self._dispatched.x, self._x
        if sizes.quant:
            self._y = gpu.torch.ones_like(self._y, dtype=self._x.dtype)
            self._expected = gpu.torch.ones_like(self._x)
        self.out = gpu.torch.zeros_like(self._x)
        self.combine()

    def dispatch(self) -> None:
        out = self._dispatched
        self._buffer.dispatch(
            self._x,
            self._topk_idx,
            self._topk_weights,
            quant=self._quant,
            out=out,
            handle=out.handle,
        )

    def combine(self) -> None:
        self._buffer.combine(self._y, self._dispatched, out=self.out)

    def both(self) -> None:
        """One after the other."""
        self.dispatch()
        self.combine()

    def check(self) -> None:
        """Check what combine gave: the weights of a token add up to 1."""
        expected = self._expected.float()
        wrong = (self.out.float() - expected).abs() > _TOLERANCE * (1 + expected.abs())
        if wrong.any().item():
            raise CheckFailedError("combine gave other sums than it has to")


class Clock:
    """Times operations by events: many in a row, or each alone after the L2 was overwritten."""

    def __init__(self, context: RankContext, torch: Any) -> None:
        """Time as the options of the command say."""
        self._torch = torch
        self._barrier = context.group.barrier
        self._warmup, self._rounds = context.options["warmup"], context.options["rounds"]
        self._cold: Any = None
        self.l2, self.rounds_in_graph = "warm", _ROUNDS_IN_GRAPH
        if context.options["flush_l2"]:
            byte_count = _FLUSH_SIZE_IN_L2 * torch.cuda.get_device_properties().L2_cache_size
            self._cold = torch.empty(byte_count, dtype=torch.uint8, device="cuda")
            # A second round in a graph would find what the first one left in the L2.
            self.l2, self.rounds_in_graph = "flushed", 1

    def seconds(self, operation: Callable[[], None]) -> list[float]:
        """Return the seconds of each of `rounds` operations. Collective."""
        self._torch.cuda.synchronize()
        self._barrier()
        for _ in range(self._warmup):
            operation()
        times = self._in_a_row(operation) if self._cold is None else self._alone(operation)
        self._torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in times]

    def _in_a_row(self, operation: Callable[[], None]) -> list[tuple[Any, Any]]:
        """Begin each operation at the end of the one before."""
        events = self._events(self._rounds + 1)
        events[0].record()
        for event in events[1:]:
            operation()
            event.record()
        return list(itertools.pairwise(events))

    def _alone(self, operation: Callable[[], None]) -> list[tuple[Any, Any]]:
        """Begin each operation at the end of a flush, which all ranks begin at about one time.

        That is when the operation before ended, because it ends on no rank before all have sent.
        """
        times = list(zip(self._events(self._rounds), self._events(self._rounds), strict=True))
        for begin, end in times:
            self._cold.zero_()
            begin.record()
            operation()
            end.record()
        return times

    def _events(self, event_count: int) -> list[Any]:
        return [self._torch.cuda.Event(enable_timing=True) for _ in range(event_count)]


def _capture(torch: Any, operation: Callable[[], None], *, round_count: int) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(round_count):
            operation()
    return graph


def _peer_copy(torch: Any, group: Group) -> float | None:
    """Return the GB/s of rank 0's copy to another GPU, None with one GPU. Collective."""
    speed = None
    if group.rank == 0 and torch.cuda.device_count() > 1:
        there = torch.device("cuda", (group.device_id + 1) % torch.cuda.device_count())
        source = torch.ones(_COPY_BYTES, dtype=torch.uint8, device="cuda")
        target = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=there)
        target.copy_(source)
        torch.cuda.synchronize(there)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(_COPY_COUNT):
            target.copy_(source)
        end.record()
        end.synchronize()
        speed = _COPY_COUNT * _COPY_BYTES / (1e-3 * begin.elapsed_time(end)) / 1e9
        del source, target
        torch.cuda.empty_cache()
    group.barrier()
    return speed
