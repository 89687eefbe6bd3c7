"""Dispatch and combine as differentiable torch functions. Needs torch; nothing else imports this.

    exchange = Exchange(buffer)                                   # once
    routed = exchange.dispatch(x, topk_idx, topk_weights)         # in each layer
    out = exchange.combine(experts(routed.x, routed.count), routed)
    loss(out).backward()

The gradient of x is a combine of the rows' gradients, and the gradient of an expert's row is a
dispatch of the sums' gradients, times the weight. What remains is the gradient of a weight, the
product of a row at the expert's rank with a gradient at the token's. For it a second, narrow buffer
takes each token's ids and weights to its experts, and brings the products back, each in the column
of its choice: 2K floats a token, however many experts there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from ._lib import lib
from ._rounds import Dispatched, Handle
from .buffer import Buffer

_HIDDEN_MULTIPLE = 8


@dataclass(frozen=True)
class Routed:
    """What Exchange.dispatch() received (L local experts, R ranks, M max_tokens).

    Attributes:
        x: [L, R*M, H] of the type of the tokens; of expert e the first count[e] rows are valid, the
            others are 0. Has a gradient if the tokens do.
        count: int32 [L].
        topk_idx, topk_weights: as given.
        handle: of Exchange.buffer.
    """

    x: torch.Tensor
    count: torch.Tensor
    topk_idx: torch.Tensor
    topk_weights: torch.Tensor
    handle: Handle


class Exchange:
    """Differentiable dispatch and combine over one Buffer.

    Any number of layers may share it, a forward may be recomputed (activation checkpointing) if the
    router then chooses the same, and the result of a dispatch may be combined any number of times.
    Gradients are those of the same layer in one process. Use it as a context manager or call
    close().

    Backward is collective as forward is, in the opposite order, and that is up to the caller: all
    ranks run the same graph, that is, the same calls in the same order, of tensors that require
    grad on all of them or on none, and call backward() of a loss that depends on every sum. So a
    rank without tokens goes along with T = 0, whose sums add nothing to its loss, and an expert
    without rows is computed on none rather than left out.

    Attributes:
        buffer: as given.
    """

    def __init__(self, buffer: Buffer) -> None:
        """Make the buffer that gradients of weights need. Collective, blocking.

        Args:
            buffer: stays the caller's to close, after the last backward. Its payloads have to
                include the type of the tokens.

        Raises:
            TypeError: buffer is none.
            MemoryError, EpTimeoutError, EpError: as for Buffer.
        """
        if not isinstance(buffer, Buffer):
            raise TypeError(f"buffer is a {type(buffer).__name__}, not a Buffer")
        self.buffer = buffer
        self._narrow = Buffer(
            buffer.group,
            max_tokens=buffer.max_tokens,
            hidden=-(-2 * buffer.topk // _HIDDEN_MULTIPLE) * _HIDDEN_MULTIPLE,
            experts=buffer.experts,
            topk=buffer.topk,
            payloads=["fp32"],
            rounds_in_flight=1,
            threads=buffer.threads,
            # Ranks that share a GPU may have fewer than a limit may be.
            max_sms=buffer.sms if buffer.sms >= lib.MEP_SM_COUNT_MIN else 0,
        )

    def dispatch(
        self, x: torch.Tensor, topk_idx: torch.Tensor, topk_weights: torch.Tensor
    ) -> Routed:
        """Send every token to the ranks of its experts, and pack what arrives. Collective.

        Args:
            x: [T, H] bfloat16, float16 or float32, T up to max_tokens (also 0).
            topk_idx: int32 or int64 [T, K], global experts, -1 for none. An expert that a token
                names twice gets it once, and its weights add up.
            topk_weights: float32 [T, K], for combine().

        Raises:
            TypeError: an argument is no tensor.
            ValueError, EpError, PeerFailedError: as for Buffer.dispatch().
        """
        _check_tensors(x=x, topk_idx=topk_idx, topk_weights=topk_weights)
        rows, count, handle = _Dispatch.apply(self.buffer, x, topk_idx, topk_weights.detach())
        return Routed(rows, count, topk_idx, topk_weights, handle)

    def combine(self, y: torch.Tensor, routed: Routed) -> torch.Tensor:
        """Send the experts' outputs back and return their weighted sums [T, H]. Collective.

        Args:
            y: [L, R*M, H] bfloat16, float16 or float32, the experts' outputs for ``routed.x``, of
                the same type on all ranks. Rows beyond the count may hold anything: they are not
                read, and their gradient is 0.
            routed: of this exchange's dispatch().

        Raises:
            TypeError: an argument is of another type.
            ValueError, EpError, PeerFailedError: as for Buffer.combine().
        """
        _check_tensors(y=y)
        if not isinstance(routed, Routed):
            raise TypeError(f"routed is a {type(routed).__name__}, not a Routed")
        sums: torch.Tensor = _Combine.apply(
            self, routed.handle, y, routed.topk_idx, routed.topk_weights
        )
        return sums

    def close(self) -> None:
        """Release what __init__ made, and not the buffer. Closing twice is harmless."""
        self._narrow.close()

    def __enter__(self) -> Exchange:
        """Return the exchange itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


# ---- The two functions ---------------------------------------------------------------------------


class _Dispatch(torch.autograd.Function):  # type: ignore[misc]
    """(buffer, x, topk_idx, topk_weights) -> rows, count, handle; the gradient is that of x."""

    @staticmethod
    def forward(
        ctx: Any, buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, Handle | None]:
        received = _dispatch(buffer, x, topk_idx, weights)
        ctx.handle = received.handle
        ctx.save_for_backward(topk_idx)
        ctx.mark_non_differentiable(received.count)
        return received.x, received.count, received.handle

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor, *_: object) -> tuple[torch.Tensor | None, ...]:
        (topk_idx,) = ctx.saved_tensors
        # Not the weights of the dispatch: a row is the token itself, once for each expert.
        once = (~_repeats(topk_idx)).float()
        buffer = ctx.handle._buffer
        return None, buffer.combine(grad.contiguous(), ctx.handle, once), None, None


class _Combine(torch.autograd.Function):  # type: ignore[misc]
    """(exchange, handle, y, topk_idx, topk_weights) -> sums; gradients of y and topk_weights."""

    @staticmethod
    def forward(
        ctx: Any,
        exchange: Exchange,
        handle: Handle,
        y: torch.Tensor,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
    ) -> torch.Tensor:
        ctx.exchange = exchange
        ctx.save_for_backward(y if ctx.needs_input_grad[4] else None, topk_idx, weights)
        sums: torch.Tensor = exchange.buffer.combine(y, handle)
        return sums

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        # First of all, because checkpointing recomputes, with calls of its own, when this is read.
        y, topk_idx, weights = ctx.saved_tensors
        exchange: Exchange = ctx.exchange
        # A row has the place that it had in forward, where repeats made no second row either.
        experts = topk_idx.masked_fill(_repeats(topk_idx), -1)
        rows = _dispatch(exchange.buffer, grad.contiguous(), experts).x
        choices = _Choices(exchange._narrow, topk_idx, weights, experts)
        grad_y = grad_weights = None
        if ctx.needs_input_grad[2]:
            grad_y = (rows * choices.row_weights()).to(rows.dtype)
        if ctx.needs_input_grad[4]:
            grad_weights = choices.bring_back((y.float() * rows.float()).sum(-1))
        return None, None, grad_y, None, grad_weights


class _Choices:
    """What the tokens' choices are, at the ranks of the experts that were chosen."""

    def __init__(
        self,
        narrow: Buffer,
        topk_idx: torch.Tensor,
        weights: torch.Tensor,
        experts: torch.Tensor,
    ) -> None:
        """Send ids and weights [T, K] to ``experts``, which are the ids without repeats."""
        tokens, topk = topk_idx.shape
        told = weights.new_zeros(tokens, narrow.hidden)
        told[:, :topk] = topk_idx  # exact: there are fewer than 2^24 experts
        told[:, topk : 2 * topk] = weights
        received = _dispatch(narrow, told, experts)
        local, first = narrow.local_experts, narrow.group.rank * narrow.local_experts
        own = torch.arange(first, first + local, device=told.device).view(local, 1, 1)
        self._narrow, self._received = narrow, received
        self._chosen = received.x[..., :topk] == own  # [L, R*M, K]
        self._weights = received.x[..., topk : 2 * topk]

    def row_weights(self) -> torch.Tensor:
        """Return the weight of each row, [L, R*M, 1]: of all choices that it is the row of."""
        return torch.where(self._chosen, self._weights, 0.0).sum(-1, keepdim=True)

    def bring_back(self, values: torch.Tensor) -> torch.Tensor:
        """Return, for each choice of the own tokens, its row's value: [L, R*M] to [T, K]."""
        topk = self._chosen.shape[-1]
        rows = torch.zeros_like(self._received.x)
        rows[..., :topk] = torch.where(self._chosen, values.unsqueeze(-1), 0.0)
        sums: torch.Tensor = self._narrow.combine(rows, self._received)
        return sums[:, :topk]


def _dispatch(
    buffer: Buffer, x: torch.Tensor, topk_idx: torch.Tensor, weights: torch.Tensor | None = None
) -> Dispatched:
    """Dispatch into rows that are 0 beyond the count.

    They reach the gradients of weights of experts that compute all rows at once: 0 times what lies
    in memory that nobody wrote to may be NaN.
    """
    shape = (buffer.local_experts, buffer.group.rank_count * buffer.max_tokens, buffer.hidden)
    rows = torch.zeros(shape, dtype=x.dtype, device=x.device)
    count = torch.zeros(shape[0], dtype=torch.int32, device=x.device)
    return buffer.dispatch(x, topk_idx, weights, out=Dispatched(rows, None, count))


def _repeats(topk_idx: torch.Tensor) -> torch.Tensor:
    """Tell which choices name an expert that an earlier choice of the token names, [T, K]."""
    equal = topk_idx.unsqueeze(2) == topk_idx.unsqueeze(1)
    return equal.tril(-1).any(2)


def _check_tensors(**tensors: object) -> None:
    for name, value in tensors.items():
        if not isinstance(value, torch.Tensor):
            raise TypeError(f"{name} is a {type(value).__name__}, not a torch.Tensor")
