"""The library exports exactly what its header declares: exports_test.py HEADER LIBRARY NM."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def declared(header: Path) -> set[str]:
    """Read the functions that the header marks as its API."""
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.DOTALL)
    return set(re.findall(r"^MEP_API\b[^;(]*?(\w+)\(", text, re.MULTILINE))


def exported(library: Path, nm: str) -> set[str]:
    """List the symbols that a program can link to."""
    command = [nm, "-D", "--defined-only", "--format=posix", str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return {line.split()[0] for line in listing.stdout.splitlines()}


def main(header: Path, library: Path, nm: str) -> int:
    """Print both differences; the exit status is 1 if there are any."""
    in_header, in_library = declared(header), exported(library, nm)
    for name in sorted(in_header - in_library):
        print(f"declared, not exported: {name}")
    for name in sorted(in_library - in_header):
        print(f"exported, not declared: {name}")
    print(f"{len(in_header)} functions declared, {len(in_library)} symbols exported")
    return 0 if in_header and in_header == in_library else 1


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]))
