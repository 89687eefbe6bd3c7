"""The command mooncake-ep: info, topo, demo, smoke and bench.

Exit status: 0 all is well, 1 a check or a rank failed, 2 not with these arguments or here.
Each command is a module with add_parser(); what needs NumPy is imported when a command runs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence

from . import bench, demo, info, smoke, topo
from .errors import CheckFailedError, RankFailedError, UserError

_DESCRIPTION = (
    "Mixture-of-Experts dispatch and combine: look around, try it out, check it, time it."
)
_EPILOG = """\
examples:
  mooncake-ep info                          what is here: version, backends, limits, machine
  mooncake-ep topo                          GPUs, NICs, and how they are linked
  mooncake-ep demo                          a Mixture-of-Experts layer over real text on 4 ranks
  mooncake-ep smoke --world-size 2          check every element of a small round
  mooncake-ep bench --world-size 2          time dispatch and combine

demo, smoke and bench start their own ranks. Under torchrun (RANK is set) each process is one rank:
  torchrun --nproc-per-node 2 -m mooncake_ep smoke
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = _parser().parse_args(argv)
    command: Callable[[argparse.Namespace], int] = arguments.command
    try:
        status = command(arguments)
        sys.stdout.flush()
    except UserError as error:
        return _complain(f"error: {error}", status=2)
    except (CheckFailedError, RankFailedError) as error:
        return _complain(str(error), status=1)
    except KeyboardInterrupt:
        return _complain("interrupted", status=130)
    except BrokenPipeError:
        # The reader has gone (for example `| head`): what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _complain(text: str, *, status: int) -> int:
    sys.stdout.flush()
    print(f"mooncake-ep: {text}", file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mooncake-ep",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for module in (info, topo, demo, smoke, bench):
        module.add_parser(subparsers)
    return parser
