"""The command mooncake-ep, run as its users run it, at tiny sizes."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import mooncake_ep
from mooncake_ep import backend_info
from mooncake_ep.cli import main, spawn
from mooncake_ep.cli.errors import RankFailedError, UserError
from mooncake_ep.cli.files import cannot_write, check_writable

if TYPE_CHECKING:
    from mooncake_ep.cli.rank import RankContext

_TIMEOUT_S = 120
_SMALL = ("--tokens", "16", "--hidden", "128", "--experts", "6")

needs_numpy = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("numpy", "ml_dtypes")),
    reason="demo, smoke and bench need numpy and ml_dtypes",
)


def cli(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run mooncake-ep in a process of its own."""
    return python("-m", "mooncake_ep", *arguments, **environment)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        env={**os.environ, "PYTHONIOENCODING": "utf-8", **environment},
        check=False,
    )


def succeed(*arguments: str) -> str:
    """Run mooncake-ep, which has to succeed and complain of nothing; returns its output."""
    done = cli(*arguments)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


def refuse(*arguments: str) -> str:
    """Run mooncake-ep, which has to refuse its arguments in one line; returns the line."""
    done = cli(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("mooncake-ep: error: ")
    return line


# ---- info ----------------------------------------------------------------------------------------


def test_info_shows_what_is_here() -> None:
    text = succeed("info")
    for word in ("mooncake_ep 0.", "libmooncake_ep", "cpu   available", "limits", "/dev/shm"):
        assert word in text
    assert "rdma       IBGDA unavailable, using P2P-only path: " in text


def test_info_as_json_has_all_parts() -> None:
    facts = json.loads(succeed("info", "--json"))
    parts = {"version", "library", "backends", "rdma", "limits", "machine", "python"}
    assert set(facts) == parts
    assert facts["rdma"]["available"] is False
    assert facts["rdma"]["reason"]
    assert facts["backends"]["cpu"]["available"] is True
    for name in ("cuda", "maca"):
        assert facts["backends"][name]["available"] or facts["backends"][name]["reason"]
    assert facts["limits"]["topk"] == 32
    assert facts["machine"]["cores"] >= 1


_SHIM = "maca (shim over CUDA)"


@pytest.fixture
def shim(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the library one that has its MACA backend over a shim."""
    real = mooncake_ep.backend_info

    def answer(backend: str) -> mooncake_ep.BackendInfo:
        if backend != "maca":
            return real(backend)
        return mooncake_ep.BackendInfo(_SHIM, available=True, device_count=1, reason="")

    monkeypatch.setattr(mooncake_ep, "backend_info", answer)


@pytest.mark.usefixtures("shim")
def test_info_says_that_maca_is_a_shim(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert f"\nbackend    {_SHIM} available, 1 device\n" in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["backends"]["maca"]["name"] == _SHIM


@needs_numpy
@pytest.mark.usefixtures("shim")
def test_what_ran_over_a_shim_is_not_called_maca(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ran = spawn.run_ranks

    def run_on_cpu(target: str, options: dict[str, Any], launch: spawn.Launch) -> Any:
        on_cpu = target.replace("bench_gpu_rank", "bench_rank")
        return ran(on_cpu, options, replace(launch, device="cpu"))

    for command in ("info", "smoke", "bench"):
        monkeypatch.setattr(f"mooncake_ep.cli.{command}.run_ranks", run_on_cpu)
    on_maca = ("--device", "maca", "--world-size", "1")
    for command, shown in (
        (("info",), f"group      1 ranks on {_SHIM}, "),
        (("smoke", *_SMALL), f"topk=2 device={_SHIM}\n"),
        ((*_SMALL_BENCH, "--no-baselines"), f"topk=2 backend={_SHIM}\n"),
    ):
        assert main([*command, *on_maca]) == 0
        assert shown in capsys.readouterr().out


def test_info_shows_how_ranks_reach_each_other() -> None:
    lines = succeed("info", "--world-size", "3").splitlines()
    start = lines.index("group      3 ranks on cpu, how each reaches each:")
    assert lines[start + 1 : start + 5] == [
        "           rank  0    1    2",
        "           0     self shm  shm",
        "           1     shm  self shm",
        "           2     shm  shm  self",
    ]
    shared = (
        "shm: processes of one host: POSIX shared memory, the fastest between CPU ranks; "
        "tried in both directions"
    )
    assert [line.strip() for line in lines[start + 5 :]] == ["self: the rank itself", shared]


def test_info_of_a_group_as_json() -> None:
    facts = json.loads(succeed("info", "--json", "--world-size", "2"))
    assert facts["group"]["device"] == "cpu"
    names = [[one["name"] for one in row] for row in facts["group"]["transports"]]
    assert names == [["self", "shm"], ["shm", "self"]]


def test_info_imports_no_array_framework() -> None:
    code = (
        "import sys; from mooncake_ep.cli import main; status = main(['info']); "
        "sys.exit(status or bool({'numpy', 'torch', 'jax', 'matplotlib'} & set(sys.modules)))"
    )
    assert python("-c", code).returncode == 0


# ---- smoke ---------------------------------------------------------------------------------------


@needs_numpy
@pytest.mark.parametrize("weights", ["dispatch", "combine"])
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_smoke_passes(world_size: int, payload: str, weights: str) -> None:
    text = succeed(
        *("smoke", *_SMALL, "--world-size", str(world_size)),
        *("--payload", payload, "--weights", weights),
    )
    assert text == f"smoke ok ranks={world_size} tokens=16 hidden=128 experts=6 topk=2\n"


@needs_numpy
@pytest.mark.parametrize("payload", ["fp16", "fp32"])
def test_smoke_passes_with_other_payloads(payload: str) -> None:
    text = succeed("smoke", *_SMALL, "--world-size", "2", "--payload", payload, "--topk", "4")
    assert text == "smoke ok ranks=2 tokens=16 hidden=128 experts=6 topk=4\n"


@needs_numpy
def test_smoke_prints_equal_hashes_for_equal_arguments_only() -> None:
    arguments = ("smoke", *_SMALL, "--world-size", "2", "--hash")
    first, second, other = (succeed(*arguments, "--seed", seed) for seed in "778")
    assert first == second != other
    hashes = re.findall(r"^hash rank=(\d) sha256=([0-9a-f]{64})$", first, re.MULTILINE)
    assert [rank for rank, _ in hashes] == ["0", "1"]
    assert hashes[0][1] != hashes[1][1]


@needs_numpy
def test_smoke_is_one_rank_of_a_launcher_if_rank_is_set() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {
        **os.environ,
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "MOONCAKE_EP_PORT_OFFSET": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "mooncake_ep", "smoke", *_SMALL],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**environment, "RANK": str(rank)},
        )
        for rank in range(2)
    ]
    outputs = [rank.communicate(timeout=_TIMEOUT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert outputs[0][0] == "smoke ok ranks=2 tokens=16 hidden=128 experts=6 topk=2\n"
    assert outputs[1][0] == ""


@needs_numpy
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_smoke_names_a_wrong_element(payload: str) -> None:
    import numpy as np

    from mooncake_ep import Group
    from mooncake_ep.cli import smoke_rank
    from mooncake_ep.cli.arrays import random_tokens
    from mooncake_ep.cli.devices import Host
    from mooncake_ep.cli.sizes import Sizes, make_buffer

    sizes = Sizes(rank_count=1, tokens=8, hidden=128, experts=4, topk=2, payload=payload, seed=1)
    tokens = random_tokens(sizes, 8, rank=0, round_number=0)
    checked = smoke_rank._Round(sizes, [tokens], rank=0, own_outputs=False)
    with Group.single() as group, make_buffer(group, sizes, threads=1) as buffer:
        dispatched, out = checked.run(buffer, Host(), weights="dispatch")
    assert checked.check_dispatched(dispatched) + checked.check_combined(out) == []
    expert = int(np.argmax(dispatched.count))
    dispatched.x.view(np.uint8)[expert, 0, 5] ^= 0x40
    dispatched.src_info[expert, 0] += 1
    out[3, 7] += 1
    found = checked.check_dispatched(dispatched) + checked.check_combined(out)
    assert any(text.startswith(f"x of expert {expert}[0, ") for text in found)
    assert any(text.startswith(f"src_info of expert {expert}[0] is ") for text in found)
    assert any(text.startswith("out[3, 7] is ") for text in found)


# ---- demo ----------------------------------------------------------------------------------------

_SMALL_DEMO = ("demo", "--world-size", "2", "--tokens", "32", "--hidden", "64", "--experts", "4")


@needs_numpy
@pytest.mark.parametrize("payload", ["bf16", "fp16", "fp32"])
def test_demo_agrees_with_one_process(payload: str) -> None:
    text = succeed(*_SMALL_DEMO, "--payload", payload)
    for word in ("rank 1", "expert 3", "dispatch", "relative L2 error", "\ndemo ok"):
        assert word in text


@needs_numpy
def test_demo_agrees_with_one_process_in_fp8_and_several_layers() -> None:
    text = succeed(*_SMALL_DEMO, "--hidden", "128", "--payload", "fp8", "--layers", "3")
    assert "\ndemo ok" in text


@needs_numpy
def test_demo_reads_a_text_that_is_shorter_than_the_ranks(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("word")
    assert "(no words)" in succeed(*_SMALL_DEMO, "--text", str(text))


@needs_numpy
def test_demo_writes_ascii_where_nothing_else_can_be_shown() -> None:
    done = cli(*_SMALL_DEMO, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "####" in done.stdout


@needs_numpy
@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_demo_draws_load_and_time_line(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture = tmp_path / f"demo{suffix}"
    succeed(*_SMALL_DEMO, "--plot", str(picture))
    begin = picture.read_bytes()[:256]
    assert begin.startswith(b"\x89PNG") if suffix == ".png" else b"<svg" in picture.read_bytes()


# ---- bench ---------------------------------------------------------------------------------------

_SMALL_BENCH = ("bench", *_SMALL, "--rounds", "3", "--warmup", "1")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


@needs_numpy
def test_bench_prints_the_lines_that_tables_are_made_of() -> None:
    lines = succeed(*_SMALL_BENCH, "--no-baselines").splitlines()
    assert lines[0] == "config: ranks=2 tokens=16 hidden=128 experts=6 topk=2 backend=cpu"
    assert lines[1].startswith(
        "mode=runtime_p2p fallback=False ibgda_disabled=True fast=True transport=shm threads=1"
    )
    for operation in ("dispatch", "combine", "dispatch+combine"):
        pattern = rf"{re.escape(operation)}: avg={_NUMBER} us bw={_NUMBER} GB/s"
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1
    for rank in range(2):
        pattern = (
            rf"rank {rank}: fullest_expert={_NUMBER} of the mean, "
            rf"waited a call for rank{1 - rank}={_NUMBER}us"
        )
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1, lines


@needs_numpy
def test_bench_says_that_rows_go_by_the_fallback() -> None:
    done = cli(*_SMALL_BENCH, "--no-baselines", MOONCAKE_EP_DISABLE_P2P="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith(
        "mode=collective fallback=True ibgda_disabled=True fast=False transport=collective"
    )


@needs_numpy
@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_bench_json_has_all_numbers(tmp_path: Path, payload: str) -> None:
    path = tmp_path / "bench.json"
    done = cli(*_SMALL_BENCH, "--payload", payload, "--json", str(path))
    assert done.returncode == 0, done.stderr
    assert "ratio_to_plain_copy=" in done.stdout
    report = json.loads(path.read_text())
    row_bytes = 2 * 128 if payload == "bf16" else 128 + 128 // 32
    assert report["config"]["payload"] == payload
    assert report["dispatch"]["bytes"] == 16 * 2 * (row_bytes + 32)
    assert report["combine"]["bytes"] == 16 * 2 * 2 * 128
    for operation in ("dispatch", "combine"):
        check_numbers(report[operation], row_bytes if operation == "dispatch" else 2 * 128)
    rows = [sum(rank["expert_rows"]) for rank in report["counted"]]
    assert rows == [sum(rank["rows_received"]) for rank in report["counted"]]
    assert sum(rows) == sum(sum(rank["rows_sent"]) for rank in report["counted"]) > 0
    both = report["dispatch+combine"]
    assert both["bytes"] == report["dispatch"]["bytes"] + report["combine"]["bytes"]


def check_numbers(numbers: dict[str, Any], row_bytes: int) -> None:
    """Check one operation of a report."""
    assert 0 < numbers["min_us"] <= numbers["median_us"] <= numbers["p99_us"]
    # A token goes to one other rank at most; 16 of 32 on average over two ranks at most.
    assert 0 < numbers["link_bytes"] <= 16 * row_bytes
    baselines = ["plain_copy"] + ["gloo"] * (importlib.util.find_spec("torch") is not None)
    for name in baselines:
        ratio = numbers[name]["median_us"] / numbers["median_us"]
        assert numbers[f"ratio_to_{name}"] == pytest.approx(ratio)


@needs_numpy
def test_bench_json_without_a_file_is_all_that_is_printed() -> None:
    report = json.loads(succeed(*_SMALL_BENCH, "--world-size", "1", "--no-baselines", "--json"))
    assert report["mode"]["transport"] == "self"
    assert report["dispatch"]["link_bytes"] == 0
    assert "ratio_to_plain_copy" not in report["dispatch"]


@needs_numpy
def test_bench_sweeps_over_tokens_and_prints_a_line_for_each(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    lines = succeed(*_SMALL_BENCH, "--sweep", "8,2,32", "--json", str(path)).splitlines()
    assert lines[0] == "config: ranks=2 tokens=2,8,32 hidden=128 experts=6 topk=2 backend=cpu"
    report = json.loads(path.read_text())
    assert report["config"]["tokens"] == 32
    assert [sized["tokens"] for sized in report["sweep"]] == [2, 8, 32]
    for sized, line in zip(report["sweep"], lines[-3:], strict=True):
        tokens, operations = sized["tokens"], sized["operations"]
        assert operations["combine"]["bytes"] == tokens * 2 * 2 * 128
        assert "ratio_to_plain_copy" not in operations["combine"]
        shown = [float(number) for number in line.split()]
        medians = [operations[name]["median_us"] for name in operations]
        assert shown[0] == tokens
        assert shown[1::4] == pytest.approx(medians, abs=0.01)


def run_plot(path: Path, *arguments: str) -> tuple[list[str], list[int]]:
    """Run bench --plot; returns its lines and the numbers of tokens that it ran."""
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    json_path = path.with_suffix(".json")
    text = succeed(*_SMALL_BENCH, "--plot", str(path), "--json", str(json_path), *arguments)
    report = json.loads(json_path.read_text())
    return text.splitlines(), [sized["tokens"] for sized in report["sweep"]]


@needs_numpy
def test_bench_draws_powers_of_two_up_to_the_tokens(tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    lines, tokens = run_plot(picture, "--tokens", "12")
    assert lines[-1] == f"plot: {picture}"
    assert tokens == [1, 2, 4, 8, 12]
    # matplotlib draws text as paths, and leaves the text itself in comments.
    text = picture.read_text()
    for label in ("2 ranks, 6 experts, top-2, hidden 128, bf16, cpu", "tokens of a rank"):
        assert f"<!-- {label} -->" in text
    assert "combine, link" in text
    assert "peer copy" not in text


@needs_numpy
def test_bench_draws_one_rank_that_has_no_link(tmp_path: Path) -> None:
    picture = tmp_path / "bench.svg"
    _, tokens = run_plot(picture, "--world-size", "1", "--sweep", "4,16")
    assert tokens == [4, 16]
    assert "combine, logical" in picture.read_text()
    assert "combine, link" not in picture.read_text()


# ---- What users get wrong ------------------------------------------------------------------------


@needs_numpy
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("smoke", "--experts", "15"), "15"),
        (("smoke", "--hidden", "100"), "100"),
        (("smoke", "--payload", "fp8", "--hidden", "136"), "128"),
        (("bench", "--tokens", "70000"), "70000"),
        (("demo", "--topk", "40", "--experts", "64"), "40"),
        (("smoke", "--topk", "17"), "topk 17 is more than the 16 experts"),
        (("smoke", "--seed", "-1"), "seed -1"),
        (("smoke", "--timeout", "0"), "--timeout 0"),
        (("smoke", "--launched-by-env"), "RANK"),
        (("demo", "--text", "/nonexistent"), "--text /nonexistent: No such file"),
        (("demo", "--plot", "picture.bmp"), ".png, .pdf, .svg"),
        (("bench", "--json", "/nonexistent/file"), "/nonexistent"),
        (("bench", "--plot", "picture.bmp"), ".png, .pdf, .svg"),
        (("bench", "--plot", "/proc/picture.png"), "--plot /proc/picture.png: "),
        (("bench", "--json", "/proc/file"), "--json /proc/file: "),
        (("bench", "--sweep", "8,70000"), "70000"),
        (("bench", "--flush-l2"), "--flush-l2 goes only with --device cuda"),
        (("bench", "--sms", "8"), "--sms 8 goes only with --device cuda"),
    ],
)
def test_wrong_values_are_refused_in_one_line(arguments: tuple[str, ...], words: str) -> None:
    assert words in refuse(*arguments)


@needs_numpy
@pytest.mark.parametrize("command", ["topo", "demo", "bench"])
def test_a_picture_that_cannot_be_written_is_refused_before_any_work(
    command: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    assert refuse(command, "--plot", str(folder)).endswith(f"--plot {folder}: it is a folder")


def test_to_look_whether_a_file_can_be_written_changes_none(tmp_path: Path) -> None:
    old, new, link = tmp_path / "old", tmp_path / "new", tmp_path / "link"
    old.write_text("kept")
    link.symlink_to("nothing")
    for path in (old, new, link):
        check_writable("--json", path)
    assert old.read_text() == "kept"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "old"]


@needs_numpy
def test_a_picture_that_fails_leaves_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def draw(path: Path, report: dict[str, Any]) -> None:
        raise cannot_write("--plot", path, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    monkeypatch.setattr("mooncake_ep.cli.plot.check_matplotlib", lambda: None)
    monkeypatch.setattr("mooncake_ep.cli.bench_plot.draw", draw)
    picture = tmp_path / "bench.png"
    assert main([*_SMALL_BENCH, "--sweep", "4", "--plot", str(picture)]) == 2
    shown = capsys.readouterr()
    assert shown.err == f"mooncake-ep: error: --plot {picture}: No space left on device\n"
    assert "config: ranks=2 tokens=4" in shown.out


@needs_numpy
@pytest.mark.parametrize("command", ["smoke", "bench"])
def test_a_device_that_is_not_here_is_refused_in_one_line(command: str) -> None:
    if backend_info("cuda").available:
        pytest.skip("there is a GPU")
    assert "--device cuda" in refuse(command, *_SMALL, "--world-size", "2", "--device", "cuda")


@pytest.mark.parametrize(
    "arguments",
    [(), ("nothing",), ("smoke", "--tokens", "0"), ("bench", "--sweep", "1,,2")],
)
def test_wrong_usage_is_refused_with_the_usage(arguments: tuple[str, ...]) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert "usage: mooncake-ep" in done.stderr


@pytest.mark.parametrize("command", ["info", "demo", "smoke", "bench"])
def test_help_has_examples(command: str) -> None:
    assert f"examples:\n  mooncake-ep {command}" in succeed(command, "--help")


@pytest.mark.parametrize("command", ["demo", "smoke", "bench"])
def test_a_missing_package_is_named_with_its_remedy(command: str) -> None:
    code = (
        "import importlib.util, sys; find = importlib.util.find_spec; "
        "importlib.util.find_spec = "
        "lambda name, *rest: None if name == 'ml_dtypes' else find(name, *rest); "
        f"from mooncake_ep.cli import main; sys.exit(main(['{command}']))"
    )
    done = python("-c", code)
    assert done.returncode == 2
    assert "ml_dtypes" in done.stderr
    assert "pip install 'mooncake-ep[cli]'" in done.stderr


# ---- Ranks that fail -----------------------------------------------------------------------------


def leave(context: RankContext) -> dict[str, Any]:
    """Be killed as rank 1, and wait for it elsewhere."""
    if context.group.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    context.group.barrier()
    return {}


def complain(context: RankContext) -> dict[str, Any]:
    """Refuse the arguments on all ranks."""
    raise UserError(f"these are not {context.options['wanted']}")


def fail(context: RankContext) -> dict[str, Any]:
    """Fail as rank 1, and wait for it elsewhere."""
    if context.group.rank == 1:
        raise ArithmeticError("two and two")
    context.group.barrier()
    return {}


def stay(context: RankContext) -> dict[str, Any]:
    """Never end as rank 0."""
    while context.group.rank == 0:
        signal.pause()
    return {}


def answer(context: RankContext) -> dict[str, Any]:
    """Return bytes that are larger than a pipe holds."""
    return {"rank": context.group.rank, "data": bytes([context.group.rank]) * 300_000}


def run_here(
    name: str, monkeypatch: pytest.MonkeyPatch, *, timeout_s: float = _TIMEOUT_S
) -> list[dict[str, Any]]:
    """Run a function of this file on two ranks."""
    paths = [str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    launch = spawn.Launch(rank_count=2, by_env=False, timeout_s=timeout_s, label="test")
    return spawn.run_ranks(f"test_cli:{name}", {"wanted": "good"}, launch)


def test_results_come_back_by_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    results = run_here("answer", monkeypatch)
    assert [result["rank"] for result in results] == [0, 1]
    assert [result["data"] for result in results] == [b"\0" * 300_000, b"\1" * 300_000]


def test_a_killed_rank_ends_the_run_and_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailedError, match="rank 1 was killed by SIGKILL"):
        run_here("leave", monkeypatch)


def test_an_exception_of_a_rank_ends_the_run_and_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailedError, match=r"(?s)rank 1 failed.*ArithmeticError: two and two"):
        run_here("fail", monkeypatch)


def test_a_complaint_of_all_ranks_is_shown_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^these are not good$"):
        run_here("complain", monkeypatch)


def test_a_rank_that_stays_is_ended_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RankFailedError, match=r"ranks? 0.* did not finish within 3 s"):
        run_here("stay", monkeypatch, timeout_s=3)


@needs_numpy
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_ranks(number: signal.Signals, status: int) -> None:
    command = [sys.executable, "-m", "mooncake_ep", "bench", *_SMALL, "--no-baselines"]
    with subprocess.Popen(
        [*command, "--rounds", "1000000"], stderr=subprocess.PIPE, text=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        ranks: list[str] = []
        while len(ranks) < 2:
            assert process.poll() is None
            ranks = children.read_text().split()
        process.send_signal(number)
        _, text = process.communicate(timeout=_TIMEOUT_S)
    assert process.returncode == status
    assert "Traceback" not in text
    # A rank that was just being started is not known yet to be ended; it finds its input closed.
    deadline = time.monotonic() + _TIMEOUT_S
    while any(Path(f"/proc/{rank}").exists() for rank in ranks):
        assert time.monotonic() < deadline
