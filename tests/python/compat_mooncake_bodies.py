"""What the ranks of test_compat_mooncake.py do."""

from __future__ import annotations

import gc
import os
import socket
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as distributed

import mooncake_ep as ep
from compat_rank import (
    NEVER,
    Case,
    Place,
    buffer_class,
    buffer_of,
    check_received,
    on_device,
    options,
    round_trip,
    wait,
)
from mooncake_ep.compat import _post

SOON_US = 300_000


@dataclass(frozen=True)
class Zeros:
    """A tensor that a rank makes on its device."""

    shape: tuple[int, ...]
    dtype: str

    def tensor(self, place: Place) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=getattr(torch, self.dtype), device=place.device)


def dispatch(place: Place, buffer: Any, case: Case, /, **changes: Any) -> Any:
    """Dispatch without FP8, with all ranks, and no deadline, but for ``changes``."""
    if not {"x", "topk_idx"} <= changes.keys():  # in a graph nothing can come from the CPU
        x, topk_idx, _ = on_device(place, case)
        changes = {"x": x, "topk_idx": topk_idx} | changes
    arguments = {
        "active_ranks": None,
        "num_max_dispatch_tokens_per_rank": case.max_tokens,
        "num_experts": case.experts,
        "timeout_us": NEVER,
        "use_fp8": False,
    }
    return buffer.dispatch(**(arguments | changes))


def combine(place: Place, buffer: Any, case: Case, y: Any, handle: Any, /, **changes: Any) -> Any:
    """Combine with all ranks and no deadline, but for ``changes``."""
    if not {"topk_idx", "topk_weights"} <= changes.keys():
        _, topk_idx, weights = on_device(place, case)
        changes = {"topk_idx": topk_idx, "topk_weights": weights} | changes
    arguments = {
        "x": y,
        "active_ranks": None,
        "timeout_us": NEVER,
        "handle": handle,
    }
    return buffer.combine(**(arguments | changes))


def all_modes(place: Place, mode: str, use_fp8: bool, disable_p2p: bool) -> tuple[bool, bool]:
    with buffer_of(place, disable_p2p=disable_p2p) as buffer:
        for seed in range(3):
            round_trip(place, buffer, Case(seed=seed), mode, use_fp8)
        assert buffer._use_fallback == (not buffer.runtime.use_fast_path())
        return buffer._use_fallback, buffer.runtime.p2p_enabled()


def one_without_p2p(place: Place, who: int) -> list[tuple[bool, bool, bool]]:
    """Give disable_p2p on one rank; tell what a rank finds, before and after an update."""
    found = []
    with buffer_of(place, disable_p2p=place.rank == who) as buffer:
        for _ in range(2):
            runtime = buffer.runtime
            found.append((runtime.p2p_enabled(), runtime.use_fast_path(), buffer._use_fallback))
            for case in (Case(), Case(topk=6, seed=1), Case(hidden=264)):
                round_trip(place, buffer, case, "hook")
            buffer.update_ep_member()
    return found


def new_without_p2p(place: Place, lost: int) -> tuple[bool, bool]:
    """Take in a rank that is new, and alone gives disable_p2p; tell what a rank finds."""
    if place.rank == lost:
        Kept.buffer = buffer_class()(place.group, disable_p2p=True)
    else:
        Kept.buffer.update_ep_member()
    for case in (Case(), Case(topk=6), Case(hidden=264)):
        round_trip(place, Kept.buffer, case, "hook")
    return Kept.buffer.runtime.p2p_enabled(), Kept.buffer.runtime.use_fast_path()


def switch_fallback(place: Place, disable_p2p: bool) -> list[list[str]]:
    """Switch the fallback on and off; tell how the memory of each round reaches the other ranks."""
    ways: list[list[str]] = []
    with buffer_of(place, disable_p2p=disable_p2p) as buffer:
        assert buffer._use_fallback is disable_p2p
        for value in (True, False, True):
            buffer._use_fallback = value
            assert buffer._use_fallback is value
            case = Case(seed=len(ways))
            x, topk_idx, _ = on_device(place, case)
            recv_x, count, handle, _, _ = dispatch(place, buffer, case, x=x, topk_idx=topk_idx)
            buffer._use_fallback = not value  # a combine goes the way of its dispatch
            y = check_received(place, case, (recv_x, count, handle))
            out, _, _ = combine(place, buffer, case, y, handle)
            assert torch.equal(out.cpu(), case.sums(place.rank))
            group = handle[0]._mooncake_ep_route.core.buffer.group
            peers = [peer for peer in range(place.size) if peer != place.rank]
            ways.append(sorted({group.transport(peer).name for peer in peers}))
        buffer._use_fallback = True
        buffer.update_ep_member()
        for use_fp8 in (False, True):
            round_trip(place, buffer, case, "hook", use_fp8)
    return ways


def positional(place: Place) -> None:
    """Call as SGLang does."""
    case = Case()
    size = buffer_class().get_ep_buffer_size_hint(
        case.max_tokens, case.hidden, place.size, case.experts
    )
    buffer = buffer_class()(place.group, size)
    assert buffer.group_size == place.size
    assert buffer.rank == place.rank
    x, topk_idx, weights = on_device(place, case)
    active = torch.ones(place.size, dtype=torch.int32, device=place.device)
    recv_x, count, handle, event, hook = buffer.dispatch(
        x, topk_idx, active, case.max_tokens, case.experts, NEVER, True, True, False
    )
    assert hook is None
    event.current_stream_wait()
    y = check_received(place, case, (recv_x, count, handle))
    out = torch.full_like(x, float("nan"))
    with buffer.combine(y, topk_idx, weights, active, NEVER, handle, False, True, False, out)[
        1
    ] as event:
        pass
    assert torch.equal(out.cpu(), case.sums(place.rank))


def zero_copy(place: Place, mode: str) -> None:
    case = Case()
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, _ = dispatch(place, buffer, case)
        y = check_received(place, case, (recv_x, count, handle))
        with pytest.raises(ValueError, match="zero_copy"):
            combine(place, buffer, case, y, handle, zero_copy=True)
        memory = buffer.get_next_combine_buffer(handle)
        assert memory.shape == recv_x.shape
        assert memory.dtype == torch.bfloat16
        assert memory.device == place.device
        memory.copy_(y)
        for x in (memory, torch.full_like(y, float("nan"))):  # it is not x that counts
            out, event, hook = combine(
                place, buffer, case, x, handle, zero_copy=True, **options(mode)
            )
            wait(event, hook, mode)
            assert torch.equal(out.cpu(), case.sums(place.rank))


def two_in_flight(place: Place, dispatches: list[int], combines: list[int]) -> None:
    """Have two batches in flight, whose hooks run in the orders given."""
    cases = [Case(seed=1), Case(seed=2)]
    with buffer_of(place) as buffer:
        for _ in range(5):
            sent = [dispatch(place, buffer, case, return_recv_hook=True) for case in cases]
            outputs: list[Any] = [None, None]
            for batch in dispatches:
                recv_x, count, handle, _, hook = sent[batch]
                hook()
                outputs[batch] = check_received(place, cases[batch], (recv_x, count, handle))
            combined = [
                combine(place, buffer, case, outputs[batch], sent[batch][2], return_recv_hook=True)
                for batch, case in enumerate(cases)
            ]
            for batch in combines:
                out, _, hook = combined[batch]
                hook()
                assert torch.equal(out.cpu(), cases[batch].sums(place.rank))


def interleaved(place: Place) -> None:
    """Let one batch dispatch while the other one combines."""
    cases = [Case(seed=seed) for seed in range(8)]
    with buffer_of(place) as buffer:
        sums: Any = None
        for number, case in enumerate(cases):
            recv_x, count, handle, _, receive = dispatch(place, buffer, case, return_recv_hook=True)
            if sums is not None:
                out, _, hook = sums
                hook()
                assert torch.equal(out.cpu(), cases[number - 1].sums(place.rank))
            receive()
            y = check_received(place, case, (recv_x, count, handle))
            sums = combine(place, buffer, case, y, handle, return_recv_hook=True)
        sums[2]()


def three_in_flight(place: Place) -> str:
    """Send one dispatch too many."""
    with buffer_of(place) as buffer:
        hooks = [dispatch(place, buffer, Case(), return_recv_hook=True)[4] for _ in range(2)]
        with pytest.raises(RuntimeError) as error:
            dispatch(place, buffer, Case(), return_recv_hook=True)
        for hook in hooks:
            hook()
        round_trip(place, buffer, Case())
        return str(error.value)


def hooks_of_other_threads(place: Place) -> None:
    case = Case()
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, hook = dispatch(place, buffer, case, return_recv_hook=True)
        for _ in range(2):  # the second time it does nothing
            thread = threading.Thread(target=hook)
            thread.start()
            thread.join()
        y = check_received(place, case, (recv_x, count, handle))
        assert torch.equal(combine(place, buffer, case, y, handle)[0].cpu(), case.sums(place.rank))


def dropped_hooks(place: Place) -> None:
    """Drop more hooks than there may be rounds in flight, on one rank only."""
    case = Case()
    with buffer_of(place) as buffer:
        for _ in range(6):
            _, _, _, _, hook = dispatch(place, buffer, case, return_recv_hook=True)
            if place.rank != 0:
                hook()
            del hook
        recv_x, count, handle, _, _ = dispatch(place, buffer, case)
        y = check_received(place, case, (recv_x, count, handle))
        for _ in range(6):
            _, _, hook = combine(place, buffer, case, y, handle, return_recv_hook=True)
            if place.rank != 1:
                hook()
            del hook
        round_trip(place, buffer, case)


def handles(place: Place) -> None:
    case = Case()
    with buffer_of(place) as buffer, buffer_of(place) as other:
        recv_x, count, handle, _, _ = dispatch(place, buffer, case)
        y = check_received(place, case, (recv_x, count, handle))
        assert type(handle) is tuple
        later = [dispatch(place, buffer, Case(seed=seed)) for seed in range(1, 5)]
        src_info, layout_range, tokens, hidden, experts = handle
        again = [src_info, layout_range, tokens, hidden, experts]
        for one in (handle, again, handle):  # as often as one likes
            out, _, _ = combine(place, buffer, case, y, one)
            assert torch.equal(out.cpu(), case.sums(place.rank))
        with pytest.raises(ValueError, match="handle is of another Buffer"):
            combine(place, other, case, y, handle)
        with pytest.raises(ValueError, match="handle: its first element"):
            combine(place, buffer, case, y, (src_info.clone(), *handle[1:]))
        with pytest.raises(ValueError, match="handle has 2 elements, not 5"):
            buffer.get_next_combine_buffer(handle[:2])
        with pytest.raises(TypeError, match="handle is a int"):
            combine(place, buffer, case, y, 3)
        assert len(later) == 4


def no_tokens(place: Place) -> None:
    with buffer_of(place) as buffer:
        for tokens in ((0, 8, 3), (5, 0, 0), (0, 0, 0)):
            round_trip(place, buffer, Case(tokens=tokens), "hook")


def shapes(place: Place) -> None:
    """Go through shapes, and back, in one Buffer."""
    with buffer_of(place) as buffer:
        for _ in range(2):
            for case in (
                Case(),
                Case(topk=6),
                Case(experts=24, topk=20),
                Case(hidden=264),  # not of 128
                Case(max_tokens=600, tokens=(7, 600, 0)),
                Case(experts=6, topk=1),
            ):
                round_trip(place, buffer, case)
        x, topk_idx, weights = on_device(place, Case())
        recv_x, count, handle, _, _ = dispatch(place, buffer, Case(), topk_idx=topk_idx.int())
        y = check_received(place, Case(), (recv_x, count, handle))
        out, _, _ = combine(place, buffer, Case(), y, handle, topk_idx=topk_idx.int())
        assert torch.equal(out.cpu(), Case().sums(place.rank))
        assert x.shape[0] == weights.shape[0]


def repeated(place: Place) -> int:
    """Name each expert twice; return how many rows came. Combine ignores other choices."""
    case = Case(none=False)
    x, topk_idx, weights = on_device(place, case)
    topk_idx[:, 1] = topk_idx[:, 0]
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, _ = dispatch(place, buffer, case, topk_idx=topk_idx)
        others = torch.full_like(topk_idx, -1)
        out, _, _ = combine(place, buffer, case, recv_x, handle, topk_idx=others)
        expected = x.float() * weights.sum(1, keepdim=True)
        assert torch.equal(out, expected.bfloat16())
        return int(count.sum())


def memory(place: Place) -> int:
    """Tell how many core buffers rounds of several top-k have made."""
    with buffer_of(place) as buffer:
        for topk in (2, 6, 4, 1):
            round_trip(place, buffer, Case(topk=topk))
        return len(buffer._exchange.cores)


def larger_mask(place: Place) -> list[int]:
    """Give a mask that is larger than the group."""
    with buffer_of(place) as buffer:
        active = torch.full((place.size + 4,), 1, dtype=torch.int32, device=place.device)
        active[place.size :] = 7
        recv_x, count, handle, _, _ = dispatch(place, buffer, Case(), active_ranks=active)
        y = check_received(place, Case(), (recv_x, count, handle))
        out, _, _ = combine(place, buffer, Case(), y, handle, active_ranks=active)
        assert torch.equal(out.cpu(), Case().sums(place.rank))
        values: list[int] = active.tolist()
        return values


def default_payload(place: Place) -> bool:
    with buffer_of(place) as buffer:
        recv_x = dispatch(place, buffer, Case(), use_fp8=None)[0]
        return isinstance(recv_x, tuple)


def wrong(place: Place, function: str, changes: dict[str, Any]) -> str:
    """Make a wrong call on all ranks; afterwards all is as before. Returns the error."""
    case = Case()
    changes = {
        name: value.tensor(place) if isinstance(value, Zeros) else value
        for name, value in changes.items()
    }
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, _ = dispatch(place, buffer, case)
        y = check_received(place, case, (recv_x, count, handle))
        with pytest.raises((ValueError, TypeError)) as error:
            if function == "dispatch":
                dispatch(place, buffer, case, **changes)
            else:
                combine(place, buffer, case, y, handle, **changes)
        out, _, _ = combine(place, buffer, case, y, handle)
        assert torch.equal(out.cpu(), case.sums(place.rank))
        round_trip(place, buffer, case)
        return f"{type(error.value).__name__}: {error.value}"


def invalid_experts(place: Place, value: int) -> str | None:
    """Name an expert that is none, in place of the -1 of a case; return the error, if it is one."""
    case = Case(topk=4)
    x, topk_idx, _ = on_device(place, case)
    topk_idx[topk_idx == -1] = value
    with buffer_of(place) as buffer:
        round_trip(place, buffer, case)
        if place.device.type == "cpu":
            with pytest.raises(ValueError) as error:
                dispatch(place, buffer, case, x=x, topk_idx=topk_idx)
            round_trip(place, buffer, case)
            return str(error.value)
        recv_x, count, handle, _, _ = dispatch(place, buffer, case, x=x, topk_idx=topk_idx)
        y = check_received(place, case, (recv_x, count, handle))
        out, _, _ = combine(place, buffer, case, y, handle)
        assert torch.equal(out.cpu(), case.sums(place.rank))
        return None


def destroyed(place: Place) -> list[str]:
    """Use a Buffer after destroy()."""
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, _ = dispatch(place, buffer, Case())
        y = check_received(place, Case(), (recv_x, count, handle))
        buffer.destroy()
        buffer.destroy()
        errors = []
        for call in (
            lambda: dispatch(place, buffer, Case()),
            lambda: combine(place, buffer, Case(), y, handle),
            buffer.update_ep_member,
        ):
            with pytest.raises((RuntimeError, ValueError)) as error:
                call()
            errors.append(str(error.value))
        return errors


def memory_goes(place: Place) -> int:
    """Tell how much shared memory this process maps after a Buffer is gone without destroy()."""
    buffer = buffer_class()(place.group)
    round_trip(place, buffer, Case())
    assert place.device.type != "cpu" or _mapped() > 0
    reference = weakref.ref(buffer)
    del buffer
    gc.collect()
    assert reference() is None
    return _mapped()


def _mapped() -> int:
    with open("/proc/self/maps") as maps:  # noqa: PTH123
        return sum("/dev/shm/mooncake_ep" in line for line in maps)


# ---- Ranks that are lost -------------------------------------------------------------------------


class Kept:
    """What a process keeps from one body to the next."""

    buffer: Any = None


def keep(place: Place, disable_p2p: bool) -> None:
    """Make a Buffer that stays, and use it."""
    Kept.buffer = buffer_class()(place.group, disable_p2p=disable_p2p)
    round_trip(place, Kept.buffer, Case())
    round_trip(place, Kept.buffer, Case(topk=6), "hook")


def lose(place: Place, lost: int, when: str, mode: str, masked: bool) -> list[int] | None:
    """Lose a rank before dispatch, or before combine; return the mask that the others see."""
    case = Case(seed=3)
    buffer = Kept.buffer
    x, topk_idx, weights = on_device(place, case)
    active = torch.ones(place.size, dtype=torch.int32, device=place.device) if masked else None
    if when == "dispatch" and place.rank == lost:
        os._exit(0)
    others = [rank for rank in range(place.size) if rank != lost]
    recv_x, count, handle, event, hook = buffer.dispatch(
        x, topk_idx, active, case.max_tokens, case.experts, SOON_US, **options(mode)
    )
    wait(event, hook, mode)
    sources = others if when == "dispatch" else range(place.size)
    y = check_received(place, case, (recv_x, count, handle), sources)
    if when == "combine" and place.rank == lost:
        os._exit(0)
    out, event, hook = buffer.combine(
        y, topk_idx, weights, active, SOON_US, handle, **options(mode)
    )
    wait(event, hook, mode)
    local = case.experts // place.size
    assert torch.equal(out.cpu(), case.sums(place.rank, lambda e: e // local != lost))
    # It goes on, and nobody waits any more.
    again = dispatch(place, buffer, case, active_ranks=active, timeout_us=NEVER)
    y = check_received(place, case, again[:3], others)
    out, _, _ = combine(place, buffer, case, y, again[2], active_ranks=active)
    assert torch.equal(out.cpu(), case.sums(place.rank, lambda e: e // local != lost))
    return None if active is None else active.tolist()


def lose_before_a_shape(
    place: Place, lost: int, case: Case, mode: str, masked: bool, timeout_us: int
) -> list[int] | None:
    """Lose a rank before the first dispatch of a shape; return the mask that the others see."""
    if Kept.buffer is None:
        Kept.buffer = buffer_class()(place.group)
    distributed.barrier(place.group)
    if place.rank == lost:
        os._exit(0)
    active = torch.ones(place.size, dtype=torch.int32, device=place.device) if masked else None
    begun = time.monotonic()
    for _ in range(2):
        round_without(place, [lost], case, active, mode, timeout_us)
    assert time.monotonic() - begun < 10
    return None if active is None else active.tolist()


def round_without(
    place: Place, lost: list[int], case: Case, active: Any, mode: str = "now", timeout_us: int = -1
) -> None:
    """Do a round of the kept Buffer that some ranks are not in, and compare everything."""
    others = [rank for rank in range(place.size) if rank not in lost]
    terms = {"active_ranks": active, "timeout_us": timeout_us} | options(mode)
    recv_x, count, handle, event, hook = dispatch(place, Kept.buffer, case, **terms)
    wait(event, hook, mode)
    y = check_received(place, case, (recv_x, count, handle), others)
    out, event, hook = combine(place, Kept.buffer, case, y, handle, **terms)
    wait(event, hook, mode)
    local = case.experts // place.size
    assert torch.equal(out.cpu(), case.sums(place.rank, lambda e: e // local not in lost))


def late_for_a_shape(place: Place, late: int, case: Case) -> list[int]:
    """Let a rank come when the others have given it up; then all come together again."""
    Kept.buffer = buffer_class()(place.group)
    active = torch.ones(place.size, dtype=torch.int32, device=place.device)
    others = [rank for rank in range(place.size) if rank != late]
    if place.rank == late:
        distributed.barrier(place.group)
        round_without(place, others, case, active, timeout_us=SOON_US)
    else:
        round_without(place, [late], case, active, timeout_us=SOON_US)
        distributed.barrier(place.group)
    # The next shape finds all ranks again, and an update brings them all into this one.
    round_trip(place, Kept.buffer, Case(hidden=264))
    Kept.buffer.update_ep_member()
    for one in (case, Case(hidden=264), Case(experts=12)):
        round_trip(place, Kept.buffer, one, "hook")
    values: list[int] = active.tolist()
    return values


def masked_before_a_shape(place: Place, masked: int) -> None:
    """Make a shape without a rank that is masked, and lives, and does not call."""
    Kept.buffer = buffer_class()(place.group)
    if place.rank != masked:
        active = torch.ones(place.size, dtype=torch.int32, device=place.device)
        active[masked] = 0
        round_without(place, [masked], Case(), active)
    distributed.barrier(place.group)
    Kept.buffer.update_ep_member()
    round_trip(place, Kept.buffer, Case())


def disagree(place: Place) -> str:
    """Make a shape that another rank does not; afterwards all is as before. Returns the error."""
    with buffer_of(place) as buffer:
        with pytest.raises(ep.EpError) as error:
            dispatch(place, buffer, Case(hidden=264) if place.rank else Case())
        distributed.barrier(place.group)
        round_trip(place, buffer, Case(hidden=264))
        round_trip(place, buffer, Case())
        return str(error.value)


def disagree_on_payload(place: Place, has_tcp: bool) -> str:
    """Let one rank take FP8 in the first dispatch of a shape; return the error."""
    before = _post._TRIAL_S
    _post._TRIAL_S = before if has_tcp else -1.0
    with buffer_of(place) as buffer:
        _post._TRIAL_S = before
        assert (buffer._exchange._office is not None) == has_tcp
        with pytest.raises(ep.EpError) as error:
            dispatch(place, buffer, Case(), use_fp8=place.rank == 0)
        distributed.barrier(place.group)
        for use_fp8 in (True, False):
            round_trip(place, buffer, Case(), use_fp8=use_fp8)
        return str(error.value)


def strangers(place: Place) -> None:
    """Have others call at the place where a rank listens."""
    with buffer_of(place) as buffer:
        office = buffer._exchange._office
        where = office._listener.getsockname()
        calls = [socket.create_connection(where) for _ in range(3)]
        calls[0].sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(100))
        calls[1].sendall(b"short")
        calls[2].close()
        round_trip(place, buffer, Case())
        for call in calls:
            call.close()


def no_places(place: Place) -> list[bool]:
    """Make a Buffer whose ranks do not reach each other by TCP; lose a rank before a shape."""
    _post._TRIAL_S = -1.0
    buffer = buffer_class()(place.group)
    round_trip(place, buffer, Case())
    distributed.barrier(place.group)
    if place.rank == 1:
        os._exit(0)
    with pytest.raises(ep.EpError, match="lost while a Buffer made memory"):
        dispatch(place, buffer, Case(hidden=264))
    return [buffer._exchange._office is None]


def come_together(place: Place, is_new: bool) -> None:
    """Take in a rank that is new."""
    if is_new:
        Kept.buffer = buffer_class()(place.group)
    else:
        Kept.buffer.update_ep_member()
    for case in (Case(), Case(topk=6), Case(hidden=264)):
        round_trip(place, Kept.buffer, case, "hook")


def come_together_by_rank(place: Place, lost: int) -> None:
    come_together(place, place.rank == lost)


def stale_handle(place: Place) -> str:
    """Combine a handle of before an update."""
    with buffer_of(place) as buffer:
        recv_x, count, handle, _, _ = dispatch(place, buffer, Case())
        y = check_received(place, Case(), (recv_x, count, handle))
        buffer.update_ep_member()
        with pytest.raises(RuntimeError) as error:
            combine(place, buffer, Case(), y, handle)
        round_trip(place, buffer, Case())
        return str(error.value)


def hook_before_update(place: Place) -> str:
    """Update with a round in flight."""
    with buffer_of(place) as buffer:
        *_, hook = dispatch(place, buffer, Case(), return_recv_hook=True)
        with pytest.raises(RuntimeError) as error:
            buffer.update_ep_member()
        hook()
        buffer.update_ep_member()
        round_trip(place, buffer, Case())
        return str(error.value)


# ---- On GPUs -------------------------------------------------------------------------------------


def graph(place: Place, mode: str) -> None:
    """Replay a round that was captured, with other tokens."""
    case = Case()
    with buffer_of(place) as buffer:
        x, topk_idx, weights = on_device(place, case)
        cold = torch.cuda.CUDAGraph()
        with pytest.raises(RuntimeError, match="once before"), torch.cuda.graph(cold):
            dispatch(place, buffer, case, x=x, topk_idx=topk_idx)
        torch.cuda.synchronize()
        round_trip(place, buffer, case, mode)
        torch.cuda.synchronize()
        hot = torch.cuda.CUDAGraph()
        with torch.cuda.graph(hot):
            recv_x, _, handle, event, hook = dispatch(
                place, buffer, case, x=x, topk_idx=topk_idx, **options(mode)
            )
            wait(event, hook, mode)
            out, event, hook = combine(
                place,
                buffer,
                case,
                recv_x,
                handle,
                topk_idx=topk_idx,
                topk_weights=weights,
                **options(mode),
            )
            wait(event, hook, mode)
        for seed in range(4):
            other = Case(seed=seed)
            if seed % 2:
                round_trip(place, buffer, other, mode)  # one that is not captured in between
            inputs = zip((x, topk_idx, weights), on_device(place, other), strict=True)
            for tensor, value in inputs:
                tensor.copy_(value)
            hot.replay()
            torch.cuda.synchronize()
            valid = topk_idx.cpu() >= 0
            expected = x.cpu().float() * (weights.cpu() * valid).sum(1, keepdim=True)
            assert torch.equal(out.cpu(), expected.bfloat16())
