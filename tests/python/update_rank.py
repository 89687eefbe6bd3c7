"""A rank under load, for test_update.py: round after round, until the plan says that it is over.

python update_rank.py DIRECTORY RANK FIRST_PLAN: the files of the directory are the plans, 0 and up:
{"round": the first after it, "active": who takes part from then on}; the first of these ranks makes
the unique id. "progress" has an int64 for each rank: its last round that was right.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import mooncake_ep as ep

RANKS, TOKENS, HIDDEN, EXPERTS, TOPK = 3, 6, 64, 6, 2
TIMEOUT_S = 0.3
LOCAL = EXPERTS // RANKS


def read_plan(directory: Path, number: int) -> Any:
    """Read a plan, if it is there."""
    path = directory / f"plan{number}"
    return json.loads(path.read_text()) if path.exists() else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that nobody sees half written."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def unique_id(directory: Path, number: int, active: list[bool], rank: int) -> bytes:
    """Make the id of a plan, or wait for it."""
    path = directory / f"id{number}"
    if rank == active.index(True):
        write_whole(path, ep.create_unique_id())
    while not path.exists():
        time.sleep(0.001)
    return path.read_bytes()


class Load:
    """One rank and its rounds."""

    def __init__(self, directory: Path, rank: int, plan: int) -> None:
        """Join by a plan."""
        self.directory, self.rank, self.plan = directory, rank, plan
        told = read_plan(directory, plan)
        self.active, self.round = told["active"], told["round"]
        self.progress = np.memmap(directory / "progress", np.int64, "r+", shape=(RANKS,))
        self.group = ep.Group.from_unique_id(
            unique_id(directory, plan, self.active, rank),
            rank=rank,
            rank_count=RANKS,
            active_ranks=self.active,
            timeout_s=10,
        )
        self.buffer = ep.Buffer(
            self.group, max_tokens=TOKENS, hidden=HIDDEN, experts=EXPERTS, topk=TOPK, threads=1
        )
        self.group.timeout_s = TIMEOUT_S

    def live(self) -> None:
        """Do rounds until a plan leaves this rank out."""
        while True:
            told = read_plan(self.directory, self.plan + 1)
            if told is not None and told["round"] == self.round:
                self.plan += 1
                self.active = told["active"]
                if not self.active[self.rank]:
                    return
                new = unique_id(self.directory, self.plan, self.active, self.rank)
                self.group.update(self.active, unique_id=new, timeout_s=10)
            self.do_round()
            self.progress[self.rank] = self.round
            self.round += 1

    def do_round(self) -> None:
        """Check one round: what comes back is each token, once for each expert that lives."""
        random = np.random.default_rng([self.round, self.rank])
        x = random.integers(-64, 64, (TOKENS, HIDDEN)).astype(ml_dtypes.bfloat16)
        experts = np.stack([random.permutation(EXPERTS)[:TOPK] for _ in range(TOKENS)])
        weights = np.full((TOKENS, TOPK), 1 / TOPK, np.float32)
        dispatched = self.hear(lambda: self.buffer.dispatch(x, experts, weights))
        out = self.hear(lambda: self.buffer.combine(dispatched.x, dispatched.handle))
        lives = np.array(self.active)[experts // LOCAL].mean(axis=1)
        expected = x.astype(np.float32) * lives[:, None]  # exact in bfloat16
        np.testing.assert_array_equal(out.astype(np.float32), expected)

    def hear(self, call: Any) -> Any:
        """Make a call; who is lost in it is known from then on."""
        try:
            return call()
        except ep.PeerFailedError as error:
            mask, events = self.buffer.mask, self.buffer.events()
            lost = [rank for rank in range(RANKS) if self.active[rank] and not mask[rank]]
            assert [event.peer for event in events] == lost, (events, lost)
            assert all(event.reason == "late" for event in events)
            assert all(event.waited_s >= TIMEOUT_S for event in events)
            self.active = mask
            return error.result


if __name__ == "__main__":
    Load(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).live()
