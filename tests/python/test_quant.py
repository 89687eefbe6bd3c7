"""Rows that travel as float8_e4m3fn with a scale for each 128 channels."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from devices import make_buffer
from model import check_dispatched, combine, relative_error, routing
from ranks import Rank, Runner

pytestmark = pytest.mark.any_backend

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
GROUP = 128
FP8_MAX = 448.0
ERROR_MAX = 3e-2  # relative L2 of a round trip


def scales_of(x: np.ndarray, quant: str) -> np.ndarray:
    """Scales as mooncake_ep.h defines them, [T, H/128]."""
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    scales = np.maximum(np.abs(groups).max(-1), np.float32(1e-4)) / np.float32(FP8_MAX)
    return np.exp2(np.ceil(np.log2(scales))) if quant == "fp8_pow2" else scales


def dequantize(x: Any, scales: Any) -> np.ndarray:
    """Multiply rows by their scales, in float32."""
    wide = np.repeat(np.asarray(scales), GROUP, axis=-1)
    return np.asarray(x).astype(np.float32) * wide


def cast(rank: Rank, quant: str, layout: str, dtype: Any) -> float:
    """Check the scales and rows of a quantised dispatch; return the round trip's relative error."""
    hidden, experts, topk = 256, 4, 2
    rng = np.random.default_rng(7)
    x = [rng.standard_normal((n, hidden)).astype(dtype) * np.asarray(3, dtype) for n in (6, 4)]
    x[0][1] = 0
    x[1][2, :GROUP] = 1e-6
    topk_idx = [routing(rng, len(rows), experts, topk) for rows in x]
    weights = [rng.random((len(rows), topk), dtype=np.float32) for rows in x]
    with (
        rank.join() as group,
        make_buffer(
            group,
            max_tokens=8,
            hidden=hidden,
            experts=experts,
            topk=topk,
            payloads=["bf16", "fp16", "fp32", "fp8"],
        ) as buffer,
    ):
        mine = topk_idx[rank.rank], weights[rank.rank]
        received = buffer.dispatch(x[rank.rank], *mine, quant=quant, scale_layout=layout)
        local, rows = buffer.local_experts, 2 * 8
        assert received.x.dtype == FP8
        assert received.scales.shape == (local, rows, hidden // GROUP)
        strides = (rows * 2, 1, rows) if layout == "column" else (rows * 2, 2, 1)
        assert received.scales.strides == tuple(4 * stride for stride in strides)
        y = np.zeros((local, rows, hidden), np.float32)
        for index in range(local):
            for row in range(received.count[index]):
                begins = received.layout_range[index] >> 32
                source = int(np.flatnonzero(begins <= row)[-1]) if begins[1] <= row else 0
                token = received.src_info[index, row]
                expected = scales_of(x[source][token : token + 1], quant)[0]
                got = received.scales[index, row]
                np.testing.assert_allclose(got, expected, rtol=0 if "pow2" in quant else 1e-6)
                y[index, row] = dequantize(received.x[index, row], got)
                error = np.abs(y[index, row] - x[source][token].astype(np.float32))
                # Half a step of a 3-bit mantissa, or of the smallest subnormal number.
                bound = np.abs(x[source][token].astype(np.float32)) / 16
                assert (error <= bound + np.repeat(got, GROUP) * 2.0**-10).all()
        out = buffer.combine(y, received)
    values = [np.zeros((2, 8, hidden)) for _ in range(experts)]
    for expert in values:
        for source, tokens in enumerate(x):
            expert[source, : len(tokens)] = tokens
    return relative_error(out, combine(values, mine[0], mine[1], rank.rank))


@pytest.mark.parametrize("layout", ["column", "row"])
@pytest.mark.parametrize("quant", ["fp8", "fp8_pow2"])
def test_a_cast_has_the_scales_of_the_header(run: Runner, quant: str, layout: str) -> None:
    errors = run(cast, 2, quant, layout, BF16)
    assert max(errors) <= ERROR_MAX, errors


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_any_type_may_be_cast(run: Runner, dtype: str) -> None:
    errors = run(cast, 2, "fp8", "column", np.dtype(dtype))
    assert max(errors) <= ERROR_MAX, errors


def pass_on(rank: Rank, as_bytes: bool, by_column: bool) -> None:
    """Dispatch rows that the caller has cast; they and their scales arrive unchanged."""
    hidden, experts, topk = 256, 4, 2
    rng = np.random.default_rng(8)
    x = [rng.standard_normal((n, hidden)).astype(FP8) for n in (5, 3)]
    scales = [rng.random((n, 2), dtype=np.float32) for n in (5, 3)]
    topk_idx = [routing(rng, len(rows), experts, topk) for rows in x]
    own_x, own_scales = x[rank.rank], scales[rank.rank]
    with (
        rank.join() as group,
        make_buffer(
            group, max_tokens=8, hidden=hidden, experts=experts, topk=topk, payloads=["fp8"]
        ) as buffer,
    ):
        given = (
            own_x.view(np.uint8) if as_bytes else own_x,
            np.asfortranarray(own_scales) if by_column else own_scales,
        )
        received = buffer.dispatch(given, topk_idx[rank.rank])
        assert received.x.dtype == (np.uint8 if as_bytes else FP8)
        check_dispatched(received, x, topk_idx, group, experts)
        received.x = received.scales
        check_dispatched(received, scales, topk_idx, group, experts)


@pytest.mark.parametrize("by_column", [False, True])
@pytest.mark.parametrize("as_bytes", [False, True])
def test_rows_that_are_cast_already_pass_unchanged(
    run: Runner, as_bytes: bool, by_column: bool
) -> None:
    run(pass_on, 2, as_bytes, by_column)
