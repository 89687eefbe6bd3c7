"""What the arguments of a call have to be; told before anything is sent or made.

The core checks the rest (strides, alignment) and names the argument likewise.
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from .._lib import lib

BFLOAT16 = (torch.bfloat16,)
FLOAT32 = (torch.float32,)
INT32 = (torch.int32,)
INTEGERS = (torch.int32, torch.int64)

_HIDDEN_MULTIPLE = lib.MEP_HIDDEN_MULTIPLE
_SCALE_GROUP = lib.MEP_SCALE_GROUP
_TOPK_MAX = lib.MEP_TOPK_MAX


def integer(name: str, value: Any, low: int = 1) -> int:
    """Return ``value`` as an int of at least ``low``."""
    try:
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is a {type(value).__name__}, not an integer") from None
    if number < low:
        raise ValueError(f"{name} {number} is less than {low}")
    return number


def experts(name: str, value: Any, rank_count: int) -> int:
    """Return the number of experts, which the ranks share evenly."""
    number = integer(name, value)
    if number % rank_count:
        raise ValueError(f"{name} {number} is not a multiple of the {rank_count} ranks")
    return number


def tokens(x: Any, max_tokens: int, quantized: bool) -> tuple[int, int]:
    """Check x: bfloat16 [T, H], T up to max_tokens, H a multiple of 8, or of 128 for FP8.

    Returns (T, H).
    """
    tensor("x", x, BFLOAT16, (None, None))
    rows, hidden = x.shape
    if rows > max_tokens:
        name = "num_max_dispatch_tokens_per_rank"
        raise ValueError(f"x has {rows} tokens, more than {name} {max_tokens}")
    multiple = _SCALE_GROUP if quantized else _HIDDEN_MULTIPLE
    if hidden % multiple or hidden == 0:
        why = " with use_fp8" if quantized else ""
        raise ValueError(f"x: hidden {hidden} is not a multiple of {multiple}{why}")
    return rows, hidden


def choices(topk_idx: Any, rows: int, device: torch.device, expert_count: int) -> int:
    """Check topk_idx: int64 or int32 [T, K], K from 1 to 32. Returns K.

    Its values are looked at where that stops no GPU: on the CPU they are -1 or an expert.
    """
    tensor("topk_idx", topk_idx, INTEGERS, (rows, None), device)
    topk: int = topk_idx.shape[1]
    if not 1 <= topk <= _TOPK_MAX:
        raise ValueError(f"topk_idx: top-k {topk} is not in [1, {_TOPK_MAX}]")
    if rows and device.type == "cpu":
        for value in map(int, torch.aminmax(topk_idx)):
            if not -1 <= value < expert_count:
                raise ValueError(
                    f"topk_idx has expert {value}, which is not in [-1, {expert_count})"
                )
    return topk


def active_ranks(mask: Any, rank_count: int, device: torch.device) -> None:
    """Check active_ranks: None, or int32 [R or more]."""
    if mask is None:
        return
    tensor("active_ranks", mask, INT32, (None,), device)
    if mask.shape[0] < rank_count:
        raise ValueError(
            f"active_ranks has {mask.shape[0]} elements, fewer than {rank_count} ranks"
        )


def timeout_s(value: Any) -> float:
    """Convert microseconds to seconds; -1 is never."""
    number = integer("timeout_us", value, -1)
    if number == 0:
        raise ValueError("timeout_us 0 is not positive; -1 means never")
    return math.inf if number < 0 else number / 1e6


def tensor(
    name: str,
    value: Any,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int | None, ...],
    device: torch.device | None = None,
) -> None:
    """Check that ``value`` is a tensor of one of the types, of a shape (None: any), and where."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, not a torch.Tensor")
    if value.dtype not in dtypes:
        names = " or ".join(str(one).removeprefix("torch.") for one in dtypes)
        raise ValueError(f"{name} is {str(value.dtype).removeprefix('torch.')}, not {names}")
    given = value.shape
    if given != shape and not _fits(given, shape):
        rule = ", ".join("any" if need is None else str(need) for need in shape)
        raise ValueError(f"{name} has shape {list(given)}, not [{rule}]")
    if device is not None and value.device != device:
        raise ValueError(f"{name} is on {value.device}, not on {device} like x")


def _fits(given: tuple[int, ...], shape: tuple[int | None, ...]) -> bool:
    """Tell whether a shape is as it has to be; a plain loop, because every call checks several."""
    if len(given) != len(shape):
        return False
    for have, need in zip(given, shape, strict=False):
        if have != need and need is not None:
            return False
    return True
