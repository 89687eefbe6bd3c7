"""Where the ranks of a Buffer meet: a torch.distributed process group, or an mpi4py communicator.

All that is asked of it is an all-gather of bytes, when the Buffer is made and when ranks come
together anew; and when a shape comes for the first time, where TCP does not do (_post.py).
"""

from __future__ import annotations

import json
from typing import Any

import torch
import torch.distributed as distributed

from .._callbacks import (
    AllToAllOnStream,
    _backend_of,
    _has_host_collectives,
    torch_all_gather,
    torch_engines,
)
from .._lib import backend_info

_LENGTH_BYTES = 8
_CPU = torch.device("cpu")


class Meeting:
    """One rank at a meeting point of torch.distributed."""

    def __init__(self, group: Any) -> None:
        """Meet over a process group; None: the default one, as it is now."""
        self._group = group
        self.rank = int(distributed.get_rank(group))
        self.size = int(distributed.get_world_size(group))
        self._names = _backend_of(group)
        if self.rank < 0:
            raise ValueError("group: this process is no member of it")

    def gather(self, data: bytes) -> list[bytes]:
        """Gather bytes of the same length from each rank, in the order of ranks. Collective."""
        return torch_all_gather(self._group, data, self.size)

    def tell(self, mine: Any) -> list[Any]:
        """Gather what JSON can say, of any length. Collective."""
        data = json.dumps(mine).encode()
        lengths = self.gather(len(data).to_bytes(_LENGTH_BYTES, "little"))
        longest = max(int.from_bytes(length, "little") for length in lengths)
        return [json.loads(part) for part in self.gather(data.ljust(longest))]

    def engine(self, backend: str) -> AllToAllOnStream | None:
        """Return what of the group carries rows of GPUs that reach no memory; None: the core's.

        On the CPU the core's own connections do: they outlive a rank that is lost.
        """
        return None if backend == "cpu" else torch_engines(self._group, backend)[1]

    def device(self) -> torch.device:
        """Tell where the tensors of such a group are most likely to be: on the GPU, if any is."""
        if not torch.cuda.is_available():
            return _CPU
        if _has_host_collectives(self._group) and not backend_info(gpu_backend()).available:
            return _CPU
        return torch.device("cuda", torch.cuda.current_device())


class MpiMeeting(Meeting):
    """One rank at an mpi4py communicator."""

    def __init__(self, comm: Any) -> None:
        """Meet over ``comm``."""
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()

    def gather(self, data: bytes) -> list[bytes]:
        """Gather bytes. Collective."""
        return list(self._comm.allgather(data))

    def engine(self, backend: str) -> AllToAllOnStream | None:
        """Leave it to the core."""
        return None

    def device(self) -> torch.device:
        """Tell where tensors are most likely to be: on the GPU, if this library has it."""
        if not torch.cuda.is_available() or not backend_info(gpu_backend()).available:
            return _CPU
        return torch.device("cuda", torch.cuda.current_device())


def gpu_backend() -> str:
    """Name the backend for which this torch was built."""
    return "maca" if getattr(torch.version, "maca", None) else "cuda"
