"""mooncake-ep info: version, backends, limits, machine, Python, and transports. Needs no NumPy."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
from pathlib import Path
from typing import Any

from .sizes import add_device_argument, add_launch_arguments, count
from .spawn import launch_from, run_ranks

_FRAMEWORKS = ("numpy", "ml_dtypes", "torch", "jax", "cupy", "tensorflow", "matplotlib")
_LIMITS = {
    "ranks": "MEP_RANK_COUNT_MAX",
    "experts": "MEP_EXPERT_COUNT_MAX",
    "tokens": "MEP_TOKEN_COUNT_MAX",
    "topk": "MEP_TOPK_MAX",
    "hidden": "MEP_HIDDEN_MAX",
    "hidden_multiple": "MEP_HIDDEN_MULTIPLE",
    "hidden_multiple_fp8": "MEP_SCALE_GROUP",
    "rounds_in_flight": "MEP_ROUNDS_IN_FLIGHT_MAX",
    "alignment_bytes": "MEP_ALIGNMENT",
    "threads_per_cpu_rank": "MEP_CPU_THREAD_COUNT_MAX",
}
_BOOT_ID_SHOWN = 8
_SHARED_MEMORY = "/dev/shm"
_EXAMPLES = """\
examples:
  mooncake-ep info
  mooncake-ep info --json
  mooncake-ep info --world-size 2 --device cuda
"""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Describe the command's arguments."""
    parser = subparsers.add_parser(
        "info",
        help="show version, backends, limits and this machine",
        description="Show version, backends, limits, and what this machine and this Python offer. "
        "With --world-size, a group is made of so many ranks, and how they reach each other is "
        "shown, and why not in a faster way.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument(
        "--world-size",
        type=count,
        metavar="N",
        help="ranks, each of them a process, that are to say how they reach each other",
    )
    add_device_argument(parser)
    add_launch_arguments(parser)
    parser.set_defaults(command=run)


def run(arguments: argparse.Namespace) -> int:
    """Print what is here."""
    group = _group(arguments)
    if arguments.world_size is not None and group is None:
        return 0  # rank 0 of the launcher's prints
    facts: dict[str, Any] = {
        "version": ".".join(map(str, _package().version())),
        "library": _library_path(),
        "backends": _backends(),
        "rdma": _rdma(),
        "limits": _limits(),
        "machine": machine(),
        "python": _python(),
    }
    if group is not None:
        facts["group"] = group
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        _print(facts)
    return 0


def _group(arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Make a group, and tell how its ranks reach each other: [rank][peer]."""
    if arguments.world_size is None:
        return None
    launch = launch_from(arguments, label="info")
    ranks = run_ranks("mooncake_ep.cli.info_rank:run", {}, launch)
    if not launch.reports:
        return None
    return {"device": launch.backend_name, "transports": [rank["transports"] for rank in ranks]}


def _package() -> Any:
    import mooncake_ep

    return mooncake_ep


def _library_path() -> str:
    from mooncake_ep import _lib

    # The system knows which file was really loaded; the module beside it is the answer on others.
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = [line.split(maxsplit=5)[5] for line in lines if "mooncake_ep" in line and ".so" in line]
    return paths[0] if paths else str(Path(_lib.__file__).with_name("libmooncake_ep.so"))


def _backends() -> dict[str, Any]:
    found = {}
    for name in ("cpu", "cuda", "maca"):
        info = _package().backend_info(name)
        found[name] = {
            "name": info.name,
            "available": bool(info.available),
            "device_count": int(info.device_count),
            "reason": info.reason,
        }
    return found


def _rdma() -> dict[str, Any]:
    info = _package().rdma_info()
    return {
        "available": info.available,
        "device_count": info.device_count,
        "reason": info.reason,
    }


def _limits() -> dict[str, int]:
    from mooncake_ep._lib import lib

    return {name: int(getattr(lib, constant)) for name, constant in _LIMITS.items()}


def machine() -> dict[str, Any]:
    """Facts about this machine."""
    return {
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "shared_memory": _shared_memory(),
        "numa_nodes": len(list(Path("/sys/devices/system/node").glob("node[0-9]*"))) or 1,
        "boot_id": _first_line("/proc/sys/kernel/random/boot_id")[:_BOOT_ID_SHOWN],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _shared_memory() -> dict[str, Any] | None:
    try:
        status = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return {
        "path": _SHARED_MEMORY,
        "size_bytes": status.f_blocks * status.f_frsize,
        "free_bytes": status.f_bavail * status.f_frsize,
    }


def _first_line(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _version_of(module: str) -> str:
    try:
        return importlib.metadata.version(module)
    except importlib.metadata.PackageNotFoundError:
        # CuPy, for example, is installed as cupy-cuda13x.
        owners = importlib.metadata.packages_distributions().get(module, ())
        return importlib.metadata.version(owners[0]) if owners else "unknown"


def _python() -> dict[str, Any]:
    frameworks = {}
    for name in _FRAMEWORKS:
        # Looked up, not imported: an import may take seconds.
        if importlib.util.find_spec(name) is not None:
            frameworks[name] = _version_of(name)
    return {"version": platform.python_version(), "frameworks": frameworks}


def _print(facts: dict[str, Any]) -> None:
    print(f"mooncake_ep {facts['version']}")
    print(f"library    {facts['library']}")
    for backend in facts["backends"].values():
        devices = f"{backend['device_count']} device{'s' if backend['device_count'] != 1 else ''}"
        state = (
            f"available, {devices}"
            if backend["available"]
            else f"not available: {backend['reason']}"
        )
        print(f"backend    {backend['name']:<5s} {state}")
    print(f"rdma       IBGDA unavailable, using P2P-only path: {facts['rdma']['reason']}")
    print("limits     " + ", ".join(f"{name} {value}" for name, value in facts["limits"].items()))
    machine = facts["machine"]
    print(f"machine    {machine['system']}, boot id {machine['boot_id'] or 'unknown'}")
    print(
        f"           {machine['cpu']}, {machine['cores_usable']} of {machine['cores']} cores "
        f"usable, {machine['numa_nodes']} NUMA node{'s' if machine['numa_nodes'] != 1 else ''}"
    )
    print(f"           memory {_gib(machine['memory_bytes'])}, {_shared_memory_text(machine)}")
    python = facts["python"]
    frameworks = ", ".join(f"{name} {version}" for name, version in python["frameworks"].items())
    print(f"python     {python['version']}; {frameworks or 'no array framework found'}")
    if "group" in facts:
        _print_group(facts["group"])


def _print_group(group: dict[str, Any]) -> None:
    transports = group["transports"]
    names = [[one["name"] for one in row] for row in transports]
    width = max(len(name) for row in names for name in row)
    print(f"group      {len(names)} ranks on {group['device']}, how each reaches each:")
    print(
        "           rank  " + " ".join(f"{peer:<{width}d}" for peer in range(len(names))).rstrip()
    )
    for rank, row in enumerate(names):
        print(f"           {rank:<5d} " + " ".join(f"{name:<{width}s}" for name in row).rstrip())
    reasons = {(one["name"], one["reason"]) for row in transports for one in row}
    for name, reason in sorted(reasons):
        print(f"           {name}: {reason}")


def _shared_memory_text(machine: dict[str, Any]) -> str:
    shared = machine["shared_memory"]
    if shared is None:
        return f"no {_SHARED_MEMORY}"
    return f"{shared['path']} {_gib(shared['size_bytes'])}, {_gib(shared['free_bytes'])} free"


def _gib(byte_count: int) -> str:
    return f"{byte_count / 2**30:.1f} GiB"
