"""This library: single calls, and on a GPU the same in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from exchange import Inputs, Received, Shape, Variant, plain_calls

import mooncake_ep as ep

EAGER = "ours"
GRAPH = "ours, in a graph"
# Enough that launching a graph takes less time than running it.
_ROUNDS_IN_GRAPH = 10


class Ours:
    """Outputs and handle are made once and filled again."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        """Join the ranks of the default process group, and run once. Collective."""
        self._shape, self._inputs = shape, inputs
        place = {"backend": shape.device.type, "device_id": shape.device.index or 0}
        self._group = ep.Group.from_torch(**place)
        self._buffer = ep.Buffer(
            self._group,
            max_tokens=shape.tokens,
            hidden=shape.hidden,
            experts=shape.experts,
            topk=shape.topk,
            payloads=("bf16", "fp8") if shape.quant else ("bf16",),
            threads=1,
        )
        self._dispatched = self._buffer.dispatch(
            inputs.x, inputs.topk_idx, inputs.topk_weights, quant=shape.quant
        )
        self._out = torch.zeros_like(inputs.x)

    def dispatch(self) -> None:
        """Fill the outputs again."""
        inputs, out = self._inputs, self._dispatched
        self._buffer.dispatch(
            inputs.x,
            inputs.topk_idx,
            inputs.topk_weights,
            quant=self._shape.quant,
            out=out,
            handle=out.handle,
        )

    def received(self) -> Received:
        """Return them."""
        return Received(self._dispatched.x, self._dispatched.scales, self._dispatched.count)

    def combine(self, y: Any) -> Any:
        """Fill the sums again."""
        return self._buffer.combine(y, self._dispatched, out=self._out)

    def variants(self, y: Any) -> list[Variant]:
        """Single calls; and graphs, where there are any."""
        calls = plain_calls(self, y)
        variants = [Variant(EAGER, calls)]
        if self._shape.device.type == "cuda":
            graphs = {name: _capture(call).replay for name, call in calls.items()}
            variants.append(Variant(GRAPH, graphs, round_count=_ROUNDS_IN_GRAPH))
        return variants

    def close(self) -> None:
        """Close buffer and group."""
        # A peer may still be reading this rank's window.
        if self._shape.device.type == "cuda":
            torch.cuda.synchronize()
        self._group.barrier()
        self._buffer.close()
        self._group.close()


def _capture(call: Callable[[], object]) -> Any:
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # NCCL's watchdog is a thread that may query events while this one captures.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(_ROUNDS_IN_GRAPH):
            call()
    return graph
