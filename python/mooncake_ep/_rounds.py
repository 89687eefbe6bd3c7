"""What lives between the calls of a round: handles, results, and rounds that are in flight."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

from ._ffi import ffi
from ._lib import EpError, failure, lib

if TYPE_CHECKING:
    from ._calls import CombineCall, DispatchCall
    from .buffer import Buffer

_RECEIVE = lib.MEP_PHASE_RECEIVE
PEER_FAILED = lib.MEP_PEER_FAILED


class Handle:
    """What one dispatch remembers for its combines. Made by Buffer.dispatch().

    It may outlive any number of later rounds, and may be given to a later dispatch to be
    overwritten. Its memory goes back to the buffer when the last reference to it is gone.
    """

    __slots__ = ("__weakref__", "_buffer", "_c", "_in_flight", "_token_count")

    def __init__(self, buffer: Buffer, c_handle: Any) -> None:
        """Wrap a C handle of ``buffer``."""
        self._buffer = buffer
        self._c = c_handle
        self._in_flight = 0
        self._token_count = 0

    def __del__(self) -> None:
        """Let the next dispatch have the C handle, unless a round of it was never received."""
        if not self._in_flight:
            self._buffer._free_handles.append(self._c)


class Dispatched:
    """What a dispatch received, packed by expert (L local experts, R ranks, M max_tokens).

    Attributes:
        x: [L, R*M, H]; of expert e the first count[e] rows are valid: sources in rank order, tokens
            in their order.
        scales: float32 [L, R*M, H/128] if x is float8_e4m3fn, else None.
        count: int32 [L].
        src_info: int32 [L, R*M], the token index at its source of each valid row; or None.
        layout_range: int64 [L, R], begin << 32 | count of each source's rows; or None.
        handle: what Buffer.combine() needs.
    """

    __slots__ = ("count", "handle", "layout_range", "scales", "src_info", "x")

    def __init__(
        self,
        x: Any,
        scales: Any,
        count: Any,
        src_info: Any = None,
        layout_range: Any = None,
        handle: Handle | None = None,
    ) -> None:
        """Bundle arrays of the caller, to be given as ``out`` to Buffer.dispatch()."""
        self.x = x
        self.scales = scales
        self.count = count
        self.src_info = src_info
        self.layout_range = layout_range
        self.handle = handle


_Round = TypeVar("_Round", bound="_Pending")


class _Pending:
    """A round that was sent and not yet received; it keeps its arrays and C structs alive."""

    __slots__ = ("_arrays", "_call", "_finish", "_handle", "_result")

    def __init__(
        self,
        call: DispatchCall | CombineCall,
        handle: Handle,
        arrays: tuple[object, ...],
        result: Any,
        finish: Callable[[Any], Any] | None,
    ) -> None:
        handle._in_flight += 1
        self._call: Any = call
        self._handle = handle
        self._arrays = arrays
        self._result = result
        self._finish = finish

    def __del__(self) -> None:
        """Warn if the round was never received: it counts as in flight for ever."""
        if self._call is not None and not self._handle._buffer.closed:
            message = "a round was sent and never received"
            warnings.warn(message, ResourceWarning, stacklevel=2, source=self)

    def _receive(self, stream: int | None) -> Any:
        call, handle = self._call, self._handle
        if call is None:
            raise EpError("the round was received already")
        buffer, waits = handle._buffer, False
        if buffer._on_gpu or stream is not None:
            stream, waits = buffer._stream(self._arrays[0], stream)
            call.args.stream = ffi.cast("void *", stream)
        call.args.phases = _RECEIVE
        status = call.function(buffer._open(), handle._c, call.args)
        if status not in (0, PEER_FAILED):
            raise failure(status)
        self._call = None
        handle._in_flight -= 1
        call.free.append(call)
        if waits:
            buffer.counters()
        result, self._result, self._arrays = self._result, None, ()
        return received(result, self._finish, status)


class PendingDispatch(_Pending):
    """A dispatch that was sent and not yet received; dropped, it is in flight for ever."""

    __slots__ = ()

    def receive(self, stream: int | None = None) -> Dispatched:
        """Wait for the tokens and pack them. Once; from any thread, but see Group about threads.

        ``stream`` as for Buffer.dispatch(), and like it by default the current one of this thread.
        If the round was sent on another stream, let this one wait for that first (an event, or
        torch's wait_stream()), and keep the inputs until it is done. Errors: EpError (received
        already, buffer closed), PeerFailedError.
        """
        result: Dispatched = self._receive(stream)
        return result


class PendingCombine(_Pending):
    """A combine that was sent and not yet received; dropped, it is in flight for ever."""

    __slots__ = ()

    def receive(self, stream: int | None = None) -> Any:
        """Wait for the experts' outputs and return the sums, [T, H]. As for PendingDispatch."""
        return self._receive(stream)


def finish_dispatched(finish: Callable[[Any], Any], raw: Dispatched) -> Dispatched:
    """Turn the arrays that the library filled into those that the caller gets."""
    scales = None if raw.scales is None else finish(raw.scales)
    x, count, src_info = finish(raw.x), finish(raw.count), finish(raw.src_info)
    return Dispatched(x, scales, count, src_info, finish(raw.layout_range), raw.handle)


def sent(pending: _Round, status: int) -> _Round:
    """Return a round that was sent; as part of the exception if a peer failed meanwhile."""
    if status == 0:
        return pending
    error: Any = failure(status)
    error.result = pending
    raise error


def received(result: Any, finish: Callable[[Any], Any] | None, status: int) -> Any:
    """Return what was received; as part of the exception if a peer failed."""
    if status == 0:
        return result if finish is None else finish(result)
    error: Any = failure(status)  # first: it reads what the library said last
    error.result = result if finish is None else finish(result)
    raise error
