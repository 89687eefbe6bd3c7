"""Values that make no sense as arguments, and how a call has to refuse them."""

from __future__ import annotations

import array
import contextlib
import ctypes
import decimal
import importlib
import math
import os
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

import mooncake_ep as ep

TOKENS, HIDDEN, TOPK = 3, 128, 2  # of the arrays that others bring


def examples(count: int) -> settings:
    """Draw so many examples, unless the environment says how many."""
    wanted = os.environ.get("MEP_TEST_EXAMPLES")
    return settings(max_examples=int(wanted or count), derandomize=wanted is None, database=None)


# ---- Arrays --------------------------------------------------------------------------------------

ARENA_BYTES = 1 << 16


class NotApplicable(Exception):
    """The argument cannot be spoiled so."""


class Nonsense:
    """What to give instead of a valid argument, where the others are ``others``."""

    def __init__(self, label: str, make: Callable[[Any, dict[str, Any]], Any]) -> None:
        self._label, self._make = label, make

    def make(self, valid: Any, others: dict[str, Any]) -> Any:
        try:
            return self._make(valid, others)
        except (TypeError, ValueError, BufferError) as error:
            raise NotApplicable from error

    def __repr__(self) -> str:
        return self._label


def in_arena(
    dtype: Any, shape: tuple[int, ...], offset: int = 0, memory: np.ndarray | None = None
) -> np.ndarray:
    """Make an array ``offset`` bytes into memory that others may share; by default into new."""
    if memory is None:
        whole = np.zeros(ARENA_BYTES + 64, np.uint8)
        memory = whole[-whole.ctypes.data % 64 :][:ARENA_BYTES]
    return np.ndarray(shape, dtype, memory, offset)


def scalar(value: Any) -> Nonsense:
    try:
        written = f"{value!r:.60}"
    except Exception:
        written = "that is not written"
    return Nonsense(f"{type(value).__name__} {written}", lambda _, __: value)


def retyped(dtype: Any) -> Nonsense:
    return Nonsense(f"of type {dtype}", lambda valid, _: np.zeros(valid.shape, dtype))


def other(dtype: Any, shape: list[int]) -> Nonsense:
    return Nonsense(f"zeros({shape}, {dtype})", lambda _, __: np.zeros(shape, dtype))


def alias(of: str, offset: int) -> Nonsense:
    return Nonsense(
        f"in the memory of {of}, from {offset}",
        lambda valid, others: in_arena(valid.dtype, valid.shape, offset, others[of].base),
    )


def filled(array: np.ndarray, byte: int) -> np.ndarray:
    return np.full(array.nbytes, byte, np.uint8).view(array.dtype).reshape(array.shape)


def strided(array: np.ndarray, shape: tuple[int, ...], strides: tuple[int, ...]) -> np.ndarray:
    return np.lib.stride_tricks.as_strided(array, shape, strides)


# Offsets in a DLTensor.
_DEVICE, _NDIM, _LANES, _SHAPE = 8, 16, 22, 24


class Lying:
    """Says that it is an array, and is not."""

    def __init__(self, answer: Any, device: Any = (1, 0)) -> None:
        self._answer, self._device = answer, device

    def __dlpack__(self, **_: Any) -> Any:
        if isinstance(self._answer, type) and issubclass(self._answer, Exception):
            raise self._answer("no")
        return self._answer

    def __dlpack_device__(self) -> Any:
        return self._device


class Stubborn:
    """Raises, whatever it is asked for."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise KeyError("no")

    __bool__ = __index__ = __int__ = __float__ = __len__ = __iter__ = __next__ = _refuse
    __hash__ = __eq__ = __gt__ = __lt__ = __repr__ = __str__ = _refuse
    __getitem__ = __fspath__ = __array__ = __dlpack__ = __dlpack_device__ = _refuse


class Proxy:
    """Speaks DLPack and nothing else; gives its capsule once if it is ``kept``."""

    def __init__(self, inner: np.ndarray, kept: bool) -> None:
        self._inner, self._capsule = inner, inner.__dlpack__() if kept else None

    def __dlpack__(self, **options: Any) -> Any:
        return self._capsule or self._inner.__dlpack__(**options)

    def __dlpack_device__(self) -> Any:
        return (1, 0)


def dl_tensor(proxy: Proxy) -> int:
    """Return the address of the DLTensor in a kept capsule."""
    get_pointer = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
        ("PyCapsule_GetPointer", ctypes.pythonapi)
    )
    address: int = get_pointer(proxy.__dlpack__(), b"dltensor")
    return address


def forged(array: np.ndarray, offset: int, kind: type, value: int) -> Proxy:
    """Return an array whose DLTensor says something else at an offset."""
    proxy = Proxy(array, True)
    kind.from_address(dl_tensor(proxy) + offset).value = value
    return proxy


def negative(array: np.ndarray) -> Proxy:
    """Return an array that says that its first extent is negative."""
    proxy = Proxy(array, True)
    shape = ctypes.c_uint64.from_address(dl_tensor(proxy) + _SHAPE).value
    ctypes.c_int64.from_address(shape).value = -len(array)
    return proxy


def used() -> Proxy:
    """Return an array whose capsule NumPy has taken over."""
    proxy = Proxy(np.zeros((TOKENS, HIDDEN), np.float32), True)
    np.from_dlpack(proxy)
    return proxy


TWISTS: dict[str, Callable[[np.ndarray], Any]] = {
    "as a list": lambda a: a.tolist(),
    "as a memoryview": lambda a: memoryview(a.view(np.uint8)),
    "as bytes": lambda a: a.tobytes(),
    "as a tuple": lambda a: (a,),
    "as a triple": lambda a: (a, a, a),
    "as a matrix": lambda a: np.asmatrix(a.reshape(len(a), -1)),
    "as a scalar": lambda a: a.ravel()[0],
    "masked": lambda a: np.ma.masked_array(a),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "broadcast": lambda a: np.broadcast_to(a[:1], a.shape),
    "by column": np.asfortranarray,
    "transposed": lambda a: a.T,
    "backwards": lambda a: a[::-1],
    "mirrored": lambda a: a[..., ::-1],
    "every second": lambda a: a[::2],
    "every second of more": lambda a: a.repeat(2, -1)[..., ::2],
    "too short": lambda a: a[:-1],
    "too narrow": lambda a: a[..., :-1].copy(),
    "too long": lambda a: np.concatenate([a, a]),
    "too wide": lambda a: np.concatenate([a, a], -1),
    "empty": lambda a: a[:0],
    "without width": lambda a: a[..., :0],
    "flat": np.ravel,
    "deeper": lambda a: a[None],
    "deepest": lambda a: a.reshape((1,) * 12 + a.shape),
    "without dimensions": lambda a: a.ravel()[:1].reshape(()),
    "read-only": lambda a: np.frombuffer(a.tobytes(), a.dtype).reshape(a.shape),
    "unaligned": lambda a: in_arena(a.dtype, a.shape, 2),
    "oddly placed": lambda a: in_arena(a.dtype, a.shape, 1),
    "huge": lambda a: strided(a, (2**40, *a.shape[1:]), a.strides),
    "overlapping": lambda a: strided(a, a.shape, (16,) * a.ndim),
    "on a GPU": lambda a: forged(a, _DEVICE, ctypes.c_int32, 2),
    "of negative size": negative,
    "of NaN or -1": lambda a: filled(a, 0xFF),
    "of the largest": lambda a: filled(a, 0x7F),
}
NEVER = ("on a GPU", "of negative size")  # may be taken
DTYPES = (
    *("f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u8", "?", "c8", "G", "O", "S3"),
    *("U1", "V2", "V0", "M8[s]", "i4,f4", ">f4", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn),
    *(ml_dtypes.float8_e5m2, ml_dtypes.int4),
)


def foreign() -> Iterator[Any]:
    """Yield arrays of other libraries, if they are there."""
    with contextlib.suppress(ImportError):
        torch = importlib.import_module("torch")
        ones = torch.ones(TOKENS, HIDDEN, dtype=torch.bfloat16)
        yield from (ones, ones.to("meta"), ones.to_sparse(), torch.nn.Parameter(ones))
        yield from (ones.to(torch.complex64).conj(), ones.expand(2, TOKENS, HIDDEN))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield torch.quantize_per_tensor(ones.float(), 1.0, 0, torch.qint8)
    with contextlib.suppress(ImportError):
        jax = importlib.import_module("jax")
        yield from (jax.numpy.ones((TOKENS, HIDDEN)), jax.numpy.zeros((TOKENS, TOPK), int))


LIES = (
    *((_DEVICE, ctypes.c_int32, 99), (_NDIM, ctypes.c_int32, -1), (_NDIM, ctypes.c_int32, 1 << 30)),
    *((_LANES, ctypes.c_uint16, 4), (_SHAPE, ctypes.c_uint64, 0)),
)
SCALARS = (
    *(None, True, False, 0, 1, -1, 2, 127, 2**31 - 1, 2**31, 2**32, 2**63, -(2**63), 2**64, 2**200),
    *(0.0, 1.5, -1e300, 1e-320, 1e18, math.inf, -math.inf, math.nan, 1j, decimal.Decimal(1)),
    *("", "x", "fp8", "cpu", "row", "\0", "\ud800", "9" * 5000, b"", b"fp8", b"\0" * 128),
    *([], (), {}, set(), [None], (None, None), {"x": 1}, range(3), object(), object, ..., len),
    *(10**5000, -(10**5000), decimal.Decimal("NaN"), decimal.Decimal("sNaN"), np.float32(1.5)),
    *(Stubborn(), (None,), [Stubborn()], "bf16", ["bf16", []], b"/\0", [[1, 2]], [np.ones(2)]),
    *(np.float32(1), np.int64(-1), np.array(1), np.array([1, 2]), np.array(["fp8"], object)),
    *(bytearray(8), memoryview(b"12345678"), array.array("f", [1.0]), (ctypes.c_float * 4)()),
    *(Lying(None), Lying(7), Lying("capsule"), Lying(object()), Lying(ValueError)),
    *(Lying(BufferError), Lying(TypeError), Lying(KeyError), Lying(None, None), used()),
    *(forged(np.zeros((TOKENS, HIDDEN), "f4"), *lie) for lie in LIES),
    *(Proxy(np.zeros((TOKENS, HIDDEN), "f4"), kept) for kept in (True, False)),
)  # fmt: skip

EVERY_SCALAR = [scalar(value) for value in SCALARS]
EVERY_ARRAY = [
    *(Nonsense(label, lambda a, _, twist=twist: twist(a)) for label, twist in TWISTS.items()),
    *(retyped(dtype) for dtype in DTYPES),
    *(scalar(array) for array in foreign()),
]
scalars = st.sampled_from(EVERY_SCALAR)
arrays = st.one_of(
    st.sampled_from(EVERY_ARRAY),
    st.builds(
        other,
        st.sampled_from(DTYPES),
        st.lists(st.sampled_from((0, 1, 2, 3, 4, 5, 16, 128, 136)), max_size=4),
    ),
    st.builds(
        alias,
        st.sampled_from(("x", "topk_idx", "topk_weights")),
        st.integers(0, 63).map(lambda n: 16 * n),
    ),
)


# ---- Refusals ------------------------------------------------------------------------------------

REFUSALS = (ValueError, TypeError, NotImplementedError, MemoryError, ep.EpError)

# How the text of a refusal may name an argument, besides as the caller does: by what it is, or by
# what it has to agree with.
NAMES = {
    "x": "x_scales|topk_idx|quant|out",
    "x_scales": "x",
    "topk_idx": "topk_weights",
    "quant": "out",
    "payloads": "payload",
    "active_ranks": "rank_count",
    "unique_id": "unique id",
    "rank_count": "ranks|all_gather",
    "only": "NIC filter",
    "saved": "topology",
    "matrix": "nvidia-smi",
    "root": "cannot read",
}


def is_named(argument: str, error: Exception) -> bool:
    """Tell whether a call may refuse an argument like this."""
    names = f"{re.escape(argument)}|{NAMES.get(argument, argument)}"
    return isinstance(error, REFUSALS) and bool(re.search(rf"(?<!\w)({names})(?!\w)", str(error)))
