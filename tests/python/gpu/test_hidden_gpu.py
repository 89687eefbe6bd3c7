"""Ranks that each see one GPU (CUDA_VISIBLE_DEVICES) do as those that see all."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import mooncake_ep as ep

_INFO = ep.backend_info("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        _INFO.device_count < 2, reason=f"two GPUs are needed, here are {_INFO.device_count}"
    ),
]
pytest.importorskip("torch")

_RANK = Path(__file__).with_name("hidden_rank.py")
_SECONDS_MAX = 90


def run(*, hidden: bool) -> list[dict[str, Any]]:
    """Run two ranks on a GPU each; return what they print."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = []
    for rank in range(2):
        environment = {**os.environ, **meeting, "RANK": str(rank), "MOONCAKE_EP_PORT_OFFSET": "0"}
        if hidden:
            seen = os.environ.get("CUDA_VISIBLE_DEVICES", "0,1").split(",")
            environment["CUDA_VISIBLE_DEVICES"] = seen[rank]
        arguments = [sys.executable, str(_RANK), "0" if hidden else str(rank)]
        ranks.append(subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE))
    printed = [rank.communicate(timeout=_SECONDS_MAX)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(text) for text in printed]


def test_ranks_that_see_one_gpu_do_as_those_that_see_all() -> None:
    # How they reach each other, how messages travel (a window for lines is larger), what comes out.
    assert run(hidden=True) == run(hidden=False)
