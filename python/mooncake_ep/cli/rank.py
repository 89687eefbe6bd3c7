"""One rank: a process that spawn.py starts, or this one if torchrun or the like started it."""

from __future__ import annotations

import importlib
import os
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import IO, TYPE_CHECKING, Any

from . import wire
from .errors import CheckFailedError, UserError
from .sizes import library_errors

if TYPE_CHECKING:
    from mooncake_ep import Group

    from .progress import Progress

_LENGTH_BYTES = 8
_GATHER_BYTES_MAX = 1 << 20


@dataclass(frozen=True)
class RankContext:
    """What a rank's function works with."""

    group: Group
    options: dict[str, Any]
    show_progress: Callable[[int, int], None]

    def part(self, number: int, part_count: int) -> RankContext:
        """The same rank at one of `part_count` parts of its work, each as long as the others."""

        def show(done: int, total: int) -> None:
            self.show_progress(number * total + done, part_count * total)

        return replace(self, show_progress=show)


def run_as_this_rank(job: dict[str, Any], progress: Progress) -> list[dict[str, Any]]:
    """Run the job as the rank that RANK names; returns all results on rank 0 and none elsewhere."""
    from mooncake_ep import Group

    with library_errors():
        place = _place(job["device"], int(os.environ["RANK"]))
        group = Group.from_env(timeout_s=job["timeout_s"], **place)
    with group:
        show = progress.update if group.rank == 0 else _show_nothing
        result = _function(job)(RankContext(group, job["options"], show))
        lines = _gather(group, wire.encode(result))
        return [wire.decode(line) for line in lines] if group.rank == 0 else []


def main() -> None:
    """Serve the process that started this one: python -m mooncake_ep.cli.rank DESCRIPTOR."""
    with os.fdopen(int(sys.argv[1]), "wb") as results:
        job = _receive()
        message: dict[str, Any]
        try:
            with _join(job, results) as group:
                threading.Thread(target=_end_with_parent, daemon=True).start()
                message = {"result": _function(job)(_context(job, group, results))}
        except UserError as error:
            message = {"error": str(error), "user_error": True}
        except Exception as error:
            message = {"error": _describe(error), "user_error": False}
        _send(results, message)
    # The thread that watches the parent still reads standard input; only this ends it in any case.
    sys.stderr.flush()
    os._exit(0 if "result" in message else 1)


def _join(job: dict[str, Any], results: IO[bytes]) -> Group:
    from mooncake_ep import Group, create_unique_id

    rank, rank_count = job["rank"], job["rank_count"]
    with library_errors():
        place = _place(job["device"], rank)
    if rank_count == 1:
        return Group.single(**place)
    if rank == 0:
        # The process that makes the id listens for the others, and has to be rank 0.
        _send(results, {"unique_id": create_unique_id()})
    unique_id = _receive()["unique_id"]
    with library_errors():
        return Group.from_unique_id(
            unique_id, rank=rank, rank_count=rank_count, timeout_s=job["timeout_s"], **place
        )


def _place(device: str, rank: int) -> dict[str, Any]:
    """Choose backend and device id of a rank: the devices in turn."""
    from mooncake_ep import backend_info

    info = backend_info(device)
    if not info.available:
        raise UserError(f"--device {device}: {info.name} is not available here: {info.reason}")
    return {"backend": device, "device_id": rank % info.device_count}


def _context(job: dict[str, Any], group: Group, results: IO[bytes]) -> RankContext:
    def show(done: int, total: int) -> None:
        _send(results, {"progress": [done, total]})

    return RankContext(group, job["options"], show if group.rank == 0 else _show_nothing)


def _function(job: dict[str, Any]) -> Callable[[RankContext], dict[str, Any]]:
    module, name = job["target"].split(":")
    function: Callable[[RankContext], dict[str, Any]] = getattr(
        importlib.import_module(module), name
    )
    return function


def _gather(group: Group, line: bytes) -> list[bytes]:
    lengths = [
        int.from_bytes(data, "little")
        for data in group.all_gather(len(line).to_bytes(_LENGTH_BYTES, "little"))
    ]
    gathered = [b""] * group.rank_count
    for begin in range(0, max(lengths), _GATHER_BYTES_MAX):
        size = min(_GATHER_BYTES_MAX, max(lengths) - begin)
        parts = group.all_gather(line[begin : begin + size].ljust(size, b"\0"))
        gathered = [gathered[rank] + part for rank, part in enumerate(parts)]
    return [data[: lengths[rank]] for rank, data in enumerate(gathered)]


def _receive() -> dict[str, Any]:
    line = sys.stdin.buffer.readline()
    if not line:
        os._exit(1)
    return wire.decode(line)


def _send(results: IO[bytes], message: dict[str, Any]) -> None:
    results.write(wire.encode(message))
    results.flush()


def _end_with_parent() -> None:
    # Standard input ends when the parent does, however that came about. A rank alone would wait for
    # its peers' deadline.
    while sys.stdin.buffer.read(1):
        pass
    os._exit(1)


def _describe(error: Exception) -> str:
    from mooncake_ep import EpError

    if isinstance(error, (CheckFailedError, EpError)):
        return f"failed: {error}"
    return (
        "failed:\n"
        + "".join(traceback.format_exception(type(error), error, error.__traceback__)).rstrip()
    )


def _show_nothing(_done: int, _total: int) -> None:
    pass


if __name__ == "__main__":
    main()
