"""The command line as a whole: every verb is there, errors are one line, and the exit status means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from tests import fresh
from titans_backends.cli import app, failures

VERBS = ("tune", "autotune", "doctor", "ops", "explain", "bench", "verify", "cache")
run = CliRunner().invoke


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(verb: str) -> None:
    result = run(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_help_names_every_verb() -> None:
    text = run(app, ["--help"], env={"COLUMNS": "200"}).stdout
    assert all(verb in text for verb in VERBS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["explain", "nonsense"], "fast_core, "),
        (["ops", "nonsense"], "fast_core, "),
        (["bench", "nonsense"], "fast_core, "),
        (["tune", "--op", "nonsense"], "fast_core, "),
        (["verify", "--op", "nonsense"], "fast_core, "),
        (["tune", "--backend", "nonsense"], "known:"),
        (["explain", "slow_core", "--backend", "nonsense"], "known:"),
        (["verify", "--backend", "nonsense"], "known:"),
        (["doctor", "--traceback", "nonsense"], "known:"),
        (["tune", "--heads", "3/2"], "--heads must be like"),
        (["tune", "--head-dim", "a"], "--head-dim must be like"),
        (["tune", "--objective", "space"], "time or memory"),
        (["tune", "--budget", "0"], "--budget must be above 0"),
        (["tune", "--launch", "graph", "--device", "cpu"], "needs a CUDA device"),
        (["explain", "gated_delta_step", "--seq-len", "9"], "1 to 8 tokens"),
        (["explain", "slow_core", "--option", "chunk_size=0"], "chunk_size"),
        (["explain", "slow_core", "--with", "beta"], "optional tensors of slow_core"),
        (["explain", "slow_core", "--with", "g,chunk_decay"], "chunk_decay"),
        (["explain", "fused_uw", "--packed"], "takes no cu_seqlens"),
        (["bench", "slow_core", "--option", "scale=2"], "not in the key"),
        (["cache", "show", "no-such-file.yaml"], "titans-backends tune"),
        (["cache", "diff", "no-such-file.yaml"], "there is no file"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_status_2(words: list[str], said: str) -> None:
    result = run(app, words)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_an_unknown_option_is_status_2() -> None:
    assert run(app, ["tune", "--no-such-option"]).exit_code == 2


def test_an_unknown_switch_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_backends import switches

    monkeypatch.setenv("TITANS_BACKENDS_FORCED", "eager")
    switches.reload()
    try:
        result = run(app, ["explain", "slow_core"])
        assert (result.exit_code, result.stdout) == (2, "")
        assert "did you mean TITANS_BACKENDS_FORCE?" in result.stderr
    finally:
        monkeypatch.undo()
        switches.reload()


def test_a_backend_that_refuses_is_status_1(monkeypatch: pytest.MonkeyPatch) -> None:
    from titans_backends import switches

    monkeypatch.setenv("TITANS_BACKENDS_DISABLE", "eager")
    switches.reload()
    try:
        result = run(app, ["explain", "slow_core", "--backend", "eager"])
        assert result.exit_code == 1
        assert "disabled by TITANS_BACKENDS_DISABLE" in result.stdout
        forced = run(app, ["bench", "slow_core", "--backend", "eager", "--seq-len", "8", "--heads", "1", "--head-dim", "8"])
        assert forced.exit_code == 1
        assert "disabled by TITANS_BACKENDS_DISABLE" in forced.stderr
    finally:
        monkeypatch.undo()
        switches.reload()


HEAVY = (
    *("titans_backends.cli", "titans_backends.tuning", "titans_backends.nn", "titans_backends.integrations", "typer", "rich", "jinja2", "matplotlib"),
    *("triton", "cupy", "numba", "cuda", "fla", "flash_qla", "flashinfer", "tilelang", "transformers", "accelerate"),
)
"""What the library does without until it is asked for something."""


def test_the_library_imports_neither_its_command_line_nor_a_kernel_package() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import titans_backends as tb; tb.get_op('slow_core'); "
        f"print([name for name in {HEAVY} if name in set(sys.modules) - before])"
    )
    result = fresh.run(code)
    assert result.stdout.strip() == "[]", result.stderr


def test_the_version_is_the_librarys() -> None:
    import titans_backends

    assert run(app, ["--version"]).stdout.strip() == titans_backends.__version__


def test_a_long_error_is_whole_on_a_narrow_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    result = run(app, ["explain", "nonsense"])
    assert result.stderr.strip().endswith("uw_transform")
    assert result.stderr.count("\n") == 1


def test_a_fault_of_our_own_is_shown_whole_with_status_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import titans_backends.cli as cli

    def faulty() -> None:
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(cli, "app", faulty)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert "ZeroDivisionError: ours" in capsys.readouterr().err


def test_a_warning_of_our_own_is_one_line_without_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    ours, theirs = failures.__file__, torch.__file__
    failures.show_warning(UserWarning("the file is damaged [1]"), UserWarning, ours, 1)
    failures.show_warning(UserWarning("theirs"), UserWarning, theirs, 1)
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "warning: the file is damaged [1]"
    assert told[1].startswith(f"{theirs}:1: UserWarning: theirs")


def test_a_damaged_table_is_told_by_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.yaml").write_text("{[")
    monkeypatch.setenv("TITANS_BACKENDS_CACHE", str(tmp_path / "a.yaml"))
    done = fresh.run("from titans_backends.cli import main; import sys; sys.argv[1:] = ['explain', 'fused_uw', '--device', 'cpu']; main()")
    (told,) = done.stderr.splitlines()
    assert told.startswith("warning: titans_backends cache: ")
