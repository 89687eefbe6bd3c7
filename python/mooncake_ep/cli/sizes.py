"""The sizes and options that demo, smoke and bench share, from the command line to the buffer."""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from .errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mooncake_ep import Buffer, Group

PAYLOADS = ("bf16", "fp16", "fp32", "fp8")
_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Sizes:
    """What all ranks of one run agree on."""

    rank_count: int
    tokens: int
    hidden: int
    experts: int
    topk: int
    payload: str
    seed: int

    @property
    def local_experts(self) -> int:
        """Experts of one rank."""
        return self.experts // self.rank_count

    @property
    def quant(self) -> Literal["fp8"] | None:
        """What dispatch does to the rows before they travel."""
        return "fp8" if self.payload == "fp8" else None

    @property
    def buffer_payloads(self) -> tuple[str, ...]:
        """The payload types of the buffer: FP8 rows start and return as bf16."""
        return ("bf16", "fp8") if self.payload == "fp8" else (self.payload,)

    @property
    def combine_row_bytes(self) -> int:
        """Bytes of one row on its way back."""
        return self.hidden * (4 if self.payload == "fp32" else 2)

    @property
    def dispatch_row_bytes(self) -> int:
        """Bytes of one row on its way to the experts, scales included."""
        return self.hidden + self.hidden // 32 if self.payload == "fp8" else self.combine_row_bytes

    def as_options(self) -> dict[str, Any]:
        """The fields, to be handed to a rank; Sizes(**options) is the way back."""
        return asdict(self)


def count(text: str) -> int:
    """Parse a whole number of at least 1 (an argparse type)."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least 1")
    return number


def counts(text: str) -> list[int]:
    """Parse whole numbers of at least 1 with commas in between, into ascending order."""
    return sorted({count(part) for part in text.split(",")})


def add_size_arguments(parser: argparse.ArgumentParser, **defaults: int) -> None:
    """Add --world-size, --tokens and so on; `defaults` names each of them."""
    meanings = {
        "world_size": "ranks, each of them a process",
        "tokens": "tokens of each rank",
        "hidden": "channels of a token; a multiple of 8 (fp8: of 128)",
        "experts": "experts of all ranks together; a multiple of the world size",
        "topk": "experts of each token",
    }
    for name, meaning in meanings.items():
        parser.add_argument(
            "--" + name.replace("_", "-"),
            type=count,
            default=defaults[name],
            metavar="N",
            help=f"{meaning} (default: %(default)s)",
        )
    parser.add_argument(
        "--payload",
        choices=PAYLOADS,
        default="bf16",
        help="type of the rows (default: %(default)s)",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="N",
        help="of all random numbers (default: %(default)s)",
    )
    add_launch_arguments(parser)


def add_launch_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --timeout and --launched-by-env."""
    parser.add_argument(
        "--timeout",
        type=float,
        default=_TIMEOUT_S,
        metavar="SECONDS",
        help="end the ranks if they need longer than this (default: %(default)s)",
    )
    parser.add_argument(
        "--launched-by-env",
        action="store_true",
        help="be the rank that RANK and WORLD_SIZE name instead of starting ranks; the default if "
        "RANK is set",
    )


def add_device_argument(parser: argparse.ArgumentParser) -> None:
    """Add --device."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda", "maca"),
        default="cpu",
        help="where the ranks compute; GPUs need torch, and go to the ranks in turn "
        "(default: %(default)s)",
    )


def add_api_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --api and --backend."""
    parser.add_argument(
        "--api",
        choices=("native", "compat"),
        default="native",
        help="what is called: this library's own Buffer, or that of mooncake_ep.compat.mooncake "
        "with torch tensors (default: %(default)s)",
    )
    parser.add_argument(
        "--backend",
        choices=("gloo", "nccl", "mccl"),
        help="torch's process group over which --api compat meets (default: gloo on the CPU, nccl "
        "with --device cuda, mccl with --device maca)",
    )


def control_from(arguments: argparse.Namespace) -> str | None:
    """Return the backend of torch's process group, None for the native API; refuse a mixture."""
    if arguments.api == "native":
        if arguments.backend is not None:
            raise UserError(f"--backend {arguments.backend} goes only with --api compat")
        return None
    if importlib.util.find_spec("torch") is None:
        raise UserError("--api compat needs torch: pip install torch")
    if arguments.payload not in ("bf16", "fp8"):
        raise UserError(f"--payload {arguments.payload} is none of --api compat: bf16, fp8")
    control: str = arguments.backend or {"cuda": "nccl", "maca": "mccl"}.get(
        arguments.device, "gloo"
    )
    if control != "gloo" and arguments.device == "cpu":
        raise UserError(f"--backend {control} needs GPUs: --device cuda or maca")
    return control


def sizes_from(arguments: argparse.Namespace, *, rank_count: int) -> Sizes:
    """Collect the sizes, and refuse those that the library would refuse on every rank."""
    require_numpy()
    device = getattr(arguments, "device", "cpu")
    if device != "cpu" and importlib.util.find_spec("torch") is None:
        raise UserError(f"--device {device} needs torch: pip install torch")
    sizes = Sizes(
        rank_count=rank_count,
        tokens=arguments.tokens,
        hidden=arguments.hidden,
        experts=arguments.experts,
        topk=arguments.topk,
        payload=arguments.payload,
        seed=arguments.seed,
    )
    if sizes.topk > sizes.experts:
        raise UserError(
            f"topk {sizes.topk} is more than the {sizes.experts} experts there are to choose from"
        )
    if sizes.seed < 0:
        raise UserError(f"seed {sizes.seed} is negative")
    window_bytes(sizes)
    return sizes


def require_numpy() -> None:
    """Fail with the command that installs what demo, smoke and bench compute with."""
    missing = [name for name in ("numpy", "ml_dtypes") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"this command needs {' and '.join(missing)}: pip install 'mooncake-ep[cli]'"
        )


def window_bytes(sizes: Sizes) -> int:
    """Shared memory of one rank."""
    from mooncake_ep import Buffer

    with library_errors():
        return Buffer.query_sizes(
            rank_count=sizes.rank_count,
            max_tokens=sizes.tokens,
            hidden=sizes.hidden,
            experts=sizes.experts,
            topk=sizes.topk,
            payloads=sizes.buffer_payloads,
        ).window_bytes


def transport_names(group: Group) -> str:
    """Name how this rank reaches its peers: "shm", or "shm+collective" and so on."""
    peers = [peer for peer in range(group.rank_count) if peer != group.rank] or [group.rank]
    return "+".join(sorted({group.transport(peer).name for peer in peers}, reverse=True))


def make_buffer(group: Group, sizes: Sizes, *, threads: int, max_sms: int = 0) -> Buffer:
    """Create the buffer of this rank; `max_sms` limits what a launch fills of a GPU. Collective."""
    from mooncake_ep import Buffer

    limits: dict[str, Any] = {"max_sms": max_sms} if max_sms else {}
    with library_errors():
        return Buffer(
            group,
            max_tokens=sizes.tokens,
            hidden=sizes.hidden,
            experts=sizes.experts,
            topk=sizes.topk,
            payloads=sizes.buffer_payloads,
            threads=threads,
            **limits,
        )


@contextlib.contextmanager
def library_errors() -> Iterator[None]:
    """Turn what the library refuses into an error of the arguments, in the library's words."""
    try:
        yield
    except (ValueError, OverflowError, MemoryError, NotImplementedError) as error:
        raise UserError(str(error)) from error


def counted_by(buffer: Buffer) -> dict[str, Any]:
    """Tell what a buffer has counted: of each peer, and of the local experts."""
    peers = [buffer.peer_counters(peer) for peer in range(buffer.group.rank_count)]
    counters = buffer.counters()
    return {
        "rounds": counters.dispatches_sent + counters.combines_sent,
        "rows_sent": [peer.rows_sent for peer in peers],
        "rows_received": [peer.rows_received for peer in peers],
        "waited_s": [peer.waited_s for peer in peers],
        "expert_rows": buffer.expert_rows(),
    }
