"""mooncake-ep bench: times dispatch and combine, beside a plain copy and gloo."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from . import info
from .errors import UserError
from .sizes import Sizes, add_device_argument, add_size_arguments, count, sizes_from
from .spawn import launch_from, run_ranks

_OURS = "mooncake_ep"
_EAGER = "eager"
_BASELINES = ("plain_copy", "gloo")
_OPERATIONS = ("dispatch", "combine", "dispatch+combine")
# What Mooncake's own benchmark counts for the header of a message.
_HEADER_BYTES = 32
_ROUNDS = {"cpu": 20, "cuda": 200}
_EXAMPLES = """\
examples:
  mooncake-ep bench --world-size 2 --tokens 2048 --hidden 7168 --experts 16 --topk 2
  mooncake-ep bench --payload fp8 --rounds 100 --no-baselines
  mooncake-ep bench --json result.json
  mooncake-ep bench --device cuda --tokens 128 --experts 256 --topk 8

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
run, and its percentage that of link_bw.
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
    parser.add_argument(
        "--rounds",
        type=count,
        metavar="N",
        help="timed rounds (default: {cpu}; with --device cuda: {cuda})".format(**_ROUNDS),
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
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the ranks and print the times."""
    launch = launch_from(arguments, label="bench")
    sizes = sizes_from(arguments, rank_count=launch.rank_count)
    path = Path(arguments.json) if arguments.json not in (None, "-") else None
    if path is not None and not path.resolve().parent.is_dir():
        raise UserError(f"--json {path}: there is no folder {path.resolve().parent}")
    arguments.rounds = arguments.rounds or _ROUNDS[launch.device]
    options = {
        "sizes": sizes.as_options(),
        "rounds": arguments.rounds,
        "warmup": arguments.warmup,
        "threads": arguments.threads,
        "baselines": not arguments.no_baselines,
    }
    module = "bench_rank" if launch.device == "cpu" else "bench_gpu_rank"
    results = run_ranks(f"mooncake_ep.cli.{module}:run", options, launch)
    if not launch.reports:
        return 0
    report = _report(sizes, arguments, results)
    if arguments.json == "-":
        json.dump(report, sys.stdout, indent=2)
        print()
        return 0
    _print(report)
    if path is not None:
        path.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _report(
    sizes: Sizes, arguments: argparse.Namespace, results: list[dict[str, Any]]
) -> dict[str, Any]:
    names = results[0]["times"]
    link_rows = sum(result["link_rows"] for result in results) / sizes.rank_count
    row_bytes = {"dispatch": sizes.dispatch_row_bytes, "combine": sizes.combine_row_bytes}
    header_bytes = {"dispatch": _HEADER_BYTES, "combine": 0}
    report: dict[str, Any] = {
        "config": {
            "ranks": sizes.rank_count,
            "tokens": sizes.tokens,
            "hidden": sizes.hidden,
            "experts": sizes.experts,
            "topk": sizes.topk,
            "backend": arguments.device,
            "payload": sizes.payload,
            "seed": sizes.seed,
            "rounds": arguments.rounds,
            "warmup": arguments.warmup,
        },
        "mode": {
            "mode": "runtime_p2p",
            "fallback": False,
            "ibgda_disabled": True,
            "fast": True,
            **results[0]["mode"],
        },
        "machine": info.machine(),
        **results[0].get("report", {}),
    }
    peer_copy_gb_s = report.get("peer_copy_gb_s")
    for operation in _OPERATIONS:
        parts = operation.split("+")
        byte_count = (
            sizes.tokens * sizes.topk * sum(row_bytes[part] + header_bytes[part] for part in parts)
        )
        link_bytes = round(link_rows * sum(row_bytes[part] for part in parts))
        ours = _statistics(_slowest(results, _OURS, operation), byte_count, link_bytes)
        if _EAGER in names:
            eager = _slowest(results, _EAGER, operation)
            ours[_EAGER] = _statistics(eager, byte_count, link_bytes)
        if peer_copy_gb_s:
            ours["peer_copy_percent"] = 100 * ours["link_gb_s"] / peer_copy_gb_s
        for name in _BASELINES:
            if operation in names.get(name, {}):
                theirs = _statistics(_slowest(results, name, operation), byte_count, link_bytes)
                ours[name] = theirs
                ours[f"ratio_to_{name}"] = theirs["median_us"] / ours["median_us"]
        report[operation] = ours
    return report


def _slowest(results: list[dict[str, Any]], name: str, operation: str) -> list[float]:
    """Seconds of each round: those of its slowest rank."""
    return [
        max(times)
        for times in zip(*(result["times"][name][operation] for result in results), strict=True)
    ]


def _statistics(seconds: list[float], byte_count: int, link_bytes: int) -> dict[str, Any]:
    ordered = sorted(seconds)
    average = sum(ordered) / len(ordered)
    middle = len(ordered) // 2
    # The 99th percentile is the smallest time that 99 % of the rounds do not exceed.
    late = ordered[-(-99 * len(ordered) // 100) - 1]
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return {
        "avg_us": 1e6 * average,
        "median_us": 1e6 * median,
        "p99_us": 1e6 * late,
        "min_us": 1e6 * ordered[0],
        "bytes": byte_count,
        "bw_gb_s": byte_count / average / 1e9,
        "link_bytes": link_bytes,
        "link_gb_s": link_bytes / average / 1e9,
    }


def _print(report: dict[str, Any]) -> None:
    names = ("ranks", "tokens", "hidden", "experts", "topk", "backend")
    print("config: " + " ".join(f"{name}={report['config'][name]}" for name in names))
    print(
        " ".join(f"{name}={value}" for name, value in report["mode"].items())
        + f" payload={report['config']['payload']}"
    )
    if report.get("peer_copy_gb_s"):
        print(f"peer_copy: bw={report['peer_copy_gb_s']:.2f} GB/s")
    for operation in _OPERATIONS:
        ours = report[operation]
        print(f"{operation}: avg={ours['avg_us']:.1f} us bw={ours['bw_gb_s']:.2f} GB/s")
        print(
            f"  {operation} median={ours['median_us']:.1f} us p99={ours['p99_us']:.1f} us "
            f"min={ours['min_us']:.1f} us link={ours['link_bytes']} bytes "
            f"link_bw={ours['link_gb_s']:.2f} GB/s" + _percentage(ours)
        )
        if _EAGER in ours:
            eager = ours[_EAGER]
            print(
                f"  {operation} eager median={eager['median_us']:.1f} us "
                f"p99={eager['p99_us']:.1f} us min={eager['min_us']:.1f} us"
            )
        for name in _BASELINES:
            if name in ours:
                print(
                    f"  {operation} {name} median={ours[name]['median_us']:.1f} us "
                    f"ratio_to_{name}={ours[f'ratio_to_{name}']:.2f}"
                )


def _percentage(ours: dict[str, Any]) -> str:
    return f" peer_copy={ours['peer_copy_percent']:.1f}%" if "peer_copy_percent" in ours else ""
