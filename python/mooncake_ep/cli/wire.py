"""Messages between a rank and the process that started it: lines of JSON, bytes as base64."""

from __future__ import annotations

import base64
import json
from typing import Any


class Lines:
    """Cuts a stream of bytes into lines."""

    def __init__(self) -> None:
        """Begin with nothing pending."""
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Add bytes, none at the end of the stream; returns the lines that are now complete."""
        if not data:
            rest, self._pending = bytes(self._pending), bytearray()
            return [rest] if rest else []
        if b"\n" not in data:
            self._pending += data
            return []
        *lines, rest = (bytes(self._pending) + data).split(b"\n")
        self._pending = bytearray(rest)
        return lines


def encode(message: dict[str, Any]) -> bytes:
    """One message as a line."""
    return json.dumps(message, default=_wrap_bytes).encode() + b"\n"


def decode(line: bytes) -> dict[str, Any]:
    """The message of one line."""
    message: dict[str, Any] = json.loads(line, object_hook=_unwrap_bytes)
    return message


def _wrap_bytes(value: object) -> dict[str, str]:
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {"__bytes__": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} cannot travel between processes")


def _unwrap_bytes(fields: dict[str, Any]) -> object:
    return base64.b64decode(fields["__bytes__"]) if fields.keys() == {"__bytes__"} else fields
