"""What a session says of a candidate beside its time."""

from __future__ import annotations

import pytest

from titans_backends.offers import offers
from titans_backends.tuning import session as sessions
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket


def test_the_states_that_a_forward_saved_count_to_its_backwards_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = next(one for one in plan("cpu", ops=("gated_delta_rule",), seq_lens=(128,), regimes=("training",)) if one.seq_len == 128)
    monkeypatch.setattr(sessions, "peak_mib", lambda kernel, device: 3.0)
    session = sessions.Session(bucket, "cpu", 2)
    (offer,) = offers(signature_of_bucket(bucket, "cpu"), session.machine, names=["eager"])
    saves = next(one for one in offer.forward if one.saves_states)
    peaks = {one.saves_states: session.check(one, saves).peak_mib for one in (offer.backward[-1], next(c for c in offer.backward if c.saves_states))}
    held = session._saved[""][0].nbytes / 2**20
    assert held > 0
    assert peaks == {False: 3.0, True: pytest.approx(3.0 + held)}
