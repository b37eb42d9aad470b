"""What the tuner writes beside a row: the versions of a package only where a candidate that needs it was in the race."""

from __future__ import annotations

from dataclasses import replace

import pytest

from titans_backends.buckets import Bucket
from titans_backends.cache.schema import Entry, Environment
from titans_backends.cache.timings import Measurement
from titans_backends.machine import Machine
from titans_backends.tuning import store as stores
from titans_backends.tuning.store import Store

H100 = Machine("cuda", "NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3", 90, 132, 232448)
NOW = Environment("0.1.0", "2.11.0", triton="3.6.0", cupy="14.2.0", numba_cuda="0.30.4", cuda="13.0")
BUCKET = Bucket("slow_core", (("dtype", "float32"), ("head_dim", (32, 32)), ("streams", 12)), 512)
TRITON, CUPY = Measurement("triton/scan", us=2.0, source="1a"), Measurement("cupy/blocks", us=1.0, source="1b")


@pytest.mark.parametrize(
    ("raced", "cupy"),
    [((TRITON,), None), ((TRITON, CUPY), "14.2.0"), ((TRITON, replace(CUPY, status="refused", us=None, reason="no card")), None)],
    ids=["without", "in the race", "refused"],
)
def test_a_row_names_cupy_where_it_was_in_the_race(tmp_path, monkeypatch, raced, cupy):
    monkeypatch.setattr(stores, "current_environment", lambda kind: NOW)
    path = tmp_path / "h100.yaml"
    Store.opened(H100, path).write(BUCKET, raced, {BUCKET: Entry("triton/scan", 2.0, 0.0, 0.0, source="1a")})
    again = Store.opened(H100, path)
    assert again.table is not None
    assert again.timings is not None
    wanted = replace(NOW, cupy=cupy, numba_cuda=None)
    assert [*again.table.environments.values()] == [*again.timings.environments.values()] == [wanted]
    assert again.fresh(BUCKET, "1a")
    Store.opened(H100, path).write(BUCKET, (), {BUCKET: Entry("triton/scan", 2.0, 0.0, 0.0, source="1c")})  # chosen anew from the same race
    assert [*again.table.environments.values()] == [wanted]


def test_a_row_of_before_is_fresh_where_cupy_is_there(tmp_path, monkeypatch):
    path, then = tmp_path / "h100.yaml", replace(NOW, cupy=None, numba_cuda=None)
    for environment in (then, NOW):
        monkeypatch.setattr(stores, "current_environment", lambda kind, given=environment: given)
        opened = Store.opened(H100, path)
        if environment is then:
            opened.write(BUCKET, (TRITON,), {BUCKET: Entry("triton/scan", 2.0, 0.0, 0.0, source="1a")})
    assert opened.fresh(BUCKET, "1a")
    assert len(opened.measurements(BUCKET)) == 1
