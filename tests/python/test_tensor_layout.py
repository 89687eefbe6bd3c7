"""mep_tensor_t is DLPack's DLTensor, byte for byte."""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

import pytest

from mooncake_ep._ffi import ffi

_C_TYPES = {
    "void*": ctypes.c_void_p,
    "int32_t": ctypes.c_int32,
    "int64_t*": ctypes.c_void_p,
    "uint64_t": ctypes.c_uint64,
    "uint8_t": ctypes.c_uint8,
    "uint16_t": ctypes.c_uint16,
    "DLDeviceType": ctypes.c_int32,
}


def _torch_header() -> str:
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        pytest.skip("torch, whose dlpack.h this compares with, is not installed")
    header = Path(spec.origin).parent / "include" / "ATen" / "dlpack.h"
    if not header.exists():
        pytest.skip(f"this torch ships no {header}")
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", header.read_text(), flags=re.DOTALL)


def _structure(header: str, name: str) -> type[ctypes.Structure]:
    """Build a ctypes structure from ``typedef struct {...} name;``."""
    body = re.search(r"typedef struct\s*\w*\s*\{([^{}]*)\}\s*" + name + ";", header)
    assert body is not None, name
    fields = []
    for declaration in body.group(1).split(";")[:-1]:
        c_type, field = re.fullmatch(r"\s*(\w+\s*\**)\s*(\w+)\s*", declaration).groups()  # type: ignore[union-attr]
        c_type = c_type.replace(" ", "")
        fields.append((field, _C_TYPES.get(c_type) or _structure(header, c_type)))
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("mep_device_t", "DLDevice"),
        ("mep_dtype_t", "DLDataType"),
        ("mep_tensor_t", "DLTensor"),
    ],
)
def test_layout_is_that_of_dlpack(ours: str, theirs: str) -> None:
    structure = _structure(_torch_header(), theirs)
    assert ffi.sizeof(ours) == ctypes.sizeof(structure)
    for field, _ in structure._fields_:  # type: ignore[misc]
        descriptor = getattr(structure, field)
        assert ffi.offsetof(ours, field) == descriptor.offset, field
        member = dict(ffi.typeof(ours).fields)[field]  # type: ignore[attr-defined]
        assert ffi.sizeof(member.type) == descriptor.size, field
