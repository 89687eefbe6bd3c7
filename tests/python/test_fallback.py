"""Ranks that do not reach each other's memory: rows go by TCP, or by the caller's all_to_all.

What is received is compared bit by bit with the same rounds through memory, and with what the
fallback of Mooncake EP does. Ranks that are programs are fallback_rank.py.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import mooncake_ep as ep
from fallback_rank import (
    BF16,
    SHAPE,
    Report,
    content,
    digest_of_rounds,
    inputs,
    names,
    report,
    send,
    send_back,
)
from model import check_dispatched
from ranks import DEADLINE_S, TIMEOUT_S, Rank, Runner, run_processes, run_threads

_PROGRAM = Path(__file__).with_name("fallback_rank.py")


def join(rank: Rank, disable_p2p: bool, timeout_s: float = TIMEOUT_S) -> ep.Group:
    """Join the group of all ranks of a run."""
    options: Any = {"rank": rank.rank, "timeout_s": timeout_s, "disable_p2p": disable_p2p}
    if rank.world is not None:
        return ep.Group.from_world(rank.world, **options)
    assert rank.unique_id is not None
    return ep.Group.from_unique_id(rank.unique_id, rank_count=rank.rank_count, **options)


# ---- Some ranks, or all --------------------------------------------------------------------------


def rounds_where_some_are_far(rank: Rank, far: tuple[bool, ...]) -> Report:
    with join(rank, far[rank.rank]) as group:
        return report(group)


@pytest.mark.parametrize("far", ["1111", "0011", "0001"])
def test_far_pairs_among_near_ones_receive_what_all_would_through_memory(
    run: Runner, far: str
) -> None:
    flags = tuple(flag == "1" for flag in far)
    near = "thread" if run is not run_processes else "shm"
    through_memory = run_threads(rounds_where_some_are_far, 4, (False,) * 4)
    for rank, mine in enumerate(run(rounds_where_some_are_far, 4, flags)):
        assert mine.transports == [
            "self" if peer == rank else "collective" if flags[peer] or flags[rank] else near
            for peer in range(4)
        ]
        assert "collective" not in through_memory[rank].transports
        assert mine.digest == through_memory[rank].digest


# ---- Ranks that are programs ---------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_programs(commands: list[list[str]], variables: list[dict[str, str]]) -> list[Report]:
    """Run commands at the same time; return the reports of the ranks that they are, by rank."""
    running: list[subprocess.Popen[str]] = []
    outputs: list[str] = []
    try:
        for command, mine in zip(commands, variables, strict=True):
            running.append(
                subprocess.Popen(
                    command,
                    env={**os.environ, **mine},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        deadline = time.monotonic() + DEADLINE_S
        for process in running:
            output, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            assert process.returncode == 0, errors
            outputs += output.splitlines()
    finally:
        for process in running:
            process.kill()
            process.communicate()
    reports = [Report(**json.loads(line)) for line in outputs if line.startswith("{")]
    return sorted(reports, key=lambda mine: mine.rank)


def run_two_by_env(
    prefixes: list[list[str]], addresses: list[str], port: int, *arguments: str
) -> list[Report]:
    """Run two ranks that meet by the environment, each behind a prefix, with an address each."""
    variables = [
        {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": addresses[0],
            "MASTER_PORT": str(port - 1),
            "MOONCAKE_EP_TCP_ADDRESS": addresses[rank],
        }
        for rank in range(2)
    ]
    command = [sys.executable, str(_PROGRAM), "env", *arguments]
    return run_programs([[*prefix, *command] for prefix in prefixes], variables)


@pytest.fixture(scope="module")
def through_memory() -> list[str]:
    """Return the digests of two ranks that are programs on the ordinary network."""
    reports = run_two_by_env([[], []], ["127.0.0.1"] * 2, free_port())
    assert [mine.transports for mine in reports] == [["self", "shm"], ["shm", "self"]]
    assert reports[0].digest != reports[1].digest
    return [mine.digest for mine in reports]


def check_far(reports: list[Report], through_memory: list[str]) -> None:
    """Check that two ranks were far from each other and received the same."""
    assert [mine.transports for mine in reports] == [
        ["self", "collective"],
        ["collective", "self"],
    ]
    assert [mine.digest for mine in reports] == through_memory


# What ip says where a container, or the kernel, has no namespaces or no cables between them.
_NOT_HERE = ("not permitted", "Permission denied", "not supported", "Unknown device type")


@pytest.fixture
def namespaces() -> Iterator[tuple[list[str], list[str]]]:
    """Make two network namespaces with a cable between them; yield their names and addresses."""
    if os.geteuid() != 0:
        pytest.skip("only root may make network namespaces")
    tool = shutil.which("ip")
    if tool is None:
        pytest.skip("no ip (iproute2), which makes network namespaces")
    both = [f"mooncake-ep-{os.getpid()}-{end}" for end in "ab"]
    addresses = ["10.111.0.1", "10.111.0.2"]

    def ip(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([tool, *arguments], capture_output=True, text=True, check=False)

    cable = ["link", "add", "name", "cable-a", "netns", both[0], "type", "veth"]
    cable += ["peer", "name", "cable-b", "netns", both[1]]
    steps = [["netns", "add", name] for name in both] + [cable]
    for name, end, address in zip(both, ("cable-a", "cable-b"), addresses, strict=True):
        steps += [
            ["-n", name, "address", "add", f"{address}/24", "dev", end],
            ["-n", name, "link", "set", "dev", end, "up"],
            ["-n", name, "link", "set", "dev", "lo", "up"],
        ]
    try:
        for step in steps:
            done = ip(*step)
            if done.returncode != 0 and any(words in done.stderr for words in _NOT_HERE):
                pytest.skip(f"no network namespaces here: {done.stderr.strip()}")
            assert done.returncode == 0, f"ip {' '.join(step)}: {done.stderr}"
        yield both, addresses
    finally:
        for name in both:
            ip("netns", "delete", name)


def test_two_networks_of_one_machine_are_joined_by_tcp(
    namespaces: tuple[list[str], list[str]], through_memory: list[str]
) -> None:
    both, addresses = namespaces
    prefixes = [["ip", "netns", "exec", name] for name in both]
    reports = run_two_by_env(prefixes, addresses, 29501, "--disable-p2p")
    check_far(reports, through_memory)


def test_a_group_from_mpi_sends_rows_by_alltoallv(through_memory: list[str]) -> None:
    pytest.importorskip("mpi4py", reason="no mpi4py")
    beside = Path(sys.executable).with_name("mpiexec")  # the one of the wheel
    mpiexec = str(beside) if beside.exists() else shutil.which("mpiexec")
    if mpiexec is None:
        pytest.skip("no mpiexec, which starts the ranks of MPI")
    command = [mpiexec, "-n", "2", sys.executable, str(_PROGRAM), "mpi", "--disable-p2p"]
    variables = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "MOONCAKE_EP_TCP_ADDRESS": "127.0.0.1",
    }
    check_far(run_programs([command], [variables]), through_memory)


# ---- The caller's all_to_all ---------------------------------------------------------------------


class Broken(Exception):
    """What an all_to_all of these tests raises."""


class Hub:
    """Collectives among threads, as a caller would offer them."""

    def __init__(self, rank_count: int) -> None:
        self.rank_count = rank_count
        self.barrier = threading.Barrier(rank_count)
        self.data: list[bytes] = [b""] * rank_count
        self.pipes: list[list[queue.SimpleQueue[bytes | Broken]]] = [
            [queue.SimpleQueue() for _ in range(rank_count)] for _ in range(rank_count)
        ]
        self.calls = [0] * rank_count  # of all_to_all, by rank
        self.broken_call: dict[int, int] = {}  # by rank: which of its calls raises

    def all_gather(self, rank: int, data: bytes) -> list[bytes]:
        self.data[rank] = data
        self.barrier.wait(TIMEOUT_S)
        gathered = list(self.data)
        self.barrier.wait(TIMEOUT_S)
        return gathered

    def all_to_all(self, rank: int, sent: list[memoryview], received: list[memoryview]) -> None:
        self.calls[rank] += 1
        if self.broken_call.get(rank) == self.calls[rank]:
            for pipe in self.pipes[rank]:
                pipe.put(Broken(f"rank {rank} is gone"))
            raise Broken(f"call {self.calls[rank]}")
        for peer, part in enumerate(sent):
            if len(part):
                self.pipes[rank][peer].put(bytes(part))
        for peer, part in enumerate(received):
            if len(part):
                taken = self.pipes[peer][rank].get(timeout=TIMEOUT_S)
                if isinstance(taken, Broken):
                    raise taken
                part[:] = taken

    def join(self, rank: Rank, has_all_to_all: bool = True) -> ep.Group:
        def gather(data: bytes) -> list[bytes]:
            return self.all_gather(rank.rank, data)

        def exchange(sent: list[memoryview], received: list[memoryview]) -> None:
            self.all_to_all(rank.rank, sent, received)

        return ep.Group.from_callback(
            gather,
            exchange if has_all_to_all else None,
            rank=rank.rank,
            rank_count=rank.rank_count,
            timeout_s=TIMEOUT_S,
            disable_p2p=True,
        )


def rounds_by_hub(rank: Rank, hub: Hub) -> Report:
    with hub.join(rank) as group:
        return report(group)


def test_rows_go_by_the_callers_all_to_all() -> None:
    hub = Hub(3)
    through_memory = run_threads(rounds_where_some_are_far, 3, (False,) * 3)
    for rank, mine in enumerate(run_threads(rounds_by_hub, 3, hub)):
        assert mine.transports == ["self" if peer == rank else "collective" for peer in range(3)]
        assert mine.digest == through_memory[rank].digest
    assert min(hub.calls) > 0


def rounds_until_it_breaks(rank: Rank, hub: Hub, call: int) -> None:
    given = inputs(rank.rank)
    with hub.join(rank) as group, ep.Buffer(group, **SHAPE) as buffer:
        kept = send(buffer, given, 0).receive()
        send_back(buffer, kept, given, 0).receive()
        cause = "rank 1 is gone"
        if rank.rank == 1:
            hub.broken_call[1] = hub.calls[1] + call
            cause = f"call {hub.broken_call[1]}"
        with pytest.raises(ep.EpError, match="all_to_all") as first:
            while True:
                received = buffer.dispatch(given.x, given.topk_idx)
                buffer.combine(received.x, received)
        assert isinstance(first.value.__cause__, Broken)
        assert str(first.value.__cause__) == cause
        calls = hub.calls[rank.rank]
        for _ in range(4):  # more than may be in flight
            with pytest.raises(ep.EpError) as later:
                buffer.dispatch(given.x, given.topk_idx)
            assert str(later.value) == str(first.value)
            with pytest.raises(ep.EpError) as later:
                buffer.combine(kept.x, kept)
            assert str(later.value) == str(first.value)
        assert hub.calls[rank.rank] == calls


@pytest.mark.parametrize("call", range(1, 5))
def test_what_all_to_all_raises_is_the_cause_and_later_calls_fail_at_once(call: int) -> None:
    run_threads(rounds_until_it_breaks, 2, Hub(2), call)


def join_with_one_all_to_all(rank: Rank, hub: Hub) -> str:
    with pytest.raises(ep.EpError, match="all_to_all") as caught:
        hub.join(rank, has_all_to_all=rank.rank == 1)
    assert caught.value.status == "MEP_MISMATCH"
    return str(caught.value)


def test_an_all_to_all_of_one_rank_only_is_refused_by_all() -> None:
    for text in run_threads(join_with_one_all_to_all, 3, Hub(3)):
        assert "rank 1" in text


# ---- In any order --------------------------------------------------------------------------------

_LAYERS = 8
_ROUNDS_OF_A_LAYER = 3

Key = tuple[int, int]  # layer, number of its round


class Layers:
    """Rounds of several layers by one buffer; each layer keeps its handle."""

    def __init__(self, buffer: ep.Buffer, seed: int) -> None:
        self.buffer, self.seed = buffer, seed
        self.handles: list[ep.Handle | None] = [None] * _LAYERS
        self.received: dict[int, ep.Dispatched] = {}  # by layer
        self.sent_count = 0
        # By layer: which sending it was, and what receives it.
        self.pending: dict[int, tuple[int, Callable[[], None]]] = {}
        self.results: dict[Key, tuple[bytes, bytes]] = {}  # of dispatch and combine

    def step(self, layer: int, number: int, is_dispatch: bool) -> None:
        """Send a dispatch or a combine, once the layer's last one was received."""
        self.receive(layer)
        for other, (sent, _) in list(self.pending.items()):
            if sent + _LAYERS <= self.sent_count:  # the buffer has no place for more
                self.receive(other)
        given = inputs(self.buffer.group.rank, self.seed, layer, number)
        kind = layer + number
        if is_dispatch:
            dispatch = send(self.buffer, given, kind, self.handles[layer])

            def receive() -> None:
                received = dispatch.receive()
                self.handles[layer] = received.handle
                self.received[layer] = received
                self.results[layer, number] = content(received), b""

            self.pending[layer] = self.sent_count, receive
        else:
            combine = send_back(self.buffer, self.received[layer], given, kind)

            def take() -> None:
                sums = combine.receive().tobytes()
                self.results[layer, number] = self.results[layer, number][0], sums

            self.pending[layer] = self.sent_count, take
        self.sent_count += 1

    def receive(self, layer: int) -> None:
        """Receive what was sent last for a layer, if it was not yet."""
        if layer in self.pending:
            _, receive = self.pending.pop(layer)
            receive()


def one_after_the_other(rank: Rank, seed: int) -> dict[Key, tuple[bytes, bytes]]:
    with join(rank, disable_p2p=False) as group, ep.Buffer(group, **SHAPE) as buffer:
        layers = Layers(buffer, seed)
        for layer in range(_LAYERS):
            for number in range(_ROUNDS_OF_A_LAYER):
                for is_dispatch in (True, False):
                    layers.step(layer, number, is_dispatch)
                    layers.receive(layer)
        return layers.results


def in_a_random_order(rank: Rank, seed: int) -> dict[Key, tuple[bytes, bytes]]:
    """Send in an order that all ranks draw, receive in one of this rank; by two threads in turn."""
    shared, own = np.random.default_rng(seed), np.random.default_rng((seed, rank.rank))
    order = shared.permutation(np.repeat(np.arange(_LAYERS), 2 * _ROUNDS_OF_A_LAYER))
    done = [0] * _LAYERS
    with (
        join(rank, disable_p2p=True) as group,
        ep.Buffer(group, **SHAPE, rounds_in_flight=_LAYERS) as buffer,
        ThreadPoolExecutor(1) as even,
        ThreadPoolExecutor(1) as odd,
    ):
        assert set(names(group)) == {"self", "collective"}
        layers = Layers(buffer, seed)
        for turn, layer in enumerate(order.tolist()):
            thread = odd if turn % 2 else even
            number, half = divmod(done[layer], 2)
            thread.submit(layers.step, layer, number, half == 0).result(TIMEOUT_S)
            done[layer] += 1
            if own.random() < 0.5:
                late = int(own.choice(list(layers.pending)))
                thread.submit(layers.receive, late).result(TIMEOUT_S)
        for layer in range(_LAYERS):
            even.submit(layers.receive, layer).result(TIMEOUT_S)
        return layers.results


@pytest.mark.parametrize("seed", range(4))
def test_layers_that_share_a_buffer_and_two_threads_do_not_disturb_each_other(seed: int) -> None:
    expected = run_threads(one_after_the_other, 3, seed)
    assert len(expected[0]) == _LAYERS * _ROUNDS_OF_A_LAYER
    run = run_processes if seed == 0 else run_threads
    assert run(in_a_random_order, 3, seed) == expected


def two_groups(rank: Rank, far: bool) -> list[str]:
    """Let two groups of the same ranks work at the same time, in a thread each."""
    with join(rank, far) as first:
        second_id = ep.create_unique_id() if rank.rank == 0 else bytes(128)
        second_id = first.all_gather(second_id)[0]
        second_rank = Rank(rank.rank, rank.rank_count, unique_id=second_id)
        with join(second_rank, far) as second, ThreadPoolExecutor(2) as threads:
            together = threading.Barrier(2)

            def serve(group: ep.Group, seed: int) -> list[str]:
                together.wait(TIMEOUT_S)
                return [digest_of_rounds(group, seed + repeat) for repeat in range(4)]

            serving = [threads.submit(serve, first, 0), threads.submit(serve, second, 4)]
            return [digest for each in serving for digest in each.result(DEADLINE_S)]


def test_two_groups_in_two_threads_do_not_disturb_each_other(run: Runner) -> None:
    through_memory = run_threads(two_groups, 2, False)
    assert run(two_groups, 2, True) == through_memory
    assert len(set(through_memory[0])) == 8


# ---- Ranks that die ------------------------------------------------------------------------------

_LIMIT_S = 2.0
_SLACK_S = 2.0  # for a loaded machine
_WIDE: dict[str, Any] = {"max_tokens": 32, "hidden": 2048, "experts": 6, "topk": 3}
_CALM_ROUNDS = 5  # after all survivors know
_FLAG = 32.0  # no other element of x is as large


def whole_rows(seed: int, number: int, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Make tokens that go to every rank, whose sums are exact in bf16."""
    rng = np.random.default_rng((seed, number, rank))
    tokens = int(rng.integers(1, _WIDE["max_tokens"] + 1))
    x = rng.integers(-8, 9, (tokens, _WIDE["hidden"])).astype(BF16)
    return x, np.tile(np.array([0, 2, 4]), (tokens, 1)) + rng.integers(0, 2, (tokens, 1))


class Survivor:
    """A rank that goes on when another dies."""

    def __init__(self, buffer: ep.Buffer, seed: int, victim: int) -> None:
        self.buffer, self.seed, self.victim = buffer, seed, victim
        self.rank = buffer.group.rank
        self.alive = list(range(buffer.group.size))
        self.waited_s = 0.0

    def call(self, function: Callable[..., Any]) -> Any:
        """Call; if the other has died, note how long that took, and go on with the result."""
        start = time.monotonic()
        try:
            return function(timeout_s=_LIMIT_S)
        except ep.PeerFailedError as error:
            self.waited_s = time.monotonic() - start
            assert f"rank {self.victim} missed" in str(error)
            assert self.victim in self.alive
            self.alive.remove(self.victim)
            return error.result

    def round(self, number: int) -> bool:
        """Do a round and check all of it; tell whether all survivors knew when it began."""
        x, topk_idx = zip(
            *(whole_rows(self.seed, number, rank) for rank in range(3)),
            strict=True,
        )
        x[self.rank][0, 0] = _FLAG if len(self.alive) == 2 else 0
        buffer = self.buffer
        received = self.call(partial(buffer.dispatch, x[self.rank], topk_idx[self.rank]))
        flags = self.take_flags(received, topk_idx)
        for rank, flag in flags.items():
            x[rank][0, 0] = flag
        parts = [slice(None) if rank in self.alive else slice(0) for rank in range(3)]
        check_dispatched(
            received,
            [rows[part] for rows, part in zip(x, parts, strict=True)],
            [choices[part] for choices, part in zip(topk_idx, parts, strict=True)],
            buffer.group,
            _WIDE["experts"],
        )
        sums = self.call(partial(buffer.combine, received.x, received))
        expected = x[self.rank].astype(np.float32) * len(self.alive)
        assert sums.tobytes() == expected.astype(BF16).tobytes()
        return sum(flag == _FLAG for flag in flags.values()) == 2

    def take_flags(
        self, received: ep.Dispatched, topk_idx: tuple[np.ndarray, ...]
    ) -> dict[int, float]:
        """Return the first element of the first token of each rank that is there."""
        flags = {}
        for rank in self.alive:
            expert = int(topk_idx[rank][0, self.rank]) - 2 * self.rank
            begin = int(np.asarray(received.layout_range)[expert, rank]) >> 32
            flags[rank] = float(received.x[expert, begin, 0])
        return flags


def lose_one(rank: Rank, seed: int, how: signal.Signals) -> float:
    """Do rounds in whose middle a rank gets a signal; return how long a survivor has waited."""
    victim, last_number, delay_s = fate(seed)
    with join(rank, disable_p2p=True) as group, ep.Buffer(group, **_WIDE) as buffer:
        pids = [int(pid) for pid in group.all_gather(b"%10d" % os.getpid())]
        survivor = Survivor(buffer, seed, victim)
        number = calm_rounds = 0
        while calm_rounds < _CALM_ROUNDS:
            if (rank.rank, number) == (victim, last_number):
                end = partial(os.kill, os.getpid(), how)
                # Stopped in a round it might keep only one survivor waiting, and the other would
                # give that one up at its own deadline, which is hardly later.
                end() if how is signal.SIGSTOP else threading.Timer(delay_s, end).start()
            calm_rounds += survivor.round(number)
            number += 1
        with contextlib.suppress(ProcessLookupError):  # it may only have been stopped
            os.kill(pids[victim], signal.SIGKILL)
        return survivor.waited_s


def fate(seed: int) -> tuple[int, int, float]:
    """Draw which rank dies, in or before which round, and how long after it has begun."""
    rng = np.random.default_rng(seed)
    return int(rng.integers(3)), int(rng.integers(20)), float(rng.uniform(0, 0.002))


@pytest.mark.parametrize("seed", range(4))
def test_the_others_go_on_exactly_when_one_is_killed_at_any_moment(seed: int) -> None:
    victim, _, _ = fate(seed)
    waits = run_processes(lose_one, 3, seed, signal.SIGKILL, dying=[victim])
    assert all(wait < _LIMIT_S * 1.1 + _SLACK_S for wait in waits if wait is not None)


def test_the_others_go_on_exactly_when_one_stops_and_only_the_deadline_tells() -> None:
    victim, _, _ = fate(5)
    waits = run_processes(lose_one, 3, 5, signal.SIGSTOP, dying=[victim])
    for wait in (waits[rank] for rank in range(3) if rank != victim):
        assert _LIMIT_S * 0.9 < wait < _LIMIT_S * 1.1 + _SLACK_S


# ---- What Mooncake EP does -----------------------------------------------------------------------

_PEER_SHAPE: dict[str, Any] = {"max_tokens": 48, "hidden": 512, "experts": 16, "topk": 2}
_TOLERANCE = 1e-2  # its sums are rounded to bf16 after each addition


class Reference:
    """The fallback of Mooncake EP, by its description: everything to everybody, then loops."""

    def __init__(self, rank: int, rank_count: int) -> None:
        self.torch = pytest.importorskip("torch")
        self.rank, self.rank_count = rank, rank_count
        self.local_experts = _PEER_SHAPE["experts"] // rank_count

    def gather(self, own: Any, token_count_max: int, filler: float) -> Any:
        """Gather tensors of all ranks, padded to one length."""
        shape = (token_count_max, *own.shape[1:])
        padded = self.torch.full(shape, filler, dtype=own.dtype)
        padded[: len(own)] = own
        gathered = [self.torch.empty_like(padded) for _ in range(self.rank_count)]
        self.torch.distributed.all_gather(gathered, padded)
        return self.torch.stack(gathered)

    def dispatch(self, x: Any, topk_idx: Any) -> tuple[list[Any], list[list[Any]]]:
        """Return the rows of each local expert, and which tokens of each source they are."""
        counts = self.gather(self.torch.tensor([len(x)]), 1, 0)
        token_count_max = int(counts.max().item())
        all_x = self.gather(x, token_count_max, 0)
        all_idx = self.gather(topk_idx, token_count_max, -1)
        rows, tokens = [], []
        for expert in range(self.local_experts):
            wanted = all_idx == self.rank * self.local_experts + expert
            tokens.append([each.any(dim=1).nonzero().flatten() for each in wanted])
            rows.append(self.torch.cat([all_x[i, each] for i, each in enumerate(tokens[-1])]))
        return rows, tokens

    def combine(self, rows: list[Any], tokens: list[list[Any]], topk_idx: Any, weights: Any) -> Any:
        """Add up everybody's tokens on every rank, and return those of this one."""
        counts = self.gather(self.torch.tensor([len(topk_idx)]), 1, 0)
        token_count_max = int(counts.max().item())
        all_idx = self.gather(topk_idx, token_count_max, -1)
        all_weights = self.gather(weights, token_count_max, 0)
        shape = (self.rank_count, token_count_max, _PEER_SHAPE["hidden"])
        total = self.torch.zeros(shape, dtype=self.torch.bfloat16)
        for expert in range(self.local_experts):
            own = all_idx == self.rank * self.local_experts + expert
            begin = 0
            for source, chosen in enumerate(tokens[expert]):
                weight = (all_weights[source] * own[source])[chosen].sum(dim=1, keepdim=True)
                scaled = rows[expert][begin : begin + len(chosen)] * weight
                total[source].index_add_(0, chosen, scaled.to(total.dtype))
                begin += len(chosen)
        self.torch.distributed.all_reduce(total)
        return total[self.rank, : len(topk_idx)]


def compare_with_reference(rank: Rank, store: str) -> Report:
    """Do rounds by gloo in both ways, and rounds of all kinds."""
    torch = pytest.importorskip("torch")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    meeting = torch.distributed.FileStore(store, rank.rank_count)
    torch.distributed.init_process_group(
        "gloo", store=meeting, rank=rank.rank, world_size=rank.rank_count
    )
    rng = torch.Generator().manual_seed(rank.rank)
    tokens, reference = 40 + 8 * rank.rank, Reference(rank.rank, rank.rank_count)
    with (
        ep.Group.from_torch(timeout_s=TIMEOUT_S, disable_p2p=True) as group,
        ep.Buffer(group, **_PEER_SHAPE) as buffer,
    ):
        for _ in range(3):
            x = torch.randn(tokens, _PEER_SHAPE["hidden"], generator=rng).to(torch.bfloat16)
            scores = torch.rand(tokens, _PEER_SHAPE["experts"], generator=rng)
            topk_idx = scores.topk(_PEER_SHAPE["topk"]).indices
            weights = torch.rand(topk_idx.shape, generator=rng)
            received = buffer.dispatch(x, topk_idx, weights)
            rows, sources = reference.dispatch(x, topk_idx)
            for expert, expected in enumerate(rows):
                assert received.count[expert] == len(expected)
                assert torch.equal(received.x[expert, : len(expected)], expected)
            sums = buffer.combine(received.x, received)
            expected = reference.combine(rows, sources, topk_idx, weights).float()
            error = torch.linalg.norm(sums.float() - expected) / torch.linalg.norm(expected)
            assert error < _TOLERANCE
        reported = report(group)
    torch.distributed.destroy_process_group()
    return reported


def test_torchs_all_to_all_gives_what_mooncakes_fallback_gives(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="no torch")
    if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
        pytest.skip("torch was built without gloo")
    through_memory = run_threads(rounds_where_some_are_far, 2, (False,) * 2)
    reports = run_processes(compare_with_reference, 2, str(tmp_path / "store"))
    check_far(reports, [mine.digest for mine in through_memory])


# ---- A rank whose peers are all near ------------------------------------------------------------


def round_of_collectives(rank: Rank, store: str) -> list[str]:
    """Do rounds where only ranks 1 and 2 are far, by a collective that wants all three."""
    torch = pytest.importorskip("torch")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, rank.rank_count),
        rank=rank.rank,
        world_size=rank.rank_count,
    )

    def all_gather(data: bytes) -> list[bytes]:
        gathered: list[bytes] = [b""] * rank.rank_count
        torch.distributed.all_gather_object(gathered, data)
        return gathered

    def all_to_all(send: list[memoryview], receive: list[memoryview]) -> None:
        everything: list[list[bytes]] = [[]] * rank.rank_count
        torch.distributed.all_gather_object(everything, [bytes(part) for part in send])
        for source, part in enumerate(receive):
            part[:] = everything[source][rank.rank]

    if rank.rank == 1:
        os.environ["MOONCAKE_EP_ISLAND_RANKS"] = "2"
    try:
        group = ep.Group.from_callback(
            all_gather, all_to_all, rank=rank.rank, rank_count=rank.rank_count, timeout_s=TIMEOUT_S
        )
    finally:
        os.environ.pop("MOONCAKE_EP_ISLAND_RANKS", None)
    with group:
        mine = report(group)
    torch.distributed.destroy_process_group()
    return [*mine.transports, mine.digest]


def test_a_rank_whose_peers_are_all_near_takes_part_in_the_callers_collectives(
    tmp_path: Path,
) -> None:
    expected = [mine.digest for mine in run_threads(rounds_where_some_are_far, 3, (False,) * 3)]
    assert run_processes(round_of_collectives, 3, str(tmp_path / "store")) == [
        ["self", "shm", "shm", expected[0]],
        ["shm", "self", "collective", expected[1]],
        ["shm", "collective", "self", expected[2]],
    ]
