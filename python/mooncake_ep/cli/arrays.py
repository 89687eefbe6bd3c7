"""The NumPy side of the ranks: the types that travel, and inputs made from seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .sizes import Sizes

SCALE_GROUP = 128
_ROUTING_BLOCK = 1 << 22
# Last entries of the seeds of independent random streams.
_ROWS, _CHOICES = 0, 1

# Half the distance between neighbouring numbers of a type, relative to the smaller one.
UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "fp32": 2.0**-24, "fp8": 2.0**-8}


def row_type(payload: str) -> np.dtype[Any]:
    """The type of x and of combine's rows."""
    if payload == "fp32":
        return np.dtype(np.float32)
    return np.dtype(np.float16 if payload == "fp16" else ml_dtypes.bfloat16)


def bits(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """The same memory as unsigned integers, to be compared bit by bit."""
    return array.view(f"u{array.dtype.itemsize}")


@dataclass(frozen=True)
class Tokens:
    """Inputs of one rank in one round: x [T, H], topk_idx [T, K], topk_weights fp32 [T, K]."""

    x: npt.NDArray[Any]
    topk_idx: npt.NDArray[Any]
    topk_weights: npt.NDArray[np.float32]


def random_tokens(sizes: Sizes, count: int, *, rank: int, round_number: int) -> Tokens:
    """Make `count` tokens of a rank: normal rows, distinct experts, weights that add up to 1."""
    generator = np.random.default_rng([sizes.seed, rank, round_number, _ROWS])
    x = generator.standard_normal((count, sizes.hidden), np.float32).astype(row_type(sizes.payload))
    topk_idx, topk_weights = random_choices(sizes, count, rank=rank, round_number=round_number)
    return Tokens(x=x, topk_idx=topk_idx, topk_weights=topk_weights)


def random_choices(
    sizes: Sizes, count: int, *, rank: int, round_number: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """topk_idx and topk_weights of what random_tokens() makes."""
    generator = np.random.default_rng([sizes.seed, rank, round_number, _CHOICES])
    weights = generator.random((count, sizes.topk), np.float32) + np.float32(0.1)
    return _distinct_experts(generator, count, sizes), weights / weights.sum(axis=1, keepdims=True)


def _distinct_experts(
    generator: np.random.Generator, count: int, sizes: Sizes
) -> npt.NDArray[np.int64]:
    chosen = np.empty((count, sizes.topk), np.int64)
    # In blocks, because a key for each expert of each token may not fit into memory.
    step = max(1, _ROUTING_BLOCK // sizes.experts)
    for begin in range(0, count, step):
        end = min(begin + step, count)
        keys = generator.random((end - begin, sizes.experts), np.float32)
        chosen[begin:end] = np.argsort(keys, axis=1)[:, : sizes.topk]
    return chosen


def dequantize(rows: npt.NDArray[Any], scales: npt.NDArray[Any] | None) -> npt.NDArray[np.float32]:
    """Rows [n, H] as fp32; with scales fp32 [n, H/128], each group of channels times its own."""
    values = rows.astype(np.float32)
    if scales is None:
        return values
    groups = (
        values.reshape(len(rows), rows.shape[1] // SCALE_GROUP, SCALE_GROUP)
        * scales[:, :, np.newaxis]
    )
    dequantized: npt.NDArray[np.float32] = groups.reshape(values.shape)
    return dequantized


def relative_l2(value: npt.NDArray[Any], reference: npt.NDArray[np.float64]) -> float:
    """Norm of the difference over the norm of the reference, in float64."""
    norm = float(np.linalg.norm(reference))
    error = float(np.linalg.norm(value.astype(np.float64) - reference))
    return error / norm if norm > 0 else error
