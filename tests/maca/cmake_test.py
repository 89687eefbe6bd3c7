"""Check how CMake finds MetaX's compiler.

python cmake_test.py CMAKE ROOT missing|found|real [CLANG]

missing  asked for, by option or environment, but not there: an error that says what to do
found    there, as a script that has CLANG compile in its place: the object is made
real     the SDK itself, where it is: the library is built; elsewhere a skip, never a pass
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SKIPPED = 77
ROOT_VARIABLES = ("MACA_PATH", "MACA_HOME")
VARIABLES = (*ROOT_VARIABLES, "MOONCAKE_EP_USE_MACA")

# The arguments that CMake gives to mxcc, as clang understands them.
MXCC = """#!/bin/sh
set -e
for argument; do
    shift
    case $argument in
        maca) argument=hip ;;
        --maca-path=*) argument=-I{shim} ;;
        --offload-arch=xcore*) argument=--offload-arch=gfx90a ;;
    esac
    set -- "$@" "$argument"
done
exec {clang} -nogpulib -nogpuinc --cuda-host-only -fuse-cuid=none -D__MACACC__=1 "$@"
"""


def configure(cmake: str, root: Path, build: Path, *options: str, **environment: str) -> str | None:
    """Configure the project; CMake's complaint, or nothing if it has none."""
    clean = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    command = [cmake, "-S", str(root), "-B", str(build), "-DMEP_BUILD_TESTS=OFF", "-DMEP_CUDA=OFF"]
    result = subprocess.run(
        [*command, *options], capture_output=True, text=True, env=clean | environment
    )
    print(result.stdout)
    return None if result.returncode == 0 else " ".join(result.stderr.split())


def check_missing(cmake: str, root: Path, folder: Path) -> int:
    """Ask for the backend where there is no compiler."""
    nowhere = f"-DMEP_MACA_ROOT={folder / 'nowhere'}"
    by_option = configure(cmake, root, folder / "1", "-DMEP_MACA=ON", nowhere)
    by_environment = configure(cmake, root, folder / "2", nowhere, MOONCAKE_EP_USE_MACA="1")
    print(by_option, by_environment, sep="\n")
    clear = [
        said and "no mxcc" in said and "MEP_MACA_ROOT" in said
        for said in (by_option, by_environment)
    ]
    quiet = configure(cmake, root, folder / "3", nowhere) is None
    return 0 if all(clear) and quiet else 1


def check_found(cmake: str, root: Path, folder: Path, clang: str) -> int:
    """Compile the backend by a stand-in for mxcc, in a tree like the SDK's."""
    if shutil.which(clang) is None:
        print(f"SKIPPED: no {clang}")
        return SKIPPED
    sdk = folder / "sdk"
    for name in ("include", "lib", "mxgpu_llvm/bin"):
        (sdk / name).mkdir(parents=True)
    for name in ("mcruntime", "mxc-runtime64"):
        (sdk / "lib" / f"lib{name}.so").touch()
    mxcc = sdk / "mxgpu_llvm/bin/mxcc"
    mxcc.write_text(MXCC.format(shim=root / "tests/maca/shim/stand_in", clang=clang))
    mxcc.chmod(0o755)
    build = folder / "build"
    complaint = configure(cmake, root, build, MOONCAKE_EP_USE_MACA="1", MACA_PATH=str(sdk))
    print(complaint)
    subprocess.run([cmake, "--build", build, "--target", "mooncake_ep_maca"], check=True)
    depends_on = (build / "maca.o.d").read_text()
    return 0 if (build / "maca.o").exists() and "gpu.inl" in depends_on else 1


def check_real(cmake: str, root: Path, folder: Path) -> int:
    """Build the library by the SDK."""
    roots = [os.environ[name] for name in ROOT_VARIABLES if os.environ.get(name)] + ["/opt/maca"]
    found = [
        path
        for path in roots
        for sub in ("mxgpu_llvm/bin", "bin")
        if (Path(path) / sub / "mxcc").exists()
    ]
    if not found:
        print("SKIPPED: no MACA SDK")
        return SKIPPED
    if complaint := configure(cmake, root, folder, "-DMEP_MACA=ON", f"-DMEP_MACA_ROOT={found[0]}"):
        print(complaint)
        return 1
    return subprocess.run([cmake, "--build", folder, "--target", "mooncake_ep"]).returncode


def main(cmake: str, root: Path, what: str, clang: str = "") -> int:
    """Run one of the checks."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if what == "missing":
            return check_missing(cmake, root, folder)
        if what == "found":
            return check_found(cmake, root, folder, clang)
        return check_real(cmake, root, folder)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]).resolve(), *sys.argv[3:]))
