"""A rank that is a program of its own, and rounds that every rank can do.

``python fallback_rank.py env|mpi`` joins by the environment or as a rank of MPI, does the rounds,
and prints a Report in JSON. With MOONCAKE_EP_DISABLE_P2P=1 in the environment, or --disable-p2p, no
rank reaches another's memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import sys
from typing import Any

import ml_dtypes
import numpy as np

import mooncake_ep as ep
from model import routing

BF16 = np.dtype(ml_dtypes.bfloat16)
HIDDEN = 256
EXPERTS = 12  # a multiple of 2, 3 and 4 ranks
TOPK = 3
SHAPE: dict[str, Any] = {"max_tokens": 8, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK}
ROUNDS = 12
_TIMEOUT_S = 20.0
_GROUP = 128  # channels that share a scale


@dataclasses.dataclass
class Report:
    """How a rank has reached each peer, and a digest of all that it has received."""

    rank: int
    transports: list[str]
    digest: str


@dataclasses.dataclass
class Inputs:
    """What one rank gives to one round."""

    x: np.ndarray
    topk_idx: np.ndarray
    topk_weights: np.ndarray


def inputs(rank: int, *seed: int) -> Inputs:
    """Make up to 8 tokens, of which some have fewer experts, or none."""
    rng = np.random.default_rng((*seed, rank))
    tokens = int(rng.integers(0, SHAPE["max_tokens"] + 1))
    topk_idx = routing(rng, tokens, EXPERTS, TOPK)
    topk_idx[rng.random((tokens, TOPK)) < 0.2] = -1
    x = rng.standard_normal((tokens, HIDDEN)).astype(BF16)
    return Inputs(x, topk_idx, rng.random((tokens, TOPK), dtype=np.float32))


def send(
    buffer: ep.Buffer, given: Inputs, kind: int, handle: ep.Handle | None = None
) -> ep.PendingDispatch:
    """Send a dispatch: of bf16, of FP8, of both with weights, in turn."""
    return buffer.dispatch(
        given.x,
        given.topk_idx,
        None if kind % 2 else given.topk_weights,
        quant=(None, None, "fp8", "fp8_pow2")[kind % 4],
        handle=handle,
        send_only=True,
    )


def expert_outputs(received: ep.Dispatched) -> np.ndarray:
    """Scale each expert's valid rows by another factor, and leave the rest what it is not."""
    y = np.full(received.x.shape, np.nan, BF16)
    for expert, count in enumerate(received.count):
        rows = received.x[expert, :count].astype(np.float32)
        if received.scales is not None:
            rows *= np.repeat(received.scales[expert, :count], _GROUP, axis=1)
        y[expert, :count] = (rows * (1 + 0.3 * expert)).astype(BF16)
    return y


def send_back(
    buffer: ep.Buffer, received: ep.Dispatched, given: Inputs, kind: int
) -> ep.PendingCombine:
    """Send a combine, with weights if the dispatch had none."""
    weights = given.topk_weights if kind % 2 else None
    pending: ep.PendingCombine = buffer.combine(
        expert_outputs(received), received, weights, send_only=True
    )
    return pending


def content(received: ep.Dispatched) -> bytes:
    """Return all of what was received that counts."""
    parts = [received.count.tobytes()]
    assert received.src_info is not None
    assert received.layout_range is not None
    for expert, count in enumerate(received.count):
        parts += [received.x[expert, :count].tobytes(), received.src_info[expert, :count].tobytes()]
        if received.scales is not None:
            parts.append(received.scales[expert, :count].tobytes())
    # Where a source's rows begin means nothing if it has none.
    ranges = np.where(received.layout_range & 0xFFFFFFFF, received.layout_range, 0)
    return b"".join([*parts, ranges.tobytes()])


def digest_of_rounds(group: ep.Group, seed: int = 0) -> str:
    """Do rounds of all kinds, and return a digest of all that this rank has received."""
    digest = hashlib.sha256()
    with ep.Buffer(group, **SHAPE) as buffer:
        for number in range(ROUNDS):
            given = inputs(group.rank, seed, number)
            received = send(buffer, given, number).receive()
            digest.update(content(received))
            digest.update(send_back(buffer, received, given, number).receive().tobytes())
    return digest.hexdigest()


def names(group: ep.Group) -> list[str]:
    """Return by which transport each peer is reached."""
    return [group.transport(peer).name for peer in range(group.size)]


def report(group: ep.Group, seed: int = 0) -> Report:
    """Do rounds of all kinds."""
    return Report(group.rank, names(group), digest_of_rounds(group, seed))


def _main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("rendezvous", choices=("env", "mpi"))
    parser.add_argument("--disable-p2p", action="store_true")
    options = parser.parse_args()
    if options.rendezvous == "mpi":
        comm = importlib.import_module("mpi4py.MPI").COMM_WORLD
        joined = ep.Group.from_mpi(comm, timeout_s=_TIMEOUT_S, disable_p2p=options.disable_p2p)
    else:
        joined = ep.Group.from_env(timeout_s=_TIMEOUT_S, disable_p2p=options.disable_p2p)
    with joined as group:
        # In one piece: mpiexec mixes what its ranks write.
        sys.stdout.write(json.dumps(dataclasses.asdict(report(group))) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
