"""One rank of mooncake-ep demo: embeds its shard of the text and takes it through the layers."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from . import moe
from .arrays import dequantize, row_type
from .sizes import Sizes, make_buffer

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy.typing as npt

    from mooncake_ep import Buffer, Dispatched

    from .rank import RankContext


def run(context: RankContext) -> dict[str, Any]:
    """Run all layers on this rank's words; returns rows, routing and times, to be checked."""
    sizes = Sizes(**context.options["sizes"])
    shard = context.options["shards"][context.group.rank]
    with make_buffer(context.group, sizes, threads=0) as buffer:
        model = _Model(context, sizes, buffer)
        layers = model.run(shard["words"], first_position=shard["first_position"])
    return {"layers": layers, "spans": model.spans, "counts": model.counts}


class _Model:
    """This rank's part of the model, and a record of what it did when."""

    def __init__(self, context: RankContext, sizes: Sizes, buffer: Buffer) -> None:
        self._context = context
        self._sizes = sizes
        self._buffer = buffer
        self._first_expert = context.group.rank * sizes.local_experts
        self._outputs: Dispatched | None = None
        self._y: npt.NDArray[Any] = np.empty(0)
        self.spans: list[tuple[str, float, float]] = []
        self.counts: list[int] = []

    def run(self, words: list[str], *, first_position: int) -> list[dict[str, Any]]:
        """Embed the words and run the layers; returns what went into and came out of each."""
        sizes, layer_count = self._sizes, self._context.options["layers"]
        experts = self._make_experts(layer_count)
        router = moe.Router(
            hidden=sizes.hidden, experts=sizes.experts, topk=sizes.topk, seed=sizes.seed
        )
        embedding = moe.Embedding(sizes.hidden, sizes.seed)
        self._rehearse()
        self._context.group.barrier()
        with self._span("embed"):
            rows = embedding.rows(words, first_position=first_position)
        layers = []
        for layer in range(layer_count):
            x = rows.astype(row_type(sizes.payload))
            topk_idx, weights, y = self._layer(x, router, experts[layer])
            layers.append(
                {
                    "x": x.tobytes(),
                    "topk_idx": topk_idx.tobytes(),
                    "topk_weights": weights.tobytes(),
                    "y": y.tobytes(),
                }
            )
            rows = moe.normalized(rows + y.astype(np.float32))
            self._context.show_progress(layer + 1, layer_count)
        return layers

    def _layer(
        self, x: npt.NDArray[Any], router: moe.Router, experts: list[moe.Expert]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[Any]]:
        with self._span("route"):
            topk_idx, weights = router.route(x.astype(np.float32))
        with self._span("wait"):
            self._context.group.barrier()
        with self._span("dispatch"):
            dispatched = self._buffer.dispatch(
                x, topk_idx, weights, quant=self._sizes.quant, out=self._outputs
            )
        with self._span("experts"):
            self._run_experts(dispatched, experts)
        with self._span("wait"):
            self._context.group.barrier()
        with self._span("combine"):
            out = self._buffer.combine(self._y, dispatched)
        self.counts = [int(count) for count in dispatched.count]
        return topk_idx, weights, out

    def _run_experts(self, dispatched: Dispatched, experts: list[moe.Expert]) -> None:
        for local, expert in enumerate(experts):
            count = int(dispatched.count[local])
            scales = None if dispatched.scales is None else dispatched.scales[local, :count]
            self._y[local, :count] = expert(dequantize(dispatched.x[local, :count], scales))

    def _make_experts(self, layer_count: int) -> list[list[moe.Expert]]:
        numbers = range(self._first_expert, self._first_expert + self._sizes.local_experts)
        hidden, seed = self._sizes.hidden, self._sizes.seed
        return [
            [moe.make_expert(number, layer=layer, hidden=hidden, seed=seed) for number in numbers]
            for layer in range(layer_count)
        ]

    def _rehearse(self) -> None:
        """Touch all memory once: the first use of a page costs more than what is to be shown."""
        sizes = self._sizes
        x = np.zeros((sizes.tokens, sizes.hidden), row_type(sizes.payload))
        topk_idx = np.arange(sizes.tokens * sizes.topk).reshape(-1, sizes.topk) % sizes.experts
        self._outputs = self._buffer.dispatch(x, topk_idx, quant=sizes.quant)
        self._y = np.zeros(self._outputs.x.shape, x.dtype)
        self._buffer.combine(self._y, self._outputs)

    @contextlib.contextmanager
    def _span(self, name: str) -> Iterator[None]:
        begin = time.monotonic()
        yield
        self.spans.append((name, begin, time.monotonic()))
