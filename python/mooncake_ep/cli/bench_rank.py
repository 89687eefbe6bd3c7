"""One rank of mooncake-ep bench: rounds by this library and by its yardsticks, in turn."""

from __future__ import annotations

import time
import zlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from . import gloo
from .arrays import random_choices, random_tokens, relative_l2, row_type
from .errors import CheckFailedError
from .plain_copy import PlainCopy
from .routing import Routing
from .shared import FlagBarrier, share
from .sizes import Sizes, counted_by, make_buffer, transport_names

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from mooncake_ep import Buffer

    from .arrays import Tokens
    from .rank import RankContext

# Both round sums of the same rows, in another order.
_GLOO_TOLERANCE = 1e-2


class _Contestant(Protocol):
    """Does an operation once, with all ranks; returns the seconds that this rank took."""

    name: str

    def dispatch(self) -> float: ...

    def combine(self) -> float: ...


def run(context: RankContext) -> dict[str, Any]:
    """Time each number of tokens; returns what _run() does for each."""
    sizes, sweep = Sizes(**context.options["sizes"]), context.options["sweep"]
    runs = [
        _run(context.part(number, len(sweep)), replace(sizes, tokens=tokens))
        for number, tokens in enumerate(sweep)
    ]
    return {"runs": runs}


def _run(context: RankContext, sizes: Sizes) -> dict[str, Any]:
    """Time all rounds; returns the seconds of each, and facts for the report."""
    options, group = context.options, context.group
    choices = [
        random_choices(sizes, sizes.tokens, rank=rank, round_number=0)
        for rank in range(sizes.rank_count)
    ]
    routing = Routing(sizes, choices, rank=group.rank)
    tokens = random_tokens(sizes, sizes.tokens, rank=group.rank, round_number=0)
    barrier = FlagBarrier(group)
    with make_buffer(group, sizes, threads=options["threads"]) as buffer:
        ours = _Ours(buffer, sizes, tokens, barrier)
        baselines = (
            _baselines(context, sizes, ours, routing, barrier) if options["baselines"] else []
        )
        _check(ours, baselines, routing)
        times = _time(context, ours, baselines)
        counted = counted_by(buffer)
        mode = {
            "transport": transport_names(group),
            "threads": buffer.threads,
            "window_bytes": buffer.window_bytes,
        }
    for baseline in baselines:
        baseline.close()
    return {"times": times, "mode": mode, "counted": counted, "link_rows": routing.link_rows()}


def _time(
    context: RankContext, ours: _Ours, baselines: list[_Baseline]
) -> dict[str, dict[str, list[float]]]:
    warmup, rounds = context.options["warmup"], context.options["rounds"]
    contestants: list[_Contestant] = [ours, *baselines]
    times: dict[str, dict[str, list[float]]] = {
        contestant.name: {"dispatch": [], "combine": []} for contestant in contestants
    }
    times[ours.name]["dispatch+combine"] = []
    for number in range(-warmup, rounds):
        # Noise of the machine hits all alike, and each is as often the first after another.
        shift = number % len(contestants)
        order = contestants[shift:] + contestants[:shift]
        took = [(one.name, "dispatch", _round(context, one.dispatch)) for one in order]
        took += [(one.name, "combine", _round(context, one.combine)) for one in order]
        took.append((ours.name, "dispatch+combine", _round(context, ours.both)))
        for name, operation, seconds in took:
            if number >= 0:
                times[name][operation].append(seconds)
        context.show_progress(number + warmup + 1, warmup + rounds)
    return times


def _round(context: RankContext, operation: Callable[[], float]) -> float:
    context.group.barrier()
    return operation()


class _Ours:
    """This library, with outputs and handle made beforehand."""

    name = "mooncake_ep"

    def __init__(self, buffer: Buffer, sizes: Sizes, tokens: Tokens, barrier: FlagBarrier) -> None:
        self._buffer = buffer
        self._quant = sizes.quant
        self._barrier = barrier
        self.tokens = tokens
        self.dispatched = buffer.dispatch(
            tokens.x, tokens.topk_idx, tokens.topk_weights, quant=sizes.quant
        )
        # Experts that change nothing return what they received; but FP8 rows do not return as FP8.
        self.y = self.dispatched.x
        if sizes.quant:
            self.y = np.empty(self.y.shape, row_type(sizes.payload))
            for rows, count in zip(self.y, self.dispatched.count, strict=True):
                rows[:count] = 1
        self.out = np.zeros_like(tokens.x)

    def dispatch(self) -> float:
        self._barrier.wait()
        start = time.perf_counter()
        self._dispatch()
        return time.perf_counter() - start

    def combine(self) -> float:
        self._barrier.wait()
        start = time.perf_counter()
        self._combine()
        return time.perf_counter() - start

    def both(self) -> float:
        """One after the other, without a barrier in between."""
        self._barrier.wait()
        start = time.perf_counter()
        self._dispatch()
        self._combine()
        return time.perf_counter() - start

    def _dispatch(self) -> None:
        tokens, out = self.tokens, self.dispatched
        self._buffer.dispatch(
            tokens.x,
            tokens.topk_idx,
            tokens.topk_weights,
            quant=self._quant,
            out=out,
            handle=out.handle,
        )

    def _combine(self) -> None:
        self._buffer.combine(self.y, self.dispatched, out=self.out)


class _Baseline:
    """A yardstick, with the arrays that it works on: ours, where the layout is the same."""

    def __init__(self, yardstick: PlainCopy | gloo.Gloo, sizes: Sizes, ours: _Ours) -> None:
        self.name = yardstick.name
        self._yardstick = yardstick
        self.y, self.out = ours.y, ours.out
        self.x, self.packed = _byte_rows(ours.tokens.x), _byte_rows(ours.dispatched.x)
        if sizes.quant:
            # As large as FP8 rows with their scales; the values do not matter to a copy.
            row_bytes = sizes.dispatch_row_bytes
            self.x = np.ones((len(self.x), row_bytes), np.uint8)
            self.packed = np.empty((*ours.y.shape[:2], row_bytes), np.uint8)

    def dispatch(self) -> float:
        return self._yardstick.dispatch(self.x, self.packed)

    def combine(self) -> float:
        return self._yardstick.combine(self.y, self.out)

    def close(self) -> None:
        self._yardstick.close()


def _baselines(
    context: RankContext, sizes: Sizes, ours: _Ours, routing: Routing, barrier: FlagBarrier
) -> list[_Baseline]:
    group = context.group
    row_bytes = max(sizes.dispatch_row_bytes, sizes.combine_row_bytes)
    windows = share(group, sizes.rank_count * sizes.tokens * row_bytes)
    yardsticks: list[PlainCopy | gloo.Gloo] = [PlainCopy(routing, windows, barrier)]
    if all(answer == b"\1" for answer in group.all_gather(bytes([gloo.is_available()]))):
        yardsticks.append(gloo.Gloo(group, routing, barrier))
    return [_Baseline(yardstick, sizes, ours) for yardstick in yardsticks]


def _check(ours: _Ours, baselines: list[_Baseline], routing: Routing) -> None:
    """Run each contestant once, and check that it did the job: one that does less is none."""
    ours.dispatch()
    packed = _checksums(_byte_rows(ours.dispatched.x), routing)
    ours.combine()
    out = ours.out.astype(np.float64)
    for baseline in baselines:
        same = np.may_share_memory(baseline.packed, ours.dispatched.x)
        # Only the rows that count: the whole array may be many times larger, and stays untouched.
        for segment in routing.segments:
            baseline.packed[segment.expert, segment.begin :][: len(segment.message)] = 0
        baseline.dispatch()
        if same and _checksums(baseline.packed, routing) != packed:
            raise CheckFailedError(f"dispatch by {baseline.name} gave other rows")
        ours.out[...] = 0
        baseline.combine()
        if not ours.out.astype(np.float32).any(axis=1).all():
            raise CheckFailedError(f"combine by {baseline.name} left a token out")
        if baseline.name == gloo.Gloo.name and relative_l2(ours.out, out) > _GLOO_TOLERANCE:
            raise CheckFailedError(f"combine by {baseline.name} gave other sums")


def _checksums(packed: npt.NDArray[np.uint8], routing: Routing) -> list[int]:
    return [
        zlib.crc32(packed[segment.expert, segment.begin :][: len(segment.message)].tobytes())
        for segment in routing.segments
    ]


def _byte_rows(rows: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return rows.view(np.uint8)
