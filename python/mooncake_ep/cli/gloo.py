"""The other yardstick of bench: the same operations by torch.distributed with gloo.

Written as MoE layers for torch write them: dispatch packs the rows by destination rank, exchanges
them by all_to_all_single with split sizes known beforehand, and unpacks them by expert; combine
sums each message's packed rows with their weights, returns the sums the same way, and adds them up.
As there, a rank's own rows take the same path, and each call makes its tensors anew. As here, there
is one row for each token and rank it goes to.
"""

from __future__ import annotations

import datetime
import importlib
import importlib.util
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from mooncake_ep import Group

    from .routing import Returned, Routing
    from .shared import FlagBarrier

_TIMEOUT = datetime.timedelta(seconds=300)
_PORT_BYTES = 4


def is_available() -> bool:
    """Whether torch is installed here and was built with gloo."""
    if importlib.util.find_spec("torch") is None:
        return False
    distributed = importlib.import_module("torch.distributed")
    return bool(distributed.is_available() and distributed.is_gloo_available())


def connect(group: Group, backend: str) -> None:
    """Make torch's default process group of the same ranks. Collective."""
    distributed: Any = importlib.import_module("torch.distributed")

    def store_at(port: int) -> Any:
        return distributed.TCPStore(
            "127.0.0.1",
            port,
            group.rank_count,
            is_master=group.rank == 0,
            timeout=_TIMEOUT,
            wait_for_workers=False,
        )

    # All ranks are on this machine, whatever its name resolves to.
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    # Rank 0 lets the system choose a port, so that no other program can be in the way.
    store = store_at(0) if group.rank == 0 else None
    port = store.port if store is not None else 0
    ports = group.all_gather(port.to_bytes(_PORT_BYTES, "little"))
    if store is None:
        store = store_at(int.from_bytes(ports[0], "little"))
    distributed.init_process_group(
        backend, store=store, rank=group.rank, world_size=group.rank_count, timeout=_TIMEOUT
    )


class Gloo:
    """Both operations of one rank, and the torch process group that they need."""

    name = "gloo"

    def __init__(self, group: Group, routing: Routing, barrier: FlagBarrier) -> None:
        """Connect the ranks, and work out the indices. Collective."""
        # torch is optional, so its types are not known everywhere.
        self._torch: Any = importlib.import_module("torch")
        self._distributed: Any = importlib.import_module("torch.distributed")
        self._torch.set_num_threads(1)
        self._routing = routing
        self._barrier = barrier
        connect(group, "gloo")
        self._sent_counts = [len(sent) for sent in routing.sent]
        self._received_counts = routing.received_counts
        self._sent_to = [self._index(sent) for sent in routing.sent]
        self._sent = self._torch.cat(self._sent_to)
        self._segments = [(segment, self._index(segment.message)) for segment in routing.segments]
        self._sums = [_Sum(self._torch, returned) for returned in routing.returned]

    def dispatch(self, x: npt.NDArray[np.uint8], packed: npt.NDArray[np.uint8]) -> float:
        """Move rows of x [T, row bytes] to packed [L, R*M, row bytes]; returns seconds."""
        torch = self._torch
        # As 32-bit words: rows are only moved here, and not every type is known to gloo.
        words = torch.from_numpy(x.view(np.int32))
        target = torch.from_numpy(packed.view(np.int32))
        self._barrier.wait()
        start = time.perf_counter()
        received = self._exchange(
            words.index_select(0, self._sent), self._sent_counts, self._received_counts
        )
        sources = received.split(self._received_counts)
        for segment, message in self._segments:
            rows = target[segment.expert, segment.begin : segment.begin + len(message)]
            torch.index_select(sources[segment.source], 0, message, out=rows)
        return time.perf_counter() - start

    def combine(self, y: npt.NDArray[Any], out: npt.NDArray[Any]) -> float:
        """Sum rows of y [L, R*M, H] into out [T, H]; returns seconds."""
        torch = self._torch
        rows, target = self._typed(y).flatten(0, 1), self._typed(out)
        self._barrier.wait()
        start = time.perf_counter()
        sums = torch.cat([one.of(rows) for one in self._sums])
        returned = self._exchange(sums.view(torch.int32), self._received_counts, self._sent_counts)
        total = torch.zeros(target.shape)
        parts = returned.view(rows.dtype).split(self._sent_counts)
        for tokens, part in zip(self._sent_to, parts, strict=True):
            total.index_add_(0, tokens, part.float())
        target.copy_(total)
        return time.perf_counter() - start

    def _exchange(self, to_send: Any, sent_counts: list[int], received_counts: list[int]) -> Any:
        received = to_send.new_empty((sum(received_counts), to_send.shape[1]))
        self._distributed.all_to_all_single(received, to_send, received_counts, sent_counts)
        return received

    def close(self) -> None:
        """Leave the torch process group. Collective."""
        self._distributed.destroy_process_group()

    def _index(self, index: npt.NDArray[np.intp]) -> Any:
        return self._torch.from_numpy(index.astype(np.int64))

    def _typed(self, array: npt.NDArray[Any]) -> Any:
        """A tensor on a NumPy array's memory; torch takes bf16 of ml_dtypes only as integers."""
        if array.dtype.kind == "f":
            return self._torch.from_numpy(array)
        return self._torch.from_numpy(array.view(np.int16)).view(self._torch.bfloat16)


class _Sum:
    """The weighted sum of the packed rows of each message of one source."""

    def __init__(self, torch: Any, returned: Returned) -> None:
        self._torch = torch
        valid = returned.rows >= 0
        # Each message has a first choice, few have more: the first one needs no addition.
        order = np.argsort(~valid, axis=1, kind="stable")
        rows = np.take_along_axis(returned.rows, order, axis=1)
        weights = np.take_along_axis(returned.weights, order, axis=1)
        self._choices = []
        for choice in range(rows.shape[1]):
            messages = np.flatnonzero(rows[:, choice] >= 0)
            arrays = messages, rows[messages, choice], weights[messages, choice, np.newaxis]
            self._choices.append(tuple(torch.from_numpy(array) for array in arrays))

    def of(self, rows: Any) -> Any:
        """Sums [n, H], added up in float32 and rounded to the type of `rows`."""
        (_, first, weights), *others = self._choices
        total = rows.index_select(0, first).float().mul_(weights)
        for messages, more, more_weights in others:
            total.index_add_(0, messages, rows.index_select(0, more).float().mul_(more_weights))
        return total.to(rows.dtype)
