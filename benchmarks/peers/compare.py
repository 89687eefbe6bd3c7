"""Times this library beside others that do the same exchange: python benchmarks/peers/compare.py.

One process for each rank, all in one torch.distributed process group. Every contestant gets the
same inputs; what it returns is compared with what this library returns before it is timed. One that
cannot run here is skipped with the reason. Ends with 1 if a result was wrong or a rank failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ours
import timing
import torch
import torch.distributed as dist
import torch.multiprocessing
from all_to_all import AllToAll
from exchange import OPERATIONS, Contestant, Inputs, Shape, Variant, expert_outputs, random_inputs
from loops import Loops
from mooncake_wheel import Mooncake

import mooncake_ep as ep

_PEERS: dict[str, Callable[[Shape, Inputs], Contestant]] = {
    "nccl": AllToAll,
    "mooncake": Mooncake,
    "loops": Loops,
}
_PEERS_BY_DEFAULT = ["nccl", "mooncake"]
# Relative L2 error of combine's sums against ours: partial sums are rounded to bf16 here and there.
_TOLERANCE = 1e-2
_GRACE_S = 5.0


class _Reference:
    """What this library returned and how long it took; the others are measured by it."""

    count: Any = None
    out: Any = None

    def __init__(self) -> None:
        self.median_s: dict[tuple[str, str], float] = {}

    def ratio(self, median_s: float, name: str, operation: str) -> str:
        """How many times as long as ours of that name."""
        reference_s = self.median_s.get((name, operation))
        return "-" if reference_s is None else f"{median_s / reference_s:.2f}"


def main() -> int:
    """Start the ranks and wait for them; returns the exit status."""
    arguments = _arguments()
    with tempfile.TemporaryDirectory() as folder:
        ranks = torch.multiprocessing.spawn(
            _run_rank, (arguments, f"{folder}/store"), nprocs=arguments.ranks, join=False
        )
        deadline = time.monotonic() + arguments.timeout
        try:
            while not ranks.join(max(0.0, deadline - time.monotonic()), _GRACE_S):
                if time.monotonic() >= deadline:
                    print(f"the ranks did not end within {arguments.timeout} s (--timeout)")
                    return 1
        except torch.multiprocessing.ProcessException as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            for process in ranks.processes:
                process.kill()
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    numbers = {
        "tokens": (128, "tokens of each rank"),
        "hidden": (7168, "channels of a token"),
        "experts": (256, "experts of all ranks together"),
        "topk": (8, "experts of each token"),
        "ranks": (2, "ranks, each a process; on GPUs each with its own"),
        "rounds": (200, "timed rounds"),
        "warmup": (10, "rounds before them"),
        "seed": (1, "of all random numbers"),
        "timeout": (600, "seconds after which the ranks are ended"),
    }
    for name, (default, meaning) in numbers.items():
        text = f"{meaning} (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int, default=default, metavar="N", help=text)
    parser.add_argument("--payload", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument(
        "--peers",
        type=lambda text: text.split(","),
        default=_PEERS_BY_DEFAULT,
        metavar="NAME[,NAME]",
        help=f"of {', '.join(_PEERS)} (default: {','.join(_PEERS_BY_DEFAULT)}); "
        "on the CPU nccl is gloo",
    )
    arguments = parser.parse_args()
    try:
        _check(arguments)
    except (ValueError, OverflowError) as error:
        parser.error(str(error))
    return arguments


def _check(arguments: argparse.Namespace) -> None:
    """Refuse what the ranks would refuse, each with a traceback."""
    for name in arguments.peers:
        if name not in _PEERS:
            raise ValueError(f"--peers: {name!r} is not one of {', '.join(_PEERS)}")
    for name in ("rounds", "tokens"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name} {getattr(arguments, name)} is less than 1")
    if arguments.topk > arguments.experts:
        raise ValueError(f"--topk {arguments.topk} is more than --experts {arguments.experts}")
    info = ep.backend_info(arguments.device)
    if not info.available:
        raise ValueError(f"--device {arguments.device}: not available here: {info.reason}")
    if arguments.device == "cuda" and arguments.ranks > torch.cuda.device_count():
        gpus = torch.cuda.device_count()
        raise ValueError(f"--ranks {arguments.ranks}: NCCL needs a GPU for each, here are {gpus}")
    ep.Buffer.query_sizes(
        rank_count=arguments.ranks,
        max_tokens=arguments.tokens,
        hidden=arguments.hidden,
        experts=arguments.experts,
        topk=arguments.topk,
        payloads=("bf16", "fp8") if arguments.payload == "fp8" else ("bf16",),
    )


def _run_rank(rank: int, arguments: argparse.Namespace, store_path: str) -> None:
    """Be one rank: join the process group, and run the contestants one after the other."""
    on_gpu = arguments.device == "cuda"
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
        # All ranks are on this machine, whatever its name resolves to.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        store=dist.FileStore(store_path, arguments.ranks),
        rank=rank,
        world_size=arguments.ranks,
        timeout=datetime.timedelta(seconds=arguments.timeout),
        device_id=device if on_gpu else None,
    )
    names = ("tokens", "hidden", "experts", "topk", "payload")
    shape = Shape(
        rank=rank,
        rank_count=arguments.ranks,
        device=device,
        **{name: getattr(arguments, name) for name in names},
    )
    inputs = random_inputs(shape, seed=arguments.seed)
    clock = timing.Clock(arguments.rounds, arguments.warmup, device)
    _show_opening(shape, arguments)
    reference = _Reference()
    _contest(ours.Ours(shape, inputs), shape, clock, reference)
    for name in arguments.peers:
        peer = _peer(name, shape, inputs)
        if peer is not None:
            _contest(peer, shape, clock, reference)
        del peer
        if on_gpu:
            torch.cuda.empty_cache()
    dist.destroy_process_group()


def _peer(name: str, shape: Shape, inputs: Inputs) -> Contestant | None:
    """Make a contestant, or say why that fails; None on all ranks if it does on one. Collective."""
    peer, reason = None, ""
    try:
        peer = _PEERS[name](shape, inputs)
    except Exception as error:  # it is not ours, and may fail in any way
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{Path(frame.filename).name}:{frame.lineno}: {frame.line}"
        reason = f"{type(error).__name__}: {error or where}".strip()
    reasons = [one for one in _gather(reason) if one]
    if not reasons:
        return peer
    if shape.rank == 0:
        print(f"{name}: skipped, {reasons[0]}", flush=True)
    return None


def _contest(
    contestant: Contestant, shape: Shape, clock: timing.Clock, reference: _Reference
) -> None:
    """Check a contestant, time it, and print a row for each operation. Collective."""
    contestant.dispatch()
    received = contestant.received()
    y = expert_outputs(shape, received)
    out = contestant.combine(y).clone()
    if reference.out is None:
        reference.count, reference.out = received.count.clone(), out
    variants = contestant.variants(y)
    _compare(variants[0].name, (received.count, out), reference)
    for variant in variants:
        for operation in OPERATIONS:
            _show_row(variant, operation, clock.slowest(variant, operation), reference)
    del variants, variant  # and with them graphs, which have to go before their group
    contestant.close()


def _compare(name: str, result: tuple[Any, Any], reference: _Reference) -> None:
    """Raise on all ranks if the counts or the sums are wrong on one. Collective."""
    count, out = result
    expected = reference.out.float()
    error = torch.linalg.norm(out.float() - expected) / torch.linalg.norm(expected)
    wrong = ""
    if not torch.equal(count, reference.count):
        wrong = "its experts received other numbers of rows than ours"
    # Written so that NaN fails too.
    elif not error.item() <= _TOLERANCE:
        wrong = f"its sums have a relative L2 error of {error.item():.3g}, over {_TOLERANCE:g}"
    for rank, found in enumerate(_gather(wrong)):
        if found:
            raise RuntimeError(f"{name}, rank {rank}: {found}")


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _show_opening(shape: Shape, arguments: argparse.Namespace) -> None:
    if shape.rank != 0:
        return
    names = ("ranks", "tokens", "hidden", "experts", "topk", "payload", "device", "rounds", "seed")
    config = " ".join(f"{name}={getattr(arguments, name)}" for name in names)
    print(f"config: {config} torch={torch.__version__}")
    if shape.device.type == "cuda":
        print(f"gpu: {torch.cuda.get_device_name()}")
    print(f"ratio = theirs / {ours.EAGER}; to graph = theirs / {ours.GRAPH}; of medians")
    titles = ("median us", "p99 us", "ratio", "to graph")
    print(f"{'':26s}{'':18s}" + "".join(f"{title:>11s}" for title in titles), flush=True)


def _show_row(variant: Variant, operation: str, times: list[float], reference: _Reference) -> None:
    median_s = timing.median(times)
    if variant.name in (ours.EAGER, ours.GRAPH):
        reference.median_s[variant.name, operation] = median_s
    if dist.get_rank() != 0:
        return
    ratios = [reference.ratio(median_s, name, operation) for name in (ours.EAGER, ours.GRAPH)]
    numbers = f"{1e6 * median_s:11.1f}{1e6 * timing.percentile_99(times):11.1f}"
    print(f"{variant.name:26s}{operation:18s}{numbers}{ratios[0]:>11s}{ratios[1]:>11s}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
