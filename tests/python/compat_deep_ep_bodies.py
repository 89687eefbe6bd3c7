"""What the ranks of test_compat_deep_ep.py do."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as distributed

import mooncake_ep as ep
from compat_rank import Case, Place, check_received, on_device, options, wait
from mooncake_ep.compat.deep_ep import Buffer

CASE = Case(hidden=512)
PAYLOADS: dict[str, dict[str, bool]] = {
    "bf16": {"use_fp8": False},
    "bf16, with what is of FP8": {"use_fp8": False, "round_scale": True, "use_ue8m0": True},
    "fp8": {"use_fp8": True},
    "round_scale": {"use_fp8": True, "round_scale": True},
    "ue8m0": {"use_fp8": True, "round_scale": True, "use_ue8m0": True},
}


@contextlib.contextmanager
def buffer_of(place: Place, **arguments: Any) -> Iterator[Buffer]:
    """Make a Buffer in low-latency mode, and destroy it."""
    buffer = Buffer(place.group, low_latency_mode=True, **arguments)
    yield buffer
    buffer.destroy()


def unpacked(recv_x: Any) -> Any:
    """Turn scales that are exponents, four in an int32, into numbers."""
    if not isinstance(recv_x, tuple) or recv_x[1].dtype != torch.int32:
        return recv_x
    values, packed = recv_x
    assert packed.shape == (*values.shape[:2], values.shape[2] // 512)
    assert packed.stride(-2) == 1
    exponents = torch.stack([packed >> 8 * index & 0xFF for index in range(4)], dim=-1)
    scales = torch.exp2(exponents.flatten(2).float() - 127)
    return values, scales.transpose(1, 2).contiguous().transpose(1, 2)


def round_trip(place: Place, buffer: Buffer, case: Case, mode: str, payload: str) -> None:
    """Call as vLLM does, and compare everything."""
    x, topk_idx, weights = on_device(place, case)
    recv_x, count, handle, event, hook = buffer.low_latency_dispatch(
        x, topk_idx, case.max_tokens, case.experts, **PAYLOADS[payload], **options(mode)
    )
    wait(event, hook, mode)
    y = check_received(place, case, (unpacked(recv_x), count, handle))
    output = torch.full_like(x, float("nan"))
    out, event, hook = buffer.low_latency_combine(
        y, topk_idx, weights, handle, zero_copy=False, out=output, **options(mode)
    )
    wait(event, hook, mode)
    assert out.data_ptr() == output.data_ptr()
    assert torch.equal(output.cpu(), case.sums(place.rank))


def rounds(place: Place, mode: str, payload: str, allow_nvlink: bool) -> None:
    with buffer_of(place, allow_nvlink_for_low_latency_mode=allow_nvlink) as buffer:
        for seed in range(2):
            round_trip(place, buffer, Case(hidden=512, seed=seed), mode, payload)


def one_without_nvlink(place: Place, who: int) -> None:
    """Let one rank refuse the memory of peers."""
    with buffer_of(place, allow_nvlink_for_low_latency_mode=place.rank != who) as buffer:
        for payload in ("bf16", "ue8m0"):
            round_trip(place, buffer, CASE, "hook", payload)
            group = buffer._exchange.cores[0].buffer.group
            peers = [peer for peer in range(place.size) if peer != place.rank]
            assert {group.transport(peer).name for peer in peers} == {"collective"}
            buffer.update_ep_member()


def disagree_on_payload(place: Place, one: str, other: str) -> str:
    """Let rank 0 begin with another payload; return the error."""
    x, topk_idx, _ = on_device(place, CASE)
    options = PAYLOADS[other if place.rank else one]
    with buffer_of(place) as buffer:
        with pytest.raises(ep.EpError) as error:
            buffer.low_latency_dispatch(x, topk_idx, CASE.max_tokens, CASE.experts, **options)
        distributed.barrier(place.group)
        round_trip(place, buffer, CASE, "now", one)
        return str(error.value)


def no_scales(place: Place) -> None:
    """Take hidden sizes that FP8 does not, with its switches on."""
    with buffer_of(place) as buffer:
        round_trip(place, buffer, Case(hidden=264), "now", "bf16, with what is of FP8")


def zero_copy(place: Place) -> None:
    x, topk_idx, weights = on_device(place, CASE)
    with buffer_of(place) as buffer:
        given = buffer.low_latency_dispatch(
            x, topk_idx, CASE.max_tokens, CASE.experts, use_fp8=False
        )
        y = check_received(place, CASE, given[:3])
        with pytest.raises(ValueError, match="zero_copy"):
            buffer.low_latency_combine(y, topk_idx, weights, given[2], zero_copy=True)
        buffer.get_next_low_latency_combine_buffer(given[2])[:, :, :] = y
        nothing = torch.zeros_like(y)
        out, _, _ = buffer.low_latency_combine(nothing, topk_idx, weights, given[2], zero_copy=True)
        assert torch.equal(out.cpu(), CASE.sums(place.rank))


def stats(place: Place, mode: str) -> tuple[list[int], list[int]]:
    """Return what was added up in three rounds, and what the counts were."""
    x, topk_idx, _ = on_device(place, CASE)
    local = CASE.experts // place.size
    total = torch.ones(local, dtype=torch.int32, device=place.device)
    counts = torch.ones(local, dtype=torch.int32, device=place.device)
    with buffer_of(place) as buffer:
        for _ in range(3):
            _, count, _, event, hook = buffer.low_latency_dispatch(
                x,
                topk_idx,
                CASE.max_tokens,
                CASE.experts,
                cumulative_local_expert_recv_stats=total,
                **options(mode),
            )
            wait(event, hook, mode)
            counts += count
    return total.tolist(), counts.tolist()


def waits(place: Place) -> list[int]:
    """Let the last rank be late; return how long each was waited for, in microseconds."""
    x, topk_idx, weights = on_device(place, CASE)
    cost = torch.zeros(place.size, dtype=torch.int64, device=place.device)
    with buffer_of(place) as buffer:
        round_trip(place, buffer, CASE, "now", "bf16")
        for _ in range(2):
            distributed.barrier(place.group)
            if place.rank == place.size - 1:
                time.sleep(0.05)
            recv_x, _, handle, _, _ = buffer.low_latency_dispatch(
                x,
                topk_idx,
                CASE.max_tokens,
                CASE.experts,
                use_fp8=False,
                dispatch_wait_recv_cost_stats=cost,
            )
            buffer.low_latency_combine(
                recv_x, topk_idx, weights, handle, combine_wait_recv_cost_stats=cost
            )
    values: list[int] = cost.tolist()
    return values


def masks(place: Place) -> None:
    """Mask the last rank, go on without it, and come together again."""
    last = place.size - 1
    status = torch.full((place.size,), 7, dtype=torch.int32, device=place.device)
    with buffer_of(place) as buffer:
        round_trip(place, buffer, CASE, "now", "bf16")
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * place.size
        if place.rank != last:
            buffer.low_latency_update_mask_buffer(last, True)
            buffer.low_latency_query_mask_buffer(status)
            assert status.tolist() == [0] * last + [1]
            check_without(place, buffer, last)
        buffer.update_ep_member()
        buffer.low_latency_query_mask_buffer(status)
        assert status.tolist() == [0] * place.size
        round_trip(place, buffer, CASE, "hook", "fp8")
        if place.rank != last:
            buffer.low_latency_update_mask_buffer(last, True)
            buffer.low_latency_update_mask_buffer(last)
        buffer.low_latency_update_mask_buffer(0 if place.rank else 1, True)
        buffer.low_latency_clean_mask_buffer()
        round_trip(place, buffer, CASE, "now", "fp8")


def check_without(place: Place, buffer: Buffer, lost: int) -> None:
    """Do a round that one rank takes no part in."""
    x, topk_idx, weights = on_device(place, CASE)
    others = [rank for rank in range(place.size) if rank != lost]
    given = buffer.low_latency_dispatch(x, topk_idx, CASE.max_tokens, CASE.experts, use_fp8=False)
    y = check_received(place, CASE, given[:3], others)
    out, _, _ = buffer.low_latency_combine(y, topk_idx, weights, given[2])
    local = CASE.experts // place.size
    assert torch.equal(out.cpu(), CASE.sums(place.rank, lambda e: e // local != lost))


def lose(place: Place, lost: int, is_warm: bool) -> list[int]:
    """Lose a rank, after a round or before the first; return the mask of the others."""
    buffer = Buffer(place.group, low_latency_mode=True, enable_shrink=True)
    if is_warm:
        round_trip(place, buffer, CASE, "now", "fp8")
    distributed.barrier(place.group)
    buffer.timeout_s = 0.3
    if place.rank == lost:
        os._exit(0)
    for _ in range(2):
        check_without(place, buffer, lost)
    status = torch.zeros(place.size, dtype=torch.int32, device=place.device)
    buffer.low_latency_query_mask_buffer(status)
    buffer.destroy()
    values: list[int] = status.tolist()
    return values


class Communicator:
    """What is asked of an mpi4py communicator, over torch."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def Get_rank(self) -> int:
        return self._place.rank

    def Get_size(self) -> int:
        return self._place.size

    def allgather(self, one: Any) -> list[Any]:
        gathered = [None] * self._place.size
        distributed.all_gather_object(gathered, one, group=self._place.group)
        return gathered


def communicator(place: Place) -> None:
    comm = Communicator(place)
    buffer = Buffer(comm=comm, low_latency_mode=True)
    assert buffer.group is comm
    assert (buffer.rank, buffer.group_size) == (place.rank, place.size)
    round_trip(place, buffer, CASE, "hook", "ue8m0")
    with pytest.raises(ValueError, match="group and comm are both given"):
        Buffer(comm, comm=comm, low_latency_mode=True)
    buffer.destroy()
    buffer.destroy()


def wrong(place: Place, changes: dict[str, Any], hidden: int) -> str:
    """Make a wrong dispatch on all ranks; afterwards all is as before. Returns the error."""
    case = Case(hidden=hidden)
    x, topk_idx, _ = on_device(place, case)
    changes = {
        name: torch.zeros(value[0], dtype=getattr(torch, value[1]), device=place.device)
        if isinstance(value, tuple)
        else value
        for name, value in changes.items()
    }
    with buffer_of(place) as buffer:
        with pytest.raises((ValueError, TypeError)) as error:
            buffer.low_latency_dispatch(x, topk_idx, case.max_tokens, case.experts, **changes)
        round_trip(place, buffer, CASE, "now", "fp8")
        return f"{type(error.value).__name__}: {error.value}"


def invalid_expert(place: Place, value: int) -> str:
    """Name an expert that is none; afterwards all is as before. Returns the error."""
    x, topk_idx, _ = on_device(place, CASE)
    topk_idx[-1, 0] = value
    with buffer_of(place) as buffer:
        with pytest.raises(ValueError) as error:
            buffer.low_latency_dispatch(x, topk_idx, CASE.max_tokens, CASE.experts)
        round_trip(place, buffer, CASE, "now", "fp8")
        return str(error.value)


def small_things(place: Place) -> None:
    """Call what clients call beside dispatch and combine."""
    with buffer_of(place, num_nvl_bytes=1, num_rdma_bytes=2, num_qps_per_rank=3) as buffer:
        assert (buffer.num_nvl_bytes, buffer.num_rdma_bytes) == (1, 2)
        assert buffer.low_latency_mode
        buffer.clean_low_latency_buffer(8, 512, 6)
        buffer.get_local_buffer_tensor(dtype=torch.int8, use_rdma_buffer=True).zero_()
        with pytest.raises(ValueError, match="rank_to_mask"):
            buffer.low_latency_update_mask_buffer(place.size, True)
        with pytest.raises(ValueError, match="which always takes part"):
            buffer.low_latency_update_mask_buffer(place.rank, True)
        with pytest.raises(ValueError, match="mask_status has shape"):
            buffer.low_latency_query_mask_buffer(torch.zeros(9, dtype=torch.int32))
        round_trip(place, buffer, CASE, "now", "fp8")
