"""The Python APIs of other expert-parallel libraries, over this one, for programs written for them.

mooncake    Mooncake EP's ``mooncake.mooncake_ep_buffer``
deep_ep     DeepEP's ``deep_ep``, in low-latency mode

Import a module by its name here, or let the other library's import line find it: for this process
by enter_alias(), for all by install_alias() or, in a shell,

    python -m mooncake_ep.compat install mooncake

Where the real library is, that is refused. The modules need torch; this package and the aliases do
not.
"""

from __future__ import annotations

from pathlib import Path

from ._alias import enter as enter_alias
from ._alias import install as install_alias
from ._alias import leave as leave_alias
from ._alias import remove as remove_alias

__all__ = [
    "enter_alias",
    "install_alias",
    "install_mooncake_alias",
    "leave_alias",
    "remove_alias",
    "remove_mooncake_alias",
]


def install_mooncake_alias(directory: str | None = None) -> Path:
    """Write a package ``mooncake`` whose ``mooncake_ep_buffer`` is ours; see install_alias()."""
    return install_alias("mooncake", directory)


def remove_mooncake_alias(directory: str | None = None) -> bool:
    """Take that package away; see remove_alias()."""
    return remove_alias("mooncake", directory)
