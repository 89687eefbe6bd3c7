"""Run a function on several ranks that are processes or threads, with a hard deadline for all.

The function gets a Rank, joins with ``rank.join()``, and its result comes back. A traceback of a
rank is raised again here; ranks that are still running at the deadline are killed (threads cannot
be: they are daemons, and their group's timeout is shorter than the deadline).

On GPUs and with gloo, processes stay for the next run, because torch and CUDA take seconds to
start; ranks that are threads have a GPU each, because threads that share one wait for each other's
kernels.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import mooncake_ep as ep
from devices import backend as default_backend
from devices import group_options, need_processes, warm_up

DEADLINE_S = 60.0
TIMEOUT_S = 10.0  # of the groups, less than the deadline
_START_S = 120.0  # for processes to start; torch is large, and they share the cores
_GRACE_S = 2.0  # for the other ranks to report after the first failure


class RankError(AssertionError):
    """A rank failed; the message holds its traceback."""


@dataclass
class Rank:
    """What a rank knows before it joins."""

    rank: int
    rank_count: int
    world: ep.World | None = None
    unique_id: bytes | None = None

    def join(
        self, timeout_s: float = TIMEOUT_S, *, backend: str | None = None, device_id: int = 0
    ) -> ep.Group:
        """Join the group of all ranks of this run; by default where --backend says."""
        options: Any = {"backend": backend, "device_id": device_id}
        if backend is None:
            options = group_options(self.rank)
        options["timeout_s"] = timeout_s
        if self.world is not None:
            return ep.Group.from_world(self.world, rank=self.rank, **options)
        assert self.unique_id is not None
        if backend is None and default_backend() == "gloo":
            self._start_gloo()
            return ep.Group.from_torch(**options)
        return ep.Group.from_unique_id(
            self.unique_id, rank=self.rank, rank_count=self.rank_count, **options
        )

    def _start_gloo(self) -> None:
        """Make torch's default process group, over a port that rank 0 finds."""
        distributed = importlib.import_module("torch.distributed")
        assert self.unique_id is not None
        with ep.Group.from_unique_id(
            self.unique_id, rank=self.rank, rank_count=self.rank_count
        ) as meeting:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                mine = free.getsockname()[1].to_bytes(4, "little")
            port = int.from_bytes(meeting.all_gather(mine)[0], "little")
        distributed.init_process_group(
            "gloo",
            f"tcp://127.0.0.1:{port}",
            rank=self.rank,
            world_size=self.rank_count,
            timeout=datetime.timedelta(seconds=TIMEOUT_S),
        )


Body = Callable[..., Any]
Runner = Callable[..., list[Any]]


def run_threads(
    body: Body, rank_count: int, *arguments: Any, deadline_s: float = DEADLINE_S
) -> list[Any]:
    """Run ``body(rank, *arguments)`` in a thread for each rank; return the results by rank."""
    results: list[Any] = [None] * rank_count
    errors: list[str] = []

    def serve(rank: Rank) -> None:
        try:
            results[rank.rank] = body(rank, *arguments)
        except BaseException:
            errors.append(f"rank {rank.rank}:\n{traceback.format_exc()}")

    with ep.World(rank_count) as world:
        threads = [
            threading.Thread(target=serve, args=(Rank(rank, rank_count, world=world),), daemon=True)
            for rank in range(rank_count)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + deadline_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if errors or late:
            raise RankError("\n".join([*errors, f"late ranks: {late}"]))
    return results


def run_processes(
    body: Body,
    rank_count: int,
    *arguments: Any,
    deadline_s: float = DEADLINE_S,
    dying: Sequence[int] = (),
) -> list[Any]:
    """Run ``body(rank, *arguments)`` in a new process for each rank; return the results by rank.

    ``body`` has to be importable. Ranks in ``dying`` have to end without a result.
    """
    with _children(rank_count) as pipes:
        for rank, pipe in enumerate(pipes):
            pipe.send((body, Rank(rank, rank_count), arguments))
        results: list[Any] = [None] * rank_count
        errors: list[str] = []
        running = dict(enumerate(pipes))
        deadline = time.monotonic() + deadline_s
        while running and time.monotonic() < deadline:
            for pipe in wait(list(running.values()), max(0.0, deadline - time.monotonic())):
                rank = next(number for number, own in running.items() if own is pipe)
                try:
                    kind, value = pipe.recv()  # type: ignore[union-attr]
                except EOFError:
                    kind, value = "died", "ended without a result"
                if kind == "unique id":
                    for other in pipes[1:]:
                        with contextlib.suppress(BrokenPipeError):
                            other.send(value)
                    continue
                del running[rank]
                if kind == "result":
                    results[rank] = value
                if kind == "error" or (kind == "died") != (rank in dying):
                    errors.append(f"rank {rank} {value}")
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        if errors or running:
            raise RankError("\n".join([*errors, f"late ranks: {sorted(running)}"]))
    return results


def run_ranks(body: Body, rank_count: int, *arguments: Any) -> list[Any]:
    """Run as threads, which start at once, or as processes where threads would share a GPU."""
    run = run_processes if need_processes(rank_count) else run_threads
    return run(body, rank_count, *arguments)


# ---- Processes -----------------------------------------------------------------------------------


@dataclass
class _Child:
    process: Any
    pipe: Connection


_kept: list[_Child] = []  # those on GPUs or with gloo, by rank


@contextlib.contextmanager
def _children(rank_count: int) -> Iterator[list[Connection]]:
    """Lend a pipe to a process for each rank; see _serve()."""
    children = _kept if default_backend() in ("cuda", "gloo") else []
    try:
        started = [_start(rank) for rank in range(len(children), rank_count)]
        children += started
        for child in started:
            if not child.pipe.poll(_START_S) or child.pipe.recv() != "ready":
                raise RankError("a process did not start")
        yield [child.pipe for child in children[:rank_count]]
    except BaseException:
        _end(children, 0)
        raise
    if children is not _kept:
        _end(children, _GRACE_S)


def _start(rank: int) -> _Child:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, rank), daemon=True)
    process.start()
    theirs.close()
    return _Child(process, ours)


def _end(children: list[_Child], grace_s: float) -> None:
    """Let them go, and kill those that do not."""
    for child in children:
        child.pipe.close()
    for child in children:
        child.process.join(grace_s)
        child.process.kill()
        child.process.join()
        child.process.close()
    children.clear()


def _serve(pipe: Connection, rank: int) -> None:
    """Run what comes through the pipe, until its other end is closed."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm_up(rank)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            _run(pipe, *pipe.recv())


def _run(pipe: Connection, body: Body, rank: Rank, arguments: tuple[Any, ...]) -> None:
    try:
        if rank.rank == 0:
            rank.unique_id = ep.create_unique_id()
            pipe.send(("unique id", rank.unique_id))
        else:
            rank.unique_id = pipe.recv()
        pipe.send(("result", body(rank, *arguments)))
    except BaseException:
        pipe.send(("error", f"failed:\n{traceback.format_exc()}"))
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()
