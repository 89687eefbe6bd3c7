"""A rank under load, for test_update.py and soak.py: round after round, until a plan ends it.

python update_rank.py DIRECTORY RANK PLAN: the files of the directory are the plans, 0 and up:
{"round": the first after it, "active": who takes part from then on, "shape": of the buffer}; the
first of these ranks makes the unique id. If the shape is another, the ranks make another buffer
after they have come together. "ready<RANK>" is there when a process has started what takes long,
and waits for its plan. "progress" has an int64 for each rank: its last round that was right;
"usage" what it takes then: descriptors, KiB of memory, and KiB in use on its GPU. Where ranks
compute says the environment, see devices.py.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import devices
import mooncake_ep as ep

RANKS = 3  # at most
SHAPE = {"max_tokens": 6, "hidden": 64, "experts": 6, "topk": 2}
TIMEOUT_S = 0.3
_USAGE_INTERVAL = 1000  # rounds


def read_plan(directory: Path, number: int) -> Any:
    """Read a plan, if it is there."""
    path = directory / f"plan{number}"
    return json.loads(path.read_text()) if path.exists() else None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that nobody sees half written."""
    path.with_suffix(".new").write_bytes(data)
    path.with_suffix(".new").replace(path)


def progress_of(directory: Path, mode: Any) -> Any:
    """Map the last round of each rank."""
    return np.memmap(directory / "progress", np.int64, mode, shape=(RANKS,))


def usage_of(directory: Path, mode: Any) -> Any:
    """Map what each rank takes: [rank][descriptors, KiB, KiB of all processes on its GPU]."""
    return np.memmap(directory / "usage", np.int64, mode, shape=(RANKS, 3))


def take_usage(rank: int) -> tuple[int, int, int]:
    """Tell what this process takes."""
    descriptors = sum(1 for _ in Path("/proc/self/fd").iterdir())
    peak, on_gpu = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0
    if devices.backend() == "cuda":
        cuda = importlib.import_module("torch.cuda")
        free, total = cuda.mem_get_info(devices.group_options(rank)["device_id"])
        on_gpu = (total - free) // 1024
    return descriptors, peak, on_gpu


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
        """Join by a plan, once it is there."""
        self.directory, self.rank, self.plan = directory, rank, plan
        devices.warm_up(rank)
        write_whole(directory / f"ready{rank}", b"")
        while (told := read_plan(directory, plan)) is None:
            time.sleep(0.001)
        self.active, self.round = told["active"], told["round"]
        self.progress, self.usage = progress_of(directory, "r+"), usage_of(directory, "r+")
        self.group = ep.Group.from_unique_id(
            unique_id(directory, plan, self.active, rank),
            rank=rank,
            rank_count=len(self.active),
            active_ranks=self.active,
            **(devices.group_options(rank) | {"timeout_s": 10}),
        )
        # The others, if there are any, still have the buffer of the plan before.
        before = read_plan(directory, plan - 1) if plan > 0 else told
        self.shape = before["shape"]
        self.buffer = self.make_buffer()
        self.take_shape(told["shape"])

    def make_buffer(self) -> Any:
        """Make a buffer. Collective, with time for all; rounds have less."""
        self.group.timeout_s = 10
        buffer = devices.make_buffer(self.group, threads=1, **self.shape)
        self.group.timeout_s = TIMEOUT_S
        return buffer

    def take_shape(self, shape: dict[str, int]) -> None:
        """Go on with another buffer, if the shape is another."""
        if shape == self.shape:
            return
        self.shape = shape
        self.buffer.close()
        self.buffer = self.make_buffer()

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
                self.take_shape(told["shape"])
            self.do_round()
            if self.round % _USAGE_INTERVAL == 0:
                self.usage[self.rank] = take_usage(self.rank)
            self.progress[self.rank] = self.round
            self.round += 1

    def do_round(self) -> None:
        """Check one round: what comes back is each token, once for each expert that lives."""
        random = np.random.default_rng([self.round, self.rank])
        experts, topk = self.shape["experts"], self.shape["topk"]
        tokens = int(random.integers(self.shape["max_tokens"] + 1))
        x = random.integers(-64, 64, (tokens, self.shape["hidden"])).astype(ml_dtypes.bfloat16)
        choices = np.stack(
            [random.permutation(experts)[:topk] for _ in range(tokens)]
            or [np.zeros(topk, np.int64)]
        )[:tokens]
        weights = np.full((tokens, topk), 1 / topk, np.float32)
        if random.integers(200) == 0:
            time.sleep(0.01)  # late, but not too late
        dispatched = self.hear(lambda: self.buffer.dispatch(x, choices, weights))
        out = self.hear(lambda: self.buffer.combine(dispatched.x, dispatched.handle))
        lives = np.array(self.active)[choices // (experts // len(self.active))].mean(axis=1)
        expected = x.astype(np.float32) * lives[:, None]  # exact in bfloat16
        np.testing.assert_array_equal(out.astype(np.float32), expected)

    def hear(self, call: Any) -> Any:
        """Make a call; who is lost in it is known from then on. On a GPU the call does not say."""
        try:
            result = call()
            if devices.on_cpu():
                return result
        except ep.PeerFailedError as error:
            result = error.result
            assert self.buffer.mask != self.active
        mask = self.buffer.mask
        if mask != self.active:
            lost = [rank for rank, one in enumerate(self.active) if one and not mask[rank]]
            events = self.buffer.events()
            assert [event.peer for event in events] == lost, (events, lost)
            assert all(event.reason == "late" for event in events)
            # Rows are due an eighth of the timeout before it ends.
            assert all(event.waited_s >= TIMEOUT_S * 7 / 8 for event in events)
            self.active = mask
        return result


if __name__ == "__main__":
    Load(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])).live()
