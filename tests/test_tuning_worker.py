"""The worker's loop, in this process: one answer a request, a session closed before the next is opened, and no exception that ends it."""

from __future__ import annotations

import pytest

from titans_backends.backend import Candidate
from titans_backends.tuning import session, wire, worker
from titans_backends.tuning.gate import GateResult
from titans_backends.tuning.plan import plan

BUCKETS = plan("cpu", ops=["fused_uw"], seq_lens=[64, 128], heads=[(1, 1)], head_dims=[(16, 16)], dtypes=["float32"], regimes=["inference"])
CANDIDATE = Candidate("eager", "matmul")


class FakeSession:
    """Tells what was asked of it; a check of `broken` raises."""

    log: list[object]

    def __init__(self, bucket: object, device: str, heads: int | None, *, references: bool = True) -> None:
        self.seq_len = bucket.seq_len  # type: ignore[attr-defined]
        self.log.append(("open", self.seq_len, device, heads, references))

    def close(self) -> None:
        self.log.append(("close", self.seq_len))

    def sample(self, candidate: Candidate, states_from: Candidate | None) -> float:
        self.log.append(("sample", candidate, states_from))
        return 2.5

    def check(self, candidate: Candidate, states_from: Candidate | None) -> session.Checked:
        if candidate.variant == "broken":
            raise RuntimeError("it broke")
        return session.Checked(GateResult("o is off", (("o", 0.5),), ("strided",)), 1.5, 0.25)

    def reference(self, most_s: float) -> float | None:
        self.log.append(("reference", most_s))
        return None


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    FakeSession.log = []
    monkeypatch.setattr(session, "Session", FakeSession)
    return FakeSession.log


def answers(*requests: wire.Message) -> list[wire.Message]:
    """What the worker answers, without its greeting."""
    waiting, written = [wire.dump(request) for request in requests], list[bytes]()
    worker.serve(lambda: waiting.pop(0) if waiting else b"", written.append, "cpu")
    ready, *rest = map(wire.load, written)
    assert list(ready) == ["ready"]
    return list(rest)


def opening(which: int, **more: object) -> wire.Message:
    return {"do": "open", "bucket": wire.bucket_to(BUCKETS[which]), "heads": which + 1, **more}


def asking(do: str, candidate: Candidate = CANDIDATE, states_from: Candidate | None = None) -> wire.Message:
    return {"do": do, "candidate": wire.candidate_to(candidate), "states_from": None if states_from is None else wire.candidate_to(states_from)}


def test_a_session_is_closed_before_the_next_is_opened(log: list[object]) -> None:
    assert answers(opening(0), opening(1, references=False)) == [{}, {}]
    assert log == [("open", 64, "cpu", 1, True), ("close", 64), ("open", 128, "cpu", 2, False)]


def test_each_request_reaches_the_session_and_its_result_comes_back(log: list[object]) -> None:
    saver = Candidate("eager", "saving", saves_states=True)
    found = answers(opening(0), asking("sample", states_from=saver), asking("check"), {"do": "reference", "most_s": 3})
    assert found[1:] == [
        {"us": 2.5},
        {"reason": "o is off", "errors": [["o", 0.5]], "skipped": ["strided"], "peak_mib": 1.5, "compile_s": 0.25},
        {"us": None},
    ]
    assert log[1:] == [("sample", CANDIDATE, saver), ("reference", 3.0)]


def test_what_goes_wrong_is_an_answer_and_the_worker_goes_on(log: list[object]) -> None:
    broken = Candidate("eager", "broken")
    found = answers(asking("check"), opening(0), asking("check", broken), {"do": "probe", "backend": "nobody"}, asking("sample"))
    assert found[0] == {"error": "RuntimeError: check before open"}
    assert found[2] == {"error": "RuntimeError: it broke"}
    assert "UnknownNameError" in str(found[3]["error"])
    assert found[4] == {"us": 2.5}


def test_a_probe_says_how_a_backend_stands() -> None:
    (eager,) = answers({"do": "probe", "backend": "eager"})
    assert (eager["state"], eager["reason"]) == ("importable", "")  # nothing was run
