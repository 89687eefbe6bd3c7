"""What a buffer says of itself, and what it leaves behind."""

from __future__ import annotations

import contextlib
import gc
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

import mooncake_ep as ep
from devices import make_single, on_cpu
from ranks import Rank, Runner

pytestmark = pytest.mark.any_backend
counts_threads = pytest.mark.cpu_only("counts threads, of which a GPU's driver has its own")

SHAPE = {"max_tokens": 4, "hidden": 128, "experts": 8, "topk": 2}


def describe(rank: Rank) -> None:
    with rank.join() as group, ep.Buffer(group, **SHAPE, threads=2) as buffer:
        assert buffer.group is group
        shape = (buffer.max_tokens, buffer.hidden, buffer.experts, buffer.topk)
        assert shape == (4, 128, 8, 2)
        assert buffer.local_experts == 8 // group.size
        assert buffer.threads == 2
        sizes = ep.Buffer.query_sizes(rank_count=group.size, **SHAPE, threads=2)
        assert sizes.handle_bytes == buffer.handle_bytes
        # A GPU's messages may go by line, which takes more: the query does not know the devices.
        assert sizes.window_bytes <= buffer.window_bytes
        assert sizes.window_bytes == buffer.window_bytes or not on_cpu()
        assert buffer.counters() == ep.BufferCounters(0, 0, 0, 0)


def test_a_buffer_knows_its_sizes(run: Runner) -> None:
    run(describe, 2)


def test_a_mask_that_is_none_is_refused_by_name() -> None:
    with make_single() as group, ep.Buffer(group, **SHAPE) as buffer:
        buffer.mask = iter([True])  # type: ignore[assignment]
        for mask, error, message in (
            ([True, True], ValueError, "mask: count is 2"),
            ([False], ValueError, r"mask: active\[0\] is 0"),
            ("1", TypeError, "mask is a str"),
            (1, TypeError, "mask is a int"),
        ):
            with pytest.raises(error, match=message):
                buffer.mask = mask  # type: ignore[assignment]
        assert buffer.mask == [True]


def limit_sms(rank: Rank) -> None:
    with rank.join() as group:
        with ep.Buffer(group, **SHAPE) as buffer:
            every = buffer.sms
        with ep.Buffer(group, **SHAPE, max_sms=3) as buffer:
            assert buffer.sms == (0 if on_cpu() else 3)
        with ep.Buffer(group, **SHAPE, max_sms=every + 3) as buffer:
            assert buffer.sms == every


def test_a_buffer_keeps_to_the_multiprocessors_it_may_fill(run: Runner) -> None:
    run(limit_sms, 2)


def test_more_rounds_in_flight_take_more_memory() -> None:
    few, many = (
        ep.Buffer.query_sizes(rank_count=2, **SHAPE, rounds_in_flight=count) for count in (1, 8)
    )
    assert many.window_bytes > few.window_bytes


def native_threads() -> int:
    """Count the library's threads; others come and go with the frameworks of other tests."""
    names = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            names.append((task / "comm").read_text().strip())
    return names.count("mep_worker")


@counts_threads
def test_closing_a_buffer_ends_its_threads() -> None:
    with ep.Group.single() as group:
        before = native_threads()
        for _ in range(3):
            with ep.Buffer(group, **SHAPE, threads=4):
                assert native_threads() == before + 3
        assert native_threads() == before


@counts_threads
def test_a_forgotten_buffer_and_group_are_released() -> None:
    group = ep.Group.single()
    buffer = ep.Buffer(group, **SHAPE, threads=3)
    threads = native_threads()
    alive = weakref.ref(buffer), weakref.ref(group)
    del buffer, group
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    assert native_threads() == threads - 2


FORGETFUL = """
import mooncake_ep as ep, numpy as np
group = ep.Group.single()
buffer = ep.Buffer(group, max_tokens=4, hidden=128, experts=8, topk=2, payloads=["fp32"], threads=2)
x, idx = np.ones((1, 128), np.float32), np.zeros((1, 1), np.int32)
received = buffer.dispatch(x, idx)
pending = buffer.dispatch(x, idx, send_only=True)
"""


@pytest.mark.cpu_only("the program has NumPy arrays")
def test_a_program_that_closes_nothing_ends_in_silence() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", FORGETFUL],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
