"""What dispatch and combine must give, in plain NumPy: the oracle of the tests."""

from __future__ import annotations

from typing import Any

import numpy as np


def dispatch(topk_idx: list[np.ndarray], experts: int) -> list[list[tuple[int, int]]]:
    """List for each global expert the (source rank, token) of its rows, in order."""
    return [
        [
            (source, token)
            for source, choices in enumerate(topk_idx)
            for token in range(len(choices))
            if expert in choices[token]
        ]
        for expert in range(experts)
    ]


def combine(
    y: list[np.ndarray], topk_idx: np.ndarray, topk_weights: np.ndarray | None, rank: int
) -> np.ndarray:
    """Sum for each token of ``rank`` its experts' rows; y[e] maps (source, token) -> row."""
    total = np.zeros((len(topk_idx), y[0].shape[-1]))
    for token, choices in enumerate(topk_idx):
        for choice, expert in enumerate(choices):
            if 0 <= expert < len(y):
                weight = 1.0 if topk_weights is None else float(topk_weights[token, choice])
                total[token] += weight * y[expert][rank, token]
    return total


# ---- Comparing with it ---------------------------------------------------------------------------


def check_dispatched(
    received: Any, x: list[np.ndarray], topk_idx: list[np.ndarray], group: Any, experts: int
) -> None:
    """Compare the rows, counts, src_info and layout_range that one rank received, bit for bit."""
    rows = dispatch(topk_idx, experts)
    local = experts // group.rank_count
    count, src_info = np.asarray(received.count), np.asarray(received.src_info)
    layout_range = np.asarray(received.layout_range)
    for index in range(local):
        expected = rows[group.rank * local + index]
        assert count[index] == len(expected)
        assert src_info[index, : len(expected)].tolist() == [token for _, token in expected]
        for row, (source, token) in enumerate(expected):
            got = np.asarray(received.x[index, row])
            assert got.tobytes() == x[source][token].tobytes(), (index, row, source, token)
        sources = [source for source, _ in expected]
        for source in range(group.rank_count):
            n = sources.count(source)
            begin = sources.index(source) if n else layout_range[index, source] >> 32
            assert layout_range[index, source] == begin << 32 | n, (index, source)


def relative_error(got: Any, expected: np.ndarray) -> float:
    """Relative L2 error; 0 if there is nothing to compare."""
    norm = float(np.linalg.norm(expected))
    difference = float(np.linalg.norm(np.asarray(got).astype(np.float64) - expected))
    return difference / norm if norm else difference


def routing(rng: np.random.Generator, tokens: int, experts: int, topk: int) -> np.ndarray:
    """Choose experts at random; distinct ones, if there are enough."""
    if topk <= experts:
        return np.argsort(rng.random((tokens, experts)), axis=1)[:, :topk].astype(np.int64)
    return rng.integers(0, experts, (tokens, topk))
