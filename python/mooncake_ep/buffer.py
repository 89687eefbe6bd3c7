"""Buffer: dispatch and combine.

A call costs a few microseconds beside the C call, so that everything is made once and kept: the C
structs of a call (taken from a free list, so that rounds in flight have their own), the
descriptions of outputs that we allocate ourselves (only their data pointers change), and the C
handles.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, overload

from ._arrays import Allocator, Framework, OutputPlan, framework_of
from ._calls import CombineCall, DispatchCall, c_combine, c_dispatch
from ._dlpack import borrow, dtype_key
from ._ffi import ffi
from ._health import (
    BufferCounters,
    Event,
    PeerCounters,
    read_counters,
    read_events,
    read_expert_rows,
    read_mask,
    read_peer,
    write_mask,
)
from ._lib import (
    EpError,
    check,
    choice,
    failure,
    int32,
    lib,
    listed,
    no_choice,
    shown,
    struct,
    timeout_us,
    truth_value,
    truth_values,
    wrong_type,
)
from ._rounds import (
    PEER_FAILED,
    Dispatched,
    Handle,
    PendingCombine,
    PendingDispatch,
    finish_dispatched,
    received,
    sent,
)
from ._streams import POINTER_BITS, native_stream, stream_finder
from .group import Group

_QUANTS = {None: lib.MEP_QUANT_NONE, "fp8": lib.MEP_QUANT_FP8, "fp8_pow2": lib.MEP_QUANT_FP8_POW2}
_PAYLOADS = {
    "bf16": lib.MEP_PAYLOAD_BF16,
    "fp16": lib.MEP_PAYLOAD_FP16,
    "fp32": lib.MEP_PAYLOAD_FP32,
    "fp8": lib.MEP_PAYLOAD_FP8,
}
_SCALE_LAYOUTS = ("column", "row")
_SEND = lib.MEP_PHASE_SEND
_FLOAT8 = dtype_key("float8_e4m3fn")
_BYTES = dtype_key("uint8")
_NULL = ffi.NULL


@dataclass(frozen=True)
class BufferSizes:
    """Bytes that a buffer takes: shared memory of one rank, and device memory of one handle."""

    window_bytes: int
    handle_bytes: int


class Buffer:
    """The memory that a rank shares with its peers for rounds of one shape.

    Use it as a context manager or call close().

    Attributes:
        group: the group it was made from.
        max_tokens, hidden, experts, topk, threads: as given, or the default.
        sms: multiprocessors of a GPU that a launch may fill; 0 on the CPU.
        local_experts: L = E/R experts of this rank.
        window_bytes: shared memory of this rank.
        handle_bytes: device memory of one handle.
    """

    def __init__(
        self,
        group: Group,
        *,
        max_tokens: int,
        hidden: int,
        experts: int,
        topk: int,
        payloads: Iterable[str] | None = None,
        rounds_in_flight: int = 2,
        fp32_partials: bool = False,
        threads: int = 0,
        max_sms: int = 0,
    ) -> None:
        """Allocate this rank's window and map the peers'. Collective, blocking.

        Args:
            group: the ranks.
            max_tokens: M, most tokens of one rank in one call.
            hidden: H, a multiple of 8 (with FP8: of 128).
            experts: E, a multiple of the number of ranks.
            topk: most K of a call, up to 32.
            payloads: what dispatch may carry, of "bf16", "fp16", "fp32" (also lets combine take
                float32) and "fp8"; None: bf16, and fp8 if H allows it.
            rounds_in_flight: most dispatches, and likewise combines, sent and not yet received, up
                to 8; memory grows with it.
            fp32_partials: combine's partial sums travel as float32 whatever the type.
            threads: of a CPU rank, this one included; 0: the library's choice.
            max_sms: multiprocessors of a GPU that a launch may fill, 3 or more; 0: all. What two
                buffers that work at the same time may fill has to fit on the GPU together.

        Raises:
            ValueError: an argument breaks a rule of mooncake_ep.h.
            MemoryError: no memory, or /dev/shm is full.
            EpTimeoutError: a rank did not call.
            EpError: the ranks' values differ, or the group is closed.
        """
        if not isinstance(group, Group):
            raise wrong_type(group, "group", "not a Group")
        config = _config(
            max_tokens,
            hidden,
            experts,
            topk,
            payloads,
            rounds_in_flight,
            fp32_partials,
            threads,
            max_sms,
        )
        buffer = ffi.new("mep_buffer_t **")
        group._check(lib.mep_buffer_create(group._open(), config, buffer))
        handles: list[Any] = []
        self._destroy = weakref.finalize(self, _destroy_buffer, buffer[0], handles)
        self._c = buffer[0]
        self._handles = handles
        self._free_handles: list[Any] = []
        self._event_cursor = ffi.new("uint64_t *")
        self._dispatch_calls: list[DispatchCall] = []
        self._combine_calls: list[CombineCall] = []
        self._plans: dict[tuple[Any, ...], OutputPlan] = {}
        self._allocators: dict[tuple[Any, ...], tuple[Framework, Allocator]] = {}
        info = struct("mep_buffer_info_t")
        check(lib.mep_buffer_query(self._c, info))
        self.group = group
        self._on_gpu = group.backend != "cpu"
        self.max_tokens: int = info.token_count_max
        self.hidden: int = info.hidden
        self.experts: int = info.expert_count
        self.local_experts: int = info.local_expert_count
        self.topk: int = info.topk_max
        self.window_bytes: int = info.window_bytes
        self.handle_bytes: int = info.handle_bytes
        self.threads: int = info.cpu_thread_count
        self.sms: int = info.sm_count

    @staticmethod
    def query_sizes(
        *,
        rank_count: int,
        max_tokens: int,
        hidden: int,
        experts: int,
        topk: int,
        payloads: Iterable[str] | None = None,
        rounds_in_flight: int = 2,
        fp32_partials: bool = False,
        threads: int = 0,
        max_sms: int = 0,
    ) -> BufferSizes:
        """Tell the memory that such a buffer would take on each rank; arguments as for Buffer."""
        config = _config(
            max_tokens,
            hidden,
            experts,
            topk,
            payloads,
            rounds_in_flight,
            fp32_partials,
            threads,
            max_sms,
        )
        sizes = struct("mep_buffer_sizes_t")
        check(lib.mep_buffer_query_sizes(config, int32(rank_count, "rank_count"), sizes))
        return BufferSizes(sizes.window_bytes, sizes.handle_bytes)

    @overload
    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any = None,
        *,
        quant: Literal["fp8", "fp8_pow2"] | None = None,
        scale_layout: Literal["column", "row"] = "column",
        out: Dispatched | None = None,
        handle: Handle | None = None,
        active_ranks: Any = None,
        timeout_s: float | None = None,
        stream: int | None = None,
        send_only: Literal[False] = False,
    ) -> Dispatched: ...

    @overload
    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any = None,
        *,
        quant: Literal["fp8", "fp8_pow2"] | None = None,
        scale_layout: Literal["column", "row"] = "column",
        out: Dispatched | None = None,
        handle: Handle | None = None,
        active_ranks: Any = None,
        timeout_s: float | None = None,
        stream: int | None = None,
        send_only: Literal[True],
    ) -> PendingDispatch: ...

    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any = None,
        *,
        quant: Literal["fp8", "fp8_pow2"] | None = None,
        scale_layout: Literal["column", "row"] = "column",
        out: Dispatched | None = None,
        handle: Handle | None = None,
        active_ranks: Any = None,
        timeout_s: float | None = None,
        stream: int | None = None,
        send_only: bool = False,
    ) -> Dispatched | PendingDispatch:
        """Send every token to the ranks of its experts, and pack what arrives.

        Collective. The type of x, quant and K must be the same on all ranks. Torch tensors that
        require grad may be inputs; no gradient flows through.

        On the CPU the call blocks. On a GPU the work is queued on ``stream``, and the call returns
        at once: arrays are ordered as in any other operation on that stream. All calls of a buffer
        have to be in the order of one stream, or of streams that wait for each other. Calls with
        ``out`` and ``handle`` may be captured in a CUDA graph; keep both as long as the graph.

        Args:
            x: [T, H] bfloat16, float16 or float32, T up to max_tokens (also 0; ranks may differ);
                or (x, scales): float8_e4m3fn (or uint8) [T, H] with float32 [T, H/128].
            topk_idx: int32 or int64 [T, K], global experts, -1 for none. An expert that a token
                names twice gets it once, and its weights add up.
            topk_weights: float32 [T, K], kept for combine.
            quant: cast x to float8_e4m3fn, with one scale per 128 channels of a token, or
                ("fp8_pow2") each scale rounded up to a power of two.
            scale_layout: of scales that are allocated here, in logical order [L, R*M, H/128]:
                "column" has stride 1 along the rows, "row" along the channels.
            out: arrays to fill, e.g. an earlier result; it is returned, with a new handle. None:
                new arrays of the framework of x, on its device. (CuPy has no float8_e4m3fn: x is
                then uint8. JAX: layout_range stays NumPy, and on a GPU is None, unless
                jax_enable_x64 is on; scales on a GPU are by "row"; out takes no JAX arrays, because
                they are immutable.)
            handle: one to overwrite; None: another than all that are still referred to.
            active_ranks: int32 [R or more], 1 = take part; a rank that misses the deadline becomes
                0. None: a mask that the buffer keeps.
            timeout_s: limit in seconds for this call; None: the group's.
            stream: native stream of a GPU as an integer, 0 for the legacy default stream; None:
                the current one of the framework of x, if that is torch or CuPy. With another than
                the current one, it is the caller who lets it wait for the inputs, keeps all arrays
                until it is done (torch: record_stream()), and lets readers wait for it. Of other
                frameworks, such as JAX, nobody can tell the stream: with None the call works on the
                legacy default stream, waits for the inputs, and returns when its work is done.
                None on the CPU.
            send_only: send and do not wait; the result is to be received later.

        Raises:
            TypeError: an argument is no array.
            ValueError: an argument breaks a rule of mooncake_ep.h; names it.
            EpError: too many rounds in flight, group or buffer closed.
            PeerFailedError: a rank missed the deadline (only without active_ranks; on a GPU, where
                the call has returned by then, active_ranks is how to know, and only where rows go
                by an engine a later call raises this).
        """
        c_buffer = self._open()
        call = self._dispatch_calls.pop() if self._dispatch_calls else DispatchCall(self)
        args = call.args
        x_scales = None
        if type(x) is tuple:
            if len(x) != 2:
                raise ValueError(f"x is a tuple of {len(x)}; it must be an array or (x, scales)")
            x, x_scales = x
        waits = False
        if self._on_gpu or stream is not None:
            stream, waits = self._stream(x, stream)
        inputs: tuple[object, ...] = (
            borrow("x", x, call.x, False, stream),
            borrow("topk_idx", topk_idx, call.topk_idx, False, stream),
            x_scales is None or borrow("x_scales", x_scales, call.x_scales, False, stream),
            topk_weights is None
            or borrow("topk_weights", topk_weights, call.topk_weights, False, stream),
            active_ranks is None
            or borrow("active_ranks", active_ranks, call.active_ranks, True, stream),
        )
        args.x_scales = _NULL if x_scales is None else call.x_scales.tensor
        args.topk_weights = _NULL if topk_weights is None else call.topk_weights.tensor
        args.active_ranks = _NULL if active_ranks is None else call.active_ranks.tensor
        try:
            args.quant = _QUANTS[quant]
        except Exception:  # what cannot be hashed is none of them either
            raise no_choice(quant, "quant", _QUANTS) from None
        self._set_common(args, timeout_s, stream, send_only)
        handle = self._new_handle() if handle is None else self._check_handle(handle)
        finish = None
        if out is None:
            key = (type(x), call.x.dtype, call.x.words[1], quant, scale_layout)
            try:
                plan = self._plans.get(key)
            except Exception:
                raise no_choice(scale_layout, "scale_layout", _SCALE_LAYOUTS) from None
            plan = plan or self._new_plan(key, x)
            out = call.allocate_outputs(plan)
            finish = plan.finish and partial(finish_dispatched, plan.finish)
        else:
            inputs += call.borrow_outputs(out, stream)
        status = c_dispatch(c_buffer, handle._c, args)
        if status not in (0, PEER_FAILED):
            raise failure(status) from self.group._cause()
        out.handle = handle
        handle._token_count = call.x.tensor.shape[0]
        if send_only:
            arrays = (x, inputs, x_scales, topk_idx, topk_weights, active_ranks)
            return sent(PendingDispatch(call, handle, arrays, out, finish), status)
        self._dispatch_calls.append(call)
        if waits:
            self.counters()
        dispatched: Dispatched = received(out, finish, status)
        return dispatched

    def combine(
        self,
        x: Any,
        handle: Handle | Dispatched,
        topk_weights: Any = None,
        *,
        out: Any = None,
        active_ranks: Any = None,
        timeout_s: float | None = None,
        stream: int | None = None,
        send_only: bool = False,
    ) -> Any:
        """Send the experts' outputs back and return their weighted sums, [T, H].

        Collective; on a GPU as dispatch() is. The same inputs always give the same bits, on every
        device. With ``send_only`` it returns a PendingCombine. The arguments that are not named
        here, and the errors, are those of dispatch().

        Args:
            x: [L, R*M, H] bfloat16, float16 or float32, the experts' outputs in the rows that
                dispatch filled; of the same type on all ranks.
            handle: of a received dispatch, any number of times.
            topk_weights: float32 [T, K]; None (on all ranks): those given to dispatch, else 1.
            out: [T, H] of the type of x; None: a new array of its framework. A token with no expert
                becomes 0.
            active_ranks: as for dispatch(); what a masked rank would contribute is left out.
            timeout_s: as for dispatch().
            stream: as for dispatch().
            send_only: send and do not wait; the result is a PendingCombine.
        """
        c_buffer = self._open()
        handle = self._check_handle(handle)
        call = self._combine_calls.pop() if self._combine_calls else CombineCall(self)
        args = call.args
        waits = False
        if self._on_gpu or stream is not None:
            stream, waits = self._stream(x, stream)
        inputs: tuple[object, ...] = (
            borrow("x", x, call.x, False, stream),
            topk_weights is None
            or borrow("topk_weights", topk_weights, call.topk_weights, False, stream),
            active_ranks is None
            or borrow("active_ranks", active_ranks, call.active_ranks, True, stream),
        )
        args.topk_weights = _NULL if topk_weights is None else call.topk_weights.tensor
        args.active_ranks = _NULL if active_ranks is None else call.active_ranks.tensor
        self._set_common(args, timeout_s, stream, send_only)
        finish = None
        if out is None:
            out, finish = self._new_sums(call, x, handle._token_count)
        else:
            inputs += (borrow("out", out, call.out, True, stream),)
        status = c_combine(c_buffer, handle._c, args)
        if status not in (0, PEER_FAILED):
            raise failure(status) from self.group._cause()
        if send_only:
            arrays = (x, inputs, topk_weights, active_ranks)
            return sent(PendingCombine(call, handle, arrays, out, finish), status)
        self._combine_calls.append(call)
        if waits:
            self.counters()
        return received(out, finish, status)

    def counters(self) -> BufferCounters:
        """Read what the buffer has counted since its creation."""
        return read_counters(self._open())

    def peer_counters(self, peer: int) -> PeerCounters:
        """Read what was counted of rank ``peer``, or of the own; does not wait for a GPU."""
        return read_peer(self._open(), peer)

    def expert_rows(self) -> list[int]:
        """Tell how many rows each local expert has received [L]; does not wait for a GPU."""
        return read_expert_rows(self._open(), self.local_experts)

    def events(self) -> list[Event]:
        """Tell which peers were masked since this was called last, and why.

        Of calls with ``active_ranks`` too. Does not wait for a GPU. The last 64 are kept.
        """
        return read_events(self._open(), self._event_cursor)

    @property
    def mask(self) -> list[bool]:
        """Who takes part in calls without ``active_ranks`` [R]; ranks that were late do not.

        May be set, which other ranks are not told; Group.update() brings all together.
        """
        return read_mask(self._open(), self.group.rank_count)

    @mask.setter
    def mask(self, active: Iterable[bool]) -> None:
        write_mask(self._open(), truth_values(active, "mask"))

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._destroy.alive

    def close(self) -> None:
        """Release this rank's memory and mappings, and all handles. Closing twice is harmless."""
        self._destroy()

    def __enter__(self) -> Buffer:
        """Return the buffer itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def _open(self) -> Any:
        """Return the ``mep_buffer_t *`` of an open buffer."""
        if not self._destroy.alive:
            raise EpError("the buffer is closed")
        return self._c

    def _set_common(
        self, args: Any, timeout_s: float | None, stream: int | None, send_only: bool
    ) -> None:
        """Set what the arguments of dispatch and combine have in common."""
        args.timeout_us = 0 if timeout_s is None else timeout_us(timeout_s)
        args.stream = _NULL if stream is None else ffi.cast("void *", stream)
        if send_only is False:  # as nearly always
            args.phases = 0
        else:
            args.phases = _SEND if truth_value(send_only, "send_only") else 0

    def _stream(self, x: object, stream: int | None) -> tuple[int, bool]:
        """Choose the stream of a call with ``x``, and whether the host has to wait for its work.

        It has to where nobody can tell the caller's stream, so that nobody can order the two.
        """
        if not self._on_gpu:
            raise ValueError(f"stream {shown(stream)} was given, but the CPU has no streams")
        if stream is not None:
            if type(stream) is not int or stream >> POINTER_BITS:
                stream = native_stream(stream)
            return stream, False
        finder = stream_finder(x)
        return (0, True) if finder is None else (finder(self.group.device_id), False)

    def _check_handle(self, handle: Any) -> Handle:
        """Return the handle itself, or that of a Dispatched, if it is one of this buffer."""
        if type(handle) is Dispatched:
            handle = handle.handle
        if type(handle) is not Handle:
            raise wrong_type(handle, "handle", "not a Handle or Dispatched")
        if handle._buffer is not self:
            raise ValueError("handle belongs to another buffer")
        return handle

    def _new_handle(self) -> Handle:
        if self._free_handles:
            return Handle(self, self._free_handles.pop())
        handle = ffi.new("mep_handle_t **")
        check(lib.mep_handle_create(self._c, handle))
        self._handles.append(handle[0])
        return Handle(self, handle[0])

    def _new_plan(self, key: tuple[Any, ...], x: object) -> OutputPlan:
        _, dtype, device, quant, scale_layout = key
        if scale_layout not in _SCALE_LAYOUTS:
            raise no_choice(scale_layout, "scale_layout", _SCALE_LAYOUTS)
        has_scales = quant is not None or dtype in (_FLOAT8, _BYTES)
        if quant is not None:
            dtype = _FLOAT8
        plan = OutputPlan(
            framework_of(x, device),
            (self.local_experts, self.group.rank_count, self.max_tokens, self.hidden),
            (dtype, device),
            scale_layout if has_scales else None,
        )
        self._plans[key] = plan
        return plan

    def _new_sums(
        self, call: CombineCall, x: object, token_count: int
    ) -> tuple[Any, Callable[[Any], Any] | None]:
        """Allocate combine's output like ``x`` and describe it in ``call.out``."""
        key = (type(x), call.x.dtype, call.x.words[1])
        known = self._allocators.get(key)
        if known is None:
            framework = framework_of(x, key[2])
            allocate = framework.allocator(key[1])
            assert allocate is not None  # only of int64 there may be none
            known = self._allocators[key] = (framework, allocate)
        framework, allocate = known
        shape, strides = (token_count, self.hidden), (self.hidden, 1)
        sums = allocate(shape, strides)
        call.out.describe(call.x.dtype, shape, strides, call.x.words[1])
        call.out.words[0] = framework.address(sums)
        return sums, framework.finish


def _config(
    max_tokens: int,
    hidden: int,
    experts: int,
    topk: int,
    payloads: Iterable[str] | None,
    rounds_in_flight: int,
    fp32_partials: bool,
    threads: int,
    max_sms: int,
) -> Any:
    bits = 0
    for payload in () if payloads is None else listed(payloads, "payloads", "names"):
        bits |= choice(payload, "payload", _PAYLOADS)
    return struct(
        "mep_buffer_config_t",
        token_count_max=int32(max_tokens, "max_tokens"),
        hidden=int32(hidden, "hidden"),
        expert_count=int32(experts, "experts"),
        topk_max=int32(topk, "topk"),
        payload_types=bits,
        rounds_in_flight_max=int32(rounds_in_flight, "rounds_in_flight"),
        fp32_partials=truth_value(fp32_partials, "fp32_partials"),
        cpu_thread_count=int32(threads, "threads"),
        sm_count_max=int32(max_sms, "max_sms"),
    )


def _destroy_buffer(c_buffer: Any, c_handles: list[Any]) -> None:
    for c_handle in c_handles:
        lib.mep_handle_destroy(c_handle)
    lib.mep_buffer_destroy(c_buffer)
