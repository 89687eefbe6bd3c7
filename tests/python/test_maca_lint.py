"""tests/maca/lint_test.py finds each kind of violation in what is otherwise as it is here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
READ = ("libep/device", "libep/backend", "libep/kernels", "tests/maca")


def run_lint(root: Path, path: str, added: str) -> subprocess.CompletedProcess[str]:
    """Run the lint on a copy of what it reads, with a line added to one file."""
    for name in READ:
        shutil.copytree(ROOT / name, root / name)
    with (root / path).open("a") as file:
        file.write(f"{added}\n")
    command = [sys.executable, str(ROOT / "tests/maca/lint_test.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(
    "comment", ["// cudaMalloc, asm and 0xffffffff", "/* mcUnheardOf\n __ldg */", ""]
)
def test_what_there_is_passes(tmp_path: Path, comment: str) -> None:
    result = run_lint(tmp_path, "libep/device/maca.h", comment)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("path", "added", "complaint"),
    [
        ("libep/device/maca.h", 'asm volatile("");', "asm: mxcc takes no assembly"),
        ("libep/device/maca.h", "mask = 0xffffffff;", "a mask of 32 lanes"),
        ("libep/device/maca.h", "mask = 1u << lane;", "a mask of 32 lanes"),
        ("libep/device/maca.h", "x = __ldg(at);", "__ldg: a load of constant memory"),
        ("libep/device/maca.h", "x = __shfl_down_sync();", "__shfl_down_sync is used, but"),
        ("libep/backend/maca.cc", "cudaFree(x);", "cudaFree: a name of CUDA's"),
        ("libep/backend/maca.cc", "cuMemFree(x);", "cuMemFree: a name of CUDA's"),
        ("libep/backend/maca.cc", "mcHostRegister(x);", "mcHostRegister is used, but"),
        ("libep/backend/gpu.inl", "EP_GPU(HostRegister)(x);", "mcHostRegister is used, but"),
        ("libep/backend/gpu.inl", "EP_TRY_GPU(HostRegister(x));", "mcHostRegister is used, but"),
        ("tests/maca/maca_api.txt", "mcPoke | void() | W", "mcPoke is in tests/maca/maca_api.txt"),
        ("tests/maca/maca_api.txt", "mcPoke | void() | W", "over_cuda does not declare it"),
        ("libep/kernels/rows.h", "#if EP_X", "kernels know no vendor"),
        ("libep/kernels/rows.h", "int on_maca;", "on_maca: kernels know no vendor"),
    ],
)
def test_violations_are_found(tmp_path: Path, path: str, added: str, complaint: str) -> None:
    result = run_lint(tmp_path, path, added)
    assert result.returncode == 1
    assert complaint in result.stdout
