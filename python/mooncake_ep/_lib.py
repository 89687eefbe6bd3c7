"""libmooncake_ep, loaded; its status codes, as exceptions.

The only module that turns a failed call into an exception. The library lies beside this file;
MOONCAKE_EP_LIBRARY names another one.
"""

from __future__ import annotations

import math
import operator
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ._ffi import ffi

lib: Any = ffi.dlopen(
    os.environ.get("MOONCAKE_EP_LIBRARY") or str(Path(__file__).with_name("libmooncake_ep.so"))
)

BACKENDS: dict[str, int] = {
    "cpu": lib.MEP_BACKEND_CPU,
    "cuda": lib.MEP_BACKEND_CUDA,
    "maca": lib.MEP_BACKEND_MACA,
}

# A longer timeout than this is no timeout; it also keeps microseconds far from 2**63.
_TIMEOUT_S_MAX = 1e9
_INT32_END = 2**31
_SHOWN_LENGTH_MAX = 80  # characters of a value in a message

# What a message of the library calls an argument, and what callers of Python know it by.
_ARGUMENTS = {
    "token_count_max": "max_tokens",
    "expert_count": "experts",
    "topk_max": "topk",
    "payload_types": "payloads",
    "rounds_in_flight_max": "rounds_in_flight",
    "cpu_thread_count": "threads",
    "sm_count_max": "max_sms",
}
_FIELD = re.compile(r"\bconfig\.(\w+)")
_OUTPUT = re.compile(r"\bout_(?=(x|count|src_info|layout_range|scales)\b)")


class EpError(RuntimeError):
    """A call into libmooncake_ep failed.

    status: name of the C status, e.g. "MEP_INVALID_STATE".
    """

    def __init__(self, message: str, status: str = "MEP_INVALID_STATE") -> None:
        """Describe a failure by the library's message and its status."""
        super().__init__(message)
        self.status = status


class PeerFailedError(EpError):
    """A peer missed its deadline and is masked out of the buffer from now on.

    result: what the call would have returned, without the lost peer's contribution; of a call with
    ``send_only=True`` the pending round, which still has to be received.
    """

    result: Any = None


class EpTimeoutError(EpError, TimeoutError):
    """A collective step of set-up missed its deadline."""


_BUILTIN: dict[int, type[Exception]] = {
    lib.MEP_INVALID_ARGUMENT: ValueError,
    lib.MEP_UNSUPPORTED: NotImplementedError,
    lib.MEP_OUT_OF_MEMORY: MemoryError,
}
_OURS: dict[int, type[EpError]] = {
    lib.MEP_PEER_FAILED: PeerFailedError,
    lib.MEP_TIMEOUT: EpTimeoutError,
}


def text(characters: Any) -> str:
    """Decode a C string of the library."""
    return str(ffi.string(characters).decode(errors="replace"))


def failure(status: int) -> Exception:
    """Make the exception that this thread's last failed call stands for."""
    message = text(lib.mep_last_error())
    message = _FIELD.sub(lambda field: _ARGUMENTS.get(field[1], field[1]), message)
    message = _OUTPUT.sub("out.", message)
    if status in _BUILTIN:
        return _BUILTIN[status](message)
    return _OURS.get(status, EpError)(message, text(lib.mep_status_name(status)))


def check(status: int) -> None:
    """Raise the exception that a failed status stands for."""
    if status != 0:
        raise failure(status)


def struct(type_name: str, **fields: Any) -> Any:
    """Make a zeroed C struct with struct_size and the given fields set."""
    value = ffi.new(f"{type_name} *")
    value.struct_size = ffi.sizeof(type_name)
    for name, field in fields.items():
        setattr(value, name, field)
    return value


# ---- Arguments -----------------------------------------------------------------------------------
# Each of these takes what a caller gave as argument ``name``, and refuses it by that name.


def shown(value: object) -> str:
    """Write a value for a message: not too long, and whatever its repr() does."""
    try:
        written = repr(value)
    except Exception:  # e.g. an int of more digits than Python writes
        return f"of type {type(value).__name__}"
    return written if len(written) <= _SHOWN_LENGTH_MAX else f"{written[:_SHOWN_LENGTH_MAX]}..."


def wrong_type(value: object, name: str, rule: str) -> TypeError:
    """Make the exception for an argument of a type that breaks a rule, e.g. "not a str"."""
    return TypeError(f"{name} is a {type(value).__name__}, {rule}")


def integer(value: Any, name: str) -> int:
    """Take an integer; a float is none, also if it has no fraction."""
    try:
        return operator.index(value)
    except Exception:
        raise wrong_type(value, name, "not an integer") from None


def int32(value: Any, name: str) -> int:
    """Take an integer that the library, which knows its rules, can be given."""
    number = integer(value, name)
    if not -_INT32_END <= number < _INT32_END:
        raise ValueError(f"{name} is {shown(number)}; it must fit an int32")
    return number


def truth_value(value: Any, name: str) -> bool:
    """Take what is true or false, which e.g. an array of two elements is not."""
    try:
        return bool(value)
    except Exception as error:
        raise wrong_type(value, name, "neither true nor false") from error


def listed(values: Iterable[Any], name: str, what: str) -> list[Any]:
    """List what is in a sequence; a text is none of its characters, a mapping none of its keys."""
    rule = f"not a sequence of {what}"
    if isinstance(values, str | Mapping):
        raise wrong_type(values, name, rule)
    try:
        return list(values)
    except Exception as error:
        raise wrong_type(values, name, rule) from error


def truth_values(values: Iterable[Any], name: str, count: int | None = None) -> list[bool]:
    """Take a sequence of truth values, of ranks; ``count``: of how many, None: of any number."""
    members = [
        truth_value(value, f"{name}[{rank}]")
        for rank, value in enumerate(listed(values, name, "truth values"))
    ]
    if count is not None and len(members) != count:
        raise ValueError(f"{name} has {len(members)} values, not one for each of {count} ranks")
    return members


def c_bytes(value: Any, name: str) -> bytes:
    """Take bytes, or any buffer of them."""
    if type(value) is bytes:
        return value
    try:
        view = memoryview(value)
    except Exception:
        raise wrong_type(value, name, "not bytes") from None
    if view.itemsize != 1:
        raise TypeError(f"{name} has elements of {view.itemsize} bytes, not of 1")
    return view.tobytes()


def c_text(value: str, name: str) -> bytes:
    """Take a text, encoded for the library."""
    if not isinstance(value, str):
        raise wrong_type(value, name, "not a str")
    return _c_string(value, name, str.encode)


def c_path(value: str | bytes | os.PathLike[Any], name: str) -> bytes:
    """Take a path, encoded for the library."""
    try:
        path = os.fspath(value)
    except Exception:
        raise wrong_type(value, name, "not a path") from None
    return _c_string(path, name, os.fsencode)


def _c_string(value: Any, name: str, encode: Callable[[Any], bytes]) -> bytes:
    try:
        characters = encode(value)
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {shown(value)} cannot be encoded: {error}") from None
    if b"\0" in characters:  # the library would not see what stands behind it
        raise ValueError(f"{name} {shown(value)} has a NUL in it")
    return characters


def function(value: Any, name: str) -> Any:
    """Take what can be called."""
    if not callable(value):
        raise wrong_type(value, name, "not callable")
    return value


def choice(value: Any, name: str, choices: Mapping[Any, Any]) -> Any:
    """Look up a value that has to be one of the keys of ``choices``."""
    try:
        return choices[value]
    except Exception:  # what cannot be hashed is none of them either
        raise no_choice(value, name, choices) from None


def no_choice(value: object, name: str, choices: Iterable[Any]) -> ValueError:
    """Make the exception for a value that is not one of ``choices``."""
    return ValueError(f"{name} {shown(value)} is not one of {', '.join(map(str, choices))}")


def timeout_us(timeout_s: float | None) -> int:
    """Convert seconds to what the C API takes: 0 for None (the default), -1 for math.inf."""
    if timeout_s is None:
        return 0
    if type(timeout_s) is not float and type(timeout_s) is not int:
        timeout_s = _seconds(timeout_s)
    if not timeout_s > 0:
        raise ValueError(f"timeout_s {shown(timeout_s)} is not positive; math.inf means never")
    return -1 if timeout_s > _TIMEOUT_S_MAX else max(1, round(timeout_s * 1e6))


def _seconds(timeout_s: Any) -> float:
    """Convert any number; not, as float() does, a text."""
    try:
        return math.ldexp(timeout_s, 0)
    except OverflowError:
        return math.inf if timeout_s > 0 else -math.inf
    except Exception:
        raise wrong_type(timeout_s, "timeout_s", "not a number of seconds") from None


@dataclass(frozen=True)
class BackendInfo:
    """What this build and machine offer of one backend.

    name: "cpu", "cuda" or "maca", which says more in a build for tests, like "maca (shim over
    CUDA)"; available: a group can be created on it now; device_count: devices that this process
    sees, 1 on the CPU; reason: why it is not available, "" if it is.
    """

    name: str
    available: bool
    device_count: int
    reason: str


def backend_info(backend: str) -> BackendInfo:
    """Describe a backend ("cpu", "cuda" or "maca"), also one that is not in this build."""
    info = struct("mep_backend_info_t")
    check(lib.mep_backend_query(choice(backend, "backend", BACKENDS), info))
    return BackendInfo(text(info.name), info.available == 1, info.device_count, text(info.reason))


@dataclass(frozen=True)
class RdmaInfo:
    """Whether rows may go by GPU-initiated RDMA on this machine.

    available: False in this version; device_count: RDMA devices of any kind; reason: why it is not
    used.
    """

    available: bool
    device_count: int
    reason: str


def rdma_info() -> RdmaInfo:
    """Tell whether GPU-initiated RDMA can be used on this machine; never an error."""
    info = struct("mep_rdma_info_t")
    check(lib.mep_rdma_query(info))
    return RdmaInfo(info.available == 1, info.device_count, text(info.reason))


def version() -> tuple[int, int, int]:
    """Version of the loaded library: (major, minor, patch)."""
    number = lib.mep_version()
    return number // 10000, number // 100 % 100, number % 100
