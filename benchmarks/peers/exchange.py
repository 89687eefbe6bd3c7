"""What the contestants have in common: the shape, the inputs, the experts, and their interface."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

SCALE_GROUP = 128  # channels with one FP8 scale
OPERATIONS = ("dispatch", "combine", "dispatch+combine")


@dataclass(frozen=True)
class Shape:
    """One rank's view of the run; all but `rank` and `device` is the same on all ranks."""

    rank: int
    rank_count: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    payload: str
    device: Any

    @property
    def local_experts(self) -> int:
        """L, the experts of one rank."""
        return self.experts // self.rank_count

    @property
    def rows_max(self) -> int:
        """R*M, the most rows of one expert."""
        return self.rank_count * self.tokens

    @property
    def quant(self) -> Literal["fp8"] | None:
        """What dispatch does to the rows before they travel."""
        return "fp8" if self.payload == "fp8" else None


@dataclass(frozen=True)
class Inputs:
    """x bf16 [T, H], topk_idx int64 [T, K] with -1 for none, topk_weights fp32 [T, K]."""

    x: Any
    topk_idx: Any
    topk_weights: Any


@dataclass(frozen=True)
class Received:
    """What a dispatch packed: x [L, R*M, H], scales fp32 [L, R*M, H/128] or None, count [L]."""

    x: Any
    scales: Any
    count: Any


@dataclass(frozen=True)
class Variant:
    """A way to run a contestant: calls by operation, each of which does `round_count` rounds."""

    name: str
    calls: Mapping[str, Callable[[], object]]
    round_count: int = 1


class Contestant(Protocol):
    """Does the exchange with all ranks. On a GPU the calls queue their work and need not wait."""

    def dispatch(self) -> object:
        """Send the tokens of the inputs, and pack what arrives."""

    def received(self) -> Received:
        """Return what the last dispatch packed."""

    def combine(self, y: Any) -> Any:
        """Send the experts' outputs y bf16 [L, R*M, H] back; return their weighted sums [T, H]."""

    def variants(self, y: Any) -> list[Variant]:
        """Return all that is to be timed, after a dispatch whose experts gave y."""

    def close(self) -> None:
        """Give everything back. Collective."""


def random_inputs(shape: Shape, *, seed: int) -> Inputs:
    """Make the inputs of a rank: normal rows, distinct experts, weights that add up to 1."""
    generator = torch.Generator().manual_seed(seed * shape.rank_count + shape.rank)
    x = torch.randn(shape.tokens, shape.hidden, generator=generator).to(torch.bfloat16)
    keys = torch.rand(shape.tokens, shape.experts, generator=generator)
    weights = torch.rand(shape.tokens, shape.topk, generator=generator) + 0.1
    return Inputs(
        x=x.to(shape.device),
        topk_idx=keys.topk(shape.topk, dim=1).indices.to(shape.device),
        topk_weights=(weights / weights.sum(1, keepdim=True)).to(shape.device),
    )


def expert_outputs(shape: Shape, received: Received) -> Any:
    """Let each expert multiply its rows by a number of its own; returns y bf16 [L, R*M, H]."""
    size = (shape.local_experts, shape.rows_max, shape.hidden)
    y = torch.empty(size, dtype=torch.bfloat16, device=shape.device)
    for local, count in enumerate(received.count.tolist()):
        rows = received.x[local, :count].float()
        if received.scales is not None:
            scales = received.scales[local, :count].repeat_interleave(SCALE_GROUP, dim=1)
            rows = rows * scales
        # Powers of two, so that an expert that differs from its neighbours adds no error.
        expert = shape.rank * shape.local_experts + local
        y[local, :count] = rows * 2.0 ** (expert % 3 - 1)
    return y


def plain_calls(contestant: Contestant, y: Any) -> dict[str, Callable[[], object]]:
    """The three operations as single calls."""

    def both() -> None:
        contestant.dispatch()
        contestant.combine(y)

    return {
        "dispatch": contestant.dispatch,
        "combine": lambda: contestant.combine(y),
        "dispatch+combine": both,
    }
