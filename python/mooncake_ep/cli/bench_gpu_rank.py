"""One rank of mooncake-ep bench on a GPU: rounds in a CUDA graph and as single calls, by events."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

from .arrays import random_choices, random_tokens
from .devices import Gpu
from .errors import CheckFailedError
from .routing import Routing
from .sizes import Sizes, make_buffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from mooncake_ep import Buffer, Group

    from .rank import RankContext

# Enough that launching a graph takes less time than running it.
_ROUNDS_IN_GRAPH = 10
_COPY_BYTES = 1 << 28
_COPY_COUNT = 10
# Of a round trip through experts that change nothing, relative to the value.
_TOLERANCE = 0.05


def run(context: RankContext) -> dict[str, Any]:
    """Time all rounds; returns the seconds of each, and facts for the report."""
    options, group = context.options, context.group
    sizes = Sizes(**options["sizes"])
    choices = [
        random_choices(sizes, sizes.tokens, rank=rank, round_number=0)
        for rank in range(sizes.rank_count)
    ]
    gpu = Gpu(group.device_id)
    peer_copy = _peer_copy(gpu.torch, group)
    with make_buffer(group, sizes, threads=1) as buffer:
        ours = _Ours(gpu, buffer, sizes, rank=group.rank)
        operations = {
            "dispatch": ours.dispatch,
            "combine": ours.combine,
            "dispatch+combine": ours.both,
        }
        times: dict[str, dict[str, list[float]]] = {"mooncake_ep": {}, "eager": {}}
        for number, (name, operation) in enumerate(operations.items()):
            graph = _capture(gpu.torch, operation)
            replays = _time(context, gpu.torch, graph.replay)
            times["mooncake_ep"][name] = [seconds / _ROUNDS_IN_GRAPH for seconds in replays]
            times["eager"][name] = _time(context, gpu.torch, operation)
            ours.out.zero_()
            graph.replay()
            if name != "dispatch":
                ours.check()
            context.show_progress(number + 1, len(operations))
        # A peer may still be reading this rank's window.
        gpu.torch.cuda.synchronize()
        group.barrier()
        mode = {
            "transport": group.transport((group.rank + 1) % group.rank_count).name,
            "window_bytes": buffer.window_bytes,
        }
    link_rows = Routing(sizes, choices, rank=group.rank).link_rows()
    report = {"peer_copy_gb_s": peer_copy, "gpu": gpu.torch.cuda.get_device_name()}
    return {"times": times, "mode": mode, "report": report, "link_rows": link_rows}


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


def _capture(torch: Any, operation: Callable[[], None]) -> Any:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_ROUNDS_IN_GRAPH):
            operation()
    return graph


def _time(context: RankContext, torch: Any, operation: Callable[[], None]) -> list[float]:
    """Return the seconds of each of `rounds` operations in a row."""
    warmup, rounds = context.options["warmup"], context.options["rounds"]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(rounds + 1)]
    torch.cuda.synchronize()
    context.group.barrier()
    for _ in range(warmup):
        operation()
    events[0].record()
    for event in events[1:]:
        operation()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]


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
