"""Expert-parallel token exchange for mixture-of-experts models: dispatch and combine."""

from ._health import BufferCounters, Event, PeerCounters
from ._lib import (
    BackendInfo,
    EpError,
    EpTimeoutError,
    PeerFailedError,
    RdmaInfo,
    backend_info,
    rdma_info,
    version,
)
from ._rounds import Dispatched, Handle, PendingCombine, PendingDispatch
from .buffer import Buffer, BufferSizes
from .group import Group, Transport, World, create_unique_id, destroy_unique_id
from .topology import Topology, TopologyGpu, TopologyNic

__all__ = [
    "BackendInfo",
    "Buffer",
    "BufferCounters",
    "BufferSizes",
    "Dispatched",
    "EpError",
    "EpTimeoutError",
    "Event",
    "Group",
    "Handle",
    "PeerCounters",
    "PeerFailedError",
    "PendingCombine",
    "PendingDispatch",
    "RdmaInfo",
    "Topology",
    "TopologyGpu",
    "TopologyNic",
    "Transport",
    "World",
    "backend_info",
    "create_unique_id",
    "destroy_unique_id",
    "rdma_info",
    "version",
]
