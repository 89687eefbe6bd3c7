"""libmooncake_ep, loaded; its status codes, as exceptions.

The only module that turns a failed call into an exception. The library lies beside this file;
MOONCAKE_EP_LIBRARY names another one.
"""

from __future__ import annotations

import os
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


def c_text(value: str, name: str) -> bytes:
    """Encode a text for the library, which would not see what stands behind a NUL."""
    if not isinstance(value, str):
        raise TypeError(f"{name} is a {type(value).__name__}, not a str")
    if "\0" in value:
        raise ValueError(f"{name} {value!r} has a NUL in it")
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} {value!r} cannot be encoded: {error}") from None


def failure(status: int) -> Exception:
    """Make the exception that this thread's last failed call stands for."""
    message = text(lib.mep_last_error())
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
        try:
            setattr(value, name, field)
        except TypeError:
            raise TypeError(f"{name} is a {type(field).__name__}, not an integer") from None
        except OverflowError:
            raise ValueError(f"{name} {field} does not fit {type_name}") from None
    return value


def timeout_us(timeout_s: float | None) -> int:
    """Convert seconds to what the C API takes: 0 for None (the default), -1 for math.inf."""
    if timeout_s is None:
        return 0
    if not timeout_s > 0:
        raise ValueError(f"timeout_s {timeout_s} is not positive; math.inf means never")
    return -1 if timeout_s > _TIMEOUT_S_MAX else max(1, round(timeout_s * 1e6))


@dataclass(frozen=True)
class BackendInfo:
    """What this build and machine offer of one backend.

    name: "cpu", "cuda" or "maca"; available: a group can be created on it now; device_count:
    devices that this process sees, 1 on the CPU; reason: why it is not available, "" if it is.
    """

    name: str
    available: bool
    device_count: int
    reason: str


def backend_code(name: str) -> int:
    """Look up MEP_BACKEND_* by name; ValueError for an unknown one."""
    if name not in BACKENDS:
        raise ValueError(f"backend {name!r} is not one of {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backend_info(backend: str) -> BackendInfo:
    """Describe a backend ("cpu", "cuda" or "maca"), also one that is not in this build."""
    info = struct("mep_backend_info_t")
    check(lib.mep_backend_query(backend_code(backend), info))
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
