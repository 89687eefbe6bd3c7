"""Models of transformers with their experts on ranks, against the same models in one process."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import pytest

from models_rank import EXAMPLE, MODELS, check_models
from ranks import run_processes

LOGITS_ERROR_MAX, GRADIENTS_ERROR_MAX = 1e-4, 1e-5
BLOCKS_ERROR_MAX = {"fp32": 1e-5, "bf16": 1e-2}  # relative L2
GRADIENT_SIZE_MIN = 1e-2  # of the largest entry: what is compared is not nothing
KINDS = {"router", "experts", "others"}
_DEADLINE_S = 240.0  # libraries take seconds to load in each process

for _name in ("torch", "transformers"):  # found and not loaded: only the ranks need them
    if importlib.util.find_spec(_name) is None:
        pytest.skip(f"models need {_name}, which is not installed", allow_module_level=True)

Reports = list[dict[str, dict[str, Any]]]  # by rank, type and model


@pytest.fixture(scope="module", params=[2, 4])
def reports(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reports:
    """Check all models once for each number of ranks, in bfloat16 too where there are few."""
    meeting = tmp_path_factory.mktemp("models") / "meeting"
    dtypes = ["fp32", "bf16"] if request.param == 2 else ["fp32"]
    return run_processes(check_models, request.param, str(meeting), dtypes, deadline_s=_DEADLINE_S)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_logits_are_those_of_one_process(reports: Reports, model: str) -> None:
    differences = [rank["fp32"][model]["logits"] for rank in reports]
    print(f"largest differences by rank: {differences}")
    assert all(one <= LOGITS_ERROR_MAX for one in differences)


def test_the_same_tokens_are_generated(reports: Reports, model: str) -> None:
    assert [rank["fp32"][model]["tokens_equal"] for rank in reports] == [1.0] * len(reports)


def test_gradients_are_those_of_one_process(reports: Reports, model: str) -> None:
    for rank in reports:
        report = rank["fp32"][model]
        print(f"differences {report['gradients']} of {report['gradient_sizes']}")
        assert set(report["gradients"]) == KINDS
        assert all(one <= GRADIENTS_ERROR_MAX for one in report["gradients"].values())
        assert min(report["gradient_sizes"].values()) >= GRADIENT_SIZE_MIN


def test_activation_checkpointing_changes_no_bit_of_the_gradients(
    reports: Reports, model: str
) -> None:
    assert [rank["fp32"][model]["recomputed"] for rank in reports] == [0.0] * len(reports)


def test_each_rank_holds_its_experts_only(reports: Reports, model: str) -> None:
    shares = [rank["fp32"][model]["expert_share"] for rank in reports]
    assert shares == [1 / len(reports)] * len(reports)


def test_sparse_blocks_differ_by_rounding(reports: Reports, model: str) -> None:
    for rank in reports:
        for dtype, of_models in rank.items():
            print(f"{dtype}: {of_models[model]['blocks']}")
            kinds = {"sums", "tokens", "weights", "gate_up_proj", "down_proj"}
            errors = of_models[model]["blocks"]
            assert set(errors) == kinds
            assert all(one <= BLOCKS_ERROR_MAX[dtype] for one in errors.values())


def test_the_example_finds_no_failure_either(reports: Reports, model: str) -> None:
    for rank in reports:
        assert not any(of_models[model]["failures"] for of_models in rank.values())


def test_the_example_runs_by_one_command() -> None:
    command = [sys.executable, str(EXAMPLE), "--ranks", "2", "--models", "mixtral"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["mixtral, rank 0", "mixtral, rank 1"]
    assert all("50% of the experts" in line and line.endswith(", ok") for line in lines)


def test_the_example_refuses_ranks_among_which_experts_cannot_be_divided() -> None:
    command = [sys.executable, str(EXAMPLE), "--ranks", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_DEADLINE_S, check=False)
    assert done.returncode == 2
    assert "--ranks 3 does not divide 8" in done.stderr
