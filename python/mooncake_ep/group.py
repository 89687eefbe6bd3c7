"""Group: one rank's membership in a set of ranks that exchange tokens."""

from __future__ import annotations

import importlib
import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ._callbacks import (
    AllGather,
    AllToAll,
    AllToAllOnStream,
    Callbacks,
    mpi_all_to_all,
    torch_all_gather,
    torch_engines,
)
from ._ffi import ffi
from ._lib import (
    BACKENDS,
    EpError,
    c_bytes,
    c_text,
    check,
    choice,
    failure,
    function,
    int32,
    lib,
    shown,
    struct,
    text,
    timeout_us,
    truth_value,
    truth_values,
    wrong_type,
)

_BACKEND_NAMES = {code: name for name, code in BACKENDS.items()}
_BARRIER = b"\0"


@dataclass(frozen=True)
class Transport:
    """How a rank reaches a peer.

    kind: MEP_TRANSPORT_*; name: "none", "self", "thread", "shm", "ipc" or "collective"; reason: why
    this one, and why not something faster.
    """

    kind: int
    name: str
    reason: str


def create_unique_id(address: str | None = None) -> bytes:
    """Start listening for the ranks of one group; return its id, 128 bytes for every rank.

    The process that calls this must hold rank 0. ``address`` is an IPv4 address or host name of
    this machine; None means 127.0.0.1. Uses one descriptor until the group is created or the id
    destroyed. Errors: ValueError (address unknown), EpError.
    """
    unique_id = ffi.new("mep_unique_id_t *")
    check(
        lib.mep_unique_id_create(
            ffi.NULL if address is None else c_text(address, "address"), unique_id
        )
    )
    return bytes(ffi.buffer(unique_id))


def destroy_unique_id(unique_id: bytes) -> None:
    """Stop listening, if no group was created from the id in this process."""
    lib.mep_unique_id_destroy(_unique_id(unique_id))


class World:
    """A meeting point of ranks that are threads of this process. Close it after its groups."""

    def __init__(self, rank_count: int) -> None:
        """Make a meeting point for ``rank_count`` threads, which call Group.from_world()."""
        world = ffi.new("mep_world_t **")
        self.rank_count = int32(rank_count, "rank_count")
        check(lib.mep_world_create(self.rank_count, world))
        self._c = world[0]
        self._destroy = weakref.finalize(self, lib.mep_world_destroy, self._c)

    def close(self) -> None:
        """Release the meeting point. Closing twice is harmless."""
        self._destroy()

    def __enter__(self) -> World:
        """Return the world itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()


class Group:
    """One rank of a set of ranks that exchange tokens. Make one with a ``from_*`` method.

    Joining is collective and blocking. All of them take ``backend`` ("cpu", "cuda" or "maca"),
    ``device_id`` of that backend, ``timeout_s``, the limit in seconds of this and other
    collective calls, and of each wait for another rank in rounds (None: 100 s; math.inf: never),
    and ``disable_p2p``: reach no peer's memory, as if there were no way to it (also
    MOONCAKE_EP_DISABLE_P2P=1).

    Errors of all of them: ValueError; NotImplementedError (backend not available); EpTimeoutError
    (names the missing ranks); EpError (ranks disagree, wrong secret, rank taken, connection lost).

    Those with ``active_ranks`` may be joined by fewer ranks than rank_count: a sequence of
    rank_count truth values, the same on all ranks, says which come; the others may come later, see
    update().

    A group, and the buffers made from it, belong to one thread at a time. Use it as a context
    manager or call close().

    Attributes:
        rank, rank_count, backend, device_id: as given.
        active_ranks: which ranks are in the group [rank_count].
    """

    def __init__(
        self,
        callbacks: Callbacks | None = None,
        members: list[bool] | None = None,
        **fields: Any,
    ) -> None:
        """Join with these fields of mep_group_config_t; for the ``from_*`` methods."""
        self._callbacks = callbacks
        if callbacks is not None:
            fields |= callbacks.fields
        words = _words(members)
        config = struct("mep_group_config_t", active_ranks=words, **fields)
        group = ffi.new("mep_group_t **")
        self._check(lib.mep_group_create(config, group))
        self._c = group[0]
        self._destroy = weakref.finalize(self, lib.mep_group_destroy, self._c)
        info = self._query()
        self.rank: int = info.rank
        self.rank_count: int = info.rank_count
        self.backend: str = _BACKEND_NAMES[info.backend]
        self.device_id: int = info.device_id
        self._timeout_s = _seconds(info.timeout_us)
        self.active_ranks = [True] * self.rank_count if members is None else members

    @classmethod
    def from_env(
        cls,
        *,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join by the variables that torchrun sets: RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT.

        Rank 0 listens on MASTER_PORT + MOONCAKE_EP_PORT_OFFSET (default 1).
        """
        return cls(**_fields(backend, device_id, timeout_s, disable_p2p))

    @classmethod
    def from_unique_id(
        cls,
        unique_id: bytes,
        *,
        rank: int,
        rank_count: int,
        active_ranks: Sequence[object] | None = None,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join over TCP the group that create_unique_id() started, at the first rank that comes."""
        fields = _fields(backend, device_id, timeout_s, disable_p2p)
        fields["unique_id"] = _unique_id(unique_id)
        rank, rank_count = int32(rank, "rank"), int32(rank_count, "rank_count")
        members = _members(active_ranks, rank_count)
        return cls(None, members, rank=rank, rank_count=rank_count, **fields)

    @classmethod
    def from_world(
        cls,
        world: World,
        *,
        rank: int,
        active_ranks: Sequence[object] | None = None,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join the other threads of this process that do so with the same world.

        With ``active_ranks`` the world is of as many ranks as come.
        """
        fields = _fields(backend, device_id, timeout_s, disable_p2p)
        fields["world"] = _open_world(world)
        rank, members = int32(rank, "rank"), _members(active_ranks)
        rank_count = world.rank_count if members is None else len(members)
        group = cls(None, members, rank=rank, rank_count=rank_count, **fields)
        group._world = world
        return group

    @classmethod
    def from_callback(
        cls,
        all_gather: AllGather,
        all_to_all: AllToAll | None = None,
        all_to_all_on_stream: AllToAllOnStream | None = None,
        *,
        rank: int,
        rank_count: int,
        active_ranks: Sequence[object] | None = None,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join over the caller's own collectives.

        ``all_gather`` is called now and when buffers are created, with a bytes object of the same
        length on each rank, and returns those of all ranks that come, in their order. What it
        raises is raised here. ``all_to_all`` carries rows between ranks that do not reach each
        other's memory (None: on GPUs NCCL, or MCCL, does, if all ranks have it and none share a
        GPU; otherwise TCP): it is called while rounds are sent, with lists of memoryviews by rank,
        sends the first ones and fills the second ones; some are empty. On GPUs,
        ``all_to_all_on_stream`` instead is called with lists of device addresses to send from and
        to receive at, and of sizes in bytes, and with the stream, as an integer, on which it queues
        that. What they raise becomes the cause of an EpError.
        """
        rank, rank_count = int32(rank, "rank"), int32(rank_count, "rank_count")
        members = _members(active_ranks, rank_count)
        callbacks = Callbacks(
            rank_count,
            function(all_gather, "all_gather"),
            all_to_all,
            all_to_all_on_stream,
            rank_count if members is None else sum(members),
        )
        fields = _fields(backend, device_id, timeout_s, disable_p2p)
        return cls(callbacks, members, rank=rank, rank_count=rank_count, **fields)

    @classmethod
    def from_torch(
        cls,
        process_group: Any = None,
        *,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join the ranks of a torch.distributed process group (None: the default one).

        Anything goes for which torch.distributed.all_gather() works. Where memory is not
        reached, rows of CPU ranks go by its isend() and irecv() if it is gloo's or MPI's, otherwise
        by its all_to_all_single(); of GPUs by NCCL or MCCL, or else by TCP, or, if its backend is
        another one for GPUs only, by its batch_isend_irecv().
        """
        distributed = importlib.import_module("torch.distributed")
        rank, rank_count = _place_in(process_group, distributed)
        return cls.from_callback(
            lambda data: torch_all_gather(process_group, data, rank_count),
            *torch_engines(process_group, backend),
            rank=rank,
            rank_count=rank_count,
            backend=backend,
            device_id=device_id,
            timeout_s=timeout_s,
            disable_p2p=disable_p2p,
        )

    @classmethod
    def from_mpi(
        cls,
        comm: Any,
        *,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Join the ranks of an mpi4py communicator, by Get_rank, Get_size and allgather.

        Where memory is not reached, rows of CPU ranks go by Alltoallv, if it has one, or else by
        TCP; of GPUs by NCCL or MCCL, or else by TCP.
        """
        for name in ("Get_rank", "Get_size", "allgather"):
            if not callable(getattr(comm, name, None)):
                raise wrong_type(comm, "comm", f"not a communicator: it has no {name}()")
        return cls.from_callback(
            comm.allgather,
            mpi_all_to_all(comm) if backend == "cpu" and hasattr(comm, "Alltoallv") else None,
            rank=comm.Get_rank(),
            rank_count=comm.Get_size(),
            backend=backend,
            device_id=device_id,
            timeout_s=timeout_s,
            disable_p2p=disable_p2p,
        )

    @classmethod
    def single(
        cls,
        *,
        backend: str = "cpu",
        device_id: int = 0,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> Group:
        """Make a group of one rank, with nobody to meet."""
        return cls(rank=0, rank_count=1, **_fields(backend, device_id, timeout_s, disable_p2p))

    @property
    def size(self) -> int:
        """Number of ranks; the same as rank_count."""
        return self.rank_count

    @property
    def closed(self) -> bool:
        """Whether close() was called."""
        return not self._destroy.alive

    def transport(self, peer: int) -> Transport:
        """Tell how rank ``peer`` is reached, and why; ValueError if there is no such rank."""
        info = struct("mep_transport_info_t")
        number = int32(peer, "peer")
        check(lib.mep_group_query_transport(self._open(), number, info))
        return Transport(info.kind, text(info.name), text(info.reason))

    @property
    def timeout_s(self) -> float:
        """Limit in seconds of each wait for another rank; math.inf: never.

        May be set at any time, from any thread (None: 100 s): calls that bring none of their own
        follow, also those that are captured in graphs, and waits that are under way.
        """
        return self._timeout_s

    @timeout_s.setter
    def timeout_s(self, value: float) -> None:
        check(lib.mep_group_set_timeout(self._open(), timeout_us(value)))
        self._timeout_s = _seconds(self._query().timeout_us)

    def update(
        self,
        active_ranks: Sequence[object] | None = None,
        *,
        unique_id: bytes | None = None,
        world: World | None = None,
        all_gather: AllGather | None = None,
        all_to_all: AllToAll | None = None,
        all_to_all_on_stream: AllToAllOnStream | None = None,
        timeout_s: float | None = None,
        disable_p2p: bool = False,
    ) -> None:
        """Come together anew, with the ranks that ``active_ranks`` names (None: all).

        After ranks were lost, or to let some in or out. Collective among the ranks named, over a
        new meeting point: one of ``unique_id`` (made by the first of them), ``world`` and
        ``all_gather``. A rank that is new joins by the same ``from_*`` method and active_ranks, and
        then makes the group's buffers in the order in which the others made them; the others return
        from here when it has made the last. Rounds that were sent must be received before. After it
        all the ranks named are active in every buffer's mask, and handles hold no dispatch; graphs
        go on, with the new ranks too, where rows go through memory. ``timeout_s``: of it all.

        If it fails nothing has changed here, but that all_gather() and new buffers need the
        meeting point that may be lost; another update may be tried, also if it did not fail on all.
        Errors: as of joining; EpError (a round is in flight; the buffers differ).
        """
        members = _members(active_ranks, self.rank_count) or [True] * self.rank_count
        callbacks = Callbacks(
            self.rank_count, all_gather, all_to_all, all_to_all_on_stream, sum(members)
        )
        fields: dict[str, Any] = {"disable_p2p": truth_value(disable_p2p, "disable_p2p")}
        fields |= callbacks.fields
        if unique_id is not None:
            fields["unique_id"] = _unique_id(unique_id)
        if world is not None:
            fields["world"] = _open_world(world)
        words = _words(members)
        config = struct(
            "mep_group_config_t", active_ranks=words, timeout_us=timeout_us(timeout_s), **fields
        )
        before, self._callbacks = self._callbacks, callbacks
        try:
            self._check(lib.mep_group_update(self._open(), config))
        except BaseException:
            self._callbacks = before
            raise
        self._world = world
        self.active_ranks = members

    def all_gather(self, data: bytes) -> list[bytes]:
        """Gather bytes of the same length, at most 1 MiB, from each rank; also a barrier.

        Collective. Returns one bytes object per rank, zeros of those not in the group. Errors:
        ValueError, EpTimeoutError, EpError (lengths differ).
        """
        send = c_bytes(data, "data")
        if not 1 <= len(send) <= lib.MEP_ALL_GATHER_BYTES_MAX:
            most = lib.MEP_ALL_GATHER_BYTES_MAX
            raise ValueError(f"data has {len(send)} bytes; it must have 1 to {most}")
        receive = ffi.new("char[]", len(send) * self.rank_count)
        self._check(lib.mep_group_all_gather(self._open(), send, receive, len(send)))
        gathered = bytes(ffi.buffer(receive))
        return [gathered[rank * len(send) :][: len(send)] for rank in range(self.rank_count)]

    def barrier(self) -> None:
        """Wait until every rank is here. Collective."""
        self.all_gather(_BARRIER)

    def close(self) -> None:
        """Leave the group; later calls on it and on its buffers raise EpError.

        Closing twice is harmless.
        """
        self._destroy()

    def __enter__(self) -> Group:
        """Return the group itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    _world: World | None = None  # lives at least as long as the group

    def _open(self) -> Any:
        """Return the ``mep_group_t *`` of an open group."""
        if not self._destroy.alive:
            raise EpError("the group is closed")
        return self._c

    def _query(self) -> Any:
        """Return the ``mep_group_info_t`` of the group."""
        info = struct("mep_group_info_t")
        check(lib.mep_group_query(self._c, info))
        return info

    def _cause(self) -> Exception | None:
        """Return what a collective of the caller has raised, to be the cause of a failure.

        What is no Exception (KeyboardInterrupt) is raised as it is.
        """
        error = self._take_error()
        if error is not None and not isinstance(error, Exception):
            raise error
        return error

    def _take_error(self) -> BaseException | None:
        """Return what a collective of the caller has raised, once."""
        return None if self._callbacks is None else self._callbacks.take_error()

    def _check(self, status: int) -> None:
        """Raise what the caller's collective raised, else what the status stands for."""
        raised = self._take_error()
        if raised is not None:
            raise raised
        if status != 0:
            raise failure(status)


def _open_world(world: World) -> Any:
    """Return the ``mep_world_t *`` of an open world."""
    if not isinstance(world, World):
        raise wrong_type(world, "world", "not a World")
    if not world._destroy.alive:
        raise EpError("the world is closed")
    return world._c


def _fields(
    backend: str, device_id: int, timeout_s: float | None, disable_p2p: bool
) -> dict[str, Any]:
    return {
        "backend": choice(backend, "backend", BACKENDS),
        "device_id": int32(device_id, "device_id"),
        "timeout_us": timeout_us(timeout_s),
        "disable_p2p": truth_value(disable_p2p, "disable_p2p"),
    }


def _seconds(timeout_us: int) -> float:
    return math.inf if timeout_us < 0 else timeout_us / 1e6


def _members(
    active_ranks: Sequence[object] | None, rank_count: int | None = None
) -> list[bool] | None:
    return None if active_ranks is None else truth_values(active_ranks, "active_ranks", rank_count)


def _words(members: list[bool] | None) -> Any:
    """Make what the C API takes for a list of members; NULL for None."""
    return ffi.NULL if members is None else ffi.new("int32_t[]", members)


def _place_in(process_group: Any, distributed: Any) -> tuple[int, int]:
    """Return this process's rank in a torch.distributed process group, and its rank count."""
    try:
        place = distributed.get_rank(process_group), distributed.get_world_size(process_group)
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"process_group {shown(process_group)}: {reason}") from error
    if place[0] == -1:  # torch's for a group of others
        raise ValueError(f"process_group {shown(process_group)} is one without this rank")
    return place


def _unique_id(unique_id: bytes) -> Any:
    content = c_bytes(unique_id, "unique_id")
    if len(content) != lib.MEP_UNIQUE_ID_BYTES:
        raise ValueError(f"unique_id has {len(content)} bytes, not {lib.MEP_UNIQUE_ID_BYTES}")
    value = ffi.new("mep_unique_id_t *")
    ffi.memmove(value, content, lib.MEP_UNIQUE_ID_BYTES)
    return value
