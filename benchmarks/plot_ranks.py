"""What more ranks cost: python benchmarks/plot_ranks.py FIGURE LOG...

Reads what gpu_bench printed (scripts/gpu_check.sh, the step bench) for any number of ranks, and
draws the medians of the shapes with many experts against the bytes that one rank has to send over
its links: one row for each token and other rank that has one of its experts, on average over random
choices of K different experts of E.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from math import comb
from pathlib import Path
from typing import Any

from mooncake_ep.cli.plot import pyplot_for_files

_SHAPE = re.compile(
    r"ranks=(\d+) tokens=(\d+) hidden=(\d+) experts=(\d+) topk=(\d+) (bf16|fp8) "
    r"weights at dispatch$"
)
_TIME = re.compile(r"(dispatch|combine) +median +([0-9.]+) us")
_LINK_GBPS = 385  # a peer copy while another comes, on H200 and H100 (BENCHMARKS.md)
_EXPERTS_MIN = 128


def link_bytes(
    ranks: int, tokens: int, hidden: int, experts: int, topk: int, element_bytes: int
) -> float:
    """Compute the bytes of rows that a rank sends to others."""
    missed = comb(experts - experts // ranks, topk) / comb(experts, topk)
    return tokens * (ranks - 1) * (1 - missed) * hidden * element_bytes


def read(paths: list[Path]) -> dict[tuple[str, int], list[tuple[float, float]]]:
    """Read (bytes, microseconds) of each operation and number of ranks."""
    points: dict[tuple[str, int], list[tuple[float, float]]] = defaultdict(list)
    for path in paths:
        shape: Any = None
        for line in path.read_text().splitlines():
            if line.startswith("ranks="):
                shape = _SHAPE.match(line)
            time = _TIME.match(line)
            if shape is None or time is None or int(shape[4]) < _EXPERTS_MIN:
                continue
            ranks, tokens, hidden, experts, topk = map(int, shape.groups()[:5])
            operation, quant = time[1], shape[6] == "fp8"
            if quant and operation == "combine":
                continue  # the same as beside bf16
            sent = link_bytes(ranks, tokens, hidden, experts, topk, 1 if quant else 2)
            points[operation + (" fp8" if quant else ""), ranks].append((sent, float(time[2])))
    return points


def draw(path: Path, points: dict[tuple[str, int], list[tuple[float, float]]]) -> None:
    """Draw a line for each operation and number of ranks, and the time that the link needs."""
    pyplot = pyplot_for_files()
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colors = {name: f"C{i}" for i, name in enumerate(sorted({name for name, _ in points}))}
    styles = dict(zip(sorted({ranks for _, ranks in points}), ("-", "--", ":"), strict=False))
    for (name, ranks), pairs in sorted(points.items()):
        megabytes, times = zip(*((sent / 1e6, time) for sent, time in sorted(pairs)), strict=True)
        axes.plot(
            megabytes,
            times,
            styles[ranks],
            marker="o",
            color=colors[name],
            label=f"{name}, {ranks} ranks",
        )
    ends = [min(sent for pairs in points.values() for sent, _ in pairs), 2e8]
    axes.plot(
        [end / 1e6 for end in ends],
        [end / _LINK_GBPS / 1e3 for end in ends],
        color="0.6",
        label=f"{_LINK_GBPS} GB/s",
    )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="MB that a rank sends over its links",
        ylabel="us, median in a graph",
    )
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), read([Path(name) for name in sys.argv[2:]]))
