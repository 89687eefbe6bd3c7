"""The Buffer of DeepEP, in low-latency mode, over this library.

    from mooncake_ep.compat.deep_ep import Buffer

takes the place of ``from deep_ep import Buffer`` where low_latency_dispatch() and
low_latency_combine() are used, for torch tensors on NVIDIA and MetaX GPUs and on the CPU. What it
does otherwise, on purpose, is in docs/compat_deep_ep.md.

Symbols: R ranks, E experts, L = E/R on each rank, T tokens of this rank, M at most, H hidden, K
top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as distributed

from .._rounds import Dispatched
from . import _checks as check
from ._core import After, Core, Hook, Mode, Shape, Terms, Then, topk_capacity
from ._events import EventHandle, EventOverlap
from ._exchange import Exchange
from ._meeting import Meeting, MpiMeeting
from ._normal_mode import Config, NormalMode, refuse_constructor

__all__ = ["Buffer", "Config", "EventHandle", "EventOverlap", "topk_idx_t"]

topk_idx_t = torch.int64

_USUAL_TOPK = 8
_PACK = 4  # scales of one int32
_CHANNELS_OF_PACK = 512
_EXPONENT_BIT = 23
_EXPONENT_MASK = 0xFF


class Buffer(NormalMode):
    """Dispatch and combine in low-latency mode among the ranks of a process group.

    Calls on one Buffer may come from several threads, one at a time runs. Two dispatches, and two
    combines, may be sent whose hooks have not run, and hooks may run in another order.

    Attributes:
        rank, group_size: this rank and R, of ``group`` or ``comm``.
        group: the process group (or the communicator) as given; of None, torch's default group.
        num_nvl_bytes, num_rdma_bytes, low_latency_mode, explicitly_destroy, enable_shrink: as
            given.
        num_sms: what set_num_sms() was given last; 20 at first.
    """

    def __init__(
        self,
        group: Any = None,
        num_nvl_bytes: int = 0,
        num_rdma_bytes: int = 0,
        low_latency_mode: bool = False,
        num_qps_per_rank: int = 24,
        allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False,
        use_fabric: bool = False,
        explicitly_destroy: bool = False,
        enable_shrink: bool = False,
        comm: Any = None,
    ) -> None:
        """Come together. Collective, blocking.

        Memory is made by the first dispatch of a shape (M, H, E), which is collective too.

        Args:
            group: any process group of torch.distributed; None: the default one. Tensors are on the
                current GPU, or, where this library or torch has none, on the CPU; otherwise the
                first dispatch says where.
            num_nvl_bytes: not needed; memory follows the shapes.
            num_rdma_bytes: not needed.
            low_latency_mode: has to be True: there is no normal mode.
            num_qps_per_rank: has no meaning here.
            allow_nvlink_for_low_latency_mode: False: reach no peer's memory; rows go by NCCL, MCCL
                or TCP. If any rank gives False, it holds for all.
            allow_mnnvl: has no meaning here.
            use_fabric: has no meaning here.
            explicitly_destroy: destroy() may be called in any case.
            enable_shrink: masks work in any case.
            comm: an mpi4py communicator, instead of ``group``.

        Raises:
            TypeError, ValueError: an argument is wrong, or this process is not in the group.
            NotImplementedError: low_latency_mode is False; the group is one of GPUs, and this
                library has no backend for them.
            EpError: the ranks disagree, or one was lost.
        """
        if group is not None and comm is not None:
            raise ValueError("group and comm are both given; only one can be")
        if not low_latency_mode:
            refuse_constructor()
        self.num_nvl_bytes = check.integer("num_nvl_bytes", num_nvl_bytes, 0)
        self.num_rdma_bytes = check.integer("num_rdma_bytes", num_rdma_bytes, 0)
        self.low_latency_mode = True
        self.explicitly_destroy = explicitly_destroy
        self.enable_shrink = enable_shrink

        def meet() -> Meeting:
            return Meeting(group) if comm is None else MpiMeeting(comm)

        self._exchange = Exchange(meet, not allow_nvlink_for_low_latency_mode)
        if comm is not None:
            self.group = comm
        else:
            self.group = distributed.group.WORLD if group is None else group
        self._active: Any = None  # int32 [R] where the tensors are: 1 = active

    @property
    def rank(self) -> int:
        """This rank."""
        return self._exchange.rank

    @property
    def group_size(self) -> int:
        """Number of ranks R."""
        return self._exchange.size

    @property
    def timeout_s(self) -> float:
        """How long a rank is waited for until it is masked, in seconds; math.inf: never.

        Not of DeepEP. May be set at any time, from any thread; graphs that were captured follow.
        """
        return self._exchange.open_group().timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        self._exchange.set_timeout(value)

    @staticmethod
    def capture() -> EventOverlap:
        """Record an event on the current stream."""
        return EventOverlap(EventHandle())

    @staticmethod
    def get_low_latency_rdma_size_hint(
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

    def low_latency_dispatch(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        num_max_dispatch_tokens_per_rank: int,
        num_experts: int,
        cumulative_local_expert_recv_stats: torch.Tensor | None = None,
        dispatch_wait_recv_cost_stats: torch.Tensor | None = None,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, torch.Tensor, tuple[Any, ...], EventOverlap, Hook | None]:
        """Send every token to the ranks of its experts, and pack by expert what arrives.

        Collective; M, H, E, K and the type are the same on all ranks. On the CPU it blocks. On a
        GPU it is queued on the current stream; with async_finish on another one, which the event is
        for; with return_recv_hook the waiting is left to the hook, on the stream that is current
        now.

        Args:
            x: bfloat16 [T, H], T from 0 to M; H a multiple of 8, with use_fp8 of 128, with
                use_ue8m0 of 512. Unchanged until the dispatch is done.
            topk_idx: int64 (or int32) [T, K], K from 1 to 32; -1 is no expert. Another value that
                is none is an error on the CPU; on a GPU it counts as -1.
            num_max_dispatch_tokens_per_rank: M.
            num_experts: E, a multiple of R.
            cumulative_local_expert_recv_stats: int32 [L], to which the rows received by each local
                expert are added.
            dispatch_wait_recv_cost_stats: int64 [R], to which the microseconds are added that were
                waited for each rank, and were not told before.
            use_fp8: cast to float8_e4m3fn on the way, with a scale for each 128 channels of a
                token.
            round_scale: round scales up to powers of two. Ignored without use_fp8.
            use_ue8m0: pack the exponents of four such scales into an int32. Ignored likewise.
            async_finish: let the caller's stream go on.
            return_recv_hook: return once it is sent.

        Returns:
            recv_x: bfloat16 [L, R*M, H], or (float8_e4m3fn [L, R*M, H], scales float32
                [L, R*M, H/128] or int32 [L, R*M, H/512], with stride 1 along the rows). Of expert e
                the first recv_count[e] rows are valid, in the order of source ranks and of their
                tokens.
            recv_count: int32 [L].
            handle: (src_info int32 [L, R*M], layout_range int64 [L, R] of begin << 32 | count, M,
                H, E), for low_latency_combine().
            event: an EventOverlap.
            hook: to be called once, from any thread, or None without return_recv_hook.

        Raises:
            TypeError, ValueError: an argument breaks a rule; names it. Nothing was sent.
            EpError: a round before the last one has not been received, or destroy() was called;
                when memory is made, also: ranks have called with different M, H, E, K or types.
            RuntimeError: in a graph capture, and such a round was never dispatched before.
        """
        tokens = check.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        experts = check.experts("num_experts", num_experts, self.group_size)
        mode = Mode.of(async_finish, return_recv_hook)
        use_ue8m0 = use_fp8 and use_ue8m0  # clients that send bfloat16 give it all the same
        if use_ue8m0 and not round_scale:
            raise ValueError("use_ue8m0 is True, and round_scale, which it needs, is not")
        rows, hidden = check.tokens(x, tokens, use_fp8)
        if use_ue8m0 and hidden % _CHANNELS_OF_PACK:
            rule = f"is not a multiple of {_CHANNELS_OF_PACK} with use_ue8m0"
            raise ValueError(f"x: hidden {hidden} {rule}")
        topk = check.choices(topk_idx, rows, x.device, experts)
        stats = cumulative_local_expert_recv_stats
        local = (experts // self.group_size,)
        _check_stats("cumulative_local_expert_recv_stats", stats, torch.int32, local, x)
        cost = dispatch_wait_recv_cost_stats
        _check_stats("dispatch_wait_recv_cost_stats", cost, torch.int64, (self.group_size,), x)
        wanted = (tokens, hidden, experts, topk)
        quant = None if not use_fp8 else "fp8_pow2" if round_scale else "fp8"
        core = self._exchange.core(x.device, wanted, quant, self._terms(mode), False)
        packed = _Packed(core) if use_ue8m0 else None
        given, event, hook = core.dispatch(
            x, topk_idx, quant, self._terms(mode), self._then(core, stats, cost, packed)
        )
        handle = (given.src_info, given.layout_range, tokens, hidden, experts)
        scales = given.scales if packed is None else packed.scales
        recv_x = given.x if scales is None else (given.x, scales)
        return recv_x, given.count, handle, event, hook

    def low_latency_combine(
        self,
        x: torch.Tensor,
        topk_idx: torch.Tensor,
        topk_weights: torch.Tensor,
        handle: tuple[Any, ...],
        use_logfmt: bool = False,
        zero_copy: bool = False,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        out: torch.Tensor | None = None,
        combine_wait_recv_cost_stats: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, EventOverlap, Hook | None]:
        """Send the experts' outputs back and sum them with the weights. Collective.

        Streams, ``async_finish``, ``return_recv_hook`` and errors are as for
        low_latency_dispatch(). A rank that is masked contributes nothing.

        Args:
            x: bfloat16 [L, R*M, H], the experts' outputs in the rows that dispatch filled.
                Unchanged until the combine is done.
            topk_idx: [T, K], as given to dispatch, which is what counts.
            topk_weights: float32 [T, K].
            handle: of a dispatch of this Buffer whose hook has run; any number of times.
            use_logfmt: changes nothing: rows travel as bfloat16, which loses less.
            zero_copy: take the outputs from what get_next_low_latency_combine_buffer(handle) gave,
                not from x. Either way they are read where they are.
            async_finish: as for low_latency_dispatch().
            return_recv_hook: as for low_latency_dispatch().
            out: bfloat16 [T, H] to fill; None: a new tensor.
            combine_wait_recv_cost_stats: as dispatch_wait_recv_cost_stats.

        Returns:
            combined_x: bfloat16 [T, H]; a token with no expert is 0.
            event, hook: as for low_latency_dispatch().
        """
        mode = Mode.of(async_finish, return_recv_hook)
        route = self._exchange.route(handle)
        self._exchange.weights(route, topk_idx, topk_weights, out)
        x = self._exchange.outputs(route, x, zero_copy)
        cost = combine_wait_recv_cost_stats
        _check_stats("combine_wait_recv_cost_stats", cost, torch.int64, (self.group_size,), x)
        after = None if cost is None else After(self._tell_waits(route.core, cost), (cost,))
        return route.core.combine(x, route, topk_weights, out, self._terms(mode), after)

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> torch.Tensor:
        """Return memory for the experts' outputs of a dispatch, bfloat16 [L, R*M, H].

        New memory with each call, not cleared; low_latency_combine(..., zero_copy=True) takes that
        of the last call.
        """
        buffer: torch.Tensor = self._exchange.route(handle).take_combine_buffer()
        return buffer

    def clean_low_latency_buffer(
        self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int
    ) -> None:
        """Do nothing but check the arguments: nothing here has to be cleaned. Local."""
        check.integer("num_max_dispatch_tokens_per_rank", num_max_dispatch_tokens_per_rank)
        check.integer("hidden", hidden)
        check.experts("num_experts", num_experts, self.group_size)

    def get_local_buffer_tensor(
        self,
        dtype: torch.dtype,
        size: Any = None,
        offset: int = 0,
        use_rdma_buffer: bool = False,
    ) -> torch.Tensor:
        """Return a tensor of no elements: clients only clear it, and there is nothing to clear."""
        return torch.empty(0, dtype=dtype, device=self._exchange.device)

    def low_latency_update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        """Mask a rank (True), or let it take part again. Local: all ranks call it alike.

        ValueError if there is no such rank, or if it is this one that is to be masked.
        """
        rank = check.integer("rank_to_mask", rank_to_mask, 0)
        if rank >= self.group_size:
            raise ValueError(f"rank_to_mask {rank} is not in [0, {self.group_size})")
        if mask and rank == self.rank:
            raise ValueError(f"rank_to_mask {rank} is this rank, which always takes part")
        self._mask()[rank] = 0 if mask else 1

    def low_latency_query_mask_buffer(self, mask_status: torch.Tensor) -> None:
        """Fill int32 [R] with who is masked: 1, also those that were not there in time."""
        check.tensor("mask_status", mask_status, (torch.int32,), (self.group_size,))
        torch.sub(1, self._mask().to(mask_status.device), out=mask_status)

    def low_latency_clean_mask_buffer(self) -> None:
        """Let all ranks take part again. Local: all ranks call it alike."""
        self._mask().fill_(1)

    def update_ep_member(self) -> None:
        """Come together with ranks that have taken the place of lost ones. Not of DeepEP.

        As mooncake.Buffer.update_ep_member(); nobody is masked then.
        """
        self._exchange.connect()
        self._active = None

    def destroy(self) -> None:
        """Let all memory go, now. Local, and harmless if done twice or never."""
        self._exchange.close()

    def _terms(self, mode: Mode) -> Terms:
        return Terms(self._mask(), None, mode)

    def _mask(self) -> Any:
        """Return who takes part, where the tensors are now."""
        device = self._exchange.device
        if self._active is None or self._active.device != device:
            self._active = torch.ones(self.group_size, dtype=torch.int32, device=device)
        return self._active

    def _then(self, core: Core, stats: Any, cost: Any, packed: _Packed | None) -> Then | None:
        """Say what is to be done when a dispatch was received."""
        if stats is None and cost is None and packed is None:
            return None

        def then(given: Dispatched) -> After:
            def run() -> None:
                if packed is not None:
                    packed.fill(given.scales)
                if stats is not None:
                    stats.add_(given.count)
                if cost is not None:
                    self._tell_waits(core, cost)()

            return After(run, (stats, cost, None if packed is None else packed.scales))

        return then

    def _tell_waits(self, core: Core, cost: Any) -> Callable[[], None]:
        """Add how long each rank was waited for, beyond what was told before."""

        def run() -> None:
            if core.streams.capturing():
                return  # the host's counters mean nothing in a graph
            waited = [core.buffer.peer_counters(peer).waited_s for peer in range(self.group_size)]
            microseconds = [
                round((now - before) * 1e6)
                for now, before in zip(waited, core.waited_s, strict=True)
            ]
            core.waited_s = waited
            cost.add_(torch.tensor(microseconds, dtype=torch.int64, device=cost.device))

        return run


class _Packed:
    """Scales as exponents, four in an int32: [L, R*M, H/512], with stride 1 along the rows."""

    def __init__(self, core: Core) -> None:
        """Allocate them for what a core buffer gives."""
        local, rows, hidden = core.outputs_shape
        shape = (local, hidden // _CHANNELS_OF_PACK, rows)
        self._memory = torch.empty(shape, dtype=torch.int32, device=core.device)
        self.scales = self._memory.transpose(1, 2)

    def fill(self, scales: torch.Tensor) -> None:
        """Pack float32 [L, R*M, H/128], powers of two where rows are valid."""
        local, groups, rows = self._memory.shape
        bits = scales.transpose(1, 2).view(torch.int32).view(local, groups, _PACK, rows)
        exponents = (bits >> _EXPONENT_BIT) & _EXPONENT_MASK
        self._memory.copy_(exponents[:, :, 0])
        for index in range(1, _PACK):
            self._memory.bitwise_or_(exponents[:, :, index] << 8 * index)


def _check_stats(name: str, value: Any, dtype: torch.dtype, shape: tuple[int], x: Any) -> None:
    if value is not None:
        check.tensor(name, value, (dtype,), shape, x.device)
