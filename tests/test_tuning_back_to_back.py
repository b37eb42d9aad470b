"""What an eager call takes in a loop, on a made-up host and device: not what a host takes that has just come from something else."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from titans_backends.offers import offers
from titans_backends.tuning import back_to_back
from titans_backends.tuning import session as sessions
from titans_backends.tuning.back_to_back import CpuSampler, EagerSampler, row_of
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket

FLUSH_US, AFRESH_US = 40.0, 90.0


class World:
    """Two clocks in microseconds: the host's moves by what it does, the device's by what it runs, and not before that was queued.

    A call takes the host `AFRESH_US` more where it has done something else since its last one, and the device `cold_us` more behind a flush.
    """

    def __init__(self) -> None:
        self.host, self.free, self.cold, self.afresh, self.calls = 0.0, 0.0, True, True, 0

    def run(self, us: float) -> None:
        self.free = max(self.free, self.host) + us

    def zero_(self) -> None:
        self.host += 2.0
        self.run(FLUSH_US)
        self.cold = True

    def synchronize(self, _: object = None) -> None:
        self.host = max(self.host, self.free)

    def kernel(self, host_us: float, device_us: float = 0.0, cold_us: float = 0.0) -> Callable[[], None]:
        def call() -> None:
            self.calls += 1
            self.host += host_us + AFRESH_US * self.afresh
            self.run(device_us + cold_us * self.cold)
            self.cold = self.afresh = False

        return call


class Event:
    def __init__(self, world: World) -> None:
        self.world, self.at = world, 0.0

    def record(self) -> None:
        self.world.run(0.0)
        self.at = self.world.free

    def query(self) -> bool:
        return self.at <= self.world.host

    def elapsed_time(self, other: Event) -> float:
        return (other.at - self.at) / 1e3


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(back_to_back.time, "perf_counter_ns", lambda: 1e3 * found.host)
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing: Event(found))
    monkeypatch.setattr(torch.cuda, "synchronize", found.synchronize)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=1))
    monkeypatch.setattr(torch, "empty", lambda *a, **k: found)
    return found


def test_a_call_of_half_a_second_on_a_cpu_is_made_once_a_sample(world: World) -> None:
    sampler, long, short = CpuSampler(), world.kernel(600_000.0), world.kernel(100_000.0)
    assert [sampler.sample("long", long) for _ in range(3)] == [600_000.0] * 3
    assert world.calls == 4, "two for the first, of which one may have been interrupted"
    sampler.sample("short", short)
    assert world.calls == 4 + 4, "two to know how long it takes, one before the row, and the row"


def sampled(world: World, sampler: CpuSampler | EagerSampler, kernels: dict[str, Callable[[], None]], rounds: int = 3) -> dict[str, list[float]]:
    """Each of them in turn; between two the host does something else."""
    found: dict[str, list[float]] = {name: [] for name in kernels}
    for _ in range(rounds):
        for name, kernel in kernels.items():
            world.afresh = True
            found[name].append(sampler.sample(name, kernel))
    return found


def test_a_host_that_comes_from_something_else_is_not_what_is_timed_on_a_cpu(world: World) -> None:
    found = sampled(world, CpuSampler(), {"one": world.kernel(10.0), "other": world.kernel(30.0)})
    assert found == {"one": [pytest.approx(10.0)] * 3, "other": [pytest.approx(30.0)] * 3}


def test_the_same_on_cuda_where_the_host_is_the_slower(world: World) -> None:
    found = sampled(world, EagerSampler(torch.device("cpu")), {"one": world.kernel(20.0, 5.0), "other": world.kernel(33.0, 5.0)})
    assert found["one"] == [pytest.approx(20.0, rel=0.02)] * 3
    assert found["other"] == [pytest.approx(33.0, rel=0.02)] * 3


def test_where_the_device_is_the_slower_it_is_its_time_from_a_cold_cache(world: World) -> None:
    found = sampled(world, EagerSampler(torch.device("cpu")), {"one": world.kernel(20.0, 300.0, 60.0), "other": world.kernel(150.0, 310.0)})
    assert found["one"] == [pytest.approx(360.0)] * 3
    assert found["other"] == [pytest.approx(310.0)] * 3


def test_a_cold_call_for_which_the_device_waited_says_nothing_of_the_device(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(back_to_back, "_MOST_FLUSHES", 2)
    found = sampled(world, EagerSampler(torch.device("cpu")), {"one": world.kernel(200.0, 5.0, 190.0)})
    assert found["one"] == [pytest.approx(200.0, rel=0.03)] * 3, "in the cold call the device would wait 120 and take 195"


@pytest.mark.parametrize(("host_us", "device_us", "wanted"), [(9000.0, 20.0, 9000.0), (20.0, 9000.0, 9000.0)])
def test_a_long_call_is_made_once_a_sample(world: World, host_us: float, device_us: float, wanted: float) -> None:
    sampler, kernel = EagerSampler(torch.device("cpu")), world.kernel(host_us, device_us)
    assert sampler.sample("long", kernel) == pytest.approx(wanted, rel=0.02)
    before = world.calls
    assert sampler.sample("long", kernel) == pytest.approx(wanted, rel=0.02)
    assert world.calls == before + 1


def test_one_interrupted_call_makes_no_row_short_for_good(world: World) -> None:
    sampler, kernel = CpuSampler(), world.kernel(10.0)
    sampler._calls["it"] = 1e5
    sampler.sample("it", kernel)
    before = world.calls
    sampler.sample("it", kernel)
    assert world.calls == before + sum(row_of(10.0))


def test_a_row_is_bounded_and_something_goes_before_it() -> None:
    assert row_of(0.0) == row_of(1.0) == (5, 16)
    assert row_of(1e9) == (1, 1)


def test_a_session_makes_each_plan_once_however_often_it_is_sampled_and_the_plan_is_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sample that made its plan first timed the plan's first call, for every candidate."""
    bucket = plan("cpu", ops=("gated_delta_step",), heads=[(2, 2)], head_dims=[(8, 8)])[0]
    session = sessions.Session(bucket, "cpu", 2, references=False)
    (offer,) = offers(signature_of_bucket(bucket, "cpu"), session.machine, names=["eager"])
    (candidate,), made, repeated = offer.forward, list[object](), list[object]()

    class Remembering:
        def remember(self, call: object, one: object) -> tuple[tuple[None, ...], Callable[[object], object]]:
            made.append(one)
            return (None,), repeated.append

    monkeypatch.setattr(sessions.registry, "remembering", lambda module: Remembering())
    session.sample(candidate, None)  # it warms up by a plan of its own
    first = len(made)
    for _ in range(3):
        session.sample(candidate, None)
    assert first == len(made) == 2
    assert len(repeated) >= 4 * 17
