"""The programs in README.md do what they show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mooncake_ep

ROOT = Path(__file__).resolve().parents[2]
DEADLINE_S = 120


def program(language: str) -> str:
    """Return the one block of README.md in a language."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    return text


def run(command: list[str], **options: object) -> str:
    """Run a command, and return what it printed."""
    done = subprocess.run(  # type: ignore[call-overload]
        command, capture_output=True, text=True, timeout=DEADLINE_S, check=False, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


def test_the_python_program_runs_on_four_ranks(tmp_path: Path) -> None:
    script = tmp_path / "program.py"
    script.write_text(program("python"))
    lines = run([sys.executable, str(script)]).splitlines()
    assert sorted(line.split(":")[0] for line in lines) == [f"rank {rank}" for rank in range(4)]
    assert sum(int(line.split()[2]) for line in lines) == 4 * 64 * 2


def test_the_c_program_prints_the_counts_and_the_sums(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler named cc")
    library = Path(mooncake_ep.__file__).with_name("libmooncake_ep.so")
    if not library.exists():
        pytest.skip(f"{library} is not there")
    source = tmp_path / "program.c"
    source.write_text(program("c"))
    executable = tmp_path / "program"
    run(
        [
            compiler,
            "-std=c11",
            "-Wall",
            "-Wextra",
            "-Werror",
            f"-I{ROOT / 'include'}",
            str(source),
            "-o",
            str(executable),
            str(library),
        ]
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(library.parent)}
    assert run([str(executable)], env=environment) == "counts 1 2, out 0 1 2 0\n"
