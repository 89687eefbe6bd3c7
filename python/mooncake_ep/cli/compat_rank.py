"""One rank of smoke and bench by --api compat.

That is the Buffer of mooncake_ep.compat.mooncake, over a process group of torch, called as clients
of Mooncake EP call it.
"""

from __future__ import annotations

import contextlib
import importlib
import time
from typing import TYPE_CHECKING, Any

from . import gloo, smoke_rank
from .arrays import random_choices, random_tokens
from .bench_gpu_rank import Clock
from .devices import Gpu, Torch
from .errors import CheckFailedError
from .routing import Routing
from .sizes import Sizes, counted_by, transport_names

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from .rank import RankContext

_NEVER = -1  # timeout_us
# Of a round trip through experts that change nothing, relative to the value.
_TOLERANCE = 0.05


def smoke(context: RankContext) -> dict[str, Any]:
    """Run and check the rounds of smoke; weights are given to combine."""
    with _met(context) as (buffer, device):
        return smoke_rank.run_rounds(context, buffer, device, takes_outputs=False)


def bench(context: RankContext) -> dict[str, Any]:
    """Time calls one by one; returns what bench_rank.run() does."""
    sizes = Sizes(**context.options["sizes"])
    with _met(context) as (buffer, device):
        ours = _Ours(buffer, device, sizes, rank=context.group.rank)
        operations = {
            "dispatch": ours.dispatch,
            "combine": ours.combine,
            "dispatch+combine": ours.both,
        }
        clock = _clock(context, device)
        times = {}
        for number, (name, operation) in enumerate(operations.items()):
            times[name] = clock(operation)
            context.show_progress(number + 1, len(operations))
        ours.check()
        core = buffer.core
        mode = {
            "transport": transport_names(core.group),
            "window_bytes": core.window_bytes,
            "api": "compat",
            "control": context.options["control"],
        }
        counted = counted_by(core)
        context.group.barrier()
    choices = [
        random_choices(sizes, sizes.tokens, rank=rank, round_number=0)
        for rank in range(sizes.rank_count)
    ]
    link_rows = Routing(sizes, choices, rank=context.group.rank).link_rows()
    run = {
        "times": {"mooncake_ep": times},
        "mode": mode,
        "counted": counted,
        "link_rows": link_rows,
    }
    return {"runs": [run]}


@contextlib.contextmanager
def _met(context: RankContext) -> Iterator[tuple[_CoreLike, Torch]]:
    """Make the process group, and a Buffer over it that looks like the core's."""
    group = context.group
    device = Torch() if group.backend == "cpu" else Gpu(group.device_id)
    device.torch.set_num_threads(1)
    gloo.connect(group, context.options["control"])
    compat = importlib.import_module("mooncake_ep.compat.mooncake")
    sizes = Sizes(**context.options["sizes"])
    buffer = compat.Buffer(device.torch.distributed.group.WORLD)
    try:
        yield _CoreLike(buffer, sizes), device
    finally:
        buffer.destroy()
        device.torch.distributed.destroy_process_group()


class _CoreLike:
    """Its dispatch and combine as the core's Buffer has them, and that one."""

    def __init__(self, buffer: Any, sizes: Sizes) -> None:
        self._buffer = buffer
        self._sizes = sizes

    def dispatch(
        self, x: Any, topk_idx: Any, _weights: Any = None, *, quant: Any = None, out: Any = None
    ) -> Any:
        from mooncake_ep import Dispatched

        assert out is None
        received, count, handle, event, _ = self._buffer.dispatch(
            x, topk_idx, None, self._sizes.tokens, self._sizes.experts, _NEVER, quant is not None
        )
        event.current_stream_wait()
        rows, scales = received if isinstance(received, tuple) else (received, None)
        back: Any = (handle, topk_idx)
        return Dispatched(rows, scales, count, handle[0], handle[1], back)

    def combine(self, y: Any, received: Any, topk_weights: Any, out: Any = None) -> Any:
        handle, topk_idx = received.handle
        sums, event, _ = self._buffer.combine(
            y, topk_idx, topk_weights, None, _NEVER, handle, out=out
        )
        event.current_stream_wait()
        return sums

    @property
    def core(self) -> Any:
        """The core's Buffer, once there was a dispatch."""
        return self._buffer._exchange.cores[-1].buffer


class _Ours:
    """Rounds with the same inputs; experts change nothing, or give ones for FP8 rows."""

    def __init__(self, buffer: _CoreLike, device: Torch, sizes: Sizes, *, rank: int) -> None:
        tokens = random_tokens(sizes, sizes.tokens, rank=rank, round_number=0)
        self._buffer, self._quant, torch = buffer, sizes.quant, device.torch
        self._x, self._topk_idx = device.put(tokens.x), device.put(tokens.topk_idx)
        self._weights = device.put(tokens.topk_weights)
        self.dispatch()
        self._y, self._expected = self._dispatched.x, self._x
        if sizes.quant:
            self._y = torch.ones_like(self._y, dtype=self._x.dtype)
            self._expected = torch.ones_like(self._x)
        self._out = torch.zeros_like(self._x)

    def dispatch(self) -> None:
        self._dispatched = self._buffer.dispatch(self._x, self._topk_idx, quant=self._quant)

    def combine(self) -> None:
        self._buffer.combine(self._y, self._dispatched, self._weights, out=self._out)

    def both(self) -> None:
        """One after the other."""
        self.dispatch()
        self.combine()

    def check(self) -> None:
        """Check what combine gave last: the weights of a token add up to 1."""
        expected = self._expected.float()
        wrong = (self._out.float() - expected).abs() > _TOLERANCE * (1 + expected.abs())
        if wrong.any().item():
            raise CheckFailedError("combine gave other sums than it has to")


def _clock(context: RankContext, device: Torch) -> Callable[[Callable[[], None]], list[float]]:
    """Choose how to time: by events of a GPU, or each call from a barrier on."""
    if context.group.backend != "cpu":
        return Clock(context, device.torch).seconds

    def seconds(operation: Callable[[], None]) -> list[float]:
        times = []
        for _ in range(context.options["warmup"] + context.options["rounds"]):
            context.group.barrier()
            start = time.perf_counter()
            operation()
            times.append(time.perf_counter() - start)
        return times[context.options["warmup"] :]

    return seconds
