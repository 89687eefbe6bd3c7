"""Mooncake EP's Buffer, from a wheel such as mooncake-transfer-engine-cuda13.

The name of this file is not that of the package: it would hide it.
"""

from __future__ import annotations

import importlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from exchange import Inputs, Received, Shape, Variant, plain_calls

_WAIT_FOR_EVER_US = -1


class Mooncake:
    """Its calls make their outputs anew; only combine takes one."""

    def __init__(self, shape: Shape, inputs: Inputs) -> None:
        """Make the buffer, and run once. Collective in the default process group.

        Raises what the wheel raises: ImportError where it or a library it needs is not here, and
        others for shapes that it was not built for.
        """
        if shape.device.type != "cuda":
            raise NotImplementedError("it needs a GPU")
        module = importlib.import_module("mooncake.mooncake_ep_buffer")
        self._shape, self._inputs = shape, inputs
        byte_count = module.Buffer.get_ep_buffer_size_hint(
            shape.tokens, shape.hidden, shape.rank_count, shape.experts
        )
        with warnings.catch_warnings():
            # It says that active_ranks needs a process group of its own kind; all ranks are active.
            warnings.simplefilter("ignore", RuntimeWarning)
            self._buffer = module.Buffer(dist.group.WORLD, byte_count)
        # Where it cannot reach all peers, its Python code exchanges by torch.distributed.
        fallback = getattr(self._buffer, "_use_fallback", False)
        self._name = "mooncake, in its fallback" if fallback else "mooncake"
        self._active_ranks = torch.ones(shape.rank_count, dtype=torch.int32, device=shape.device)
        self._out = torch.zeros_like(inputs.x)
        self._handle: Any = None
        self._received: Any = None
        self.dispatch()
        torch.cuda.synchronize()

    def dispatch(self) -> None:
        """Send, wait and pack on the current stream."""
        shape, inputs = self._shape, self._inputs
        received, count, self._handle, _event, _hook = self._buffer.dispatch(
            inputs.x,
            inputs.topk_idx,
            self._active_ranks,
            shape.tokens,
            shape.experts,
            _WAIT_FOR_EVER_US,
            use_fp8=shape.quant is not None,
        )
        x, scales = received if shape.quant else (received, None)
        self._received = Received(x, scales, count)

    def received(self) -> Received:
        """Return what the last dispatch made."""
        received: Received = self._received
        return received

    def combine(self, y: Any) -> Any:
        """Send, wait and add up on the current stream."""
        out, _event, _hook = self._buffer.combine(
            y,
            self._inputs.topk_idx,
            self._inputs.topk_weights,
            self._active_ranks,
            _WAIT_FOR_EVER_US,
            self._handle,
            out=self._out,
        )
        return out

    def variants(self, y: Any) -> list[Variant]:
        """Single calls; what a graph would need of it is not promised."""
        return [Variant(self._name, plain_calls(self, y))]

    def close(self) -> None:
        """Let go of the buffer when no peer can use it any more."""
        torch.cuda.synchronize()
        dist.barrier()
        self._buffer = None
