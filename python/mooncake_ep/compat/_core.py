"""One core buffer behind the calls of another library's API: streams, hooks, handles, graphs."""

from __future__ import annotations

import enum
import logging
import threading
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._lib import PeerFailedError, lib
from .._rounds import Dispatched, Handle
from ..buffer import Buffer
from ..group import Group
from ._events import EventHandle, EventOverlap
from ._streams import Streams, native

_log = logging.getLogger("mooncake_ep.compat")

# Top-k for which core buffers are made. Up to a step the messages of small buffers take no more
# lines; 28 is the most that such a message can hold.
_TOPK_STEPS = (8, 16, 24, 28, lib.MEP_TOPK_MAX)
_SMALL_CHOICES_MAX = 4096  # tokens times top-k of a buffer whose messages go by line
_GRAPH_HANDLES = 8  # dispatches captured in graphs whose combines are not captured yet


class Mode(enum.Enum):
    """When a call is done: on the current stream; on a stream of ours; or when the hook ran."""

    NOW = 0
    LATER = 1
    HOOK = 2

    @classmethod
    def of(cls, async_finish: bool, return_recv_hook: bool) -> Mode:
        """Choose by the arguments that clients give."""
        if async_finish and return_recv_hook:
            raise ValueError("async_finish and return_recv_hook are both True; only one can be")
        if return_recv_hook:
            return cls.HOOK
        return cls.LATER if async_finish else cls.NOW


@dataclass(frozen=True)
class Shape:
    """What a core buffer is made for."""

    max_tokens: int
    hidden: int
    experts: int
    topk: int

    def serves(self, max_tokens: int, hidden: int, experts: int, topk: int) -> bool:
        """Tell whether rounds of a shape find their core buffer in one of this."""
        return (
            self.max_tokens == max_tokens
            and self.hidden == hidden
            and self.experts == experts
            and self.topk >= topk
        )

    def payloads(self) -> list[str]:
        """Name what dispatch may carry: FP8 too where it can, which takes no more memory."""
        return ["bf16"] if self.hidden % lib.MEP_SCALE_GROUP else ["bf16", "fp8"]

    def window_bytes(self, rank_count: int) -> int:
        """Tell how much memory of a rank its peers reach."""
        sizes = Buffer.query_sizes(rank_count=rank_count, payloads=self.payloads(), **asdict(self))
        return sizes.window_bytes


@dataclass(slots=True)
class After:
    """What follows a round on its stream, once it is received, and the tensors that it uses."""

    run: Callable[[], None]
    tensors: tuple[Any, ...]


@dataclass(slots=True)
class Terms:
    """How a call deals with time: whom it waits for, how long, and when it is done."""

    active_ranks: Any
    timeout_s: float | None
    mode: Mode


# From what a dispatch gave (arrays that may not be filled yet) to what follows it.
Then = Callable[[Dispatched], After]


def topk_capacity(max_tokens: int, topk: int) -> int:
    """Return for which top-k to make a buffer, so that another one may find it again."""
    capacity = next(step for step in _TOPK_STEPS if topk <= step)
    grows = max_tokens * topk <= _SMALL_CHOICES_MAX < max_tokens * capacity
    return topk if grows else capacity


class Route:
    """What one dispatch remembers for its combines. It lives as long as the dispatch's src_info."""

    __slots__ = ("captured", "combine_buffer", "core", "handle", "shape")

    def __init__(self, core: Core, handle: Handle | None, shape: tuple[int, int]) -> None:
        """Note the shape [T, K] of the choices; ``handle``: of a pool for graphs, or None."""
        self.core = core
        self.captured = handle is not None
        self.handle: Any = handle
        self.shape = shape
        self.combine_buffer: Any = None

    def __del__(self) -> None:
        """Give a handle for graphs back."""
        if self.captured:
            self.core.graph_handles.append(self.handle)

    def take_combine_buffer(self) -> Any:
        """Return new memory for the experts' outputs, [L, R*M, H] bfloat16."""
        shape = self.core.outputs_shape
        self.combine_buffer = torch.empty(shape, dtype=torch.bfloat16, device=self.core.device)
        return self.combine_buffer


@dataclass(slots=True)
class Sent:
    """A round that was sent: to be received on its stream; what it needs lives until then."""

    pending: Any
    stream: Any
    route: Route
    after: After | None


class Hook:
    """Receives a round that was sent: on the stream on which it was, from any thread, once.

    Calling it again does nothing. If it is dropped and was never called, the buffer's next call
    receives the round: it would be in flight for ever, and after it no other could be sent.
    """

    __slots__ = ("__weakref__", "_core", "_sent")

    def __init__(self, core: Core, sent: Sent) -> None:
        """Take a round."""
        self._core = core
        self._sent: Sent | None = sent

    def __call__(self) -> None:
        """Wait for the peers and fill what the call has returned."""
        with self._core.lock:
            if self._sent is not None:
                self._core.receive(self._sent)
                self._sent = None

    def __del__(self) -> None:
        """Leave the round to the next call; from here nothing may wait."""
        if self._sent is not None:
            self._core.dropped.append(self._sent)


class Core:
    """A core buffer, and the order of its calls, which may come from several threads."""

    def __init__(self, group: Group, shape: Shape, device: torch.device, is_far: bool) -> None:
        """Make it. Collective. ``is_far``: the group reaches no peer's memory."""
        self.shape = shape
        self.is_far = is_far
        self.device = device
        self.buffer = Buffer(group, payloads=shape.payloads(), **asdict(shape))
        self.streams = Streams(device)
        self.lock = threading.Lock()
        self.dropped: list[Sent] = []
        rows = group.rank_count * self.buffer.max_tokens
        self.outputs_shape = (self.buffer.local_experts, rows, self.buffer.hidden)  # [L, R*M, H]
        self.waited_s = [0.0] * group.rank_count  # for each rank, as far as clients were told
        # No memory can be allocated in a capture; and those that a graph uses are overwritten
        # whenever it runs, so that others must not have them.
        count = 0 if device.type == "cpu" else _GRAPH_HANDLES
        self.graph_handles = [self.buffer._new_handle() for _ in range(count)]

    def dispatch(
        self, x: Any, topk_idx: Any, quant: Any, terms: Terms, then: Then | None = None
    ) -> tuple[Dispatched, EventOverlap, Hook | None]:
        """Dispatch; the result's src_info keeps the Route. ``then`` says what follows."""
        with self.lock:
            self.receive_dropped()
            route = Route(self, self._handle_for_graph(), topk_idx.shape)
            stream = self._stream(terms.mode)
            send_only: Any = terms.mode is Mode.HOOK
            try:
                result = self.buffer.dispatch(
                    x,
                    topk_idx,
                    quant=quant,
                    handle=route.handle,
                    active_ranks=terms.active_ranks,
                    timeout_s=terms.timeout_s,
                    stream=native(stream),
                    send_only=send_only,
                )
            except PeerFailedError as error:
                result = _without_peer(error)
            given: Dispatched = result._result if send_only else result
            route.handle = given.handle
            # So any tuple that has this tensor in it finds the way back, and memory is free once
            # the tensor is.
            given.src_info._mooncake_ep_route = route
            outputs = (given.x, given.scales, given.count, given.src_info, given.layout_range)
            after = None if then is None else then(given)
            event, hook = self._finish(
                terms, Sent(result, stream, route, after), (x, topk_idx, *outputs)
            )
            return given, event, hook

    def combine(
        self,
        x: Any,
        route: Route,
        topk_weights: Any,
        out: Any,
        terms: Terms,
        after: After | None = None,
    ) -> tuple[Any, EventOverlap, Hook | None]:
        """Combine."""
        with self.lock:
            self.receive_dropped()
            stream = self._stream(terms.mode)
            send_only = terms.mode is Mode.HOOK
            try:
                result = self.buffer.combine(
                    x,
                    route.handle,
                    topk_weights,
                    out=out,
                    active_ranks=terms.active_ranks,
                    timeout_s=terms.timeout_s,
                    stream=native(stream),
                    send_only=send_only,
                )
            except PeerFailedError as error:
                result = _without_peer(error)
            sums = result._result if send_only else result
            event, hook = self._finish(
                terms, Sent(result, stream, route, after), (x, topk_weights, sums)
            )
            return sums, event, hook

    def receive(self, sent: Sent) -> None:
        """Receive a round that was sent. With the lock held."""
        stream = self.streams.again(sent.stream)
        try:
            sent.pending.receive(native(stream))
        except PeerFailedError as error:
            _without_peer(error)
        self._follow(stream, sent.after)
        self.streams.done(stream)

    def receive_dropped(self) -> None:
        """Receive the rounds whose hooks nobody can call any more. With the lock held."""
        while self.dropped:
            self.receive(self.dropped.pop(0))

    def _handle_for_graph(self) -> Handle | None:
        if not self.streams.capturing():
            return None
        if not self.graph_handles:
            raise RuntimeError(
                f"a graph is captured, and {_GRAPH_HANDLES} dispatches of this Buffer are in "
                "graphs already whose handles still exist: combine and drop some first"
            )
        return self.graph_handles.pop()

    def _stream(self, mode: Mode) -> Any:
        return self.streams.side() if mode is Mode.LATER else self.streams.current()

    def _finish(
        self, terms: Terms, sent: Sent, used: tuple[Any, ...]
    ) -> tuple[EventOverlap, Hook | None]:
        """Make what the caller waits with."""
        stream, after = sent.stream, sent.after
        if terms.mode is Mode.HOOK:
            self.streams.done(stream)
            return EventOverlap(), Hook(self, sent)
        self._follow(stream, after)
        self.streams.done(stream)
        if terms.mode is Mode.NOW or stream is None:
            return EventOverlap(), None
        for tensor in (*used, terms.active_ranks, *(() if after is None else after.tensors)):
            if tensor is not None:
                tensor.record_stream(stream)  # it came from the memory of another one
        return EventOverlap(EventHandle(stream)), None

    def _follow(self, stream: Any, after: After | None) -> None:
        """Do what follows a round, on its stream."""
        if after is not None:
            with self.streams.on(stream):
                after.run()


def _without_peer(error: PeerFailedError) -> Any:
    """Return what a call has given; a lost rank is no error in these APIs, which have a mask."""
    _log.warning("%s", error)
    if error.result is None:
        raise error
    return error.result
