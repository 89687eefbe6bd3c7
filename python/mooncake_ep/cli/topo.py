"""mooncake-ep topo: the GPUs and NICs of a machine, how they are linked, and which NIC is whose."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plot
from .errors import UserError
from .files import cannot_write

if TYPE_CHECKING:
    from mooncake_ep import Topology

_TOOLS = ("nvidia-smi", "mx-smi")
_TOOL_SECONDS_MAX = 60
_FILTER = "MOONCAKE_EP_DEVICE_FILTER"
_BLANKS = " \t\r\v\f"  # as the library has them
_EXAMPLES = """\
examples:
  mooncake-ep topo
  mooncake-ep topo --save node7.topology
  mooncake-ep topo --load node7.topology --plot node7.png
  mooncake-ep topo --root recorded/ --smi nvidia-smi=matrix.txt --json

NVn: n NVLinks; MX: MetaXLink; PIX: one PCIe switch; PXB: several bridges; PHB: the host bridge;
NODE: host bridges of one NUMA node; SYS: NUMA nodes; ?: nobody says.
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command's arguments."""
    parser = subparsers.add_parser(
        "topo",
        help="show GPUs, NICs and their links",
        description="Show the GPUs and NICs of this machine and how they are linked. Links other "
        "than PCI's come from nvidia-smi and mx-smi, if they are there.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--load", type=Path, metavar="FILE", help="show what --save wrote")
    source.add_argument(
        "--root", type=Path, metavar="FOLDER", help="read a recorded sysfs below this folder"
    )
    parser.add_argument(
        "--smi",
        action="append",
        default=[],
        metavar="TOOL=FILE",
        help="link GPUs as TOOL (nvidia-smi or mx-smi) printed into FILE for 'topo -m'; for this "
        "machine the tools are run",
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="write it as text as well")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--plot", type=Path, metavar="FILE", help="draw it; FILE ends in .png, .pdf or .svg"
    )
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Read, and print, save or draw."""
    if arguments.plot is not None:
        plot.check_path(arguments.plot)
    topology = _topology(arguments)
    _check_filter(topology)
    facts = describe(topology)
    if arguments.plot is not None:
        plot.check_matplotlib()
    if arguments.save is not None:
        _write(arguments.save, topology.text)
    if arguments.plot is not None:
        from .topo_plot import draw

        draw(arguments.plot, topology)
    print(json.dumps(facts, indent=2) if arguments.json else _matrix(topology, facts))
    return 0


def describe(topology: Topology) -> dict[str, Any]:
    """The topology as plain data, with the NIC of each GPU."""
    return {
        "numa_nodes": topology.numa_nodes,
        "gpus": [{**asdict(gpu), "nic": _nic_of(topology, gpu.index)} for gpu in topology.gpus],
        "nics": [asdict(nic) for nic in topology.nics],
        "gpu_links": [
            {"gpus": list(pair), "link": link} for pair, link in topology.gpu_links.items()
        ],
        "nic_links": [
            {"gpu": gpu, "nic": nic, "link": link}
            for (gpu, nic), link in topology.nic_links.items()
        ],
    }


def _topology(arguments: argparse.Namespace) -> Topology:
    from mooncake_ep import EpError, Topology

    try:
        if arguments.load is not None:
            topology = Topology.load(_text_of(arguments.load))
        else:
            topology = Topology.read(arguments.root)
        for given in arguments.smi:
            tool, equals, path = given.partition("=")
            if not equals:
                raise UserError(f"--smi {given}: it has to be TOOL=FILE")
            topology.apply_smi(tool, _text_of(Path(path)))
        if arguments.load is None and arguments.root is None and not arguments.smi:
            _ask_tools(topology)
    except (EpError, ValueError) as error:
        raise UserError(str(error)) from None
    return topology


def _ask_tools(topology: Topology) -> None:
    """Run the vendors' tools that are here, for their GPUs."""
    for tool, vendor in zip(_TOOLS, ("nvidia", "metax"), strict=True):
        if shutil.which(tool) is None or all(gpu.vendor != vendor for gpu in topology.gpus):
            continue
        try:
            printed = subprocess.run(
                [tool, "topo", "-m"],
                capture_output=True,
                text=True,
                check=True,
                timeout=_TOOL_SECONDS_MAX,
            ).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise UserError(f"{tool} topo -m: {error}") from None
        try:
            topology.apply_smi(tool, printed)
        except ValueError as error:  # in a container the tool may see fewer GPUs than sysfs
            print(f"mooncake-ep: {tool} is not used: {error}", file=sys.stderr)


def _check_filter(topology: Topology) -> None:
    """Refuse a name that no NIC has, also where no GPU will ask the library for one."""
    only = os.environ.get(_FILTER, "")
    known = [nic.name for nic in topology.nics]
    for name in only.split(",") if only else ():
        if name.strip(_BLANKS) not in known:
            here = ", ".join(known) or "none"
            raise UserError(f'{_FILTER}="{only}" names "{name}", but the NICs are: {here}')


def _nic_of(topology: Topology, gpu: int) -> str:
    try:
        return topology.nic(gpu)
    except ValueError as error:
        raise UserError(f"{_FILTER}: {error}") from None


def _matrix(topology: Topology, facts: dict[str, Any]) -> str:
    gpus, nics = topology.gpus, topology.nics
    if not gpus and not nics:
        nodes = len(topology.numa_nodes)
        return f"no GPU and no NIC; {nodes} NUMA node{'' if nodes == 1 else 's'}"
    head = ["", *(f"GPU{gpu.index}" for gpu in gpus), *(nic.name for nic in nics)]
    rows = [[*head, "NUMA", "PCI", "NIC"]]
    for gpu, fact in zip(gpus, facts["gpus"], strict=True):
        links = [_gpu_link(topology, gpu.index, other.index) for other in gpus]
        links += [topology.nic_links.get((gpu.index, nic.name), "?") for nic in nics]
        where = [_or_unknown(gpu.numa_node), gpu.pci_address or "?", fact["nic"] or "none"]
        rows.append([f"GPU{gpu.index}", *links, *where])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for nic in nics:
        lines.append(
            f"{nic.name}: {nic.port_state}, {nic.link_layer}, PCI {nic.pci_address or '?'}, "
            f"NUMA {_or_unknown(nic.numa_node)}"
        )
    return "\n".join(lines)


def _gpu_link(topology: Topology, one: int, other: int) -> str:
    if one == other:
        return "X"
    return topology.gpu_links.get((min(one, other), max(one, other)), "?")


def _or_unknown(node: int | None) -> str:
    return "?" if node is None else str(node)


def _text_of(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {error}") from None


def _write(path: Path, content: str) -> None:
    try:
        path.write_text(content)
    except OSError as error:
        raise cannot_write("--save", path, error) from None
