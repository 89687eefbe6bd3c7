"""mooncake-ep bench: times dispatch and combine, beside a plain copy and gloo."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from . import bench_plot, bench_report, plot
from .errors import UserError
from .files import cannot_write, check_writable
from .sizes import (
    add_api_arguments,
    add_device_argument,
    add_size_arguments,
    control_from,
    count,
    counts,
    sizes_from,
)
from .spawn import launch_from, run_ranks

_ROUNDS = {"cpu": 20, "cuda": 200, "maca": 200}
_EXAMPLES = """\
examples:
  mooncake-ep bench --world-size 2 --tokens 2048 --hidden 7168 --experts 16 --topk 2
  mooncake-ep bench --payload fp8 --rounds 100 --no-baselines
  mooncake-ep bench --json result.json
  mooncake-ep bench --device cuda --tokens 128 --experts 256 --topk 8
  mooncake-ep bench --device cuda --tokens 128 --experts 256 --topk 8 --flush-l2 --sms 32
  mooncake-ep bench --device cuda --tokens 4096 --experts 256 --topk 8 --plot bench.png
  mooncake-ep bench --sweep 64,256,1024
  mooncake-ep bench --api compat --device cuda --backend nccl --tokens 2048 --topk 2

A time is that of the slowest rank, from a common start until its outputs are complete; each round
starts with a barrier. bw counts what Mooncake's benchmark counts, for each rank: T*K*(2H+32) bytes
for dispatch and T*K*2H for combine (fp32 and fp8: with their row bytes), whether or not they left
the rank. link counts one row for each token and other rank it went to, on average over the ranks.

plain_copy moves the same messages and rows by memcpy, all offsets known; gloo does the same job
with torch.distributed. Ratios are of median times, baseline / ours: more than 1 means that this
library is faster. The baselines use one thread per rank.

With --device cuda times are from CUDA events between rounds that follow each other without a
barrier, each that of its slowest rank: once in a CUDA graph of several rounds, replayed --rounds
times (a time is that of a replay divided by the rounds in it), and once as single calls ("eager").
There are no baselines; peer_copy is the speed of a large copy from one GPU to the next in the same
run, and its percentage that of link_bw. sms is the number of SMs that a launch fills. With l2=warm
a round finds in the L2 what the rounds before left there; with --flush-l2 the L2 is overwritten
before each round, outside of its time, and a graph holds one round.

With --api compat times are of the calls of mooncake_ep.compat.mooncake, which allocate their
outputs; on a GPU by events between calls that follow each other.

A sweep runs one number of tokens after the other, each with a buffer of that size, and without
baselines.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command's arguments."""
    parser = subparsers.add_parser(
        "bench",
        help="time dispatch and combine",
        description="Time dispatch and combine with random routing, beside a plain copy of the "
        "same bytes and, if torch is installed, beside gloo.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_size_arguments(parser, world_size=2, tokens=2048, hidden=7168, experts=16, topk=2)
    add_device_argument(parser)
    add_api_arguments(parser)
    parser.add_argument(
        "--rounds",
        type=count,
        metavar="N",
        help="timed rounds (default: {cpu}; on GPUs: {cuda})".format(**_ROUNDS),
    )
    parser.add_argument(
        "--warmup",
        type=count,
        default=3,
        metavar="N",
        help="rounds before them (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        metavar="N",
        help="threads of each rank on the CPU, 0 for the library's choice; the baselines have 1 "
        "(default: %(default)s)",
    )
    parser.add_argument("--no-baselines", action="store_true", help="time only this library")
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="write all numbers as JSON to FILE as well; without FILE, JSON is all that is printed",
    )
    _add_gpu_arguments(parser)
    _add_sweep_arguments(parser)
    parser.set_defaults(command=run)


def _add_gpu_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flush-l2",
        action="store_true",
        help="overwrite the L2 before each round (only with --device cuda)",
    )
    parser.add_argument(
        "--sms",
        type=count,
        metavar="N",
        help="most SMs that a launch may fill (only with --device cuda; default: all)",
    )


def _add_sweep_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--sweep",
        type=counts,
        metavar="T[,T...]",
        help="time each of these numbers of tokens instead of --tokens, and print a line for each",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw time and bandwidth against tokens, by default 1, 2, 4 and so on up to --tokens; "
        "FILE ends in .png, .pdf or .svg",
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the ranks and print the times."""
    launch = launch_from(arguments, label="bench")
    control = control_from(arguments)
    _check(arguments)
    if arguments.plot is not None and arguments.sweep is None:
        arguments.sweep = _powers_of_two(arguments.tokens)
    tokens = arguments.sweep or [arguments.tokens]
    # What is right for the most tokens is right for fewer.
    arguments.tokens = tokens[-1]
    sizes = sizes_from(arguments, rank_count=launch.rank_count)
    arguments.rounds = arguments.rounds or _ROUNDS[launch.device]
    options = {
        "sizes": sizes.as_options(),
        "sweep": tokens,
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "threads": arguments.threads,
        "baselines": not arguments.no_baselines and arguments.sweep is None,
        "flush_l2": arguments.flush_l2,
        "max_sms": arguments.sms or 0,
        "control": control,
    }
    if control is not None:
        target = "compat_rank:bench"
    else:
        target = ("bench_rank" if launch.device == "cpu" else "bench_gpu_rank") + ":run"
    results = run_ranks(f"mooncake_ep.cli.{target}", options, launch)
    if launch.reports:
        sweep = [replace(sizes, tokens=number) for number in tokens]
        _report(
            arguments, bench_report.make(arguments, sweep, results, backend=launch.backend_name)
        )
    return 0


def _check(arguments: argparse.Namespace) -> None:
    """Refuse, before any work is done, what could not be carried out."""
    if arguments.api == "compat":
        for name in ("sweep", "plot", "sms"):
            if getattr(arguments, name) is not None:
                raise UserError(f"--{name} goes only with --api native")
    if arguments.device == "cpu":
        if arguments.flush_l2:
            raise UserError("--flush-l2 goes only with --device cuda: it is the L2 of a GPU")
        if arguments.sms is not None:
            raise UserError(f"--sms {arguments.sms} goes only with --device cuda: a CPU has no SMs")
    if arguments.json not in (None, "-"):
        check_writable("--json", Path(arguments.json))
    if arguments.plot is not None:
        plot.check_path(arguments.plot)
        plot.check_matplotlib()


def _powers_of_two(largest: int) -> list[int]:
    """1, 2, 4 and so on below `largest`, and `largest`."""
    return [1 << power for power in range((largest - 1).bit_length())] + [largest]


def _report(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    """Print first: what was measured is not lost then, should a file or the picture fail."""
    if arguments.json == "-":
        json.dump(report, sys.stdout, indent=2)
        print()
    else:
        bench_report.show(report)
    if arguments.json not in (None, "-"):
        _write_json(Path(arguments.json), report)
    if arguments.plot is not None:
        bench_plot.draw(arguments.plot, report)
        if arguments.json != "-":
            print(f"plot: {arguments.plot}")


def _write_json(path: Path, report: dict[str, Any]) -> None:
    try:
        path.write_text(json.dumps(report, indent=2) + "\n")
    except OSError as error:
        raise cannot_write("--json", path, error) from None
