"""A progress bar on standard error; silent unless that is a terminal."""

from __future__ import annotations

import sys
import time

_WIDTH = 30
_REDRAW_INTERVAL_S = 0.1


class Progress:
    """One line that is redrawn in place."""

    def __init__(self, label: str) -> None:
        """Begin with an invisible bar."""
        self._label = label
        self._visible = sys.stderr.isatty()
        self._drawn = False
        self._drawn_at = 0.0

    def update(self, done: int, total: int) -> None:
        """Show that `done` of `total` steps are over."""
        now = time.monotonic()
        if not self._visible or (now - self._drawn_at < _REDRAW_INTERVAL_S and done < total):
            return
        self._drawn, self._drawn_at = True, now
        filled = _WIDTH * done // max(total, 1)
        bar = "#" * filled + "." * (_WIDTH - filled)
        sys.stderr.write(f"\r{self._label} [{bar}] {done}/{total}\x1b[K")
        sys.stderr.flush()

    def clear(self) -> None:
        """Take the bar off the screen, so that other text can be written."""
        if self._drawn:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = False
