"""Fail when the MACA backend says what is not known to exist there: python lint_test.py [ROOT].

Reads the text without its comments. What the compiler stand-in accepts, MetaX's may not, so this
list is of what is known to be refused, or to mean something else, by it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

# What mxcc compiles: globs, and what of them it does not.
COMPILED = ("libep/backend/maca.cc", "libep/device/*.h", "libep/kernels/*.h", "libep/wire/*.h")
OF_OTHERS = ("cpu.h", "cuda.h", "emu.h", "host_atomics.h")  # devices
SHARED = "libep/backend/gpu.inl"  # names its runtime by EP_GPU(name) and EP_TRY_GPU(Name(...))
API = "tests/maca/maca_api.txt"
SHIMS = ("tests/maca/shim/stand_in", "tests/maca/shim/over_cuda")

COMMENT_OR_STRING = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
INCLUDE = re.compile(r"^[ \t]*#\s*include\b.*$", re.MULTILINE)
WORD = re.compile(r"\b[A-Za-z_]\w*\b")
MC_NAME = re.compile(r"mc[A-Z]\w*")
DEVICE_NAME = re.compile(
    r"(?:__(?:shfl|ballot|sync|threadfence|popc|ffs|any|all|match)\w*|atomic\w+|clock64)"
)
OF_EP_GPU = re.compile(r"\bEP_GPU\((\w+)\)|\bEP_TRY_GPU\((\w+)\(")
REFUSED = {  # a pattern, and what is wrong with it
    r"\basm\b|\b__asm\w*": "mxcc takes no assembly",
    r"\b(?:cuda\w*|cu[A-Z]\w*|__nv\w*|nv[A-Z_]\w*|CU_\w+|__CUDA\w*)\b": "a name of CUDA's",
    r"\b__ldg\b": "a load of constant memory, which does not see what peers write",
    r"\b__restrict__\b": "such a pointer to const becomes one to constant memory",
    r"\b0[xX]0*[fF]{8}[uU]?\b|\b1[uU]\s*<<": "a mask of 32 lanes; a wave has 64",
}
ALLOWED = {("libep/wire/host_device.h", "__CUDACC__")}  # it asks for either vendor's compiler
VENDOR = re.compile(r"\w*(?:cuda|maca|nvidia|metax|hip_)\w*", re.IGNORECASE)
CONDITION = re.compile(r"^[ \t]*#\s*(?:if|ifdef|ifndef|elif|else)\b", re.MULTILINE)


def code_of(text: str) -> str:
    """Blank out comments, strings and includes, keeping the lines."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match[0].count("\n")

    return INCLUDE.sub("", COMMENT_OR_STRING.sub(blank, text))


def sources(root: Path) -> list[str]:
    """List what is compiled for MACA, but for what it shares with CUDA's host."""
    found = [path for pattern in COMPILED for path in sorted(root.glob(pattern))]
    return [str(path.relative_to(root)) for path in found if path.name not in OF_OTHERS]


def known_names(root: Path) -> set[str]:
    """Read the first column of the list."""
    lines = (root / API).read_text().splitlines()
    return {line.split("|")[0].strip() for line in lines if line and not line.startswith("#")}


def refused_in(name: str, code: str) -> Iterator[str]:
    """Yield a line for each place with a word that is refused."""
    for number, line in enumerate(code.splitlines(), 1):
        for pattern, why in REFUSED.items():
            for found in re.finditer(pattern, line):
                if (name, found[0]) in ALLOWED:
                    continue
                yield f"{name}:{number}: {found[0]}: {why}"


def used_names(root: Path) -> set[str]:
    """Name all that the backend asks of the runtime and of the compiler's library."""
    names = set()
    for source in sources(root):
        words = WORD.findall(code_of((root / source).read_text()))
        names |= {word for word in words if MC_NAME.fullmatch(word) or DEVICE_NAME.fullmatch(word)}
    for source in (*sources(root), SHARED):
        for name, call in OF_EP_GPU.findall(code_of((root / source).read_text())):
            names |= set(MC_NAME.findall(f"mc{name or call}"))  # but for parameters of the macros
    return names


def vendors_in_kernels(root: Path) -> Iterator[str]:
    """Yield a line for each vendor's name, or choice by #if, in a kernel."""
    for path in sorted((root / "libep/kernels").rglob("*.h")):
        code = code_of(path.read_text())
        for found in (*VENDOR.finditer(code), *CONDITION.finditer(code)):
            number = code.count("\n", 0, found.start()) + 1
            yield f"{path}:{number}: {found[0].strip()}: kernels know no vendor"


def violations(root: Path) -> Iterator[str]:
    """Yield a line for each broken rule."""
    for source in (*sources(root), SHARED):
        yield from refused_in(source, code_of((root / source).read_text()))
    known, used = known_names(root), used_names(root)
    for name in sorted(used - known):
        yield f"{name} is used, but {API} does not say where it was seen"
    for name in sorted(known - used - {"__launch_bounds__"}):
        yield f"{name} is in {API}, but not used"
    for shim in SHIMS:
        text = "".join(path.read_text() for path in sorted((root / shim).rglob("*.h")))
        declared = set(WORD.findall(code_of(text)))
        for name in sorted(known - declared):
            if name.startswith("mc") or shim == SHIMS[0]:  # CUDA has the device's names itself
                yield f"{name} is in {API}, but {shim} does not declare it"
    yield from vendors_in_kernels(root)


def main(root: Path) -> int:
    """Print the violations; the exit status is 1 if there are any."""
    found = list(violations(root))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2])))
