"""What stands behind a Buffer of another library's API: groups, and a core buffer for each shape.

Those APIs name the shape of a round (tokens, hidden, experts, top-k) with the round and not with
the Buffer. So a core buffer is made when its shape comes for the first time, by all ranks at once,
and kept. A rank that is lost by then is left out: the others make it in a group without that rank.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from .._lib import EpError
from ..group import Group
from . import _checks as check
from ._core import Core, Route, Shape, Terms, topk_capacity
from ._meeting import Meeting, gpu_backend
from ._post import Letters, PostOffice, agree, open_post_office

_log = logging.getLogger("mooncake_ep.compat")

_HANDLE_LENGTH = 5
_FIRST = "all"  # the name of the home that the constructor makes
# What clients have said, by what the core is told.
_PAYLOADS = {
    None: "use_fp8=False",
    "fp8": "use_fp8=True",
    "fp8_pow2": "use_fp8=True and round_scale=True",
}


class _Way:
    """By what groups gather: it changes from one thing that ranks make together to the next."""

    def __init__(self, gather: Callable[[bytes], list[bytes]]) -> None:
        self.gather_now = gather

    def gather(self, data: bytes) -> list[bytes]:
        return self.gather_now(data)


@dataclass(slots=True)
class Home:
    """A group in which core buffers are made.

    name: the same on all ranks that made it; is_far: it reaches no peer's memory; is_closed: no
    more are made here, because that has failed once.
    """

    name: str
    group: Group
    is_far: bool
    is_closed: bool = False

    def serves(self, members: set[int], is_far: bool) -> bool:
        """Tell whether these ranks make their core buffers here."""
        mine = {rank for rank, active in enumerate(self.group.active_ranks) if active}
        return not self.is_closed and self.is_far == is_far and mine == members


class Exchange:
    """One rank's groups and core buffers."""

    def __init__(self, meet: Callable[[], Meeting], disable_p2p: bool) -> None:
        """Come together. Collective.

        ``meet`` finds the meeting point, now and at each update; ``disable_p2p``: reach no peer's
        memory. One rank's is enough, and from then on it holds for all.
        """
        self._meet = meet
        self.disable_p2p = disable_p2p
        self._closed = False
        self._office: PostOffice | None = None
        self._calls: Counter[str] = Counter()  # that have agreed to make something, since an update
        self.homes: list[Home] = []
        self.cores: list[Core] = []
        meeting = meet()
        self._meeting = meeting
        self._way = _Way(meeting.gather)
        self.rank, self.size = meeting.rank, meeting.size
        self.device = meeting.device()
        self.connect()

    def connect(self) -> None:
        """Come together, anew if that was done before. Collective.

        Ranks that have core buffers keep them, with all that was captured in graphs, and those
        that have none, because their process is new or was left out, make the same ones. If the
        number of ranks is another one, all of them start from nothing.
        """
        self._check_open()
        meeting = self._meet()
        self._meeting = meeting
        self.rank, self.size = meeting.rank, meeting.size
        for core in self.cores:
            with core.lock:
                core.receive_dropped()
        self._way.gather_now = meeting.gather
        self._open_office(meeting)
        formed = self.homes[0].group.rank_count if self.homes else 0
        homes = [self._describe(one) for one in self.homes]
        told = meeting.tell({"formed": formed, "homes": homes, "disable_p2p": self.disable_p2p})
        self.disable_p2p = any(one["disable_p2p"] for one in told)
        known = [one["homes"] for one in told if one["formed"]]
        if not known or any(one["formed"] not in (0, meeting.size) for one in told):
            self._leave_homes()
            self.homes.append(self._new_home(_FIRST, self.disable_p2p, None))
            return
        self._restore(_merged(known))

    def core(
        self,
        device: torch.device,
        wanted: tuple[int, int, int, int],
        quant: str | None,
        terms: Terms,
        is_far: bool,
    ) -> Core:
        """Find the core buffer for a round, or make it: then the call is collective.

        ``wanted``: tokens, hidden, experts, top-k; ``quant``: the round's payload, which any core
        buffer carries, but ranks find out here if they differ; ``is_far``: reach no peer's memory.
        """
        self._check_open()
        if device != self.device:
            self._move(device)
        is_far = is_far or self.disable_p2p
        for core in self.cores:
            if core.is_far == is_far and core.shape.serves(*wanted):
                return core
        max_tokens, hidden, experts, topk = wanted
        if self.device.type != "cpu" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a graph is captured, and nothing can be allocated in it: call dispatch() with "
                f"{max_tokens} tokens at most, hidden {hidden}, {experts} experts and top-k {topk} "
                "once before"
            )
        shape = Shape(max_tokens, hidden, experts, topk_capacity(max_tokens, topk))
        far = ", without the memory of peers" if is_far else ""
        what = f"{shape}, {_PAYLOADS[quant]}{far}"
        if self._office is None:
            self._make_with_all(shape, is_far, what)
        else:
            self._make_with_the_living(self._office, shape, is_far, what, terms)
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

    def set_timeout(self, value: float) -> None:
        """Set how long ranks are waited for by calls that bring no limit of their own."""
        self.open_group().timeout_s = value
        for home in self.homes[1:]:
            home.group.timeout_s = value

    def by_engine(self) -> bool:
        """Tell whether rows to some rank do not go through its memory."""
        group = self.open_group()
        return self.disable_p2p or any(
            group.transport(peer).name == "collective" for peer in range(group.rank_count)
        )

    def open_group(self) -> Group:
        """Return the group that the constructor made; EpError after close()."""
        self._check_open()
        return self.homes[0].group

    def close(self) -> None:
        """Let all memory go. Local. Closing twice is harmless."""
        self._closed = True
        self._leave_homes()
        if self._office is not None:
            self._office.close()

    def _check_open(self) -> None:
        if self._closed:
            raise EpError("the Buffer was destroyed")

    def _leave_homes(self) -> None:
        cores, self.cores = self.cores, []
        for core in cores:
            core.buffer.close()
        homes, self.homes = self.homes, []
        for home in homes:
            home.group.close()

    def _open_office(self, meeting: Meeting) -> None:
        before = self._office
        self._office = None
        if meeting.size > 1:
            self._office = open_post_office(meeting.rank, meeting.tell)
        self._calls.clear()
        if before is not None:
            before.close()

    def _describe(self, home: Home) -> dict[str, Any]:
        """Say in JSON what others need to make the same home."""
        cores = [core for core in self.cores if core.buffer.group is home.group]
        shapes = [asdict(core.shape) for core in cores]
        return {"name": home.name, "is_far": home.is_far, "shapes": shapes}

    def _restore(self, homes: list[dict[str, Any]]) -> None:
        """Bring all ranks into all homes, in the same order, with all core buffers."""
        mine = {home.name: home for home in self.homes}
        homes_now: list[Home] = []
        cores_now: list[Core] = []
        for told in homes:
            home = mine.get(told["name"])
            if home is None:
                everyone = [True] * self.size
                home = self._new_home(told["name"], told["is_far"], everyone)
                shapes = [Shape(**shape) for shape in told["shapes"]]
                cores = [Core(home.group, shape, self.device, home.is_far) for shape in shapes]
            else:
                # Whoever is new in it joins the others here.
                home.group.update(
                    all_gather=self._way.gather,
                    all_to_all_on_stream=self._meeting.engine(home.group.backend),
                    disable_p2p=home.is_far,
                )
                home.is_closed = False
                cores = [core for core in self.cores if core.buffer.group is home.group]
            homes_now.append(home)
            cores_now += cores
        self.homes, self.cores = homes_now, cores_now

    def _make_with_all(self, shape: Shape, is_far: bool, what: str) -> None:
        """Make a core buffer over the meeting point, which waits for all ranks in its own way."""
        try:
            told = self._meeting.tell(what) if self.size > 1 else [what]
            if any(one != what for one in told):
                raise EpError(
                    "ranks have called with different arguments: memory is to be made for "
                    + "; ".join(f"{one} by rank {rank}" for rank, one in enumerate(told))
                )
            self._make(shape, is_far, set(range(self.size)), "")
        except EpError:
            raise
        except RuntimeError as error:  # of torch.distributed
            raise EpError(f"ranks were lost while a Buffer made memory: {error}") from error

    def _make_with_the_living(
        self, office: PostOffice, shape: Shape, is_far: bool, what: str, terms: Terms
    ) -> None:
        """Make a core buffer with those ranks that come within the time of a call."""
        timeout_s = terms.timeout_s
        if timeout_s is None:
            timeout_s = self.open_group().timeout_s
        wanted = self._active(terms)
        call = self._calls[what]
        for attempt in range(self.size):
            name = f"{what}, call {call}, attempt {attempt}"
            members = agree(office, name, wanted, timeout_s)
            self._calls[what] = call + 1
            letters = Letters(office, name, members, timeout_s)
            self._way.gather_now = letters.gather
            try:
                self._make(shape, is_far, members, name)
            except EpError as error:
                if not letters.lost:
                    raise
                _log.warning("%s", error)
                wanted -= letters.lost
                continue
            lost = sorted(set(range(self.size)) - members)
            if lost:
                _log.warning("ranks %s did not come to make a buffer, and are masked in it", lost)
            return
        raise EpError("ranks were lost again and again while a Buffer made memory")

    def _active(self, terms: Terms) -> set[int]:
        """List the ranks that a call may wait for."""
        if terms.active_ranks is not None:
            mask = terms.active_ranks[: self.size].tolist()
            return {rank for rank, active in enumerate(mask) if active}
        masks = [core.buffer.mask for core in self.cores]
        return {rank for rank in range(self.size) if all(mask[rank] for mask in masks)}

    def _make(self, shape: Shape, is_far: bool, members: set[int], name: str) -> None:
        """Make a core buffer with these ranks, in a home that they have or in a new one."""
        home = next((one for one in self.homes if one.serves(members, is_far)), None)
        if home is None:
            active = [rank in members for rank in range(self.size)]
            home = self._new_home(f"{name}, ranks {sorted(members)}", is_far, active)
            self.homes.append(home)
        try:
            self.cores.append(Core(home.group, shape, self.device, home.is_far))
        except EpError:
            home.is_closed = True
            if home is not self.homes[0] and not any(
                core.buffer.group is home.group for core in self.cores
            ):
                self.homes.remove(home)
            raise

    def _new_home(self, name: str, is_far: bool, active_ranks: list[bool] | None) -> Home:
        on_cpu = self.device.type == "cpu"
        backend = "cpu" if on_cpu else gpu_backend()
        group = Group.from_callback(
            self._way.gather,
            None,
            self._meeting.engine(backend),
            rank=self.rank,
            rank_count=self.size,
            active_ranks=active_ranks,
            backend=backend,
            device_id=0 if on_cpu else self.device.index,
            timeout_s=self.homes[0].group.timeout_s if self.homes else None,
            disable_p2p=is_far,
        )
        return Home(name, group, is_far)

    def _move(self, device: torch.device) -> None:
        """Go where the first tensors are. All ranks do so alike."""
        if self.cores:
            raise ValueError(
                f"x is on {device}, and what this Buffer was used with on {self.device}"
            )
        self._leave_homes()
        self.device = device
        self.connect()


def _merged(known: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """List each home once that some rank has: the first one first, the others by name."""
    merged: dict[str, dict[str, Any]] = {}
    for homes in known:
        for home in homes:
            if merged.setdefault(home["name"], home) != home:
                raise EpError("ranks have made buffers of other shapes; destroy the Buffers on all")
    return sorted(merged.values(), key=lambda home: (home["name"] != _FIRST, home["name"]))
