"""One rank of mooncake-ep info --world-size: how it reaches each of its peers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .rank import RankContext


def run(context: RankContext) -> dict[str, Any]:
    """Return the name and the reason of the transport to each rank."""
    group = context.group
    transports = [group.transport(peer) for peer in range(group.rank_count)]
    return {"transports": [{"name": one.name, "reason": one.reason} for one in transports]}
