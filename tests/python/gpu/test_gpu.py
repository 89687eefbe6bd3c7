"""The front end on GPUs: the same bits as on the CPU, whatever the framework and the stream.

Ranks are threads with a GPU each if there are two GPUs, and otherwise processes that share one.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import mooncake_ep as ep
from model import routing
from mooncake_ep._streams import stream_finder
from ranks import Rank, Runner, run_processes, run_threads

_INFO = ep.backend_info("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _INFO.available, reason=f"no CUDA backend: {_INFO.reason}"),
]
torch = pytest.importorskip("torch")

HIDDEN, EXPERTS, TOPK, TOKENS = 1024, 8, 3, 32
SHAPE = {"max_tokens": TOKENS, "hidden": HIDDEN, "experts": EXPERTS, "topk": TOPK}
PAYLOADS = ["bf16", "fp16", "fp32", "fp8"]
# (type of x, quant, whether the weights come at combine)
CASES = [
    ("bfloat16", None, False),
    ("bfloat16", None, True),
    ("float16", None, False),
    ("float32", None, True),
    ("bfloat16", "fp8", False),
    ("bfloat16", "fp8_pow2", True),
]
REPLAYS = 20


@pytest.fixture
def run() -> Runner:
    """Run a function on two ranks."""
    return run_threads if _INFO.device_count > 1 else run_processes


def join(rank: Rank, device: str) -> ep.Group:
    """Join on the CPU, or on this rank's GPU."""
    device_id = rank.rank % _INFO.device_count if device == "cuda" else 0
    return rank.join(backend=device, device_id=device_id)


def place(group: ep.Group) -> Any:
    """Return where torch has this rank's tensors."""
    return torch.device("cpu") if group.backend == "cpu" else torch.device("cuda", group.device_id)


def bits(array: Any) -> bytes:
    """Return the bytes of a tensor, once the current stream has written them."""
    return bytes(array.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())


def valid_bits(received: ep.Dispatched) -> list[bytes]:
    """Return the bytes of all that a dispatch says it has written."""
    found = [bits(received.count), bits(received.layout_range)]
    for expert, count in enumerate(received.count.tolist()):
        found += [bits(received.x[expert, :count]), bits(received.src_info[expert, :count])]
        if received.scales is not None:
            found.append(bits(received.scales[expert, :count]))
    return found


def inputs(seed: int, rank: int, where: Any, dtype: str = "bfloat16") -> tuple[Any, Any, Any]:
    """Make x, topk_idx and topk_weights, with another number of tokens for each rank and seed."""
    rng = np.random.default_rng([seed, rank])
    count = int(rng.integers(0, TOKENS + 1)) if seed else TOKENS
    idx = routing(rng, count, EXPERTS, TOPK)
    idx[rng.random(idx.shape) < 0.2] = -1
    weights = rng.random((count, TOPK), dtype=np.float32)
    x = torch.from_numpy(rng.standard_normal((count, HIDDEN), dtype=np.float32))
    moved = [torch.from_numpy(array).to(where) for array in (idx, weights)]
    return x.to(getattr(torch, dtype)).to(where), moved[0], moved[1]


# ---- The same bits as on the CPU -----------------------------------------------------------------


def rounds(rank: Rank, device: str) -> list[bytes]:
    """Run all cases; return all that came back."""
    found: list[bytes] = []
    with join(rank, device) as group, ep.Buffer(group, **SHAPE, payloads=PAYLOADS) as buffer:
        for seed, (dtype, quant, late) in enumerate(CASES):
            x, idx, weights = inputs(seed, group.rank, place(group), dtype)
            received = buffer.dispatch(x, idx, None if late else weights, quant=quant)
            assert received.x.device == place(group)
            y = received.x.to(x.dtype)
            out = buffer.combine(y, received, weights if late else None)
            assert (out.device, out.dtype) == (x.device, x.dtype)
            found += [*valid_bits(received), bits(out)]
            # The same again, given all scales and outputs.
            if quant == "fp8":
                cast = received.x.new_zeros(x.shape, dtype=x.dtype).to(received.x.dtype)
                scales = torch.full((len(x), HIDDEN // 128), 0.5, device=x.device)
                received = buffer.dispatch((cast, scales), idx, scale_layout="row")
                found += valid_bits(received)
        group.barrier()
    return found


def test_a_gpu_gives_the_bits_of_the_cpu(run: Runner) -> None:
    assert run(rounds, 2, "cuda") == run_threads(rounds, 2, "cpu")


def test_processes_on_gpus_give_the_bits_of_the_cpu() -> None:
    assert run_processes(rounds, 2, "cuda", deadline_s=120) == run_threads(rounds, 2, "cpu")


# ---- Topology ------------------------------------------------------------------------------------


def test_the_topology_knows_the_uuids_of_the_gpus() -> None:
    seen = [torch.cuda.get_device_properties(i).uuid for i in range(torch.cuda.device_count())]
    assert {f"GPU-{uuid}" for uuid in seen} <= {gpu.uuid for gpu in ep.Topology.read().gpus}


# ---- Graphs --------------------------------------------------------------------------------------


def replays(rank: Rank) -> None:
    """Replay one captured round with changing inputs; each has to be what single calls give."""
    with (
        join(rank, "cuda") as group,
        torch.cuda.device(group.device_id),
        ep.Buffer(group, **SHAPE) as buffer,
    ):
        x, idx, weights = inputs(0, group.rank, place(group))
        received = buffer.dispatch(x, idx, weights)
        out = buffer.combine(received.x, received)
        torch.cuda.synchronize()
        group.barrier()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            buffer.dispatch(x, idx, weights, out=received, handle=received.handle)
            buffer.combine(received.x, received, out=out)
        for seed in range(REPLAYS):
            rng = np.random.default_rng([seed, group.rank])
            x.copy_(torch.from_numpy(rng.standard_normal(x.shape, dtype=np.float32)))
            idx.copy_(torch.from_numpy(rng.integers(-1, EXPERTS, idx.shape)))
            graph.replay()
            found = [*valid_bits(received), bits(out)]
            again = buffer.dispatch(x, idx, weights)
            sums = buffer.combine(again.x, again)
            assert found == [*valid_bits(again), bits(sums)], seed
        torch.cuda.synchronize()
        group.barrier()


def test_a_captured_round_follows_its_inputs() -> None:
    run_processes(replays, 2, deadline_s=120)


# ---- Streams, and rounds in two halves -----------------------------------------------------------


def hook(rank: Rank) -> None:
    """Send on one stream, receive on another one from another thread."""
    with (
        join(rank, "cuda") as group,
        torch.cuda.device(group.device_id),
        ep.Buffer(group, **SHAPE) as buffer,
    ):
        x, idx, weights = inputs(0, group.rank, place(group))
        whole = buffer.dispatch(x, idx, weights)
        expected = [*valid_bits(whole), bits(buffer.combine(whole.x, whole))]
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        first.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(first):
            assert stream_finder(x)(group.device_id) == first.cuda_stream
            pending = buffer.dispatch(x, idx, weights, send_only=True)
        results: list[Any] = []

        def receive() -> None:
            with torch.cuda.device(group.device_id), torch.cuda.stream(second):
                second.wait_stream(first)
                results.append(pending.receive())

        thread = threading.Thread(target=receive)
        thread.start()
        thread.join()
        (received,) = results
        first.wait_stream(second)
        with torch.cuda.stream(first):
            halves = buffer.combine(received.x, received, send_only=True)
        second.wait_stream(first)
        out = halves.receive(stream=second.cuda_stream)
        torch.cuda.current_stream().wait_stream(second)
        assert [*valid_bits(received), bits(out)] == expected
        with pytest.raises(ep.EpError, match="received already"):
            pending.receive()
        torch.cuda.synchronize()
        group.barrier()


def test_a_round_is_received_on_another_stream_by_another_thread(run: Runner) -> None:
    run(hook, 2)


def in_flight(rank: Rank) -> None:
    """Send two rounds whose inputs nobody else keeps, and receive them in the other order."""
    with join(rank, "cuda") as group, ep.Buffer(group, **SHAPE) as buffer:
        expected = []
        for seed in (1, 2):
            whole = buffer.dispatch(*inputs(seed, group.rank, place(group)))
            expected.append([*valid_bits(whole), bits(buffer.combine(whole.x, whole))])
        pending = [
            buffer.dispatch(*inputs(seed, group.rank, place(group)), send_only=True)
            for seed in (1, 2)
        ]
        gc.collect()
        garbage = [torch.full((TOKENS, HIDDEN), 7.0, device=place(group)) for _ in range(8)]
        with pytest.raises(ep.EpError, match="in flight"):
            buffer.dispatch(*inputs(3, group.rank, place(group)))
        second, first = pending[1].receive(), pending[0].receive()
        del garbage
        found = [[*valid_bits(one), bits(buffer.combine(one.x, one))] for one in (first, second)]
        assert found == expected
        group.barrier()


def test_two_rounds_may_be_in_flight(run: Runner) -> None:
    run(in_flight, 2)


# ---- Failures ------------------------------------------------------------------------------------


def lost(rank: Rank) -> None:
    """Dispatch without rank 1, which does not call; the mask tells."""
    with join(rank, "cuda") as group, ep.Buffer(group, **SHAPE) as buffer:
        if group.rank == 0:
            active = torch.ones(2, dtype=torch.int32, device=place(group))
            x, idx, weights = inputs(0, 0, place(group))
            received = buffer.dispatch(x, idx, weights, active_ranks=active, timeout_s=0.2)
            assert active.tolist() == [1, 0]
            own = idx.cpu().numpy()
            for expert, count in enumerate(received.count.tolist()):
                assert count == (own == expert).any(axis=1).sum()
        group.barrier()


def test_a_lost_rank_is_masked_in_active_ranks(run: Runner) -> None:
    run(lost, 2)


# ---- One rank ------------------------------------------------------------------------------------


@pytest.fixture
def buffer() -> Iterator[ep.Buffer]:
    """Make a buffer of one rank on the first GPU."""
    with (
        ep.Group.single(backend="cuda") as group,
        ep.Buffer(group, **SHAPE, payloads=PAYLOADS) as made,
    ):
        yield made
        torch.cuda.synchronize()


def host_inputs(dtype: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Make the inputs of one rank as NumPy arrays."""
    x, idx, weights = inputs(0, 0, torch.device("cpu"), "float32")
    return x.numpy().astype(dtype), idx.numpy().astype(np.int32), weights.numpy()


def host_round(arrays: tuple[np.ndarray, ...], quant: Any) -> tuple[ep.Dispatched, np.ndarray]:
    """Run a round on the CPU; its experts return ones for FP8 rows, and otherwise the rows."""
    x = arrays[0]
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **SHAPE, payloads=PAYLOADS) as cpu_buffer,
    ):
        received = cpu_buffer.dispatch(*arrays, quant=quant)
        y = received.x if quant is None else np.ones(received.x.shape, x.dtype)
        return received, cpu_buffer.combine(y, received)


def check(
    received: ep.Dispatched, out: Any, expected: tuple[ep.Dispatched, Any], take: Any
) -> None:
    """Compare a round with that of the CPU; ``take`` makes NumPy arrays."""
    rows, sums = expected
    count, x, src_info = take(received.count), take(received.x), take(received.src_info)
    assert count.tolist() == rows.count.tolist()
    for expert, n in enumerate(count):
        assert x[expert, :n].tobytes() == rows.x[expert, :n].tobytes()
        assert src_info[expert, :n].tolist() == rows.src_info[expert, :n].tolist()
        if rows.scales is not None:
            scales = take(received.scales)
            assert scales[expert, :n].tobytes() == rows.scales[expert, :n].tobytes()
    assert take(out).tobytes() == sums.tobytes()


@pytest.mark.parametrize(
    ("name", "quant"), [("bfloat16", None), ("float32", None), ("bfloat16", "fp8")]
)
def test_cupy_arrays(buffer: ep.Buffer, name: str, quant: Any) -> None:
    cupy = pytest.importorskip("cupy")
    ml_dtypes = pytest.importorskip("ml_dtypes")
    arrays = host_inputs(getattr(ml_dtypes, name, name))
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        x, idx, weights = (cupy.asarray(array) for array in arrays)
        assert stream_finder(x)(0) == stream.ptr
        received = buffer.dispatch(x, idx, weights, quant=quant)
        y = received.x if quant is None else cupy.ones(received.x.shape, x.dtype)
        out = buffer.combine(y, received)
        assert all(isinstance(array, cupy.ndarray) for array in (received.x, received.count, out))
        assert received.x.dtype == (x.dtype if quant is None else np.uint8)
        check(received, out, host_round(arrays, quant), cupy.asnumpy)
        if quant is not None:  # the bytes may be sent on, with scales by column
            count = int(received.count[0])
            rows, scales = received.x[0, :count], received.scales[0, :count]
            again = buffer.dispatch((rows, cupy.ascontiguousarray(scales)), idx[:count])
            assert again.x.dtype == np.uint8


@pytest.mark.parametrize(("name", "quant"), [("bfloat16", None), ("bfloat16", "fp8")])
def test_jax_arrays(buffer: ep.Buffer, name: str, quant: Any) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    arrays = host_inputs(getattr(jax.numpy, name))
    x, idx, weights = (jax.numpy.asarray(array) for array in arrays)
    for _ in range(3):
        received = buffer.dispatch(x * 1, idx, weights, quant=quant)
        y = received.x if quant is None else jax.numpy.ones(received.x.shape, x.dtype)
        out = buffer.combine(y, received)
        assert all(isinstance(array, jax.Array) for array in (received.x, received.count, out))
        assert received.layout_range is None
        check(received, out, host_round(arrays, quant), np.asarray)
    pending = buffer.dispatch(x, idx, weights, quant=quant, send_only=True)
    check(pending.receive(), out, host_round(arrays, quant), np.asarray)


def test_jax_inputs_and_torch_outputs(buffer: ep.Buffer) -> None:
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("JAX sees no GPU")
    arrays = host_inputs(np.float32)
    like = buffer.dispatch(*(torch.from_numpy(array).cuda() for array in arrays))
    received = buffer.dispatch(*(jax.numpy.asarray(array) for array in arrays), out=like)
    out = buffer.combine(jax.dlpack.from_dlpack(received.x), received)
    expected = host_round(arrays, None)
    check(received, out, expected, lambda array: np.asarray(getattr(array, "cpu", lambda: array)()))


def test_an_explicit_stream_is_used(buffer: ep.Buffer) -> None:
    stream = torch.cuda.Stream()
    x, idx, weights = inputs(0, 0, torch.device("cuda", 0))
    whole = buffer.dispatch(x, idx, weights)
    stream.wait_stream(torch.cuda.current_stream())
    received = buffer.dispatch(x, idx, weights, stream=stream.cuda_stream)
    out = buffer.combine(received.x, received, stream=stream.cuda_stream)
    stream.synchronize()
    assert valid_bits(received) == valid_bits(whole)
    assert bits(out) == bits(buffer.combine(whole.x, whole, stream=0))


def test_arrays_elsewhere_are_refused_by_name(buffer: ep.Buffer) -> None:
    here = inputs(0, 0, torch.device("cuda", 0))
    for index, name in enumerate(("x", "topk_idx", "topk_weights")):
        arguments = [array.cpu() if i == index else array for i, array in enumerate(here)]
        with pytest.raises(ValueError, match=rf"{name} is on device 1:0 .*backend cannot read"):
            buffer.dispatch(*arguments)
    received = buffer.dispatch(*here)
    with pytest.raises(ValueError, match="out is on device 1:0"):
        buffer.combine(received.x, received, out=torch.empty_like(here[0], device="cpu"))
    with pytest.raises(ValueError, match="x is on device 1:0"):
        buffer.dispatch(np.zeros((2, HIDDEN), np.float32), np.zeros((2, 1), np.int32))
    if _INFO.device_count > 1:
        with pytest.raises(ValueError, match="x is on device 2:1"):
            buffer.dispatch(here[0].to("cuda:1"), *here[1:])
    assert valid_bits(buffer.dispatch(*here)) == valid_bits(received)


def test_a_gpu_array_is_refused_by_a_cpu_group() -> None:
    arrays = inputs(0, 0, torch.device("cuda", 0))
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **SHAPE) as buffer,
        pytest.raises(ValueError, match="x is on device 2:0"),
    ):
        buffer.dispatch(*arrays)


def test_counters_wait_for_the_device(buffer: ep.Buffer) -> None:
    x, idx, weights = inputs(0, 0, torch.device("cuda", 0))
    idx[0, 0] = EXPERTS
    buffer.dispatch(x, idx, weights)
    assert buffer.counters().invalid_expert_ids == 1
