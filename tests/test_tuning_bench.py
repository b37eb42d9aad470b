"""One bucket's candidates against a host that answers from a table: who is checked, raced and written down, and whose states a backward gets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from titans_backends.backend import Candidate
from titans_backends.cache.timings import Measurement
from titans_backends.tuning import wire
from titans_backends.tuning.bench import Bench
from titans_backends.tuning.host import ChildAnswerError, ChildDied
from titans_backends.tuning.plan import plan
from titans_backends.tuning.standing import REFERENCE
from titans_backends.tuning.timing import RaceRules

(BUCKET,) = plan("cpu", ops=["gated_delta_rule"], seq_lens=[64], heads=[(1, 1)], head_dims=[(16, 16)], dtypes=["float32"], regimes=["training"])
PLAIN, SAVING = Candidate("any", "plain"), Candidate("any", "saving", saves_states=True)
BACK, READING = (Candidate("any", name, direction="backward", saves_states=saves) for name, saves in (("back", False), ("reading", True)))
RIGHT = {"reason": "", "errors": [["o", 1e-7]], "peak_mib": 2.0, "compile_s": 0.5}


@dataclass
class FakeHost:
    """Answers by request and variant; an exception among the answers is raised."""

    answers: dict[tuple[str, str], object] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)

    def open(self, request: wire.Message | None) -> None:
        self.asked.append(("open", str(request["heads"]) if request else "", None))

    def ask(self, request: wire.Message, timeout_s: float) -> dict[str, object]:
        assert timeout_s == 7.0
        kind = str(request["do"])
        variant = wire.candidate_from(request["candidate"]).variant if "candidate" in request else ""
        states = request.get("states_from")
        self.asked.append((kind, variant, None if states is None else wire.candidate_from(states).variant))
        answer = self.answers.get((kind, variant), RIGHT if kind == "check" else {"us": 100.0})
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, dict)
        return answer


def bench_of(**answers: object) -> tuple[Bench, FakeHost]:
    """`check_plain={...}` is the answer to a check of the variant "plain"."""
    host = FakeHost({(name.partition("_")[0], name.partition("_")[2]): answer for name, answer in answers.items()})
    return Bench(host, BUCKET, RaceRules(budget_s=0.0), 7.0), host  # type: ignore[arg-type]


def measured(bench: Bench, *candidates: Candidate) -> tuple[dict[Candidate, Measurement], list[tuple[str, str]]]:
    """What came of them, and what was told while it ran."""
    told: list[tuple[str, str]] = []
    found = bench.measure(
        candidates, {one: f"hash of {one.variant}" for one in candidates}, lambda one, said: told.append((one.variant, said.status))
    )
    return found, told


def test_what_passes_is_timed_with_its_peak_error_and_source_and_told_once() -> None:
    bench, _ = bench_of(sample_plain={"us": 250.0})
    found, told = measured(bench, PLAIN, BACK)
    one = found[PLAIN]
    assert (one.status, one.us, one.peak_mib, one.compile_s, one.errors, one.source) == ("ok", 250.0, 2.0, 0.5, (("o", 1e-7),), "hash of plain")
    assert one.samples is not None
    assert one.samples > 1
    assert found[BACK].direction == "backward"
    assert told == [("plain", "ok"), ("back", "ok")]


def test_a_backward_is_handed_the_states_of_a_forward_that_passed_and_saves_them() -> None:
    bench, host = bench_of()
    measured(bench, PLAIN, SAVING, BACK, READING)
    states = {(variant, handed) for kind, variant, handed in host.asked if kind in ("check", "sample")}
    assert states == {("plain", None), ("saving", None), ("back", None), ("reading", "saving")}
    assert bench.savers == [SAVING]


def test_nobodys_states_are_handed_on_that_were_wrong() -> None:
    bench, host = bench_of(check_saving={**RIGHT, "reason": "o is off by 1e-2"})
    found, told = measured(bench, SAVING, READING)
    assert ("check", "reading", None) in host.asked
    assert (found[SAVING].status, found[SAVING].reason, found[SAVING].us) == ("failed", "o is off by 1e-2", None)
    assert ("sample", "saving", None) not in host.asked
    assert told[0] == ("saving", "failed")


@pytest.mark.parametrize("fault", [ChildDied("it was killed by signal 11"), ChildAnswerError("RuntimeError: no")], ids=["dies", "errs"])
def test_a_child_that_fails_is_the_candidates_failure_and_the_others_race_on(fault: Exception) -> None:
    bench, _ = bench_of(check_plain=fault)
    found, _ = measured(bench, PLAIN, SAVING)
    assert (found[PLAIN].status, found[PLAIN].reason) == ("failed", str(fault))
    assert found[SAVING].us == 100.0
    bench, _ = bench_of(sample_plain=fault)
    found, told = measured(bench, PLAIN, SAVING)
    assert (found[PLAIN].status, found[PLAIN].reason, found[PLAIN].peak_mib) == ("failed", f"{fault} (while it was timed)", None)
    assert found[SAVING].us == 100.0
    assert sorted(told) == [("plain", "failed"), ("saving", "ok")]


def test_a_reference_that_cannot_be_timed_is_left_out() -> None:
    bench, _ = bench_of()
    assert bench.reference() == Measurement(REFERENCE, us=100.0, samples=1)
    for answer in ({"us": None}, ChildDied("it is gone")):
        bench, _ = bench_of(reference_=answer)
        assert bench.reference() is None
