"""Mooncake EP's fallback, by its description: everything to everybody, then loops over the experts.

Every rank gets the tokens and the choices of all ranks, and picks what its experts want, expert by
expert and source by source; combine adds up the tokens of all ranks on each of them, and then all
ranks' sums. What it returns is new memory in each call.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from exchange import Inputs, Received, Shape, Variant, plain_calls


class Loops:
    """Rows as they are; FP8 is not for it."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        """Run once. Collective in the default process group."""
        if shape.quant:
            raise NotImplementedError("the loops are only for bf16")
        self._shape, self._inputs = shape, inputs
        self._x: Any = None
        self._count: Any = None
        self._tokens: list[list[Any]] = []  # [local expert][source], of the last dispatch
        self.dispatch()

    def dispatch(self) -> None:
        """Gather all, and copy the tokens of each local expert."""
        shape = self._shape
        everything, choices = self._gather(self._inputs.x), self._gather(self._inputs.topk_idx)
        size = (shape.local_experts, shape.rows_max, shape.hidden)
        self._x = torch.empty(size, dtype=torch.bfloat16, device=shape.device)
        self._count = torch.zeros(shape.local_experts, dtype=torch.int32, device=shape.device)
        self._tokens = []
        for local in range(shape.local_experts):
            wanted = choices == shape.rank * shape.local_experts + local
            self._tokens.append([each.any(dim=1).nonzero().flatten() for each in wanted])
            begin = 0
            for source, tokens in enumerate(self._tokens[-1]):
                end = begin + len(tokens)
                self._x[local, begin:end] = everything[source, tokens]
                begin = end
            self._count[local] = begin

    def received(self) -> Received:
        """Return the packed rows."""
        return Received(self._x, None, self._count)

    def combine(self, y: Any) -> Any:
        """Add each expert's rows to the sums of all tokens, and all-reduce them."""
        shape = self._shape
        choices, weights = (
            self._gather(self._inputs.topk_idx),
            self._gather(self._inputs.topk_weights),
        )
        size = (shape.rank_count, shape.tokens, shape.hidden)
        sums = torch.zeros(size, dtype=torch.bfloat16, device=shape.device)
        for local, sources in enumerate(self._tokens):
            own = choices == shape.rank * shape.local_experts + local
            begin = 0
            for source, tokens in enumerate(sources):
                end = begin + len(tokens)
                weight = (weights[source] * own[source])[tokens].sum(dim=1, keepdim=True)
                sums[source].index_add_(0, tokens, (y[local, begin:end] * weight).to(sums.dtype))
                begin = end
        dist.all_reduce(sums)
        return sums[shape.rank]

    def variants(self, y: Any) -> list[Variant]:
        """Single calls."""
        return [Variant("loops", plain_calls(self, y))]

    def close(self) -> None:
        """Nothing has to be given back in step with the others."""

    def _gather(self, own: Any) -> Any:
        gathered = [torch.empty_like(own) for _ in range(self._shape.rank_count)]
        dist.all_gather(gathered, own)
        return torch.stack(gathered)
