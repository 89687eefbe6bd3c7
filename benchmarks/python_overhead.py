"""Microseconds that Python adds to a dispatch and a combine: python benchmarks/python_overhead.py.

One rank, one token, torch tensors, so that the work itself is next to nothing. Each figure is the
fastest of many short batches. With --device cuda the calls only queue their work, which is waited
for between batches; most of what new outputs add there is torch's allocation of five tensors. Ends
with 1 if Python adds more than the limit on the CPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch

import mooncake_ep as ep
from mooncake_ep._lib import lib

OVERHEAD_US_MAX = 12.0
CALLS = 50  # in a batch; few enough that a GPU can queue them all
BATCHES = 300


def microseconds(call: Callable[[], object]) -> float:
    """Time one call: the fastest batch."""
    best = float("inf")
    for _ in range(BATCHES):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        best = min(best, time.perf_counter() - start)
    return best / CALLS * 1e6


def measure(buffer: ep.Buffer) -> dict[str, dict[str, float]]:
    """Time dispatch and combine, each first as the C call alone with prefilled structs."""
    place = torch.device("cpu" if buffer.group.backend == "cpu" else "cuda:0")
    x = torch.ones(1, buffer.hidden, dtype=torch.bfloat16, device=place)
    topk_idx = torch.zeros(1, 2, dtype=torch.int64, device=place)
    weights = torch.ones(1, 2, device=place)
    times: dict[str, dict[str, float]] = {}
    for quant in (None, "fp8"):
        call = partial(buffer.dispatch, x, topk_idx, weights, quant=quant)  # type: ignore[call-overload]
        out = call()
        args = buffer._dispatch_calls[-1].args
        times[f"dispatch, quant={quant}"] = {
            "C": microseconds(partial(lib.mep_dispatch, buffer._c, out.handle._c, args)),
            "out=": microseconds(partial(call, out=out)),
            "new": microseconds(call),
        }
    received = buffer.dispatch(x, topk_idx, weights)
    combine = partial(buffer.combine, received.x, received)
    sums = combine()
    args = buffer._combine_calls[-1].args
    times["combine"] = {
        "C": microseconds(partial(lib.mep_combine, buffer._c, received.handle._c, args)),
        "out=": microseconds(partial(combine, out=sums)),
        "new": microseconds(combine),
        "new, weights": microseconds(partial(combine, weights)),
    }
    return times


def main() -> int:
    """Print the table; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    device = parser.parse_args().device
    worst = 0.0
    with (
        ep.Group.single(backend=device) as group,
        ep.Buffer(group, max_tokens=1, hidden=128, experts=2, topk=2, threads=1) as buffer,
    ):
        for name, times in measure(buffer).items():
            alone = times.pop("C")
            print(f"{name}: C call alone {alone:.2f} us")
            for how, total in times.items():
                worst = max(worst, total - alone)
                print(f"  {how:12s} {total:6.2f} us, Python adds {total - alone:5.2f} us")
    print(f"Python adds at most {worst:.2f} us; the limit on the CPU is {OVERHEAD_US_MAX} us")
    return int(device == "cpu" and worst > OVERHEAD_US_MAX)


if __name__ == "__main__":
    sys.exit(main())
