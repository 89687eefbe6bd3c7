"""Nonsense for every argument of the API: it works, or is refused by name, and does no harm.

MEP_TEST_EXAMPLES=N draws so many calls for each test, and others each time; by default few, always
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mooncake_ep as ep
from model import check_dispatched
from nonsense import (
    EVERY_ARRAY,
    EVERY_SCALAR,
    HIDDEN,
    NEVER,
    SCALARS,
    TOKENS,
    TOPK,
    Nonsense,
    NotApplicable,
    arrays,
    examples,
    in_arena,
    is_named,
    scalar,
    scalars,
)
from test_topology import unpack

pytestmark = pytest.mark.filterwarnings("ignore:the matrix subclass")

BF16, FP8 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
MAX_TOKENS, EXPERTS = 4, 4  # of each rank
TIMEOUT_S = 0.05  # of calls that may mask a rank which the other does not
SHAPE: dict[str, Any] = {
    "max_tokens": MAX_TOKENS,
    "hidden": HIDDEN,
    "experts": EXPERTS,
    "topk": TOPK,
    "threads": 1,
}


def try_call(where: str, call: Callable[[], Any]) -> list[Any]:
    """Return what a call gives, or nothing if it refuses, by name, the argument ``where`` says."""
    argument = where[where.index("(") + 1 : -1].partition(".")[0]
    try:
        return [call()]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        if not is_named(argument, error):
            raise AssertionError(f"{where} is refused by {said}") from error
        return []


# ---- Calls without arrays ------------------------------------------------------------------------


class Objects:
    """What the calls below need besides their arguments."""

    def __init__(self, folder: Path) -> None:
        self.topology = ep.Topology.read(unpack("one_gpu", folder))
        self.text = self.topology.text
        self.group = ep.Group.single(timeout_s=1.0)
        self.buffer = ep.Buffer(self.group, **SHAPE)
        self.world = ep.World(1)

    def close(self) -> None:
        assert self.topology.text == self.text
        assert self.group.all_gather(b"x") == [b"x"]
        self.buffer.close()
        self.group.close()
        self.world.close()

    def make_buffer(self, **given: Any) -> None:
        ep.Buffer(**{"group": self.group, **SHAPE, **given}).close()

    def join_by_id(self, **given: Any) -> None:
        unique_id = ep.create_unique_id()
        default = {"unique_id": unique_id, "rank": 0, "rank_count": 1}
        try:
            ep.Group.from_unique_id(**{**default, "timeout_s": 0.01, **given}).close()
        except ep.EpTimeoutError:  # it waits for the ranks that it was told of
            pass
        finally:
            ep.destroy_unique_id(unique_id)

    def join_by_world(self, **given: Any) -> None:
        ep.Group.from_world(**{"world": self.world, "rank": 0, **given}).close()

    def join_by_callback(self, **given: Any) -> None:
        default = {"all_gather": lambda data: [data], "rank": 0, "rank_count": 1}
        ep.Group.from_callback(**{**default, **given}).close()

    def join_by_torch(self, **given: Any) -> None:
        pytest.importorskip("torch")
        ep.Group.from_torch(**given).close()

    def update(self, **given: Any) -> None:
        with ep.Group.single() as group, ep.Buffer(group, **SHAPE):
            group.update(**{"all_gather": lambda data: [data], "timeout_s": 0.01, **given})

    def set_timeout(self, timeout_s: Any) -> None:
        self.group.timeout_s = timeout_s

    def set_mask(self, mask: Any) -> None:
        self.buffer.mask = mask


COLLECTIVES = ("all_gather", "all_to_all", "all_to_all_on_stream")
SIZES = (*SHAPE, "payloads", "rounds_in_flight", "fp32_partials", "max_sms")
# Each call, with one argument given, and the arguments.
CALLS: dict[str, tuple[Callable[..., Any], tuple[str, ...]]] = {
    "World": (lambda _, **given: ep.World(**given).close(), ("rank_count",)),
    "Group.single": (
        lambda _, **given: ep.Group.single(**given).close(),
        ("backend", "device_id", "timeout_s", "disable_p2p"),
    ),
    "Group.from_unique_id": (
        Objects.join_by_id,
        ("unique_id", "rank", "rank_count", "active_ranks"),
    ),
    "Group.from_world": (Objects.join_by_world, ("world", "rank", "active_ranks")),
    "Group.from_callback": (
        Objects.join_by_callback,
        (*COLLECTIVES, "rank", "rank_count", "active_ranks"),
    ),
    "Group.from_mpi": (lambda _, **given: ep.Group.from_mpi(**given).close(), ("comm",)),
    "Group.from_torch": (Objects.join_by_torch, ("process_group",)),
    "what all_gather returns": (
        lambda _, all_gather: ep.Group.from_callback(
            lambda data: all_gather, rank=0, rank_count=1
        ).close(),
        ("all_gather",),
    ),
    "what all_gather returns of a rank": (
        lambda _, all_gather: ep.Group.from_callback(
            lambda data: [all_gather], rank=0, rank_count=1
        ).close(),
        ("all_gather",),
    ),
    "backend_info": (lambda _, **given: ep.backend_info(**given), ("backend",)),
    "create_unique_id": (
        lambda _, **given: ep.destroy_unique_id(ep.create_unique_id(**given)),
        ("address",),
    ),
    "destroy_unique_id": (lambda _, **given: ep.destroy_unique_id(**given), ("unique_id",)),
    "Group.transport": (lambda objects, **given: objects.group.transport(**given), ("peer",)),
    "Group.all_gather": (lambda objects, **given: objects.group.all_gather(**given), ("data",)),
    "Group.update": (
        Objects.update,
        (*COLLECTIVES, "active_ranks", "unique_id", "world", "timeout_s", "disable_p2p"),
    ),
    "Group.timeout_s": (Objects.set_timeout, ("timeout_s",)),
    "Buffer.mask": (Objects.set_mask, ("mask",)),
    "Buffer.peer_counters": (
        lambda objects, **given: objects.buffer.peer_counters(**given),
        ("peer",),
    ),
    "Buffer": (Objects.make_buffer, ("group", *SIZES)),
    "Buffer.query_sizes": (
        lambda _, **given: ep.Buffer.query_sizes(**{"rank_count": 1, **SHAPE, **given}),
        ("rank_count", *SIZES),
    ),
    "Topology.read": (lambda _, **given: ep.Topology.read(**given), ("root",)),
    "Topology.load": (lambda _, **given: ep.Topology.load(**given), ("saved",)),
    "Topology.apply_smi": (
        lambda objects, **given: objects.topology.apply_smi(
            **{"tool": "nvidia-smi", "matrix": "", **given}
        ),
        ("tool", "matrix"),
    ),
    "Topology.nic": (
        lambda objects, **given: objects.topology.nic(**{"gpu": 0, **given}),
        ("gpu", "only"),
    ),
}


@pytest.fixture
def objects(tmp_path: Path) -> Iterator[Objects]:
    """Lend them, and check that they still work."""
    lent = Objects(tmp_path)
    yield lent
    lent.close()


def call_with(objects: Objects, where: str, value: Any) -> Any:
    call, _, argument = where[:-1].partition("(")
    return CALLS[call][0](objects, **{argument: value})


def is_left_out(where: str, value: Any) -> bool:
    """Tell whether a call would not tell anything.

    It may ask somebody where a host is, which takes seconds, or raise what the caller's own
    all_gather() raised.
    """
    if where == "create_unique_id(address)":
        return isinstance(value, str) and value != "\ud800"
    return where.endswith("(all_gather)") and value is object


@pytest.mark.parametrize("call", CALLS)
def test_each_argument_works_or_is_refused_by_name(objects: Objects, call: str) -> None:
    places = [f"{call}({argument})" for argument in CALLS[call][1]]
    for where in places:
        for value in SCALARS:
            if not is_left_out(where, value):
                try_call(where, partial(call_with, objects, where, value))

    @examples(100)
    @given(st.sampled_from(places), st.text() | st.integers() | st.floats() | st.binary())
    def check(where: str, value: Any) -> None:
        if not is_left_out(where, value):
            try_call(where, partial(call_with, objects, where, value))

    check()


def test_a_text_with_a_nul_is_refused() -> None:
    with pytest.raises(ValueError, match=r"address .* NUL"):
        ep.create_unique_id("127.0.0.1\0evil")
    with pytest.raises(ValueError, match=r"saved .* NUL"):
        ep.Topology.load("\0garbage")


def test_a_closed_world_says_so() -> None:
    world = ep.World(1)
    world.close()
    with ep.Group.single() as group:
        with pytest.raises(ep.EpError, match="world"):
            ep.Group.from_world(world, rank=0)
        with pytest.raises(ep.EpError, match="world"):
            group.update(world=world)


# ---- Rounds --------------------------------------------------------------------------------------


class Ranks:
    """A buffer of each rank, all used by one thread: who sends does not wait."""

    def __init__(self, count: int) -> None:
        def join(rank: int) -> ep.Buffer:
            group = ep.Group.from_world(self.world, rank=rank, timeout_s=10.0)
            return ep.Buffer(group, **{**SHAPE, "experts": EXPERTS * count})

        self.count, self.rounds = count, 0
        self.world = ep.World(count)
        with ThreadPoolExecutor(count) as pool:
            self.buffers = list(pool.map(join, range(count)))

    def close(self) -> None:
        for buffer in self.buffers:
            buffer.close()
            buffer.group.close()
        self.world.close()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def inputs(self) -> dict[str, Any]:
        """Make a rank's arguments of a dispatch, whose sums are exact; each in its own arena."""
        self.rounds += 1
        rng = np.random.default_rng(self.rounds)
        x, topk_idx = in_arena(BF16, (TOKENS, HIDDEN)), in_arena(np.int64, (TOKENS, TOPK))
        topk_weights = in_arena(np.float32, (TOKENS, TOPK))
        experts = np.tile(np.arange(EXPERTS * self.count), (TOKENS, 1))
        x[:] = rng.integers(-8, 9, x.shape)
        topk_idx[:] = rng.permuted(experts, axis=1)[:, :TOPK]
        topk_weights[:] = 1
        return {"x": x, "topk_idx": topk_idx, "topk_weights": topk_weights}

    def valid(self, argument: str) -> np.ndarray:
        """Make an array for an argument that is not in inputs()."""
        rows = MAX_TOKENS * self.count
        made = {
            "x": lambda: in_arena(BF16, (EXPERTS, rows, HIDDEN)),
            "x_scales": lambda: in_arena(np.float32, (TOKENS, 1)),
            "active_ranks": lambda: in_arena(np.int32, (self.count,)),
            "out": lambda: in_arena(BF16, (TOKENS, HIDDEN)),
            "out.x": lambda: in_arena(BF16, (EXPERTS, rows, HIDDEN)),
            "out.scales": lambda: in_arena(np.float32, (EXPERTS, rows, 1)),
            "out.count": lambda: in_arena(np.int32, (EXPERTS,)),
            "out.src_info": lambda: in_arena(np.int32, (EXPERTS, rows)),
            "out.layout_range": lambda: in_arena(np.int64, (EXPERTS, self.count)),
        }[argument]()
        if argument == "active_ranks":
            made[:] = 1
        if argument == "x":
            made[:] = np.random.default_rng(self.rounds).integers(-8, 9, made.shape)
        return made

    def dispatch(self) -> tuple[list[dict[str, Any]], list[ep.Dispatched]]:
        inputs = [self.inputs() for _ in self.buffers]
        sent = [
            buffer.dispatch(**one, send_only=True)
            for buffer, one in zip(self.buffers, inputs, strict=True)
        ]
        return inputs, [pending.receive() for pending in sent]

    def expect_exact_round(self) -> None:
        """Run a round whose experts are identities and whose weights are 1."""
        inputs, received = self.dispatch()
        counted = sum(int(one.count.sum()) for one in received)
        assert counted == self.count * TOKENS * TOPK
        sent = [
            buffer.combine(one.x, one, send_only=True)
            for buffer, one in zip(self.buffers, received, strict=True)
        ]
        for given_, pending in zip(inputs, sent, strict=True):
            assert pending.receive().tobytes() == (given_["x"] * BF16.type(TOPK)).tobytes()

    def call_all(self, where: str, calls: list[partial[Any]]) -> list[Any]:
        """Let the first rank make a call; if it is not refused, the others too. What they give."""
        results: list[Any] = []
        for rank, call in enumerate(calls):
            result = try_call(where, call)
            assert result or rank == 0, f"{where}: only rank {rank} refuses it"
            if not result:
                break
            for name, array in outputs_of(call).items():
                if isinstance(array, np.ndarray):
                    assert array.flags.writeable, name
                    assert name == "active_ranks" or array.shape == self.valid(name).shape, name
            results += result
        pending = (ep.PendingDispatch, ep.PendingCombine)
        return [one.receive() if isinstance(one, pending) else one for one in results]


def outputs_of(call: partial[Any]) -> dict[str, Any]:
    """Name the arrays of the caller that a call writes to."""
    out, active_ranks = (call.keywords.get(name) for name in ("out", "active_ranks"))
    if not isinstance(out, ep.Dispatched):
        return {"out": out, "active_ranks": active_ranks}
    names = ("x", "scales", "count", "src_info", "layout_range")
    return {f"out.{name}": getattr(out, name) for name in names} | {"active_ranks": active_ranks}


def spoil_dispatch(ranks: Ranks, argument: str, nonsense: Nonsense) -> dict[str, Any]:
    """Make a rank's arguments of a dispatch, one of them nonsense."""
    arguments = ranks.inputs()
    _, _, member = argument.partition(".")
    made_here = argument in DISPATCH_ARRAYS and argument not in arguments
    valid = ranks.valid(argument) if made_here else arguments.get(argument)
    value = nonsense.make(valid, dict(arguments))
    arguments |= {"send_only": ranks.count > 1, "timeout_s": TIMEOUT_S}
    if argument == "x_scales":
        arguments["x"] = (arguments["x"].astype(FP8), value)
    elif member:
        names = ("x", "scales", "count", "src_info", "layout_range")
        made = {name: ranks.valid(f"out.{name}") for name in names}
        arguments["out"] = ep.Dispatched(**{**made, "scales": None, member: value})
    else:
        arguments[argument] = value
    # The others follow it, so that it is what is wrong; as far as it may be right.
    if argument in ("x", "topk_idx") and isinstance(value, np.ndarray) and value.ndim == 2:
        tokens, topk = min(len(value), 2 * MAX_TOKENS), TOPK
        if argument == "topk_idx":
            topk = min(value.shape[1], 2 * TOPK)
        else:
            arguments["topk_idx"] = np.resize(arguments["topk_idx"], (tokens, topk))
        arguments["topk_weights"] = np.resize(arguments["topk_weights"], (tokens, topk))
    return arguments


DISPATCH_ARRAYS = (
    *("x", "x_scales", "topk_idx", "topk_weights", "active_ranks"),
    *("out.x", "out.scales", "out.count", "out.src_info", "out.layout_range"),
)
DISPATCH_SCALARS = ("quant", "scale_layout", "timeout_s", "stream", "handle", "out")
COMBINE_ARRAYS = ("x", "out", "active_ranks")
COMBINE_SCALARS = ("handle", "timeout_s", "stream")
# Where one thread serves two ranks, nobody may wait for what the other has not sent.
DISPATCH_ALONE, COMBINE_ALONE = ("send_only",), ("send_only", "topk_weights")


def dispatch_nonsense(ranks: Ranks, argument: str, nonsense: Nonsense) -> None:
    """Call dispatch() with it on all ranks, and compare what they receive if they take it."""
    with contextlib.suppress(NotApplicable):
        given_ = [spoil_dispatch(ranks, argument, nonsense) for _ in ranks.buffers]
        received = ranks.call_all(
            f"Buffer.dispatch({argument})",
            [partial(b.dispatch, **one) for b, one in zip(ranks.buffers, given_, strict=True)],
        )
        assert not received or repr(nonsense) not in NEVER
        x, topk_idx = ([one[name] for one in given_] for name in ("x", "topk_idx"))
        if argument in ("x", "topk_idx") and isinstance(x[0], np.ndarray):
            for buffer, one in zip(ranks.buffers, received, strict=bool(received)):
                assert len(x[0]) <= MAX_TOKENS
                assert topk_idx[0].shape[1] <= TOPK
                check_dispatched(one, x, topk_idx, buffer.group, EXPERTS * ranks.count)
        ranks.expect_exact_round()


def combine_nonsense(ranks: Ranks, argument: str, nonsense: Nonsense) -> None:
    """Call combine() with it on all ranks; x has to mean the same as a copy of it without gaps."""
    inputs, received = ranks.dispatch()
    calls = []
    for buffer, valid, one in zip(ranks.buffers, inputs, received, strict=True):
        arguments = {"x": one.x, "handle": one, "send_only": ranks.count > 1}
        arguments["timeout_s"] = TIMEOUT_S
        if argument in COMBINE_ARRAYS:
            valid[argument] = ranks.valid(argument)
        with contextlib.suppress(NotApplicable):
            arguments[argument] = nonsense.make(valid.get(argument), valid)
            calls.append(partial(buffer.combine, **arguments))
    sums = ranks.call_all(f"Buffer.combine({argument})", calls)
    assert not sums or repr(nonsense) not in NEVER
    if sums and argument == "x" and isinstance(calls[0].keywords["x"], np.ndarray):
        for call in calls:
            call.keywords["x"] = np.array(call.keywords["x"])
        again = ranks.call_all("Buffer.combine(x)", calls)
        assert [one.tobytes() for one in sums] == [one.tobytes() for one in again]
    ranks.expect_exact_round()


def draws(of_arrays: tuple[str, ...], of_scalars: tuple[str, ...]) -> Any:
    """Draw an argument, and nonsense for it."""
    return st.tuples(st.sampled_from(of_arrays), arrays) | st.tuples(
        st.sampled_from((*of_arrays, *of_scalars)), scalars
    )


def test_dispatch_works_or_refuses_each_argument_by_name_and_goes_on() -> None:
    with Ranks(1) as ranks:
        for argument in DISPATCH_ARRAYS:
            for nonsense in EVERY_ARRAY:
                dispatch_nonsense(ranks, argument, nonsense)
        for argument in (*DISPATCH_ARRAYS, *DISPATCH_SCALARS, *DISPATCH_ALONE):
            for nonsense in EVERY_SCALAR:
                dispatch_nonsense(ranks, argument, nonsense)


def test_combine_works_or_refuses_each_argument_by_name_and_goes_on() -> None:
    with Ranks(1) as ranks:
        for argument in (*COMBINE_ARRAYS, "topk_weights"):
            for nonsense in EVERY_ARRAY:
                combine_nonsense(ranks, argument, nonsense)
        for argument in (*COMBINE_ARRAYS, *COMBINE_SCALARS, *COMBINE_ALONE):
            for nonsense in EVERY_SCALAR:
                combine_nonsense(ranks, argument, nonsense)


def test_ranks_dispatch_or_refuse_alike_and_go_on() -> None:
    with Ranks(2) as ranks:

        @examples(1500)
        @given(draws(DISPATCH_ARRAYS, DISPATCH_SCALARS))
        def check(drawn: tuple[str, Nonsense]) -> None:
            dispatch_nonsense(ranks, *drawn)

        check()


def test_ranks_combine_or_refuse_alike_and_go_on() -> None:
    with Ranks(2) as ranks:

        @examples(1000)
        @given(draws(COMBINE_ARRAYS, COMBINE_SCALARS))
        def check(drawn: tuple[str, Nonsense]) -> None:
            combine_nonsense(ranks, *drawn)

        check()


def test_handles_of_other_buffers_are_refused() -> None:
    with Ranks(1) as ranks, Ranks(1) as others, Ranks(1) as closed:
        strangers = [closed.dispatch()[1][0], others.dispatch()[1][0]]
        closed.close()
        for stranger in (ep.Dispatched(None, None, None), *strangers):
            for handle in (stranger, stranger.handle):
                dispatch_nonsense(ranks, "handle", scalar(handle))
                combine_nonsense(ranks, "handle", scalar(handle))


def test_receive_refuses_a_stream_and_goes_on() -> None:
    with Ranks(1) as ranks:
        for value in SCALARS:
            if value is not None:
                pending = ranks.buffers[0].dispatch(**ranks.inputs(), send_only=True)
                assert not try_call("receive(stream)", lambda: pending.receive(value))  # noqa: B023
                pending.receive()
        ranks.expect_exact_round()


def test_what_is_closed_says_so_whatever_it_is_given() -> None:
    with Ranks(1) as ranks:
        buffer = ranks.buffers[0]
        received = ranks.dispatch()[1][0]
        buffer.close()
        for value in SCALARS:
            for call in (
                lambda: buffer.dispatch(value, value, value),  # noqa: B023
                lambda: buffer.combine(value, value, value),  # noqa: B023
                lambda: buffer.combine(received.x, received, timeout_s=value),  # noqa: B023
            ):
                with pytest.raises(ep.EpError, match="closed"):
                    call()
        buffer.group.close()
        with pytest.raises(ep.EpError, match="closed"):
            buffer.group.transport(0)
