"""A Mixture-of-Experts layer in NumPy: embedding, router, experts, and the layer in one process.

Everything is made from hashes and seeds, so each rank makes the same weights without being sent
any.
"""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

_BUCKETS = 2048
_NGRAM_BYTES = (2, 3, 4)
_POSITION_SHARE = 0.25
_ROUTER_GAIN = 2.0
# First entries of the seeds of independent random streams.
_EMBEDDING, _ROUTER, _EXPERT = 1, 2, 3


def words_of(text: str) -> list[str]:
    """Cut a text into words and signs."""
    return re.findall(r"\w+|[^\w\s]+", text)


def default_text() -> str:
    """The language reference that pydoc carries: a long text that each Python installation has."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))


class Embedding:
    """Rows of words: the mean of the rows that the word's byte n-grams hash to."""

    def __init__(self, hidden: int, seed: int) -> None:
        """Make the rows that n-grams hash to."""
        generator = np.random.default_rng([seed, _EMBEDDING])
        self._table = generator.standard_normal((_BUCKETS, hidden), np.float32)

    def rows(self, words: list[str], *, first_position: int) -> npt.NDArray[np.float32]:
        """Rows [n, H] of words that stand at first_position and after, each of length sqrt(H)."""
        distinct = sorted(set(words))
        of_word = np.empty((len(distinct), self._table.shape[1]), np.float32)
        for number, word in enumerate(distinct):
            of_word[number] = normalized(self._table[_buckets(word)].mean(axis=0))
        number_of = {word: number for number, word in enumerate(distinct)}
        rows = of_word[[number_of[word] for word in words]]
        positions = np.arange(first_position, first_position + len(words))
        return normalized(rows + np.float32(_POSITION_SHARE) * _waves(positions, rows.shape[1]))


def _buckets(word: str) -> list[int]:
    data = f"<{word}>".encode()
    grams = [data] + [
        data[begin : begin + size] for size in _NGRAM_BYTES for begin in range(len(data) - size + 1)
    ]
    return [zlib.crc32(gram) % _BUCKETS for gram in grams]


def _waves(positions: npt.NDArray[np.int64], hidden: int) -> npt.NDArray[np.float32]:
    wavelengths = 1e4 ** (np.arange(hidden // 2) * 2 / hidden)
    angles = (positions[:, np.newaxis] / wavelengths).astype(np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1) * np.float32(2**0.5)


def normalized(rows: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Rows scaled to a root mean square of 1."""
    squares = np.mean(np.square(rows), axis=-1, keepdims=True)
    scaled: npt.NDArray[np.float32] = rows / np.sqrt(squares + np.float32(1e-6))
    return scaled


class Router:
    """A softmax router: chooses the top-k experts of each row, with weights that add up to 1."""

    def __init__(self, *, hidden: int, experts: int, topk: int, seed: int) -> None:
        """Make the weights [H, E]."""
        generator = np.random.default_rng([seed, _ROUTER])
        weights = generator.standard_normal((hidden, experts), np.float32)
        self._weights = weights * np.float32(_ROUTER_GAIN / hidden**0.5)
        self._topk = topk

    def probabilities(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Softmax [n, E] of rows [n, H]."""
        logits = x @ self._weights
        powers = np.exp(logits - logits.max(axis=1, keepdims=True, initial=-np.inf))
        shares: npt.NDArray[np.float32] = powers / powers.sum(axis=1, keepdims=True)
        return shares

    def route(
        self, x: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """topk_idx int64 [n, K], the likeliest first, and topk_weights fp32 [n, K]."""
        probabilities = self.probabilities(x)
        order = np.argsort(-probabilities, axis=1, kind="stable")
        chosen = np.ascontiguousarray(order[:, : self._topk])
        weights = np.take_along_axis(probabilities, chosen, axis=1)
        return chosen, weights / weights.sum(axis=1, keepdims=True)


@dataclass(frozen=True)
class Expert:
    """A SwiGLU block: down(silu(gate(x)) * up(x))."""

    gate: npt.NDArray[np.float32]
    up: npt.NDArray[np.float32]
    down: npt.NDArray[np.float32]

    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Rows [n, H] to rows [n, H]."""
        gate = x @ self.gate
        # silu(v) = v * sigmoid(v); the bound keeps exp() from overflowing where the result is 0
        # anyway.
        gate /= 1 + np.exp(np.minimum(-gate, 80))
        return (gate * (x @ self.up)) @ self.down


def make_expert(number: int, *, layer: int, hidden: int, seed: int) -> Expert:
    """The weights of one expert of the whole model."""
    generator = np.random.default_rng([seed, _EXPERT, layer, number])
    gate, up, down = generator.standard_normal((3, hidden, hidden), np.float32) / np.float32(
        hidden**0.5
    )
    return Expert(gate=gate, up=up, down=down)


def dense_layer(
    x: npt.NDArray[np.float32], gates: npt.NDArray[Any], *, layer: int, seed: int
) -> npt.NDArray[np.float64]:
    """The layer without dispatch: rows [n, H] through every expert, summed with gates [n, E]."""
    total = np.zeros(x.shape, np.float64)
    for number in range(gates.shape[1]):
        # A gate of 0 adds nothing, so those rows need not be computed.
        rows = np.flatnonzero(gates[:, number])
        expert = make_expert(number, layer=layer, hidden=x.shape[1], seed=seed)
        total[rows] += gates[rows, number, np.newaxis] * expert(x[rows]).astype(np.float64)
    return total
