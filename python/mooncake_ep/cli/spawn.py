"""Run a function on every rank: in processes started here, or in this one if a launcher made it.

A rank's work is named "module:function"; the function takes a RankContext and returns a dict that
JSON can carry (bytes too). Here is the side of the process that starts the ranks, waits for them
until a deadline, and ends them all as soon as one fails; rank.py is the other side. Between the
two: one JSON line per message, jobs through the rank's standard input, results through a pipe of
their own, error text through standard error.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import wire
from .errors import RankFailedError, UserError
from .progress import Progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator
    from types import FrameType

# How long the other ranks may still report errors of their own after the first one.
_GRACE_S = 1.0
_READ_BYTES = 1 << 20
_SELECT_S_MAX = 3600.0
# The pools of NumPy and torch read these once, at import: with pools, ranks would fight for cores.
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Launch:
    """How many ranks, who starts them, how long they may take, and where they compute."""

    rank_count: int
    by_env: bool
    timeout_s: float
    label: str
    device: str = "cpu"

    @property
    def reports(self) -> bool:
        """Whether this process is the one that prints."""
        return not self.by_env or int(os.environ["RANK"]) == 0

    @property
    def backend_name(self) -> str:
        """The device as its backend calls itself: one over a shim for tests says so."""
        from mooncake_ep import backend_info

        return backend_info(self.device).name


def launch_from(arguments: argparse.Namespace, *, label: str) -> Launch:
    """Decide from the arguments and the environment who starts the ranks."""
    by_env = arguments.launched_by_env or "RANK" in os.environ
    rank_count = arguments.world_size
    if by_env:
        rank_count = _world_size_from_env()
        os.environ.update(_ONE_THREAD)
    if not arguments.timeout > 0:
        raise UserError(f"--timeout {arguments.timeout} is not more than 0 seconds")
    return Launch(
        rank_count=rank_count,
        by_env=by_env,
        timeout_s=arguments.timeout,
        label=label,
        device=getattr(arguments, "device", "cpu"),
    )


def _world_size_from_env() -> int:
    values = {}
    for name in ("RANK", "WORLD_SIZE"):
        text = os.environ.get(name, "")
        if not text.isascii() or not text.isdigit():
            raise UserError(
                f"{name} has to be a whole number to be one rank of a launcher, and is {text!r}"
            )
        values[name] = int(text)
    if values["RANK"] >= values["WORLD_SIZE"]:
        raise UserError(f"RANK {values['RANK']} is not less than WORLD_SIZE {values['WORLD_SIZE']}")
    return values["WORLD_SIZE"]


def run_ranks(target: str, options: dict[str, Any], launch: Launch) -> list[dict[str, Any]]:
    """Run `target` on every rank; returns the results by rank, none where nothing is reported."""
    progress = Progress(launch.label)
    job = {
        "target": target,
        "options": options,
        "timeout_s": launch.timeout_s,
        "device": launch.device,
    }
    try:
        if launch.by_env:
            from .rank import run_as_this_rank

            return run_as_this_rank(job, progress)
        return _Ranks(job, launch, progress).run()
    finally:
        progress.clear()


@dataclass
class _Rank:
    process: subprocess.Popen[bytes]
    results: int
    received: wire.Lines = field(default_factory=wire.Lines)
    error_text: wire.Lines = field(default_factory=wire.Lines)
    result: dict[str, Any] | None = None
    reported_error: bool = False


class _Ranks:
    """The processes of one run."""

    def __init__(self, job: dict[str, Any], launch: Launch, progress: Progress) -> None:
        self._job = job
        self._launch = launch
        self._progress = progress
        self._ranks: list[_Rank] = []
        self._errors: dict[str, list[int]] = {}
        self._user_error = ""
        self._deadline = time.monotonic() + launch.timeout_s

    def run(self) -> list[dict[str, Any]]:
        """Start the ranks, wait for their results, and leave none of them behind."""
        with _termination_as_exit(), selectors.DefaultSelector() as selector:
            try:
                for rank in range(self._launch.rank_count):
                    self._start(rank, selector)
                self._serve(selector)
            finally:
                self._end()
        if self._errors:
            self._raise_errors()
        return [rank.result for rank in self._ranks if rank.result is not None]

    def _start(self, number: int, selector: selectors.BaseSelector) -> None:
        ours, theirs = os.pipe()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "mooncake_ep.cli.rank", str(theirs)],
                stdin=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs,),
                # A session of its own: Ctrl-C reaches this process alone, which ends the ranks.
                start_new_session=True,
                env={**os.environ, **_ONE_THREAD},
            )
        except BaseException:
            os.close(ours)
            raise
        finally:
            os.close(theirs)
        rank = _Rank(process=process, results=ours)
        self._ranks.append(rank)
        assert process.stderr is not None
        selector.register(ours, selectors.EVENT_READ, (number, self._on_result))
        selector.register(process.stderr, selectors.EVENT_READ, (number, self._on_error_text))
        self._send(rank, {**self._job, "rank": number, "rank_count": self._launch.rank_count})

    def _serve(self, selector: selectors.BaseSelector) -> None:
        while selector.get_map():
            remaining_s = self._deadline - time.monotonic()
            if remaining_s <= 0:
                self._on_deadline()
                return
            for key, _ in selector.select(min(remaining_s, _SELECT_S_MAX)):
                number, handler = key.data
                data = os.read(key.fd, _READ_BYTES)
                if not data:
                    selector.unregister(key.fileobj)
                handler(number, data)

    def _on_result(self, number: int, data: bytes) -> None:
        rank = self._ranks[number]
        for line in rank.received.feed(data):
            message = wire.decode(line)
            if "unique_id" in message:
                for other in self._ranks:
                    self._send(other, message)
            elif "progress" in message:
                self._progress.update(*message["progress"])
            elif "result" in message:
                rank.result = message["result"]
            elif "error" in message:
                rank.reported_error = True
                if message["user_error"]:
                    # All ranks got the same arguments, so the first complaint says it all.
                    self._user_error = self._user_error or message["error"]
                self._add_error(number, message["error"])
        if not data and rank.result is None and not rank.reported_error:
            self._add_error(number, self._how_it_ended(rank))

    def _on_error_text(self, number: int, data: bytes) -> None:
        lines = self._ranks[number].error_text.feed(data)
        if lines:
            self._progress.clear()
        for line in lines:
            print(f"rank {number}: {line.decode(errors='replace')}", file=sys.stderr)

    def _how_it_ended(self, rank: _Rank) -> str:
        try:
            status = rank.process.wait(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            return "closed its result pipe without a result"
        if status < 0:
            return f"was killed by {signal.Signals(-status).name}"
        return f"ended without a result, exit status {status}"

    def _on_deadline(self) -> None:
        if not self._errors:
            for number, rank in enumerate(self._ranks):
                if rank.result is None:
                    self._add_error(
                        number, f"did not finish within {self._launch.timeout_s:g} s (--timeout)"
                    )

    def _add_error(self, number: int, text: str) -> None:
        self._errors.setdefault(text, []).append(number)
        self._deadline = min(self._deadline, time.monotonic() + _GRACE_S)

    def _raise_errors(self) -> None:
        if self._user_error:
            raise UserError(self._user_error)
        raise RankFailedError(
            "\n".join(f"{_name(ranks)} {text}" for text, ranks in self._errors.items())
        )

    @staticmethod
    def _send(rank: _Rank, message: dict[str, Any]) -> None:
        assert rank.process.stdin is not None
        # A rank that is gone is noticed where its results are read.
        with contextlib.suppress(BrokenPipeError):
            rank.process.stdin.write(wire.encode(message))
            rank.process.stdin.flush()

    def _end(self) -> None:
        # Closing standard input tells a rank to leave; one without a result is not waited for.
        for rank in self._ranks:
            assert rank.process.stdin is not None and rank.process.stderr is not None
            with contextlib.suppress(BrokenPipeError):
                rank.process.stdin.close()
            if rank.result is None:
                rank.process.kill()
        for rank in self._ranks:
            try:
                rank.process.wait(timeout=_GRACE_S)
            except subprocess.TimeoutExpired:
                rank.process.kill()
                rank.process.wait()
            assert rank.process.stderr is not None
            rank.process.stderr.close()
            os.close(rank.results)


def _name(ranks: list[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, sorted(ranks)))


@contextlib.contextmanager
def _termination_as_exit() -> Iterator[None]:
    # SIGTERM would end this process at once; as an exception it lets the ranks be ended first.
    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
