"""Ranks for the tests of mooncake_ep.compat: processes with a torch.distributed group, that stay.

A Team runs functions of a module on its processes: ``body(place, *arguments)``, with a Place that
says who and where the rank is. MOONCAKE_EP_COMPAT_DEVICE (cpu or cuda) says where tensors are, and
MOONCAKE_EP_COMPAT_CONTROL (gloo or nccl) over what ranks meet.

Inputs are such that all results are exact, also through FP8: whole numbers up to 7, with a 7 in
each 128 channels, and weights of quarters.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import multiprocessing
import multiprocessing.forkserver
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as distributed

DEVICE = os.environ.get("MOONCAKE_EP_COMPAT_DEVICE", "cpu")
CONTROL = os.environ.get("MOONCAKE_EP_COMPAT_CONTROL", "gloo")
MODULE = os.environ.get("MOONCAKE_EP_COMPAT_MODULE", "mooncake_ep.compat.mooncake")
# NCCL takes no two ranks on one GPU.
RANKS = min(3, torch.cuda.device_count()) if CONTROL == "nccl" else 3
START_S = 120.0  # torch is large, and processes share the cores
DEADLINE_S = 60.0
MEET_S = 30.0  # of torch's collectives, less than the deadline
NEVER = -1


class TeamError(AssertionError):
    """A rank failed; the message holds its traceback."""


@dataclass
class Place:
    """Who a rank is, and where. ``group``: None for the default group, of all ranks."""

    rank: int
    size: int
    group: Any
    device: torch.device


def prepare() -> None:
    """Load torch once, for all processes that are forked from there."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch.distributed"])
    multiprocessing.forkserver.ensure_running()


class Team:
    """Processes that are ranks of one default process group; the first two have one of their own.

    With ``meeting`` they meet again at another place, e.g. because one of them is new.
    """

    def __init__(self, size: int) -> None:
        """Start them."""
        self.size = size
        self._directory = tempfile.TemporaryDirectory()
        self._meetings = 0
        self._children = [_start() for _ in range(size)]
        self._await_start(self._children)
        self.meet()

    def meet(self, size: int = 0) -> None:
        """Make the default process group of the first ``size`` ranks (0: all), in place of one."""
        self._meetings += 1
        store = str(Path(self._directory.name) / str(self._meetings))
        self.run(meet, store, size or self.size, size=size)

    def replace(self, rank: int) -> None:
        """Start a process in the place of one that has died."""
        _, process = self._children[rank]
        process.join(DEADLINE_S)
        self._children[rank][0].close()
        process.close()
        self._children[rank] = _start()
        self._await_start([self._children[rank]])

    def run(
        self, body: Callable[..., Any], *arguments: Any, size: int = 0, dying: Sequence[int] = ()
    ) -> list[Any]:
        """Run ``body`` on the first ``size`` ranks (0: all), and return what it returned.

        Ranks in ``dying`` have to end without a result.
        """
        ranks = range(size or self.size)
        self._send(ranks, body, arguments)
        return self._gather(ranks, dying)

    def close(self) -> None:
        """End all processes."""
        for pipe, process in self._children:
            pipe.close()
            process.join(5)
            process.kill()
            process.join()
            process.close()
        self._directory.cleanup()

    def __enter__(self) -> Team:
        """Return the team itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self.close()

    def _await_start(self, children: Sequence[Any]) -> None:
        for pipe, _ in children:
            if not pipe.poll(START_S) or pipe.recv() != "ready":
                raise TeamError("a process did not start")

    def _send(self, ranks: Sequence[int], body: Callable[..., Any], arguments: Any) -> None:
        for rank in ranks:
            self._children[rank][0].send((body, rank, len(ranks), arguments))

    def _gather(self, ranks: Sequence[int], dying: Sequence[int]) -> list[Any]:
        deadline = time.monotonic() + DEADLINE_S
        results, errors = [], []
        for rank in ranks:
            kind, value = self._answer(rank, deadline)
            if (kind == "died") != (rank in dying) or kind in ("error", "late"):
                errors.append(f"rank {rank} {kind}: {value}")
                deadline = min(deadline, time.monotonic() + 5)
            results.append(value)
        if errors:
            raise TeamError("\n".join(errors))
        return results

    def _answer(self, rank: int, deadline: float) -> tuple[str, Any]:
        pipe = self._children[rank][0]
        try:
            if not pipe.poll(max(0.0, deadline - time.monotonic())):
                return "late", None
            kind, value = pipe.recv()
        except EOFError:
            return "died", None
        return kind, value


def meet(place: Place, store: str, size: int) -> None:
    """Make the default process group, and one of the first two ranks."""
    if distributed.is_initialized():
        distributed.destroy_process_group()
    distributed.init_process_group(
        CONTROL,
        f"file://{store}",
        rank=place.rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=MEET_S),
    )
    _Pair.group = distributed.new_group([0, 1])


class _Pair:
    """The group of the first two ranks of this process."""

    group: Any = None


def _start() -> tuple[Connection, Any]:
    context = multiprocessing.get_context("forkserver")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def _serve(pipe: Connection) -> None:
    """Run what comes through the pipe, until its other end is closed."""
    torch.set_num_threads(1)
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            body, rank, size, arguments = pipe.recv()
            device = torch.device("cpu")
            if DEVICE == "cuda":
                device = torch.device("cuda", rank % torch.cuda.device_count())
                torch.cuda.set_device(device)
            world = distributed.get_world_size() if distributed.is_initialized() else size
            place = Place(rank, size, None if size == world else _Pair.group, device)
            try:
                pipe.send(("result", body(place, *arguments)))
            except BaseException:
                pipe.send(("error", traceback.format_exc()))
    if distributed.is_initialized():
        distributed.destroy_process_group()


# ---- Rounds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """The shape of a round, and of which seed its inputs are."""

    max_tokens: int = 8
    hidden: int = 256
    experts: int = 6
    topk: int = 2
    tokens: tuple[int, ...] = (5, 8, 3)  # by rank
    seed: int = 0
    none: bool = True  # some choices are -1

    def inputs(self, rank: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Make x, topk_idx and topk_weights of a rank, on the CPU."""
        random = torch.Generator().manual_seed(1000 * self.seed + rank)
        rows = self.tokens[rank]
        x = torch.randint(-7, 8, (rows, self.hidden), generator=random).bfloat16()
        x[:, ::128] = 7
        choices = [torch.randperm(self.experts, generator=random) for _ in range(rows)]
        topk_idx = torch.stack(choices)[:, : self.topk] if rows else torch.zeros(0, self.topk)
        topk_idx = topk_idx.long().contiguous()
        if self.none and rows:
            topk_idx[torch.rand(topk_idx.shape, generator=random) < 0.2] = -1
        weights = torch.randint(1, 5, (rows, self.topk), generator=random).float() / 4
        return x, topk_idx, weights

    def rows(self, expert: int, ranks: Sequence[int]) -> list[tuple[int, int]]:
        """List the (source, token) of an expert's rows, in the documented order."""
        return [
            (source, token)
            for source in ranks
            for token, chosen in enumerate(self.inputs(source)[1].tolist())
            if expert in chosen
        ]

    def sums(
        self, rank: int, alive: Callable[[int], bool] = lambda _: True, size: int = 1
    ) -> torch.Tensor:
        """Return what combine gives if an expert e multiplies by factor(e).

        Each of ``size`` ranks rounds what its experts add up to, as it travels in bfloat16.
        """
        x, topk_idx, weights = self.inputs(rank)
        factors = torch.tensor([factor(e) * alive(e) for e in range(self.experts)] + [0.0])
        shares = factors[topk_idx] * weights
        total = torch.zeros(x.shape)
        for owner in range(size):
            mine = topk_idx.div(self.experts // size, rounding_mode="floor") == owner
            total += (x.float() * (shares * mine).sum(1, keepdim=True)).bfloat16().float()
        return total.bfloat16()


def factor(expert: int) -> float:
    """Return by what an expert multiplies."""
    return float(1 + expert % 2)


def check_received(
    place: Place, case: Case, given: tuple[Any, Any, Any], ranks: Sequence[int] | None = None
) -> torch.Tensor:
    """Compare all that a dispatch gave, bit for bit; return the experts' outputs [L, R*M, H]."""
    recv_x, count, handle = given
    src_info, layout_range = handle[0].cpu(), handle[1].cpu()
    local = case.experts // place.size
    capacity = place.size * case.max_tokens
    if isinstance(recv_x, tuple):
        values, scales = recv_x
        assert values.dtype == torch.float8_e4m3fn
        assert scales.shape == (local, capacity, case.hidden // 128)
        assert scales.dtype == torch.float32
        assert scales.stride(-2) == 1
        rows = values.cpu().float() * scales.cpu().repeat_interleave(128, dim=2)
    else:
        assert recv_x.dtype == torch.bfloat16
        rows = recv_x.cpu().float()
    assert rows.shape == (local, capacity, case.hidden)
    assert count.dtype == src_info.dtype == torch.int32
    assert layout_range.dtype == torch.int64
    assert handle[2:] == (case.max_tokens, case.hidden, case.experts)
    outputs = torch.zeros(rows.shape)
    sources = range(place.size) if ranks is None else ranks
    inputs = {source: case.inputs(source)[0].float() for source in sources}
    for index in range(local):
        expert = place.rank * local + index
        expected = case.rows(expert, sources)
        assert count[index].item() == len(expected)
        assert src_info[index, : len(expected)].tolist() == [token for _, token in expected]
        for source in sources:
            of_source = [one for one, _ in expected]
            begin, n = divmod(int(layout_range[index, source]), 1 << 32)
            assert n == of_source.count(source)
            assert n == 0 or begin == of_source.index(source)
        for row, (source, token) in enumerate(expected):
            assert torch.equal(rows[index, row], inputs[source][token]), (expert, row)
        outputs[index, : len(expected)] = rows[index, : len(expected)] * factor(expert)
    return outputs.bfloat16().to(place.device)


def options(mode: str) -> dict[str, bool]:
    """Turn "now", "async" or "hook" into arguments of a call."""
    return {"async_finish": mode == "async", "return_recv_hook": mode == "hook"}


def wait(event: Any, hook: Any, mode: str) -> None:
    """Wait for a call as clients do."""
    if mode == "hook":
        hook()
    else:
        assert hook is None
    event.current_stream_wait()


def on_device(place: Place, case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make the inputs of a rank where its tensors are."""
    x, topk_idx, weights = (one.to(place.device) for one in case.inputs(place.rank))
    return x, topk_idx, weights


def round_trip(
    place: Place, buffer: Any, case: Case, mode: str = "now", use_fp8: bool = False
) -> None:
    """Dispatch, let the experts multiply, combine, and compare everything."""
    x, topk_idx, weights = on_device(place, case)
    active = torch.ones(place.size, dtype=torch.int32, device=place.device)
    recv_x, count, handle, event, hook = buffer.dispatch(
        x,
        topk_idx,
        active,
        case.max_tokens,
        case.experts,
        NEVER,
        use_fp8=use_fp8,
        **options(mode),
    )
    wait(event, hook, mode)
    y = check_received(place, case, (recv_x, count, handle))
    out, event, hook = buffer.combine(y, topk_idx, weights, active, NEVER, handle, **options(mode))
    wait(event, hook, mode)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out.cpu(), case.sums(place.rank, size=place.size))
    assert active.tolist() == [1] * place.size


def buffer_class() -> Any:
    """Import Mooncake's Buffer from where MOONCAKE_EP_COMPAT_MODULE says."""
    return importlib.import_module(MODULE).Buffer


@contextlib.contextmanager
def buffer_of(place: Place, **arguments: Any) -> Iterator[Any]:
    """Make a Buffer of Mooncake's API, and destroy it."""
    buffer = buffer_class()(place.group, **arguments)
    yield buffer
    buffer.destroy()
