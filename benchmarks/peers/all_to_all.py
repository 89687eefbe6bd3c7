"""The same exchange by torch.distributed's all_to_all_single: NCCL on GPUs, gloo on the CPU.

Written as well as torch allows: one row for each token and rank it goes to, with its choices and
weights behind it in one message; a single wait of the host in each dispatch, for the counts that
NCCL wants as split sizes; no loop over ranks, tokens or experts; sums by embedding_bag, which reads
each row once and adds up in fp32. It does less than ours in two things: it returns no src_info and
no layout_range, and weights are rounded to bf16, because embedding_bag takes no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from exchange import SCALE_GROUP, Inputs, Received, Shape, Variant, plain_calls

_WORD_BYTES = 8
_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0
_AMAX_MIN = 1e-4


@dataclass(frozen=True)
class _Bags:
    """Weighted sums of rows: bag i adds up rows[indices[offsets[i] : offsets[i + 1]]]."""

    indices: Any
    offsets: Any
    weights: Any = None

    def sums(self, rows: Any) -> Any:
        """Return a row for each bag; an empty one gives zeros."""
        if len(self.indices) == 0:
            return rows.new_zeros(len(self.offsets) - 1, rows.shape[1])
        return torch.nn.functional.embedding_bag(
            self.indices,
            rows,
            self.offsets,
            mode="sum",
            per_sample_weights=self.weights,
            include_last_offset=True,
        )


@dataclass(frozen=True)
class _Plan:
    """What a dispatch leaves for its combine: split sizes, and who adds up what."""

    sent_counts: list[int]
    received_counts: list[int]
    expert_side: _Bags
    token_side: _Bags

    @property
    def sent(self) -> int:
        """Rows that this rank sent."""
        return sum(self.sent_counts)

    @property
    def received(self) -> int:
        """Rows that it received."""
        return sum(self.received_counts)


class AllToAll:
    """Buffers are as large as the largest exchange, and made once."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        """Make the buffers, and run once. Collective in the default process group."""
        self._shape, self._inputs = shape, inputs
        self._scale_count = shape.hidden // SCALE_GROUP if shape.quant else 0
        self._x_words = shape.hidden * (1 if shape.quant else 2) // _WORD_BYTES
        # Scales, choices and weights, 32 bits each.
        self._tail = self._empty(shape.tokens, self._scale_count + 2 * shape.topk)
        tail_words = -(-self._tail.shape[1] * 4 // _WORD_BYTES)
        message_count = shape.rows_max
        self._send, self._received = (
            self._empty(message_count, self._x_words + tail_words, dtype=torch.int64)
            for _ in range(2)
        )
        self._returned = self._empty(message_count, shape.hidden, dtype=torch.bfloat16)
        packed_count = shape.local_experts * shape.rows_max
        self._packed = self._empty(packed_count, self._x_words, dtype=torch.int64)
        self._packed_scales = self._empty(packed_count, self._scale_count)
        self._count: Any = None
        self._plan: Any = None
        self.dispatch()

    def dispatch(self) -> None:
        """Gather the rows of each rank, exchange them, and spread them by expert."""
        goes = self._goes()
        sent, received, pair_count = self._exchange_counts(goes)
        order = _indices(goes.flatten(), sum(sent))
        self._pack(order % self._shape.tokens)
        self._exchange_messages(sent, received)
        expert_side = self._spread(sum(received), pair_count)
        self._plan = _Plan(sent, received, expert_side, _token_side(goes, sum(sent)))

    def received(self) -> Received:
        """Return the packed rows."""
        shape = self._shape
        rows = (shape.local_experts, shape.rows_max)
        x = self._packed.view(_FP8 if shape.quant else torch.bfloat16).view(*rows, shape.hidden)
        scales = self._packed_scales.view(torch.float32).view(*rows, -1) if shape.quant else None
        return Received(x, scales, self._count)

    def combine(self, y: Any) -> Any:
        """Add up each message's rows, return the sums, and add up those of each token."""
        plan = self._plan
        self._exchange_sums(plan.expert_side.sums(y.view(-1, self._shape.hidden)))
        return plan.token_side.sums(self._returned[: plan.sent])

    def variants(self, y: Any) -> list[Variant]:
        """The whole; and for comparison the bare exchange of the same bytes, and of all choices."""
        backend, plan = dist.get_backend(), self._plan
        sums = torch.ones_like(self._returned[: plan.received])

        def dispatch() -> None:
            self._exchange_messages(plan.sent_counts, plan.received_counts)

        def combine() -> None:
            self._exchange_sums(sums)

        def both() -> None:
            dispatch()
            combine()

        # As without thought of who gets a row twice, or has it: one for each choice, evenly.
        shape = self._shape
        count = -(-shape.tokens * shape.topk // shape.rank_count) * shape.rank_count
        rows, target = (
            self._empty(count, shape.hidden * 2 // _WORD_BYTES, dtype=torch.int64) for _ in range(2)
        )

        def choices() -> None:
            dist.all_to_all_single(target, rows)

        def choices_twice() -> None:
            choices()
            choices()

        bare = {"dispatch": dispatch, "combine": combine, "dispatch+combine": both}
        of_choices = {
            "dispatch": choices,
            "combine": choices,
            "dispatch+combine": choices_twice,
        }
        return [
            Variant(backend, plain_calls(self, y)),
            Variant(f"{backend}, bare all-to-all", bare),
            Variant(f"{backend}, bare, all choices", of_choices),
        ]

    def close(self) -> None:
        """Nothing has to be given back in step with the others."""

    def _empty(self, *size: int, dtype: Any = torch.int32) -> Any:
        return torch.empty(size, dtype=dtype, device=self._shape.device)

    def _zeros(self, *size: int) -> Any:
        return torch.zeros(size, dtype=torch.int64, device=self._shape.device)

    def _goes(self) -> Any:
        """Which token goes to which rank: bool [R, T]."""
        shape = self._shape
        goes = self._zeros(shape.rank_count + 1, shape.tokens)
        # Choices of -1 go to a row after the last.
        return goes.scatter_(0, self._owners().t(), 1)[:-1].bool()

    def _owners(self) -> Any:
        topk_idx = self._inputs.topk_idx
        owners = topk_idx.div(self._shape.local_experts, rounding_mode="floor")
        return owners.masked_fill_(topk_idx < 0, self._shape.rank_count)

    def _exchange_counts(self, goes: Any) -> tuple[list[int], list[int], int]:
        """Tell each rank how many messages, and how many choices in them, it is going to get.

        Returns the messages to and from each rank, and the choices received: the only numbers that
        the host needs, so it waits once.
        """
        owners = self._owners().flatten()
        choices = self._zeros(len(goes) + 1).scatter_add_(0, owners, torch.ones_like(owners))
        to_send = torch.stack((goes.sum(1), choices[:-1]), dim=1)
        received = torch.empty_like(to_send)
        dist.all_to_all_single(received, to_send)
        sent_counts, received_counts = torch.stack((to_send, received)).tolist()
        return (
            [messages for messages, _ in sent_counts],
            [messages for messages, _ in received_counts],
            sum(choices for _, choices in received_counts),
        )

    def _pack(self, tokens: Any) -> None:
        """Write a message for each of `tokens`: its row, scales, choices and weights."""
        inputs, tail, scales = self._inputs, self._tail, self._scale_count
        x = inputs.x
        if self._shape.quant:
            x, x_scales = _quantize(x)
            tail[:, :scales] = x_scales.view(torch.int32)
        tail[:, scales : -self._shape.topk] = inputs.topk_idx
        tail[:, -self._shape.topk :] = inputs.topk_weights.view(torch.int32)
        send = self._send[: len(tokens)]
        torch.index_select(x.view(torch.int64), 0, tokens, out=send[:, : self._x_words])
        torch.index_select(tail, 0, tokens, out=self._tail_of(send))

    def _exchange_messages(self, sent: list[int], received: list[int]) -> None:
        messages, target = self._send[: sum(sent)], self._received[: sum(received)]
        dist.all_to_all_single(target, messages, received, sent)

    def _exchange_sums(self, sums: Any) -> None:
        plan = self._plan
        # As words: a row is only moved here, and gloo does not know every type.
        returned, words = self._returned.view(torch.int64)[: plan.sent], sums.view(torch.int64)
        dist.all_to_all_single(returned, words, plan.sent_counts, plan.received_counts)

    def _tail_of(self, messages: Any) -> Any:
        """Scales, choices and weights of messages: int32 [n, H/128 + 2K] or [n, 2K]."""
        tail = messages[:, self._x_words :].view(torch.int32)
        return tail[:, : self._tail.shape[1]]

    def _spread(self, message_count: int, pair_count: int) -> _Bags:
        """Copy each message to its experts' rows: sources in order, tokens in their order.

        Returns which rows make up the sum of each message.
        """
        shape, scales = self._shape, self._scale_count
        messages = self._received[:message_count]
        tail = self._tail_of(messages)
        local = tail[:, scales : scales + shape.topk].long() - shape.rank * shape.local_experts
        mine = (local >= 0) & (local < shape.local_experts)
        # What is not for this rank goes to an expert after the last.
        local.masked_fill_(~mine, shape.local_experts)
        chosen = self._zeros(shape.local_experts + 1, message_count).scatter_(0, local.t(), 1)
        self._count = chosen[:-1].sum(1, dtype=torch.int32)
        places = local * shape.rows_max + chosen.cumsum(1).gather(0, local.t()).t() - 1
        # A pair is a message and one of its choices that is for this rank.
        pairs = _indices(mine.flatten(), pair_count)
        sources, rows = pairs // shape.topk, places.flatten()[pairs]
        x, x_scales = messages[:, : self._x_words], tail[:, :scales]
        self._packed.index_copy_(0, rows, x.index_select(0, sources))
        if shape.quant:
            self._packed_scales.index_copy_(0, rows, x_scales.index_select(0, sources))
        weights = tail[:, -shape.topk :].contiguous().view(torch.float32).flatten()[pairs]
        return _Bags(rows, _offsets(mine.sum(1)), weights.to(torch.bfloat16))


def _indices(mask: Any, count: int) -> Any:
    """Indices of the `count` entries of a mask that are set: nonzero(), without its wait."""
    # Entries that are not set meet in a place after the last.
    places = (mask.cumsum(0) - 1).masked_fill_(~mask, len(mask))
    indices = torch.empty(len(mask) + 1, dtype=torch.int64, device=mask.device)
    everything = torch.arange(len(mask), device=mask.device)
    return indices.scatter_(0, places, everything)[:count]


def _offsets(counts: Any) -> Any:
    """Where each bag begins, and after the last one where it ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _token_side(goes: Any, sent: int) -> _Bags:
    """Which of the returned sums make up each token's: as sent, by rank and then by token."""
    places = (goes.flatten().cumsum(0) - 1).view(goes.shape)
    by_token = _indices(goes.t().flatten(), sent)
    return _Bags(places.t().flatten()[by_token], _offsets(goes.sum(0)))


def _quantize(x: Any) -> tuple[Any, Any]:
    """Cast rows to FP8 with one scale for each group of channels."""
    groups = x.float().view(len(x), -1, SCALE_GROUP)
    scales = groups.abs().amax(2).clamp_(min=_AMAX_MIN) / _FP8_MAX
    return (groups / scales.unsqueeze(2)).to(_FP8).view(x.shape), scales
