"""One rank that checks examples/moe_models.py's models; see test_models.py."""

from __future__ import annotations

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any

from ranks import Rank

EXAMPLE = Path(__file__).parents[2] / "examples" / "moe_models.py"
MODELS = ("mixtral", "qwen3_moe", "deepseek_v3")


def check_models(rank: Rank, meeting: str, dtypes: list[str]) -> dict[str, dict[str, Any]]:
    """Return the fields of each model's report and its failures, by type and name."""
    sys.path.insert(0, str(EXAMPLE.parent))
    example = importlib.import_module(EXAMPLE.stem)
    distributed = importlib.import_module("torch.distributed")
    distributed.init_process_group(
        "gloo", f"file://{meeting}", rank=rank.rank, world_size=rank.rank_count
    )
    return {
        dtype: {
            name: dataclasses.asdict(report) | {"failures": example.failures(report, "cpu", dtype)}
            for name, report in example.check_models(list(MODELS), "cpu", dtype).items()
        }
        for dtype in dtypes
    }
