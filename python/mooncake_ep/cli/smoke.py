"""mooncake-ep smoke: a few small rounds on real processes, every element of the results checked."""

from __future__ import annotations

import argparse

from . import sizes as sizes_module
from .errors import CheckFailedError, UserError
from .spawn import launch_from, run_ranks

_FAILURES_SHOWN = 10
_EXAMPLES = """\
examples:
  mooncake-ep smoke
  mooncake-ep smoke --world-size 8 --payload fp8 --weights combine
  mooncake-ep smoke --hash > first; mooncake-ep smoke --hash > second; cmp first second
  mooncake-ep smoke --device cuda --world-size 2
  mooncake-ep smoke --api compat --backend gloo
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command's arguments."""
    parser = subparsers.add_parser(
        "smoke",
        help="check every element of a few small rounds",
        description="Run a few rounds with different token counts and holes, and compare every "
        "element of what dispatch and combine return with an oracle that is written in NumPy.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sizes_module.add_size_arguments(
        parser, world_size=4, tokens=64, hidden=2048, experts=16, topk=2
    )
    sizes_module.add_device_argument(parser)
    sizes_module.add_api_arguments(parser)
    parser.add_argument(
        "--weights",
        choices=("dispatch", "combine"),
        help="the call that is given the top-k weights (default: dispatch; with --api compat it "
        "is combine)",
    )
    parser.add_argument(
        "--hash",
        action="store_true",
        help="print a SHA-256 of each rank's outputs; the same arguments give the same ones, on "
        "every device",
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Run the ranks and report what they found."""
    launch = launch_from(arguments, label="smoke")
    sizes = sizes_module.sizes_from(arguments, rank_count=launch.rank_count)
    control = sizes_module.control_from(arguments)
    if control is not None and arguments.weights == "dispatch":
        raise UserError("--weights dispatch is none of --api compat, which has them in combine")
    weights = arguments.weights or ("dispatch" if control is None else "combine")
    options = {"sizes": sizes.as_options(), "weights": weights, "control": control}
    target = "smoke_rank:run" if control is None else "compat_rank:smoke"
    results = run_ranks(f"mooncake_ep.cli.{target}", options, launch)
    if not launch.reports:
        return 0
    failures = [
        f"rank {rank}: {text}" for rank, result in enumerate(results) for text in result["failures"]
    ]
    if failures:
        raise CheckFailedError(_describe(failures))
    if arguments.hash:
        for rank, result in enumerate(results):
            print(f"hash rank={rank} sha256={result['sha256']}")
    on_device = "" if launch.device == "cpu" else f" device={launch.backend_name}"
    by_api = "" if control is None else f" api=compat backend={control}"
    print(
        f"smoke ok ranks={sizes.rank_count} tokens={sizes.tokens} hidden={sizes.hidden} "
        f"experts={sizes.experts} topk={sizes.topk}" + on_device + by_api
    )
    return 0


def _describe(failures: list[str]) -> str:
    hidden = len(failures) - _FAILURES_SHOWN
    more = [f"... and {hidden} more"] if hidden > 0 else []
    return "\n".join(["smoke failed", *failures[:_FAILURES_SHOWN], *more])
