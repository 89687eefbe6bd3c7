"""Ranks that die or never come."""

from __future__ import annotations

import os
import signal
import time

import ml_dtypes
import numpy as np
import pytest

import mooncake_ep as ep
from ranks import Rank, run_processes, run_threads

BF16 = np.dtype(ml_dtypes.bfloat16)
SHAPE = {"max_tokens": 4, "hidden": 64, "experts": 6, "topk": 3}
TIMEOUT_S = 2.0
SLACK_S = 8.0  # for a loaded machine; a wait without a deadline would take for ever
X = np.ones((2, 64), BF16)
IDX = np.array([[0, 2, 4], [1, 3, 5]], np.int32)  # each token to every rank


def lose_a_rank(rank: Rank, use_mask: bool, when: str) -> list[float]:
    """Rank 1 kills itself; return what each survivor's tokens sum to, before and after."""
    group = rank.join()
    buffer = ep.Buffer(group, **SHAPE)
    mask = np.ones(3, np.int32) if use_mask else None
    received = buffer.dispatch(X, IDX, active_ranks=mask)
    sums = [float(buffer.combine(received.x, received, active_ranks=mask)[0, 0])]
    if rank.rank == 1:
        if when == "after sending":
            buffer.dispatch(X, IDX, send_only=True)
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    arguments = {"active_ranks": mask, "timeout_s": TIMEOUT_S}
    if when == "after sending":  # its tokens have come; its sums never will
        received = buffer.dispatch(X, IDX, **arguments)
    try:
        if when == "before sending":
            received = buffer.dispatch(X, IDX, **arguments)
        else:
            buffer.combine(received.x, received, **arguments)
        assert use_mask
    except ep.PeerFailedError as error:
        assert not use_mask
        assert "rank 1" in str(error)
        assert error.status == "MEP_PEER_FAILED"
        if when == "before sending":
            received = error.result
        else:
            assert error.result.shape == X.shape
    assert time.monotonic() - start < TIMEOUT_S + SLACK_S
    if mask is not None:
        assert mask.tolist() == [1, 0, 1]
    for _ in range(5):  # from now on nobody waits for it
        received = buffer.dispatch(X, IDX, active_ranks=mask)
        assert received.count.sum() == 4
        sums.append(float(buffer.combine(received.x, received, active_ranks=mask)[0, 0]))
    buffer.close()
    group.close()
    return sums


@pytest.mark.parametrize("when", ["before sending", "after sending"])
@pytest.mark.parametrize("use_mask", [False, True])
def test_a_killed_rank_is_masked_within_the_timeout_and_the_others_go_on(
    use_mask: bool, when: str
) -> None:
    results = run_processes(lose_a_rank, 3, use_mask, when, dying=[1])
    assert results == [[3.0] + [2.0] * 5, None, [3.0] + [2.0] * 5]


def leave_one_out(rank: Rank) -> list[float]:
    mask = np.array([1, 1, 0, 7], np.int32)  # longer than the ranks; the rest is not ours
    with rank.join() as group, ep.Buffer(group, **SHAPE) as buffer:
        if rank.rank == 2:
            return []
        received = buffer.dispatch(X, IDX, active_ranks=mask, timeout_s=5)
        total = buffer.combine(received.x, received, active_ranks=mask, timeout_s=5)
        assert mask.tolist() == [1, 1, 0, 7]
        return [float(value) for value in total[:, 0]]


def test_a_rank_that_is_masked_beforehand_is_not_waited_for() -> None:
    assert run_threads(leave_one_out, 3) == [[2.0, 2.0], [2.0, 2.0], []]


def pending_when_lost(rank: Rank) -> float:
    """Receive a round that was sent before a rank died."""
    with rank.join() as group, ep.Buffer(group, **SHAPE) as buffer:
        if rank.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        pending = buffer.dispatch(X, IDX, send_only=True, timeout_s=TIMEOUT_S)
        with pytest.raises(ep.PeerFailedError, match="rank 1") as caught:
            pending.receive()
        received = caught.value.result
        with pytest.raises(ep.EpError, match="received already"):
            pending.receive()
        return float(buffer.combine(received.x, received)[0, 0])


def test_a_pending_round_gives_what_the_others_sent() -> None:
    assert run_processes(pending_when_lost, 3, dying=[1]) == [2.0, None, 2.0]


def never_create(rank: Rank) -> str:
    with rank.join(TIMEOUT_S) as group:
        if rank.rank == 1:
            return ""
        with pytest.raises(ep.EpError, match=r"\b1\b") as caught:
            ep.Buffer(group, **SHAPE)
        return str(caught.value)


def test_a_rank_that_never_creates_its_buffer_is_named() -> None:
    assert all(run_threads(never_create, 2)[:1])
