"""The command mooncake-ep with --device cuda."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import mooncake_ep as ep
from test_cli import cli, needs_numpy, succeed

_INFO = ep.backend_info("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _INFO.available, reason=f"no CUDA backend: {_INFO.reason}"),
    needs_numpy,
]
pytest.importorskip("torch")

_SMALL = ("--tokens", "16", "--hidden", "128", "--experts", "8")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--world-size", "1"),
        ("--world-size", "2", "--payload", "fp8", "--weights", "combine"),
        ("--world-size", "4", "--payload", "fp16"),
    ],
)
def test_smoke_gives_the_hashes_of_the_cpu(arguments: tuple[str, ...]) -> None:
    smoke = ("smoke", *_SMALL, "--hash", *arguments)
    on_gpu = succeed(*smoke, "--device", "cuda")
    assert on_gpu == succeed(*smoke).replace("topk=2\n", "topk=2 device=cuda\n")


def test_bench_prints_its_lines_and_writes_all_numbers(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    done = cli("bench", *_SMALL, "--device", "cuda", "--rounds", "10", "--json", str(path))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "config: ranks=2 tokens=16 hidden=128 experts=8 topk=2 backend=cuda"
    report = json.loads(path.read_text())
    for operation in ("dispatch", "combine", "dispatch+combine"):
        pattern = rf"{re.escape(operation)}: avg={_NUMBER} us bw={_NUMBER} GB/s"
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1
        for numbers in (report[operation], report[operation]["eager"]):
            assert 0 < numbers["min_us"] <= numbers["median_us"] <= numbers["p99_us"]
    assert report["mode"]["l2"] == "warm"
    assert report["mode"]["sms"] > 0
    peers = _INFO.device_count > 1
    assert any(line.startswith("peer_copy: bw=") for line in lines) == peers
    assert ("peer_copy_percent" in report["dispatch"]) == peers


def test_bench_times_single_rounds_after_a_flush(tmp_path: Path) -> None:
    # A hidden size at which reading from memory instead of the L2 shows.
    arguments = ("bench", "--tokens", "64", "--hidden", "7168", "--experts", "8", "--topk", "2")
    reports = {}
    for name, flags in (("warm", ()), ("flushed", ("--flush-l2",))):
        path = tmp_path / f"{name}.json"
        text = succeed(
            *arguments, "--device", "cuda", "--rounds", "20", "--json", str(path), *flags
        )
        assert f" l2={name} " in text.splitlines()[1]
        reports[name] = json.loads(path.read_text())
        assert reports[name]["mode"]["l2"] == name
    for operation in ("dispatch", "combine", "dispatch+combine"):
        flushed = reports["flushed"][operation]
        for numbers in (flushed, flushed["eager"]):
            assert 0 < numbers["min_us"] <= numbers["median_us"] <= numbers["p99_us"]
        # A round from memory takes longer than one of ten from the L2; but ranks that take turns
        # on one GPU measure something else.
        if _INFO.device_count > 1:
            assert flushed["median_us"] > reports["warm"][operation]["median_us"]


def test_bench_keeps_to_the_sms_it_is_given(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    bench = ("bench", *_SMALL, "--device", "cuda", "--rounds", "5", "--json", str(path))
    text = succeed(*bench, "--sms", "8")
    mode = json.loads(path.read_text())["mode"]
    assert 1 <= mode["sms"] <= 8
    assert f" sms={mode['sms']} " in text.splitlines()[1]
    succeed(*bench)
    assert json.loads(path.read_text())["mode"]["sms"] >= mode["sms"]


@pytest.mark.parametrize("flags", [(), ("--flush-l2", "--sms", "16")])
def test_bench_draws_a_sweep(tmp_path: Path, flags: tuple[str, ...]) -> None:
    pytest.importorskip("matplotlib", reason="--plot needs matplotlib")
    picture, path = tmp_path / "bench.svg", tmp_path / "bench.json"
    files = ("--plot", str(picture), "--json", str(path))
    succeed("bench", *_SMALL, "--device", "cuda", "--rounds", "5", *files, *flags)
    report = json.loads(path.read_text())
    assert [sized["tokens"] for sized in report["sweep"]] == [1, 2, 4, 8, 16]
    for sized in report["sweep"]:
        for numbers in sized["operations"].values():
            assert 0 < numbers["eager"]["median_us"] <= numbers["eager"]["p99_us"]
    text = picture.read_text()
    assert f"cuda ({report['gpu']}), L2 {report['mode']['l2']} -->" in text
    assert ("<!-- peer copy -->" in text) == (_INFO.device_count > 1)
