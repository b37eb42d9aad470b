"""What noise leaves open: whom it concerns, the race that settles it, and what whole tunes of noisy made-up kernels choose with it and without."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from titans_backends import registry
from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import timings_path
from titans_backends.cache.timings import Measurement
from titans_backends.machine import detect
from titans_backends.offers import Offer, Pair
from titans_backends.tuning import doubt, rows, run, select, wire
from titans_backends.tuning.doubt import affordable, contested, deciding, doubt_of, doubtful, room
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.run import TuneReport, TuneRequest, tune
from titans_backends.tuning.select import Contender
from titans_backends.tuning.standing import Standing, rescaled
from titans_backends.tuning.store import Store
from titans_backends.tuning.timing import RaceRules
from titans_backends.verdict import ACCEPTED

(BUCKET,) = plan("cpu", ops=["gated_delta_rule"], seq_lens=[64], heads=[(1, 1)], head_dims=[(8, 8)], dtypes=["float32"], regimes=["inference"])
(TRAINING,) = plan("cpu", ops=["gated_delta_rule"], seq_lens=[64], heads=[(1, 1)], head_dims=[(8, 8)], dtypes=["float32"], regimes=["training"])


def contender(us: float, spread: float, order: int = 1) -> Contender:
    return Contender(Pair(Candidate("eager", f"v{order}")), us, spread, 0.0, 0, order)


def standing_of(bucket: Bucket, forward: Sequence[tuple[float, float]], backward: Sequence[tuple[float, float]] = ()) -> Standing:
    """Candidates with these times and spreads; the first of each direction is the default."""
    offer = Offer(
        registry.get("eager"), ACCEPTED, None,
        tuple(Candidate("eager", f"v{i}") for i in range(len(forward))),
        tuple(Candidate("eager", f"b{i}", direction="backward") for i in range(len(backward))),
    )  # fmt: skip
    found = Standing.of(bucket, signature_of_bucket(bucket), [offer], ())
    timed = zip(found.candidates, (*forward, *backward), strict=True)
    return found.with_measured({c: Measurement(c.name, direction=c.direction, us=us, spread=spread) for c, (us, spread) in timed})


def names(candidates: Sequence[Candidate]) -> list[str]:
    return [candidate.variant for candidate in candidates]


def test_the_room_is_the_medians_distance_and_both_intervals() -> None:
    assert room(contender(100, 0.0, 0), contender(98, 0.0)) == pytest.approx(0.02)
    assert room(contender(100, 0.03, 0), contender(100, 0.04)) == pytest.approx(0.05)
    assert room(contender(100, 0.0, 0), contender(120, 0.1)) == pytest.approx(-0.08)
    assert room(contender(100, 2.0, 0), contender(100, 0.0)) == 1.0


def test_quiet_measurements_leave_nothing_open_and_noisy_ones_name_whom_they_do() -> None:
    assert doubt_of(standing_of(BUCKET, [(100, 0.01), (99, 0.01), (300, 0.01)])) is None
    assert contested(standing_of(BUCKET, [(100, 0.01), (80, 0.01), (99, 0.01)])) == []
    found = standing_of(BUCKET, [(200, 0.01), (80, 0.04), (90, 0.2), (85, 0.04), (100, 0.01)])
    open_still = doubt_of(found)
    assert open_still is not None
    assert (open_still.chosen.pair.forward.variant, [one.pair.forward.variant for one in open_still.rivals]) == ("v1", ["v2"])
    assert open_still.share == pytest.approx((-10 + math.hypot(18, 3.2)) / 80)
    assert names(contested(found)) == ["v0", "v1", "v2"]  # the default is among them
    assert doubt_of(found, "memory") is None


def test_a_default_that_was_dropped_early_is_in_doubt() -> None:
    assert names(contested(standing_of(BUCKET, [(280, 1.03), (136, 0.2)]))) == ["v0", "v1"]


def test_who_was_dropped_after_a_sample_moves_no_older_time() -> None:
    winner, struck, kept = (Candidate("eager", name) for name in ("winner", "struck", "kept"))
    older = {c: Measurement(c.name, us=us, samples=45) for c, us in ((winner, 200.0), (struck, 220.0), (kept, 240.0))}
    newer = {winner: Measurement(winner.name, us=100.0, samples=40), struck: Measurement(struck.name, us=4400.0, samples=1)}
    assert rescaled(older, newer)[kept].us == pytest.approx(120)
    assert rescaled(older, {struck: newer[struck]})[kept].us == pytest.approx(4800)  # there is no other


def test_pairs_are_in_doubt_together_and_their_members_race_apart() -> None:
    found = standing_of(TRAINING, [(100, 0.01), (99, 0.01)], [(200, 0.01), (150, 0.15), (155, 0.15), (290, 0.01)])
    assert names(contested(found)) == ["v0", "v1", "b0", "b1", "b2"]


def test_the_deciding_race_stays_within_the_first_ones_time_and_leaves_the_slowest_out() -> None:
    found = standing_of(BUCKET, [(1e5, 0.1), (3e6, 2.0), (1e5, 0.1)])
    made = deciding(RaceRules(budget_s=4.0))
    assert (made.budget_s, made.least_rounds, made.final_rounds) == (4.0, doubt.LEAST_ROUNDS, 0)
    assert names(affordable(found, found.candidates, 4.0)) == ["v0", "v2"]
    assert affordable(found, found.candidates, 2.0) == []


@dataclass
class Lab:
    """Made-up kernels: their true times, the noise on each sample, and who was sampled how often."""

    times: Sequence[float]
    noise: Callable[[random.Random], float]
    random: random.Random
    sampled: dict[str, int]

    def offers(self, *_: object) -> list[Offer]:
        return [Offer(registry.get("eager"), ACCEPTED, None, tuple(Candidate("eager", f"v{i}") for i in range(len(self.times))))]

    def ask(self, request: Mapping[str, object], timeout_s: float) -> dict[str, object]:
        if request["do"] == "probe":
            return {"state": "usable", "reason": ""}
        if request["do"] == "reference":
            return {"us": None}
        if request["do"] == "check":
            return {"reason": "", "errors": [], "peak_mib": 1.0, "compile_s": 0.0}
        variant = wire.candidate_from(request["candidate"]).variant
        self.sampled[variant] = self.sampled.get(variant, 0) + 1
        return {"us": self.times[int(variant[1:])] * self.noise(self.random)}


class FakeHost:
    """Answers from the lab."""

    lab: Lab

    def __init__(self, device: str) -> None: ...

    def __enter__(self) -> FakeHost:
        return self

    def __exit__(self, *_: object) -> None: ...

    def open(self, request: object) -> None: ...

    def ask(self, request: Mapping[str, object], timeout_s: float) -> dict[str, object]:
        return self.lab.ask(request, timeout_s)


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Lab]:
    def made(times: Sequence[float], noise: Callable[[random.Random], float], seed: int) -> Lab:
        found = Lab(times, noise, random.Random(seed), {})
        monkeypatch.setattr(FakeHost, "lab", found, raising=False)
        monkeypatch.setattr(rows, "offers", found.offers)
        monkeypatch.setattr(doubt, "offers", found.offers)
        return found

    monkeypatch.setattr(run, "Host", FakeHost)
    monkeypatch.setattr(run, "processes", lambda: 0)
    return made


def tuned(path: Path, **request: object) -> TuneReport:
    given = {"bucket_s": 1.0, **request}
    return tune(TuneRequest((BUCKET,), output=path, **given))  # type: ignore[arg-type]


def wide(source: random.Random) -> float:
    return source.lognormvariate(0.0, 0.3)


def interrupted(source: random.Random) -> float:
    """A busy host: one sample in four takes long."""
    return source.uniform(2.0, 4.0) if source.random() < 0.25 else source.uniform(0.98, 1.02)


def two_modes(source: random.Random) -> float:
    return (1.5 if source.random() < 0.4 else 1.0) * source.uniform(0.97, 1.03)


FIELDS = ((110.0, 100.0, 104.0, 150.0), (130.0, 100.0, 125.0), (220.0, 100.0, 101.0, 210.0))
NOISES = (wide, interrupted, two_modes)


def regrets(lab: Callable[..., Lab], folder: Path, seeds: int) -> list[float]:
    found = []
    for noise in NOISES:
        for times in FIELDS:
            for seed in range(seeds):
                lab(times, noise, seed)
                (row,) = tuned(folder / f"{noise.__name__}{times[0]}{seed}.yaml").rows
                assert row.entry is not None
                found.append(times[int(row.entry.use.removeprefix("eager/v"))] / min(times) - 1)
    return found


def test_whole_tunes_under_noise_lose_less_than_five_percent_and_without_the_second_race_more(
    lab: Callable[..., Lab], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mended = regrets(lab, tmp_path / "mended", 3)
    monkeypatch.setattr(run, "_DECIDING", 0)
    monkeypatch.setattr(select, "NOISE", math.inf)
    without = regrets(lab, tmp_path / "without", 3)
    assert max(mended) <= 0.05
    assert sum(mended) / len(mended) <= 0.01
    assert max(without) > 0.2
    assert sum(without) / len(without) > 0.05


def test_a_quiet_race_is_not_run_again(lab: Callable[..., Lab], tmp_path: Path) -> None:
    quiet = lab((110.0, 100.0, 104.0), lambda source: source.uniform(0.999, 1.001), 0)
    (row,) = tuned(tmp_path / "quiet.yaml").rows
    assert row.entry is not None
    assert (row.entry.use, row.entry.doubt) == ("eager/v1", None)
    assert sum(quiet.sampled.values()) <= 3 * 10


def test_noise_that_stays_is_written_into_the_row_which_is_then_among_the_doubtful(lab: Callable[..., Lab], tmp_path: Path) -> None:
    def wild(source: random.Random) -> float:
        return source.lognormvariate(0.0, 2.0)

    noisy, path = lab((100.0, 100.0, 900.0), wild, 3), tmp_path / "noisy.yaml"
    (row,) = tuned(path, bucket_s=0.05).rows
    assert row.entry is not None
    assert row.entry.doubt is not None
    assert row.entry.doubt > 0.05
    assert "doubt: " in path.read_text()
    written = file.read(path, defaults_of).table
    assert written is not None
    assert written.rows[BUCKET].doubt == row.entry.doubt
    machine = detect("cpu")
    ((bucket, share),) = doubtful(Store.opened(machine, path), machine, "cpu")
    assert (bucket, share) == (BUCKET, pytest.approx(row.entry.doubt, rel=1e-2))
    for field, value in (("objective", "memory"), ("max_memory_mib", "7.0")):  # chosen by something else: no other may save time by that
        other = tmp_path / f"{field}.yaml"
        other.write_text(path.read_text().replace(" doubt:", f" {field}: {value}, doubt:"))
        timings_path(other).write_text(timings_path(path).read_text())
        assert doubtful(Store.opened(machine, other), machine, "cpu") == ()
    assert doubtful(Store.opened(machine, other), machine, "cpu", 7.0) == ((bucket, share),)
    noisy.sampled.clear()
    assert tuned(path).nothing_to_do  # it is current; only who asks for it measures it again
    noisy.noise = lambda source: source.uniform(0.99, 1.01)
    (again,) = tuned(path, doubtful=True).rows
    assert again.entry is not None
    assert (again.measured, again.entry.doubt, again.entry.us) == (True, None, pytest.approx(100.0, rel=0.02))
    assert doubtful(Store.opened(machine, path), machine, "cpu") == ()


def test_only_the_contested_are_measured_again(lab: Callable[..., Lab], tmp_path: Path) -> None:
    def bad_start(source: random.Random) -> float:
        return source.uniform(0.7, 1.3)

    path = tmp_path / "some.yaml"
    noisy = lab((100.0, 99.0, 101.0, 180.0), bad_start, 0)
    noisy_rules = {"bucket_s": 1e-9}  # three rounds, no second race
    tuned(path, **noisy_rules)
    noisy.sampled.clear()
    noisy.times = (*noisy.times, 300.0)  # a new one is for an ordinary tune to measure
    report = tuned(path, doubtful=True)
    assert report.rows[0].measured
    assert not {"v3", "v4"} & set(noisy.sampled)
    assert min(noisy.sampled[name] for name in ("v0", "v1", "v2")) > 30
