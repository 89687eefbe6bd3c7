"""Joining a group in every way, and what goes wrong."""

from __future__ import annotations

import math
import os
import socket
import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mooncake_ep as ep
from mooncake_ep._lib import lib
from ranks import Rank, Runner, run_processes, run_threads

BUFFER = {"max_tokens": 4, "hidden": 64, "experts": 4, "topk": 2}


def describe(rank: Rank) -> tuple[Any, ...]:
    with rank.join() as group:
        gathered = group.all_gather(bytes([rank.rank]) * 3)
        group.barrier()
        names = [group.transport(peer).name for peer in range(group.size)]
        return group.rank, group.rank_count, group.backend, group.device_id, gathered, names


def test_every_rank_sees_the_same_group(run: Runner) -> None:
    far = "thread" if run is run_threads else "shm"
    for rank, description in enumerate(run(describe, 3)):
        names = ["self" if peer == rank else far for peer in range(3)]
        gathered = [b"\0\0\0", b"\1\1\1", b"\2\2\2"]
        assert description == (rank, 3, "cpu", 0, gathered, names)


def test_a_single_rank_meets_nobody() -> None:
    with ep.Group.single(timeout_s=2.5) as group:
        assert (group.rank, group.size, group.timeout_s) == (0, 1, 2.5)
        assert group.all_gather(b"x") == [b"x"]
        transport = group.transport(0)
        assert (transport.kind, transport.name) == (lib.MEP_TRANSPORT_SELF, "self")
        assert transport.reason


def test_timeout_is_100_seconds_by_default_and_infinity_means_never() -> None:
    with ep.Group.single() as group:
        assert group.timeout_s == 100.0
    with ep.Group.single(timeout_s=math.inf) as group:
        assert group.timeout_s == math.inf


def test_a_timeout_that_is_set_is_the_one_that_is_told() -> None:
    with ep.Group.single() as group:
        for given, told in ((math.inf, math.inf), (1e-9, 1e-6), (None, 100.0), (True, 1.0)):
            group.timeout_s = given  # type: ignore[assignment]
            assert group.timeout_s == told
            assert type(group.timeout_s) is float


@pytest.mark.parametrize("timeout_s", [0, -1, -math.inf, math.nan])
def test_a_timeout_that_is_not_positive_is_refused(timeout_s: float) -> None:
    with pytest.raises(ValueError, match="timeout_s"):
        ep.Group.single(timeout_s=timeout_s)


def test_closing_is_idempotent_and_using_a_closed_group_fails() -> None:
    group = ep.Group.single()
    group.close()
    group.close()
    assert group.closed
    for use in (group.barrier, lambda: group.transport(0), lambda: ep.Buffer(group, **BUFFER)):
        with pytest.raises(ep.EpError, match="group is closed"):
            use()
    assert group.rank == 0


def test_wrong_arguments_are_refused_and_the_group_stays_usable() -> None:
    with ep.Group.single() as group:
        for peer in (-1, 1):
            with pytest.raises(ValueError, match="peer"):
                group.transport(peer)
        with pytest.raises(ValueError, match="data has 0 bytes"):
            group.all_gather(b"")
        with pytest.raises(ValueError, match="data has 1048577 bytes"):
            group.all_gather(bytes(lib.MEP_ALL_GATHER_BYTES_MAX + 1))
        with pytest.raises(TypeError, match="data has elements of 4 bytes"):
            group.all_gather(np.ones(1, np.float32))  # type: ignore[arg-type]
        assert group.all_gather(np.frombuffer(b"z", np.uint8)) == [b"z"]  # type: ignore[arg-type]
        assert group.all_gather(b"y") == [b"y"]


def test_an_unknown_backend_is_a_value_error_and_an_absent_one_is_not_implemented() -> None:
    with pytest.raises(ValueError, match="backend 'tpu'"):
        ep.Group.single(backend="tpu")
    absent = [name for name in ("cuda", "maca") if not ep.backend_info(name).available]
    for name in absent:
        with pytest.raises(NotImplementedError):
            ep.Group.single(backend=name)


def test_unique_ids_are_checked() -> None:
    with pytest.raises(ValueError, match="unique_id has 3 bytes, not 128"):
        ep.Group.from_unique_id(b"abc", rank=0, rank_count=2)
    unique_id = ep.create_unique_id()
    assert len(unique_id) == lib.MEP_UNIQUE_ID_BYTES
    for rank in (-1, 2):
        with pytest.raises(ValueError, match="rank"):
            ep.Group.from_unique_id(unique_id, rank=rank, rank_count=2)
    ep.destroy_unique_id(unique_id)
    ep.destroy_unique_id(unique_id)
    with pytest.raises(ValueError, match="address"):
        ep.create_unique_id("no.such.host.invalid")


def test_a_missing_rank_is_named() -> None:
    unique_id = ep.create_unique_id()
    start = time.monotonic()
    with pytest.raises(ep.EpTimeoutError, match=r"\b1\b") as caught:
        ep.Group.from_unique_id(unique_id, rank=0, rank_count=2, timeout_s=0.2)
    assert time.monotonic() - start < 10
    assert isinstance(caught.value, TimeoutError)
    assert caught.value.status == "MEP_TIMEOUT"
    with ep.World(3) as world, pytest.raises(ep.EpTimeoutError, match=r"\b2\b"):
        ep.Group.from_world(world, rank=0, timeout_s=0.2)


def test_ranks_that_disagree_on_their_number_are_refused() -> None:
    unique_id = ep.create_unique_id()
    errors: list[Exception] = []

    def join(rank: int, rank_count: int) -> None:
        try:
            ep.Group.from_unique_id(unique_id, rank=rank, rank_count=rank_count, timeout_s=5)
        except ep.EpError as error:
            errors.append(error)

    threads = [threading.Thread(target=join, args=pair) for pair in ((0, 2), (1, 3))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(errors) == 2
    assert "MEP_MISMATCH" in {error.status for error in errors if isinstance(error, ep.EpError)}


def test_a_world_is_checked() -> None:
    with pytest.raises(ValueError, match="rank_count"):
        ep.World(0)
    world = ep.World(1)
    with pytest.raises(ValueError, match="rank"):
        ep.Group.from_world(world, rank=1)
    ep.Group.from_world(world, rank=0).close()
    world.close()
    world.close()
    with pytest.raises(ep.EpError, match="world is closed"):
        ep.Group.from_world(world, rank=0)


# ---- Callbacks -----------------------------------------------------------------------------------


class Hub:
    """An all-gather among threads, as MPI or a caller would offer it."""

    def __init__(self, rank_count: int) -> None:
        self.rank_count = rank_count
        self.barrier = threading.Barrier(rank_count)
        self.data: list[bytes] = [b""] * rank_count

    def all_gather(self, rank: int, data: bytes) -> list[bytes]:
        self.data[rank] = data
        self.barrier.wait(20)
        gathered = list(self.data)
        self.barrier.wait(20)
        return gathered


def join_by_callback(rank: Rank, hub: Hub) -> list[bytes]:
    with ep.Group.from_callback(
        lambda data: hub.all_gather(rank.rank, data), rank=rank.rank, rank_count=rank.rank_count
    ) as group:
        ep.Buffer(group, **BUFFER).close()
        return group.all_gather(bytes([rank.rank]))


def test_a_group_from_a_callback_gathers_by_it() -> None:
    assert run_threads(join_by_callback, 2, Hub(2)) == [[b"\0", b"\1"]] * 2


def test_what_the_callback_raises_is_raised_again() -> None:
    class Unreachable(Exception):
        pass

    def fail(data: bytes) -> list[bytes]:
        raise Unreachable(f"{len(data)} bytes")

    with pytest.raises(Unreachable, match="bytes"):
        ep.Group.from_callback(fail, rank=0, rank_count=2)
    with pytest.raises(ValueError, match="all_gather returned lengths"):
        ep.Group.from_callback(lambda data: [data], rank=0, rank_count=2)
    with pytest.raises(
        TypeError, match=r"all_gather\(data\) is a NoneType, not a sequence of bytes"
    ):
        ep.Group.from_callback(lambda data: None, rank=0, rank_count=2)  # type: ignore[arg-type,return-value]
    with pytest.raises(TypeError, match=r"all_gather\(data\)\[1\] is a str, not bytes"):
        ep.Group.from_callback(lambda data: [data, "x"], rank=0, rank_count=2)  # type: ignore[list-item]


def test_collectives_are_checked_before_they_are_needed() -> None:
    for name in ("all_gather", "all_to_all", "all_to_all_on_stream"):
        given: Any = {"all_gather": lambda data: [data], name: "x"}
        with pytest.raises(TypeError, match=f"{name} is a str, not callable"):
            ep.Group.from_callback(**given, rank=0, rank_count=1)
        with ep.Group.single() as group, pytest.raises(TypeError, match=f"{name} is a str"):
            group.update(**given)
    with pytest.raises(TypeError, match="all_gather is a NoneType, not callable"):
        ep.Group.from_callback(None, rank=0, rank_count=1)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="comm is a object, not a communicator"):
        ep.Group.from_mpi(object())


def test_active_ranks_are_truth_values_by_rank() -> None:
    def join(active_ranks: Any) -> ep.Group:
        with ep.World(1) as world:
            return ep.Group.from_world(world, rank=0, active_ranks=active_ranks)

    for members in ([1], (True,), np.ones(1, bool), iter([1]), b"\1"):
        with join(members) as group:
            assert group.active_ranks == [True]
    with ep.Group.single() as group:
        for wrong in ("1", {0: True}, 1, [np.ones(2)]):
            with pytest.raises(TypeError, match="active_ranks"):
                join(wrong)
            with pytest.raises(TypeError, match="active_ranks"):
                group.update(wrong, all_gather=lambda data: [data])  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="active_ranks has 2 values, not one for each of 1"):
            group.update([True, True], all_gather=lambda data: [data])
        assert group.active_ranks == [True]


def test_a_callback_that_fails_later_ends_all_set_up_but_not_the_buffers() -> None:
    broken: list[Exception] = []

    def all_gather(data: bytes) -> list[bytes]:
        if broken:
            raise broken[0]
        return [data]

    with (
        ep.Group.from_callback(all_gather, rank=0, rank_count=1) as group,
        ep.Buffer(group, **BUFFER) as buffer,
    ):
        broken.append(ConnectionResetError("gone"))
        with pytest.raises(ConnectionResetError, match="gone"):
            group.all_gather(b"x")
        broken.clear()
        with pytest.raises(ep.EpError, match="callback") as caught:
            ep.Buffer(group, **BUFFER)
        assert caught.value.status == "MEP_BOOTSTRAP_FAILED"
        x = np.ones((2, 64), ml_dtypes.bfloat16)
        received = buffer.dispatch(x, np.zeros((2, 1), np.int32))
        assert buffer.combine(received.x, received).tobytes() == x.tobytes()


class Comm:
    """The part of an mpi4py communicator that from_mpi uses."""

    def __init__(self, rank: int, hub: Hub) -> None:
        self.rank, self.hub = rank, hub

    def Get_rank(self) -> int:
        return self.rank

    def Get_size(self) -> int:
        return self.hub.rank_count

    def allgather(self, data: bytes) -> list[bytes]:
        return self.hub.all_gather(self.rank, data)


def join_by_mpi(rank: Rank, hub: Hub) -> tuple[int, int]:
    with ep.Group.from_mpi(Comm(rank.rank, hub)) as group:
        return group.rank, group.size


def test_a_group_from_mpi_has_its_ranks() -> None:
    assert run_threads(join_by_mpi, 2, Hub(2)) == [(0, 2), (1, 2)]


# ---- Other programs' rendezvous ------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_by_torch(rank: Rank, port: int) -> list[bytes]:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", f"tcp://127.0.0.1:{port}", rank=rank.rank, world_size=rank.rank_count
    )
    with ep.Group.from_torch() as group:
        gathered = group.all_gather(bytes([rank.rank]))
        half = dist.new_group([1])
        if rank.rank == 1:
            with ep.Group.from_torch(half) as alone:
                assert (alone.rank, alone.size) == (0, 1)
        else:
            with pytest.raises(ValueError, match=r"process_group .* without this rank"):
                ep.Group.from_torch(half)
        with pytest.raises(ValueError, match="process_group 1: "):
            ep.Group.from_torch(1)
    dist.destroy_process_group()
    return gathered


def test_a_group_from_torch_has_the_ranks_of_its_process_group() -> None:
    pytest.importorskip("torch")
    assert run_processes(join_by_torch, 2, free_port()) == [[b"\0", b"\1"]] * 2


def join_by_env(rank: Rank, port: int) -> list[bytes]:
    os.environ.update(
        RANK=str(rank.rank),
        WORLD_SIZE=str(rank.rank_count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port - 1),
        MOONCAKE_EP_SECRET="only for this test",
    )
    with ep.Group.from_env(timeout_s=20) as group:
        return group.all_gather(bytes([rank.rank]))


def test_a_group_from_the_environment_meets_at_the_master_port_plus_one() -> None:
    assert run_processes(join_by_env, 2, free_port()) == [[b"\0", b"\1"]] * 2


def test_an_environment_without_the_variables_names_the_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=r"RANK|WORLD_SIZE"):
        ep.Group.from_env()
