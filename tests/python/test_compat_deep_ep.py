"""mooncake_ep.compat.deep_ep, by what docs/compat_deep_ep.md and its docstrings promise.

How it runs on GPUs, and over NCCL: compat_rank.py.
"""

from __future__ import annotations

import importlib
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import compat_deep_ep_bodies as bodies  # noqa: E402
import compat_rank  # noqa: E402
import mooncake_ep as ep  # noqa: E402
from compat_rank import Team  # noqa: E402
from mooncake_ep.compat import (  # noqa: E402
    deep_ep,
    enter_alias,
    install_alias,
    leave_alias,
    remove_alias,
)
from mooncake_ep.compat.deep_ep import Buffer, Config  # noqa: E402

MODES = ["now", "async", "hook"]


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Lend ranks, which stay for all tests."""
    compat_rank.prepare()
    with Team(compat_rank.RANKS) as ranks:
        yield ranks


@pytest.mark.parametrize("size", sorted({2, compat_rank.RANKS}))
@pytest.mark.parametrize("payload", bodies.PAYLOADS)
@pytest.mark.parametrize("mode", MODES)
def test_a_round_gives_each_row_in_order_and_the_exact_sums(
    team: Team, mode: str, payload: str, size: int
) -> None:
    team.run(bodies.rounds, mode, payload, True, size=size)


@pytest.mark.parametrize("payload", ["bf16", "ue8m0"])
def test_the_same_without_the_memory_of_peers(team: Team, payload: str) -> None:
    team.run(bodies.rounds, "hook", payload, False)


def test_one_rank_that_reaches_no_memory_decides_for_all(team: Team) -> None:
    team.run(bodies.one_without_nvlink, 0)


@pytest.mark.parametrize(("one", "other"), [("bf16", "fp8"), ("round_scale", "fp8")])
def test_ranks_that_begin_with_different_payloads_are_told(
    team: Team, one: str, other: str
) -> None:
    for error in team.run(bodies.disagree_on_payload, one, other):
        assert error.startswith("ranks have called with different arguments")
        assert "use_fp8=True" in error


def test_switches_of_fp8_mean_nothing_to_bfloat16(team: Team) -> None:
    team.run(bodies.no_scales)


def test_zero_copy_takes_what_was_written_to_the_combine_buffer(team: Team) -> None:
    team.run(bodies.zero_copy)


@pytest.mark.parametrize("mode", MODES)
def test_received_rows_are_added_up_for_each_expert(team: Team, mode: str) -> None:
    for total, counts in team.run(bodies.stats, mode):
        assert total == counts
        assert sum(total) > len(total)


def test_time_waited_is_told_of_the_rank_that_was_late(team: Team) -> None:
    costs = team.run(bodies.waits)
    for rank, cost in enumerate(costs[:-1]):
        assert cost[rank] == 0
        assert cost[-1] > 10_000


def test_ranks_are_masked_by_hand_and_come_together_again(team: Team) -> None:
    if team.size < 3:
        pytest.skip("it needs three ranks, and NCCL takes one for each GPU")
    team.run(bodies.masks)


@pytest.mark.parametrize("is_warm", [True, False])
def test_a_lost_rank_is_masked(team: Team, is_warm: bool) -> None:
    with Team(team.size) as ranks:
        told = ranks.run(bodies.lose, 1, is_warm, dying=[1])
    mask = [int(rank == 1) for rank in range(team.size)]
    assert told == [None if rank == 1 else mask for rank in range(team.size)]


def test_ranks_meet_over_a_communicator(team: Team) -> None:
    team.run(bodies.communicator)


def test_what_clients_call_besides_is_there(team: Team) -> None:
    team.run(bodies.small_things)


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"use_ue8m0": True}, 512, "ValueError: use_ue8m0 is True"),
    (
        {"use_ue8m0": True, "round_scale": True},
        384,
        "ValueError: x: hidden 384 is not a multiple of 512 with use_ue8m0",
    ),
    ({}, 264, "ValueError: x: hidden 264 is not a multiple of 128 with use_fp8"),
    (
        {"cumulative_local_expert_recv_stats": ((4,), "int32")},
        512,
        "ValueError: cumulative_local_expert_recv_stats has shape [4], not [3]",
    ),
    (
        {"dispatch_wait_recv_cost_stats": ((2,), "int32")},
        512,
        "ValueError: dispatch_wait_recv_cost_stats is int32, not int64",
    ),
    ({"async_finish": True, "return_recv_hook": True}, 512, "ValueError: async_finish and"),
]


@pytest.mark.parametrize(("changes", "hidden", "message"), WRONG, ids=[one[2] for one in WRONG])
def test_a_wrong_argument_is_named_and_changes_nothing(
    team: Team, changes: dict[str, Any], hidden: int, message: str
) -> None:
    for error in team.run(bodies.wrong, changes, hidden, size=2):
        assert error.startswith(message), error


@pytest.mark.skipif(compat_rank.DEVICE != "cpu", reason="on GPUs they are left out and counted")
def test_an_expert_that_is_none_is_an_error_on_the_cpu(team: Team) -> None:
    message = "topk_idx has expert -2, which is not in [-1, 6)"
    assert team.run(bodies.invalid_expert, -2) == [message] * team.size


def test_normal_mode_is_refused_at_once() -> None:
    with pytest.raises(NotImplementedError, match="low_latency_mode is False"):
        Buffer(None, 1 << 30)
    with pytest.raises(ValueError, match="num_rdma_bytes -1 is less than 0"):
        Buffer(None, num_rdma_bytes=-1, low_latency_mode=True)


def test_parameters_have_the_names_that_clients_look_for() -> None:
    given = inspect.signature(Buffer.low_latency_dispatch).parameters
    assert list(given)[1:] == [
        "x",
        "topk_idx",
        "num_max_dispatch_tokens_per_rank",
        "num_experts",
        "cumulative_local_expert_recv_stats",
        "dispatch_wait_recv_cost_stats",
        "use_fp8",
        "round_scale",
        "use_ue8m0",
        "async_finish",
        "return_recv_hook",
    ]
    assert given["use_fp8"].default is True
    assert list(inspect.signature(Buffer.low_latency_combine).parameters)[1:] == [
        "x",
        "topk_idx",
        "topk_weights",
        "handle",
        "use_logfmt",
        "zero_copy",
        "async_finish",
        "return_recv_hook",
        "out",
        "combine_wait_recv_cost_stats",
    ]


def test_the_size_hint_is_what_the_core_takes() -> None:
    sizes = ep.Buffer.query_sizes(rank_count=2, max_tokens=128, hidden=7168, experts=256, topk=8)
    assert Buffer.get_low_latency_rdma_size_hint(128, 7168, 2, 256) == sizes.window_bytes


# vLLM's and SGLang's, of DeepEP 1 and 2.
IMPORT_LINES = [
    "from deep_ep import Buffer, Config",
    "from deep_ep.buffer import Buffer, Config",
    "from deep_ep.buffers.legacy import Buffer",
    "from deep_ep.utils import EventHandle, EventOverlap",
    "import deep_ep.buffers.legacy; deep_ep.buffers.legacy.Buffer; deep_ep.utils.EventOverlap",
    "import deep_ep\nclass Prepare:\n    def config(self) -> deep_ep.Config | None: ...",
]


def test_normal_mode_is_configured_and_not_done() -> None:
    for config in (Buffer.get_dispatch_config(16), Buffer.get_combine_config(16), Config()):
        assert (config.num_sms, config.num_max_nvl_chunked_recv_tokens) == (20, 256)
        assert config.get_nvl_buffer_size_hint(14336, 16) == 0
        assert config.get_rdma_buffer_size_hint(hidden_bytes=14336, num_ranks=16) == 0
    given = Config(24, 8, 512, num_max_rdma_chunked_send_tokens=9)
    assert (given.num_sms, given.num_max_nvl_chunked_send_tokens) == (24, 8)
    assert given.num_max_rdma_chunked_send_tokens == 9
    with pytest.raises(TypeError, match="num_sms is a str"):
        Config("20")  # type: ignore[arg-type]
    buffer = object.__new__(Buffer)
    for call in (
        lambda: buffer.get_dispatch_layout(None, 8),
        lambda: buffer.dispatch(None, topk_idx=None, config=given),
        lambda: buffer.combine(None, None),
    ):
        with pytest.raises(NotImplementedError, match="normal mode, which is not here: use low_"):
            call()
    assert "expert_alignment" in inspect.signature(Buffer.dispatch).parameters


def test_the_number_of_sms_is_kept_for_all_buffers() -> None:
    before = Buffer.num_sms
    try:
        Buffer.set_num_sms(24)
        assert Buffer.num_sms == Buffer.get_dispatch_config(8).num_sms == 24
    finally:
        Buffer.set_num_sms(before)


def test_an_installed_alias_has_the_same_import_lines(tmp_path: Path) -> None:
    place = install_alias("deep_ep", str(tmp_path))
    code = "\n".join(IMPORT_LINES)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=environment)
    assert remove_alias("deep_ep", str(tmp_path))
    assert not place.exists()


def test_the_import_lines_of_clients_find_it_by_an_alias() -> None:
    enter_alias("deep_ep")
    try:
        package = importlib.import_module("deep_ep")
        utils = importlib.import_module("deep_ep.utils")
        assert package.Buffer is Buffer
        assert package.topk_idx_t == torch.int64
        assert utils.EventOverlap is package.EventOverlap is deep_ep.EventOverlap
        assert utils.EventHandle is deep_ep.EventHandle
        for line in IMPORT_LINES:
            exec(line, {})
    finally:
        leave_alias("deep_ep")
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("deep_ep.utils")
