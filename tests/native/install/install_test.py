"""The installed library serves programs outside its tree, also after the tree was moved.

install_test.py CMAKE BUILD_DIR [FLAG...]: a C99 and a C++11 program by find_package, each in a
project of that one language, and a C99 program by pkg-config. FLAGs go to compiler and linker.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

SOURCE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
STEP_SECONDS_MAX = 120


def run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """Run a command, show what it printed, and return that."""
    done = subprocess.run(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=STEP_SECONDS_MAX,
        env=os.environ | (env or {}),
        check=False,
    )
    print("$", *command, "\n" + done.stdout, flush=True)
    if done.returncode != 0:
        sys.exit(f"{command[0]} failed with {done.returncode}")
    return done.stdout


def expect_ok(program: Path, library_dir: Path) -> None:
    """Run a consumer."""
    if "consumer ok" not in run(program, env={"LD_LIBRARY_PATH": str(library_dir)}):
        sys.exit(f"{program} did not say that it is ok")


def by_find_package(cmake: str, language: str, prefix: Path, build: Path, flags: list[str]) -> None:
    """Build and run the consumer as a CMake project of one language."""
    run(
        cmake,
        f"-S{SOURCE}",
        f"-B{build}",
        f"-DCMAKE_PREFIX_PATH={prefix}",
        f"-DCONSUMER_LANGUAGE={language}",
        f"-DCMAKE_{language}_FLAGS={' '.join(WARNINGS + flags)}",
    )
    run(cmake, "--build", build)
    expect_ok(build / "consumer", library_dir(prefix))


def by_pkg_config(prefix: Path, build: Path, flags: list[str]) -> None:
    """Build and run the consumer with the words that pkg-config gives."""
    build.mkdir()
    search = {"PKG_CONFIG_PATH": str(library_dir(prefix) / "pkgconfig")}
    words = run("pkg-config", "--cflags", "--libs", "mooncake_ep", env=search).split()
    compiler = os.environ.get("CC", "cc")
    program = build / "consumer"
    run(compiler, "-std=c99", *WARNINGS, *flags, SOURCE / "consumer.c", "-o", program, *words)
    expect_ok(program, library_dir(prefix))


def library_dir(prefix: Path) -> Path:
    """Find where the library was installed."""
    return next(prefix.rglob("libmooncake_ep.so")).parent


def main(cmake: str, build_dir: str, flags: list[str]) -> None:
    """Install, move, and try each way to use the result."""
    with tempfile.TemporaryDirectory(prefix="mooncake_ep-install-") as name:
        scratch = Path(name)
        run(cmake, "--install", build_dir, "--prefix", scratch / "first")
        prefix = scratch / "moved" / "prefix"
        prefix.parent.mkdir()
        (scratch / "first").rename(prefix)

        by_find_package(cmake, "C", prefix, scratch / "c", flags)
        by_find_package(cmake, "CXX", prefix, scratch / "cpp", flags)
        by_pkg_config(prefix, scratch / "pc", flags)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
