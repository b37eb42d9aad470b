"""What a hostile or a careless user types, and what files may hold: one sentence that says what would do, status 2, no traceback, no wait, nothing measured."""

from __future__ import annotations

import importlib
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import titans_backends as tb
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths, reading
from titans_backends.cache.nodes import SchemaError, compose
from titans_backends.cache.reading import read_text
from titans_backends.cache.schema import canonical_when
from titans_backends.cache.writing import permission
from titans_backends.cli import app
from titans_backends.machine import detect
from titans_backends.tuning.problem import signature_of_bucket

run = CliRunner().invoke


@pytest.fixture(autouse=True)
def nothing_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(words: str, status: int = 2) -> str:
    """What a command says that is refused within a moment, before anything is measured."""
    began = time.monotonic()
    result = run(app, shlex.split(words))
    assert isinstance(result.exception, SystemExit), f"{words}: {result.exception!r}\n{result.output}"
    assert result.exit_code == status, result.output
    assert time.monotonic() - began < 10
    return " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("tune --seq-lens 99999999999999999999", "--seq-lens must be whole numbers from 1 to 2147483647"),
        (f"tune --seq-lens {'9' * 5000}", "--seq-lens must be whole numbers from 1 to 2147483647"),
        ("tune --heads 99999999999999", "each at most 2147483647, got '99999999999999'"),
        ("tune --batch 99999999999999999999", "below 3e+14 can be asked for"),
        ("tune --seq-lens 2147483647 --heads 2147483647 --head-dim 4096", "below 3e+14 can be asked for"),
        ("tune --budget inf", "--budget must be above 0 and at most 1e+08 seconds, got inf"),
        ("tune --timeout nan", "--timeout must be above 0"),
        ("tune --max-memory inf", "--max-memory must be MiB above 0, got inf"),
        ("tune --device ''", "--device must be like cpu, cuda or cuda:1, got ''"),
        ("tune --device cpu:7", "a machine's processors are one device, cpu"),
        ("tune --device meta", "torch can compute on no such device here"),
        ("tune --from ''", "a folder, not a file that titans_backends.record wrote"),
        ("tune --from /dev/zero", "it is no file but a device or pipe"),
        ("explain gated_delta_rule --seq-len 99999999999999999999", "--seq-len and --batch must be from 0 to 2147483647"),
        ("explain gated_delta_rule --packed --batch 2000000 --seq-len 1 --heads 1", "--packed takes at most 1048576 sequences"),
        ("explain gated_delta_rule --heads 2147483647 --head-dim 2147483647", "below 3e+14 can be asked for"),
        ("explain gated_delta_rule --launch eager,graph", "--launch must be eager or graph, got 'eager,graph'"),
        ("explain gated_delta_rule --option chunk_size=99999999999999999999", "takes at most 2147483647 there"),
        ("bench gated_delta_rule --batch 0", "--batch must be at least 1, got 0"),
        ("bench gated_delta_rule --heads ''", "--heads must be like 16"),
        ("bench gated_delta_rule --head-dim ''", "--head-dim must be like 128"),
        ("bench gated_delta_rule --dtype ''", "--dtype must be one of"),
        ("bench gated_delta_rule --regime ''", "--regime must be inference or training"),
        ("bench gated_delta_rule --budget -1", "--budget must be above 0"),
        ("bench gated_delta_rule --backend nope", "unknown backend 'nope'"),
        ("bench --grid cpu --budget nan", "--budget must be above 0"),
        ("bench --grid cpu --output ''", "the results could not be written: . names no file"),
        ("bench --grid cpu --output /dev/null/x", "/dev/null, on the way to /dev/null/x.json, is not a folder"),
        ("verify --timeout 0", "--timeout must be above 0"),
        ("verify --timeout nan", "--timeout must be above 0"),
        ("report --output .", "--output . cannot be written: . is a folder, not a file"),
        ("report --output /dev/null/x.html", "/dev/null, on the way to /dev/null/x.html, is not a folder"),
        ("report --output -", "--output - cannot be written: - stands for no file, and nothing is written to stdout in its stead"),
        ("report --output /dev/null", "--output /dev/null cannot be written: /dev/null is a device or pipe, not a file; name another file"),
        ("tune --output - --seq-lens 1", "- stands for no file"),
        ("report --pictures file", "--pictures wants a folder, and file is a file"),
        ("cache path --device meta", "torch can compute on no such device here"),
        ("cache show .", ". cannot be read: it is no file but a folder"),
    ],
)
def test_a_wrong_value_is_refused_at_once_with_what_would_do(words: str, said: str) -> None:
    Path("file").write_text("x")
    device = "" if "--device" in words or words.startswith("cache") else " --device cpu"
    assert said in refused(words + device)


def test_a_backend_without_the_op_is_said_where_nothing_could_be_verified() -> None:
    result = run(app, shlex.split("verify --op token_flux --backend numba_cpu --device cpu"))
    assert result.exit_code == 1
    assert "not run: numba_cpu: " in result.stdout
    assert "it has no token_flux; its ops: " in result.stdout or "is not installed" in result.stdout


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_what_does_not_fit_into_memory_is_a_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def timed(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(importlib.import_module("titans_backends.cli.bench"), "timed", timed)
    monkeypatch.setattr(importlib.import_module("titans_backends.cli.bench"), "measure", lambda *_: None)
    assert "this does not fit into the memory here; ask for less" in refused("bench gated_delta_rule --device cpu", status=1)


@pytest.mark.parametrize("text", ["[" * 100_000, "- " * 20_000 + "1", "{a: " * 50_000, "? " * 5_000], ids=["list", "compact", "mapping", "keys"])
def test_a_file_that_nests_deeply_is_refused_and_ends_no_process(text: str) -> None:
    Path("deep.yaml").write_text(text)
    for words in ("cache show deep.yaml", "tune --from deep.yaml --device cpu"):
        assert "deep.yaml:1: not YAML, or cut off: it nests more than 64 levels deep" in refused(words)
    compose("[" * 60 + "]" * 60, "x")


def test_a_bomb_of_aliases_and_an_endless_alias_are_read_once() -> None:
    lines = ["a: &a [x,x,x,x,x,x,x,x,x]", *(f"{chr(98 + i)}: &{chr(98 + i)} [{','.join(['*' + chr(97 + i)] * 9)}]" for i in range(20))]
    Path("bomb.yaml").write_text("\n".join(lines) + "\n")
    assert "bomb.yaml:1: schema missing" in refused("cache show bomb.yaml")
    Path("self.yaml").write_text("&a [*a]\n")
    assert "expected a mapping, found a list" in refused("cache show self.yaml")


def test_a_large_file_of_something_else_is_not_parsed(monkeypatch: pytest.MonkeyPatch) -> None:
    large = "k: [1, 2, {a: b}]\n" * 200_000
    began = time.monotonic()
    with pytest.raises(SchemaError, match=r"x\.yaml: no line of its 3 MiB begins with `schema:`"):
        compose(large, "x.yaml")
    assert time.monotonic() - began < 0.5
    monkeypatch.setattr(reading, "MOST_MIB", 1)
    Path("x.yaml").write_text(large)
    assert "x.yaml cannot be read: it is larger than 1 MiB" in refused("cache show x.yaml")
    assert "x.yaml cannot be read: it is larger than 1 MiB" in refused("tune --from x.yaml --device cpu")


def test_a_pipe_that_nobody_writes_to_is_not_waited_for() -> None:
    os.mkfifo("pipe.yaml")
    with pytest.raises(OSError, match="it is no file but a device or pipe"):
        read_text(Path("pipe.yaml"))
    assert "it is no file but a device or pipe" in refused("cache show pipe.yaml")


def test_a_pipe_that_nobody_reads_is_not_written_to() -> None:
    """In a process of its own: what waits for the pipe's reader waits forever."""
    os.mkfifo("pipe.json")
    command = [sys.executable, "-m", "titans_backends", "report", "--device", "cpu", "--output", "pipe.json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "--output pipe.json cannot be written: pipe.json is a device or pipe, not a file; name another file" in ended.stderr
    assert "pipe.json is a device or pipe, not a file" in refused("tune --assess --device cpu --seq-lens 16 --output pipe.json")
    assert Path("pipe.json").is_fifo()  # and was not replaced by a file


def test_a_pipe_of_the_shell_is_no_file_either() -> None:
    reading, writing = os.pipe()
    try:
        assert str(permission(f"/dev/fd/{writing}")) == f"/dev/fd/{writing} is a device or pipe, not a file"
    finally:
        os.close(reading)
        os.close(writing)


def test_the_page_does_not_go_where_stdout_goes() -> None:
    with open("page.html", "w", encoding="utf-8") as stdout:
        command = [sys.executable, "-m", "titans_backends", "report", "--device", "cpu", "--output", "page.html"]
        ended = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == 2, ended.stderr
    assert "--output page.html is the file that stdout goes to" in ended.stderr
    assert Path("page.html").read_text() == ""


ROW = """schema: 1
device: {kind: cpu, slug: SLUG, name: x, threads: 1}
environments:
  a: {titans_backends: 0.1.0, torch: 2.13.0, date: '9999-12-31'}
ops:
  gated_delta_rule:
    - when: {dtype: float32, g: true, head_dim: [16, 16], streams: 1}
      by_seq_len:
        64: {use: eager/chunked, us: 1234.0, spread: 0.01, peak_mib: 2.5, env: a, source: 91d0501ef5d1}
"""


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("dtype: float32", "dtype: fast", "the bucket's dtype must be one of torch's floating ones, got 'fast'"),
        ("dtype: float32", "dtype: inf", "the bucket's dtype must be one of torch's floating ones, got 'inf'"),
        ("g: true", "g: true, group: 0", "the bucket's group must be at least 1, got 0"),
        ("g: true", "g: true, chunk_size: 0", "chunk_size must be at least 1, got 0"),
        ("g: true", "g: true, chunk_size: many", "chunk_size must be an int or None, got 'many'"),
        ("g: true", "g: true, qk_l2norm: 3", "qk_l2norm must be True or False, got 3"),
        ("streams: 1", "streams: 4611686018427387904", "no machine holds a call of 4611686018427387904 streams"),
        ("streams: 1", "streams: 100000000, packed: true", "no machine holds a call of 100000000 streams"),
        ("[16, 16]", "[1000000000, 1000000000]", "no machine holds a call of 1 streams of 64 tokens with head_dim [1000000000, 1000000000]"),
        ("gated_delta_rule", "my_op", "this version has no such bucket: the op my_op is unknown"),
    ],
)
def test_a_row_of_a_call_that_none_can_make_is_ignored_with_its_reason(was: str, becomes: str, said: str) -> None:
    """By `cache show`, `prune`, `doctor`, `explain` and a call, none of which may fall over a file."""
    user = paths.user_cache_path(detect("cpu").slug)
    user.parent.mkdir(parents=True)
    user.write_text(ROW.replace("SLUG", detect("cpu").slug).replace(was, becomes))
    tb.reset()
    shown = run(app, ["cache", "show", "--device", "cpu"])
    assert shown.exit_code == 0, shown.output
    assert said in shown.stdout
    assert "titans-backends tune" not in shown.stdout, "it cannot be measured again"
    for words in ("cache prune --dry-run --device cpu", "explain gated_delta_rule --heads 1 --head-dim 16 --seq-len 64 --device cpu"):
        assert run(app, shlex.split(words)).exit_code == 0
    user.unlink()
    tb.reset()


def test_a_number_beyond_64_bits_is_refused_with_its_line() -> None:
    for was in ("streams: 1", "64:", "[16, 16]"):
        Path("t.yaml").write_text(ROW.replace(was, was.replace("1", "9" * 400).replace("64", "9" * 400)))
        loaded = file.read(Path("t.yaml"), defaults_of)
        assert loaded.problem is not None
        assert "expected a whole number below 2**63" in loaded.problem.message


def test_many_streams_cost_no_search() -> None:
    bucket = Bucket(
        "gated_delta_rule", canonical_when({"dtype": "float32", "head_dim": (1, 1), "streams": 10**12}, defaults_of("gated_delta_rule")), 1
    )
    began = time.monotonic()
    assert signature_of_bucket(bucket).dim("H") == 64
    assert time.monotonic() - began < 1
