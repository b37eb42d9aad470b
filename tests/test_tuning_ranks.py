"""Jobs of 2 and 4 gloo processes: all ranks choose what rank 0 measured, and a rank that dies, fails, differs or stays away is named on all others."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist

from titans_backends.errors import RanksError
from titans_backends.tuning.meeting import Meeting, Patience, Ranks
from titans_backends.tuning.ranks import group, launched_rank, share

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch was built without torch.distributed")

ROOT = Path(__file__).parent.parent
Seen = dict[str, dict[str, tuple[object, float]]]


@pytest.fixture(scope="module")
def seen() -> Seen:
    """What every rank of every scene saw."""
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "ranks_on_processes.py")], capture_output=True, text=True, timeout=170, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: Seen = json.loads(done.stdout)
    return found


def said(seen: Seen, scene: str) -> dict[int, object]:
    return {int(rank): what for rank, (what, _) in seen[scene].items()}


@pytest.mark.slow
def test_four_ranks_take_rank_0s_tables_until_they_are_reset(seen: Seen) -> None:
    for rank, (own, before, after, reset) in said(seen, "shares").items():  # type: ignore[misc]
        assert own == before == reset == ("eager/two_products" if rank == 0 else "eager/joined")
        assert after == "eager/two_products"


def test_rank_0_tunes_and_the_other_receives(seen: Seen) -> None:
    assert said(seen, "tunes") == {0: [True, "eager/joined"], 1: [False, "eager/joined"]}


def test_a_call_inside_autotune_is_tuned_by_rank_0_and_chosen_alike(seen: Seen) -> None:
    found = said(seen, "autotunes")
    assert found[0] == found[1]
    kernel, origin, reason = found[0]  # type: ignore[misc]
    assert (kernel, origin) == ("eager/joined", "tuned")
    assert reason.startswith("received from rank 0: ")


def test_a_receiver_that_keeps_the_rows_has_them_in_its_own_file(seen: Seen) -> None:
    assert said(seen, "keeps") == {0: "eager/joined", 1: "eager/joined"}


@pytest.mark.parametrize(
    ("scene", "dead", "words"),
    [
        ("rank 1 of 2 dies", 1, "rank 1 died or hangs"),
        ("rank 2 of 4 dies", 2, "rank 2 died or hangs"),
        ("rank 0 dies, the store lives", 0, "rank 0 died or hangs"),
        ("rank 0 dies with the store", 0, "lost the ranks' store: rank 0"),
    ],
)
def test_a_rank_that_is_killed_is_named_on_all_others_within_seconds(seen: Seen, scene: str, dead: int, words: str) -> None:
    size = 4 if "4" in scene or "lives" in scene else 2
    assert set(said(seen, scene)) == set(range(size)) - {dead}
    for what, seconds in seen[scene].values():
        assert words in str(what)
        assert seconds < 15


def test_what_rank_0_measured_before_another_died_is_said_to_be_kept(seen: Seen) -> None:
    assert str(said(seen, "dies after the tune")[0]).endswith(
        "rank 1 died or hangs: no sign of life for 1.5 s. What rank 0 measured until then (1 of 1) is kept in its file; the same command goes on with it"
    )


@pytest.mark.parametrize("scene", ["rank 1 dies in a call", "rank 1 dies in a short call"])
def test_inside_autotune_rank_0_names_one_that_came_and_died(seen: Seen, scene: str) -> None:
    """While it measures, or afterwards, before it goes on; and it does not measure on to the end."""
    what, seconds = seen[scene]["0"]
    assert what == "RanksError: rank 1 died or hangs: no sign of life for 1.5 s"
    assert seconds < 12


def test_inside_autotune_rank_0_waits_for_nobody_who_has_not_come(seen: Seen) -> None:
    assert seen["never comes"]["0"][0] == "called"


def test_a_rank_that_has_ended_before_the_first_call_is_named_as_one_that_may_have(seen: Seen) -> None:
    what, seconds = seen["ended before"]["0"]
    assert "rank 1 of 2 did not come to the start of share within 3 s: ended before, hanging, late, or on another way" in str(what)
    assert seconds < 12


def test_a_rank_that_stays_away_is_named(seen: Seen) -> None:
    what, seconds = seen["stays away"]["0"]
    assert "rank 1 of 2 did not come to the start of tune within 3 s" in str(what)
    assert seconds < 15


def test_a_rank_on_another_gpu_or_torch_is_named_on_every_rank_before_anything_is_measured(seen: Seen) -> None:
    found = said(seen, "differs")
    assert set(found) == {0, 1, 2, 3}
    for what in found.values():
        assert "rank 1 (" in str(what)
        assert "device NVIDIA A100 (nvidia_a100), rank 0 has " in str(what)
        assert "torch 2.0.0, rank 0 has " in str(what)
        assert "rank 2 (" not in str(what)


def test_what_rank_0_fails_at_is_said_everywhere(seen: Seen) -> None:
    assert said(seen, "fails") == {0: "OSError: no space left on device", 1: "RanksError: rank 0 left: OSError: no space left on device"}


def test_ranks_that_ask_for_other_buckets_or_hold_other_code_are_named(seen: Seen) -> None:
    assert all("rank 1 (" in str(what) and "problems to tune 2 (" in str(what) for what in said(seen, "asks otherwise").values())
    for what in said(seen, "changed code").values():
        assert "rank 1 would choose otherwise at fused_uw, seq_len 64: none: its row names eager/joined" in str(what)


def test_a_call_that_rank_0_never_makes_ends_with_what_to_do_instead(seen: Seen) -> None:
    found = said(seen, "never meets")
    assert found[0] == "shared"
    assert "rank 0 did not come to fused_uw at seq_len 64, streams 1 within 1 s" in str(found[1])
    assert "titans-backends tune --from" in str(found[1])


def test_alone_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    assert group() is None
    share()
    assert launched_rank() is None
    monkeypatch.setenv("RANK", "3")
    assert launched_rank() is None
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert launched_rank() == 3


def several(size: int, act: Callable[[Ranks], object]) -> dict[int, object]:
    """Ranks as threads on one store; what each returned or raised."""
    store, found = dist.HashStore(), dict[int, object]()

    def rank(number: int) -> None:
        try:
            found[number] = act(Ranks(store, number, size))
        except RanksError as error:
            found[number] = str(error)

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


QUICK = Patience(join_s=0.5, dead_s=0.5, beat_s=0.05)


def test_everybody_hears_everybody_in_their_order_step_after_step() -> None:
    def act(ranks: Ranks) -> object:
        heard = []
        for _ in range(2):
            with Meeting(ranks, ranks.step("x"), QUICK) as meeting:
                heard.append(meeting.gather("word", f"{ranks.rank}{len(heard)}", "talk"))
        return heard

    assert several(3, act) == {rank: [("00", "10", "20"), ("01", "11", "21")] for rank in range(3)}


def test_those_that_come_to_half_of_it_are_named() -> None:
    def act(ranks: Ranks) -> object:
        with Meeting(ranks, "x", QUICK) as meeting:
            meeting.gather("one", "", "talk")
            if ranks.rank in (1, 2):
                time.sleep(1)
                return "late"
            return meeting.gather("two", "", "talk on")

    found = several(4, act)
    told = (
        "ranks 1, 2 of 4 did not come to talk on within 0.5 s: ended before, hanging, late, or on another way. Every rank must come to the same call"
    )
    assert found[0] == found[3] == told


def test_a_long_answer_is_waited_for_as_long_as_rank_0_lives() -> None:
    def act(ranks: Ranks) -> object:
        with Meeting(ranks, "x", QUICK) as meeting:
            if ranks.rank == 0:
                time.sleep(1.0)  # twice what a rank may be silent
                meeting.tell("answer", "42")
                return "told"
            return meeting.heard("answer", "answer")

    assert several(2, act) == {0: "told", 1: "42"}
