"""mooncake-ep smoke and bench by --api compat: the Buffer of compat.mooncake, over torch."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from test_cli import cli, needs_numpy, succeed

torch = pytest.importorskip("torch")
pytestmark = needs_numpy

_SMALL = ("--tokens", "16", "--hidden", "128", "--experts", "8", "--api", "compat")
_NUMBER = r"[0-9]+(?:\.[0-9]+)?"


@pytest.mark.parametrize("arguments", [("2", "bf16"), ("4", "fp8")], ids=str)
def test_smoke_checks_every_element_and_gives_the_hashes_of_the_native_api(
    arguments: tuple[str, str],
) -> None:
    world_size, payload = arguments
    smoke = ("smoke", *_SMALL[:-2], "--world-size", world_size, "--payload", payload, "--hash")
    compat = succeed(*smoke, "--api", "compat", "--backend", "gloo").splitlines()
    native = succeed(*smoke, "--weights", "combine").splitlines()
    assert compat[:-1] == native[:-1]
    assert compat[-1] == native[-1] + " api=compat backend=gloo"


def test_bench_prints_the_seeds_lines(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    lines = succeed(
        *("bench", *_SMALL, "--rounds", "3", "--warmup", "1", "--json", str(path))
    ).splitlines()
    assert lines[0] == "config: ranks=2 tokens=16 hidden=128 experts=8 topk=2 backend=cpu"
    assert lines[1].startswith(
        "mode=runtime_p2p fallback=False ibgda_disabled=True fast=True transport=shm"
    )
    assert "api=compat control=gloo" in lines[1]
    report = json.loads(path.read_text())
    for operation in ("dispatch", "combine", "dispatch+combine"):
        pattern = rf"{re.escape(operation)}: avg={_NUMBER} us bw={_NUMBER} GB/s"
        assert sum(re.fullmatch(pattern, line) is not None for line in lines) == 1
        assert 0 < report[operation]["min_us"] <= report[operation]["median_us"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smoke", "--backend", "gloo"), "--backend gloo goes only with --api compat"),
        (("smoke", *_SMALL, "--payload", "fp16"), "--payload fp16 is none of --api compat"),
        (("smoke", *_SMALL, "--weights", "dispatch"), "--weights dispatch is none of --api compat"),
        (("smoke", *_SMALL, "--backend", "nccl"), "--backend nccl needs GPUs"),
        (("bench", *_SMALL, "--sweep", "1,2"), "--sweep goes only with --api native"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused(arguments: tuple[str, ...], message: str) -> None:
    done = cli(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
