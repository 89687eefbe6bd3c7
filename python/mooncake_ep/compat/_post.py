"""Letters between the ranks of a Buffer, over TCP, that do without those that are lost.

The collectives of a process group wait for every rank, fail in their own ways once one is gone, and
often do not work again. Here each rank listens at a place of its own, from the time when all were
there: a letter to a rank that is late waits there for it, and one to a process that has ended comes
back at once.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import selectors
import socket
import struct
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .._lib import EpError

_HEADER = struct.Struct("!16sIII")  # secret, sender, bytes of the key, bytes of the text
_SECRET_BYTES = 16
_LETTER_BYTES_MAX = 1 << 24
_READ_BYTES = 1 << 16
_LOOPBACK = "127.0.0.1"
_TRIAL_S = 10.0  # after it a place counts as one that cannot be reached
_FIRST_STEP = ", step 0"
# What is not done in less: threads of a busy host take turns, and memory is made between letters.
_AGREE_S, _MAKE_S = 1.0, 10.0
_GRACE_S = 1.0  # between the end of a connection and a letter that was sent before, on another one
_UNDER_WAY = (0, errno.EINPROGRESS)


@dataclass(slots=True)
class _Outgoing:
    """A letter to a rank, as far as it is not sent yet. Its end stays open, to see the rank end."""

    peer: int
    rest: memoryview
    is_connected: bool = False


@dataclass(slots=True)
class _Incoming:
    """What has come of a letter, and its key once all has."""

    content: bytearray
    key: str | None = None


class PostOffice:
    """One rank's place, and those of its peers."""

    def __init__(
        self, listener: socket.socket, secret: bytes, rank: int, places: list[Any]
    ) -> None:
        """Serve ``rank``; places: [host, port, secret] by rank. See open_post_office()."""
        self._listener, self._secret = listener, secret
        self.rank, self.size = rank, len(places)
        self._places = places
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._incoming: dict[Any, _Incoming] = {}
        self._inbox: dict[tuple[str, int], bytes] = {}
        # The key of a first step that a rank has not gone beyond, and since when it is known.
        self._asked: dict[int, tuple[str, float]] = {}
        self._gone: set[int] = set()
        self._hung_up: dict[int, float] = {}  # peers of this exchange that may have ended, and when
        self.close = weakref.finalize(self, _close, self._selector, listener, self._incoming)

    def exchange(
        self,
        key: str,
        text: bytes,
        awaited: set[int],
        timeout_s: float,
        told: set[int],
    ) -> dict[int, bytes]:
        """Send ranks a letter, and return those of ``awaited`` ranks that have the same key.

        Of ranks that have ended, and of those that are late, there is none. A key is used once.
        EpError if it is the key of a first step, and a rank waits in another one for this rank.
        ``told``: who is sent it.
        """
        deadline = time.monotonic() + timeout_s
        self._hung_up.clear()
        outgoing = self._send(key, text, told)
        try:
            while True:
                missing = {peer for peer in awaited - self._gone if (key, peer) not in self._inbox}
                unsent = {one.peer for one in outgoing.values() if one.rest} & (awaited or told)
                now = time.monotonic()
                if not (missing or unsent - self._gone) or now >= deadline:
                    break
                self._give_up(missing, now)
                ends = [when + _GRACE_S for peer, when in self._hung_up.items() if peer in missing]
                again = self._compare(key, missing, now)
                self._work(outgoing, min([deadline, again, *ends]) - now)
        finally:
            for end in outgoing:
                self._forget(end)
            for end in [end for end, letter in self._incoming.items() if letter.key == key]:
                self._end_incoming(end)
        texts = {peer: self._inbox.pop((key, peer), None) for peer in awaited}
        return {
            peer: one for peer, one in texts.items() if one is not None and peer not in self._gone
        }

    def _send(self, key: str, text: bytes, told: set[int]) -> dict[Any, _Outgoing]:
        """Begin to send."""
        outgoing: dict[Any, _Outgoing] = {}
        name = key.encode()
        for peer in told - self._gone - {self.rank}:
            host, port, secret = self._places[peer]
            header = _HEADER.pack(bytes.fromhex(secret), self.rank, len(name), len(text))
            end = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            end.setblocking(False)
            if end.connect_ex((host, port)) not in _UNDER_WAY:
                end.close()
                self._gone.add(peer)
                continue
            outgoing[end] = _Outgoing(peer, memoryview(header + name + text))
            self._selector.register(end, selectors.EVENT_READ | selectors.EVENT_WRITE)
        return outgoing

    def _give_up(self, missing: set[int], now: float) -> None:
        """Note who has ended: whose letter has not come although the connection is long over."""
        for peer in missing & self._hung_up.keys():
            if now >= self._hung_up[peer] + _GRACE_S:
                self._gone.add(peer)

    def _compare(self, key: str, missing: set[int], now: float) -> float:
        """Raise EpError if a rank waits for this one to do something else: it would for ever.

        Returns when to look again, as another letter of that rank may be on its way.
        """
        again = math.inf
        for peer in missing & self._asked.keys() if key.endswith(_FIRST_STEP) else ():
            other, since = self._asked[peer]
            if other == key or self.rank not in json.loads(self._inbox.get((other, peer), b"[]")):
                continue
            again = min(again, since + _GRACE_S)
            if now >= again:
                # It fails on all of them; what they ask next may be anything.
                for asker, (asked, _) in self._asked.items():
                    self._inbox.pop((asked, asker), None)
                self._asked.clear()
                mine, theirs = (one.removesuffix(_FIRST_STEP) for one in (key, other))
                raise EpError(
                    "ranks have called with different arguments: memory is to be made by rank "
                    f"{self.rank} for {mine}, by rank {peer} for {theirs}"
                )
        return again

    def _work(self, outgoing: dict[Any, _Outgoing], timeout_s: float) -> None:
        """Do what can be done, or wait for it."""
        timeout = None if timeout_s == math.inf else max(0.0, timeout_s)
        for selected, events in self._selector.select(timeout):
            end = selected.fileobj
            if end is self._listener:
                self._accept()
            elif end in outgoing:
                self._go_on(end, outgoing[end], events)
            else:
                self._read(end)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # it may have gone meanwhile
            end, _ = self._listener.accept()
            end.setblocking(False)
            self._incoming[end] = _Incoming(bytearray())
            self._selector.register(end, selectors.EVENT_READ)

    def _go_on(self, end: Any, letter: _Outgoing, events: int) -> None:
        """Send more of a letter, or see that the peer has ended."""
        try:
            if not letter.is_connected:
                error = end.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if error:
                    raise OSError(error, os.strerror(error))
                letter.is_connected = True
            if letter.rest and events & selectors.EVENT_WRITE:
                letter.rest = letter.rest[end.send(letter.rest) :]
                if not letter.rest:
                    self._selector.modify(end, selectors.EVENT_READ)
            if events & selectors.EVENT_READ:
                end.recv(1)  # nothing is ever sent this way: it is the end
                raise OSError(errno.ECONNRESET, "the other end was closed")
        except BlockingIOError:
            pass
        except OSError:
            letter.rest = letter.rest[:0]
            self._selector.unregister(end)
            if letter.is_connected:
                self._hung_up[letter.peer] = time.monotonic()
            else:
                self._gone.add(letter.peer)

    def _read(self, end: Any) -> None:
        """Read more of a letter; one that is not to us, or is broken off, is thrown away."""
        letter = self._incoming[end]
        try:
            part = end.recv(_READ_BYTES)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        if not part or letter.key is not None:
            self._end_incoming(end)
            return
        letter.content += part
        if len(letter.content) < _HEADER.size:
            return
        secret, sender, key_bytes, text_bytes = _HEADER.unpack_from(letter.content)
        if secret != self._secret or key_bytes + text_bytes > _LETTER_BYTES_MAX:
            self._end_incoming(end)
        elif len(letter.content) >= _HEADER.size + key_bytes + text_bytes:
            content = bytes(letter.content[_HEADER.size :])
            letter.key = content[:key_bytes].decode(errors="replace")
            self._asked.pop(sender, None)
            if letter.key.endswith(_FIRST_STEP):
                self._asked[sender] = (letter.key, time.monotonic())
            self._inbox[letter.key, sender] = content[key_bytes : key_bytes + text_bytes]

    def _end_incoming(self, end: Any) -> None:
        del self._incoming[end]
        self._forget(end)

    def _forget(self, end: Any) -> None:
        with contextlib.suppress(KeyError):
            self._selector.unregister(end)
        end.close()


def open_post_office(rank: int, tell: Callable[[Any], list[Any]]) -> PostOffice | None:
    """Make every rank's, or none if some cannot reach some. Collective.

    ``tell`` gathers what JSON can say from all ranks, in their order.
    """
    hosts = tell(socket.gethostname())
    is_one_host = all(host == hosts[0] for host in hosts)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.bind((_LOOPBACK if is_one_host else "", 0))
    listener.listen(socket.SOMAXCONN)
    listener.setblocking(False)
    secret = os.urandom(_SECRET_BYTES)
    host = _LOOPBACK if is_one_host else _own_address()
    places = tell([host, listener.getsockname()[1], secret.hex()])
    office = PostOffice(listener, secret, rank, places)
    others = set(range(len(places))) - {rank}
    try:
        reaches_all = office.exchange("trial", b"", others, _TRIAL_S, others).keys() == others
    except OSError:  # e.g. no more descriptors
        reaches_all = False
    if all(tell(reaches_all)):
        return office
    office.close()
    return None


def agree(office: PostOffice, name: str, wanted: set[int], timeout_s: float) -> set[int]:
    """Find out who is here to do something together, of ranks that are ``wanted``.

    All that are in it return the same set; who comes too late for the others returns itself alone.
    Each step waits for so long at most, and all but the first one for nobody as a rule; a second,
    if ``timeout_s`` is less. ``name`` is used once. EpError if ranks do not want the same.
    """
    timeout_s = max(timeout_s, _AGREE_S)
    everyone = set(range(office.size))
    view = wanted | {office.rank}
    for step in range(office.size + 2):  # each but two removes a rank
        text = json.dumps(sorted(view)).encode()
        letters = office.exchange(
            f"{name}, step {step}", text, view - {office.rank}, timeout_s, everyone
        )
        views = [set(json.loads(letter)) for letter in letters.values()]
        agreed = (view & {office.rank, *letters}).intersection(*views)
        if office.rank not in agreed:
            break  # the others go on without it
        # The first step asks who is here; what it finds has to be said by all before it holds.
        if step > 0 and agreed == view and all(other == view for other in views):
            return view
        view = agreed
    # They must not think that it still waits.
    office.exchange(f"{name}, left out", b"", set(), _GRACE_S, everyone)
    return {office.rank}


class Letters:
    """An all-gather of bytes among some ranks, for what they make together."""

    def __init__(self, office: PostOffice, name: str, members: set[int], timeout_s: float) -> None:
        """Serve ``members``, who agree on a name that is used once."""
        self._office, self._name = office, name
        self._members, self._timeout_s = members, max(timeout_s, _MAKE_S)
        self._count = 0
        self.lost: set[int] = set()

    def gather(self, data: bytes) -> list[bytes]:
        """Gather bytes from each member, in their order. EpError if one does not answer."""
        others = self._members - {self._office.rank}
        key = f"{self._name}, part {self._count}"
        self._count += 1
        letters = self._office.exchange(key, data, others, self._timeout_s, others)
        self.lost = others - letters.keys()
        if self.lost:
            raise EpError(f"ranks {sorted(self.lost)} were lost while a Buffer made memory")
        letters[self._office.rank] = data
        return [letters[rank] for rank in sorted(self._members)]


def _own_address() -> str:
    """Return by what other hosts reach this one."""
    given = os.environ.get("MOONCAKE_EP_TCP_ADDRESS")
    if given:
        return given
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route, contextlib.suppress(OSError):
        route.connect((os.environ.get("MASTER_ADDR", "192.0.2.1"), 1))  # sends nothing
        address = str(route.getsockname()[0])
        if not address.startswith("127."):
            return address
    with contextlib.suppress(OSError):
        return socket.gethostbyname(socket.gethostname())
    return _LOOPBACK


def _close(selector: Any, listener: socket.socket, incoming: dict[Any, _Incoming]) -> None:
    selector.close()
    listener.close()
    for end in incoming:
        end.close()
