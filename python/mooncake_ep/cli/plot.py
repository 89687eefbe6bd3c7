"""The picture of a demo run: the load of each expert, and what each rank did when."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import cannot_write, check_writable

_SUFFIXES = (".png", ".pdf", ".svg")
_COLORS = {
    "embed": "#4e79a7",
    "route": "#76b7b2",
    "wait": "#d9d9d9",
    "dispatch": "#f28e2b",
    "experts": "#59a14f",
    "combine": "#e15759",
}

# (what, begin, end) in seconds since the start of the run.
Span = tuple[str, float, float]


def check_path(path: Path) -> None:
    """Refuse a file that cannot be drawn."""
    if path.suffix not in _SUFFIXES:
        raise UserError(f"--plot {path}: the name has to end in {', '.join(_SUFFIXES)}")
    check_writable("--plot", path)


def check_matplotlib() -> None:
    """Refuse to draw where nothing draws."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'mooncake-ep[plot]'")


def pyplot_for_files() -> Any:
    """Import matplotlib.pyplot, set to draw without a screen."""
    # matplotlib is optional, so its types are not known everywhere.
    matplotlib = importlib.import_module("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def write(path: Path, figure: Any) -> None:
    """Write a figure into a file whose suffix names the format, and forget the figure."""
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:  # it could be written before; a disk may be full by now
        raise cannot_write("--plot", path, error) from None
    finally:
        pyplot_for_files().close(figure)


def draw(path: Path, *, counts: list[list[int]], spans: list[list[Span]], title: str) -> None:
    """Draw rows per local expert of each rank, and the spans of each rank, into a file."""
    pyplot = pyplot_for_files()
    figure, (load, time_line) = pyplot.subplots(
        2, 1, figsize=(9, 4.5 + 0.3 * len(spans)), layout="constrained"
    )
    figure.suptitle(title)
    first = 0
    for rank, mine in enumerate(counts):
        load.bar(range(first, first + len(mine)), mine, label=f"rank {rank}")
        first += len(mine)
    load.axhline(sum(map(sum, counts)) / max(first, 1), color="0.4", linewidth=1, linestyle="--")
    load.set(xlabel="expert (dashed: the mean)", ylabel="rows")
    load.margins(x=0.01, y=0.15)
    load.legend(fontsize="small", ncols=min(len(counts), 8))
    for rank, mine_spans in enumerate(spans):
        for name, begin, end in mine_spans:
            place = [(1e3 * begin, 1e3 * (end - begin))]
            time_line.broken_barh(place, (rank - 0.4, 0.8), color=_COLORS[name])
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=color) for color in _COLORS.values()]
    time_line.legend(handles, _COLORS, fontsize="small", ncols=len(_COLORS), loc="upper center")
    time_line.set(xlabel="ms", ylabel="rank", yticks=range(len(spans)))
    time_line.set_ylim(len(spans) - 0.5, -1.5)
    write(path, figure)
