"""Rounds for a long time: python soak.py [ROUNDS [SEED]]; 100,000 by default.

Three ranks do random rounds, each checked, while one after the other is killed and replaced, and
the buffer gets another shape. Prints what the ranks take meanwhile, and fails if that grows, if a
round is wrong or lost, or if something is left behind.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path

from loads import Loads
from update_rank import RANKS, SHAPE

_FIRST = 5000  # rounds until what the ranks take is compared
_GROWTH_KIB = 4096  # of a process that lives from then on


def random_shape(draw: random.Random) -> dict[str, int]:
    """Choose a buffer: the largest of the first time is never exceeded."""
    return {
        "max_tokens": draw.randint(1, SHAPE["max_tokens"]),
        "hidden": draw.choice([8, 16, SHAPE["hidden"]]),
        "experts": RANKS * draw.randint(1, SHAPE["experts"] // RANKS),
        "topk": draw.randint(1, SHAPE["topk"]),
    }


def left_behind() -> list[str]:
    """List shared memory with our names."""
    return [path.name for path in Path("/dev/shm").glob("mooncake_ep-*")]


def soak(directory: Path, round_count: int, seed: int) -> None:
    """Do the rounds."""
    draw, loads, began = random.Random(seed), Loads(directory), time.monotonic()
    everybody, shape, kills, born = [True] * RANKS, SHAPE, 0, [0] * RANKS
    baseline: dict[int, tuple[int, int]] = {}
    loads.plan(0, everybody)
    for rank in range(RANKS):
        loads.start(rank)
    try:
        loads.await_round(list(range(RANKS)), 1)
        while (now := int(loads.progress.min())) < round_count:
            lost = draw.randrange(RANKS)
            others = [rank for rank in range(RANKS) if rank != lost]
            loads.kill(lost)
            loads.await_round(others, int(loads.progress.max()) + 1)
            shape = random_shape(draw) if draw.random() < 0.5 else shape
            loads.plan(loads.ahead(), everybody, shape)
            loads.start(lost)
            kills, born[lost] = kills + 1, loads.ahead()
            baseline.pop(lost, None)
            loads.await_round(list(range(RANKS)), now + draw.randint(2000, 4000))
            for rank in range(RANKS):
                usage = tuple(int(one) for one in loads.usage[rank])
                if int(loads.progress[rank]) < born[rank] + _FIRST:
                    continue
                first = baseline.setdefault(rank, usage)
                assert usage[0] <= first[0] + 2 * RANKS, (rank, first, usage)
                assert usage[1] <= first[1] + _GROWTH_KIB, (rank, first, usage)
            print(f"{int(loads.progress.min()):7d} rounds, {kills} killed: {loads.usage.tolist()}")
        loads.finish()
    finally:
        loads.close()
    assert left_behind() == [], left_behind()
    took = time.monotonic() - began
    print(f"ok: {round_count} rounds, {kills} ranks killed and replaced, {took:.0f} s, seed {seed}")


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as folder:
        soak(Path(folder), *(numbers + [100_000, 1][len(numbers) :]))
