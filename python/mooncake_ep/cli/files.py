"""The files that users name for a command to write: refused before any work is done, if at all."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UserError


def check_writable(option: str, path: Path) -> None:
    """Refuse what cannot be written. Leaves no file that was not there."""
    folder = path.resolve().parent
    if not folder.is_dir():
        raise UserError(f"{option} {path}: there is no folder {folder}")
    try:
        if path.is_dir():
            raise UserError(f"{option} {path}: it is a folder")
        was_there = os.path.lexists(path)
        if was_there and not path.is_file():
            return  # a pipe, say: to open it might wait
        path.open("ab").close()  # modes do not tell: /proc is a folder where root makes no file
        if not was_there:
            path.unlink(missing_ok=True)  # other ranks of a launcher do the same
    except OSError as error:
        raise cannot_write(option, path, error) from None


def cannot_write(option: str, path: Path, error: OSError) -> UserError:
    """What to tell the user of it."""
    return UserError(f"{option} {path}: {error.strerror or error}")
