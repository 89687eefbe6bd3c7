"""What mooncake-ep bench makes of the ranks' times: the report that JSON holds, and its text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import info

if TYPE_CHECKING:
    import argparse

    from .sizes import Sizes

OPERATIONS = ("dispatch", "combine", "dispatch+combine")
_OURS = "mooncake_ep"
_EAGER = "eager"
_BASELINES = ("plain_copy", "gloo")
# What Mooncake's own benchmark counts for the header of a message.
_HEADER_BYTES = 32


def make(
    arguments: argparse.Namespace,
    sweep: list[Sizes],
    results: list[dict[str, Any]],
    *,
    backend: str,
) -> dict[str, Any]:
    """Put the results of all ranks together.

    The operations of one size stand at the top; those of a sweep in a list under "sweep".
    """
    largest = sweep[-1]
    facts = results[0].get("report", {})
    sized = [
        _one_size(sizes, [result["runs"][number] for result in results], facts)
        for number, sizes in enumerate(sweep)
    ]
    report: dict[str, Any] = {
        "config": {
            "ranks": largest.rank_count,
            "tokens": largest.tokens,
            "hidden": largest.hidden,
            "experts": largest.experts,
            "topk": largest.topk,
            "backend": backend,
            "payload": largest.payload,
            "seed": largest.seed,
            "rounds": arguments.rounds,
            "warmup": arguments.warmup,
        },
        "mode": _mode([result["runs"][-1]["mode"] for result in results]),
        "counted": [result["runs"][-1]["counted"] for result in results],
        "machine": info.machine(),
        **facts,
    }
    return report | ({"sweep": sized} if arguments.sweep else sized[0]["operations"])


def _mode(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """Tell how rows go, in Mooncake's words, and what else rank 0 says about itself."""
    names = {name for rank in ranks for name in rank["transport"].split("+")}
    fallback = "collective" in names
    mode = "runtime_p2p" if not fallback else "collective" if len(names) == 1 else "mixed"
    words = {"mode": mode, "fallback": fallback, "ibgda_disabled": True, "fast": not fallback}
    return {**words, **ranks[0], "transport": "+".join(sorted(names, reverse=True))}


def _one_size(sizes: Sizes, runs: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """Report all operations of one size from what each rank returned for it."""
    link_rows = sum(run["link_rows"] for run in runs) / sizes.rank_count
    row_bytes = {"dispatch": sizes.dispatch_row_bytes, "combine": sizes.combine_row_bytes}
    header_bytes = {"dispatch": _HEADER_BYTES, "combine": 0}
    operations = {}
    for operation in OPERATIONS:
        parts = operation.split("+")
        byte_count = (
            sizes.tokens * sizes.topk * sum(row_bytes[part] + header_bytes[part] for part in parts)
        )
        link_bytes = round(link_rows * sum(row_bytes[part] for part in parts))
        numbers = {
            name: _statistics(_slowest(runs, name, operation), byte_count, link_bytes)
            for name, times in runs[0]["times"].items()
            if operation in times
        }
        operations[operation] = _compare(numbers, facts.get("peer_copy_gb_s"))
    window_bytes = runs[0]["mode"]["window_bytes"]
    return {"tokens": sizes.tokens, "window_bytes": window_bytes, "operations": operations}


def _compare(numbers: dict[str, dict[str, Any]], peer_copy_gb_s: float | None) -> dict[str, Any]:
    """Put the other numbers of an operation, and what ours are to them, into ours."""
    ours = numbers.pop(_OURS)
    if peer_copy_gb_s:
        ours["peer_copy_percent"] = 100 * ours["link_gb_s"] / peer_copy_gb_s
    for name, theirs in numbers.items():
        ours[name] = theirs
        if name in _BASELINES:
            ours[f"ratio_to_{name}"] = theirs["median_us"] / ours["median_us"]
    return ours


def _slowest(runs: list[dict[str, Any]], name: str, operation: str) -> list[float]:
    """Seconds of each round: those of its slowest rank."""
    return [
        max(times) for times in zip(*(run["times"][name][operation] for run in runs), strict=True)
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


def show(report: dict[str, Any]) -> None:
    """Print a report."""
    config = dict(report["config"])
    if "sweep" in report:
        config["tokens"] = ",".join(str(sized["tokens"]) for sized in report["sweep"])
    names = ("ranks", "tokens", "hidden", "experts", "topk", "backend")
    print("config: " + " ".join(f"{name}={config[name]}" for name in names))
    print(
        " ".join(f"{name}={value}" for name, value in report["mode"].items())
        + f" payload={config['payload']}"
    )
    if report.get("peer_copy_gb_s"):
        print(f"peer_copy: bw={report['peer_copy_gb_s']:.2f} GB/s")
    if "sweep" in report:
        _show_sweep(report["sweep"])
    else:
        for operation in OPERATIONS:
            _show_operation(operation, report[operation])
        for rank, counted in enumerate(report["counted"]):
            _show_counted(rank, counted)


def _show_counted(rank: int, counted: dict[str, Any]) -> None:
    """Print how even a rank's experts are, and whom it waits for, a call."""
    rows, waited = counted["expert_rows"], counted["waited_s"]
    mean = sum(rows) / len(rows)
    evenness = f"{max(rows) / mean:.2f}" if mean else "-"
    waits = " ".join(
        f"rank{peer}={1e6 * seconds / counted['rounds']:.1f}us"
        for peer, seconds in enumerate(waited)
        if peer != rank
    )
    print(f"rank {rank}: fullest_expert={evenness} of the mean, waited a call for {waits or '-'}")


def _show_sweep(sweep: list[dict[str, Any]]) -> None:
    columns = {"median": "median_us", "p99": "p99_us", "link": "link_gb_s", "bw": "bw_gb_s"}
    print("median and p99 in us; link (rows to other ranks) and bw (all rows) in GB/s")
    print(" " * 8 + "".join(f"{operation:>36s}" for operation in OPERATIONS))
    titles = "".join(f"{title:>9s}" for title in columns)
    print(f"{'tokens':>8s}" + titles * len(OPERATIONS))
    for sized in sweep:
        numbers = [
            sized["operations"][operation][column]
            for operation in OPERATIONS
            for column in columns.values()
        ]
        print(f"{sized['tokens']:8d}" + "".join(f" {number:8.2f}" for number in numbers))


def _show_operation(operation: str, ours: dict[str, Any]) -> None:
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
