"""Let other libraries' import lines find the faces here: only on request, and never beside them."""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import sys
import sysconfig
import types
from pathlib import Path

_MARK = "# Made by mooncake_ep.compat; `python -m mooncake_ep.compat remove` takes it away.\n"

_DEEP_EP = "mooncake_ep.compat.deep_ep"

# Package that others import -> its modules, "" for itself, parents first -> the module here.
ALIASES = {
    "mooncake": {"": "", "mooncake_ep_buffer": "mooncake_ep.compat.mooncake"},
    "deep_ep": {
        "": _DEEP_EP,
        "buffer": _DEEP_EP,
        "buffers": "",
        "buffers.legacy": _DEEP_EP,
        "utils": _DEEP_EP,
    },
}


def install(package: str, directory: str | None = None) -> Path:
    """Write the package into ``directory``, by default where Python keeps what pip installs.

    From then on every new process of this Python finds it. Returns where it is. Doing it again is
    harmless. Raises ValueError (no such alias), RuntimeError (the real package is there: remove it
    first), OSError (the directory cannot be written).
    """
    modules = _modules(package)
    where = _place(package, directory)
    _refuse_the_real(package, where)
    where.mkdir(parents=True, exist_ok=True)
    for name, source in modules.items():
        lines = f"from {source} import *  # noqa: F403\n" if source else ""
        path = where.joinpath(*name.split("."))
        if _is_package(name, modules):
            path.mkdir(exist_ok=True)
            path = path / "__init__"
        path.with_suffix(".py").write_text(_MARK + lines)
    importlib.invalidate_caches()
    return where


def remove(package: str, directory: str | None = None) -> bool:
    """Take away what install() wrote; tell whether there was any."""
    _modules(package)
    where = _place(package, directory)
    if not _is_ours(where):
        return False
    shutil.rmtree(where)
    importlib.invalidate_caches()
    return True


def enter(package: str) -> None:
    """Let this process alone find the package, without writing any file.

    Raises ValueError (no such alias), RuntimeError (the real package can be imported).
    """
    modules = _modules(package)
    if package in sys.modules and getattr(sys.modules[package], "_mooncake_ep_alias", False):
        return
    _refuse_the_real(package, _place(package, None))
    for name, source in modules.items():
        module = types.ModuleType(package if not name else f"{package}.{name}")
        module._mooncake_ep_alias = True  # type: ignore[attr-defined]
        if source:
            face = importlib.import_module(source)
            module.__dict__.update({one: getattr(face, one) for one in face.__all__})
        if _is_package(name, modules):
            module.__path__ = []
        if name:
            parent, _, last = module.__name__.rpartition(".")
            setattr(sys.modules[parent], last, module)
        sys.modules[module.__name__] = module


def leave(package: str) -> None:
    """Undo enter()."""
    for name in _modules(package):
        full = package if not name else f"{package}.{name}"
        if getattr(sys.modules.get(full), "_mooncake_ep_alias", False):
            del sys.modules[full]


def _modules(package: str) -> dict[str, str]:
    if package not in ALIASES:
        raise ValueError(f"package {package!r} is not one of {', '.join(ALIASES)}")
    return ALIASES[package]


def _is_package(name: str, modules: dict[str, str]) -> bool:
    return not name or any(other.startswith(f"{name}.") for other in modules)


def _place(package: str, directory: str | None) -> Path:
    return Path(directory or sysconfig.get_path("purelib")) / package


def _is_ours(where: Path) -> bool:
    marked = where / "__init__.py"
    return marked.is_file() and marked.read_text().startswith(_MARK)


def _refuse_the_real(package: str, where: Path) -> None:
    """Raise if the import line already finds something that is not ours."""
    module = sys.modules.get(package)
    if module is not None and not getattr(module, "_mooncake_ep_alias", False):
        places = list(getattr(module, "__path__", []))
    else:
        spec = importlib.util.find_spec(package) if module is None else None
        places = (
            [] if spec is None else list(spec.submodule_search_locations or [spec.origin or ""])
        )
    if where.exists():
        places.append(str(where))
    for place in places:
        if not _is_ours(Path(place)):
            raise RuntimeError(
                f"{package} is installed already, in {place}: an alias would hide it. Uninstall it "
                f"first, or import mooncake_ep.compat.{package} by its own name"
            )
