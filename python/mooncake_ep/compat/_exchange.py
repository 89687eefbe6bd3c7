"""What stands behind a Buffer of another library's API: a group, and a core buffer for each shape.

Those APIs name the shape of a round (tokens, hidden, experts, top-k) with the round and not with
the Buffer. So a core buffer is made when its shape comes for the first time, by all ranks at once,
and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from .._lib import EpError
from ..group import Group
from . import _checks as check
from ._core import Core, Route, Shape, topk_capacity
from ._meeting import Meeting, gpu_backend

_HANDLE_LENGTH = 5


class Exchange:
    """One rank's group and core buffers."""

    def __init__(self, meet: Callable[[], Meeting], disable_p2p: bool) -> None:
        """Come together. Collective. ``meet`` finds the meeting point, now and at each update."""
        self._meet = meet
        self._disable_p2p = disable_p2p
        self._closed = False
        self.group: Group | None = None
        self.cores: list[Core] = []
        meeting = meet()
        self.rank, self.size = meeting.rank, meeting.size
        self.device = meeting.device()
        self.connect()

    def connect(self) -> None:
        """Come together, anew if that was done before. Collective.

        Ranks that have core buffers keep them, with all that was captured in graphs, and those
        that have none, because their process is new, make the same ones. If the number of ranks is
        another one, all of them start from nothing.
        """
        self._check_open()
        meeting = self._meet()
        self.rank, self.size = meeting.rank, meeting.size
        for core in self.cores:
            with core.lock:
                core.receive_dropped()
        shapes = [asdict(core.shape) for core in self.cores]
        formed = 0 if self.group is None else self.group.rank_count
        told = meeting.tell({"formed": formed, "shapes": shapes})
        known = [one for one in told if one["formed"]]
        if not known or any(one["formed"] != meeting.size for one in known):
            self._leave()
            self.group = self._join(meeting, None)
            return
        if any(one["shapes"] != known[0]["shapes"] for one in known):
            raise EpError("ranks have made buffers of other shapes; destroy the Buffers on all")
        if self.group is not None:
            # The same on all ranks, and no fewer: whoever is new joins them here.
            self.group.update(
                all_gather=meeting.gather,
                all_to_all_on_stream=meeting.engine(self.group.backend),
                disable_p2p=self._disable_p2p,
            )
            return
        self.group = self._join(meeting, [True] * meeting.size)
        for shape in known[0]["shapes"]:
            self.cores.append(Core(self.group, Shape(**shape), self.device))

    def core(
        self, device: torch.device, max_tokens: int, hidden: int, experts: int, topk: int
    ) -> Core:
        """Find the core buffer for a round, or make it: then the call is collective."""
        self._check_open()
        if device != self.device:
            self._move(device)
        for core in self.cores:
            if core.shape.serves(max_tokens, hidden, experts, topk):
                return core
        if self.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph is captured, and nothing can be allocated in it: call dispatch() with "
                f"{max_tokens} tokens at most, hidden {hidden}, {experts} experts and top-k {topk} "
                "once before"
            )
        shape = Shape(max_tokens, hidden, experts, topk_capacity(max_tokens, topk))
        self.cores.append(Core(self.open_group(), shape, self.device))
        return self.cores[-1]

    def route(self, handle: Any) -> Route:
        """Find what a dispatch remembers by the tuple that it gave, or one put together anew."""
        self._check_open()
        if not isinstance(handle, (tuple, list)):
            raise TypeError(f"handle is a {type(handle).__name__}, not the tuple of a dispatch")
        if len(handle) != _HANDLE_LENGTH:
            raise ValueError(f"handle has {len(handle)} elements, not {_HANDLE_LENGTH}")
        route = getattr(handle[0], "_mooncake_ep_route", None)
        if not isinstance(route, Route):
            raise ValueError(
                "handle: its first element is no src_info that a dispatch has returned"
            )
        if route.core not in self.cores:
            raise ValueError("handle is of another Buffer")
        return route

    def outputs(self, route: Route, x: Any, zero_copy: bool) -> Any:
        """Return the experts' outputs for a combine: x, or what was lent for them."""
        if zero_copy:
            if route.combine_buffer is None:
                raise ValueError("zero_copy: no combine buffer of this handle was asked for before")
            x = route.combine_buffer
        check.tensor("x", x, check.BFLOAT16, route.core.outputs_shape, route.core.device)
        return x

    def weights(self, route: Route, topk_idx: Any, topk_weights: Any, out: Any) -> None:
        """Check the other tensors of a combine."""
        device = route.core.device
        check.tensor("topk_idx", topk_idx, check.INTEGERS, route.shape)
        check.tensor("topk_weights", topk_weights, check.FLOAT32, route.shape, device)
        if out is not None:
            shape = (route.shape[0], route.core.shape.hidden)
            check.tensor("out", out, check.BFLOAT16, shape, device)

    def by_engine(self) -> bool:
        """Tell whether rows to some rank do not go through its memory."""
        group = self.open_group()
        return any(group.transport(peer).name == "collective" for peer in range(group.rank_count))

    def open_group(self) -> Group:
        """Return the core's group; EpError after close()."""
        self._check_open()
        assert self.group is not None
        return self.group

    def close(self) -> None:
        """Let all memory go. Local. Closing twice is harmless."""
        self._closed = True
        self._leave()

    def _check_open(self) -> None:
        if self._closed:
            raise EpError("the Buffer was destroyed")

    def _leave(self) -> None:
        cores, self.cores = self.cores, []
        for core in cores:
            core.buffer.close()
        if self.group is not None:
            self.group.close()
        self.group = None

    def _join(self, meeting: Meeting, active_ranks: list[bool] | None) -> Group:
        on_cpu = self.device.type == "cpu"
        backend = "cpu" if on_cpu else gpu_backend()
        return Group.from_callback(
            meeting.gather,
            None,
            meeting.engine(backend),
            rank=meeting.rank,
            rank_count=meeting.size,
            active_ranks=active_ranks,
            backend=backend,
            device_id=0 if on_cpu else self.device.index,
            disable_p2p=self._disable_p2p,
        )

    def _move(self, device: torch.device) -> None:
        """Go where the first tensors are. All ranks do so alike."""
        if self.cores:
            raise ValueError(
                f"x is on {device}, and what this Buffer was used with on {self.device}"
            )
        self._leave()
        self.device = device
        self.connect()
