"""The picture of a topology: GPUs on a circle, NICs around them, near links thick."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .plot import pyplot_for_files, write

if TYPE_CHECKING:
    from mooncake_ep import Topology

_GPU_RADIUS, _NIC_RADIUS = 1.0, 1.6
# Color and width of a link by its kind; NV and MX by their first letters.
_STYLES = {
    "NV": ("#59a14f", 2.5),
    "MX": ("#59a14f", 2.5),
    "PIX": ("#4e79a7", 2.0),
    "PXB": ("#76b7b2", 1.5),
    "PHB": ("#f28e2b", 1.0),
    "NODE": ("#bab0ac", 0.7),
    "SYS": ("#d9d9d9", 0.4),
}

Point = tuple[float, float]


def draw(path: Path, topology: Topology) -> None:
    """Draw into a file whose suffix names the format."""
    pyplot = pyplot_for_files()
    figure, axes = pyplot.subplots(figsize=(8, 8), layout="constrained")
    indexes = [gpu.index for gpu in topology.gpus]
    gpus = dict(zip(indexes, _circle(len(indexes), _GPU_RADIUS), strict=True))
    names = [nic.name for nic in topology.nics]
    nics = dict(zip(names, _circle(len(names), _NIC_RADIUS), strict=True))
    seen: dict[str, Any] = {}
    for (one, other), link in topology.gpu_links.items():
        _line(axes, gpus[one], gpus[other], link, seen)
    for index, place in gpus.items():
        if chosen := topology.nic(index):
            link = topology.nic_links.get((index, chosen), "SYS")
            _line(axes, place, nics[chosen], link, seen)
        _label(axes, place, f"GPU{index}", "#fff2cc")
    for name, place in nics.items():
        _label(axes, place, name, "#dae8fc")
    axes.set_xlim(-1.9, 1.9)
    axes.set_ylim(-1.9, 1.9)
    axes.set_axis_off()
    if seen:
        axes.legend(seen.values(), seen.keys(), loc="lower right")
    write(path, figure)


def _circle(count: int, radius: float) -> list[Point]:
    angles = [math.pi / 2 - 2 * math.pi * i / max(count, 1) for i in range(count)]
    return [(radius * math.cos(angle), radius * math.sin(angle)) for angle in angles]


def _line(axes: Any, one: Point, other: Point, link: str, seen: dict[str, Any]) -> None:
    kind = link[:2] if link[:2] in _STYLES else link
    color, width = _STYLES.get(kind, _STYLES["SYS"])
    (line,) = axes.plot(
        [one[0], other[0]], [one[1], other[1]], color=color, linewidth=width, zorder=1
    )
    seen.setdefault(link, line)


def _label(axes: Any, place: Point, name: str, color: str) -> None:
    box = {"boxstyle": "round", "facecolor": color, "edgecolor": "0.3"}
    axes.text(*place, name, ha="center", va="center", bbox=box, zorder=2)
