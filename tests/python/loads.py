"""Rank processes that do rounds on and on, as plans say; see update_rank.py."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from update_rank import RANKS, SHAPE, progress_of, usage_of, write_whole

_RANK = Path(__file__).with_name("update_rank.py")
_DEADLINE_S = 60  # of a wait for rounds; frameworks are slow to start, too


class Loads:
    """Rank processes under load, and the plans that they follow."""

    def __init__(self, directory: Path, rank_count: int = RANKS) -> None:
        """Begin with no plan."""
        self.directory, self.rank_count = directory, rank_count
        self.progress, self.usage = progress_of(directory, "w+"), usage_of(directory, "w+")
        self.plans = 0
        self.processes: dict[int, subprocess.Popen[bytes]] = {}

    def plan(self, first_round: int, active: list[bool], shape: dict[str, int] = SHAPE) -> None:
        """Say who takes part from a round on, and in what."""
        text = json.dumps({"round": first_round, "active": active, "shape": shape})
        write_whole(self.directory / f"plan{self.plans}", text.encode())
        self.plans += 1

    def start(self, rank: int) -> None:
        """Start a rank that will come by the next plan."""
        (self.directory / f"ready{rank}").unlink(missing_ok=True)
        command = [sys.executable, str(_RANK), str(self.directory), str(rank), str(self.plans)]
        self.processes[rank] = subprocess.Popen(command)

    def await_ready(self, rank: int) -> None:
        """Wait until it has started, and waits for that plan."""
        self._await(lambda: (self.directory / f"ready{rank}").exists(), [rank])

    def ahead(self) -> int:
        """Choose a round that nobody has begun, soon."""
        return int(self.progress.max()) + 50

    def await_round(self, ranks: list[int], number: int) -> None:
        """Wait until these ranks have done it; they must live."""
        self._await(lambda: min(int(self.progress[rank]) for rank in ranks) >= number, ranks)

    def _await(self, condition: Callable[[], bool], ranks: list[int]) -> None:
        end = time.monotonic() + _DEADLINE_S
        while not condition():
            for rank in ranks:
                assert self.processes[rank].poll() is None, f"rank {rank} has ended"
            assert time.monotonic() < end, list(self.progress)
            time.sleep(0.002)

    def kill(self, rank: int) -> None:
        """Kill one, and wait until it is gone."""
        self.processes[rank].kill()
        self.processes[rank].wait()

    def close(self) -> None:
        """End all that still live."""
        for rank in self.processes:
            self.kill(rank)

    def finish(self) -> None:
        """Let all ranks end."""
        self.plan(self.ahead(), [False] * self.rank_count)
        for rank, process in self.processes.items():
            assert process.wait(_DEADLINE_S) == 0, f"rank {rank}"
