"""The C structs of calls. They are made once and kept: filling them anew takes microseconds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ._arrays import OUTPUTS, OutputPlan
from ._dlpack import Slot, borrow
from ._ffi import ffi
from ._lib import lib, struct, wrong_type
from ._rounds import Dispatched

if TYPE_CHECKING:
    from .buffer import Buffer

_INPUT_COUNT = 5  # tensors of a dispatch that are not outputs
_NULL = ffi.NULL
c_dispatch = lib.mep_dispatch
c_combine = lib.mep_combine


class DispatchCall:
    """The C structs of one dispatch; those of its outputs lie side by side, as OUTPUTS has them."""

    __slots__ = (
        "active_ranks",
        "args",
        "free",
        "function",
        "outputs",
        "plan",
        "tensors",
        "topk_idx",
        "topk_weights",
        "x",
        "x_scales",
    )

    def __init__(self, buffer: Buffer) -> None:
        self.free: list[DispatchCall] = buffer._dispatch_calls
        self.function = c_dispatch
        self.tensors = ffi.new("mep_tensor_t[]", _INPUT_COUNT + len(OUTPUTS))
        slots = [Slot(self.tensors + index) for index in range(len(self.tensors))]
        self.x, self.x_scales, self.topk_idx, self.topk_weights, self.active_ranks = slots[:5]
        self.outputs = slots[_INPUT_COUNT:]
        self.plan: OutputPlan | None = None  # what the output structs describe now
        self.args = struct("mep_dispatch_args_t", x=self.x.tensor, topk_idx=self.topk_idx.tensor)

    def allocate_outputs(self, plan: OutputPlan) -> Dispatched:
        """Allocate the outputs and point the output structs at them."""
        outputs = self.outputs
        if self.plan is not plan:
            self.plan, args = plan, self.args
            plan.describe(outputs)
            args.out_x, args.out_count = outputs[0].tensor, outputs[1].tensor
            args.out_src_info = outputs[2].tensor
            args.out_layout_range = outputs[3].tensor if plan.has_layout_range else _NULL
            args.out_scales = outputs[4].tensor if plan.has_scales else _NULL
        return Dispatched(*plan.allocate(outputs))

    def borrow_outputs(self, out: Dispatched, stream: int | None) -> tuple[object, ...]:
        """Point the output structs at the caller's arrays."""
        if type(out) is not Dispatched:
            raise wrong_type(out, "out", "not a Dispatched")
        args, arrays = self.args, (out.x, out.count, out.src_info, out.layout_range, out.scales)
        x, count, src_info, layout_range, scales = self.outputs
        self.plan = None
        args.out_x, args.out_count = x.tensor, count.tensor
        args.out_src_info = _NULL if out.src_info is None else src_info.tensor
        args.out_layout_range = _NULL if out.layout_range is None else layout_range.tensor
        args.out_scales = _NULL if out.scales is None else scales.tensor
        return arrays, (
            borrow("out.x", out.x, x, True, stream),
            borrow("out.count", out.count, count, True, stream),
            out.src_info is None or borrow("out.src_info", out.src_info, src_info, True, stream),
            out.layout_range is None
            or borrow("out.layout_range", out.layout_range, layout_range, True, stream),
            out.scales is None or borrow("out.scales", out.scales, scales, True, stream),
        )


class CombineCall:
    """The C structs of one combine."""

    __slots__ = ("active_ranks", "args", "free", "function", "out", "tensors", "topk_weights", "x")

    def __init__(self, buffer: Buffer) -> None:
        self.free: list[CombineCall] = buffer._combine_calls
        self.function = c_combine
        self.tensors = ffi.new("mep_tensor_t[4]")
        slots = [Slot(self.tensors + index) for index in range(len(self.tensors))]
        self.x, self.topk_weights, self.active_ranks, self.out = slots
        self.args = struct("mep_combine_args_t", x=self.x.tensor, out=self.out.tensor)
