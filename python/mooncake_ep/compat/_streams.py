"""Which stream a call works on, and in which order: a buffer's calls run one after the other.

On the CPU there are no streams: what stands for one is None.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .._streams import stream_finder


class Streams:
    """The streams of one core buffer's calls on a GPU.

    Calls may come on several streams (two batches that overlap, and a stream of our own for calls
    that finish later): each waits for the call before it, and for no other work of that stream.
    As long as there is one stream only, nothing is recorded and nothing waits.
    """

    def __init__(self, device: torch.device) -> None:
        """Serve a buffer on ``device``."""
        self._device = device if device.type != "cpu" else None
        self._find = stream_finder(torch.empty(0))
        self._here: Any = None  # what _current() has returned last
        self._side: Any = None
        self._last: Any = None
        self._are_several = False
        self._is_captured = False  # of the stream of the last call
        self._is_marked = False  # whether _mark is behind the last call
        # Events that are recorded again and again: who waits for one waits for what it marked then.
        self._mark: Any = None
        self._fork: Any = None

    def capturing(self) -> bool:
        """Tell whether the current stream is captured in a graph."""
        return self._device is not None and bool(torch.cuda.is_current_stream_capturing())

    def current(self) -> Any:
        """Return the current stream, for a call whose results are used on it."""
        if self._device is None:
            return None
        return self._follow(self._current(), self._current_is_captured())

    def side(self) -> Any:
        """Return our own stream, which waits for the current one, for a call that ends later."""
        if self._device is None:
            return None
        if self._side is None:
            self._side = torch.cuda.Stream(self._device, priority=-1)
        self._fork = self._current().record_event(self._fork)
        self._side.wait_event(self._fork)
        # It is captured with the stream that it waits for.
        return self._follow(self._side, self._current_is_captured())

    def again(self, stream: Any) -> Any:
        """Return the stream of an earlier call, for its second half."""
        if stream is self._last and not self._are_several:
            return stream
        # Nearly always it is the current one; to make it that costs more than the rest of a call.
        is_current = self._is_current(stream)
        return self._follow(stream, self.capturing() if is_current else _is_captured(stream))

    def on(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context in which the stream of a call is the current one, as it often is."""
        if stream is None or self._is_current(stream):
            return nullcontext()
        return torch.cuda.stream(stream)  # type: ignore[no-any-return]

    def done(self, stream: Any) -> None:
        """Note that a call was queued."""
        if self._are_several:
            self._is_marked = not self._is_captured
            if self._is_marked:
                self._mark = stream.record_event(self._mark)

    def _current(self) -> Any:
        """Return the current stream: the same object as before, as long as it is the same one.

        To ask for its address is several times cheaper than to have torch make a new object.
        """
        assert self._device is not None and self._find is not None
        if self._here is None or self._find(self._device.index) != self._here.cuda_stream:
            self._here = torch.cuda.current_stream(self._device)
        return self._here

    def _is_current(self, stream: Any) -> bool:
        """Tell whether what torch does now, on whatever device, goes to ``stream``."""
        assert self._device is not None
        is_ours: bool = torch.cuda.current_device() == self._device.index
        return is_ours and bool(stream == self._current())

    def _current_is_captured(self) -> bool:
        """Tell of the stream that _current() has just returned."""
        assert self._device is not None
        if torch.cuda.current_device() != self._device.index:
            return _is_captured(self._here)
        return self.capturing()

    def _follow(self, stream: Any, is_captured: bool) -> Any:
        """Let ``stream`` wait for the last call, if that was on another one."""
        last, self._last = self._last, stream
        self._is_captured = is_captured
        if last is not None and last is not stream and last != stream:
            self._are_several = True
            self._wait_for_call(stream, last)
        return stream

    def _wait_for_call(self, stream: Any, last: Any) -> None:
        """Let ``stream`` wait for the call that was queued on ``last``."""
        is_marked, self._is_marked = self._is_marked, False
        if self._is_captured:
            # An event of before the capture cannot be waited for in it, and need not: capturing
            # begins when the device is idle.
            if _is_captured(last):
                stream.wait_stream(last)
        elif is_marked:
            stream.wait_event(self._mark)
        elif not _is_captured(last):
            stream.wait_stream(last)


def native(stream: Any) -> int | None:
    """Return the stream as the core takes it."""
    return None if stream is None else int(stream.cuda_stream)


def _is_captured(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return bool(torch.cuda.is_current_stream_capturing())
