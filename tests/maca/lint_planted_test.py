"""Plant what lint_test.py refuses into copies of what it reads: python lint_planted_test.py [ROOT].

Each planted line has to be found in each file that is compiled for MACA, and none in the tree as it
is.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
import tempfile
from pathlib import Path

import lint_test

PLANTED = (  # a line, and what is said of it
    ('asm volatile("nop");', "asm: mxcc takes no assembly"),
    ("cudaMemcpy();", "cudaMemcpy: a name of CUDA's"),
    ("cuMemAlloc();", "cuMemAlloc: a name of CUDA's"),
    ("int a = __ldg(b);", "__ldg: a load"),
    ("void f(const int *__restrict__ b);", "__restrict__: such a pointer"),
    ("unsigned mask = 0xffffffffu;", "0xffffffffu: a mask of 32 lanes"),
    ("unsigned lane = 1u << n;", "1u <<: a mask of 32 lanes"),
    ("mcNowhereSeen();", "mcNowhereSeen is used"),
)
HARMLESS = "// asm, cudaMemcpy, __ldg and 0xffffffff in a comment, and what is in a string\n"


def copied(root: Path, to: Path) -> None:
    """Copy what the lint reads."""
    for folder in ("libep", "tests/maca"):
        shutil.copytree(root / folder, to / folder)


def missed(tree: Path, source: str) -> list[str]:
    """Plant all into a file, and say what was not found; the file is as before then."""
    file = tree / source
    before = file.read_text()
    file.write_text(before + HARMLESS + "".join(f"{line}\n" for line, _ in PLANTED))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        passed = lint_test.main(tree) == 0
    found = printed.getvalue().splitlines()
    file.write_text(before)
    first = before.count("\n") + 2  # behind HARMLESS
    wanted = [
        f"{source}:{first + at}: {said}" if ": " in said else said
        for at, (_, said) in enumerate(PLANTED)
    ]
    lost = [want for want in wanted if not any(one.startswith(want) for one in found)]
    return lost + ([f"{source}: the lint passes"] if passed else [])


def main(root: Path) -> int:
    """Print what is wrong; the exit status is 1 if anything is."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copied(root, tree)
        wrong = [f"as it is: {line}" for line in lint_test.violations(tree)]
        files = lint_test.sources(tree)
        for source in files:
            wrong += missed(tree, source)
    for needed in ("libep/kernels/dispatch.h", "libep/device/lanes.h", "libep/wire/signal.h"):
        if needed not in files:
            wrong.append(f"{needed} is not looked at")
    print(*(f"WRONG: {line}" for line in wrong), f"{len(files)} files", sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[2])))
