"""Seconds of each round, on one rank and of the slowest one, and what a table shows of them."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from exchange import Variant


@dataclass(frozen=True)
class Clock:
    """How many calls are timed, after how many that are not, and where."""

    rounds: int
    warmup: int
    device: Any

    def slowest(self, variant: Variant, operation: str) -> list[float]:
        """Seconds of each round on its slowest rank. Collective."""
        call = variant.calls[operation]
        timed = self._on_gpu if self.device.type == "cuda" else self._on_cpu
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, timed(call))
        return [max(times) / variant.round_count for times in zip(*gathered, strict=True)]

    def _on_gpu(self, call: Callable[[], object]) -> list[float]:
        """By events between calls that follow each other: each keeps the ranks in step."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(self.rounds + 1)]
        torch.cuda.synchronize()
        dist.barrier()
        for _ in range(self.warmup):
            call()
        events[0].record()
        for event in events[1:]:
            call()
            event.record()
        torch.cuda.synchronize()
        return [1e-3 * begin.elapsed_time(end) for begin, end in itertools.pairwise(events)]

    def _on_cpu(self, call: Callable[[], object]) -> list[float]:
        times = []
        for _ in range(self.warmup + self.rounds):
            dist.barrier()
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return times[self.warmup :]


def median(times: list[float]) -> float:
    """The middle one, or the mean of the two in the middle."""
    return statistics.median(times)


def percentile_99(times: list[float]) -> float:
    """The smallest time that 99 % of the rounds do not exceed."""
    return sorted(times)[-(-99 * len(times) // 100) - 1]
