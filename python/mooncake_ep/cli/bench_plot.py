"""The picture of a sweep of mooncake-ep bench: time and bandwidth against tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import plot
from .bench_report import OPERATIONS

if TYPE_CHECKING:
    from pathlib import Path

_COLORS = dict(zip(OPERATIONS, ("#f28e2b", "#e15759", "#4e79a7"), strict=True))
_FEW = 12  # sizes that all have a place on the axis


def draw(path: Path, report: dict[str, Any]) -> None:
    """Draw the sweep of a report into a file."""
    pyplot = plot.pyplot_for_files()
    figure, (time, bandwidth) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    figure.suptitle(title(report))
    sweep = report["sweep"]
    tokens = [sized["tokens"] for sized in sweep]
    for operation, color in _COLORS.items():
        numbers = [sized["operations"][operation] for sized in sweep]
        style = {"color": color, "marker": "o", "markersize": 4}
        medians = [one["median_us"] for one in numbers]
        time.plot(tokens, medians, label=operation, **style)
        for name, key, line in (("link", "link_gb_s", "-"), ("logical", "bw_gb_s", "--")):
            speeds = [one[key] for one in numbers]
            # One rank has no link; a few tokens may all stay where they are.
            if any(speeds):
                label = f"{operation}, {name}"
                bandwidth.plot(tokens, speeds, label=label, linestyle=line, **style)
    if report.get("peer_copy_gb_s"):
        bandwidth.axhline(report["peer_copy_gb_s"], color="0.4", linestyle=":", label="peer copy")
    time.set(ylabel="us, median of the rounds' slowest ranks")
    bandwidth.set(ylabel="GB/s of a rank, from the average time")
    for panel in (time, bandwidth):
        panel.set_xscale("log", base=2)
        # A speed of 0 has no place here and leaves a gap.
        panel.set_yscale("log", nonpositive="mask")
        panel.set(xlabel="tokens of a rank")
        if len(tokens) <= _FEW:
            panel.set_xticks(tokens, [str(count) for count in tokens])
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    plot.write(path, figure)


def title(report: dict[str, Any]) -> str:
    """The shape and where it ran, in a line."""
    config = report["config"]
    ranks = f"{config['ranks']} rank{'s' if config['ranks'] > 1 else ''}"
    words = [
        ranks,
        f"{config['experts']} experts",
        f"top-{config['topk']}",
        f"hidden {config['hidden']}",
        config["payload"],
        f"{config['backend']} ({report['gpu']})" if "gpu" in report else config["backend"],
    ]
    words += [f"L2 {report['mode']['l2']}"] if "l2" in report["mode"] else []
    return ", ".join(words)
