"""Many rounds: in halves, in any order, late, into the same arrays."""

from __future__ import annotations

import gc
import threading
import warnings
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mooncake_ep as ep
from devices import make_buffer, make_single
from model import check_dispatched, routing
from ranks import Rank, Runner, run_ranks

pytestmark = pytest.mark.any_backend

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = {"max_tokens": 6, "hidden": 64, "experts": 4, "topk": 2}


def inputs(seed: int, ranks: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Make (x, topk_idx) of all ranks for one round."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 7, ranks)
    x = [rng.standard_normal((n, 64)).astype(BF16) for n in tokens]
    return x, [routing(rng, n, 4, 2) for n in tokens]


def expected_sum(x: np.ndarray) -> bytes:
    """Sum of both experts' outputs if they are the identity: twice the row, exact in bf16."""
    return bytes((x.astype(np.float32) * 2).astype(BF16).tobytes())


def in_halves(rank: Rank, order: tuple[int, ...], in_flight: int) -> None:
    """Send as many rounds as may be in flight, receive in ``order``; combine likewise."""
    with rank.join() as group, make_buffer(group, **SHAPE, rounds_in_flight=in_flight) as buffer:
        for repeat in range(4):
            rounds = [inputs(10 * repeat + i, group.size) for i in range(in_flight)]
            sent = [
                buffer.dispatch(x[group.rank], idx[group.rank], send_only=True) for x, idx in rounds
            ]
            gc.collect()  # only the pending rounds hold the arrays now
            received: dict[int, ep.Dispatched] = {i: sent[i].receive() for i in order}
            for i, (x, idx) in enumerate(rounds):
                check_dispatched(received[i], x, idx, group, 4)
            returning = [
                buffer.combine(received[i].x, received[i], send_only=True) for i in range(in_flight)
            ]
            for i in order:
                out = returning[i].receive()
                assert out.tobytes() == expected_sum(rounds[i][0][group.rank]), i


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=str)
def test_two_rounds_in_flight_are_received_in_any_order(run: Runner, order: tuple[int]) -> None:
    run(in_halves, 2, order, 2)


def test_eight_rounds_in_flight_are_received_in_any_order() -> None:
    run_ranks(in_halves, 4, (3, 0, 7, 1, 6, 2, 5, 4), 8)


def test_a_round_beyond_the_limit_is_refused_and_the_others_go_on() -> None:
    with make_single() as group, make_buffer(group, **SHAPE, rounds_in_flight=2) as buffer:
        x, idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        sent = [buffer.dispatch(x, idx, send_only=True) for _ in range(2)]
        with pytest.raises(ep.EpError, match="rounds_in_flight_max") as caught:
            buffer.dispatch(x, idx)
        assert caught.value.status == "MEP_INVALID_STATE"
        received = [pending.receive() for pending in sent]
        with pytest.raises(ep.EpError, match="received already"):
            sent[0].receive()
        assert buffer.combine(received[1].x, received[1]).tobytes() == x.tobytes()
        assert buffer.dispatch(x, idx).count[0] == 1


def test_a_handle_in_flight_cannot_be_used() -> None:
    with make_single() as group, make_buffer(group, **SHAPE) as buffer:
        x, idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        first = buffer.dispatch(x, idx)
        pending = buffer.dispatch(x, idx, handle=first.handle, send_only=True)
        with pytest.raises(ep.EpError, match="in flight"):
            buffer.dispatch(x, idx, handle=first.handle)
        with pytest.raises(ep.EpError, match="in flight"):
            buffer.combine(first.x, first)
        again = pending.receive()
        assert again.handle is first.handle
        assert buffer.combine(again.x, first).tobytes() == x.tobytes()


def test_a_pending_round_may_be_received_in_another_thread() -> None:
    with make_single() as group, make_buffer(group, **SHAPE) as buffer:
        x, idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        pending = buffer.dispatch(x, idx, send_only=True)
        received: list[ep.Dispatched] = []
        thread = threading.Thread(target=lambda: received.append(pending.receive()))
        thread.start()
        thread.join(20)
        assert received[0].count[0] == 1


def test_a_round_that_is_dropped_warns_and_its_handle_is_not_used_again() -> None:
    with make_single() as group, make_buffer(group, **SHAPE, rounds_in_flight=2) as buffer:
        x, idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        with pytest.warns(ResourceWarning, match="never received"):
            buffer.dispatch(x, idx, send_only=True)
            gc.collect()
        received = buffer.dispatch(x, idx)
        assert buffer.combine(received.x, received).tobytes() == x.tobytes()
        with pytest.raises(ep.EpError, match="in flight"):
            buffer.dispatch(x, idx)


def test_a_pending_round_of_a_closed_buffer_fails_quietly() -> None:
    with make_single() as group, warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer = make_buffer(group, **SHAPE)
        pending = buffer.dispatch(
            np.ones((1, 64), BF16), np.zeros((1, 1), np.int32), send_only=True
        )
        buffer.close()
        with pytest.raises(ep.EpError, match="buffer is closed"):
            pending.receive()
        del pending
        gc.collect()


def test_handles_outlive_later_rounds_and_are_used_again_when_dropped() -> None:
    with make_single() as group, make_buffer(group, **SHAPE) as buffer:
        rounds = [inputs(seed, 1) for seed in range(5)]
        kept = [buffer.dispatch(x[0], idx[0]) for x, idx in rounds]
        for (x, _), received in zip(rounds, kept, strict=True):
            for _ in range(2):
                assert buffer.combine(received.x, received).tobytes() == expected_sum(x[0])
        del kept, received
        gc.collect()
        created = len(buffer._handles)
        for x, idx in rounds:
            buffer.dispatch(x[0], idx[0])
        assert len(buffer._handles) == created


def test_out_is_filled_and_returned_and_its_old_handle_stays_valid() -> None:
    with make_single() as group, make_buffer(group, **SHAPE) as buffer:
        (x, idx), (x2, idx2) = inputs(1, 1), inputs(2, 1)
        out = buffer.dispatch(x[0], idx[0])
        old_handle, old_x, pointer = out.handle, np.array(out.x), out.x.ctypes.data
        assert buffer.dispatch(x2[0], idx2[0], out=out) is out
        assert out.x.ctypes.data == pointer
        assert out.handle is not old_handle
        check_dispatched(out, x2, idx2, group, 4)
        sums = np.empty((len(x2[0]), 64), BF16)
        assert buffer.combine(out.x, out, out=sums) is sums
        assert sums.tobytes() == expected_sum(x2[0])
        assert old_handle is not None
        assert buffer.combine(old_x, old_handle).tobytes() == expected_sum(x[0])


def test_optional_outputs_may_be_left_out() -> None:
    with make_single() as group, make_buffer(group, **SHAPE) as buffer:
        x, idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        out = ep.Dispatched(np.empty((4, 6, 64), BF16), None, np.empty(4, np.int32))
        received = buffer.dispatch(x, idx, out=out)
        assert received.src_info is None
        assert received.layout_range is None
        assert buffer.combine(received.x, received).tobytes() == x.tobytes()


def with_delays(rank: Rank, seed: int, count: int) -> bytes:
    """Run rounds in which each rank is late at random; return all that was received."""
    shared, own = np.random.default_rng(seed), np.random.default_rng((seed, rank.rank))
    log = []
    with rank.join() as group, make_buffer(group, **SHAPE) as buffer:
        out = None
        for number in range(count):
            x, idx = inputs(int(shared.integers(1 << 30)), group.size)
            if own.random() < 0.02:
                threading.Event().wait(0.002)  # late, not waiting for anything
            if number % 2:
                received = buffer.dispatch(x[group.rank], idx[group.rank])
            else:
                received = out = buffer.dispatch(x[group.rank], idx[group.rank], out=out)
            if number % 50 == 0:
                check_dispatched(received, x, idx, group, 4)
            if own.random() < 0.02:
                threading.Event().wait(0.002)
            total = buffer.combine(received.x, received)
            assert total.tobytes() == expected_sum(x[group.rank]), number
            log.append(total.tobytes())
        counters = buffer.counters()
    assert counters == ep.BufferCounters(count, count, 0, 0)
    return b"".join(log)


def test_a_thousand_rounds_with_late_ranks(run: Runner) -> None:
    run(with_delays, 2, 3, 1000)


def random_sums(rank: Rank, dtype: Any) -> bytes:
    """Sum rows whose rounding depends on the order of the additions."""
    rng = np.random.default_rng(11)
    x = rng.standard_normal((6, 64)).astype(dtype)
    idx, weights = routing(rng, 6, 8, 6), rng.random((6, 6), dtype=np.float32)
    shape = {**SHAPE, "experts": 8, "topk": 6}
    with rank.join() as group, make_buffer(group, **shape, payloads=["bf16", "fp32"]) as buffer:
        received = buffer.dispatch(x, idx, weights)
        return bytes(buffer.combine(received.x, received).tobytes())


@pytest.mark.parametrize("dtype", [BF16, np.dtype("f4")], ids=str)
def test_two_runs_give_the_same_bits(dtype: Any) -> None:
    assert run_ranks(random_sums, 4, dtype) == run_ranks(random_sums, 4, dtype)


def test_two_buffers_in_two_threads_do_not_disturb_each_other() -> None:
    def serve(seed: int, errors: list[BaseException]) -> None:
        try:
            with make_single() as group, make_buffer(group, **SHAPE) as buffer:
                for number in range(300):
                    x, idx = inputs(seed + number, 1)
                    received = buffer.dispatch(x[0], idx[0])
                    assert buffer.combine(received.x, received).tobytes() == expected_sum(x[0])
        except BaseException as error:
            errors.append(error)

    errors: list[BaseException] = []
    threads = [threading.Thread(target=serve, args=(1000 * i, errors)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert errors == []
