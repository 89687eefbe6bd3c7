"""benchmarks/peers on the CPU: its exchange by torch.distributed gives what this library gives."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ranks import Rank, RankError, run_processes

torch = pytest.importorskip("torch", reason="benchmarks/peers need torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("torch was built without gloo", allow_module_level=True)

_FOLDER = Path(__file__).parents[2] / "benchmarks" / "peers"
sys.path.insert(0, str(_FOLDER))

import compare  # noqa: E402
from all_to_all import AllToAll  # noqa: E402
from exchange import Inputs, Received, Shape, expert_outputs, random_inputs  # noqa: E402
from ours import Ours  # noqa: E402

_TIMEOUT_S = 120
# Partial sums and weights are rounded to bf16.
_TOLERANCE = 1e-2
# Half a step of FP8, relative to the value, and between subnormal numbers.
_FP8_RELATIVE, _FP8_ABSOLUTE = 2.0**-4, 2.0**-10


@contextlib.contextmanager
def joined(rank: Rank, store: str, payload: str, tokens: int) -> Iterator[Shape]:
    """Be in a process group of this run."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        store=torch.distributed.FileStore(store, rank.rank_count),
        rank=rank.rank,
        world_size=rank.rank_count,
    )
    try:
        yield Shape(
            rank=rank.rank,
            rank_count=rank.rank_count,
            tokens=tokens,
            hidden=256,
            experts=6,
            topk=3,
            payload=payload,
            device=torch.device("cpu"),
        )
    finally:
        # The process may be used again.
        torch.distributed.destroy_process_group()


def awkward_inputs(shape: Shape) -> Inputs:
    """Make inputs where choices are missing or repeated, and a token has none."""
    inputs = random_inputs(shape, seed=5)
    inputs.topk_idx[1::3, 0] = -1
    inputs.topk_idx[2::3, 2] = inputs.topk_idx[2::3, 1]
    inputs.topk_idx[-1:] = -1
    return inputs


def valid_rows(received: Received) -> tuple[Any, Any]:
    """Return the rows that count, and their scales."""
    valid = torch.arange(received.x.shape[1]) < received.count.unsqueeze(1)
    return received.x[valid], None if received.scales is None else received.scales[valid]


def check_rows(received: Received, expected: Received) -> None:
    """Compare rows bit by bit, those that were cast to FP8 within what two ways to cast differ."""
    assert torch.equal(received.count, expected.count)
    (x, scales), (expected_x, expected_scales) = valid_rows(received), valid_rows(expected)
    if scales is None:
        assert torch.equal(x.view(torch.int16), expected_x.view(torch.int16))
        return
    torch.testing.assert_close(scales, expected_scales, rtol=1e-6, atol=0)
    torch.testing.assert_close(
        x.float(), expected_x.float(), rtol=2 * _FP8_RELATIVE, atol=2 * _FP8_ABSOLUTE
    )
    same = (x.view(torch.uint8) == expected_x.view(torch.uint8)).float().mean()
    assert same > 0.99


def exchange_both_ways(rank: Rank, store: str, payload: str, tokens: int) -> int:
    """Compare two rounds of all-to-all with ours; returns the rows that this rank received."""
    with joined(rank, store, payload, tokens) as shape:
        inputs = awkward_inputs(shape)
        ours, theirs = Ours(shape, inputs), AllToAll(shape, inputs)
        expected = ours.received()
        y = expert_outputs(shape, expected)
        expected_out = ours.combine(y).float()
        for _ in range(2):
            theirs.dispatch()
            check_rows(theirs.received(), expected)
            out = theirs.combine(y).float()
            error = torch.linalg.norm(out - expected_out)
            assert error <= _TOLERANCE * torch.linalg.norm(expected_out)
            assert not out[-1].any()
        # The bare exchange leaves all as it was: it moves the same bytes again.
        _, bare, _ = theirs.variants(y)
        for call in bare.calls.values():
            call()
        theirs.dispatch()
        check_rows(theirs.received(), expected)
        ours.close()
        return int(expected.count.sum())


@pytest.mark.parametrize(("rank_count", "payload"), [(1, "bf16"), (2, "fp8"), (3, "bf16")])
def test_all_to_all_gives_what_we_give(tmp_path: Path, rank_count: int, payload: str) -> None:
    rows = run_processes(exchange_both_ways, rank_count, str(tmp_path / "store"), payload, 17)
    assert all(rows)


def test_all_to_all_works_where_nothing_is_sent(tmp_path: Path) -> None:
    # The only token of each rank has no expert.
    rows = run_processes(exchange_both_ways, 2, str(tmp_path / "store"), "bf16", 1)
    assert rows == [0, 0]


def contest_with_a_liar(rank: Rank, store: str) -> None:
    """Let a contestant take part whose sums are wrong on one rank."""
    with joined(rank, store, "bf16", 8) as shape:
        inputs = random_inputs(shape, seed=5)
        reference = compare._Reference()
        clock = compare.timing.Clock(rounds=1, warmup=0, device=shape.device)
        compare._contest(Ours(shape, inputs), shape, clock, reference)
        liar = AllToAll(shape, inputs)
        honest = liar.combine
        liar.combine = lambda y: honest(y) * (1 + 0.1 * rank.rank)
        compare._contest(liar, shape, clock, reference)


def test_wrong_sums_are_found_before_anything_is_timed(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"gloo, rank 1: its sums .* error of 0\.1"):
        run_processes(contest_with_a_liar, 2, str(tmp_path / "store"))


# ---- The program ---------------------------------------------------------------------------------

_SMALL = ("--tokens", "16", "--hidden", "128", "--experts", "6", "--topk", "2", "--rounds", "3")


def run_compare(*arguments: str, device: str = "cpu") -> subprocess.CompletedProcess[str]:
    """Run the program in a process of its own."""
    return subprocess.run(
        [sys.executable, str(_FOLDER / "compare.py"), "--device", device, *arguments],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


def check_table(text: str, names: tuple[str, ...], bases: tuple[str, ...]) -> None:
    """Check that there is a row for each contestant and operation, with ratios to the bases."""
    number, ratio = r" +([0-9.]+)", r" +([0-9.]+|-)"
    pattern = rf"^(\w.*?) +(dispatch|combine|dispatch\+combine){number * 2}{ratio * 2}$"
    rows = re.findall(pattern, text, re.MULTILINE)
    operations = ("dispatch", "combine", "dispatch+combine")
    assert [row[:2] for row in rows] == [(name, each) for name in names for each in operations]
    medians = {row[:2]: float(row[2]) for row in rows}
    for name, operation, median, late, *ratios in rows:
        assert 0 < float(median) <= float(late), name
        for base, shown in zip(bases, ratios, strict=False):
            # A row before that of the base has nothing to be compared with.
            if shown != "-":
                expected = medians[name, operation] / medians[base, operation]
                # Medians are shown to a tenth of a microsecond, ratios to a hundredth.
                assert float(shown) == pytest.approx(expected, rel=0.02, abs=0.01), name
        assert ratios.count("-") == (2 - len(bases) if name != "ours" else 1)


def test_loops_give_what_we_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOONCAKE_EP_DISABLE_P2P", "1")
    done = run_compare(*_SMALL, "--peers", "loops")
    assert done.returncode == 0, done.stderr
    check_table(done.stdout, ("ours", "loops"), bases=("ours",))


@pytest.mark.parametrize("payload", ["bf16", "fp8"])
def test_compare_prints_a_row_for_each_contestant_and_operation(payload: str) -> None:
    done = run_compare(*_SMALL, "--payload", payload)
    assert done.returncode == 0, done.stderr
    check_table(
        done.stdout,
        ("ours", "gloo", "gloo, bare all-to-all", "gloo, bare, all choices"),
        bases=("ours",),
    )
    assert "mooncake: skipped, NotImplementedError: it needs a GPU" in done.stdout.splitlines()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--peers", "nccl,nothing"), "--peers: 'nothing' is not one of nccl, mooncake"),
        (("--topk", "7"), "--topk 7 is more than --experts 6"),
        (("--ranks", "4"), "multiple of the 4 ranks"),
        (("--payload", "fp8", "--hidden", "136"), "128"),
        (("--rounds", "0"), "--rounds 0"),
    ],
)
def test_compare_refuses_what_the_ranks_would_refuse(
    arguments: tuple[str, ...], words: str
) -> None:
    done = run_compare(*_SMALL, *arguments)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert words in done.stderr.splitlines()[-1]


def test_compare_ends_ranks_that_take_too_long() -> None:
    done = run_compare(*_SMALL, "--rounds", "100000000", "--timeout", "3")
    assert done.returncode == 1
    assert "did not end within 3 s (--timeout)" in done.stdout
