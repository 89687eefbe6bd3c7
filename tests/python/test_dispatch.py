"""Dispatch and combine against the oracle."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mooncake_ep as ep
from devices import make_buffer, make_single
from model import check_dispatched, combine, dispatch, relative_error, routing
from ranks import Rank, Runner, run_ranks

pytestmark = pytest.mark.any_backend

BF16 = np.dtype(ml_dtypes.bfloat16)
PAYLOADS = {BF16: "bf16", np.dtype("f2"): "fp16", np.dtype("f4"): "fp32"}
# Of a round trip, relative L2 against float64: rounding of rows, of partial sums and of the sum.
ERROR_MAX = {BF16: 4e-3, np.dtype("f2"): 1e-3, np.dtype("f4"): 1e-6}
# A round may be so small that a value gets the worst of its three roundings (all terms are of one
# sign, so nothing cancels): of the expert's row, of the partial sum, and of the sum of those.
ERROR_BOUND = {**ERROR_MAX, BF16: (1 + 2.0**-9) ** 3 - 1}


def make_round(
    seed: int, tokens: list[int], dtype: Any, *, hidden: int, experts: int, topk: int
) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """Make (x, topk_idx, topk_weights) of all ranks; the same on each."""
    rng = np.random.default_rng(seed)
    x = [rng.standard_normal((count, hidden)).astype(dtype) for count in tokens]
    topk_idx = [routing(rng, count, experts, topk) for count in tokens]
    weights = [rng.random((count, topk), dtype=np.float32) for count in tokens]
    return x, topk_idx, weights


def expert_outputs(
    x: list[np.ndarray], topk_idx: list[np.ndarray], experts: int
) -> list[np.ndarray]:
    """Row of (source, token) at each expert: its input, scaled by the expert's number + 1."""
    hidden = x[0].shape[1]
    y = [np.zeros((len(x), max(len(rows) for rows in x), hidden)) for _ in range(experts)]
    for expert, rows in enumerate(dispatch(topk_idx, experts)):
        for source, token in rows:
            y[expert][source, token] = apply_expert(x[source][token], expert)
    return y


def apply_expert(row: np.ndarray, expert: int) -> np.ndarray:
    """Scale by a power of two, which rounds in no type."""
    return row * np.asarray(2.0 ** (expert % 3), row.dtype)


def run_experts(received: ep.Dispatched, group: ep.Group, local: int) -> np.ndarray:
    """Apply this rank's experts to the rows they received; the others stay as they are."""
    y = np.array(received.x)
    for index, count in enumerate(np.asarray(received.count)):
        y[index, :count] = apply_expert(y[index, :count], group.rank * local + index)
    return y


def round_trip(
    rank: Rank,
    seed: int,
    tokens: list[int],
    dtype: Any = BF16,
    hidden: int = 64,
    experts: int = 4,
    topk: int = 2,
    weights_at: str = "dispatch",
    change: Any = None,
    topk_idx: list[np.ndarray] | None = None,
    **options: Any,
) -> float:
    """Check one dispatch bit for bit; return the relative error of the combine after it."""
    x, random, weights = make_round(seed, tokens, dtype, hidden=hidden, experts=experts, topk=topk)
    if topk_idx is None:
        topk_idx = random if change is None else [change(choices) for choices in random]
    mine = topk_idx[rank.rank], weights[rank.rank]
    options = {"payloads": [PAYLOADS[np.dtype(dtype)]], **options}
    with (
        rank.join() as group,
        make_buffer(
            group, max_tokens=max(1, *tokens), hidden=hidden, experts=experts, topk=topk, **options
        ) as buffer,
    ):
        given = mine[1] if weights_at == "dispatch" else None
        received = buffer.dispatch(x[rank.rank], mine[0], given)
        check_dispatched(received, x, topk_idx, group, experts)
        y = run_experts(received, group, buffer.local_experts)
        late = mine[1] if weights_at == "combine" else None
        out = buffer.combine(y, received, late)
        used = None if weights_at == "none" else mine[1]
    expected = combine(expert_outputs(x, topk_idx, experts), mine[0], used, rank.rank)
    assert out.dtype == dtype
    assert out.shape == (tokens[rank.rank], hidden)
    return relative_error(out, expected)


@pytest.mark.parametrize("weights_at", ["dispatch", "combine", "none"])
@pytest.mark.parametrize("dtype", list(PAYLOADS), ids=str)
def test_a_round_trip_is_as_exact_as_its_type(run: Runner, dtype: Any, weights_at: str) -> None:
    errors = run(round_trip, 2, 1, [7, 5], dtype, 64, 4, 2, weights_at)
    assert max(errors) <= ERROR_MAX[dtype], errors


@pytest.mark.parametrize("rank_count", [1, 2, 4, 8])
def test_any_number_of_ranks(rank_count: int) -> None:
    tokens = [(5 * rank) % 8 for rank in range(rank_count)]
    errors = run_ranks(round_trip, rank_count, 6, tokens, BF16, 256, 16, 4)
    assert max(errors) <= ERROR_MAX[BF16], errors


def with_partials(rank: Rank, fp32: bool) -> float:
    return round_trip(rank, 2, [16, 16], BF16, 64, 8, 8, fp32_partials=fp32)


def test_fp32_partials_make_a_bf16_sum_no_worse() -> None:
    rounded, exact = run_ranks(with_partials, 2, False), run_ranks(with_partials, 2, True)
    assert max(exact) <= max(rounded) <= ERROR_MAX[BF16]


def no_choices(choices: np.ndarray) -> np.ndarray:
    return np.full_like(choices, -1)


def half_of_them(choices: np.ndarray) -> np.ndarray:
    return np.where(np.indices(choices.shape).sum(0) % 2 == 0, -1, choices)


def first_expert(choices: np.ndarray) -> np.ndarray:
    return np.zeros_like(choices)


def last_rank(choices: np.ndarray) -> np.ndarray:
    return np.where(choices % 2 == 0, 3, -1)


def as_int32(choices: np.ndarray) -> np.ndarray:
    return choices.astype(np.int32)


@pytest.mark.parametrize(
    "change",
    [no_choices, half_of_them, first_expert, last_rank, as_int32],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("tokens", [[3, 3], [0, 4], [1, 0, 6, 2], [0, 0]], ids=str)
def test_any_routing_and_any_number_of_tokens(tokens: list[int], change: Any) -> None:
    errors = run_ranks(round_trip, len(tokens), 3, tokens, BF16, 64, 4, 2, "dispatch", change)
    assert max(errors) <= ERROR_MAX[BF16], errors


@pytest.mark.parametrize("topk", [1, 2, 3, 8, 31, 32])
def test_up_to_32_choices(topk: int) -> None:
    errors = run_ranks(round_trip, 2, 4, [5, 9], np.dtype("f4"), 64, 32, topk)
    assert max(errors) <= ERROR_MAX[np.dtype("f4")], errors


def test_an_id_outside_the_experts_counts_as_none_and_is_counted() -> None:
    with (
        make_single() as group,
        make_buffer(group, max_tokens=4, hidden=64, experts=4, topk=3) as buffer,
    ):
        x = np.ones((2, 64), BF16)
        topk_idx = np.array([[4, -2, 1], [-1, 2**40, -(2**40)]])
        received = buffer.dispatch(x, topk_idx)
        assert received.count.tolist() == [0, 1, 0, 0]
        assert buffer.counters() == ep.BufferCounters(1, 0, 4, 0)
        out = buffer.combine(received.x, received)
        assert out.astype("f4").tolist() == [[1.0] * 64, [0.0] * 64]
        assert buffer.counters().combines_sent == 1


def test_an_expert_named_twice_gets_the_token_once_and_the_weights_add_up() -> None:
    with (
        make_single() as group,
        make_buffer(group, max_tokens=4, hidden=64, experts=4, topk=3) as buffer,
    ):
        received = buffer.dispatch(
            np.ones((1, 64), BF16), np.array([[2, 1, 2]]), np.array([[1, 2, 4]], np.float32)
        )
        assert received.count.tolist() == [0, 1, 1, 0]
        assert set(buffer.combine(received.x, received)[0].tolist()) == {7.0}


def test_rows_of_x_and_out_may_be_further_apart() -> None:
    with (
        make_single() as group,
        make_buffer(group, max_tokens=4, hidden=64, experts=4, topk=2) as buffer,
    ):
        wide = np.arange(4 * 128, dtype=np.float32).reshape(4, 128).astype(BF16)
        x, topk_idx = wide[:, 64:], np.zeros((4, 1), np.int32)
        received = buffer.dispatch(x, topk_idx)
        assert received.x[0, :4].tobytes() == x.tobytes()
        out = np.zeros((4, 128), BF16)
        result = buffer.combine(received.x, received, out=out[:, :64])
        assert result.base is out
        assert result.tobytes() == x.tobytes()
        assert not out[:, 64:].any()


def test_rows_that_hold_no_token_are_left_as_they_were() -> None:
    with (
        make_single() as group,
        make_buffer(group, max_tokens=4, hidden=64, experts=4, topk=1) as buffer,
    ):
        x, topk_idx = np.ones((1, 64), BF16), np.zeros((1, 1), np.int32)
        out = buffer.dispatch(x, topk_idx)
        out.x[:] = 5
        out.src_info[:] = -7
        buffer.dispatch(x, topk_idx, out=out)
        assert (out.x[0, 1:] == 5).all()
        assert (out.x[1:] == 5).all()
        assert out.src_info.tolist() == [[0, -7, -7, -7]] + [[-7] * 4] * 3


# ---- Any shape -----------------------------------------------------------------------------------


@st.composite
def rounds(draw: st.DrawFn) -> tuple[Any, ...]:
    ranks = draw(st.integers(1, 4))
    experts = ranks * draw(st.integers(1, 4))
    topk = draw(st.integers(1, 6))
    tokens = draw(st.lists(st.integers(0, 7), min_size=ranks, max_size=ranks))
    ids = st.integers(-2, experts + 1)
    choices = [
        np.array(draw(st.lists(ids, min_size=n * topk, max_size=n * topk)), np.int64).reshape(
            n, topk
        )
        for n in tokens
    ]
    hidden = 8 * draw(st.integers(1, 20))
    dtype = draw(st.sampled_from(list(PAYLOADS)))
    weights_at = draw(st.sampled_from(["dispatch", "combine", "none"]))
    threads = draw(st.integers(1, 2))
    return ranks, experts, choices, hidden, dtype, weights_at, threads


def drawn_round(rank: Rank, drawn: tuple[Any, ...]) -> float:
    _, experts, choices, hidden, dtype, weights_at, threads = drawn
    return round_trip(
        rank,
        5,
        [len(ids) for ids in choices],
        dtype,
        hidden,
        experts,
        choices[0].shape[1],
        weights_at,
        topk_idx=choices,
        threads=threads,
    )


@given(rounds())
def test_any_round_is_as_the_model_says(drawn: tuple[Any, ...]) -> None:
    ranks, dtype = drawn[0], drawn[4]
    assert max(run_ranks(drawn_round, ranks, drawn)) <= ERROR_BOUND[dtype]
