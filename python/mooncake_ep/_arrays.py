"""Allocate outputs in the framework of the caller's arrays.

A framework is found by the module of the array's type and is imported already, since an array of it
exists. Nothing is imported in a call that was made once with the same types.
"""

from __future__ import annotations

import functools
import importlib
import math
from collections.abc import Callable
from typing import Any

from ._dlpack import CPU, TYPE_NAMES, Slot, dtype_key, strides_of
from ._ffi import ffi
from ._lib import lib

# Allocate an array of fixed dtype: (shape, strides in elements) -> array. The memory is not
# cleared.
Allocator = Callable[[tuple[int, ...], tuple[int, ...]], Any]

# The outputs of a dispatch, in the order of their structs.
OUTPUTS = ("x", "count", "src_info", "layout_range", "scales")

_SCALE_GROUP = lib.MEP_SCALE_GROUP
_OUTPUT_BYTES = len(OUTPUTS) * ffi.sizeof("mep_tensor_t")
_ALIGNMENT = 64  # bytes; what JAX asks of memory that it takes without a copy
_DLPACK_KINDS = "fiu"  # kinds of dtype that NumPy exports by DLPack


class Framework:
    """How to make outputs of one framework.

    allocator(dtype, device) makes an Allocator from Slot.dtype and Slot.words[1]; address(array) is
    where its data starts; finish, unless None, turns an array that the library has filled into what
    the caller gets.
    """

    def __init__(
        self,
        allocator: Callable[[int, int], Allocator],
        address: Callable[[Any], int],
        finish: Callable[[Any], Any] | None = None,
    ) -> None:
        """Bundle the three functions."""
        self.allocator = allocator
        self.address = address
        self.finish = finish


_frameworks: dict[type, Framework] = {}


def framework_of(array: object) -> Framework:
    """Find the framework of an array; TypeError if outputs like it cannot be allocated."""
    array_type = type(array)
    framework = _frameworks.get(array_type)
    if framework is None:
        framework = _frameworks[array_type] = _find(array)
    return framework


class OutputPlan:
    """How to allocate the outputs of one kind of dispatch: all but the data pointers is known.

    finish: as Framework.finish.
    """

    def __init__(
        self,
        framework: Framework,
        sizes: tuple[int, int, int, int],
        x_type: tuple[int, int],
        scale_layout: str | None,
    ) -> None:
        """Describe outputs for sizes (L, R, M, H) and the (dtype, device) of out_x.

        ``scale_layout``: "column", "row" or None, without scales.
        """
        local, ranks, tokens, hidden = sizes
        dtype, device = x_type
        rows, groups = ranks * tokens, hidden // _SCALE_GROUP
        scales = (local, rows, groups)
        scale_strides = (groups * rows, 1, rows) if scale_layout == "column" else strides_of(scales)
        x, matrix, ranges = (local, rows, hidden), (local, rows), (local, ranks)
        outputs = (
            (dtype, x, strides_of(x)),
            (dtype_key("int32"), (local,), (1,)),
            (dtype_key("int32"), matrix, strides_of(matrix)),
            (dtype_key("int64"), ranges, strides_of(ranges)),
            (dtype_key("float32"), scales, scale_strides),
        )
        self.finish = framework.finish
        self._address = framework.address
        self._has_scales = scale_layout is not None
        self._tensors = ffi.new("mep_tensor_t[]", len(OUTPUTS))
        self._slots = [Slot(self._tensors + index) for index in range(len(OUTPUTS))]
        self._make: list[Callable[[], Any]] = []
        for slot, (output_dtype, shape, strides) in zip(self._slots, outputs, strict=True):
            slot.describe(output_dtype, shape, strides, device)
            allocate = framework.allocator(output_dtype, device)
            self._make.append(functools.partial(allocate, shape, strides))

    def allocate(self, slots: list[Slot]) -> tuple[Any, Any, Any, Any, Any]:
        """Allocate arrays in the order of OUTPUTS and point ``slots``, side by side, at them."""
        address = self._address
        make_x, make_count, make_src_info, make_layout_range, make_scales = self._make
        x, count, src_info, layout_range = (
            make_x(),
            make_count(),
            make_src_info(),
            make_layout_range(),
        )
        ffi.memmove(slots[0].tensor, self._tensors, _OUTPUT_BYTES)
        slots[0].words[0] = address(x)
        slots[1].words[0] = address(count)
        slots[2].words[0] = address(src_info)
        slots[3].words[0] = address(layout_range)
        scales = None
        if self._has_scales:
            scales = make_scales()
            slots[4].words[0] = address(scales)
        return x, count, src_info, layout_range, scales


def _find(array: object) -> Framework:
    for base in type(array).__mro__:
        root = base.__module__.partition(".")[0]
        if root in _FACTORIES:
            return _FACTORIES[root]()
    if hasattr(array, "__array_namespace__"):
        return _array_api(array.__array_namespace__())
    raise TypeError(f"outputs like a {type(array).__name__} cannot be allocated: pass out=")


def _dtype_name(dtype: int) -> str:
    name = TYPE_NAMES.get((dtype & 0xFF, dtype >> 8 & 0xFF))
    if name is None:
        raise ValueError(
            f"x has DLPack type code {dtype & 0xFF} of {dtype >> 8 & 0xFF} bits; it must be "
            "bfloat16, float16, float32 or float8_e4m3fn"
        )
    return name


def _torch() -> Framework:
    torch = importlib.import_module("torch")

    def allocator(dtype: int, device: int) -> Allocator:
        place = torch.device("cpu") if device == CPU else torch.device("cuda", device >> 32)
        torch_dtype = getattr(torch, _dtype_name(dtype))
        return functools.partial(torch.empty_strided, dtype=torch_dtype, device=place)

    return Framework(allocator, torch.Tensor.data_ptr)


def _numpy(finish: Callable[[Any], Any] | None = None) -> Framework:
    numpy = importlib.import_module("numpy")

    def allocator(dtype: int, device: int) -> Allocator:
        if device != CPU:
            raise TypeError("outputs on this device cannot be allocated: pass out=")
        numpy_dtype = _numpy_dtype(numpy, _dtype_name(dtype))
        size = numpy_dtype.itemsize

        def allocate(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
            memory = numpy.empty(math.prod(shape) * size + _ALIGNMENT, numpy.uint8)
            start = -address(memory) % _ALIGNMENT
            byte_strides = tuple(stride * size for stride in strides)
            return numpy.ndarray(shape, numpy_dtype, memory, start, byte_strides)

        return allocate

    def address(array: Any) -> int:
        return int(array.__array_interface__["data"][0])

    return Framework(allocator, address, finish)


def _numpy_dtype(numpy: Any, name: str) -> Any:
    """Find a NumPy dtype; without ml_dtypes, float8_e4m3fn is the bytes."""
    if name not in ("bfloat16", "float8_e4m3fn"):
        return numpy.dtype(name)
    try:
        return numpy.dtype(getattr(importlib.import_module("ml_dtypes"), name))
    except ModuleNotFoundError:
        return numpy.dtype("uint8" if name == "float8_e4m3fn" else "uint16")


def _jax() -> Framework:
    """Make JAX arrays: the library fills NumPy arrays, and JAX takes their memory over.

    It does so without a copy where it can. int64 stays NumPy unless jax_enable_x64 is on, because
    JAX would cut it down to int32.
    """
    jax = importlib.import_module("jax")

    def finish(array: Any) -> Any:
        if array.dtype.name == "int64" and not jax.config.jax_enable_x64:
            return array
        take = jax.numpy.from_dlpack if array.dtype.kind in _DLPACK_KINDS else jax.numpy.asarray
        return take(array)

    return _numpy(finish)


def _array_api(namespace: Any) -> Framework:
    """Serve any other framework by the array API standard; what NumPy cannot export stays NumPy."""

    def finish(array: Any) -> Any:
        return namespace.from_dlpack(array) if array.dtype.kind in _DLPACK_KINDS else array

    return _numpy(finish)


_FACTORIES: dict[str, Callable[[], Framework]] = {
    "torch": _torch,
    "numpy": _numpy,
    "jax": _jax,
    "jaxlib": _jax,
}
