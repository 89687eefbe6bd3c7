"""Where the groups of the tests compute, and NumPy arrays there.

Tests are written once, with NumPy arrays. ``--backend`` (conftest.py) says where they compute:
  cpu    NumPy arrays as they are: the buffer is an ep.Buffer;
  cuda   copies on the rank's GPU, by torch;
  torch  copies on the CPU, by torch: what is done for cuda, to be tried without a GPU;
  tcp    as cpu, but no rank reaches another's memory: rows go by TCP;
  gloo   the same by torch.distributed's gloo.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

import mooncake_ep as ep

VARIABLE = "MOONCAKE_EP_TEST_BACKEND"  # so that ranks that are processes know it
BACKENDS = ("cpu", "cuda", "torch", "tcp", "gloo")
_ENGINES = ("tcp", "gloo")
# Types that NumPy has only by ml_dtypes; torch makes no NumPy arrays of them.
_INTEGERS = {"bfloat16": "int16", "float8_e4m3fn": "uint8"}
_ALIGNMENT = 64  # bytes; an array on a device is as far from a multiple of it as on the host


def backend() -> str:
    """Return what --backend says."""
    return os.environ.get(VARIABLE, "cpu")


def on_cpu() -> bool:
    """Tell whether arrays stay as they are."""
    return backend() == "cpu" or by_engine()


def by_engine() -> bool:
    """Tell whether rows go by an engine between all ranks."""
    return backend() in _ENGINES


def group_options(rank: int) -> dict[str, Any]:
    """Make the arguments of a rank's group that say where it computes."""
    if backend() != "cuda":
        return {"backend": "cpu", "device_id": 0, "disable_p2p": by_engine()}
    return {"backend": "cuda", "device_id": rank % ep.backend_info("cuda").device_count}


def threads_are_ranks() -> bool:
    """Tell whether any number of ranks may be threads."""
    return backend() not in ("cuda", "gloo")


def need_processes(rank_count: int) -> bool:
    """Tell whether ranks have to be processes."""
    if backend() == "gloo":
        return True
    return backend() == "cuda" and rank_count > ep.backend_info("cuda").device_count


def warm_up(rank: int) -> None:
    """Start what takes seconds to start, before anybody has a deadline."""
    if backend() == "gloo":
        importlib.import_module("torch.distributed")
    if backend() == "cuda":
        torch = importlib.import_module("torch")
        torch.zeros(1, device=torch.device("cuda", group_options(rank)["device_id"])).cpu()


def make_single() -> ep.Group:
    """Make a group of one rank."""
    return ep.Group.single(**group_options(0))


def make_buffer(group: ep.Group, **options: Any) -> Any:
    """Make a buffer that takes and gives NumPy arrays, wherever its group computes."""
    buffer = ep.Buffer(group, **options)
    return buffer if on_cpu() else _Buffer(buffer)


class _Copy:
    """An array on a device: all memory that it is a part of, so that its gaps are there, too."""

    def __init__(self, torch: Any, place: Any, array: np.ndarray) -> None:
        dtype = getattr(torch, array.dtype.name)
        self._host = _memory_of(array)
        self._shift = self._host.ctypes.data % _ALIGNMENT
        self._memory = torch.empty(self._shift + self._host.size, dtype=torch.uint8, device=place)
        self._memory[self._shift :].copy_(torch.from_numpy(self._host))
        if array.size:
            begin = self._shift + array.ctypes.data - self._host.ctypes.data
            size = (len(self._memory) - begin) // array.itemsize * array.itemsize
            strides = [stride // array.itemsize for stride in array.strides]
            elements = self._memory[begin : begin + size].view(dtype)
            self.tensor = elements.as_strided(array.shape, strides, elements.storage_offset())
        else:  # it has no place, and in NumPy no strides either
            self.tensor = torch.empty(array.shape, dtype=dtype, device=place)

    def fetch(self) -> None:
        """Let the host's memory be what the device's is now."""
        self._host[:] = self._memory[self._shift :].cpu().numpy()


def _memory_of(array: np.ndarray) -> np.ndarray:
    """View as bytes, and in their order, all memory that an array is a part of."""
    while isinstance(array.base, np.ndarray):
        array = array.base
    order = np.argsort(array.strides, kind="stable")[::-1]
    flat = array.transpose(order).reshape(-1)
    assert flat.size == 0 or np.shares_memory(flat, array), "memory that has gaps itself"
    return flat.view(np.uint8)


def _to_numpy(tensor: Any) -> Any:
    """Copy to the host once the current stream has written it; strides stay."""
    if tensor is None:
        return None
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in _INTEGERS:
        return tensor.cpu().numpy()
    integers = tensor.view(getattr(importlib.import_module("torch"), _INTEGERS[name]))
    return integers.cpu().numpy().view(getattr(ml_dtypes, name))


class _Call:
    """The copies of one call's arrays, and how what it gives becomes NumPy arrays."""

    def __init__(self, group: ep.Group) -> None:
        self._torch = importlib.import_module("torch")
        on_gpu = group.backend == "cuda"
        self._place = self._torch.device("cuda", group.device_id) if on_gpu else "cpu"
        self._outputs: list[_Copy] = []

    def put(self, array: Any) -> Any:
        """Return a copy on the device; what is no array stays what it is, to be refused."""
        if isinstance(array, tuple):
            return tuple(self.put(one) for one in array)
        return _Copy(self._torch, self._place, array).tensor if _is_array(array) else array

    def put_output(self, array: Any) -> Any:
        """Return a copy that the call may write to."""
        if not _is_array(array):
            return array
        self._outputs.append(_Copy(self._torch, self._place, array))
        return self._outputs[-1].tensor

    def put_outputs(self, out: Any) -> Any:
        """Return what stands for the caller's Dispatched in the call."""
        if not isinstance(out, ep.Dispatched):
            return out
        arrays = (out.x, out.scales, out.count, out.src_info, out.layout_range)
        return ep.Dispatched(*(self.put_output(array) for array in arrays))

    def take_dispatched(self, given: ep.Dispatched, out: ep.Dispatched | None) -> ep.Dispatched:
        """Return what a dispatch has received, in ``out`` if the caller gave it."""
        self._fetch()
        if out is None:
            arrays = (given.x, given.scales, given.count, given.src_info, given.layout_range)
            out = ep.Dispatched(*map(_to_numpy, arrays))
        out.handle = given.handle
        return out

    def take_sums(self, given: Any, out: Any) -> Any:
        """Return what a combine has summed, in ``out`` if the caller gave it."""
        self._fetch()
        return _to_numpy(given) if out is None else out

    def _fetch(self) -> None:
        for output in self._outputs:
            output.fetch()


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def _taken(call: Callable[[], Any], take: Callable[[Any], Any]) -> Any:
    """Return what is taken of a call's result, also if it is the exception that has it."""
    try:
        return take(call())
    except ep.PeerFailedError as error:
        result: Any = take(error.result)
        error.result = result
        raise


class _Pending:
    """A pending round that gives NumPy arrays."""

    def __init__(self, pending: Any, take: Callable[[Any], Any]) -> None:
        self._pending = pending
        self._take = take

    def receive(self) -> Any:
        return _taken(self._pending.receive, self._take)


class _Buffer:
    """An ep.Buffer that takes and gives NumPy arrays, which it copies to its device and back."""

    def __init__(self, buffer: ep.Buffer) -> None:
        self._buffer = buffer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._buffer, name)

    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer.close()

    def dispatch(
        self,
        x: Any,
        topk_idx: Any,
        topk_weights: Any = None,
        *,
        out: Any = None,
        active_ranks: Any = None,
        send_only: Any = False,
        **options: Any,
    ) -> Any:
        call = _Call(self._buffer.group)

        def make() -> Any:
            return self._buffer.dispatch(
                call.put(x),
                call.put(topk_idx),
                call.put(topk_weights),
                out=call.put_outputs(out),
                active_ranks=call.put_output(active_ranks),
                send_only=send_only,
                **options,
            )

        def take(received: ep.Dispatched) -> ep.Dispatched:
            return call.take_dispatched(received, out)

        return _taken(make, (lambda given: _Pending(given, take)) if send_only else take)

    def combine(
        self,
        x: Any,
        handle: Any,
        topk_weights: Any = None,
        *,
        out: Any = None,
        active_ranks: Any = None,
        send_only: Any = False,
        **options: Any,
    ) -> Any:
        call = _Call(self._buffer.group)

        def make() -> Any:
            return self._buffer.combine(
                call.put(x),
                handle,
                call.put(topk_weights),
                out=call.put_output(out),
                active_ranks=call.put_output(active_ranks),
                send_only=send_only,
                **options,
            )

        def take(sums: Any) -> Any:
            return call.take_sums(sums, out)

        return _taken(make, (lambda given: _Pending(given, take)) if send_only else take)
