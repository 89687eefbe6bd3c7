"""python -m mooncake_ep.compat {install,remove} PACKAGE [--directory DIRECTORY]."""

from __future__ import annotations

import argparse
import sys

from . import _alias


def main(arguments: list[str] | None = None) -> int:
    """Install or remove an alias; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m mooncake_ep.compat", description=__doc__)
    parser.add_argument("action", choices=["install", "remove"])
    parser.add_argument("package", choices=sorted(_alias.ALIASES), nargs="?", default="mooncake")
    parser.add_argument("--directory", help="default: where Python keeps what pip installs")
    given = parser.parse_args(arguments)
    try:
        if given.action == "install":
            print(f"installed {_alias.install(given.package, given.directory)}")
        elif _alias.remove(given.package, given.directory):
            print(f"removed {given.package}")
        else:
            print(f"there is no alias {given.package}")
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
