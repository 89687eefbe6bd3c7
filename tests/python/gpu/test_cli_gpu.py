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
    peers = _INFO.device_count > 1
    assert any(line.startswith("peer_copy: bw=") for line in lines) == peers
    assert ("peer_copy_percent" in report["dispatch"]) == peers
