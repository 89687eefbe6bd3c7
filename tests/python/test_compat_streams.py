"""mooncake_ep.compat._streams: who waits for whom, on a GPU that only counts.

Other tests run compat/ on GPUs. Here it is seen without one, also what no result shows: that
nothing is waited for beyond the call before, and that the current stream stays as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch")

from mooncake_ep.compat import _streams
from mooncake_ep.compat._streams import Streams

MAIN, OTHER, OURS = 1, 2, 3


@dataclass
class Gpu:
    """Streams are numbers; ``done`` counts what was queued on each of them.

    waits: (who, for whom, how much of its work); switches: how often the current stream was changed
    by us.
    """

    current: int = MAIN
    captured: set[int] = field(default_factory=set)
    done: Counter[int] = field(default_factory=Counter)
    waits: list[tuple[int, int, int]] = field(default_factory=list)
    events: int = 0
    switches: int = 0

    def torch(self) -> Any:
        """Return what stands for torch."""
        cuda = SimpleNamespace(
            Stream=lambda device, priority: Stream(self, OURS),
            current_device=lambda: 0,
            current_stream=lambda device: Stream(self, self.current),
            is_current_stream_capturing=lambda: self.current in self.captured,
            stream=lambda stream: Switch(self, stream),
        )
        return SimpleNamespace(cuda=cuda, empty=lambda size: None)

    def work(self, stream: int) -> None:
        """Queue something."""
        self.done[stream] += 1


@dataclass
class Event:
    """What was queued where when it was recorded."""

    stream: int = 0
    done: int = 0
    is_captured: bool = False


@dataclass(eq=True)
class Stream:
    """As torch.cuda.Stream; two objects may be the same stream."""

    gpu: Gpu = field(compare=False)
    cuda_stream: int

    def record_event(self, event: Event | None = None) -> Event:
        """Record a new event, or one anew."""
        gpu, me = self.gpu, self.cuda_stream
        gpu.events += event is None
        event = event or Event()
        event.stream, event.done, event.is_captured = me, gpu.done[me], me in gpu.captured
        return event

    def wait_event(self, event: Event) -> None:
        """Wait; CUDA refuses what would lead out of a capture or into it."""
        if event.is_captured:
            self.gpu.captured.add(self.cuda_stream)
        assert event.is_captured or self.cuda_stream not in self.gpu.captured
        self.gpu.waits.append((self.cuda_stream, event.stream, event.done))

    def wait_stream(self, stream: Stream) -> None:
        """Wait for all that is queued there."""
        self.wait_event(stream.record_event())


class Switch:
    """As torch.cuda.stream()."""

    def __init__(self, gpu: Gpu, stream: Stream) -> None:
        self.gpu, self.stream, self.before = gpu, stream.cuda_stream, gpu.current

    def __enter__(self) -> None:
        self.gpu.switches += 1
        self.gpu.current = self.stream

    def __exit__(self, *_: object) -> None:
        self.gpu.current = self.before


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Lend a GPU on which each call is one piece of work."""
    gpu = Gpu()
    monkeypatch.setattr(_streams, "torch", gpu.torch())
    monkeypatch.setattr(_streams, "stream_finder", lambda array: lambda device_id: gpu.current)
    return gpu


@pytest.fixture
def streams(gpu: Gpu) -> Streams:
    """Lend those of a buffer on it."""
    return Streams(SimpleNamespace(type="cuda", index=0))  # type: ignore[arg-type]


def call(gpu: Gpu, streams: Streams, stream: Any) -> Any:
    """Queue a call on the stream that was chosen for it."""
    gpu.work(stream.cuda_stream)
    streams.done(stream)
    return stream


def test_calls_on_one_stream_record_nothing_and_wait_for_nothing(
    gpu: Gpu, streams: Streams
) -> None:
    for _ in range(3):
        stream = call(gpu, streams, streams.current())
        call(gpu, streams, streams.again(stream))
    assert (gpu.waits, gpu.events, gpu.switches) == ([], 0, 0)


def test_a_call_waits_for_the_call_before_it_and_for_no_later_work(
    gpu: Gpu, streams: Streams
) -> None:
    call(gpu, streams, streams.current())
    gpu.current = OTHER
    call(gpu, streams, streams.current())
    gpu.work(OTHER)
    gpu.current = MAIN
    stream = call(gpu, streams, streams.current())
    assert gpu.waits == [(OTHER, MAIN, 1), (MAIN, OTHER, 1)]
    gpu.work(MAIN)
    gpu.current = OTHER
    assert call(gpu, streams, streams.again(stream)).cuda_stream == MAIN
    assert gpu.waits[2:] == []


def test_our_own_stream_waits_for_the_current_one_and_the_next_call_for_it(
    gpu: Gpu, streams: Streams
) -> None:
    for done in (1, 2):
        gpu.work(MAIN)
        queued = gpu.done[MAIN]
        call(gpu, streams, streams.side())
        assert (OURS, MAIN, queued) in gpu.waits
        call(gpu, streams, streams.current())
        assert gpu.waits[-1] == (MAIN, OURS, done)


def test_the_current_stream_stays_and_events_are_recorded_again(gpu: Gpu, streams: Streams) -> None:
    call(gpu, streams, streams.current())
    call(gpu, streams, streams.side())
    events, switches = gpu.events, gpu.switches
    for _ in range(3):
        call(gpu, streams, streams.side())
        call(gpu, streams, streams.again(call(gpu, streams, streams.current())))
    assert (gpu.events, gpu.switches) == (events, switches)


def test_what_follows_a_call_switches_to_its_stream_only_from_another(
    gpu: Gpu, streams: Streams
) -> None:
    stream = call(gpu, streams, streams.current())
    for current, switches in ((MAIN, 0), (OTHER, 1)):
        gpu.current = current
        with streams.on(stream):
            assert gpu.current == MAIN
        assert (gpu.current, gpu.switches) == (current, switches)


@pytest.mark.parametrize("inside", [Streams.current, Streams.side])
def test_a_capture_waits_for_nothing_before_it_and_nothing_after_it_for_the_capture(
    gpu: Gpu, streams: Streams, inside: Any
) -> None:
    call(gpu, streams, streams.current())
    call(gpu, streams, streams.side())
    call(gpu, streams, streams.current())
    for _ in range(2):
        gpu.current = OTHER
        gpu.captured = {OTHER}
        waits = len(gpu.waits)
        call(gpu, streams, inside(streams))
        call(gpu, streams, streams.current())
        allowed = {(OURS, OTHER), (OTHER, OURS)}
        assert {wait[:2] for wait in gpu.waits[waits:]} <= allowed
        gpu.current = MAIN
        gpu.captured = set()
        call(gpu, streams, inside(streams))  # Stream.wait_event() would have refused
