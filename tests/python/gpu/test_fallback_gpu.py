"""GPUs that reach no memory of each other: by NCCL, by the caller's engine, through host memory."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from functools import partial
from typing import Any

import numpy as np
import pytest

import mooncake_ep as ep
from mooncake_ep._callbacks import torch_all_to_all_on_stream
from ranks import Rank, run_processes

_INFO = ep.backend_info("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _INFO.device_count < 2, reason=f"two GPUs are needed, here are {_INFO.device_count}"
    ),
]
torch = pytest.importorskip("torch")

HIDDEN, EXPERTS, TOPK, TOKENS = 512, 8, 3, 16
SHAPE: dict[str, Any] = {"max_tokens": TOKENS, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK}
ROUNDS = 6
TIMEOUT_S = 3.0
SLACK = 1.1  # of a wait that ends at its deadline
SLACK_S = 0.05
DEADLINE_S = 60.0


def given(rank: int, number: int, device: Any) -> tuple[Any, Any, Any]:
    """Make one rank's tokens of a round."""
    rng = np.random.default_rng((rank, number))
    x = torch.tensor(rng.standard_normal((TOKENS, HIDDEN)), dtype=torch.bfloat16, device=device)
    idx = np.stack([rng.permutation(EXPERTS)[:TOPK] for _ in range(TOKENS)])
    weights = rng.random((TOKENS, TOPK), dtype=np.float32)
    return x, torch.tensor(idx, device=device), torch.tensor(weights, device=device)


def rounds(group: ep.Group, device: Any) -> list[bytes]:
    """Do rounds, whole and in halves; return all sums."""
    sums = []
    with ep.Buffer(group, **SHAPE) as buffer:
        for number in range(ROUNDS):
            x, idx, weights = given(group.rank, number, device)
            if number % 2:
                received = buffer.dispatch(x, idx, send_only=True).receive()
                out = buffer.combine(received.x, received, weights, send_only=True).receive()
            else:
                received = buffer.dispatch(x, idx, weights)
                out = buffer.combine(received.x, received)
            sums.append(out.cpu().view(torch.uint8).numpy().tobytes())
        torch.cuda.synchronize(device)
        group.barrier()
    return sums


def by_memory(rank: Rank) -> list[bytes]:
    torch.cuda.set_device(rank.rank)
    with rank.join(backend="cuda", device_id=rank.rank) as group:
        assert group.transport(1 - rank.rank).name == "ipc"
        return rounds(group, torch.device("cuda", rank.rank))


def by_torch(rank: Rank, store: str, backend: str, expected: str) -> list[bytes]:
    """Join over a process group, without any memory of the peer."""
    torch.cuda.set_device(rank.rank)
    device = torch.device("cuda", rank.rank)
    torch.distributed.init_process_group(
        backend,
        store=torch.distributed.FileStore(store, rank.rank_count),
        rank=rank.rank,
        world_size=rank.rank_count,
        device_id=device if backend == "nccl" else None,
    )
    try:
        place = {"backend": "cuda", "device_id": rank.rank, "disable_p2p": True}
        with ep.Group.from_torch(**place) as group:
            assert group.transport(1 - rank.rank).reason.startswith(expected)
            return rounds(group, device)
    finally:
        torch.distributed.destroy_process_group()


def by_torch_on_stream(rank: Rank, store: str) -> list[bytes]:
    """Exchange by torch's NCCL, as if it were a backend of which the library knows nothing."""
    torch.cuda.set_device(rank.rank)
    device = torch.device("cuda", rank.rank)
    torch.distributed.init_process_group(
        "nccl",
        store=torch.distributed.FileStore(store, rank.rank_count),
        rank=rank.rank,
        world_size=rank.rank_count,
        device_id=device,
    )

    def all_gather(data: bytes) -> list[bytes]:
        gathered: list[bytes] = [b""] * rank.rank_count
        torch.distributed.all_gather_object(gathered, data)
        return gathered

    try:
        with ep.Group.from_callback(
            all_gather,
            None,
            torch_all_to_all_on_stream(None),
            rank=rank.rank,
            rank_count=rank.rank_count,
            backend="cuda",
            device_id=rank.rank,
            disable_p2p=True,
        ) as group:
            reason = group.transport(1 - rank.rank).reason
            assert reason.startswith("by the caller's all_to_all_on_stream"), reason
            return rounds(group, device)
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def expected() -> list[list[bytes]]:
    """Return what ranks compute that reach each other's memory."""
    return run_processes(by_memory, 2)


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_nccl_carries_what_memory_does(
    expected: list[list[bytes]], tmp_path: Any, backend: str
) -> None:
    store = str(tmp_path / "store")
    assert run_processes(by_torch, 2, store, backend, "by NCCL") == expected


def test_an_exchange_of_torchs_carries_what_memory_does(
    expected: list[list[bytes]], tmp_path: Any
) -> None:
    assert run_processes(by_torch_on_stream, 2, str(tmp_path / "store")) == expected


# ---- Ranks in processes of their own, which nothing else has been in -----------------------------


def join_alone(rank: int, ids: Any, timeout_s: float) -> ep.Group:
    """Join a group of two that reach no memory of each other."""
    torch.cuda.set_device(rank)
    if rank == 0:
        unique_id = ep.create_unique_id()
        ids.put(unique_id)
    else:
        unique_id = ids.get(timeout=DEADLINE_S)
    return ep.Group.from_unique_id(
        unique_id,
        rank=rank,
        rank_count=2,
        backend="cuda",
        device_id=rank,
        timeout_s=timeout_s,
        disable_p2p=True,
    )


def run_alone(body: Any) -> list[Any]:
    """Run body(rank, ids) in two new processes; return what they return, None of a killed one."""
    context = multiprocessing.get_context("spawn")
    ids, results = context.Queue(), [context.Queue() for _ in range(2)]
    ranks = [
        context.Process(target=serve, args=(body, rank, ids, results[rank])) for rank in range(2)
    ]
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(DEADLINE_S)
        assert [process.exitcode in (0, -signal.SIGKILL) for process in ranks] == [True] * 2
        return [None if process.exitcode else results[i].get() for i, process in enumerate(ranks)]
    finally:
        for process in ranks:
            process.kill()


def serve(body: Any, rank: int, ids: Any, result: Any) -> None:
    result.put(body(rank, ids))


def be_refused_in_a_graph(rank: int, ids: Any) -> str:
    os.environ["MOONCAKE_EP_NCCL_LIBRARY"] = "none"
    device = torch.device("cuda", rank)
    with join_alone(rank, ids, DEADLINE_S) as group, ep.Buffer(group, **SHAPE) as buffer:
        assert group.transport(1 - rank).reason.startswith("by TCP")
        x, idx, weights = given(rank, 0, device)
        received = buffer.dispatch(x, idx, weights)  # outside a graph it works
        said = ""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            x.mul_(1)  # torch warns of a graph of nothing
            try:
                buffer.dispatch(x, idx, weights, out=received, handle=received.handle)
            except NotImplementedError as error:
                said = str(error)
        out = buffer.combine(received.x, received)  # and nothing was lost
        torch.cuda.synchronize()
        assert torch.isfinite(out.float()).all()
        group.barrier()
        return said


def test_what_goes_through_host_memory_cannot_be_captured() -> None:
    for said in run_alone(be_refused_in_a_graph):
        assert "graph" in said and "host memory" in said, said


def lose_the_peer(rank: int, ids: Any, library: str) -> tuple[float, list[int], str]:
    """Return how long the call took whose peer is dead, its mask, and what the next one raised."""
    os.environ["MOONCAKE_EP_NCCL_LIBRARY"] = library
    device = torch.device("cuda", rank)
    group = join_alone(rank, ids, TIMEOUT_S)
    assert group.transport(1 - rank).reason.startswith("by TCP" if library else "by NCCL")
    buffer = ep.Buffer(group, **SHAPE)
    x, idx, weights = given(rank, 0, device)
    received = buffer.dispatch(x, idx, weights)
    buffer.combine(received.x, received)
    torch.cuda.synchronize()
    group.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(1)  # until it is dead, so that what the time tells is the deadline
    active = torch.ones(2, dtype=torch.int32, device=device)
    began = time.monotonic()
    said = ""
    for mask in (active, None):  # who brings no mask is told by an error, once
        try:
            buffer.dispatch(x, idx, weights, active_ranks=mask)
        except ep.PeerFailedError as error:
            said = str(error)
        torch.cuda.synchronize()
        if mask is not None:
            took = time.monotonic() - began
    # Alone it goes on: its own experts answer.
    received = buffer.dispatch(x, idx, weights)
    out = buffer.combine(received.x, received)
    torch.cuda.synchronize()
    own = torch.where(idx < EXPERTS // 2, weights, 0).sum(1, keepdim=True) * x.float()
    assert torch.allclose(out.float(), own, rtol=2e-2, atol=2e-2)
    return took, active.tolist(), said


@pytest.mark.parametrize("library", ["", "none"])
def test_a_killed_peer_is_an_error_within_the_timeout(library: str) -> None:
    took, active, said = run_alone(partial(lose_the_peer, library=library))[0]
    assert took <= TIMEOUT_S * SLACK + SLACK_S, took
    assert active == [1, 0]
    assert "masked" in said, said
