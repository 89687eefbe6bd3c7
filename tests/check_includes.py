"""Fail when a file of libep/ breaks the layers: python check_includes.py [ROOT].

The table is the architecture. Ours are included relative to libep/ ("base/status.h"), so that an
include line names its layer. Kernels choose nothing by #if, and the public header stays short.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

MAY_INCLUDE: dict[str, set[str]] = {  # layer: the layers it may include, besides itself
    "base": set(),
    "wire": {"device"},
    "device": {"wire"},
    "topology": {"base"},
    "kernels": {"device", "wire"},
    "backend": {"base", "device", "kernels", "wire"},
    "transport": {"base", "backend", "topology", "wire"},
    "core": {"base", "backend", "kernels", "topology", "transport", "wire"},
    "api": {"base", "core"},
}
ONLY = {("core", "kernels"): "kernels/kernels.h"}  # of that layer, this file alone
WITHOUT_PUBLIC_HEADER = {"device", "kernels", "wire"}
PUBLIC_HEADER = "mooncake_ep.h"
PUBLIC_HEADER_LINES_MAX = 850

INCLUDE = re.compile(r'^\s*#\s*include\s*([<"])([^">]+)[">]')
CONDITION = re.compile(r"^\s*#\s*(?:if|ifdef|ifndef|elif|else)\b")


def layer_of(path: Path) -> str:
    """Name the layer of a file given relative to libep/: its folder."""
    return path.parts[0]


def forbidden(layer: str, quote: str, name: str, libep: Path) -> str | None:
    """Say what is wrong with an include of `name` in a file of `layer`, if anything is."""
    if name == PUBLIC_HEADER:
        refused = layer in WITHOUT_PUBLIC_HEADER
        return f"{layer} may not include {PUBLIC_HEADER}" if refused else None
    if quote == "<":
        return None
    if ".." in name.split("/") or not (libep / name).is_file():
        return f'"{name}" is not a file relative to libep/'
    used = layer_of(Path(name))
    if used == layer:
        return None
    if used not in MAY_INCLUDE[layer]:
        return f"{layer} may not include {used}"
    only = ONLY.get((layer, used), name)
    return None if only == name else f"{layer} may include only {only} of {used}"


def violations(root: Path) -> Iterator[str]:
    """Yield a line for each broken rule."""
    libep = root / "libep"
    header = root / "include" / PUBLIC_HEADER
    lines = len(header.read_text().splitlines())
    if lines >= PUBLIC_HEADER_LINES_MAX:
        yield f"{header}: {lines} lines; it stays under {PUBLIC_HEADER_LINES_MAX}"

    sources = [path for path in libep.rglob("*") if path.suffix in {".cc", ".cu", ".h", ".inl"}]
    for path in sorted(sources):
        layer = layer_of(path.relative_to(libep))
        if layer not in MAY_INCLUDE:
            yield f"{path}: {layer} is not a layer"
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            include = INCLUDE.match(line)
            wrong = forbidden(layer, include[1], include[2], libep) if include else None
            if wrong:
                yield f"{path}:{number}: {wrong}"
            if layer == "kernels" and CONDITION.match(line):
                yield f"{path}:{number}: a kernel is the same source on every device, without #if"


def main(root: Path) -> int:
    """Print the violations; the exit status is 1 if there are any."""
    found = list(violations(root))
    print(*found, sep="\n", end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1])))
