"""mooncake_ep.compat.mooncake, by what docs/compat_mooncake.md and its docstrings promise.

Ranks are processes over a torch.distributed group; compat_rank.py says how the same tests run on
GPUs, and over NCCL.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import compat_mooncake_bodies as bodies  # noqa: E402
import compat_rank  # noqa: E402
import mooncake_ep as ep  # noqa: E402
from compat_mooncake_bodies import Zeros  # noqa: E402
from compat_rank import NEVER, Case, Team  # noqa: E402
from mooncake_ep.compat import enter_alias, leave_alias, mooncake  # noqa: E402
from mooncake_ep.compat.mooncake import Buffer, EventHandle, EventOverlap  # noqa: E402

SIZES = sorted({2, compat_rank.RANKS})
MODES = ["now", "async", "hook"]
PROGRAM = Path(__file__).with_name("compat_program.py")


@pytest.fixture(scope="module")
def team() -> Iterator[Team]:
    """Lend ranks, which stay for all tests."""
    compat_rank.prepare()
    with Team(compat_rank.RANKS) as ranks:
        yield ranks


# ---- Rounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("disable_p2p", [False, True])
@pytest.mark.parametrize("use_fp8", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_a_round_gives_each_row_in_order_and_the_exact_sums(
    team: Team, mode: str, use_fp8: bool, disable_p2p: bool, size: int
) -> None:
    told = team.run(bodies.all_modes, mode, use_fp8, disable_p2p, size=size)
    assert told == [(disable_p2p, not disable_p2p)] * size


@pytest.mark.parametrize("disable_p2p", [False, True])
def test_the_fallback_may_be_switched_on_and_off(team: Team, disable_p2p: bool) -> None:
    for ways in team.run(bodies.switch_fallback, disable_p2p):
        assert ways[0] == ways[2] == ["collective"]
        assert (ways[1] == ["collective"]) == disable_p2p


@pytest.mark.parametrize("who", [0, 1])
def test_one_rank_that_reaches_no_memory_decides_for_all(team: Team, who: int) -> None:
    assert team.run(bodies.one_without_p2p, who) == [[(False, False, True)] * 2] * team.size


def test_a_new_rank_that_reaches_no_memory_decides_for_all(team: Team) -> None:
    with Team(team.size) as ranks:
        ranks.run(bodies.keep, False)
        ranks.run(bodies.lose, 1, "dispatch", "now", True, dying=[1])
        ranks.replace(1)
        ranks.meet()
        assert ranks.run(bodies.new_without_p2p, 1) == [(False, False)] * team.size


def test_calls_by_position_are_those_of_clients(team: Team) -> None:
    team.run(bodies.positional)


@pytest.mark.parametrize("mode", MODES)
def test_zero_copy_takes_what_was_written_to_the_combine_buffer(team: Team, mode: str) -> None:
    team.run(bodies.zero_copy, mode)


@pytest.mark.parametrize("dispatches", [[0, 1], [1, 0]])
@pytest.mark.parametrize("combines", [[0, 1], [1, 0]])
def test_two_batches_are_in_flight_and_hooks_run_in_any_order(
    team: Team, dispatches: list[int], combines: list[int]
) -> None:
    team.run(bodies.two_in_flight, dispatches, combines)


def test_a_batch_dispatches_while_another_combines(team: Team) -> None:
    team.run(bodies.interleaved, size=2)


def test_a_third_dispatch_in_flight_is_refused(team: Team) -> None:
    for error in team.run(bodies.three_in_flight, size=2):
        assert "still in flight" in error


def test_a_hook_runs_in_another_thread_and_again(team: Team) -> None:
    team.run(bodies.hooks_of_other_threads, size=2)


def test_a_hook_that_is_dropped_leaves_the_buffer_usable(team: Team) -> None:
    team.run(bodies.dropped_hooks)


def test_a_handle_is_a_tuple_that_may_be_taken_apart(team: Team) -> None:
    team.run(bodies.handles, size=2)


def test_ranks_may_have_no_tokens(team: Team) -> None:
    team.run(bodies.no_tokens)


def test_one_buffer_serves_all_shapes(team: Team) -> None:
    team.run(bodies.shapes)


def test_an_expert_named_twice_gets_the_token_once_and_the_weights_add_up(team: Team) -> None:
    assert sum(team.run(bodies.repeated)) == sum(compat_rank.Case().tokens[: team.size])


def test_another_topk_takes_no_more_memory(team: Team) -> None:
    assert team.run(bodies.memory) == [1] * team.size


def test_a_mask_may_be_larger_than_the_group(team: Team) -> None:
    assert team.run(bodies.larger_mask) == [[1] * team.size + [7] * 4] * team.size


def test_fp8_is_the_default_on_nvidia_gpus_only(team: Team) -> None:
    default = compat_rank.DEVICE == "cuda" and not getattr(torch.version, "maca", None)
    assert team.run(bodies.default_payload) == [default] * team.size


# ---- Errors --------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any], str]] = [
    ("dispatch", {"x": [1.0]}, "TypeError: x is a list"),
    (
        "dispatch",
        {
            "x": Zeros(
                (
                    5,
                    256,
                ),
                "float32",
            )
        },
        "ValueError: x is float32, not bfloat16",
    ),
    ("dispatch", {"x": Zeros((256,), "bfloat16")}, "ValueError: x has shape [256]"),
    (
        "dispatch",
        {
            "x": Zeros(
                (
                    9,
                    256,
                ),
                "bfloat16",
            )
        },
        "ValueError: x has 9 tokens, more than num_max_dispatch_tokens_per_rank 8",
    ),
    (
        "dispatch",
        {
            "x": Zeros(
                (
                    5,
                    260,
                ),
                "bfloat16",
            )
        },
        "ValueError: x: hidden 260 is not a multiple of 8",
    ),
    (
        "dispatch",
        {
            "x": Zeros(
                (
                    5,
                    264,
                ),
                "bfloat16",
            ),
            "use_fp8": True,
        },
        "ValueError: x: hidden 264 is not a multiple of 128 with use_fp8",
    ),
    ("dispatch", {"topk_idx": None}, "TypeError: topk_idx is a NoneType"),
    (
        "dispatch",
        {
            "topk_idx": Zeros(
                (
                    5,
                    2,
                ),
                "float32",
            )
        },
        "ValueError: topk_idx is float32, not int32 or int64",
    ),
    (
        "dispatch",
        {
            "topk_idx": Zeros(
                (
                    1,
                    2,
                ),
                "int64",
            )
        },
        "ValueError: topk_idx has shape [1, 2]",
    ),
    ("dispatch", {"num_experts": 7}, "ValueError: num_experts 7 is not a multiple of the 2 ranks"),
    ("dispatch", {"num_experts": 0}, "ValueError: num_experts 0 is less than 1"),
    (
        "dispatch",
        {"num_max_dispatch_tokens_per_rank": -1},
        "ValueError: num_max_dispatch_tokens_per_rank -1 is less than 1",
    ),
    (
        "dispatch",
        {"num_max_dispatch_tokens_per_rank": "8"},
        "TypeError: num_max_dispatch_tokens_per_rank is a str, not an integer",
    ),
    ("dispatch", {"timeout_us": 0}, "ValueError: timeout_us 0"),
    ("dispatch", {"timeout_us": -2}, "ValueError: timeout_us -2"),
    ("dispatch", {"timeout_us": 0.5}, "TypeError: timeout_us is a float"),
    (
        "dispatch",
        {"active_ranks": Zeros((1,), "int32")},
        "ValueError: active_ranks has 1 elements, fewer than 2 ranks",
    ),
    (
        "dispatch",
        {"active_ranks": Zeros((2,), "int64")},
        "ValueError: active_ranks is int64, not int32",
    ),
    ("dispatch", {"async_finish": True, "return_recv_hook": True}, "ValueError: async_finish and"),
    ("combine", {"async_finish": True, "return_recv_hook": True}, "ValueError: async_finish and"),
    (
        "combine",
        {
            "x": Zeros(
                (
                    3,
                    16,
                    256,
                ),
                "float32",
            )
        },
        "ValueError: x is float32, not bfloat16",
    ),
    (
        "combine",
        {
            "x": Zeros(
                (
                    3,
                    15,
                    256,
                ),
                "bfloat16",
            )
        },
        "ValueError: x has shape [3, 15, 256]",
    ),
    ("combine", {"topk_weights": None}, "TypeError: topk_weights is a NoneType"),
    (
        "combine",
        {
            "topk_weights": Zeros(
                (
                    1,
                    2,
                ),
                "float32",
            )
        },
        "ValueError: topk_weights has shape [1, 2]",
    ),
    (
        "combine",
        {"topk_idx": Zeros((5, 1), "int64")},
        "ValueError: topk_idx has shape [5, 1]",
    ),
    ("combine", {"timeout_us": 0}, "ValueError: timeout_us 0"),
    (
        "combine",
        {
            "out": Zeros(
                (
                    1,
                    256,
                ),
                "bfloat16",
            )
        },
        "ValueError: out has shape [1, 256]",
    ),
    ("combine", {"handle": None}, "TypeError: handle is a NoneType"),
]


@pytest.mark.parametrize(("function", "changes", "message"), WRONG, ids=[one[2] for one in WRONG])
def test_a_wrong_argument_is_named_and_changes_nothing(
    team: Team, function: str, changes: dict[str, Any], message: str
) -> None:
    for error in team.run(bodies.wrong, function, changes, size=2):
        assert error.startswith(message), error


@pytest.mark.parametrize("value", [6, -2, 1 << 40])
def test_an_expert_that_is_none_is_an_error_on_the_cpu_and_left_out_on_gpus(
    team: Team, value: int
) -> None:
    on_cpu = compat_rank.DEVICE == "cpu"
    message = f"topk_idx has expert {value}, which is not in [-1, 6)" if on_cpu else None
    assert team.run(bodies.invalid_experts, value) == [message] * team.size


def test_a_buffer_is_made_of_sensible_arguments_only() -> None:
    with pytest.raises(ValueError, match="num_ep_buffer_bytes -1 is less than 0"):
        Buffer(None, -1)
    with pytest.raises(TypeError, match="disable_p2p is a int, not a bool"):
        Buffer(None, 0, 1)  # type: ignore[arg-type]


def test_after_destroy_calls_say_so(team: Team) -> None:
    for errors in team.run(bodies.destroyed, size=2):
        assert all("destroy" in error for error in errors), errors


# ---- What clients look at ------------------------------------------------------------------------


def test_parameters_have_the_names_that_clients_look_for() -> None:
    def names(function: Callable[..., Any]) -> list[str]:
        return [name for name in inspect.signature(function).parameters if name != "self"]

    assert names(Buffer) == ["group", "num_ep_buffer_bytes", "disable_p2p"]
    assert names(Buffer.dispatch) == [
        "x",
        "topk_idx",
        "active_ranks",
        "num_max_dispatch_tokens_per_rank",
        "num_experts",
        "timeout_us",
        "use_fp8",
        "async_finish",
        "return_recv_hook",
    ]
    assert names(Buffer.combine) == [
        "x",
        "topk_idx",
        "topk_weights",
        "active_ranks",
        "timeout_us",
        "handle",
        "zero_copy",
        "async_finish",
        "return_recv_hook",
        "out",
    ]
    assert names(Buffer.get_next_combine_buffer) == ["handle"]


def test_the_size_hint_is_what_the_core_takes() -> None:
    sizes = ep.Buffer.query_sizes(rank_count=2, max_tokens=128, hidden=7168, experts=256, topk=8)
    assert Buffer.get_ep_buffer_size_hint(128, 7168, 2, 256) == sizes.window_bytes
    with pytest.raises(ValueError, match="num_experts 255 is not a multiple of the 2 ranks"):
        Buffer.get_ep_buffer_size_hint(128, 7168, 2, 255)
    with pytest.raises(ValueError, match="hidden"):
        Buffer.get_ep_buffer_size_hint(128, 7167, 2, 256)


@pytest.fixture(scope="session")
def cuda_has_begun() -> None:
    """Let CUDA open its descriptors, which nobody closes, before a test counts them."""
    if torch.cuda.is_available():
        torch.cuda.Event().record()


def test_an_event_may_always_be_waited_for(cuda_has_begun: None) -> None:
    for event in (EventOverlap(), EventOverlap(EventHandle())):
        with event as entered:
            entered.current_stream_wait()
    assert EventOverlap().event is None


def test_a_buffer_can_be_referred_to_weakly_and_goes_without_destroy(team: Team) -> None:
    assert team.run(bodies.memory_goes, size=2) == [0, 0]


# ---- Ranks that are lost -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("when", "mode", "masked", "disable_p2p"),
    [
        ("dispatch", "now", True, False),
        ("dispatch", "hook", False, False),
        ("combine", "hook", True, False),
        ("combine", "async", False, False),
        ("dispatch", "now", True, True),
        ("combine", "hook", True, True),
    ],
)
def test_a_lost_rank_is_masked_and_the_others_go_on(
    team: Team, when: str, mode: str, masked: bool, disable_p2p: bool
) -> None:
    if disable_p2p and compat_rank.DEVICE == "cuda":
        pytest.skip("NCCL gives all ranks up that are reached by it, once one is lost")
    with Team(team.size) as ranks:
        ranks.run(bodies.keep, disable_p2p)
        told = ranks.run(bodies.lose, 1, when, mode, masked, dying=[1])
        mask = [int(rank != 1) for rank in range(team.size)] if masked else None
        assert told == [None if rank == 1 else mask for rank in range(team.size)]


@pytest.mark.parametrize(
    ("mode", "masked", "timeout_us"),
    [("now", True, bodies.SOON_US), ("hook", False, bodies.SOON_US), ("async", True, NEVER)],
)
def test_a_rank_that_is_lost_before_the_first_dispatch_is_masked(
    team: Team, mode: str, masked: bool, timeout_us: int
) -> None:
    with Team(team.size) as ranks:
        arguments = (1, Case(), mode, masked, timeout_us)
        told = ranks.run(bodies.lose_before_a_shape, *arguments, dying=[1])
        mask = [int(rank != 1) for rank in range(team.size)] if masked else None
        assert told == [None if rank == 1 else mask for rank in range(team.size)]
        ranks.replace(1)
        ranks.meet()
        ranks.run(bodies.come_together_by_rank, 1)


def test_a_rank_that_is_lost_before_a_further_shape_is_masked(team: Team) -> None:
    with Team(team.size) as ranks:
        ranks.run(bodies.keep, False)
        arguments = (0, Case(hidden=264), "now", True, bodies.SOON_US)
        told = ranks.run(bodies.lose_before_a_shape, *arguments, dying=[0])
        mask = [int(rank != 0) for rank in range(team.size)]
        assert told == [None if rank == 0 else mask for rank in range(team.size)]
        ranks.replace(0)
        ranks.meet()
        ranks.run(bodies.come_together_by_rank, 0)


def test_a_rank_that_is_late_for_a_shape_is_masked_until_an_update(team: Team) -> None:
    last = team.size - 1
    told = team.run(bodies.late_for_a_shape, last, Case())
    others = [int(rank != last) for rank in range(team.size)]
    assert told == [others] * last + [[1 - one for one in others]]


def test_a_masked_rank_is_not_waited_for_when_memory_is_made(team: Team) -> None:
    team.run(bodies.masked_before_a_shape, 1)


def test_ranks_that_make_different_shapes_are_told(team: Team) -> None:
    for error in team.run(bodies.disagree):
        assert error.startswith("ranks have called with different arguments")


@pytest.mark.parametrize("has_tcp", [True, False])
def test_ranks_that_begin_with_different_payloads_are_told(team: Team, has_tcp: bool) -> None:
    for error in team.run(bodies.disagree_on_payload, has_tcp):
        assert error.startswith("ranks have called with different arguments")
        assert "use_fp8=False" in error
        assert "use_fp8=True" in error


def test_strangers_that_call_a_rank_are_ignored(team: Team) -> None:
    team.run(bodies.strangers)


@pytest.mark.skipif(compat_rank.CONTROL != "gloo", reason="NCCL waits for a lost rank")
def test_without_tcp_a_rank_that_is_lost_is_an_error_of_this_library() -> None:
    with Team(2) as ranks:
        assert ranks.run(bodies.no_places, dying=[1]) == [[True], None]


def test_a_new_process_takes_the_place_of_a_lost_one(team: Team) -> None:
    with Team(team.size) as ranks:
        ranks.run(bodies.keep, False)
        for lost in (1, 0):
            ranks.run(bodies.lose, lost, "dispatch", "now", True, dying=[lost])
            ranks.replace(lost)
            ranks.meet()
            ranks.run(bodies.come_together_by_rank, lost)


def test_ranks_go_on_when_their_group_has_another_size(team: Team) -> None:
    if team.size < 3:
        pytest.skip("it needs three ranks, and NCCL takes one for each GPU")
    with Team(team.size) as ranks:
        ranks.run(bodies.keep, False)
        ranks.meet(2)
        ranks.run(bodies.come_together, False, size=2)


def test_an_update_voids_handles(team: Team) -> None:
    for error in team.run(bodies.stale_handle, size=2):
        assert "handle" in error


def test_an_update_is_refused_while_a_round_is_in_flight(team: Team) -> None:
    for error in team.run(bodies.hook_before_update, size=2):
        assert "in flight" in error


# ---- Ends ----------------------------------------------------------------------------------------

ENDS = {
    "nothing": "",
    "destroy, group": "buffer.destroy(); buffer.destroy(); distributed.destroy_process_group()",
    "group, destroy": "distributed.destroy_process_group(); buffer.destroy()",
    "group, buffer": "distributed.destroy_process_group(); del buffer",
    "buffer, handle, group": "del buffer; del handle; distributed.destroy_process_group()",
    "a hook that never ran": (
        "kept = buffer.dispatch(x, topk_idx, None, 8, 6, -1, False, False, True);"
        "distributed.destroy_process_group()"
    ),
}
END = """
import os
import sys
import torch
import torch.distributed as distributed
from compat_rank import Case, DEVICE, CONTROL
from mooncake_ep.compat.mooncake import Buffer

children = []
for rank in range(2):
    children.append(os.fork())  # torch is loaded, and nothing of it has started yet
    if children[-1] == 0:
        break
else:
    ends = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(f"the ranks ended with {ends}" if any(ends) else 0)
device = torch.device(DEVICE, rank % torch.cuda.device_count()) if DEVICE == "cuda" else "cpu"
if DEVICE == "cuda":
    torch.cuda.set_device(device)
distributed.init_process_group(CONTROL, f"file://{sys.argv[1]}", rank=rank, world_size=2)
buffer = Buffer()
x, topk_idx, weights = (one.to(device) for one in Case().inputs(rank))
recv_x, count, handle, event, hook = buffer.dispatch(x, topk_idx, None, 8, 6, -1, False)
out, event, hook = buffer.combine(recv_x, topk_idx, weights, None, -1, handle)
"""


@pytest.mark.parametrize("end", ENDS)
def test_a_process_ends_well_in_whatever_order_things_go(end: str, tmp_path: Path) -> None:
    _expect_good_end(END + ENDS[end], tmp_path)


def _expect_good_end(code: str, directory: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code, str(directory / "store")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=_environment(OMP_NUM_THREADS="1"),
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "Traceback" not in done.stdout
    assert "Exception ignored" not in done.stdout


# A thread of gloo that wants the interpreter gets it as late as can be.
GATHER_AND_END = """
import os
import sys
import torch.distributed as distributed
from mooncake_ep.compat._meeting import Meeting

children = []
for child in range(16):
    children.append(os.fork())
    if children[-1] == 0:
        break
    if child % 2 == 1:
        for one in children[-2:]:
            assert os.waitpid(one, 0)[1] == 0, "a rank has aborted"
else:
    sys.exit(0)
store = f"file://{sys.argv[1]}{child // 2}"
distributed.init_process_group("gloo", store, rank=child % 2, world_size=2)
meeting, kept = Meeting(None), distributed.group.WORLD
sys.setswitchinterval(1000)
for _ in range(5):
    meeting.gather(b"some bytes")
"""


@pytest.mark.skipif(compat_rank.CONTROL != "gloo", reason="it is about a thread of gloo")
def test_a_process_ends_well_right_after_it_has_gathered(tmp_path: Path) -> None:
    _expect_good_end(GATHER_AND_END, tmp_path)


def _environment(path: str = "", **changes: str) -> dict[str, str]:
    """Make the environment of a process that finds what this one does."""
    paths = [path, *sys.path] if path else sys.path
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | changes


# ---- The same program over any Mooncake EP -------------------------------------------------------


@pytest.mark.parametrize("module", ["mooncake_ep.compat.mooncake", "mooncake.mooncake_ep_buffer"])
def test_the_program_runs_by_either_import_line(module: str, tmp_path: Path) -> None:
    directory = tmp_path / "site"
    if module.startswith("mooncake."):
        _run_alias("install", directory)
    ranks = [
        subprocess.Popen(
            [sys.executable, str(PROGRAM), "--tokens", "8", "--hidden", "256", "--rounds", "3"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=_environment(
                str(directory),
                MOONCAKE_EP_COMPAT_MODULE=module,
                MOONCAKE_EP_COMPAT_STORE=str(tmp_path / "store"),
                RANK=str(rank),
                WORLD_SIZE="2",
                OMP_NUM_THREADS="1",
            ),
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        output, errors = rank.communicate(timeout=60)
        assert rank.returncode == 0, errors
        told = json.loads(output)
        assert told["module"] == module
        by_payload: dict[bool, set[str]] = {False: set(), True: set()}
        for one in told["results"]:
            assert one["error"] < (0.05 if one["use_fp8"] else 0.005)
            assert one["dispatch_us"] > 0
            assert one["combine_us"] > 0
            by_payload[one["use_fp8"]].add(one["rows"] + one["out"])
        assert all(len(sums) == 1 for sums in by_payload.values()), told


# ---- Aliases -------------------------------------------------------------------------------------


def _run_alias(action: str, directory: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mooncake_ep.compat", action, "mooncake"]
    return subprocess.run(
        [*command, "--directory", str(directory)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=_environment(path),
    )


def test_an_installed_alias_is_found_by_new_processes_until_it_is_removed(tmp_path: Path) -> None:
    for _ in range(2):  # twice is harmless
        done = _run_alias("install", tmp_path, str(tmp_path))
        assert done.returncode == 0, done.stderr
    code = "from mooncake.mooncake_ep_buffer import Buffer; print(Buffer.__module__)"
    for expected in ("mooncake_ep.compat.mooncake", ""):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=_environment(str(tmp_path)),
        )
        assert done.stdout.strip() == expected, done.stderr
        assert _run_alias("remove", tmp_path).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_an_alias_never_hides_the_real_package(tmp_path: Path) -> None:
    real = tmp_path / "real" / "mooncake"
    real.mkdir(parents=True)
    (real / "__init__.py").write_text("real = True\n")
    for directory in (tmp_path / "site", tmp_path / "real"):
        done = _run_alias("install", directory, str(tmp_path / "real"))
        assert done.returncode == 1
        assert f"mooncake is installed already, in {real}" in done.stderr
    assert "there is no alias" in _run_alias("remove", tmp_path / "real").stdout
    assert (real / "__init__.py").read_text() == "real = True\n"
    assert not (tmp_path / "site").exists()


def test_this_process_may_enter_and_leave_an_alias(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    enter_alias("mooncake")
    enter_alias("mooncake")
    try:
        from mooncake.mooncake_ep_buffer import Buffer as Found

        assert Found is mooncake.Buffer
    finally:
        leave_alias("mooncake")
    with pytest.raises(ModuleNotFoundError):
        __import__("mooncake.mooncake_ep_buffer")
    (tmp_path / "mooncake").mkdir()
    (tmp_path / "mooncake" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError, match="mooncake is installed already"):
        enter_alias("mooncake")


def test_aliases_need_no_torch() -> None:
    code = "import sys, mooncake_ep.compat.__main__; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, env=_environment())


# ---- On GPUs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_a_graph_replays_a_round_with_new_tokens(team: Team, mode: str) -> None:
    if compat_rank.DEVICE != "cuda":
        pytest.skip("graphs are of GPUs; MOONCAKE_EP_COMPAT_DEVICE is not cuda")
    team.run(bodies.graph, mode, size=2)
