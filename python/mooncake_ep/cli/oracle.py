"""What dispatch and combine have to return, worked out from the inputs of all ranks in plain NumPy.

Written from the public header alone and without any code of the library, so that the two can
disagree.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .arrays import SCALE_GROUP, UNIT_ROUNDOFF, Tokens

if TYPE_CHECKING:
    import numpy.typing as npt

_AMAX_MIN = 1e-4
_FP8_MAX = 448.0
_FP8_MANTISSA_BITS = 3
_FP8_EXPONENT_MIN = -6
# What a rounding may cost however small the number is.
_SMALLEST = {"bf16": 1e-38, "fp16": 2.0**-24, "fp32": 1e-38, "fp8": 1e-38}
# The quotient x / scale may be formed in several ways that differ by roundings of fp32.
_FP32_SLACK = 1e-6


@dataclass(frozen=True)
class Packed:
    """What one rank receives. Entries of `experts` are (source of each row, token of each row)."""

    experts: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]
    count: npt.NDArray[np.int32]
    layout_range: npt.NDArray[np.int64]


def packed(ranks: list[Tokens], *, rank: int, expert_count: int) -> Packed:
    """Pack the tokens of all ranks for the experts of `rank`: sources in order, tokens in order."""
    local_count = expert_count // len(ranks)
    experts = []
    layout_range = np.zeros((local_count, len(ranks)), np.int64)
    for local in range(local_count):
        expert = rank * local_count + local
        tokens = [np.flatnonzero((source.topk_idx == expert).any(axis=1)) for source in ranks]
        begin = 0
        for number, mine in enumerate(tokens):
            layout_range[local, number] = begin << 32 | len(mine)
            begin += len(mine)
        sources = np.repeat(np.arange(len(ranks)), [len(mine) for mine in tokens])
        experts.append((sources, np.concatenate(tokens)))
    count = np.array([len(tokens) for _, tokens in experts], np.int32)
    return Packed(experts=experts, count=count, layout_range=layout_range)


def combined(tokens: Tokens, factors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Out [T, H] in float64 if expert e multiplies its rows by factors[e]."""
    gain = _gains(tokens, factors).sum(axis=1, keepdims=True)
    out: npt.NDArray[np.float64] = tokens.x.astype(np.float64) * gain
    return out


def combined_bound(
    tokens: Tokens, factors: npt.NDArray[np.float64], *, payload: str, rank_count: int
) -> npt.NDArray[np.float64]:
    """The largest error [T, H] that the roundings of combine, and of FP8, may cause."""
    unit = UNIT_ROUNDOFF[payload]
    # One rounding of each rank's partial sum and one of the total; in between sums in fp32.
    sums = (tokens.topk_idx.shape[1] + rank_count + 2) * UNIT_ROUNDOFF["fp32"]
    magnitude = np.abs(tokens.x.astype(np.float64))
    roundings = magnitude * (2.1 * unit + 2 * sums)
    if payload == "fp8":
        # The experts of this check also round what they made of FP8 to the type of combine.
        roundings += magnitude * unit + fp8_bound(magnitude) * (1 + 3.2 * unit)
    gain = np.abs(_gains(tokens, factors)).sum(axis=1, keepdims=True)
    bound: npt.NDArray[np.float64] = roundings * gain + rank_count * _SMALLEST[payload]
    return bound


def fp8_bound(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Half the distance between FP8 numbers at each element of rows [n, H], times its scale."""
    scales = np.repeat(fp8_scales(rows), SCALE_GROUP, axis=1)
    exponents = np.frexp(np.abs(rows) / scales)[1] - 1
    spacing = np.exp2(np.maximum(exponents, _FP8_EXPONENT_MIN) - _FP8_MANTISSA_BITS)
    bound: npt.NDArray[np.float64] = spacing * scales * (0.5 + _FP32_SLACK)
    return bound


def fp8_scales(rows: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """Scales [n, H/128] of rows [n, H] in float64."""
    groups = np.abs(rows.astype(np.float64)).reshape(
        len(rows), rows.shape[1] // SCALE_GROUP, SCALE_GROUP
    )
    largest: npt.NDArray[np.float64] = np.maximum(groups.max(axis=2), _AMAX_MIN)
    return largest / _FP8_MAX


def _gains(tokens: Tokens, factors: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    # Choices of -1 count for nothing; an expert that is named twice counts with both weights.
    gains: npt.NDArray[np.float64] = tokens.topk_weights * factors[tokens.topk_idx]
    return np.where(tokens.topk_idx >= 0, gains, 0.0)
