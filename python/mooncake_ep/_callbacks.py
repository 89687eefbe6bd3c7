"""What a group calls back: the caller's collectives, as C callbacks."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from ._ffi import ffi
from ._lib import c_bytes, function, listed

# Gathers one bytes object of the same length from each rank, ordered by rank. Blocking.
AllGather = Callable[[bytes], Sequence[bytes]]

# Sends send[rank] to each rank and fills receive[rank] from it; both may be empty. Blocking.
AllToAll = Callable[[list[memoryview], list[memoryview]], None]

# The same for device memory: addresses to send from and to receive at, and sizes in bytes, by rank;
# queued on a stream, which is given as an integer. A size may be 0.
AllToAllOnStream = Callable[[list[int], list[int], list[int], int], None]


class Callbacks:
    """C callbacks over Python functions; they keep what those raised for Python to raise again."""

    def __init__(
        self,
        rank_count: int,
        all_gather: AllGather | None,
        all_to_all: AllToAll | None,
        all_to_all_on_stream: AllToAllOnStream | None,
        member_count: int,
    ) -> None:
        """Wrap what is given. ``member_count``: of ranks that gather."""
        self._rank_count = rank_count
        self._member_count = member_count
        self._all_gather, self._all_to_all = all_gather, all_to_all
        self._all_to_all_on_stream = all_to_all_on_stream
        self._error: BaseException | None = None
        self.fields: dict[str, Any] = {}  # of mep_group_config_t
        for name, given, wrapper in (
            ("all_gather", all_gather, self._gather),
            ("all_to_all", all_to_all, self._exchange),
            ("all_to_all_on_stream", all_to_all_on_stream, self._queue_exchange),
        ):
            if given is not None:
                function(given, name)
                self.fields[name] = ffi.callback(f"mep_{name}_callback_t")(wrapper)

    def take_error(self) -> BaseException | None:
        """Return what the last call raised, once."""
        error, self._error = self._error, None
        return error

    def _gather(self, _context: Any, send: Any, receive: Any, count: int) -> int:
        try:
            assert self._all_gather is not None
            returned = self._all_gather(bytes(ffi.buffer(send, count)))
            gathered = [
                c_bytes(part, f"all_gather(data)[{index}]")
                for index, part in enumerate(listed(returned, "all_gather(data)", "bytes"))
            ]
            lengths = [len(part) for part in gathered]
            if lengths != [count] * self._member_count:
                raise ValueError(
                    f"all_gather returned lengths {lengths}, not {self._member_count} times {count}"
                )
            ffi.memmove(receive, b"".join(gathered), count * self._member_count)
        except BaseException as error:  # C cannot pass it on; it is raised again after the call
            self._error = error
            return 1
        return 0

    def _exchange(
        self, _context: Any, send: Any, send_bytes: Any, receive: Any, receive_bytes: Any
    ) -> int:
        try:
            assert self._all_to_all is not None
            self._all_to_all(self._views(send, send_bytes), self._views(receive, receive_bytes))
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _queue_exchange(
        self, _context: Any, send: Any, receive: Any, sizes: Any, stream: Any
    ) -> int:
        try:
            assert self._all_to_all_on_stream is not None
            self._all_to_all_on_stream(
                self._addresses(send),
                self._addresses(receive),
                [sizes[rank] for rank in range(self._rank_count)],
                int(ffi.cast("uintptr_t", stream)),
            )
        except BaseException as error:
            self._error = error
            return 1
        return 0

    def _addresses(self, pointers: Any) -> list[int]:
        return [int(ffi.cast("uintptr_t", pointers[rank])) for rank in range(self._rank_count)]

    def _views(self, addresses: Any, sizes: Any) -> list[memoryview]:
        return [
            memoryview(ffi.buffer(ffi.cast("char *", addresses[rank]), sizes[rank])).cast("B")
            if sizes[rank]
            else memoryview(bytearray())
            for rank in range(self._rank_count)
        ]


_RELEASE_SECONDS = 1.0


def torch_all_gather(process_group: Any, data: bytes, rank_count: int) -> list[bytes]:
    """Gather bytes of the same length, over a torch.distributed process group, by ranks."""
    if not data:
        return [part[:0] for part in torch_all_gather(process_group, b"\0", rank_count)]
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    on_host = _has_host_collectives(process_group)
    mine = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    mine = mine if on_host else mine.cuda()
    parts = [torch.empty_like(mine) for _ in range(rank_count)]
    tensors = [*parts, mine]
    counts = _reference_counts(tensors)
    distributed.all_gather(parts, mine, group=process_group)
    if on_host:
        _await_release(tensors, counts)
    return [bytes(part.tolist()) for part in parts]


def _await_release(tensors: list[Any], counts: list[int]) -> None:
    """Wait until a collective that is done has let go of tensors, which had so many references.

    A thread of gloo does that a little later. For the last reference it needs the interpreter, and
    if that is ending meanwhile, as in a short program, the process aborts.
    """
    deadline = time.monotonic() + _RELEASE_SECONDS
    while _reference_counts(tensors) > counts and time.monotonic() < deadline:
        time.sleep(1e-4)


def _reference_counts(tensors: list[Any]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


def torch_all_to_all(process_group: Any) -> AllToAll:
    """Exchange over a torch.distributed process group.

    gloo sends from where the bytes are to where they belong; others join them and take them by
    all_to_all_single(), through a GPU if they have nothing for host memory, like NCCL.
    """
    if not any(name in _backend_of(process_group) for name in ("gloo", "mpi")):
        return _by_all_to_all_single(process_group)
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    ranks = distributed.get_process_group_ranks(process_group or distributed.group.WORLD)

    def all_to_all(send: list[memoryview], receive: list[memoryview]) -> None:
        works = [
            transfer(torch.frombuffer(part, dtype=torch.uint8), ranks[rank], process_group)
            for transfer, parts in ((distributed.irecv, receive), (distributed.isend, send))
            for rank, part in enumerate(parts)
            if len(part) > 0
        ]
        for work in works:
            work.wait()

    return all_to_all


def _by_all_to_all_single(process_group: Any) -> AllToAll:
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    device = torch.device("cpu" if _has_host_collectives(process_group) else "cuda")

    def all_to_all(send: list[memoryview], receive: list[memoryview]) -> None:
        sent, received = [len(part) for part in send], [len(part) for part in receive]
        source = torch.tensor(bytearray(b"".join(send)), dtype=torch.uint8, device=device)
        output = torch.empty(sum(received), dtype=torch.uint8, device=device)
        distributed.all_to_all_single(output, source, received, sent, group=process_group)
        _scatter(memoryview(output.cpu().numpy()), receive)

    return all_to_all


def torch_engines(
    process_group: Any, backend: str
) -> tuple[AllToAll | None, AllToAllOnStream | None]:
    """Return what of a process group carries rows of a backend where memory is not reached.

    NCCL and MCCL are the library's own affair, without Python in the way.
    """
    if backend == "cpu":
        return torch_all_to_all(process_group), None
    names = _backend_of(process_group)
    if any(name in names for name in ("nccl", "mccl")) or _has_host_collectives(process_group):
        return None, None
    return None, torch_all_to_all_on_stream(process_group)


def torch_all_to_all_on_stream(process_group: Any) -> AllToAllOnStream:
    """Exchange over a process group that has batch_isend_irecv() for device memory."""
    torch = importlib.import_module("torch")
    distributed = importlib.import_module("torch.distributed")
    ranks = distributed.get_process_group_ranks(process_group or distributed.group.WORLD)

    def all_to_all_on_stream(
        send: list[int], receive: list[int], sizes: list[int], stream: int
    ) -> None:
        queue = torch.cuda.ExternalStream(stream) if stream else torch.cuda.default_stream()
        with torch.cuda.stream(queue):
            operations = [
                distributed.P2POp(
                    operation,
                    _Memory.tensor(torch, addresses[rank], size),
                    ranks[rank],
                    process_group,
                )
                for rank, size in enumerate(sizes)
                if size
                for operation, addresses in (
                    (distributed.isend, send),
                    (distributed.irecv, receive),
                )
            ]
            for work in distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()

    return all_to_all_on_stream


class _Memory:
    """Device memory, as arrays of others take it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "shape": (size,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }

    @classmethod
    def tensor(cls, torch: Any, address: int, size: int) -> Any:
        return torch.as_tensor(cls(address, size), device="cuda")


def _backend_of(process_group: Any) -> str:
    """Return the name of a process group's backend, or those of its devices: cpu:gloo,cuda:nccl."""
    return str(importlib.import_module("torch.distributed").get_backend(process_group))


def _has_host_collectives(process_group: Any) -> bool:
    return any(name in _backend_of(process_group) for name in ("gloo", "mpi", "cpu"))


def mpi_all_to_all(comm: Any) -> AllToAll:
    """Exchange over an mpi4py communicator, by Alltoallv of bytes."""
    byte = importlib.import_module("mpi4py.MPI").BYTE

    def all_to_all(send: list[memoryview], receive: list[memoryview]) -> None:
        joined, output = b"".join(send), bytearray(sum(map(len, receive)))
        comm.Alltoallv(
            [joined, _counts(send), byte],
            [output, _counts(receive), byte],
        )
        _scatter(memoryview(output), receive)

    return all_to_all


def _counts(parts: list[memoryview]) -> tuple[list[int], list[int]]:
    """Return the sizes and the offsets of parts that lie behind each other."""
    sizes = [len(part) for part in parts]
    return sizes, [sum(sizes[:rank]) for rank in range(len(sizes))]


def _scatter(joined: memoryview, parts: list[memoryview]) -> None:
    offset = 0
    for part in parts:
        part[:] = joined[offset : offset + len(part)]
        offset += len(part)
