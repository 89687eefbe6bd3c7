"""Compile the MACA backend with clang as for a GPU that is like MetaX's.

python stand_in_test.py CLANG ROOT kernels|asm|sdk
  kernels  every kernel is for waves of 64 lanes, and within what a thread and a block may have
  asm      assembly of another vendor in the same file is an error, as it is for mxcc
  sdk      no shim can be used where the SDK is on the include path too

It exits with 77, a skip, if there is no CLANG. Nothing that is compiled here is run.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

SKIPPED = 77
WAVE_SIZE, PRIVATE_BYTES_MAX, SHARED_BYTES_MAX = 64, 4 << 10, 64 << 10
KERNELS_MIN = 14  # of dispatch 7, of combine 5, and those that count and weigh

ASM = """
#define EP_DEVICE_MACA
#include "device/device.h"
__global__ void kernel(unsigned *to) {
    unsigned lane;
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
    *to = lane;
}
"""


def compiled(clang: str, root: Path, source: Path) -> subprocess.CompletedProcess[str]:
    """Compile the device half of a file to assembly, on stdout."""
    command = [clang, "-x", "hip", "--offload-arch=gfx90a", "-nogpulib", "-nogpuinc"]
    command += ["--cuda-device-only", "-S", "-O2", "-std=c++17", "-ffp-contract=off"]
    command += ["-Wall", "-Wextra", "-Werror", "-D__MACACC__=1"]
    command += [f"-I{root / path}" for path in ("tests/maca/shim/stand_in", "libep", "include")]
    return subprocess.run([*command, source, "-o", "-"], capture_output=True, text=True)


def assembled(clang: str, assembly: str) -> subprocess.CompletedProcess[str]:
    """Assemble what was compiled: only here does the compiler read inline assembly."""
    command = [clang, "--target=amdgcn-amd-amdhsa", "-mcpu=gfx90a", "-x", "assembler", "-c", "-"]
    command += ["-o", "/dev/null"]
    return subprocess.run(command, input=assembly, capture_output=True, text=True)


def kernels_of(assembly: str) -> list[dict[str, str]]:
    """Read what the compiler says of each kernel."""
    return [
        dict(re.findall(r"^ +-? *\.(\w+): +(\S+)$", kernel, re.MULTILINE))
        for kernel in re.split(r"^ +- \.agpr_count:", assembly, flags=re.MULTILINE)[1:]
    ]


def complaint(kernel: dict[str, str]) -> str:
    """Say what is wrong with a kernel; empty if nothing is."""
    if int(kernel["wavefront_size"]) != WAVE_SIZE:
        return f"waves of {kernel['wavefront_size']} lanes"
    if int(kernel["private_segment_fixed_size"]) > PRIVATE_BYTES_MAX:
        return f"{kernel['private_segment_fixed_size']} bytes of a thread's own"
    if int(kernel["group_segment_fixed_size"]) > SHARED_BYTES_MAX:
        return f"{kernel['group_segment_fixed_size']} bytes of a block's"
    return ""


def check_kernels(clang: str, root: Path) -> int:
    """Check every kernel of the backend."""
    result = compiled(clang, root, root / "libep/backend/maca.cc")
    object_file = assembled(clang, result.stdout)
    print(result.stderr + object_file.stderr, end="")
    if result.returncode != 0 or object_file.returncode != 0:
        return 1
    kernels = kernels_of(result.stdout)
    wrong = [f"{kernel['name']}: {complaint(kernel)}" for kernel in kernels if complaint(kernel)]
    for kernel in kernels:
        print(
            f"{kernel['private_segment_fixed_size']:>5} bytes of a thread, "
            f"{kernel['group_segment_fixed_size']:>6} of a block: {kernel['name']}"
        )
    print(*wrong, f"{len(kernels)} kernels", sep="\n")
    return 1 if wrong or len(kernels) < KERNELS_MIN else 0


def check_asm(clang: str, root: Path) -> int:
    """Check that assembly is refused, for what it is and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "asm.cc"
        source.write_text(ASM)
        result = compiled(clang, root, source)
    object_file = assembled(clang, result.stdout)
    errors = [line for line in object_file.stderr.splitlines() if "error:" in line]
    print(result.stderr, *errors, sep="\n")
    of_asm = len(errors) == 1 and "invalid instruction" in errors[0]
    return 0 if result.returncode == 0 and object_file.returncode != 0 and of_asm else 1


def check_sdk(clang: str, root: Path) -> int:
    """Check that each shim refuses to hide a file of its name."""
    refusals = 0
    for shim in ("stand_in", "over_cuda"):
        with tempfile.TemporaryDirectory() as folder:
            header = Path(folder) / "mcr/mc_runtime.h"
            header.parent.mkdir()
            header.touch()
            includes = [f"-I{root / 'tests/maca/shim' / shim}", f"-I{folder}"]
            command = [clang, "-x", "c++", "-E", "-", *includes]
            text = "#include <mcr/mc_runtime.h>\n"
            result = subprocess.run(command, input=text, capture_output=True, text=True)
        print(result.stderr)
        refusals += (
            result.returncode != 0 and "The MetaX SDK is on the include path" in result.stderr
        )
    return 0 if refusals == 2 else 1


def main(clang: str, root: Path, what: str) -> int:
    """Run one of the checks."""
    try:
        subprocess.run([clang, "--version"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        print(f"SKIPPED: no {clang}")
        return SKIPPED
    checks = {"kernels": check_kernels, "asm": check_asm, "sdk": check_sdk}
    return checks[what](clang, root)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve(), sys.argv[3]))
