"""All that the baselines of bench know beforehand: who sends which row to whom, and its place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt

    from .sizes import Sizes

    # topk_idx [T, K] and topk_weights [T, K] of one rank.
    Choices = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]


@dataclass(frozen=True)
class Segment:
    """Rows of one source for one local expert: which of its messages, and of which tokens."""

    expert: int
    begin: int
    source: int
    message: npt.NDArray[np.intp]
    token: npt.NDArray[np.intp]


@dataclass(frozen=True)
class Returned:
    """What returns to one source: for each message its packed rows, -1 for none, and weights."""

    rows: npt.NDArray[np.intp]
    weights: npt.NDArray[np.float32]


class Routing:
    """One round as one rank sees it.

    sent[d]: this rank's tokens that go to rank d, in order; sent[rank] are those that stay.
    segments: what dispatch packs. returned[s]: what combine sends back to source s.
    """

    def __init__(self, sizes: Sizes, choices: list[Choices], *, rank: int) -> None:
        """Work it all out from the choices of all ranks."""
        self.rank = rank
        self.rank_count = sizes.rank_count
        owners = [topk_idx // sizes.local_experts for topk_idx, _ in choices]
        self.sent = [
            np.flatnonzero((owners[rank] == other).any(axis=1)) for other in range(self.rank_count)
        ]
        received = [np.flatnonzero((owner == rank).any(axis=1)) for owner in owners]
        self.received_counts = [len(tokens) for tokens in received]
        self.returned = [
            Returned(
                rows=np.full((len(tokens), sizes.topk), -1, np.intp),
                weights=np.where(owner == rank, topk_weights, 0)[tokens],
            )
            for tokens, owner, (_, topk_weights) in zip(received, owners, choices, strict=True)
        ]
        self.segments: list[Segment] = []
        for local in range(sizes.local_experts):
            chosen = [
                topk_idx[tokens] == rank * sizes.local_experts + local
                for tokens, (topk_idx, _) in zip(received, choices, strict=True)
            ]
            self._place(local, chosen, received, first_row=local * self.rank_count * sizes.tokens)

    def link_rows(self) -> int:
        """Rows that this rank sends to other ranks."""
        return sum(len(tokens) for rank, tokens in enumerate(self.sent) if rank != self.rank)

    def local_only(self) -> npt.NDArray[np.intp]:
        """Which of sent[rank], the tokens that stay, go to no other rank."""
        elsewhere = [tokens for rank, tokens in enumerate(self.sent) if rank != self.rank]
        gone = np.concatenate([np.empty(0, np.intp), *elsewhere])
        return np.flatnonzero(~np.isin(self.sent[self.rank], gone))

    def _place(
        self,
        expert: int,
        chosen: list[npt.NDArray[np.bool_]],
        received: list[npt.NDArray[np.intp]],
        *,
        first_row: int,
    ) -> None:
        """Give the rows of one local expert their places: sources in order, tokens in order."""
        begin = 0
        for source, tokens in enumerate(received):
            messages = np.flatnonzero(chosen[source].any(axis=1))
            self.returned[source].rows[chosen[source]] = (
                first_row + begin + np.arange(len(messages))
            )
            self.segments.append(Segment(expert, begin, source, messages, tokens[messages]))
            begin += len(messages)
