"""A graph's replay on a made-up device: the time between the events holds none of the host's. And what captures share."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from titans_backends.tuning import sampler
from titans_backends.tuning.sampler import GraphSampler

FLUSH_US, REPLAY_US, HOST_US = 40.0, 9.0, 60.0


class Device:
    """Two clocks: the host's moves by what it enqueues, the device's by what it runs, and not before it was enqueued."""

    def __init__(self) -> None:
        self.host, self.free, self.flushes = 0.0, 0.0, 0

    def run(self, us: float) -> None:
        self.free = max(self.free, self.host) + us

    def zero_(self) -> None:
        self.flushes += 1
        self.host += 2.0
        self.run(FLUSH_US)

    def synchronize(self) -> None:
        self.host = max(self.host, self.free)

    def replay(self) -> None:
        self.host += HOST_US
        self.run(REPLAY_US)


class Event:
    """Records when the device comes to it."""

    def __init__(self, device: Device) -> None:
        self.device, self.at = device, 0.0

    def record(self) -> None:
        self.device.run(0.0)
        self.at = self.device.free

    def query(self) -> bool:
        return self.at <= self.device.host

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e3


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Device, GraphSampler]]:
    def make() -> tuple[Device, GraphSampler]:
        device = Device()
        found = object.__new__(GraphSampler)
        found._flush, found._device = device, torch.device("cpu")  # type: ignore[assignment]
        found._graphs, found._flushes = {"k": device}, 1  # type: ignore[dict-item]
        monkeypatch.setattr(sampler, "_events", lambda: (Event(device), Event(device)))
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _: device.synchronize())
        return device, found

    return make


def test_a_replay_that_the_device_waited_for_is_run_again_behind_a_longer_flush(made: Callable[[], tuple[Device, GraphSampler]]) -> None:
    device, found = made()
    assert found.sample("k", lambda: None) == pytest.approx(REPLAY_US)
    assert found._flushes == 2  # one flush of 40 µs is over before the host's 60 µs are
    assert device.flushes == 1 + 1 + 2
    device.flushes = 0
    assert found.sample("k", lambda: None) == pytest.approx(REPLAY_US)
    assert device.flushes == 2  # and stays as long


def test_a_host_that_is_late_once_lengthens_nothing(made: Callable[[], tuple[Device, GraphSampler]], monkeypatch: pytest.MonkeyPatch) -> None:
    _, found = made()
    found._flushes = 2
    delays = iter([1e4, 10.0, 10.0])

    def replay(self: Device) -> None:
        self.host += next(delays)
        self.run(REPLAY_US)

    monkeypatch.setattr(Device, "replay", replay)
    assert [found.sample("k", lambda: None) for _ in range(2)] == [pytest.approx(REPLAY_US)] * 2
    assert found._flushes == 2


def test_a_host_that_is_never_soon_enough_gets_an_answer_all_the_same(
    made: Callable[[], tuple[Device, GraphSampler]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, found = made()
    monkeypatch.setattr(f"{__name__}.HOST_US", 1e4)
    assert found.sample("k", lambda: None) > REPLAY_US
    assert found._flushes == sampler._MOST_FLUSHES


class Captured:
    """A graph that knows nothing but that it ran."""

    def __init__(self) -> None:
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def pools(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """A card without a device, and the pool of each capture on it."""
    found: list[object] = []
    stream = SimpleNamespace(wait_stream=lambda other: None)

    @contextlib.contextmanager
    def graph(captured: Captured, pool: object = None) -> Iterator[None]:
        found.append(pool)
        yield

    for name, value in {
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1),
        "graph_pool_handle": object,
        "Stream": lambda device: stream,
        "current_stream": lambda device: stream,
        "stream": lambda one: contextlib.nullcontext(),
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
        "CUDAGraph": Captured,
        "graph": graph,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return found


def test_captures_share_one_pool_and_keep_no_results(pools: list[object]) -> None:
    """Each with its own pool held its results and scratch: eighteen long backwards did not fit a card."""
    found, results = GraphSampler(torch.device("cpu")), list[weakref.ref[torch.Tensor]]()

    def kernel() -> torch.Tensor:
        made = torch.zeros(4)
        results.append(weakref.ref(made))
        return made

    for key in ("one", "other", "one"):
        found._captured(key, kernel)
    assert len(pools) == 2, "a capture a kernel, once"
    assert pools[0] is pools[1] is not None
    assert [one() for one in results] == [None] * 4, "a warm-up and a capture each, and nobody holds what they made"


def test_where_memory_ends_the_captures_before_are_given_up(pools: list[object]) -> None:
    """One large capture's pool left no room for another's call, and every backward of 32768 tokens counted as failed."""
    found, room = GraphSampler(torch.device("cpu")), 2

    def kernel() -> None:
        if len(found._graphs) >= room:
            raise torch.OutOfMemoryError("no memory")

    for key in ("one", "other", "third", "one"):
        found._captured(key, kernel)
    assert set(found._graphs) == {"third", "one"}
    assert len(set(map(id, pools))) == 2, "a fresh pool: the old one's memory is nobody's"
    room = 0
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        found._captured("fourth", kernel)
