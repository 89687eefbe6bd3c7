"""The stream that a caller works on, found by the framework of an array and without importing it.

Streams are native handles as integers; 0 is the legacy default stream.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from typing import Any

from ._dlpack import GPU, exchange_api, root_modules
from ._lib import integer, shown

POINTER_BITS = 64

# device id -> the stream that is current there in this thread.
StreamFinder = Callable[[int], int]

_AskExchangeApi = ctypes.PYFUNCTYPE(
    ctypes.c_int, ctypes.c_int32, ctypes.c_int32, ctypes.POINTER(ctypes.c_void_p)
)
_finders: dict[type, StreamFinder | None] = {}


def stream_finder(array: object) -> StreamFinder | None:
    """Return what finds the current stream of an array's framework; None if nobody can tell."""
    array_type = type(array)
    try:
        return _finders[array_type]
    except KeyError:
        finder = _finders[array_type] = _find(array_type)
        return finder


def native_stream(stream: Any) -> int:
    """Take a caller's stream; what is none would be an address that a driver reads."""
    handle = integer(stream, "stream")
    if handle >> POINTER_BITS:
        raise ValueError(f"stream is {shown(handle)}; a native stream is in [0, 2**{POINTER_BITS})")
    return handle


def _find(array_type: type) -> StreamFinder | None:
    api = exchange_api(array_type)
    if api is not None and api.current_work_stream:
        return _by_exchange_api(api.current_work_stream)
    for root in root_modules(array_type):
        if root in _FINDERS:
            return _FINDERS[root](importlib.import_module(root))
    return None


def _by_exchange_api(function: int) -> StreamFinder:
    ask = _AskExchangeApi(function)

    def find(device_id: int) -> int:
        stream = ctypes.c_void_p()
        ask(GPU, device_id, stream)  # raises what the framework raised
        return stream.value or 0

    return find


def _torch(torch: Any) -> StreamFinder:
    return lambda device_id: int(torch.cuda.current_stream(device_id).cuda_stream)


def _cupy(cupy: Any) -> StreamFinder:
    return lambda device_id: int(cupy.cuda.get_current_stream(device_id).ptr)


_FINDERS: dict[str, Callable[[Any], StreamFinder]] = {"torch": _torch, "cupy": _cupy}
