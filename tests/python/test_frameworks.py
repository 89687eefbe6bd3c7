"""The same rounds with the arrays of every framework."""

from __future__ import annotations

import gc
import sys
from typing import Any

import numpy as np
import pytest

import mooncake_ep as ep
from model import check_dispatched, combine, relative_error, routing
from ranks import Rank, run_processes, run_threads

HIDDEN, EXPERTS, TOPK = 256, 4, 2
SHAPE = {"max_tokens": 8, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK}
ALL_PAYLOADS = ["bf16", "fp16", "fp32", "fp8"]
ERROR_MAX = {"bfloat16": 4e-3, "float16": 1e-3, "float32": 1e-6}


class Torch:
    """Torch tensors."""

    def make(self, array: np.ndarray, dtype: str) -> Any:
        import torch

        return torch.from_numpy(array).to(getattr(torch, dtype))

    def bits(self, array: Any) -> np.ndarray:
        """View an array as NumPy, with the types of ml_dtypes."""
        import ml_dtypes
        import torch

        name = str(array.dtype).removeprefix("torch.")
        if name not in ("bfloat16", "float8_e4m3fn"):
            return np.asarray(array.detach().numpy())
        size = torch.int16 if name == "bfloat16" else torch.uint8
        return np.asarray(array.detach().view(size).numpy()).view(getattr(ml_dtypes, name))

    def is_own(self, array: Any) -> bool:
        import torch

        return isinstance(array, torch.Tensor)


class Jax:
    """JAX arrays."""

    def make(self, array: np.ndarray, dtype: str) -> Any:
        import jax
        import jax.numpy as jnp

        with jax.default_device(jax.local_devices(backend="cpu")[0]):
            return jnp.asarray(array).astype(getattr(jnp, dtype))

    def bits(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def is_own(self, array: Any) -> bool:
        import jax

        # int64 does not exist in JAX by default, so layout_range stays NumPy.
        return isinstance(array, np.ndarray if array.dtype == np.int64 else jax.Array)


class Numpy:
    """NumPy arrays, with ml_dtypes."""

    def make(self, array: np.ndarray, dtype: str) -> Any:
        import ml_dtypes

        return array.astype(getattr(ml_dtypes, dtype, dtype))

    def bits(self, array: Any) -> np.ndarray:
        return np.asarray(array)

    def is_own(self, array: Any) -> bool:
        return isinstance(array, np.ndarray)


FRAMEWORKS = {"torch": Torch(), "jax": Jax(), "numpy": Numpy()}


@pytest.fixture(params=list(FRAMEWORKS))
def name(request: pytest.FixtureRequest) -> str:
    pytest.importorskip(request.param)
    return str(request.param)


def bits_of(framework: Any, received: ep.Dispatched) -> ep.Dispatched:
    """View all arrays of a result as NumPy."""
    scales = None if received.scales is None else framework.bits(received.scales)
    return ep.Dispatched(
        framework.bits(received.x),
        scales,
        framework.bits(received.count),
        framework.bits(received.src_info),
        framework.bits(received.layout_range),
    )


def round_trip(rank: Rank, name: str, dtype: str) -> float:
    """Check a dispatch bit for bit; return the relative error of its combine."""
    framework, rng = FRAMEWORKS[name], np.random.default_rng(5)
    x = [
        framework.make(rng.standard_normal((n, HIDDEN), dtype=np.float32), dtype)
        for n in (6, 3)[: rank.rank_count]
    ]
    idx = [routing(rng, len(rows), EXPERTS, TOPK).astype(np.int32) for rows in x]
    weights = [rng.random((len(rows), TOPK), dtype=np.float32) for rows in x]
    mine = [framework.make(own[rank.rank], str(own[0].dtype)) for own in (idx, weights)]
    bits = [framework.bits(rows) for rows in x]
    with (
        rank.join() as group,
        ep.Buffer(group, **SHAPE, payloads=ALL_PAYLOADS) as buffer,
    ):
        for late in (False, True):
            received = buffer.dispatch(x[rank.rank], mine[0], None if late else mine[1])
            arrays = (received.x, received.count, received.src_info, received.layout_range)
            assert all(framework.is_own(array) for array in arrays)
            assert received.scales is None
            check_dispatched(bits_of(framework, received), bits, idx, group, EXPERTS)
            out = buffer.combine(received.x, received, mine[1] if late else None)
            assert framework.is_own(out)
    identity = [np.zeros((rank.rank_count, 8, HIDDEN)) for _ in range(EXPERTS)]
    for expert in identity:
        for source, rows in enumerate(bits):
            expert[source, : len(rows)] = rows
    expected = combine(identity, idx[rank.rank], weights[rank.rank], rank.rank)
    return relative_error(framework.bits(out), expected)


@pytest.mark.parametrize("dtype", list(ERROR_MAX))
def test_outputs_are_arrays_of_the_caller_s_framework(name: str, dtype: str) -> None:
    errors = run_threads(round_trip, 2, name, dtype)
    assert max(errors) <= ERROR_MAX[dtype], errors


def test_frameworks_work_in_processes(name: str) -> None:
    errors = run_processes(round_trip, 2, name, "bfloat16", deadline_s=90)
    assert max(errors) <= ERROR_MAX["bfloat16"], errors


def cast(rank: Rank, name: str, layout: Any) -> None:
    """Check that a cast gives what NumPy gives, in every framework."""
    framework, rng = FRAMEWORKS[name], np.random.default_rng(6)
    rows = rng.standard_normal((5, HIDDEN), dtype=np.float32)
    idx = routing(rng, 5, EXPERTS, TOPK).astype(np.int32)
    with rank.join() as group, ep.Buffer(group, **SHAPE, payloads=ALL_PAYLOADS) as buffer:
        expected = buffer.dispatch(rows, idx, quant="fp8", scale_layout=layout)
        x = framework.make(rows, "float32")
        got = buffer.dispatch(x, framework.make(idx, "int32"), quant="fp8", scale_layout=layout)
        assert framework.is_own(got.x)
        assert framework.is_own(got.scales)
        assert got.scales.shape == (buffer.local_experts, 8 * group.size, 2)
        if name == "torch":
            assert got.scales.stride(1) == (1 if layout == "column" else 2)
        bits = bits_of(framework, got)
        assert bits.x.dtype == expected.x.dtype
        # Passing the cast rows and their scales on must give the same again.
        for index, count in enumerate(expected.count):
            assert bits.count[index] == count
            assert bits.x[index, :count].tobytes() == expected.x[index, :count].tobytes()
            ours, theirs = bits.scales[index, :count], expected.scales[index, :count]
            assert ours.tobytes() == theirs.tobytes()
        again = buffer.dispatch(
            (framework.make(rows, "float8_e4m3fn"), framework.make(rows[:, :2], "float32")),
            framework.make(idx, "int32"),
        )
        assert framework.bits(again.x).dtype.name == "float8_e4m3fn"
        assert framework.bits(again.count).tolist() == expected.count.tolist()


@pytest.mark.parametrize("layout", ["column", "row"])
def test_casts_are_the_same_in_every_framework(name: str, layout: str) -> None:
    run_threads(cast, 2, name, layout)


def test_pending_rounds_give_the_framework_s_arrays(name: str) -> None:
    framework = FRAMEWORKS[name]
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        rows = np.ones((2, HIDDEN), np.float32)
        pending = buffer.dispatch(
            framework.make(rows, "bfloat16"),
            framework.make(np.zeros((2, 1), np.int32), "int32"),
            send_only=True,
        )
        gc.collect()
        received = pending.receive()
        assert framework.is_own(received.x)
        out = buffer.combine(received.x, received, send_only=True).receive()
        assert framework.is_own(out)
        assert (framework.bits(out) == 1).all()


def test_torch_tensors_that_require_grad_may_be_inputs() -> None:
    torch = pytest.importorskip("torch")
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
        weights = torch.nn.Parameter(torch.ones(2, 1))
        received = buffer.dispatch(x, torch.zeros(2, 1, dtype=torch.int64), weights)
        assert not received.x.requires_grad
        out = torch.empty(2, HIDDEN, dtype=torch.bfloat16)
        assert buffer.combine(received.x, received, out=out) is out
        assert torch.equal(out, x)


def test_torch_views_with_gaps_between_rows_are_taken_as_they_are() -> None:
    torch = pytest.importorskip("torch")
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        wide = torch.randn(4, 3 * HIDDEN).bfloat16()
        x = wide[:, HIDDEN : 2 * HIDDEN]
        received = buffer.dispatch(x, torch.zeros(4, 1, dtype=torch.int32))
        assert torch.equal(received.x[0, :4], x)


def test_jax_arrays_are_refused_as_outputs() -> None:
    pytest.importorskip("jax")
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        x = FRAMEWORKS["jax"].make(np.ones((2, HIDDEN), np.float32), "bfloat16")
        idx = FRAMEWORKS["jax"].make(np.zeros((2, 1), np.int32), "int32")
        received = buffer.dispatch(x, idx)
        with pytest.raises(ValueError, match=r"out\.x: JAX arrays are immutable"):
            buffer.dispatch(x, idx, out=received)
        with pytest.raises(ValueError, match="out: JAX arrays are immutable"):
            buffer.combine(received.x, received, out=x)
        host = np.zeros((2, HIDDEN), x.dtype)
        assert buffer.combine(received.x, received, out=host) is host
        assert (host == 1).all()


def test_no_array_is_kept_alive_or_leaked_by_a_call(name: str) -> None:
    framework = FRAMEWORKS[name]
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        rows = framework.make(np.ones((2, HIDDEN), np.float32), "bfloat16")
        idx = framework.make(np.zeros((2, 1), np.int32), "int32")
        buffer.dispatch(rows, idx)
        before = sys.getrefcount(rows), sys.getrefcount(idx)
        for _ in range(10):
            received = buffer.dispatch(rows, idx)
            buffer.combine(received.x, received)
        del received
        gc.collect()
        assert (sys.getrefcount(rows), sys.getrefcount(idx)) == before


# ---- Anything with __dlpack__ --------------------------------------------------------------------


class Foreign:
    """An array of an unknown framework, from before DLPack 1.0."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array

    def __dlpack__(self, *, stream: Any = None) -> Any:
        assert stream is None
        return self.array.__dlpack__()


class Standard(Foreign):
    """The same, with the array API standard."""

    def __array_namespace__(self) -> Any:
        return self

    @staticmethod
    def from_dlpack(array: Any) -> Standard:
        return Standard(np.from_dlpack(array))


def test_any_object_with_dlpack_may_be_an_input_and_an_output() -> None:
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE, payloads=["fp32"]) as buffer:
        rows = np.ones((2, HIDDEN), np.float32)
        x, idx = Foreign(rows), Foreign(np.zeros((2, 1), np.int32))
        with pytest.raises(TypeError, match="outputs like a Foreign cannot be allocated"):
            buffer.dispatch(x, idx)
        outputs = Foreign(np.empty((4, 8, HIDDEN), np.float32)), Foreign(np.empty(4, np.int32))
        received = buffer.dispatch(x, idx, out=ep.Dispatched(outputs[0], None, outputs[1]))
        assert outputs[1].array.tolist() == [2, 0, 0, 0]
        sums = Foreign(np.empty((2, HIDDEN), np.float32))
        buffer.combine(received.x, received, out=sums)
        assert (sums.array == 1).all()


class Modern(Foreign):
    """The same, of DLPack 1."""

    def __dlpack__(self, **options: Any) -> Any:
        return self.array.__dlpack__(**options)


def test_read_only_memory_is_refused_as_an_output_only() -> None:
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE, payloads=["fp32"]) as buffer:
        rows = np.ones((2, HIDDEN), np.float32)
        rows.flags.writeable = False
        idx = Modern(np.zeros((2, 1), np.int32))
        shape = (4, 8, HIDDEN)
        out = ep.Dispatched(Modern(np.empty(shape, "f4")), None, Modern(np.empty(4, "i4")))
        received = buffer.dispatch(Modern(rows), idx, out=out)
        with pytest.raises(ValueError, match="out: the array is read-only"):
            buffer.combine(received.x, received, out=Modern(rows))
        sums = Modern(np.empty((2, HIDDEN), np.float32))
        buffer.combine(received.x, received, out=sums)
        assert (sums.array == 1).all()


def test_what_a_framework_cannot_lend_is_named() -> None:
    torch = pytest.importorskip("torch")
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        x = Modern(torch.ones(2, HIDDEN, dtype=torch.bfloat16, requires_grad=True))
        with pytest.raises(ValueError, match=r"x: .*gradient"):
            buffer.dispatch(x, np.zeros((2, 1), np.int32))
        with pytest.raises(ValueError, match=r"topk_idx: .*storage$"):
            buffer.dispatch(np.ones((2, HIDDEN), "f2"), torch.zeros(2, 1).to_sparse())


def test_an_array_api_framework_gets_its_own_arrays() -> None:
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE, payloads=["fp32"]) as buffer:
        x = Standard(np.ones((2, HIDDEN), np.float32))
        received = buffer.dispatch(x, np.zeros((2, 1), np.int32))
        assert isinstance(received.x, Standard)
        out = buffer.combine(received.x, received)
        assert isinstance(out, Standard)
        assert (out.array == 1).all()


def test_frameworks_may_be_mixed() -> None:
    torch = pytest.importorskip("torch")
    with ep.Group.single() as group, ep.Buffer(group, **SHAPE) as buffer:
        x = torch.ones(2, HIDDEN, dtype=torch.bfloat16)
        received = buffer.dispatch(x, np.zeros((2, 1), np.int64), np.ones((2, 1), np.float32))
        assert torch.equal(buffer.combine(received.x, received), x)
