"""The end of mooncake-ep demo: the ranks' layers against the same layers in one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import moe
from .arrays import relative_l2, row_type
from .errors import CheckFailedError

if TYPE_CHECKING:
    import numpy.typing as npt

    from .sizes import Sizes

# Equal matrix products differ by roundings from one process to the next, and so do the choices
# between near-equals.
_PROBABILITY_SLACK = 1e-4


@dataclass(frozen=True)
class Errors:
    """How far the ranks' results are from those of one process, over all layers."""

    largest: float
    relative: float


def compare(results: list[dict[str, Any]], sizes: Sizes, *, layer_count: int) -> Errors:
    """Compute every layer from the rows that the ranks had, and compare what they got out of it."""
    largest = relative = 0.0
    router = moe.Router(
        hidden=sizes.hidden, experts=sizes.experts, topk=sizes.topk, seed=sizes.seed
    )
    for layer in range(layer_count):
        parts = [_arrays(result["layers"][layer], sizes) for result in results]
        x, topk_idx, weights, y = (np.concatenate(column) for column in zip(*parts, strict=True))
        _check_routing(router.probabilities(x), topk_idx, weights)
        gates = np.zeros((len(x), sizes.experts))
        np.put_along_axis(gates, topk_idx, weights, axis=1)
        reference = moe.dense_layer(x, gates, layer=layer, seed=sizes.seed)
        largest = max(largest, float(np.abs(y - reference).max(initial=0.0)))
        relative = max(relative, relative_l2(y, reference))
    return Errors(largest=largest, relative=relative)


def _arrays(layer: dict[str, bytes], sizes: Sizes) -> tuple[npt.NDArray[Any], ...]:
    rows = row_type(sizes.payload)
    return (
        np.frombuffer(layer["x"], rows).reshape(-1, sizes.hidden).astype(np.float32),
        np.frombuffer(layer["topk_idx"], np.int64).reshape(-1, sizes.topk),
        np.frombuffer(layer["topk_weights"], np.float32).reshape(-1, sizes.topk),
        np.frombuffer(layer["y"], rows).reshape(-1, sizes.hidden).astype(np.float64),
    )


def _check_routing(
    probabilities: npt.NDArray[np.float32],
    topk_idx: npt.NDArray[np.int64],
    weights: npt.NDArray[np.float32],
) -> None:
    """Check that the ranks chose likeliest experts and weighted them by their probabilities."""
    chosen = np.take_along_axis(probabilities, topk_idx, axis=1)
    best = -np.sort(-probabilities, axis=1)[:, : topk_idx.shape[1]]
    shares = chosen / chosen.sum(axis=1, keepdims=True)
    wrong = (np.abs(chosen - best) > _PROBABILITY_SLACK) | (
        np.abs(shares - weights) > _PROBABILITY_SLACK
    )
    if wrong.any():
        token = int(np.flatnonzero(wrong.any(axis=1))[0])
        raise CheckFailedError(
            f"demo failed: token {token} was routed to experts {topk_idx[token].tolist()}"
        )
