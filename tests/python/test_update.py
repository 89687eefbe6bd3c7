"""Groups that come together anew: ranks lost and replaced under load, masks, counters, timeouts."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import numpy as np
import pytest

import mooncake_ep as ep
from loads import Loads
from ranks import run_threads
from update_rank import RANKS, TIMEOUT_S

BUFFER = {"max_tokens": 4, "hidden": 64, "experts": 4, "topk": 2, "payloads": ["fp16"]}


def test_a_rank_that_is_killed_under_load_serves_again_soon(tmp_path: Path) -> None:
    loads = Loads(tmp_path)
    try:
        for rank in range(RANKS):
            loads.start(rank)
        loads.plan(0, [True] * RANKS)
        loads.await_round([0, 1, 2], 20)
        for lost in (2, 0):  # 0: who made the id, and with it the hub of the old meeting point
            others = [rank for rank in range(RANKS) if rank != lost]
            killed = time.monotonic()
            loads.kill(lost)
            loads.await_round(others, int(loads.progress.max()) + 1)
            missed = time.monotonic() - killed
            loads.start(lost)
            loads.await_ready(lost)
            loads.plan(loads.ahead(), [True] * RANKS)
            first = json.loads((tmp_path / f"plan{loads.plans - 1}").read_text())["round"]
            loads.await_round(list(range(RANKS)), first)
            again = time.monotonic() - killed
            print(f"rank {lost}: missed within {missed:.2f} s, serves again after {again:.2f} s")
            assert again < 2 + TIMEOUT_S
            loads.await_round(list(range(RANKS)), first + 50)
        loads.finish()
    finally:
        loads.close()


def test_ranks_come_and_go_with_a_world() -> None:
    worlds = [ep.World(2), ep.World(3)]
    two, all_ranks = [1, 1, 0], [True] * 3

    def body(rank: int) -> list[bool]:
        with (
            ep.Group.from_world(
                worlds[1] if rank == 2 else worlds[0],
                rank=rank,
                active_ranks=all_ranks if rank == 2 else two,
            ) as group,
            ep.Buffer(group, **(BUFFER | {"experts": 6})) as buffer,
        ):
            x = np.full((4, 64), rank + 1, np.float16)
            choices = np.array([[0, 5]] * 4)
            if rank != 2:
                assert group.active_ranks == [True, True, False]
                assert buffer.mask == [True, True, False]
                group.update(world=worlds[1])
            assert group.active_ranks == buffer.mask == all_ranks
            given = buffer.dispatch(
                x.view(np.float16).astype(np.float32).astype("float16"), choices
            )
            out = buffer.combine(given.x, given.handle)
            assert (out == 2 * x).all()
            return buffer.mask

    results: dict[int, list[bool]] = {}
    threads = [
        threading.Thread(target=lambda rank=rank: results.update({rank: body(rank)}))
        for rank in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(3), all_ranks)
    for world in worlds:
        world.close()


def test_wrong_members_are_refused() -> None:
    with ep.Group.single() as group:
        with pytest.raises(ValueError, match="active_ranks has 2 values, not one for each of 1"):
            group.update([1, 1])
        with pytest.raises(ValueError, match="this rank's own"):
            group.update([0])
        group.update()
    with pytest.raises(ValueError, match="active_ranks has 1 values"):
        ep.Group.from_unique_id(bytes(128), rank=0, rank_count=2, active_ranks=[1])


def test_rows_are_counted_for_peers_and_experts() -> None:
    def body(rank: object) -> tuple[list[int], list[int], list[int]]:
        with rank.join() as group, ep.Buffer(group, **BUFFER) as buffer:
            x = np.ones((3, 64), np.float16)
            for _ in range(2):
                given = buffer.dispatch(x, np.array([[0, 3], [0, -1], [2, 3]]))
                buffer.combine(given.x, given.handle)
            peers = [buffer.peer_counters(peer) for peer in range(2)]
            assert all(peer.waited_s >= 0 for peer in peers)
            assert buffer.events() == []
            sent, received = [one.rows_sent for one in peers], [one.rows_received for one in peers]
            return buffer.expert_rows(), sent, received

    assert run_threads(body, 2) == [
        ([8, 0], [4, 6], [4, 4]),
        ([4, 8], [4, 6], [6, 6]),
    ]


def test_a_mask_can_be_set_and_a_peer_is_then_left_alone() -> None:
    with ep.Group.single() as group, ep.Buffer(group, **BUFFER) as buffer:
        assert buffer.mask == [True]
        with pytest.raises(ValueError, match="this rank's own"):
            buffer.mask = [False]
        with pytest.raises(ValueError, match="count is 2"):
            buffer.mask = [True, True]

    def body(rank: object) -> int:
        with rank.join() as group, ep.Buffer(group, **BUFFER) as buffer:
            buffer.mask = [peer == group.rank for peer in range(2)]
            given = buffer.dispatch(np.ones((2, 64), np.float16), np.array([[0, 2], [1, 3]]))
            return int(given.count.sum())

    assert run_threads(body, 2) == [2, 2]


def test_a_timeout_can_be_changed_while_a_call_waits() -> None:
    def body(rank: object) -> list[ep.Event]:
        with rank.join() as group, ep.Buffer(group, **BUFFER) as buffer:
            if group.rank == 1:
                group.barrier()
                return []
            shorten = threading.Timer(0.1, lambda: setattr(group, "timeout_s", 0.2))
            shorten.start()
            with pytest.raises(ep.PeerFailedError):
                buffer.dispatch(np.ones((2, 64), np.float16), np.array([[0, 2], [1, 3]]))
            shorten.join()
            assert group.timeout_s == 0.2
            group.timeout_s = 30
            group.barrier()
            return buffer.events()

    events = run_threads(body, 2)[0]
    assert [(one.peer, one.phase, one.reason, one.round) for one in events] == [
        (1, "counts", "late", 1)
    ]
    assert 0.2 <= events[0].waited_s < 10
