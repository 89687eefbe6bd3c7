"""Every documented error, provoked; the group and the buffer stay usable after each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import mooncake_ep as ep
from devices import make_buffer, make_single
from ranks import Rank, run_ranks

pytestmark = pytest.mark.any_backend

BF16 = np.dtype(ml_dtypes.bfloat16)
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
HIDDEN, ROWS, LOCAL = 128, 4, 4
SHAPE: dict[str, Any] = {"max_tokens": ROWS, "hidden": HIDDEN, "experts": LOCAL, "topk": 2}


@pytest.fixture
def buffer() -> Iterator[ep.Buffer]:
    """Lend a buffer, and check that it still works."""
    with make_single() as group, make_buffer(group, **SHAPE) as lent:
        yield lent
        if not lent.closed and not group.closed:
            received = lent.dispatch(X, IDX)
            assert lent.combine(received.x, received, WEIGHTS).tobytes() == X.tobytes()
            assert group.all_gather(b"x") == [b"x"]


X = np.ones((3, HIDDEN), BF16)
IDX = np.tile(np.array([0, -1]), (3, 1))
WEIGHTS = np.ones((3, 2), np.float32)
SCALES = np.ones((3, HIDDEN // 128), np.float32)
Y = np.ones((LOCAL, ROWS, HIDDEN), BF16)


def unaligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Make an array whose data starts 2 bytes after a multiple of 16."""
    memory = np.zeros(int(np.prod(shape)) * np.dtype(dtype).itemsize + 32, np.uint8)
    start = -memory.ctypes.data % 16 + 2
    return np.ndarray(shape, dtype, memory, start)


def read_only(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array


# Of the cases below, those that are no others with torch's tensors.
NUMPY_ONLY = {
    "x has 9 dimensions": "the limit is that of our description of a NumPy array",
    "x is big-endian": "a tensor has this machine's byte order",
    "x runs backwards": "a tensor has no negative strides",
    "x is read-only": "a tensor can be written to",
    "out is read-only": "a tensor can be written to",
    "active_ranks is read-only": "a tensor can be written to",
    "send_only is neither": "what copies arrays to a device asks for it first",
    "a stream on the CPU": "GPUs have streams",
}


def cases(table: dict[str, Any]) -> list[Any]:
    """List the names of a table's cases; some only for the CPU."""
    return [
        pytest.param(name, marks=pytest.mark.cpu_only(NUMPY_ONLY[name]))
        if name in NUMPY_ONLY
        else name
        for name in table
    ]


INPUTS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "x is a list": (TypeError, "x is a list", {"x": [[1.0]]}),
    "x is None": (TypeError, "x is a NoneType", {"x": None}),
    "topk_idx is a list": (TypeError, "topk_idx is a list", {"topk_idx": [[0, 1]]}),
    "x has 1 dimension": (ValueError, "x has 1 dimensions", {"x": X[0]}),
    "x has 9 dimensions": (ValueError, "x: it has 9", {"x": X.reshape((1,) * 7 + (3, -1))}),
    "x is float64": (ValueError, "x", {"x": X.astype("f8")}),
    "x is int32": (ValueError, "x", {"x": X.astype("i4")}),
    "x is complex": (ValueError, "x", {"x": X.astype("c8")}),
    "x is float8_e5m2": (ValueError, "x", {"x": X.astype(ml_dtypes.float8_e5m2)}),
    "x is big-endian": (ValueError, "byte order", {"x": X.astype(">f4")}),
    "x is float32": (ValueError, "MEP_PAYLOAD_FP32", {"x": X.astype("f4")}),
    "x is too wide": (ValueError, "x has shape", {"x": np.ones((3, 256), BF16)}),
    "x has too many tokens": (
        ValueError,
        "x has 5 tokens",
        {"x": np.ones((5, HIDDEN), BF16), "topk_idx": np.zeros((5, 2), np.int64)},
    ),
    "x is transposed": (ValueError, "x has strides", {"x": np.ones((HIDDEN, 3), BF16).T}),
    "x runs backwards": (ValueError, "stride", {"x": X[::-1]}),
    "x is unaligned": (ValueError, "multiple of", {"x": unaligned((3, HIDDEN), BF16)}),
    "x has unaligned rows": (ValueError, "rows", {"x": np.ones((3, HIDDEN + 4), BF16)[:, :HIDDEN]}),
    "x is fp8 without scales": (ValueError, "x_scales is NULL", {"x": X.astype(FP8)}),
    "x is bf16 with scales": (ValueError, "x_scales is given", {"x": (X, SCALES)}),
    "x is a triple": (ValueError, "x is a tuple of 3", {"x": (X, SCALES, SCALES)}),
    "scales are narrow": (ValueError, "x_scales has shape", {"x": (X.astype(FP8), SCALES[:, :0])}),
    "scales are float64": (ValueError, "x_scales", {"x": (X.astype(FP8), SCALES.astype("f8"))}),
    "x is fp8 with quant": (ValueError, "quant", {"x": (X.astype(FP8), SCALES), "quant": "fp8"}),
    "quant is unknown": (ValueError, "quant 'int8'", {"quant": "int8"}),
    "scale_layout is unknown": (ValueError, "scale_layout 'tiled'", {"scale_layout": "tiled"}),
    "topk_idx is float32": (ValueError, "topk_idx", {"topk_idx": IDX.astype("f4")}),
    "topk_idx is short": (ValueError, "topk_idx has shape", {"topk_idx": IDX[:2]}),
    "topk_idx is too wide": (ValueError, "topk_idx", {"topk_idx": np.zeros((3, 3), np.int64)}),
    "topk_idx has no choice": (ValueError, "topk_idx", {"topk_idx": np.zeros((3, 0), np.int64)}),
    "topk_idx has gaps": (ValueError, "strides", {"topk_idx": np.zeros((3, 4), np.int64)[:, :2]}),
    "topk_weights is float64": (ValueError, "topk_weights", {"topk_weights": WEIGHTS.astype("f8")}),
    "topk_weights is short": (ValueError, "topk_weights", {"topk_weights": WEIGHTS[:2]}),
    "active_ranks is int64": (ValueError, "active_ranks", {"active_ranks": np.ones(1, np.int64)}),
    "active_ranks is short": (ValueError, "active_ranks", {"active_ranks": np.ones(0, np.int32)}),
    "active_ranks is read-only": (
        ValueError,
        "active_ranks: the array is read-only",
        {"active_ranks": read_only(np.ones(1, np.int32))},
    ),
    "quant is a list": (ValueError, r"quant \[\]", {"quant": []}),
    "scale_layout is a list": (ValueError, r"scale_layout \[\]", {"scale_layout": []}),
    "send_only is neither": (TypeError, "send_only is a ndarray", {"send_only": np.ones(2)}),
    "timeout is 0": (ValueError, "timeout_s", {"timeout_s": 0}),
    "timeout is a text": (TypeError, "timeout_s is a str", {"timeout_s": "1"}),
    "a stream on the CPU": (ValueError, "stream 1", {"stream": 1}),
    "handle is a list": (TypeError, "handle is a list", {"handle": []}),
    "out is an array": (TypeError, "out is a ndarray", {"out": X}),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(INPUTS))
def test_dispatch_refuses_wrong_inputs(buffer: ep.Buffer, case: str) -> None:
    error, message, change = INPUTS[case]
    arguments: dict[str, Any] = {"x": X, "topk_idx": IDX, "topk_weights": WEIGHTS, **change}
    with pytest.raises(error, match=message):
        buffer.dispatch(**arguments)
    assert buffer.counters().dispatches_sent == 0


OUTPUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "x has a wrong type": (r"out\.x ", {"x": np.empty((LOCAL, ROWS, HIDDEN), np.float16)}),
    "x has a wrong shape": (r"out\.x ", {"x": np.empty((LOCAL, ROWS + 1, HIDDEN), BF16)}),
    "x has gaps": (r"out\.x ", {"x": np.empty((LOCAL, ROWS, 2 * HIDDEN), BF16)[:, :, :HIDDEN]}),
    "x is unaligned": (r"out\.x\.data", {"x": unaligned((LOCAL, ROWS, HIDDEN), BF16)}),
    "x is read-only": (r"out\.x: .*read-only", {"x": read_only(Y.copy())}),
    "count is int64": (r"out\.count ", {"count": np.empty(LOCAL, np.int64)}),
    "count is long": (r"out\.count ", {"count": np.empty(LOCAL + 1, np.int32)}),
    "src_info is short": (r"out\.src_info ", {"src_info": np.empty((LOCAL, 1), np.int32)}),
    "layout_range is int32": ("out.layout_range", {"layout_range": np.empty((LOCAL, 1), np.int32)}),
    "scales without fp8": (r"out\.scales ", {"scales": np.empty((LOCAL, ROWS, 1), np.float32)}),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(OUTPUTS))
def test_dispatch_refuses_wrong_outputs(buffer: ep.Buffer, case: str) -> None:
    message, change = OUTPUTS[case]
    arrays: dict[str, Any] = {
        "x": np.empty((LOCAL, ROWS, HIDDEN), BF16),
        "scales": None,
        "count": np.empty(LOCAL, np.int32),
        **change,
    }
    with pytest.raises(ValueError, match=message):
        buffer.dispatch(X, IDX, out=ep.Dispatched(**arrays))
    with pytest.raises(TypeError, match=r"out\.count"):
        buffer.dispatch(X, IDX, out=ep.Dispatched(**{**arrays, "x": X, "count": None}))


def test_fp8_outputs_need_scales(buffer: ep.Buffer) -> None:
    out = ep.Dispatched(np.empty((LOCAL, ROWS, HIDDEN), FP8), None, np.empty(LOCAL, np.int32))
    with pytest.raises(ValueError, match=r"out\.scales is NULL"):
        buffer.dispatch(X, IDX, quant="fp8", out=out)


SUMS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "x is a list": (TypeError, "x is a list", {"x": [1]}),
    "x is float32": (ValueError, "x is float32", {"x": Y.astype("f4")}),
    "x is fp8": (ValueError, "x is float8", {"x": Y.astype(FP8)}),
    "x is 2-dimensional": (ValueError, "x has 2 dimensions", {"x": Y[0]}),
    "x has a wrong shape": (ValueError, "x has shape", {"x": Y[:2]}),
    "x has gaps": (ValueError, "x has strides", {"x": Y.repeat(2, 2)[:, :, ::2]}),
    "handle is a string": (TypeError, "handle is a str", {"handle": "h"}),
    "topk_weights is float16": (ValueError, "topk_weights", {"topk_weights": WEIGHTS.astype("f2")}),
    "topk_weights is narrow": (ValueError, "topk_weights", {"topk_weights": WEIGHTS[:, :1].copy()}),
    "out is float16": (ValueError, "out is float16", {"out": np.empty((3, HIDDEN), "f2")}),
    "out is short": (ValueError, "out has shape", {"out": np.empty((2, HIDDEN), BF16)}),
    "out is unaligned": (ValueError, "out.*multiple", {"out": unaligned((3, HIDDEN), BF16)}),
    "out is read-only": (ValueError, "out: .*read-only", {"out": read_only(X.copy())}),
    "timeout is negative": (ValueError, "timeout_s", {"timeout_s": -1}),
    "a stream on the CPU": (ValueError, "stream", {"stream": 0}),
}  # fmt: skip


@pytest.mark.parametrize("case", cases(SUMS))
def test_combine_refuses_wrong_arguments(buffer: ep.Buffer, case: str) -> None:
    error, message, change = SUMS[case]
    received = buffer.dispatch(X, IDX)
    with pytest.raises(error, match=message):
        buffer.combine(**{"x": received.x, "handle": received, **change})
    assert buffer.combine(received.x, received).tobytes() == X.tobytes()


# What a GPU's driver would read memory at.
NO_STREAMS = {-1: ValueError, 2**64: ValueError, 1.0: TypeError, "": TypeError, object(): TypeError}


@pytest.mark.cpu_only("nothing is asked of a GPU")
@pytest.mark.parametrize("stream", NO_STREAMS)
def test_what_is_no_stream_is_refused(
    buffer: Any, monkeypatch: pytest.MonkeyPatch, stream: Any
) -> None:
    pending = buffer.dispatch(X, IDX, send_only=True)
    received = buffer.dispatch(X, IDX)
    refused = pytest.raises(NO_STREAMS[stream], match="stream is")
    with monkeypatch.context() as patch:
        patch.setattr(buffer, "_on_gpu", True)
        with refused:
            buffer.dispatch(X, IDX, stream=stream)
        with refused:
            buffer.combine(received.x, received, stream=stream)
        with refused:
            pending.receive(stream)
    pending.receive()
    assert buffer.counters().dispatches_sent == 2


def test_a_tensor_on_another_device_is_refused(buffer: ep.Buffer) -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises((ValueError, RuntimeError)):
        buffer.dispatch(torch.ones(3, HIDDEN, dtype=torch.bfloat16, device="meta"), IDX)


def test_a_handle_of_another_buffer_is_refused(buffer: ep.Buffer) -> None:
    with make_buffer(buffer.group, **SHAPE) as other:
        received = other.dispatch(X, IDX)
        with pytest.raises(ValueError, match="handle belongs to another buffer"):
            buffer.combine(received.x, received)
        with pytest.raises(ValueError, match="handle belongs to another buffer"):
            buffer.dispatch(X, IDX, handle=received.handle)
    with pytest.raises(ValueError, match="handle belongs to another buffer"):
        buffer.combine(received.x, received)


def test_a_buffer_of_a_closed_group_says_so() -> None:
    group = make_single()
    buffer = make_buffer(group, **SHAPE)
    received = buffer.dispatch(X, IDX)
    group.close()
    for call in (
        lambda: buffer.dispatch(X, IDX),
        lambda: buffer.combine(received.x, received),
    ):
        with pytest.raises(ep.EpError, match="group") as caught:
            call()
        assert caught.value.status == "MEP_INVALID_STATE"
    buffer.close()


def test_a_closed_buffer_says_so(buffer: ep.Buffer) -> None:
    received = buffer.dispatch(X, IDX)
    buffer.close()
    buffer.close()
    for call in (
        lambda: buffer.dispatch(X, IDX),
        lambda: buffer.combine(received.x, received),
        buffer.counters,
    ):
        with pytest.raises(ep.EpError, match="buffer is closed"):
            call()


# ---- Creating a buffer ---------------------------------------------------------------------------

CONFIGS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "no tokens": (ValueError, "max_tokens is 0", {"max_tokens": 0}),
    "too many tokens": (ValueError, "max_tokens is 65537", {"max_tokens": 65537}),
    "half a token": (TypeError, "max_tokens is a float32", {"max_tokens": np.float32(1.5)}),
    "hidden is odd": (ValueError, "hidden", {"hidden": 4}),
    "hidden is not made of groups": (ValueError, "hidden", {"hidden": 64, "payloads": ["fp8"]}),
    "hidden is huge": (ValueError, "hidden", {"hidden": 2**40}),
    "no experts": (ValueError, "experts is 0", {"experts": 0}),
    "too many choices": (ValueError, "topk is 33", {"topk": 33}),
    "unknown payload": (ValueError, "payload 'int8'", {"payloads": ["int8"]}),
    "payloads as one name": (TypeError, "payloads is a str", {"payloads": "bf16"}),
    "payloads as a number": (TypeError, "payloads is a int", {"payloads": 0}),
    "too many rounds": (ValueError, "rounds_in_flight is 9", {"rounds_in_flight": 9}),
    "too many threads": (ValueError, "threads is 257", {"threads": 257}),
    "too few multiprocessors": (ValueError, "max_sms is 2", {"max_sms": 2}),
    "hidden is a float": (TypeError, "hidden is a float", {"hidden": 128.0}),
    "hidden is a string": (TypeError, "hidden is a str", {"hidden": "128"}),
}


@pytest.mark.parametrize("case", list(CONFIGS))
def test_wrong_sizes_are_refused_by_the_buffer_and_by_the_query(
    buffer: ep.Buffer, case: str
) -> None:
    error, message, change = CONFIGS[case]
    with pytest.raises(error, match=message):
        ep.Buffer(buffer.group, **{**SHAPE, **change})
    with pytest.raises(error, match=message):
        ep.Buffer.query_sizes(rank_count=1, **{**SHAPE, **change})


def different(rank: Rank) -> str:
    with rank.join() as group:
        with pytest.raises(ep.EpError) as caught:
            ep.Buffer(group, **{**SHAPE, "hidden": 128 * (1 + group.rank)})
        return caught.value.status


def test_buffers_that_differ_are_a_mismatch_on_every_rank() -> None:
    assert run_ranks(different, 2) == ["MEP_MISMATCH"] * 2
