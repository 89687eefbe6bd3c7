"""Bars made of block characters, and of '#' where the terminal has none."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_EIGHTHS = " ▏▎▍▌▋▊▉█"
_HEIGHTS = "▁▂▃▄▅▆▇█"
_HEIGHTS_ASCII = "_.-=+*#@"


def horizontal(value: float, largest: float, width: int) -> str:
    """A bar of at most `width` characters, padded to that width."""
    share = min(max(value / largest, 0.0), 1.0) if largest > 0 else 0.0
    if not _has_blocks():
        return ("#" * round(share * width)).ljust(width)
    full, eighths = divmod(round(share * width * 8), 8)
    return ("█" * full + (_EIGHTHS[eighths] if eighths else "")).ljust(width)


def spark(values: Sequence[float], largest: float) -> str:
    """One character per value, its height the share of `largest`."""
    heights = _HEIGHTS if _has_blocks() else _HEIGHTS_ASCII
    top = len(heights) - 1
    return "".join(heights[round(top * value / largest) if largest > 0 else 0] for value in values)


def _has_blocks() -> bool:
    try:
        _EIGHTHS.encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
