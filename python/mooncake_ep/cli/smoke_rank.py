"""One rank of mooncake-ep smoke: its rounds, and the comparison of each with the oracle."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from . import oracle
from .arrays import SCALE_GROUP, Tokens, bits, dequantize, random_tokens, relative_l2, row_type
from .devices import device_of
from .sizes import Sizes, make_buffer

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from mooncake_ep import Dispatched

    from .devices import Host, Torch
    from .rank import RankContext

# Relative L2 error of a round trip against float64.
TOLERANCE = {"bf16": 4e-3, "fp16": 1e-3, "fp32": 1e-6, "fp8": 3e-2}

# More rounds than a buffer has slots, so that slots are used again. `full`: all tokens, distinct
# experts. `ragged`: another number of tokens on each rank, a quarter of the choices is -1.
# `repeated`: a token may name an expert twice, and rank 0 has no tokens.
_ROUNDS = ("full", "ragged", "repeated", "full", "ragged", "repeated")
_HOLE_SHARE = 0.25
_SCALE_SLACK = 1e-6
_UNTOUCHED = 0x5A
# Last entry of the seed; arrays.py has those of the inputs.
_CHANGES = 2


def run(context: RankContext) -> dict[str, Any]:
    """Run and check all rounds; returns the failures as text and a hash of all outputs."""
    sizes = Sizes(**context.options["sizes"])
    with make_buffer(context.group, sizes, threads=0) as buffer:
        return run_rounds(context, buffer, device_of(context.group))


def run_rounds(
    context: RankContext, buffer: Any, device: Host | Torch, *, takes_outputs: bool = True
) -> dict[str, Any]:
    """Do it on a buffer; ``takes_outputs``: dispatch fills arrays of ours, every other time."""
    sizes = Sizes(**context.options["sizes"])
    digest = hashlib.sha256()
    failures: list[str] = []
    for number, kind in enumerate(_ROUNDS):
        ranks = [_inputs(sizes, kind, rank=rank, number=number) for rank in range(sizes.rank_count)]
        own_outputs = takes_outputs and number % 2 == 1
        one = _Round(sizes, ranks, rank=context.group.rank, own_outputs=own_outputs)
        dispatched, out = one.run(buffer, device, weights=context.options["weights"])
        found = one.check_dispatched(dispatched) + one.check_combined(out)
        failures += [f"round {number} ({kind}): {text}" for text in found]
        one.hash(digest, dispatched, out)
        context.show_progress(number + 1, len(_ROUNDS))
    return {"failures": failures, "sha256": digest.hexdigest()}


def _inputs(sizes: Sizes, kind: str, *, rank: int, number: int) -> Tokens:
    count = sizes.tokens
    if kind == "ragged":
        count = sizes.tokens * (rank + 1) // sizes.rank_count
    elif kind == "repeated" and rank == 0 and sizes.rank_count > 1:
        count = 0
    tokens = random_tokens(sizes, count, rank=rank, round_number=number)
    generator = np.random.default_rng([sizes.seed, rank, number, _CHANGES])
    if kind == "ragged":
        holes = generator.random(tokens.topk_idx.shape) < _HOLE_SHARE
        tokens.topk_idx[holes] = -1
    elif kind == "repeated":
        repeated = generator.random(count) < 0.5
        tokens.topk_idx[repeated, -1] = tokens.topk_idx[repeated, 0]
    # Both types of indices are part of the interface.
    return replace(tokens, topk_idx=tokens.topk_idx.astype(np.int32 if number % 2 else np.int64))


class _Round:
    """One dispatch and one combine of this rank, and what they have to return."""

    def __init__(self, sizes: Sizes, ranks: list[Tokens], *, rank: int, own_outputs: bool) -> None:
        self._sizes = sizes
        self._ranks = ranks
        self._mine = ranks[rank]
        self._first_expert = rank * sizes.local_experts
        self._expected = oracle.packed(ranks, rank=rank, expert_count=sizes.experts)
        # Powers of two, so that an expert that differs from its neighbours adds no error of its
        # own.
        self._factors = np.exp2(np.arange(sizes.experts) % 3 - 1)
        self._out = _untouched_outputs(sizes) if own_outputs else None

    def run(
        self, buffer: Any, device: Host | Torch, *, weights: str
    ) -> tuple[Dispatched, npt.NDArray[Any]]:
        """Dispatch, let each expert multiply its rows, and combine; `weights` go to that call.

        Returns the outputs as NumPy arrays.
        """
        mine, put = self._mine, device.put
        received = buffer.dispatch(
            put(mine.x),
            put(mine.topk_idx),
            put(mine.topk_weights) if weights == "dispatch" else None,
            quant=self._sizes.quant,
            out=None if self._out is None else _each(self._out, put),
        )
        dispatched = _each(received, device.take)
        # Rows that dispatch did not fill must not be read: a NaN would spread.
        y = np.full(dispatched.x.shape, np.nan, row_type(self._sizes.payload))
        for local, factor in enumerate(self._factors[self._first_expert :][: len(y)]):
            rows, scales = self._rows(dispatched, local)
            y[local, : len(rows)] = dequantize(rows, scales) * np.float32(factor)
        late = put(mine.topk_weights) if weights == "combine" else None
        return dispatched, device.take(buffer.combine(put(y), received, late))

    def check_dispatched(self, dispatched: Dispatched) -> list[str]:
        """Compare every element that dispatch returned."""
        expected = self._expected
        failures = _compare("count", dispatched.count, expected.count)
        failures += _compare("layout_range", dispatched.layout_range, expected.layout_range)
        for local, (sources, tokens) in enumerate(expected.experts):
            name = f"expert {self._first_expert + local}"
            src_info = dispatched.src_info[local, : len(tokens)]
            failures += _compare(f"src_info of {name}", src_info, tokens.astype(np.int32))
            rows, scales = self._rows(dispatched, local)
            sent = np.zeros((len(tokens), self._sizes.hidden), self._mine.x.dtype)
            for source, inputs in enumerate(self._ranks):
                sent[sources == source] = inputs.x[tokens[sources == source]]
            failures += _compare_rows(f"x of {name}", rows, scales, sent)
            if (
                self._out is not None
                and (bits(dispatched.x[local, len(tokens) :]).view(np.uint8) != _UNTOUCHED).any()
            ):
                failures.append(f"x of {name} was written after its {len(tokens)} rows")
        return failures

    def check_combined(self, out: npt.NDArray[Any]) -> list[str]:
        """Compare every element that combine returned with float64, and all of them together."""
        sizes = self._sizes
        reference = oracle.combined(self._mine, self._factors)
        bound = oracle.combined_bound(
            self._mine, self._factors, payload=sizes.payload, rank_count=sizes.rank_count
        )
        error = np.abs(out.astype(np.float64) - reference)
        failures = []
        # Written so that NaN fails too.
        wrong = np.argwhere(~(error <= bound))
        if len(wrong):
            where = tuple(wrong[0])
            failures.append(
                f"out{list(map(int, where))} is {out[where]}, not {reference[where]:.9g} "
                f"within {bound[where]:.3g} ({len(wrong)} wrong elements)"
            )
        relative = relative_l2(out, reference)
        tolerance = TOLERANCE[sizes.payload]
        if not relative <= tolerance:
            failures.append(f"out has a relative L2 error of {relative:.3g}, over {tolerance:.3g}")
        return failures

    def hash(self, digest: Any, dispatched: Dispatched, out: npt.NDArray[Any]) -> None:
        """Add all that the round returned to the digest."""
        arrays = [dispatched.count, dispatched.layout_range, out]
        for local, expected_count in enumerate(self._expected.count):
            rows, scales = self._rows(dispatched, local)
            arrays += [dispatched.src_info[local, :expected_count], rows]
            arrays += [] if scales is None else [scales]
        for array in arrays:
            digest.update(np.ascontiguousarray(bits(np.ascontiguousarray(array))))

    def _rows(
        self, dispatched: Dispatched, local: int
    ) -> tuple[npt.NDArray[Any], npt.NDArray[Any] | None]:
        count = int(self._expected.count[local])
        scales = dispatched.scales
        return dispatched.x[local, :count], None if scales is None else scales[local, :count]


def _each(arrays: Dispatched, move: Callable[[Any], Any]) -> Dispatched:
    """Move the arrays of a result to another device."""
    from mooncake_ep import Dispatched

    scales = None if arrays.scales is None else move(arrays.scales)
    x, count = move(arrays.x), move(arrays.count)
    return Dispatched(x, scales, count, move(arrays.src_info), move(arrays.layout_range))


def _untouched_outputs(sizes: Sizes) -> Dispatched:
    """Outputs of a known pattern, by which a row that nobody should write shows."""
    from mooncake_ep import Dispatched

    rows = (sizes.local_experts, sizes.rank_count * sizes.tokens)
    fp8 = sizes.payload == "fp8"
    x_type = np.dtype(ml_dtypes.float8_e4m3fn) if fp8 else row_type(sizes.payload)
    x = np.full((*rows, sizes.hidden * x_type.itemsize), _UNTOUCHED, np.uint8).view(x_type)
    return Dispatched(
        x=x,
        scales=np.zeros((*rows, sizes.hidden // SCALE_GROUP), np.float32) if fp8 else None,
        count=np.zeros(rows[:1], np.int32),
        src_info=np.zeros(rows, np.int32),
        layout_range=np.zeros((rows[0], sizes.rank_count), np.int64),
    )


def _compare(name: str, value: npt.NDArray[Any], expected: npt.NDArray[Any]) -> list[str]:
    if value.shape != expected.shape or value.dtype != expected.dtype:
        return [f"{name} is {value.dtype}{value.shape}, not {expected.dtype}{expected.shape}"]
    return _first_difference(name, value, expected, bits(value) != bits(expected))


def _compare_rows(
    name: str, rows: npt.NDArray[Any], scales: npt.NDArray[Any] | None, sent: npt.NDArray[Any]
) -> list[str]:
    """Compare packed rows with those sent: bit by bit, or within half a step of FP8."""
    if scales is None:
        return _compare(name, rows, sent)
    sent = sent.astype(np.float64)
    expected = oracle.fp8_scales(sent)
    failures = _first_difference(
        f"scales of {name}",
        scales,
        expected,
        ~(np.abs(scales - expected) <= _SCALE_SLACK * expected),
    )
    values = dequantize(rows, scales)
    wrong = ~(np.abs(values - sent) <= oracle.fp8_bound(sent))
    return failures + _first_difference(name, values, sent, wrong)


def _first_difference(
    name: str, value: npt.NDArray[Any], expected: npt.NDArray[Any], wrong: npt.NDArray[np.bool_]
) -> list[str]:
    places = np.argwhere(wrong)
    if not len(places):
        return []
    where = tuple(places[0])
    return [
        f"{name}{list(map(int, where))} is {value[where]}, not {expected[where]} "
        f"({len(places)} wrong elements)"
    ]
