"""What a tune shows while it runs: the estimate by a made-up clock, lines where there is no terminal, a bar where there is one."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import Entry, canonical_when
from titans_backends.cli.progress import Estimate, showing
from titans_backends.tuning.events import (
    BackendProbed,
    BucketDone,
    BucketFailed,
    BucketStarted,
    CandidateDone,
    CompiledAhead,
    Event,
    Planned,
    Refining,
    Remaining,
    Skipped,
    Unpaired,
    Unrefined,
)

GIVEN = {"dtype": "float32", "head_dim": (16, 16), "streams": 2}
BUCKET = Bucket("gated_delta_rule", canonical_when(GIVEN, defaults_of("gated_delta_rule")), 512)
ENTRY = Entry("eager/chunked", 100.0, 0.01, 1.0)
EVENTS: list[Event] = [
    Planned(4, 3),
    Unpaired("gated_delta_rule", "other/[kept]", "backward", "it wants a, but no forward of its backend makes that"),
    Skipped(BUCKET, ENTRY),
    BackendProbed("other", "refused", "the [package] is missing"),
    CompiledAhead(212, 14, 48.0, 3, "fused_uw 64: other/[fast]: it is killed"),
    BucketStarted(BUCKET, 1, ("eager/chunked", "eager/wrong")),
    CandidateDone(BUCKET, "eager/chunked", "forward", "ok", us=100.0, spread=0.01),
    CandidateDone(BUCKET, "eager/wrong", "forward", "failed", "o is off by 0.3 [on T=65]"),
    BucketDone(BUCKET, ENTRY, 250.0, 900.0, 2.0),
    BucketDone(BUCKET, replace(ENTRY, doubt=0.12), 250.0, 900.0, 2.0),
    BucketFailed(BUCKET, "no candidate passed", 1.0),
    Remaining((BUCKET,)),
]


def test_the_estimate_follows_the_pace_so_far() -> None:
    clock = iter([10.0, 16.0, 16.0, 20.0, 23.0])
    estimate = Estimate(lambda: next(clock), to_measure=4)
    assert estimate.left == ""
    estimate.done = 1
    assert estimate.left_s == pytest.approx(18.0)
    assert estimate.left == "about 18 s left"
    estimate.begin()  # what came before was no measuring
    assert estimate.left_s == pytest.approx(9.0)


def told(to: Console) -> None:
    with showing(to) as on_event:
        for event in EVENTS:
            on_event(event)


def test_without_a_terminal_there_is_a_plain_line_for_each_finished_bucket() -> None:
    stream = io.StringIO()
    told(Console(file=stream, width=60, force_terminal=False, markup=False, highlight=False))
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    assert any(line.startswith("[1/3] ") and "eager/chunked 100 µs, 2.50× the default" in line and " left)" in line for line in lines)
    assert any(line.startswith("[3/3] ") and "no candidate passed" in line for line in lines)
    assert any(line.startswith("[2/3] ") and "; noise: another may save up to 12 %" in line for line in lines)
    assert any("the [package] is missing" in line for line in lines)
    assert "! gated_delta_rule: other/[kept] (backward) does not race: it wants a, but no forward of its backend makes that" in lines
    assert any("off by 0.3 [on T=65]" in line for line in lines)
    assert "compiled 212 candidates ahead in 14 processes, 48 s; 3 not: fused_uw 64: other/[fast]: it is killed" in lines


def test_on_a_terminal_finished_buckets_stand_above_a_bar_with_the_time_left() -> None:
    stream = io.StringIO()
    to = Console(file=stream, width=200, force_terminal=True, color_system=None, markup=False, highlight=False)
    told(to)
    text = stream.getvalue()
    assert "100 µs" in text
    assert "left" in text or "estimating" in text
    assert "3/3" in text


def test_midpoints_are_announced_and_counted_with_what_was_asked_for() -> None:
    for width, terminal in ((200, False), (200, True)):
        to = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
        with showing(to) as on_event:
            for event in (
                Planned(1, 1),
                BucketDone(BUCKET, ENTRY, None, None, 2.0),
                Refining((BUCKET, BUCKET)),
                BucketDone(BUCKET, ENTRY, None, None, 1.0),
            ):
                on_event(event)
            on_event(Unrefined((BUCKET,)))
        said = to.file.getvalue()  # type: ignore[attr-defined]
        assert "2 midpoints of neighbours that chose differently, or whose row there holds no longer: their choices alone meet there" in said
        assert ("[2/3] ✓ gated_delta_rule" if not terminal else "2/3") in said
