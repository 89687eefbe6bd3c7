"""Rounds for a long time: python soak.py [--rounds N] [--seed N] [--ranks N] [--backend cuda].

Ranks do random rounds, each checked, while one after the other is killed and replaced, and the
buffer gets another shape. Prints what the ranks take meanwhile, and fails if that grows, if a round
is wrong or lost, or if something is left behind.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
import time
from pathlib import Path

import devices
from loads import Loads
from update_rank import RANKS, SHAPE

_FIRST = 5000  # rounds until what the ranks take is compared
# What a process may take more from then on: descriptors for each rank, KiB, KiB on its GPU, where
# all memory is counted, in pieces of 2 MiB.
_DESCRIPTORS, _GROWTH_KIB, _GPU_GROWTH_KIB = 2, 4096, 32768


def random_shape(draw: random.Random, rank_count: int) -> dict[str, int]:
    """Choose a buffer: the largest of the first time is never exceeded."""
    return {
        "max_tokens": draw.randint(1, SHAPE["max_tokens"]),
        "hidden": draw.choice([8, 16, SHAPE["hidden"]]),
        "experts": rank_count * draw.randint(1, SHAPE["experts"] // rank_count),
        "topk": draw.randint(1, SHAPE["topk"]),
    }


def left_behind() -> list[str]:
    """List shared memory with our names."""
    return [path.name for path in Path("/dev/shm").glob("mooncake_ep-*")]


class Usage:
    """What ranks took first, for what they take later."""

    def __init__(self, rank_count: int) -> None:
        """Begin with ranks that start now."""
        self.born = [0] * rank_count
        self.first: dict[int, tuple[int, ...]] = {}

    def forget(self, rank: int, born: int) -> None:
        """Begin anew with a rank that is another process from a round on."""
        self.first.pop(rank, None)
        self.born[rank] = born

    def compare(self, loads: Loads) -> None:
        """Compare those that have lived for a while."""
        limits = (_DESCRIPTORS * len(self.born), _GROWTH_KIB, _GPU_GROWTH_KIB)
        for rank, born in enumerate(self.born):
            if int(loads.progress[rank]) < born + _FIRST:
                continue
            usage = tuple(int(one) for one in loads.usage[rank])
            first = self.first.setdefault(rank, usage)
            for now, before, limit in zip(usage, first, limits, strict=True):
                assert now <= before + limit, (rank, first, usage)


def soak(directory: Path, round_count: int, seed: int, rank_count: int) -> None:
    """Do the rounds."""
    draw, loads, began = random.Random(seed), Loads(directory, rank_count), time.monotonic()
    everybody, ranks, shape, kills = [True] * rank_count, list(range(rank_count)), SHAPE, 0
    usage = Usage(rank_count)
    try:
        for rank in ranks:
            loads.start(rank)
        for rank in ranks:
            loads.await_ready(rank)
        loads.plan(0, everybody)
        loads.await_round(ranks, 1)
        while (now := int(loads.progress.max())) < round_count:
            lost = draw.choice(ranks)
            others = [rank for rank in ranks if rank != lost]
            loads.kill(lost)
            loads.await_round(others, int(loads.progress.max()) + 1)
            shape = random_shape(draw, rank_count) if draw.random() < 0.5 else shape
            loads.start(lost)
            loads.await_ready(lost)
            loads.plan(loads.ahead(), everybody, shape)
            usage.forget(lost, loads.ahead())
            kills += 1
            loads.await_round(ranks, max(loads.ahead(), now + draw.randint(2000, 4000)))
            usage.compare(loads)
            taken = loads.usage[:rank_count].tolist()
            print(f"{int(loads.progress.max()):7d} rounds, {kills} killed: {taken}", flush=True)
        loads.finish()
    finally:
        loads.close()
    left = set(left_behind())
    time.sleep(1)  # other programs may use the library too: only a name that stays was left behind
    left &= set(left_behind())
    assert not left, left
    took = time.monotonic() - began
    print(f"ok: {round_count} rounds, {kills} ranks killed and replaced, {took:.0f} s, seed {seed}")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=RANKS, choices=range(1, RANKS + 1))
    parser.add_argument("--backend", choices=devices.BACKENDS, default="cpu")
    return parser.parse_args()


if __name__ == "__main__":
    options = parse()
    os.environ[devices.VARIABLE] = options.backend
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), options.rounds, options.seed, options.ranks)
