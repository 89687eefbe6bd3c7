"""mooncake-ep demo: a Mixture-of-Experts layer over real text, spread over processes and checked.

Each rank embeds its shard of the text, routes, dispatches, runs its SwiGLU experts and combines.
The process that prints then computes the same layer without any dispatch, from the same rows, and
compares.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import sys
import time
from pathlib import Path
from typing import Any

from . import bars, plot
from .errors import CheckFailedError, UserError
from .sizes import Sizes, add_size_arguments, count, sizes_from
from .spawn import launch_from, run_ranks

# Relative L2 error of the layer. Rows are rounded on the way to the experts (FP8), after them, as
# partial sums and as totals; SwiGLU multiplies two functions of its input, so it raises the error
# of FP8 rows.
TOLERANCE = {"bf16": 6e-3, "fp16": 1e-3, "fp32": 1e-5, "fp8": 8e-2}
_BAR_WIDTH = 40
_EXPERTS_SHOWN_MAX = 32
_SHARDS_SHOWN_MAX = 4
_EXCERPT_WIDTH = 64
_SPARK_WIDTH = 64
_PHASES = ("embed", "route", "dispatch", "experts", "combine", "wait")
_EXAMPLES = """\
examples:
  mooncake-ep demo
  mooncake-ep demo --text README.md --world-size 2 --payload fp8
  mooncake-ep demo --experts 64 --topk 8 --layers 3 --plot demo.png
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command's arguments."""
    parser = subparsers.add_parser(
        "demo",
        help="run a Mixture-of-Experts layer over real text",
        description="Run a Mixture-of-Experts layer over a text on several ranks, show what "
        "happens, and compare the result with the same layer computed in one process.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_size_arguments(parser, world_size=4, tokens=512, hidden=512, experts=16, topk=2)
    parser.add_argument(
        "--layers", type=count, default=1, metavar="N", help="layers (default: %(default)s)"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="the text (default: the language reference in pydoc)",
    )
    parser.add_argument(
        "--plot",
        type=Path,
        metavar="FILE",
        help="draw load and time line; FILE ends in .png, .pdf or .svg",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the ranks, show what they did, and check it."""
    launch = launch_from(arguments, label="demo")
    if arguments.plot is not None:
        plot.check_path(arguments.plot)
        plot.check_matplotlib()
    sizes = sizes_from(arguments, rank_count=launch.rank_count)
    shards, source = _shards(arguments.text, sizes)
    if launch.reports:
        _print_opening(sizes, shards, source, layers=arguments.layers)
    options = {"sizes": sizes.as_options(), "shards": shards, "layers": arguments.layers}
    begin = time.monotonic()
    results = run_ranks("mooncake_ep.cli.demo_rank:run", options, launch)
    if not launch.reports:
        return 0
    return _report(arguments, sizes, results, elapsed_s=time.monotonic() - begin)


def _shards(path: Path | None, sizes: Sizes) -> tuple[list[dict[str, Any]], str]:
    """Cut the text into a shard of words for each rank; returns them and what the text is."""
    from .moe import default_text, words_of

    if path is None:
        if importlib.util.find_spec("pydoc_data") is None:
            raise UserError(
                "this Python lacks pydoc_data, the default text: name one with --text FILE"
            )
        text, name = default_text(), "the language reference in pydoc"
    else:
        try:
            text, name = path.read_text(errors="replace"), str(path)
        except OSError as error:
            raise UserError(f"--text {path}: {error.strerror}") from error
    words = words_of(text)
    used = min(len(words), sizes.tokens * sizes.rank_count)
    bounds = [used * rank // sizes.rank_count for rank in range(sizes.rank_count + 1)]
    shards = [
        {"words": words[begin:end], "first_position": begin}
        for begin, end in itertools.pairwise(bounds)
    ]
    return shards, f"{name}, {used:,} of its {len(words):,} words and signs"


def _print_opening(sizes: Sizes, shards: list[dict[str, Any]], source: str, *, layers: int) -> None:
    print(
        f"{sizes.rank_count} ranks, {sizes.experts} experts ({sizes.local_experts} on each rank), "
        f"top-{sizes.topk}, hidden {sizes.hidden}, {sizes.payload}, "
        f"{layers} layer{'s' if layers > 1 else ''}"
    )
    print(f"text: {source}")
    for rank, shard in enumerate(shards[:_SHARDS_SHOWN_MAX]):
        print(f"  rank {rank}: {_excerpt(shard['words'])}")
    sys.stdout.flush()


def _excerpt(words: list[str]) -> str:
    return (
        " ".join(words)[:_EXCERPT_WIDTH].encode("ascii", "replace").decode() + " ..."
        if words
        else "(no words)"
    )


def _report(
    arguments: argparse.Namespace, sizes: Sizes, results: list[dict[str, Any]], *, elapsed_s: float
) -> int:
    from .demo_check import compare

    counts = [result["counts"] for result in results]
    begin = min(span[1] for result in results for span in result["spans"])
    spans = [
        [(name, start - begin, end - begin) for name, start, end in result["spans"]]
        for result in results
    ]
    where = " in the last layer" if arguments.layers > 1 else ""
    print(f"rows that each rank's experts received{where} (a token counts once per expert)")
    _print_load(counts)
    _print_times(spans)
    if arguments.plot is not None:
        title = (
            f"{sizes.rank_count} ranks, {sizes.experts} experts, top-{sizes.topk}, {sizes.payload}"
        )
        plot.draw(arguments.plot, counts=counts, spans=spans, title=title)
        print(f"plot: {arguments.plot}")
    start = time.monotonic()
    errors = compare(results, sizes, layer_count=arguments.layers)
    tolerance = TOLERANCE[sizes.payload]
    print(
        f"compared with one process without dispatch: largest error {errors.largest:.2e}, "
        f"relative L2 error {errors.relative:.2e}, tolerance {tolerance:.0e}"
    )
    # Written so that NaN fails too.
    if not errors.relative <= tolerance:
        raise CheckFailedError(
            f"demo failed: relative L2 error {errors.relative:.3g} is more than {tolerance:.3g}"
        )
    check_s = time.monotonic() - start
    print(f"demo ok ({elapsed_s:.1f} s on {sizes.rank_count} ranks, {check_s:.1f} s to check)")
    return 0


def _print_load(counts: list[list[int]]) -> None:
    totals = [sum(mine) for mine in counts]
    for rank, total in enumerate(totals):
        bar = bars.horizontal(total, max(totals), _BAR_WIDTH)
        print(f"  rank {rank:<5d}{bar} {total:6,d}")
    experts = [number for mine in counts for number in mine]
    if len(experts) <= _EXPERTS_SHOWN_MAX:
        for expert, rows in enumerate(experts):
            bar = bars.horizontal(rows, max(experts), _BAR_WIDTH)
            print(f"  expert {expert:<3d}{bar} {rows:6,d}")
    else:
        for begin in range(0, len(experts), _SPARK_WIDTH):
            some = experts[begin : begin + _SPARK_WIDTH]
            print(f"  expert {begin:<6d}{bars.spark(some, max(experts))}")
    mean = max(sum(experts) / len(experts), 1)
    busiest = max(range(len(experts)), key=experts.__getitem__)
    print(
        f"  busiest: expert {busiest} with {experts[busiest]:,} rows, "
        f"{experts[busiest] / mean:.1f} times the mean"
    )


def _print_times(spans: list[list[plot.Span]]) -> None:
    print(f"  {'time in ms':<10s}{'fastest':>10s}{'mean':>10s}{'slowest rank':>15s}")
    for phase in _PHASES:
        times = [
            1e3 * sum(end - begin for name, begin, end in mine if name == phase) for mine in spans
        ]
        mean = sum(times) / len(times)
        print(f"  {phase:<10s}{min(times):10.2f}{mean:10.2f}{max(times):15.2f}")
