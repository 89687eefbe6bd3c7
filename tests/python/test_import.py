"""Importing the package."""

from __future__ import annotations

import subprocess
import sys

import mooncake_ep as ep


def test_importing_the_package_loads_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, mooncake_ep\n"
        "print([name for name in ('torch', 'numpy', 'jax', 'ml_dtypes') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_all_public_names_exist() -> None:
    assert sorted(ep.__all__) == sorted(set(ep.__all__))
    for name in ep.__all__:
        assert getattr(ep, name).__doc__


def test_version_is_that_of_the_header() -> None:
    assert ep.version() == (0, 1, 0)


def test_the_cpu_backend_is_always_available() -> None:
    info = ep.backend_info("cpu")
    assert (info.name, info.available, info.device_count, info.reason) == ("cpu", True, 1, "")


def test_an_absent_backend_says_why() -> None:
    for name in ("cuda", "maca"):
        info = ep.backend_info(name)
        assert info.name == name
        assert info.available == (info.reason == "")
