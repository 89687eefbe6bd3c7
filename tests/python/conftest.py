"""A test leaves the process as it found it: no shared memory, processes, descriptors, threads.

``--backend`` runs the tests that are marked any_backend elsewhere than on the CPU (devices.py).
"""

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
from typing import Any

import hypothesis
import pytest

import devices
import mooncake_ep as ep
from ranks import Body, Runner, run_processes, run_threads

# On a GPU, JAX would take most of the memory for itself.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

_SETTLE_S = 5.0  # for what ends a moment after its owner

hypothesis.settings.register_profile(
    "mooncake_ep",
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.register_profile(
    "mooncake_ep_on_gpus",
    hypothesis.settings.get_profile("mooncake_ep"),
    max_examples=30,  # a group takes a tenth of a second to join there
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --backend."""
    text = "where tests that are marked any_backend compute (tests/python/devices.py)"
    parser.addoption("--backend", choices=devices.BACKENDS, default="cpu", help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Tell this process and its children the backend."""
    os.environ[devices.VARIABLE] = config.getoption("--backend")
    on_gpus = devices.backend() == "cuda"
    hypothesis.settings.load_profile("mooncake_ep_on_gpus" if on_gpus else "mooncake_ep")
    for line in (
        "any_backend: holds wherever its groups compute",
        "cpu_only(reason): holds on the CPU alone, with NumPy's own arrays",
    ):
        config.addinivalue_line("markers", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what does not concern the backend."""
    for item in items:
        reason = _why_not(item)
        if reason is not None:
            item.add_marker(pytest.mark.skip(reason=reason))


def _why_not(item: pytest.Item) -> str | None:
    """Return why a test is skipped with this backend."""
    if devices.backend() == "cpu" or item.get_closest_marker("gpu"):
        return None
    if not item.get_closest_marker("any_backend"):
        return "it is about the CPU, or says itself where it computes"
    cpu_only = item.get_closest_marker("cpu_only")
    if cpu_only and not devices.on_cpu():
        return f"only on the CPU: {cpu_only.args[0]}"
    info = ep.backend_info("cuda")
    unavailable = devices.backend() == "cuda" and not info.available
    return f"no CUDA backend: {info.reason}" if unavailable else None


@pytest.fixture(params=["threads", "processes"])
def run(request: pytest.FixtureRequest) -> Runner:
    """Run a function on ranks of either kind: ``run(body, rank_count, *arguments)``."""
    if request.param == "processes":
        return run_processes
    return run_threads if devices.threads_are_ranks() else _run_threads_with_gpus


def _run_threads_with_gpus(
    body: Body, rank_count: int, *arguments: Any, **options: Any
) -> list[Any]:
    if devices.need_processes(rank_count):
        pytest.skip(f"{rank_count} ranks that are threads need a GPU each, or another engine")
    return run_threads(body, rank_count, *arguments, **options)


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
    """Return the names of windows: not the lock of a host, which stays once any program made it."""
    return {path.name for path in Path("/dev/shm").glob("mooncake_ep-*")}


def _descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def _threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if not thread.daemon}


@pytest.fixture(autouse=True)
def nothing_leaks(pools: None) -> Iterator[None]:
    """Compare what the process holds before and after the test."""
    # Processes stay, and CUDA opens descriptors when it likes.
    if devices.backend() in ("cuda", "gloo"):
        yield
        return
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
