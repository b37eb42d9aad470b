"""Several processes and one cache file: none loses a row, a killed one leaves it whole, a stuck one is named."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pytest

from titans_backends.cache import writing
from titans_backends.cache.file import CacheLocked, load, update
from titans_backends.cache.schema import Bucket, Device, Entry, Environment

DEVICE = Device("cpu", "cpu_of_test", "CPU of test", threads=2)
fork = pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs os.fork")


def defaults_of(op):
    return {}


def bucket(streams, seq_len):
    return Bucket("slow_core", (("dtype", "float32"), ("head_dim", (64, 64)), ("streams", streams)), seq_len)


def write(path, streams, seq_lens, timeout_s=60.0):
    changes = {bucket(streams, n): Entry("eager/chunked", float(streams), 0.01, n / 1000) for n in seq_lens}
    environment = Environment("0.1.0", f"2.{streams % 3}")
    update(path, device=DEVICE, environment=environment, changes=changes, defaults_of=defaults_of, timeout_s=timeout_s)


def start(target, *args):
    process = multiprocessing.get_context("fork").Process(target=target, args=args)
    process.start()
    return process


def _write_rows(path, streams, barrier):
    barrier.wait(60)
    for first in range(1, 101, 10):
        write(path, streams, range(first, first + 10))


@fork
def test_eight_processes_writing_a_hundred_rows_each_lose_none(tmp_path):
    path, barrier = tmp_path / "table.yaml", multiprocessing.get_context("fork").Barrier(8)
    processes = [start(_write_rows, path, streams, barrier) for streams in range(1, 9)]
    for process in processes:
        process.join(120)
    assert [process.exitcode for process in processes] == [0] * 8
    table = load(path, defaults_of, DEVICE).table
    assert set(table.rows) == {bucket(streams, n) for streams in range(1, 9) for n in range(1, 101)}
    assert all(entry.us == b.when[2][1] and table.environment(entry).torch == f"2.{b.when[2][1] % 3}" for b, entry in table.rows.items())
    assert sorted(item.name for item in tmp_path.iterdir()) in (["table.yaml"], ["table.yaml", "table.yaml.lock"])


def _die_before_the_replace(path):
    writing.os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
    write(path, 2, [64])


@fork
def test_a_killed_writer_leaves_the_file_whole_and_the_lock_free(tmp_path):
    path = tmp_path / "table.yaml"
    write(path, 1, [64])
    before = path.read_bytes()
    process = start(_die_before_the_replace, path)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert path.read_bytes() == before
    assert any(item.name.endswith(".tmp") for item in tmp_path.iterdir())
    write(path, 2, [64], timeout_s=5)
    assert len(load(path, defaults_of, DEVICE).table.rows) == 2
    assert not any(item.name.endswith(".tmp") for item in tmp_path.iterdir())


def _hold(path, held, done):
    with writing.locked(path, 5):
        held.set()
        done.wait(60)


@fork
def test_a_lock_that_another_process_holds_is_named_after_the_timeout(tmp_path):
    path, context = tmp_path / "table.yaml", multiprocessing.get_context("fork")
    held, done = context.Event(), context.Event()
    process = start(_hold, path, held, done)
    try:
        assert held.wait(60)
        with pytest.raises(CacheLocked, match=r"table\.yaml\.lock for over 0\.05 s.*--output OTHER\.yaml"):
            write(path, 1, [64], timeout_s=0.05)
        assert load(path, defaults_of).problem is None  # readers do not wait
    finally:
        done.set()
        process.join(60)
    write(path, 1, [64])
