"""Microseconds that Python adds to a dispatch and a combine: python benchmarks/python_overhead.py.

One rank, one token, torch CPU arrays, so that the work itself is next to nothing. Each figure is the
fastest of many short batches. Ends with 1 if Python adds more than the limit.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch

import mooncake_ep as ep
from mooncake_ep._lib import lib

OVERHEAD_US_MAX = 12.0
CALLS = 100  # in a batch
BATCHES = 300


def microseconds(call: Callable[[], object]) -> float:
    """Time one call: the fastest batch."""
    best = float("inf")
    for _ in range(BATCHES):
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def dispatches(buffer: ep.Buffer, hidden: int) -> dict[str, list[tuple[str, float]]]:
    """Time dispatch and combine, each first as the C call alone with prefilled structs."""
    x = torch.ones(1, hidden, dtype=torch.bfloat16)
    topk_idx, weights = torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2)
    times: dict[str, list[tuple[str, float]]] = {}
    for quant in (None, "fp8"):
        out = buffer.dispatch(x, topk_idx, weights, quant=quant)  # type: ignore[call-overload]
        args, handle, c_buffer = buffer._dispatch_calls[-1].args, out.handle._c, buffer._c
        times[f"dispatch, quant={quant}"] = [
            ("C", microseconds(lambda: lib.mep_dispatch(c_buffer, handle, args))),
            (
                "out=",
                microseconds(lambda: buffer.dispatch(x, topk_idx, weights, quant=quant, out=out)),
            ),
            ("new", microseconds(lambda: buffer.dispatch(x, topk_idx, weights, quant=quant))),
        ]
    received = buffer.dispatch(x, topk_idx, weights)
    sums = buffer.combine(received.x, received)
    args, handle = buffer._combine_calls[-1].args, received.handle._c
    times["combine"] = [
        ("C", microseconds(lambda: lib.mep_combine(c_buffer, handle, args))),
        ("out=", microseconds(lambda: buffer.combine(received.x, received, out=sums))),
        ("new", microseconds(lambda: buffer.combine(received.x, received))),
        ("new, weights", microseconds(lambda: buffer.combine(received.x, received, weights))),
    ]
    return times


def main() -> int:
    """Print the table; return the exit status."""
    hidden, worst = 128, 0.0
    with (
        ep.Group.single() as group,
        ep.Buffer(group, max_tokens=1, hidden=hidden, experts=2, topk=2, threads=1) as buffer,
    ):
        for name, (alone, *calls) in dispatches(buffer, hidden).items():
            print(f"{name}: C call alone {alone[1]:.2f} us")
            for how, total in calls:
                worst = max(worst, total - alone[1])
                print(f"  {how:12s} {total:6.2f} us, Python adds {total - alone[1]:5.2f} us")
    print(f"Python adds at most {worst:.2f} us; the limit is {OVERHEAD_US_MAX} us")
    return int(worst > OVERHEAD_US_MAX)


if __name__ == "__main__":
    sys.exit(main())
