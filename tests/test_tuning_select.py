"""Who wins, on made-up numbers."""

from __future__ import annotations

import itertools
import random

import pytest

from titans_backends.backend import Candidate
from titans_backends.offers import Pair
from titans_backends.tuning.select import Contender, combined, select


def contender(name: str, us: float, order: int, *, spread: float = 0.002, peak: float = 10.0, simplicity: int = 5) -> Contender:
    return Contender(Pair(Candidate(name, "x")), us, spread, peak, simplicity, order)


def winner(*given: Contender) -> str:
    chosen = select(given).winner
    assert chosen is not None
    return chosen.pair.forward.backend


def test_the_default_stays_unless_it_is_beaten_by_three_percent() -> None:
    default = contender("default", 100, 0)
    assert winner(default, contender("other", 97.5, 1)) == "default"
    assert winner(default, contender("other", 96.5, 1)) == "other"


def test_the_default_stays_where_the_gain_is_within_the_noise_and_at_most_five_percent() -> None:
    assert winner(contender("default", 100, 0, spread=0.04), contender("other", 95.5, 1, spread=0.04)) == "default"
    assert winner(contender("default", 100, 0, spread=0.01), contender("other", 95.5, 1, spread=0.01)) == "other"
    assert winner(contender("default", 100, 0, spread=1.0), contender("other", 95.5, 1, spread=1.0)) == "default"
    assert winner(contender("default", 100, 0, spread=1.0), contender("other", 95, 1, spread=1.0)) == "other"


def test_nobody_wins_whose_median_is_five_percent_above_the_fastest() -> None:
    source = random.Random(0)
    for _ in range(2000):
        given = [
            contender(str(order), source.uniform(90, 110), order, spread=source.choice((0.0, 0.02, 0.1, 1.0)), simplicity=source.randrange(3))
            for order in range(4)
        ]
        chosen = select(given).winner
        assert chosen is not None
        assert chosen.us <= 1.05 * min(one.us for one in given) + 1e-9


def test_ties_go_to_the_simplest_then_to_the_first() -> None:
    default = contender("default", 100, 0)
    fast, simple = contender("fast", 80, 1, simplicity=7), contender("simple", 81, 2, simplicity=1)
    assert winner(default, fast, simple) == "simple"
    assert winner(default, fast, contender("simple", 82.5, 2, simplicity=1)) == "fast"
    assert winner(default, contender("first", 81, 1), contender("second", 80, 2)) == "first"


def test_the_joint_margin_widens_a_tie_but_not_without_limit() -> None:
    default = contender("default", 200, 0)
    fast = contender("fast", 80, 1, spread=0.05, simplicity=7)
    assert winner(default, fast, contender("simple", 83.5, 2, spread=0.05, simplicity=1)) == "simple"
    assert winner(default, contender("fast", 80, 1, spread=0.5, simplicity=7), contender("simple", 90, 2, spread=0.5, simplicity=1)) == "fast"


def test_noise_that_stays_inside_the_band_never_flips_the_choice() -> None:
    chosen = set()
    for jitter in itertools.product((0.996, 1.0, 1.004), repeat=2):
        chosen.add(
            winner(contender("default", 100, 0), contender("a", 80 * jitter[0], 1, simplicity=2), contender("b", 80 * jitter[1], 2, simplicity=1))
        )
    assert chosen == {"b"}


def test_the_order_in_which_contenders_come_does_not_matter() -> None:
    given = [contender("default", 100, 0), contender("a", 80, 1, simplicity=3), contender("b", 80.5, 2, simplicity=3), contender("c", 60, 3)]
    assert {winner(*order) for order in itertools.permutations(given)} == {"c"}


def test_the_runner_up_is_the_fastest_of_the_others() -> None:
    chosen = select([contender("default", 100, 0), contender("a", 70, 1), contender("b", 60, 2)])
    assert chosen.runner_up is not None
    assert chosen.runner_up.pair.forward.backend == "a"


def test_for_memory_the_least_peak_wins_and_time_decides_among_equals() -> None:
    small, smaller = contender("small", 300, 1, peak=20.0), contender("smaller", 200, 2, peak=20.2)
    chosen = select([contender("default", 100, 0, peak=50), small, smaller], "memory").winner
    assert chosen is smaller


def test_a_limit_on_memory_excludes_and_says_what_the_least_is() -> None:
    given = [contender("default", 100, 0, peak=50), contender("small", 300, 1, peak=20)]
    chosen = select(given, max_memory_mib=30).winner
    assert chosen is given[1]
    none = select(given, max_memory_mib=10)
    assert none.winner is None
    assert "small/x with 20 MiB" in none.reason


def test_nobody_wins_where_nobody_passed() -> None:
    assert select([]).winner is None


def test_a_pair_takes_the_sum_and_its_margins_add_as_independent_ones() -> None:
    us, spread = combined([(30.0, 0.1), (70.0, 0.1)])
    assert us == 100
    assert spread * us == pytest.approx((3.0**2 + 7.0**2) ** 0.5)
