"""Topology: the GPUs, NICs and NUMA nodes of a machine, and how they are linked."""

from __future__ import annotations

import os
import weakref
from dataclasses import dataclass
from typing import Any

from ._ffi import ffi
from ._lib import c_path, c_text, check, int32, lib, text

_UNKNOWN = "-"


@dataclass(frozen=True)
class TopologyGpu:
    """A GPU.

    index: by PCI address; vendor: "nvidia", "metax" or "none"; pci_address and uuid: "" if unknown;
    numa_node: None if unknown.
    """

    index: int
    vendor: str
    pci_address: str
    numa_node: int | None
    uuid: str


@dataclass(frozen=True)
class TopologyNic:
    """A NIC, by the name of its InfiniBand device.

    port_state: "active", "down" and so on; link_layer: "infiniband", "ethernet" or "unspecified";
    pci_address: "" if unknown; numa_node: None if unknown.
    """

    name: str
    port_state: str
    link_layer: str
    pci_address: str
    numa_node: int | None


class Topology:
    """What a machine has, as data that can be saved and loaded elsewhere."""

    def __init__(self, handle: Any) -> None:
        """Own a topology of the library; for read() and load()."""
        self._c = handle
        self._destroy = weakref.finalize(self, lib.mep_topology_destroy, handle)

    @classmethod
    def read(cls, root: str | os.PathLike[str] | None = None) -> Topology:
        """Read the sysfs below ``root``; None: of this machine, with UUIDs as drivers know them.

        Errors: EpError (names the file that cannot be read, or the NIC without a port).
        """
        topology = ffi.new("mep_topology_t **")
        where = ffi.NULL if root is None else c_path(root, "root")
        check(lib.mep_topology_read(where, topology))
        return cls(topology[0])

    @classmethod
    def load(cls, saved: str) -> Topology:
        """Make one from the text of another. ValueError names the line that is wrong."""
        topology = ffi.new("mep_topology_t **")
        check(lib.mep_topology_load(c_text(saved, "saved"), topology))
        return cls(topology[0])

    def apply_smi(self, tool: str, matrix: str) -> None:
        """Link GPUs as ``tool`` ("nvidia-smi" or "mx-smi") printed for its arguments topo -m.

        ValueError names the row, the column and the cell; nothing is changed then.
        """
        check(lib.mep_topology_apply_smi(self._c, c_text(tool, "tool"), c_text(matrix, "matrix")))

    @property
    def text(self) -> str:
        """The saved form; the manual of its lines is in mooncake_ep.h."""
        characters = ffi.new("char **")
        check(lib.mep_topology_text(self._c, characters))
        return text(characters[0])

    def nic(self, gpu: int, only: str | None = None) -> str:
        """Name the NIC for a GPU: the nearest with an active port; "" for none.

        ``only`` is a comma list of NICs to choose from, "" for all; None: what
        MOONCAKE_EP_DEVICE_FILTER says, or all.
        ValueError names a GPU or NIC that does not exist.
        """
        name = ffi.new("char **")
        chosen = ffi.NULL if only is None else c_text(only, "only")
        check(lib.mep_topology_nic(self._c, int32(gpu, "gpu"), chosen, name))
        return text(name[0])

    @property
    def numa_nodes(self) -> list[int]:
        """The NUMA nodes, ascending."""
        return [int(words[1]) for words in self._lines("numa")]

    @property
    def gpus(self) -> list[TopologyGpu]:
        """The GPUs, by index."""
        return [
            TopologyGpu(int(index), vendor, _address(path), _node(node), _known(uuid))
            for _, index, vendor, path, _, node, _, uuid in self._lines("gpu")
        ]

    @property
    def nics(self) -> list[TopologyNic]:
        """The NICs, by name."""
        return [
            TopologyNic(name, state, layer, _address(path), _node(node))
            for _, name, state, layer, path, _, node in self._lines("nic")
        ]

    @property
    def gpu_links(self) -> dict[tuple[int, int], str]:
        """The link of each pair of GPUs, the lower one first: "NV18", "MX", "PIX" and so on."""
        return {
            (int(one), int(other)): kind
            for _, _, one, what, other, kind in self._lines("link")
            if what == "gpu"
        }

    @property
    def nic_links(self) -> dict[tuple[int, str], str]:
        """The link of each GPU and NIC: "PIX", "PXB", "PHB", "NODE" or "SYS"."""
        return {
            (int(gpu), name): kind
            for _, _, gpu, what, name, kind in self._lines("link")
            if what == "nic"
        }

    def _lines(self, first: str) -> list[list[str]]:
        lines = [line.split() for line in self.text.splitlines()]
        return [words for words in lines if words[0] == first]


def _known(word: str) -> str:
    return "" if word == _UNKNOWN else word


def _node(word: str) -> int | None:
    return None if word == _UNKNOWN else int(word)


def _address(path: str) -> str:
    return _known(path).rpartition("/")[2]
