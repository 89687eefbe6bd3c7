"""The Buffer of Mooncake EP, over this library.

    from mooncake_ep.compat.mooncake import Buffer

takes the place of ``from mooncake.mooncake_ep_buffer import Buffer``, for torch tensors on NVIDIA
and MetaX GPUs and on the CPU. What it does otherwise, on purpose, is in docs/compat_mooncake.md.

Symbols: R ranks, E experts, L = E/R on each rank, T tokens of this rank, M at most, H hidden, K
top-k.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as distributed

from .._lib import rdma_info
from . import _checks as check
from ._core import Hook, Mode, Shape, Terms, topk_capacity
from ._events import EventHandle, EventOverlap
from ._exchange import Exchange
from ._meeting import Meeting, gpu_backend

__all__ = ["Buffer", "EventHandle", "EventOverlap"]

_USUAL_TOPK = 8


class Runtime:
    """How a Buffer's rows travel; what clients ask of ``buffer.runtime``."""

    def __init__(self, exchange: Exchange) -> None:
        """Tell of an exchange."""
        self._exchange = exchange

    def ibgda_disabled(self) -> bool:
        """Tell whether rows do not go by GPU-initiated RDMA."""
        return not rdma_info().available

    def p2p_enabled(self) -> bool:
        """Tell whether the memory of peers may be used: that no rank has given disable_p2p."""
        return not self._exchange.disable_p2p

    def use_fast_path(self) -> bool:
        """Tell whether no rows go by the fallback: all ranks reach each other's memory."""
        return not self._exchange.by_engine()


class Buffer:
    """Dispatch and combine among the ranks of a process group.

    Calls on one Buffer may come from several threads, one at a time runs. Two dispatches, and two
    combines, may be sent whose hooks have not run (two batches that overlap), and hooks may run in
    another order. Memory goes with the Buffer and the handles that it gave, or by destroy().

    Attributes:
        runtime: a Runtime.
        rank, group_size: this rank and R, of ``group``.
        group, backend: the process group as given; of None, the default one of torch.
        num_ep_buffer_bytes: as given.
    """

    def __init__(
        self, group: Any = None, num_ep_buffer_bytes: int = 0, disable_p2p: bool = False
    ) -> None:
        """Come together. Collective, blocking.

        The core's buffers are made by the first dispatch of a shape (M, H, E), which is collective
        too; a K that is much larger than the first one makes another.

        Args:
            group: any process group of torch.distributed (nccl, gloo, mpi, mccl, mooncake,
                mooncake-cpu); None: the default one. It has to work while a Buffer is made or
                updated; otherwise ranks make out by TCP what they make together
                (MOONCAKE_EP_TCP_ADDRESS), so that a lost one is no error. Tensors are on the
                current GPU, or, where this library or torch has none, on the CPU; otherwise the
                first dispatch says where.
            num_ep_buffer_bytes: a hint that is not needed; memory follows the shapes.
            disable_p2p: reach no peer's memory; rows go by NCCL, MCCL or TCP. If any rank gives it,
                it holds for all.

        Raises:
            TypeError, ValueError: an argument is wrong, or this process is not in the group.
            NotImplementedError: the group is one of GPUs, and this library has no backend for them.
            EpError: the ranks disagree, or one was lost.
        """
        self.num_ep_buffer_bytes = check.integer("num_ep_buffer_bytes", num_ep_buffer_bytes, 0)
        if not isinstance(disable_p2p, bool):
            raise TypeError(f"disable_p2p is a {type(disable_p2p).__name__}, not a bool")
        self._exchange = Exchange(lambda: Meeting(group), disable_p2p)
        self.group = distributed.group.WORLD if group is None else group
        self.backend = self.group
        self.runtime = Runtime(self._exchange)
        self._fallback: bool | None = None  # as a client has set it

    @property
    def rank(self) -> int:
        """This rank, of the process group."""
        return self._exchange.rank

    @property
    def group_size(self) -> int:
        """Number of ranks R."""
        return self._exchange.size

    @property
    def _use_fallback(self) -> bool:
        """Whether rows go by the fallback; may be set, alike on all ranks.

        True: dispatches from now on reach no peer's memory, and their combines neither; memory for
        that is made by the first one of a shape. False: as the constructor found, so that where
        there is only the fallback (disable_p2p) it stays.
        """
        if self._fallback is None:
            return not self.runtime.use_fast_path()
        return self._fallback

    @_use_fallback.setter
    def _use_fallback(self, value: bool) -> None:
        self._fallback = bool(value)

    @staticmethod
    def get_ep_buffer_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Return the bytes of shared memory that a rank takes for such rounds, of up to 8 experts.

        ValueError if the core takes no such shape.
        """
        tokens = check.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        ranks = check.integer("num_ranks", num_ranks)
        experts = check.experts("num_experts", num_experts, ranks)
        topk = topk_capacity(tokens, _USUAL_TOPK)
        shape = Shape(tokens, check.integer("hidden", hidden), experts, topk)
        return shape.window_bytes(ranks)

    def connect(self, is_update: bool = False) -> None:
        """Come together anew; the constructor has done it once. Collective.

        ``is_update`` makes no difference: what is to be done follows from what each rank has.
        """
        self._exchange.connect()

    def update_ep_member(self) -> None:
        """Come together with ranks that have taken the place of lost ones. Collective.

        All ranks of the process group call it, but the new ones, which make their Buffer instead;
        the group's collectives have to work among them. Core buffers stay, and with them what was
        captured in graphs; handles of before hold no dispatch any more. If the group has another
        number of ranks than before, everything is made anew, and graphs have to be captured again.

        Raises:
            EpError: a round was sent and its hook has not run; ranks have made other buffers.
        """
        self._exchange.connect()

    def dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        active_ranks: torch.Tensor | None,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        timeout_us: int,
        use_fp8: bool | None = None,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, tuple[Any, ...], EventOverlap, Hook | None]:
        """Send every token to the ranks of its experts, and pack by expert what arrives.

        Collective; M, H, E, K and use_fp8 are the same on all ranks. On the CPU it blocks. On a GPU
        it is queued on the current stream; with async_finish on another one, which the event is
        for; with return_recv_hook the waiting is left to the hook, on the stream that is current
        now.

        Args:
            x: bfloat16 [T, H], T from 0 to M; H a multiple of 8, with use_fp8 of 128. Unchanged
                until the dispatch is done.
            topk_idx: int64 (or int32) [T, K], K from 1 to 32; -1 is no expert. Another value that
                is none is an error on the CPU; on a GPU it counts as -1.
            active_ranks: int32 [R or more], on the device of x. 1: take part; a rank that is not
                there in time becomes 0. None: a mask that the Buffer keeps. Who is not there when
                memory is made stays masked in rounds of that shape until update_ep_member().
            num_max_dispatch_tokens_per_rank: M.
            num_experts: E, a multiple of R.
            timeout_us: for each wait, in microseconds; -1: never.
            use_fp8: cast to float8_e4m3fn on the way, with a scale for each 128 channels of a
                token. None: True on NVIDIA GPUs, False on MetaX GPUs and the CPU.
            async_finish: let the caller's stream go on.
            return_recv_hook: return once it is sent.

        Returns:
            recv_x: bfloat16 [L, R*M, H], or (float8_e4m3fn [L, R*M, H], scales float32
                [L, R*M, H/128] with stride 1 along the rows). Of expert e the first recv_count[e]
                rows are valid, in the order of source ranks and of their tokens.
            recv_count: int32 [L].
            handle: (src_info int32 [L, R*M], layout_range int64 [L, R] of begin << 32 | count, M,
                H, E), for combine(). It may be taken apart and put together; it is src_info that
                combine() looks for.
            event: an EventOverlap.
            hook: to be called once, from any thread, or None without return_recv_hook.

        Raises:
            TypeError, ValueError: an argument breaks a rule; names it. Nothing was sent.
            EpError: a round before the last one has not been received, or destroy() was called;
                when memory is made, also: ranks have called with different M, H, E, K or use_fp8,
                or one was lost and they do not reach each other by TCP.
            RuntimeError: in a graph capture, and such a round was never dispatched before.
        """
        tokens = check.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        rank_count = self._exchange.size
        experts = check.experts("num_experts", num_experts, rank_count)
        mode = Mode.of(async_finish, return_recv_hook)
        quantized = use_fp8
        if quantized is None:
            on_gpu = isinstance(x, torch.Tensor) and x.device.type != "cpu"
            quantized = on_gpu and gpu_backend() == "cuda"
        rows, hidden = check.tokens(x, tokens, bool(quantized))
        device = x.device
        topk = check.choices(topk_idx, rows, device, experts)
        check.active_ranks(active_ranks, rank_count, device)
        terms = Terms(active_ranks, check.timeout_s(timeout_us), mode)
        wanted = (tokens, hidden, experts, topk)
        quant = "fp8" if quantized else None
        core = self._exchange.core(device, wanted, quant, terms, self._fallback is True)
        given, event, hook = core.dispatch(x, topk_idx, quant, terms)
        handle = (given.src_info, given.layout_range, tokens, hidden, experts)
        recv_x = given.x if given.scales is None else (given.x, given.scales)
        return recv_x, given.count, handle, event, hook

    def combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        active_ranks: torch.Tensor | None,
        timeout_us: int,
        handle: tuple[Any, ...],
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Send the experts' outputs back and sum them with the weights. Collective.

        Streams, ``active_ranks``, ``timeout_us``, ``async_finish``, ``return_recv_hook`` and errors
        are as for dispatch(). A rank that is masked contributes nothing.

        Args:
            x: bfloat16 [L, R*M, H], the experts' outputs in the rows that dispatch filled.
                Unchanged until the combine is done.
            topk_idx: [T, K], as given to dispatch, which is what counts.
            topk_weights: float32 [T, K].
            active_ranks: as for dispatch().
            timeout_us: as for dispatch().
            handle: of a dispatch of this Buffer whose hook has run; any number of times.
            zero_copy: take the outputs from what get_next_combine_buffer(handle) gave, not from x.
                Either way they are read where they are.
            async_finish: as for dispatch().
            return_recv_hook: as for dispatch().
            out: bfloat16 [T, H] to fill; None: a new tensor.

        Returns:
            combined_x: bfloat16 [T, H]; a token with no expert is 0.
            event, hook: as for dispatch().
        """
        mode = Mode.of(async_finish, return_recv_hook)
        route = self._exchange.route(handle)
        self._exchange.weights(route, topk_idx, topk_weights, out)
        check.active_ranks(active_ranks, self._exchange.size, route.core.device)
        x = self._exchange.outputs(route, x, zero_copy)
        terms = Terms(active_ranks, check.timeout_s(timeout_us), mode)
        return route.core.combine(x, route, topk_weights, out, terms)

    def get_next_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """Return memory for the experts' outputs of a dispatch, bfloat16 [L, R*M, H].

        New memory with each call, not cleared; combine(..., zero_copy=True) takes that of the last
        call. It is no other than the caller's own memory: combine() copies neither.
        """
        buffer: torch.Tensor = self._exchange.route(handle).take_combine_buffer()
        return buffer

    def destroy(self) -> None:
        """Let all memory go, now. Local, and harmless if done twice or never."""
        self._exchange.close()
