"""Write the cffi module _ffi.py and its types _ffi.pyi: python gen_ffi.py HEADER OUT_DIR.

The header is the one source of truth. It keeps to a subset of C that stays valid once its
directives are resolved as for plain C, so no compiler is needed, here or where the wheel is used.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from cffi import FFI

COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
INTEGER = re.compile(r"#define (\w+) +-?(?:0x[0-9a-fA-F]+|[0-9]+)$")
ENUMERATOR = re.compile(r"\b(MEP_\w+) *=")
PROTOTYPE = re.compile(r"\b([\w ]+?[ *]+)(mep_\w+)\(([^()]*)\);")

STUB = '''\
# Types of the cffi module made from mooncake_ep.h. Made by tools/gen_ffi.py; not edited by hand.
from collections.abc import Callable
from typing import Any, Final, TypeVar

_Function = TypeVar("_Function", bound=Callable[..., Any])

class CType:
    cname: str
    kind: str

class CData:
    """A C value. A pointer to a struct shows the struct's fields as attributes."""

    def __getattr__(self, name: str) -> Any: ...
    def __setattr__(self, name: str, value: Any) -> None: ...
    def __getitem__(self, index: int | slice) -> Any: ...
    def __setitem__(self, index: int | slice, value: Any) -> None: ...
    def __add__(self, count: int) -> CData: ...
    def __call__(self, *args: Any) -> Any: ...
    def __bool__(self) -> bool: ...
    def __int__(self) -> int: ...
    def __len__(self) -> int: ...
    def __enter__(self) -> CData: ...
    def __exit__(self, *exc: object) -> None: ...

class Lib:
    """The library's functions and constants."""

{lib}

class FFI:
    NULL: Final[CData]
    error: Final[type[Exception]]
    errno: int

    def addressof(self, cdata: CData, *fields: str | int) -> CData: ...
    def buffer(self, cdata: CData, size: int = ...) -> Any: ...
    def callback(
        self, cdecl: str, python_callable: None = ..., error: Any = ..., onerror: Any = ...
    ) -> Callable[[_Function], CData]: ...
    def cast(self, cdecl: str | CType, value: CData | int | float) -> CData: ...
    def dlclose(self, lib: Lib) -> None: ...
    def dlopen(self, name: str | None, flags: int = ...) -> Lib: ...
    def from_buffer(self, cdecl: str, source: Any, require_writable: bool = ...) -> CData: ...
    def from_handle(self, handle: CData) -> Any: ...
    def gc(self, cdata: CData, destructor: Callable[[CData], Any], size: int = ...) -> CData: ...
    def memmove(self, dest: Any, src: Any, n: int) -> None: ...
    def new(self, cdecl: str | CType, init: Any = ...) -> CData: ...
    def new_handle(self, value: object) -> CData: ...
    def offsetof(self, cdecl: str | CType, *fields: str | int) -> int: ...
    def release(self, cdata: CData) -> None: ...
    def sizeof(self, cdecl: str | CType | CData) -> int: ...
    def string(self, cdata: CData, maxlen: int = ...) -> bytes: ...
    def typeof(self, cdecl: str | CData) -> CType: ...
    def unpack(self, cdata: CData, length: int) -> Any: ...

ffi: Final[FFI]
'''


def declarations(header: str) -> str:
    """Reduce a C header to what cffi's cdef() reads."""
    kept: list[str] = []
    skipping: list[bool] = []  # one entry for each open #if
    for line in COMMENT.sub("", header).replace("\\\n", " ").splitlines():
        directive = line.split()[0] if line.startswith("#") else ""
        if directive in ("#if", "#ifdef", "#ifndef"):
            skipping.append(directive != "#ifndef")  # as in plain C, where no name is defined
        elif directive == "#else":
            skipping[-1] = not skipping[-1]
        elif directive == "#endif":
            skipping.pop()
        elif not any(skipping) and (not directive or INTEGER.match(line.rstrip())):
            kept.append(line.rstrip())
    text = re.sub(r"\bMEP_API +", "", "\n".join(kept))
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def result_type(c_type: str) -> str:
    """Name what cffi returns for a C type."""
    if "*" in c_type:
        return "CData"
    return "None" if c_type.strip() == "void" else "int"


def parameter(c_parameter: str) -> str:
    """Turn a C parameter into a Python one."""
    *c_type, name = c_parameter.replace("*", " * ").split()
    if "*" not in c_type and not c_type[-1].endswith("_callback_t"):
        return f"{name}: int"
    takes_bytes = c_type in (["const", "char", "*"], ["const", "void", "*"])
    return f"{name}: CData | bytes" if takes_bytes else f"{name}: CData"


def library_stub(cdef: str) -> str:
    """Declare each constant and function of the library for type checkers."""
    constants = [match[1] for line in cdef.splitlines() if (match := INTEGER.match(line))]
    lines = [f"    {name}: Final[int]" for name in constants + ENUMERATOR.findall(cdef)]
    for returned, name, c_parameters in PROTOTYPE.findall(cdef):
        listed = [] if c_parameters.strip() == "void" else c_parameters.split(",")
        parameters = "".join(f", {parameter(each)}" for each in listed)
        lines.append(f"    def {name}(self{parameters}, /) -> {result_type(returned)}: ...")
    return "\n".join(lines)


def main(header: Path, out_dir: Path) -> None:
    """Write both files."""
    cdef = declarations(header.read_text())
    ffi = FFI()
    ffi.cdef(cdef)
    ffi.set_source("mooncake_ep._ffi", None)  # None: found by dlopen, so nothing is compiled
    module = out_dir / "_ffi.py"
    module.unlink(missing_ok=True)  # cffi leaves an equal file as old as it was: stale for a build
    ffi.emit_python_code(str(module))
    (out_dir / "_ffi.pyi").write_text(STUB.format(lib=library_stub(cdef)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
