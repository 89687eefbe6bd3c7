"""Borrow the memory of a caller's array as a mep_tensor_t, whatever framework made it.

Three ways, the fastest first, chosen once per type:
  1. DLPack's C exchange API (torch): one call fills the struct. Only through ctypes.PYFUNCTYPE: the
     function runs Python code, and cffi would release the GIL around it.
  2. The attributes of NumPy and CuPy arrays: NumPy cannot export bfloat16 or float8 by DLPack, but
     names them.
  3. __dlpack__(). The capsule is never renamed to "used_dltensor", so the tensor is never ours: the
     capsule's own destructor gives it back.

The first two leave the order of streams to the caller. The third tells the producer our stream, and
the producer makes that wait for the array.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

from ._ffi import ffi

# DLPack's (code, bits) of a type, with its name in NumPy, ml_dtypes and torch.
TYPE_NAMES: dict[tuple[int, int], str] = {
    (0, 32): "int32",
    (0, 64): "int64",
    (1, 8): "uint8",
    (2, 16): "float16",
    (2, 32): "float32",
    (2, 64): "float64",
    (4, 16): "bfloat16",
    (10, 8): "float8_e4m3fn",
}
_TYPE_CODES = {name: code_bits for code_bits, name in TYPE_NAMES.items()}
_KIND_CODES = {"i": 0, "u": 1, "f": 2, "c": 5, "b": 6}
CPU = 1  # Slot.words[1] of host memory: device_type | device_id << 32
GPU = 2  # device_type of CUDA, and of MetaX
LEGACY_STREAM = 1  # a GPU's legacy default stream, as DLPack calls it
_DIMENSION_COUNT_MAX = 8  # of a NumPy array that we describe; the library takes at most 3
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_EXCHANGE_API_MAJOR = 1
_TENSOR_BYTES = ffi.sizeof("mep_tensor_t")
_DTYPE_WORD = ffi.offsetof("mep_tensor_t", "dtype") // 4

_get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_FromPyObject = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p)


class _ExchangeApi(ctypes.Structure):
    """DLPackExchangeAPI: version, the next older table, five functions."""


_ExchangeApi._fields_ = [
    ("major", ctypes.c_uint32),
    ("minor", ctypes.c_uint32),
    ("previous", ctypes.POINTER(_ExchangeApi)),
    ("allocate", ctypes.c_void_p),
    ("managed_from_py_object", ctypes.c_void_p),
    ("managed_to_py_object", ctypes.c_void_p),
    ("tensor_from_py_object", ctypes.c_void_p),
    ("current_work_stream", ctypes.c_void_p),
]


class _VersionedHeader(ctypes.Structure):
    """DLManagedTensorVersioned up to its DLTensor."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
    )


class Slot:
    """One mep_tensor_t, filled again and again.

    tensor: the struct; address: where it is; words: the struct as 64-bit words, words[0] its data
    pointer, words[1] its device.
    """

    __slots__ = ("_extents", "_halves", "address", "tensor", "words")

    def __init__(self, tensor: Any) -> None:
        """Wrap a ``mep_tensor_t *`` whose memory somebody else keeps alive."""
        self.tensor = tensor
        self.address = int(ffi.cast("uintptr_t", tensor))
        view = memoryview(ffi.buffer(tensor, _TENSOR_BYTES)).cast("B")
        self.words = view.cast("Q")
        self._halves = view.cast("I")
        self._extents = ffi.new("int64_t[]", 2 * _DIMENSION_COUNT_MAX)

    @property
    def dtype(self) -> int:
        """Code, bits << 8 and lanes << 16 in one number: a key."""
        key: int = self._halves[_DTYPE_WORD]
        return key

    def describe(
        self, dtype: int, shape: tuple[int, ...], strides: tuple[int, ...], device: int = CPU
    ) -> None:
        """Fill all but the data pointer; ``dtype`` as the property, strides in elements."""
        count = len(shape)
        if count > _DIMENSION_COUNT_MAX:
            raise ValueError(f"it has {count} dimensions")
        self._extents[0:count] = shape
        self._extents[_DIMENSION_COUNT_MAX : _DIMENSION_COUNT_MAX + count] = strides
        tensor = self.tensor
        tensor.ndim = count
        tensor.shape = self._extents
        tensor.strides = self._extents + _DIMENSION_COUNT_MAX
        tensor.byte_offset = 0
        self.words[1] = device
        self._halves[_DTYPE_WORD] = dtype


def strides_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Row-major strides, in elements."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * shape[axis]
    return tuple(strides)


def dtype_key(name: str) -> int:
    """Slot.dtype of a type by its name in TYPE_NAMES."""
    code, bits = _TYPE_CODES[name]
    return code | bits << 8 | 1 << 16


# Fills a slot from an array and returns what must live as long as the slot's content is used.
# The last two arguments: whether the library will write to the array, and on which stream (as in
# borrow()).
_Borrower = Callable[[Any, Slot, bool, int | None], object]
_borrowers: dict[type, _Borrower] = {}
# Those of types with the exchange API, which take (array, Slot.address): one call less.
_fillers: dict[type, Callable[[Any, int], int]] = {}


def borrow(
    name: str, array: object, slot: Slot, writable: bool = False, stream: int | None = None
) -> object:
    """Point ``slot`` at an array; ``writable``: the library will write to it.

    ``stream``: the native stream that it will work on, None on the CPU. The array and the returned
    object must be kept for as long as the slot is used. TypeError if it is no array, ValueError if
    its memory cannot be borrowed or is read-only; both name it.
    """
    fill = _fillers.get(type(array))
    try:
        if fill is not None:
            return fill(array, slot.address)
        borrower = _borrowers.get(type(array))
        if borrower is not None:
            return borrower(array, slot, writable, stream)
    except Exception as error:  # of any type: it comes from the code of a framework
        kind = TypeError if isinstance(error, TypeError) else ValueError
        reason = str(error).partition("\n")[0]  # torch adds a C++ trace
        raise kind(f"{name}: {reason}") from error
    _find_borrower(name, type(array))
    return borrow(name, array, slot, writable, stream)


def root_modules(array_type: type) -> Iterator[str]:
    """Name the packages that a type and its bases come from, e.g. "torch"."""
    for base in array_type.__mro__:
        yield base.__module__.partition(".")[0]


def exchange_api(array_type: type) -> Any:
    """Return the C exchange API of a type as a struct, or None."""
    capsule = getattr(array_type, "__dlpack_c_exchange_api__", None)
    if capsule is None or not _is_valid(capsule, b"dlpack_exchange_api"):
        return None
    pointer = _get_pointer(capsule, b"dlpack_exchange_api")
    table = ctypes.cast(pointer, ctypes.POINTER(_ExchangeApi))
    while table and table.contents.major > _EXCHANGE_API_MAJOR:
        table = table.contents.previous
    return table.contents if table else None


def _find_borrower(name: str, array_type: type) -> None:
    """Choose how to borrow arrays of a type, for all calls to come."""
    api = exchange_api(array_type)
    roots = set(root_modules(array_type))
    borrower: _Borrower
    if api is not None and api.tensor_from_py_object:
        fill = _fillers[array_type] = _FromPyObject(api.tensor_from_py_object)

        def borrower(array: object, slot: Slot, _writable: bool, _stream: int | None) -> object:
            return fill(array, slot.address)

    elif not hasattr(array_type, "__dlpack__"):
        raise TypeError(f"{name} is a {array_type.__name__}, not an array: it has no __dlpack__")
    elif "numpy" in roots:
        borrower = _borrow_numpy
    elif "cupy" in roots:
        borrower = _borrow_cupy
    else:
        borrower = _borrow_jax if roots & {"jax", "jaxlib"} else _borrow_capsule
    _borrowers[array_type] = borrower


def _borrow_numpy(array: Any, slot: Slot, writable: bool, _stream: int | None) -> object:
    interface = array.__array_interface__
    address, read_only = interface["data"]
    if writable and read_only:
        raise ValueError("the array is read-only")
    _describe(array, slot, CPU)
    slot.words[0] = address
    return interface


def _borrow_cupy(array: Any, slot: Slot, _writable: bool, _stream: int | None) -> object:
    _describe(array, slot, GPU | array.device.id << 32)
    slot.words[0] = array.data.ptr
    return array


def _describe(array: Any, slot: Slot, device: int) -> None:
    """Fill all but the data pointer from an array with NumPy's attributes."""
    dtype = array.dtype
    if not dtype.isnative:
        raise ValueError(f"dtype {dtype} is not in this machine's byte order")
    size = dtype.itemsize
    if dtype.kind in _KIND_CODES:
        code, bits = _KIND_CODES[dtype.kind], size * 8
    elif dtype.name in _TYPE_CODES:
        code, bits = _TYPE_CODES[dtype.name]
    else:
        raise ValueError(f"dtype {dtype} is not supported")
    if any(stride % size for stride in array.strides):
        raise ValueError(f"strides {array.strides} are not multiples of {size} bytes")
    strides = tuple(stride // size for stride in array.strides)
    if not array.size:  # NumPy sets all strides of an empty array to 0, which is not row-major
        strides = strides_of(array.shape)
    slot.describe(code | bits << 8 | 1 << 16, array.shape, strides, device)


def _borrow_jax(array: Any, slot: Slot, writable: bool, stream: int | None) -> object:
    if writable:
        raise ValueError("JAX arrays are immutable")
    return _borrow_capsule(array.block_until_ready(), slot, writable, stream)


def _borrow_capsule(array: Any, slot: Slot, writable: bool, stream: int | None) -> object:
    options: dict[str, int] = {}
    # Host memory has no streams; the library then says that it cannot be used.
    if stream is not None and array.__dlpack_device__()[0] != CPU:
        options["stream"] = stream or LEGACY_STREAM
    try:
        capsule = array.__dlpack__(max_version=(1, 1), **options)
    except TypeError:  # a producer from before DLPack 1.0
        capsule = array.__dlpack__(**options)
    if _is_valid(capsule, b"dltensor_versioned"):
        address = _get_pointer(capsule, b"dltensor_versioned")
        header = _VersionedHeader.from_address(address)
        if header.major != 1:
            raise ValueError(f"it speaks DLPack {header.major}.{header.minor}")
        if writable and header.flags & _READ_ONLY:
            raise ValueError("the array is read-only")
        address += ctypes.sizeof(_VersionedHeader)
    else:
        try:
            address = _get_pointer(capsule, b"dltensor")
        except ValueError:
            kind = type(capsule).__name__
            raise ValueError(f"its __dlpack__() gave a {kind}, no unused DLPack capsule") from None
    ctypes.memmove(slot.address, address, _TENSOR_BYTES)
    return capsule
