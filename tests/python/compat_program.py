"""One rank of a round trip over any library with Mooncake EP's API; prints a line of JSON.

RANK, WORLD_SIZE and MOONCAKE_EP_COMPAT_STORE (a file that is not there yet) or MASTER_ADDR and
MASTER_PORT say how ranks meet; MOONCAKE_EP_COMPAT_MODULE which library it is; _DEVICE (cpu or cuda)
and _CONTROL (gloo, nccl, or mooncake, mooncake-cpu with that library) where tensors are and over
what ranks meet.

Checksums do not depend on the order of rows: "rows" is over the rows that each expert received,
"out" over combine's result. "error" is relative to the sums in float64. Times are medians, in
microseconds, of a whole call until its result is there.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as distributed

MODULE = os.environ.get("MOONCAKE_EP_COMPAT_MODULE", "mooncake_ep.compat.mooncake")
DEVICE = os.environ.get("MOONCAKE_EP_COMPAT_DEVICE", "cpu")
CONTROL = os.environ.get("MOONCAKE_EP_COMPAT_CONTROL", "gloo")
STORE = os.environ.get("MOONCAKE_EP_COMPAT_STORE")
RANK, SIZE = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
NEVER = -1
MODES = {
    "now": {},
    "async": {"async_finish": True},
    "hook": {"return_recv_hook": True},
}


def parse() -> argparse.Namespace:
    """Read the shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, value in (
        ("tokens", 128),
        ("hidden", 7168),
        ("experts", 32),
        ("topk", 4),
        ("rounds", 10),
    ):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--modes", default="now,async,hook")
    parser.add_argument("--payloads", default="bf16,fp8")
    parser.add_argument("--disable-p2p", action="store_true")
    return parser.parse_args()


def meet() -> torch.device:
    """Make the default process group; return where this rank's tensors are."""
    device = torch.device("cpu")
    if DEVICE == "cuda":
        device = torch.device("cuda", RANK % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if CONTROL.startswith("mooncake"):
        importlib.import_module("mooncake.pg")
    where = f"file://{STORE}" if STORE else "env://"
    distributed.init_process_group(CONTROL, where, rank=RANK, world_size=SIZE)
    return device


def call(device: torch.device, function: Callable[[], Any]) -> tuple[Any, float]:
    """Make a call and wait for it as clients do; return what it gave, and its time."""
    synchronize(device)
    distributed.barrier()
    start = time.perf_counter()
    given = function()
    event, hook = given[-2:]
    if hook is not None:
        hook()
    elif getattr(event, "event", None) is not None:
        event.current_stream_wait()
    synchronize(device)
    return given, (time.perf_counter() - start) * 1e6


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def digest(parts: list[bytes]) -> str:
    """Return a checksum."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def rows_of(recv_x: Any, count: torch.Tensor) -> tuple[torch.Tensor, str]:
    """Return the received rows as bfloat16 [L, R*M, H], zeros behind them, and a checksum."""
    if isinstance(recv_x, tuple):
        values, scales = recv_x
        rows = (values.float() * scales.float().repeat_interleave(128, dim=2)).bfloat16()
    else:
        rows = recv_x.clone()
    parts = []
    for expert, valid in enumerate(count.tolist()):
        rows[expert, valid:] = 0
        words = rows[expert, :valid].view(torch.int16).cpu()
        parts += [valid.to_bytes(4, "little"), *sorted(bytes(row.numpy()) for row in words)]
    return rows, digest(parts)


def measure(
    buffer: Any, device: torch.device, shape: argparse.Namespace, mode: str, use_fp8: bool
) -> dict[str, Any]:
    """Do rounds with the same tokens, experts doing nothing: one that is checked, others timed."""
    random = torch.Generator().manual_seed(RANK)
    x = torch.randn(shape.tokens, shape.hidden, generator=random).bfloat16().to(device)
    scores = torch.rand(shape.tokens, shape.experts, generator=random)
    topk_idx = scores.topk(shape.topk).indices.to(device)
    weights = torch.rand(shape.tokens, shape.topk, generator=random).to(device)
    active = torch.ones(SIZE, dtype=torch.int32, device=device)
    options = MODES[mode]
    most, experts = shape.tokens, shape.experts

    def dispatch() -> Any:
        return buffer.dispatch(
            x, topk_idx, active, most, experts, NEVER, use_fp8=use_fp8, **options
        )

    def combine(rows: torch.Tensor, handle: Any) -> Any:
        return buffer.combine(rows, topk_idx, weights, active, NEVER, handle, **options)

    (recv_x, count, handle, *_), _ = call(device, dispatch)
    rows, checksum = rows_of(recv_x, count)
    given, _ = call(device, partial(combine, rows, handle))
    out = given[0].cpu()
    times: list[tuple[float, float]] = []
    for _ in range(shape.rounds):
        given, dispatch_us = call(device, dispatch)
        _, combine_us = call(device, partial(combine, rows, given[2]))
        times.append((dispatch_us, combine_us))
    expected = x.cpu().double() * weights.cpu().double().sum(1, keepdim=True)
    return {
        "mode": mode,
        "use_fp8": use_fp8,
        "rows": checksum,
        "out": digest([bytes(out.view(torch.int16).numpy())]),
        "error": float((out.double() - expected).norm() / expected.norm()),
        "dispatch_us": statistics.median(one for one, _ in times),
        "combine_us": statistics.median(one for _, one in times),
    }


def main() -> None:
    """Measure what was asked for."""
    shape = parse()
    device = meet()
    buffer_class = importlib.import_module(MODULE).Buffer
    hint = buffer_class.get_ep_buffer_size_hint(shape.tokens, shape.hidden, SIZE, shape.experts)
    options = {"disable_p2p": True} if shape.disable_p2p else {}
    buffer = buffer_class(distributed.group.WORLD, hint, **options)
    results = [
        measure(buffer, device, shape, mode, payload == "fp8")
        for payload in shape.payloads.split(",")
        for mode in shape.modes.split(",")
    ]
    told = {
        "module": MODULE,
        "rank": RANK,
        "buffer_bytes": hint,
        "fallback": bool(buffer._use_fallback),
        "shape": vars(shape),
        "results": results,
    }
    print(json.dumps(told), flush=True)
    distributed.barrier()


if __name__ == "__main__":
    main()
