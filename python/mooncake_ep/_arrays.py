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

from ._dlpack import CPU, TYPE_NAMES, Slot, dtype_key, root_modules, strides_of
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
    """How to make outputs of one framework on one device.

    allocator(dtype) makes an Allocator from Slot.dtype, or returns None if the framework has no
    such type; address(array) is where its data starts; finish, unless None, turns an array that the
    library has filled into what the caller gets; strided: whether its arrays have strides.
    """

    def __init__(
        self,
        allocator: Callable[[int], Allocator | None],
        address: Callable[[Any], int],
        finish: Callable[[Any], Any] | None = None,
        strided: bool = True,
    ) -> None:
        """Bundle the functions."""
        self.allocator = allocator
        self.address = address
        self.finish = finish
        self.strided = strided


_frameworks: dict[tuple[type, int], Framework] = {}


def framework_of(array: object, device: int) -> Framework:
    """Find the framework of an array on a device (Slot.words[1]).

    TypeError if outputs like it cannot be allocated.
    """
    key = (type(array), device)
    framework = _frameworks.get(key)
    if framework is None:
        framework = _frameworks[key] = _find(array, device)
    return framework


class OutputPlan:
    """How to allocate the outputs of one kind of dispatch: all but the data pointers is known.

    finish: as Framework.finish; has_scales, has_layout_range: whether there are such outputs.
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
        scale_strides = strides_of(scales)
        if scale_layout == "column" and framework.strided:
            scale_strides = (groups * rows, 1, rows)
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
        self.has_scales = scale_layout is not None
        self._tensors = ffi.new("mep_tensor_t[]", len(OUTPUTS))
        self._slots = [Slot(self._tensors + index) for index in range(len(OUTPUTS))]
        self._make: list[Any] = []
        for slot, (output_dtype, shape, strides) in zip(self._slots, outputs, strict=True):
            slot.describe(output_dtype, shape, strides, device)
            allocate = framework.allocator(output_dtype)
            self._make.append(allocate and functools.partial(allocate, shape, strides))
        self.has_layout_range = self._make[3] is not None

    def describe(self, slots: list[Slot]) -> None:
        """Let ``slots``, side by side, say of the outputs all but where they are."""
        ffi.memmove(slots[0].tensor, self._tensors, _OUTPUT_BYTES)

    def allocate(self, slots: list[Slot]) -> tuple[Any, Any, Any, Any, Any]:
        """Allocate x, scales, count, src_info, layout_range; point described ``slots`` at them."""
        address = self._address
        make_x, make_count, make_src_info, make_layout_range, make_scales = self._make
        x, count, src_info = make_x(), make_count(), make_src_info()
        slots[0].words[0] = address(x)
        slots[1].words[0] = address(count)
        slots[2].words[0] = address(src_info)
        layout_range = scales = None
        if self.has_layout_range:
            layout_range = make_layout_range()
            slots[3].words[0] = address(layout_range)
        if self.has_scales:
            scales = make_scales()
            slots[4].words[0] = address(scales)
        return x, scales, count, src_info, layout_range


def _find(array: object, device: int) -> Framework:
    for root in root_modules(type(array)):
        if root in _FACTORIES:
            return _FACTORIES[root](device)
    if device == CPU and hasattr(array, "__array_namespace__"):
        return _array_api(array.__array_namespace__())
    raise TypeError(f"x: outputs like a {type(array).__name__} cannot be allocated: pass out=")


def _dtype_name(dtype: int) -> str:
    name = TYPE_NAMES.get((dtype & 0xFF, dtype >> 8 & 0xFF))
    if name is None:
        raise ValueError(
            f"x has DLPack type code {dtype & 0xFF} of {dtype >> 8 & 0xFF} bits; it must be "
            "bfloat16, float16, float32 or float8_e4m3fn"
        )
    return name


def _torch(device: int) -> Framework:
    torch = importlib.import_module("torch")
    place = torch.device("cpu") if device == CPU else torch.device("cuda", device >> 32)

    def allocator(dtype: int) -> Allocator:
        torch_dtype = getattr(torch, _dtype_name(dtype))
        return functools.partial(torch.empty_strided, dtype=torch_dtype, device=place)

    return Framework(allocator, torch.Tensor.data_ptr)


def _numpy(device: int, finish: Callable[[Any], Any] | None = None) -> Framework:
    if device != CPU:
        raise TypeError("a NumPy array is not on a GPU")
    numpy = importlib.import_module("numpy")

    def allocator(dtype: int) -> Allocator:
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


def _cupy(device: int) -> Framework:
    """Make CuPy arrays; float8_e4m3fn, which CuPy does not have, is the bytes."""
    cupy = importlib.import_module("cupy")

    def allocator(dtype: int) -> Allocator:
        name = _dtype_name(dtype)
        cupy_dtype = _numpy_dtype(cupy, "uint8" if name == "float8_e4m3fn" else name)
        size = cupy_dtype.itemsize

        def allocate(shape: tuple[int, ...], strides: tuple[int, ...]) -> Any:
            with cupy.cuda.Device(device >> 32):
                memory = cupy.cuda.alloc(math.prod(shape) * size)
            byte_strides = tuple(stride * size for stride in strides)
            return cupy.ndarray(shape, cupy_dtype, memory, byte_strides)

        return allocate

    return Framework(allocator, lambda array: int(array.data.ptr))


def _jax(device: int) -> Framework:
    """Make JAX arrays.

    On the CPU the library fills NumPy arrays, and JAX takes their memory over, without a copy where
    it can; int64 stays NumPy unless jax_enable_x64 is on, because JAX would cut it down to int32.
    """
    jax = importlib.import_module("jax")
    if device != CPU:
        return _jax_on_gpu(jax, device >> 32)

    place = jax.local_devices(backend="cpu")[0]

    def finish(array: Any) -> Any:
        if array.dtype.name == "int64" and not jax.config.jax_enable_x64:
            return array
        if array.dtype.kind in _DLPACK_KINDS:
            return jax.numpy.from_dlpack(array)
        return jax.device_put(array, place)  # asarray() may choose a GPU

    return _numpy(device, finish)


def _jax_on_gpu(jax: Any, device_id: int) -> Framework:
    """Make JAX arrays that the library fills before anybody else has seen them."""
    place = next(one for one in jax.local_devices() if one.local_hardware_id == device_id)

    def allocator(dtype: int) -> Allocator | None:
        name = _dtype_name(dtype)
        if name == "int64" and not jax.config.jax_enable_x64:
            return None

        def allocate(shape: tuple[int, ...], _strides: tuple[int, ...]) -> Any:
            # Once it is ready JAX does nothing with it any more.
            return jax.numpy.zeros(shape, name, device=place).block_until_ready()

        return allocate

    return Framework(allocator, lambda array: int(array.unsafe_buffer_pointer()), strided=False)


def _array_api(namespace: Any) -> Framework:
    """Serve any other framework by the array API standard; what NumPy cannot export stays NumPy."""

    def finish(array: Any) -> Any:
        return namespace.from_dlpack(array) if array.dtype.kind in _DLPACK_KINDS else array

    return _numpy(CPU, finish)


_FACTORIES: dict[str, Callable[[int], Framework]] = {
    "torch": _torch,
    "numpy": _numpy,
    "cupy": _cupy,
    "jax": _jax,
    "jaxlib": _jax,
}
