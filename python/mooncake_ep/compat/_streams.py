"""Which stream a call works on, and in which order: a buffer's calls run one after the other.

On the CPU there are no streams: what stands for one is None.
"""

from __future__ import annotations

from typing import Any

import torch


class Streams:
    """The streams of one core buffer's calls on a GPU.

    Calls may come on several streams (two batches that overlap, and a stream of our own for calls
    that finish later): each waits for the call before it, and for no other work of that stream.
    """

    def __init__(self, device: torch.device) -> None:
        """Serve a buffer on ``device``."""
        self._device = device if device.type != "cpu" else None
        self._side: Any = None
        self._last: Any = None
        self._done: Any = None  # event behind the last call, once there are several streams
        self._are_several = False

    def capturing(self) -> bool:
        """Tell whether the current stream is captured in a graph."""
        return self._device is not None and bool(torch.cuda.is_current_stream_capturing())

    def current(self) -> Any:
        """Return the current stream, for a call whose results are used on it."""
        if self._device is None:
            return None
        return self._follow(torch.cuda.current_stream(self._device))

    def side(self) -> Any:
        """Return our own stream, which waits for the current one, for a call that ends later."""
        if self._device is None:
            return None
        if self._side is None:
            self._side = torch.cuda.Stream(self._device, priority=-1)
        self._side.wait_stream(torch.cuda.current_stream(self._device))
        return self._follow(self._side)

    def again(self, stream: Any) -> Any:
        """Return the stream of an earlier call, for its second half."""
        return stream if stream is None else self._follow(stream)

    def done(self, stream: Any) -> None:
        """Note that a call was queued."""
        if self._are_several:
            self._done = None if _is_captured(stream) else stream.record_event()

    def _follow(self, stream: Any) -> Any:
        """Let ``stream`` wait for the last call, if that was on another one."""
        last, self._last = self._last, stream
        if last is None or last == stream:
            return stream
        self._are_several = True
        done, self._done = self._done, None
        if _is_captured(stream):
            # An event of before the capture cannot be waited for in it, and need not: capturing
            # begins when the device is idle.
            if _is_captured(last):
                stream.wait_stream(last)
        elif done is not None:
            stream.wait_event(done)
        elif not _is_captured(last):
            stream.wait_stream(last)
        return stream


def native(stream: Any) -> int | None:
    """Return the stream as the core takes it."""
    return None if stream is None else int(stream.cuda_stream)


def _is_captured(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return bool(torch.cuda.is_current_stream_capturing())
