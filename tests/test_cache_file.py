"""Cache files on disk: what each kind of bad file does to a reader and to a writer, and what a write leaves behind."""

from __future__ import annotations

import errno
import os
import stat
import warnings
from dataclasses import replace

import pytest

from titans_backends.cache import file, writing
from titans_backends.cache.file import CacheError, check_writable, edit, load, read, read_timings, update, update_timings
from titans_backends.cache.schema import Bucket, Device, Entry, Environment, prune
from titans_backends.cache.timings import Measurement

DEVICE = Device("cpu", "cpu_of_test", "CPU of test", threads=2)
OTHER = Device("cuda", "gpu_of_test", "GPU of test", sm=90)
ENVIRONMENT = Environment("0.1.0", "2.13.0")


def defaults_of(op):
    return {"group": 1}


def bucket(seq_len=512, **fields):
    return Bucket("slow_core", tuple(sorted({"dtype": "float32", "head_dim": (64, 64), "streams": 8, **fields}.items())), seq_len)


def write(path, us=1.0, seq_len=512, device=DEVICE):
    changes = {bucket(seq_len): Entry("eager/chunked", us, 0.01, 1.0)}
    return update(path, device=device, environment=ENVIRONMENT, changes=changes, defaults_of=defaults_of, timeout_s=5)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "table.yaml"


@pytest.fixture
def written(path):
    write(path)
    return path


def names(path):
    return sorted(item.name for item in path.parent.iterdir() if not item.name.endswith(".lock"))


def test_no_file_is_no_problem(path):
    found = load(path, defaults_of, DEVICE)
    assert (found.table, found.problem, found.writable, found.world_writable) == (None, None, True, False)


def test_update_merges_into_what_is_there(written):
    table = write(written, us=2.0, seq_len=1024)
    write(written, us=3.0)
    assert {b.seq_len: e.us for b, e in load(written, defaults_of, DEVICE).table.rows.items()} == {512: 3.0, 1024: 2.0}
    assert len(table.rows) == 2
    assert names(written) == ["table.yaml"]


def test_a_key_with_its_defaults_spelled_out_is_the_same_row(written):
    changes = {bucket(group=1): Entry("eager/other", 1.0, 0.0, 0.0)}
    table = update(written, device=DEVICE, environment=ENVIRONMENT, changes=changes, defaults_of=defaults_of)
    assert [entry.use for entry in table.rows.values()] == ["eager/other"]


def test_what_another_program_wrote_since_is_seen(written):
    written.write_text(written.read_text().replace("us: 1.0", "us: 9.0"))
    write(written, seq_len=1024)
    assert load(written, defaults_of).table.rows[bucket()].us == 9.0


@pytest.mark.parametrize(
    "content", [b"", b"schema: 1\n", b"\xff\xfe\x00", b"ops: [", b"schema: 1\ndevice: {kind: cpu", b"a: &a [*a]\n", b"[" * 5000, b"just text\n"]
)
def test_a_damaged_file_is_moved_with_one_warning_and_begun_afresh(written, content):
    for number in (1, 2):
        written.write_bytes(content)
        with pytest.warns(UserWarning, match=f"table.yaml.*Moved to .*table.yaml.damaged-{number}; .*titans-backends tune") as caught:
            found = load(written, defaults_of, DEVICE)
        assert len(caught) == 1
        assert (found.table, found.problem.kind, found.problem.moved_to.name) == (None, "damaged", f"table.yaml.damaged-{number}")
        assert found.problem.moved_to.read_bytes() == content
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert load(written, defaults_of, DEVICE).problem is None
    written.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged-3"):
        assert len(write(written).rows) == 1
    assert load(written, defaults_of, DEVICE).problem is None
    assert "table.yaml.damaged-3" in names(written)


def test_a_truncated_file_names_its_line(written):
    written.write_text(written.read_text()[:-20])
    found = read(written, defaults_of, DEVICE)
    assert found.problem.kind == "damaged"
    assert str(written) + ":" in found.problem.message
    assert names(written) == ["table.yaml"]  # reading alone moves nothing


def test_a_damaged_file_in_a_read_only_folder_is_only_reported(written):
    written.write_text("ops: [")
    written.parent.chmod(0o555)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = load(written, defaults_of, DEVICE)
    finally:
        written.parent.chmod(0o755)
    assert (found.problem.kind, found.problem.moved_to) == ("damaged", None)
    assert written.exists()


@pytest.mark.parametrize(("kind", "words"), [("foreign", "measured on cuda gpu_of_test, this machine is cpu cpu_of_test"), ("future", "schema 7")])
def test_a_foreign_or_future_file_is_ignored_named_and_never_touched(path, kind, words):
    write(path, device=OTHER)
    if kind == "future":
        path.write_text("schema: 7\nanything: {else: here}\n")
    before = path.read_bytes()
    found = load(path, defaults_of, DEVICE)
    assert (found.table, found.problem.kind) == (None, kind)
    assert words in found.problem.message
    assert str(path) in found.problem.message
    with pytest.raises(CacheError, match=f"{words}.*--output OTHER.yaml"):
        write(path)
    assert words in str(check_writable(path, device=DEVICE, defaults_of=defaults_of))
    assert path.read_bytes() == before
    assert names(path) == ["table.yaml"]
    if kind == "foreign":
        assert read(path, defaults_of).table is not None  # without a device, any machine's table can be shown


@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_read_only_cache_is_used_and_refuses_before_anything_is_measured(written, what):
    target, mode = (written, 0o444) if what == "file" else (written.parent, 0o555)
    old = stat.S_IMODE(target.stat().st_mode)
    target.chmod(mode)
    try:
        found = load(written, defaults_of, DEVICE)
        assert (len(found.table.rows), found.problem, found.writable) == (1, None, False)
        verdict = check_writable(written, device=DEVICE, defaults_of=defaults_of)
        assert not verdict
        assert "read-only" in str(verdict)
        assert "--output" in str(verdict)
        with pytest.raises(CacheError, match=r"read-only.*--output"):
            write(written)
    finally:
        target.chmod(old)
    assert check_writable(written, device=DEVICE, defaults_of=defaults_of)


def test_access_that_the_system_denies_is_read_only(written, monkeypatch):
    monkeypatch.setattr(writing.os, "access", lambda path, mode: False)
    assert "read-only" in str(check_writable(written, device=DEVICE, defaults_of=defaults_of))
    assert load(written, defaults_of).table is not None


def test_a_full_disk_is_noticed_beforehand(written, monkeypatch):
    monkeypatch.setattr(writing.os, "write", _no_space)
    assert "No space left" in str(check_writable(written, device=DEVICE, defaults_of=defaults_of))
    assert names(written) == ["table.yaml"]


def test_a_world_writable_cache_is_used_and_flagged(written):
    written.chmod(0o666)
    found = load(written, defaults_of, DEVICE)
    assert (len(found.table.rows), found.problem, found.world_writable) == (1, None, True)
    written.chmod(0o644)
    written.parent.chmod(0o777)
    assert load(written, defaults_of).world_writable
    written.parent.chmod(0o1777)
    assert not load(written, defaults_of).world_writable


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(written, monkeypatch, call):
    before = written.read_bytes()
    monkeypatch.setattr(writing.os, call, _no_space)
    with pytest.raises(CacheError, match=r"No space left on device.*as it was.*--output"):
        write(written, us=5.0)
    monkeypatch.undo()
    assert (written.read_bytes(), names(written)) == (before, ["table.yaml"])
    assert load(written, defaults_of).table.rows[bucket()].us == 1.0


def _no_space(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_symlink_is_written_through_and_the_mode_stays(written, tmp_path):
    link = tmp_path / "link.yaml"
    link.symlink_to(written)
    written.chmod(0o640)
    write(link, seq_len=64)
    assert link.is_symlink()
    assert stat.S_IMODE(written.stat().st_mode) == 0o640
    assert len(load(written, defaults_of).table.rows) == 2
    written.write_text("ops: [")
    with pytest.warns(UserWarning, match="damaged-1"):
        load(link, defaults_of)
    assert names(written) == ["table.yaml.damaged-1"]
    write(link)
    assert written.exists()


def test_what_a_killed_writer_left_is_removed_by_the_next(written):
    (written.parent / ".table.yaml.123-abcd.tmp").write_text("half")
    write(written)
    assert names(written) == ["table.yaml"]


def test_a_folder_in_the_files_place_is_unreadable_and_unwritable(tmp_path):
    assert load(tmp_path, defaults_of).problem.kind == "unreadable"
    with pytest.raises(CacheError, match="is a folder"):
        write(tmp_path)
    (tmp_path / "file").write_text("")
    assert "not a folder" in str(check_writable(tmp_path / "file" / "x.yaml", device=DEVICE, defaults_of=defaults_of))


def test_edit_rewrites_under_the_lock(written):
    left = edit(written, lambda table: prune(table, lambda b, e: False), device=DEVICE, defaults_of=defaults_of)
    assert left.rows == {}
    assert load(written, defaults_of, DEVICE).table == left


def test_timings_are_merged_and_graded_alike(path):
    def put(*found):
        return update_timings(path, device=DEVICE, environment=ENVIRONMENT, changes={bucket(): found}, defaults_of=defaults_of)

    put(Measurement("eager/a", us=1.0), Measurement("eager/b", status="failed", reason="NaN in o", errors=(("o", float("inf")),)))
    put(Measurement("eager/a", us=2.0), Measurement("eager/a", direction="backward", us=3.0))
    file._TIMINGS.written.clear()
    (found,) = read_timings(path, defaults_of, DEVICE).table.rows.values()
    assert [(one.candidate, one.direction, one.us) for one in found] == [
        ("eager/a", "backward", 3.0),
        ("eager/a", "forward", 2.0),
        ("eager/b", "forward", None),
    ]
    assert read(path, defaults_of).problem.kind == "damaged"  # no table of winners
    path.write_text("schema: 9\n")
    assert read_timings(path, defaults_of).problem.kind == "future"


@pytest.mark.parametrize(
    "one",
    [
        Measurement(
            "triton/scan",
            (("rows", 64), ("warps", 4)),
            saves_states=True,
            us=1.5,
            spread=0.01,
            samples=40,
            peak_mib=2.0,
            compile_s=0.25,
            source="1a2b",
        ),
        Measurement("eager/a", direction="backward", us=2.0, errors=(("o", 1e-6), ("dq", float("inf")))),
        Measurement("cupy/b", status="refused", reason='no card: it says "never"'),
    ],
    ids=["timed", "with errors", "refused"],
)
def test_a_measurement_comes_back_as_it_was_written(path, one):
    update_timings(path, device=DEVICE, environment=ENVIRONMENT, changes={bucket(): [one]}, defaults_of=defaults_of)
    file._TIMINGS.written.clear()
    ((found,),) = read_timings(path, defaults_of, DEVICE).table.rows.values()
    assert replace(found, env="") == one
