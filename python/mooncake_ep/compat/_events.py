"""Events as today's clients know them: EventHandle and EventOverlap.

On the CPU work is done when a call returns, so there is nothing to record or to wait for.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

import torch


class EventHandle:
    """A point in the work of a GPU's stream; on the CPU one that has always passed."""

    __slots__ = ("_event",)

    def __init__(self, stream: Any = None) -> None:
        """Record what is queued on ``stream``, a torch.cuda.Stream; None: the current one."""
        self._event: Any = None
        if stream is None and torch.cuda.is_available():
            stream = torch.cuda.current_stream()
        if stream is not None:
            self._event = stream.record_event()

    def current_stream_wait(self) -> None:
        """Let the current stream wait for it; the host does not."""
        if self._event is not None:
            torch.cuda.current_stream().wait_event(self._event)

    def synchronize(self) -> None:
        """Let the host wait for it."""
        if self._event is not None:
            self._event.synchronize()


class EventOverlap:
    """What a call returns to wait for: an event, or nothing where there is nothing to wait for.

    As a context manager it waits when the block ends.

    Attributes:
        event: an EventHandle, or None.
        extra_tensors: kept alive as long as this object.
    """

    def __init__(
        self,
        event: EventHandle | None = None,
        extra_tensors: tuple[Any, ...] | None = None,
    ) -> None:
        """Wrap an event."""
        self.event = event
        self.extra_tensors = extra_tensors

    def current_stream_wait(self) -> None:
        """Let the current stream wait for the event, if there is one. In every mode."""
        if self.event is not None:
            self.event.current_stream_wait()

    def __enter__(self) -> EventOverlap:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Wait as current_stream_wait() does."""
        self.current_stream_wait()
