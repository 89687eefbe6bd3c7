"""tests/check_includes.py finds each kind of violation, and nothing in a clean tree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tests" / "check_includes.py"

CLEAN = {
    "include/mooncake_ep.h": "#include <stdint.h>\n",
    "libep/api/setup.cc": '#include "mooncake_ep.h"\n#include "core/group.h"\n',
    "libep/base/status.h": '#include "mooncake_ep.h"\n',
    "libep/wire/layout.h": "#pragma once\n#include <cstdint>\n",
    "libep/device/device.h": '#include "wire/layout.h"\n#if defined(X)\n#endif\n',
    "libep/kernels/kernels.h": '#pragma once\n#include "wire/layout.h"\n',
    "libep/kernels/dispatch.h": '#include "device/device.h"\n#include "kernels/kernels.h"\n',
    "libep/backend/cpu.cc": '#include "kernels/dispatch.h"\n#include "device/device.h"\n',
    "libep/backend/backend.h": '#include "kernels/kernels.h"\n',
    "libep/transport/p2p.cc": '#include "backend/backend.h"\n#include "wire/layout.h"\n',
    "libep/core/group.h": '#include "kernels/kernels.h"\n#include "backend/backend.h"\n',
}


def run_check(root: Path, changes: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the check on the clean tree with some files replaced or added."""
    for name, text in (CLEAN | changes).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, str(CHECK), str(root)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_clean_tree_passes(tmp_path: Path) -> None:
    result = run_check(tmp_path, {})
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    ("path", "text", "complaint"),
    [
        ("libep/base/log.h", '#include "core/group.h"', "log.h:1: base may not include core"),
        ("libep/base/log.cc", '\n#  include "wire/layout.h"', "cc:2: base may not include wire"),
        ("libep/api/setup.cc", '#include "backend/backend.h"', "api may not include backend"),
        ("libep/backend/gpu.inl", '#include "core/group.h"', "backend may not include core"),
        ("libep/backend/cuda.cu", '#include "core/group.h"', "backend may not include core"),
        ("libep/core/a.cc", '#include "device/device.h"', "core may not include device"),
        ("libep/core/a.cc", '#include "kernels/dispatch.h"', "may include only kernels/kernels.h"),
        ("libep/wire/a.h", '#include "base/status.h"', "wire may not include base"),
        ("libep/wire/a.h", '#include "mooncake_ep.h"', "wire may not include mooncake_ep.h"),
        ("libep/kernels/a.h", "#include <mooncake_ep.h>", "kernels may not include mooncake_ep.h"),
        ("libep/core/a.cc", '#include "group.h"', '"group.h" is not a file relative to libep/'),
        ("libep/core/a.cc", '#include "../base/status.h"', "is not a file relative to libep/"),
        ("libep/kernels/a.h", "#ifndef A_H", "a.h:1: a kernel is the same source on every device"),
        ("libep/kernels/a.h", "\n # if X\n#endif", "a.h:2: a kernel is the same source"),
        ("libep/misc/a.h", "", "misc is not a layer"),
        ("include/mooncake_ep.h", "\n" * 850, "850 lines; it stays under 850"),
    ],
)
def test_a_violation_is_named(tmp_path: Path, path: str, text: str, complaint: str) -> None:
    result = run_check(tmp_path, {path: text})
    assert result.returncode == 1
    assert complaint in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_every_violation_is_printed(tmp_path: Path) -> None:
    both = '#include "core/group.h"\n#include "wire/layout.h"\n'
    result = run_check(tmp_path, {"libep/base/log.h": both})
    assert result.stdout.count("base may not include") == 2


def test_without_an_argument_it_checks_this_repository() -> None:
    command = [sys.executable, str(CHECK)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout) == (0, "")
