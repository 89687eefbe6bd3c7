"""benchmarks/peers on GPUs: every contestant that is here gives our results and gets its rows."""

from __future__ import annotations

import pytest

import mooncake_ep as ep
from test_peers import check_table, run_compare

_INFO = ep.backend_info("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _INFO.available, reason=f"no CUDA backend: {_INFO.reason}"),
    pytest.mark.skipif(_INFO.device_count < 2, reason="NCCL needs a GPU for each of two ranks"),
]

_OURS = ("ours", "ours, in a graph")
_NCCL = ("nccl", "nccl, bare all-to-all", "nccl, bare, all choices")
_SHAPE = ("--hidden", "2048", "--experts", "16", "--topk", "4", "--rounds", "10")


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("tokens", ["1", "64"])
def test_nccl_gives_what_we_give(payload: str, tokens: str) -> None:
    arguments = (*_SHAPE, "--tokens", tokens, "--payload", payload, "--peers", "nccl")
    done = run_compare(*arguments, device="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    check_table(done.stdout, (*_OURS, *_NCCL), bases=_OURS)


def test_mooncake_gives_what_we_give_or_says_why_not() -> None:
    done = run_compare(*_SHAPE, "--tokens", "64", "--peers", "mooncake", device="cuda")
    assert done.returncode == 0, done.stdout + done.stderr
    reasons = [line for line in done.stdout.splitlines() if line.startswith("mooncake: skipped")]
    if reasons:
        pytest.skip(reasons[0])
    fallback = "mooncake, in its fallback"
    name = fallback if fallback in done.stdout else "mooncake"
    check_table(done.stdout, (*_OURS, name), bases=_OURS)
