"""What the check for leaks after each test (conftest.py) takes for one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def lock_of_host() -> Iterator[Path]:
    """Name a file as the lock of a host is named; it goes after the test was checked."""
    path = Path(f"/dev/shm/mooncake_ep.{os.getpid()}.turn")
    yield path
    path.unlink()


def test_the_lock_of_a_host_that_some_program_makes_is_none(lock_of_host: Path) -> None:
    lock_of_host.touch()
