"""A test leaves the process as it found it: no shared memory, processes, descriptors, threads."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from pathlib import Path

import hypothesis
import pytest

from ranks import Runner, run_processes, run_threads

# On a GPU, JAX would take most of the memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_SETTLE_S = 5.0  # for what ends a moment after its owner

hypothesis.settings.register_profile(
    "mooncake_ep",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("mooncake_ep")


@pytest.fixture(params=["threads", "processes"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Run a function on ranks of either kind: ``run(body, rank_count, *arguments)``."""
    return run_threads if request.param == "threads" else run_processes


@pytest.fixture(scope="session", autouse=True)
def pools() -> None:
    """Start what others start once: multiprocessing's tracker, JAX's and torch's pools."""
    resource_tracker.ensure_running()
    for name in ("torch", "jax.numpy"):
        with contextlib.suppress(ImportError):
            framework = importlib.import_module(name)
            framework.zeros((64, 64)) @ framework.zeros((64, 64))


def _children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def _shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("mooncake_ep*")}


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(autouse=True)
def nothing_leaks(pools: None) -> Iterator[None]:
    """Compare what the process holds before and after the test."""
    memory, children, descriptors, threads = (
        _shared_memory(),
        _children(),
        _descriptors(),
        _threads(),
    )
    yield
    deadline = time.monotonic() + _SETTLE_S
    new_memory = _shared_memory() - memory
    while True:
        gc.collect()
        # Other programs may use the library too: only a name that stays is a leak.
        new_memory &= _shared_memory()
        leaks = {
            "shared memory": new_memory,
            "processes": _children() - children,
            "descriptors": max(0, _descriptors() - descriptors),
            "threads": _threads() - threads,
        }
        if not any(leaks.values()):
            return
        if time.monotonic() > deadline:
            pytest.fail(f"the test leaked {leaks}")
        threading.Event().wait(0.05)
