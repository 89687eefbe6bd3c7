"""Gradients of dispatch and combine, against the same layer in one process in float64."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import mooncake_ep as ep
from ranks import Rank, run_processes, run_threads

torch = pytest.importorskip("torch", reason="autograd needs torch, which is not installed")
checkpoint = pytest.importorskip("torch.utils.checkpoint").checkpoint
autograd = pytest.importorskip("mooncake_ep.autograd")

HIDDEN, INNER = 64, 24
ERROR_MAX = 1e-5  # of float32, absolute; values and gradients are of the order of 1
# Relative L2 errors of what travels in 16 bits: rows are rounded on each way, and the products of
# rounded rows are the gradients of the weights.
RELATIVE_ERROR_MAX = {"bfloat16": 1e-2, "float16": 2e-3}


@dataclass(frozen=True)
class Case:
    """What the ranks' tokens choose."""

    tokens: tuple[int, ...]  # of each rank
    experts: int
    topk: int
    none_share: float = 0.0  # of choices that are -1
    repeats: bool = False  # tokens may name an expert twice
    spare: int = 0  # max_tokens beyond the most tokens
    seed: int = 1


CASES = {
    "one rank": Case((7,), experts=4, topk=2),
    "two ranks": Case((9, 9), experts=8, topk=2),
    "four ranks": Case((6, 3, 8, 5), experts=8, topk=4),
    "K is 1": Case((5, 6), experts=4, topk=1),
    "every expert": Case((4, 4), experts=8, topk=8),
    "more choices than experts": Case((5, 4), experts=2, topk=7, repeats=True),
    "no tokens on a rank": Case((6, 0, 5, 0), experts=4, topk=2),
    "no tokens at all": Case((0, 0), experts=4, topk=2),
    "choices of none": Case((9, 7), experts=8, topk=3, none_share=0.4),
    "nothing but none": Case((4, 3), experts=4, topk=2, none_share=1.0),
    "repeats": Case((9, 7), experts=4, topk=4, repeats=True),
    "repeats and none": Case((8, 5, 0, 9), experts=8, topk=5, repeats=True, none_share=0.3),
    "room for more": Case((3, 5), experts=4, topk=2, spare=11),
    "one expert a rank": Case((6, 6, 6, 6), experts=4, topk=2, spare=1),
}


class Problem:
    """Tokens, choices, weights and experts of all ranks, the same wherever it is made."""

    def __init__(self, case: Case) -> None:
        rng = np.random.default_rng(case.seed)
        self.case = case
        self.x = [self._normal(rng, n, HIDDEN) for n in case.tokens]
        self.idx = [torch.from_numpy(_choices(rng, case, n)) for n in case.tokens]
        self.weights = [_weights(rng, n, case.topk) for n in case.tokens]
        self.first = self._normal(rng, case.experts, HIDDEN, INNER) / HIDDEN**0.5
        self.second = self._normal(rng, case.experts, INNER, HIDDEN) / INNER**0.5
        self.target = [self._normal(rng, n, HIDDEN) for n in case.tokens]

    def _normal(self, rng: np.random.Generator, *shape: int) -> Any:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    def shape(self, *payloads: str) -> dict[str, Any]:
        return {
            "max_tokens": max(self.case.tokens) + self.case.spare or 1,
            "hidden": HIDDEN,
            "experts": self.case.experts,
            "topk": self.case.topk,
            "payloads": payloads or ("fp32",),
        }

    def own_experts(self, rank: int) -> slice:
        local = self.case.experts // len(self.case.tokens)
        return slice(rank * local, (rank + 1) * local)


def _choices(rng: np.random.Generator, case: Case, tokens: int) -> np.ndarray:
    if case.repeats:
        idx = rng.integers(0, case.experts, (tokens, case.topk))
    else:
        order = rng.random((tokens, case.experts)).argsort(axis=1)
        idx = np.ascontiguousarray(order[:, : case.topk])
    idx[rng.random(idx.shape) < case.none_share] = -1
    return idx


def _weights(rng: np.random.Generator, tokens: int, topk: int) -> Any:
    """Make what a router does: those of a token add up to 1."""
    weights = torch.from_numpy(rng.random((tokens, topk), dtype=np.float32))
    return weights / weights.sum(dim=1, keepdim=True)


def leaf(tensor: Any, dtype: Any = None) -> Any:
    return tensor.detach().clone().to(dtype or tensor.dtype).requires_grad_()


def loss_of(out: Any, target: Any) -> Any:
    """Depend on the sums by more than a product, so that gradients depend on the values."""
    return (torch.sin(out) * target).sum()


# ---- The layer in one process --------------------------------------------------------------------

Layer = Callable[[Any, Any, Any], Any]  # x, idx, weights -> sums


def dense_layer(first: Any, second: Any) -> Layer:
    def layer(x: Any, idx: Any, weights: Any) -> Any:
        y = torch.einsum("tei,eih->teh", torch.tanh(torch.einsum("th,ehi->tei", x, first)), second)
        of_expert = torch.zeros(len(x), len(first), dtype=x.dtype)
        for choice in range(idx.shape[1]):
            named = (idx[:, choice, None] == torch.arange(len(first))).to(x.dtype)
            of_expert = of_expert + named * weights[:, choice, None].to(x.dtype)
        return torch.einsum("te,teh->th", of_expert, y)

    return layer


def dense_gradients(problem: Problem, layers: int = 1) -> dict[str, Any]:
    """Compute all ranks' loss in float64; return the gradients of each kind, x's by rank."""
    double = torch.float64
    x = [leaf(one, double) for one in problem.x]
    weights = [leaf(one, double) for one in problem.weights]
    first, second = leaf(problem.first, double), leaf(problem.second, double)
    layer, sums = dense_layer(first, second), []
    for own, idx, own_weights, target in zip(x, problem.idx, weights, problem.target, strict=True):
        out = own
        for _ in range(layers):
            out = layer(out, idx, own_weights)
        sums.append(out.detach())
        loss_of(out, target.double()).backward()
    return {
        "sums": sums,
        "x": [one.grad for one in x],
        "weights": [one.grad for one in weights],
        "first": first.grad,
        "second": second.grad,
    }


# ---- The layer on ranks --------------------------------------------------------------------------


class Leaves:
    """What one rank wants gradients of."""

    def __init__(self, problem: Problem, rank: int, dtype: Any = torch.float32) -> None:
        own = problem.own_experts(rank)
        self.x = leaf(problem.x[rank], dtype)
        self.weights = leaf(problem.weights[rank])
        self.first, self.second = leaf(problem.first[own], dtype), leaf(problem.second[own], dtype)
        self.idx = problem.idx[rank]
        self.target = problem.target[rank].to(dtype)
        self.rank = rank

    def experts(self, rows: Any) -> Any:
        """Compute all rows, also those beyond the count."""
        return torch.tanh(rows @ self.first) @ self.second

    def layer(self, exchange: Any, x: Any) -> Any:
        routed = exchange.dispatch(x, self.idx, self.weights)
        return exchange.combine(self.experts(routed.x), routed)

    def gradients(self, sums: Any) -> dict[str, Any]:
        kinds = ("x", "weights", "first", "second")
        gradients = {"sums": sums.detach()} | {kind: getattr(self, kind).grad for kind in kinds}
        for kind, gradient in gradients.items():
            assert torch.isfinite(gradient).all(), kind
        return gradients

    def difference(self, problem: Problem, sums: Any, layers: int = 1) -> float:
        """Compare with the layer in one process; return the largest difference."""
        dense, rank = dense_gradients(problem, layers), self.rank
        own, differences = problem.own_experts(rank), [0.0]
        for kind, got in self.gradients(sums).items():
            expected = dense[kind][own] if kind in ("first", "second") else dense[kind][rank]
            assert got.shape == expected.shape, kind
            if got.numel():
                differences.append((got.double() - expected).abs().max().item())
        return max(differences)


def differentiate(rank: Rank, case: Case) -> float:
    torch.set_num_threads(1)
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        sums = leaves.layer(exchange, leaves.x)
        loss_of(sums, leaves.target).backward()
        return leaves.difference(problem, sums)


def check(differences: list[float]) -> None:
    print(f"largest difference {max(differences):.2e}")
    assert all(one <= ERROR_MAX for one in differences), differences


@pytest.mark.parametrize("name", list(CASES))
def test_gradients_are_those_of_the_layer_in_one_process(name: str) -> None:
    check(run_threads(differentiate, len(CASES[name].tokens), CASES[name]))


@pytest.mark.parametrize("seed", range(6))
def test_gradients_of_random_routing_are_those_of_the_layer_in_one_process(seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = int(rng.choice([1, 2, 3, 4]))
    case = Case(
        tokens=tuple(rng.integers(0, 12, ranks).tolist()),
        experts=ranks * int(rng.integers(1, 4)),
        topk=int(rng.integers(1, 10)),
        none_share=float(rng.choice([0.0, 0.2])),
        repeats=True,
        spare=int(rng.integers(0, 4)),
        seed=seed,
    )
    print(case)
    check(run_threads(differentiate, ranks, case))


def test_gradients_between_processes_are_those_of_the_layer_in_one() -> None:
    check(run_processes(differentiate, 2, CASES["two ranks"], deadline_s=120))


# ---- Graphs --------------------------------------------------------------------------------------


def two_layers(rank: Rank, case: Case) -> float:
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        sums = leaves.layer(exchange, leaves.layer(exchange, leaves.x))
        loss_of(sums, leaves.target).backward()
        return leaves.difference(problem, sums, layers=2)


def test_layers_may_share_a_buffer() -> None:
    check(run_threads(two_layers, 2, CASES["choices of none"]))


def recompute(rank: Rank, case: Case, use_reentrant: bool) -> None:
    """Check that recomputed layers give the same bits, though handles were used in between."""
    problem = Problem(case)
    results = []
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        for recomputes in (False, True):
            leaves = Leaves(problem, rank.rank)
            out = leaves.x
            for _ in range(3):
                if recomputes:
                    out = checkpoint(leaves.layer, exchange, out, use_reentrant=use_reentrant)
                else:
                    out = leaves.layer(exchange, out)
            loss_of(out, leaves.target).backward()
            results.append(leaves.gradients(out))
    for kind, kept in results[0].items():
        assert torch.equal(kept, results[1][kind]), kind


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["repeats and none", "no tokens on a rank"])
def test_checkpointed_layers_give_the_same_bits(name: str, use_reentrant: bool) -> None:
    run_threads(recompute, 4, CASES[name], use_reentrant)


def combine_twice(rank: Rank, case: Case) -> float:
    """Combine what the experts give in two halves, which add up to the whole."""
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        routed = exchange.dispatch(leaves.x, leaves.idx, leaves.weights)
        y = leaves.experts(routed.x)
        sums = exchange.combine(0.25 * y, routed) + exchange.combine(0.75 * y, routed)
        loss_of(sums, leaves.target).backward()
        return leaves.difference(problem, sums)


def test_a_dispatch_may_be_combined_twice() -> None:
    check(run_threads(combine_twice, 2, CASES["repeats"]))


def run_backward_twice(rank: Rank, case: Case) -> None:
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        loss = loss_of(leaves.layer(exchange, leaves.x), leaves.target)
        wanted = [leaves.x, leaves.weights, leaves.first, leaves.second]
        once = torch.autograd.grad(loss, wanted, retain_graph=True)
        leaves.layer(exchange, leaves.target)  # another round in between
        again = torch.autograd.grad(loss, wanted)
        assert all(map(torch.equal, once, again))


def test_backward_of_a_graph_that_is_kept_gives_the_same_bits_again() -> None:
    run_threads(run_backward_twice, 2, CASES["two ranks"])


def want_only(rank: Rank, case: Case, wanted: str) -> float:
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    kinds = ("x", "weights", "first", "second")
    for kind in kinds:
        getattr(leaves, kind).requires_grad_(kind == wanted)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        sums = leaves.layer(exchange, leaves.x)
        loss_of(sums, leaves.target).backward()
    assert all(getattr(leaves, kind).grad is None for kind in kinds if kind != wanted)
    dense, own = dense_gradients(problem), problem.own_experts(rank.rank)
    expected = dense[wanted][own] if wanted == "first" else dense[wanted][rank.rank]
    return float((getattr(leaves, wanted).grad.double() - expected).abs().max())


@pytest.mark.parametrize("wanted", ["x", "weights", "first"])
def test_one_gradient_may_be_wanted_without_the_others(wanted: str) -> None:
    check(run_threads(want_only, 2, CASES["repeats"], wanted))


def test_without_grad_mode_nothing_is_kept() -> None:
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **Problem(CASES["one rank"]).shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        leaves = Leaves(Problem(CASES["one rank"]), 0)
        with torch.no_grad():
            out = leaves.layer(exchange, leaves.x)
        assert not out.requires_grad
        assert torch.equal(out, leaves.layer(exchange, leaves.x))


def test_handles_are_used_again_when_their_graph_is_gone() -> None:
    problem = Problem(CASES["one rank"])
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        created = []
        for _ in range(4):
            leaves = Leaves(problem, 0)
            out = leaves.layer(exchange, leaves.layer(exchange, leaves.x))
            loss_of(out, leaves.target).backward()
            del leaves, out
            gc.collect()
            created.append(len(buffer._handles))
        assert created[0] > 0
        assert set(created) == {created[0]}


# ---- Numbers -------------------------------------------------------------------------------------


def differentiate_numerically(rank: Rank, case: Case) -> tuple[float, float, float]:
    """Return the loss after a step forward and after one back, and what the gradient says of it.

    The loss is linear in the weights, and in x with experts that are linear, so that central
    differences are exact whatever the step, and nothing but the forward is needed.
    """
    problem, rng = Problem(case), np.random.default_rng(rank.rank)
    own, target = problem.own_experts(rank.rank), problem.target[rank.rank].double()
    idx = problem.idx[rank.rank]
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):

        def loss(x: Any, weights: Any) -> Any:
            routed = exchange.dispatch(x, idx, weights)
            sums = exchange.combine(routed.x @ problem.first[own] @ problem.second[own], routed)
            return (sums.double() * target).sum()

        x, weights = leaf(problem.x[rank.rank]), leaf(problem.weights[rank.rank])
        loss(x, weights).backward()
        steps = []
        for value, grad, others in ((x, x.grad, (weights,)), (weights, weights.grad, (x,))):
            step = torch.from_numpy(rng.standard_normal(value.shape, dtype=np.float32))
            other = others[0].detach()
            ends = [value.detach() + sign * step for sign in (1, -1)]
            pairs = [(end, other) if value is x else (other, end) for end in ends]
            with torch.no_grad():
                up, down = (loss(*pair).item() for pair in pairs)
            steps.append((up, down, 2 * (grad.double() * step).sum().item()))
    return tuple(map(sum, zip(*steps, strict=True)))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["two ranks", "repeats and none"])
def test_gradients_say_how_the_loss_changes(name: str) -> None:
    case = CASES[name]
    changes = run_threads(differentiate_numerically, len(case.tokens), case)
    up, down, said = (sum(parts) for parts in zip(*changes, strict=True))
    print(f"the loss changes by {up - down:.6f}, the gradient says {said:.6f}")
    assert abs(said) > 1  # a direction in which it does change
    assert up - down == pytest.approx(said, rel=1e-5)


def differentiate_short(rank: Rank, case: Case, dtype_name: str) -> dict[str, float]:
    """Return the relative L2 error of each gradient."""
    problem, dtype = Problem(case), getattr(torch, dtype_name)
    for kind in ("x", "target"):
        setattr(problem, kind, [one.to(dtype).float() for one in getattr(problem, kind)])
    for kind in ("first", "second"):
        setattr(problem, kind, getattr(problem, kind).to(dtype).float())
    leaves = Leaves(problem, rank.rank, dtype)
    short = {"bfloat16": "bf16", "float16": "fp16"}[dtype_name]
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape(short)) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        sums = leaves.layer(exchange, leaves.x)
        loss_of(sums, leaves.target).backward()
    dense, own = dense_gradients(problem), problem.own_experts(rank.rank)
    errors = {}
    for kind, got in leaves.gradients(sums).items():
        expected = dense[kind][own] if kind in ("first", "second") else dense[kind][rank.rank]
        assert got.dtype == (torch.float32 if kind == "weights" else dtype)
        errors[kind] = ((got.double() - expected).norm() / expected.norm()).item()
    return errors


@pytest.mark.parametrize("dtype", list(RELATIVE_ERROR_MAX))
def test_gradients_of_short_types_differ_by_rounding(dtype: str) -> None:
    errors = run_threads(differentiate_short, 2, CASES["repeats"], dtype)
    print(errors)
    assert all(one <= RELATIVE_ERROR_MAX[dtype] for own in errors for one in own.values())


def poison(rank: Rank, case: Case) -> float:
    """Check that what stands beyond the count reaches nothing."""
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    seen: list[Any] = []
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        routed = exchange.dispatch(leaves.x, leaves.idx, leaves.weights)
        beyond = torch.arange(routed.x.shape[1]) >= routed.count[:, None]
        assert beyond.any()
        assert not routed.x[beyond].any()
        rows = routed.x + 0  # whose gradient may be changed on its way
        rows.register_hook(lambda grad: grad.masked_fill(beyond[..., None], torch.nan))
        y = leaves.experts(rows)
        y.register_hook(lambda grad: seen.append(grad))
        sums = exchange.combine(y.masked_fill(beyond[..., None], torch.nan), routed)
        loss_of(sums, leaves.target).backward()
        assert not seen[0][beyond].any()
        return leaves.difference(problem, sums)


@pytest.fixture
def new_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch then fills what it allocates
    assert torch.empty(4).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("new_memory_is_nan")
def test_nothing_beyond_the_count_is_read_or_written() -> None:
    check(run_threads(poison, 4, CASES["no tokens on a rank"]))


def spread(rank: Rank, case: Case) -> float:
    """Let gradients come as views: of the sums expanded, of the rows transposed."""
    problem = Problem(case)
    results, strides = [], []
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        for views in (False, True):
            leaves = Leaves(problem, rank.rank)
            routed = exchange.dispatch(leaves.x, leaves.idx, leaves.weights)
            y = leaves.experts(routed.x)
            if views:
                columns = torch.tanh(leaves.first.mT @ routed.x.mT.contiguous())
                y = (leaves.second.mT @ columns).mT.contiguous()
            sums = exchange.combine(y, routed)
            for one in (routed.x, sums):
                one.register_hook(lambda grad: strides.append(grad.stride()))
            (sums.sum() if views else (sums * torch.ones_like(sums)).sum()).backward()
            results.append(leaves.gradients(sums))
    rows = problem.shape()["max_tokens"] * group.rank_count
    assert strides[:2] == [(HIDDEN, 1), (rows * HIDDEN, HIDDEN, 1)]
    assert strides[2:] == [(0, 0), (rows * HIDDEN, 1, rows)]
    return max((one - results[1][kind]).abs().max().item() for kind, one in results[0].items())


def test_gradients_may_be_views() -> None:
    check(run_threads(spread, 2, CASES["two ranks"]))


# ---- Errors --------------------------------------------------------------------------------------


def test_wrong_arguments_are_named_and_change_nothing() -> None:
    problem = Problem(CASES["one rank"])
    leaves = Leaves(problem, 0)
    x, idx, weights = leaves.x, leaves.idx, leaves.weights
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
        ep.Buffer(group, **problem.shape()) as other_buffer,
        autograd.Exchange(other_buffer) as other,
    ):
        with pytest.raises(TypeError, match=r"x is a ndarray, not a torch\.Tensor"):
            exchange.dispatch(x.detach().numpy(), idx, weights)
        with pytest.raises(TypeError, match=r"topk_weights is a NoneType, not a torch\.Tensor"):
            exchange.dispatch(x, idx, None)
        with pytest.raises(ValueError, match="topk_weights"):
            exchange.dispatch(x, idx, weights.double())
        with pytest.raises(ValueError, match=r"\bx\b"):
            exchange.dispatch(x.double(), idx, weights)
        with pytest.raises(ValueError, match=r"\bx\b"):
            exchange.dispatch(x[:, :-8], idx, weights)
        routed = exchange.dispatch(x, idx, weights)
        with pytest.raises(TypeError, match="routed is a Handle, not a Routed"):
            exchange.combine(routed.x, routed.handle)
        with pytest.raises(ValueError, match=r"\bx\b"):
            exchange.combine(routed.x[:, 1:], routed)
        with pytest.raises(ValueError, match="handle belongs to another buffer"):
            other.combine(routed.x, routed)
        with pytest.raises(TypeError, match="buffer is a Group, not a Buffer"):
            autograd.Exchange(group)
        sums = exchange.combine(leaves.experts(routed.x), routed)
        loss_of(sums, leaves.target).backward()
        check([leaves.difference(problem, sums)])


def test_a_gradient_of_a_gradient_is_refused() -> None:
    problem = Problem(CASES["one rank"])
    leaves = Leaves(problem, 0)
    with (
        ep.Group.single() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        loss = loss_of(leaves.layer(exchange, leaves.x), leaves.target)
        (grad,) = torch.autograd.grad(loss, leaves.x, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


def test_backward_over_a_closed_exchange_or_buffer_says_so() -> None:
    problem = Problem(CASES["one rank"])
    with ep.Group.single() as group:
        for closes_buffer in (False, True):
            leaves = Leaves(problem, 0)
            buffer = ep.Buffer(group, **problem.shape())
            exchange = autograd.Exchange(buffer)
            loss = loss_of(leaves.layer(exchange, leaves.x), leaves.target)
            (buffer if closes_buffer else exchange).close()
            with pytest.raises(ep.EpError, match="the buffer is closed"):
                loss.backward()
            exchange.close()
            buffer.close()


def leave(rank: Rank, case: Case) -> str:
    """Let rank 1 not run backward."""
    problem = Problem(case)
    leaves = Leaves(problem, rank.rank)
    with (
        rank.join() as group,
        ep.Buffer(group, **problem.shape()) as buffer,
        autograd.Exchange(buffer) as exchange,
    ):
        loss = loss_of(leaves.layer(exchange, leaves.x), leaves.target)
        if rank.rank == 1:
            group.barrier()
            return ""
        group.timeout_s = 0.3
        with pytest.raises(ep.PeerFailedError) as caught:
            loss.backward()
        group.timeout_s = 10
        group.barrier()
        return str(caught.value)


def test_a_rank_that_does_not_run_backward_is_named() -> None:
    message, _ = run_threads(leave, 2, CASES["two ranks"])
    assert "rank 1" in message or "ranks 1" in message, message
