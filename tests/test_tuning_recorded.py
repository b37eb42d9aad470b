"""From a recording to a tune: which buckets in which order, what the rows cover, and the command's words."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

import titans_backends as tb
from titans_backends.buckets import Bucket, defaults_of, field
from titans_backends.cache import file
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.problems import Count, Met, Problem, dump_problems, parse_problems
from titans_backends.cache.schema import Entry, Environment, device_of
from titans_backends.cli import app
from titans_backends.machine import detect
from titans_backends.recording import problem_of
from titans_backends.tuning.ceilings import Ceilings
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket
from titans_backends.tuning.recorded import Demand, covered, demands, ordered, table_us
from titans_backends.tuning.run import Row, TuneReport, TuneRequest

MODULE = importlib.import_module("titans_backends.cli.tune_session")
run = CliRunner().invoke


def bucket(
    seq_len: int = 64, op: str = "gated_delta_rule", *, heads: int = 2, batch: int = 1, regime: str = "inference", kind: str = "cpu"
) -> Bucket:
    (one,) = plan(
        kind, ops=[op], seq_lens=[seq_len], heads=[(heads, heads)], head_dims=[(16, 16)], dtypes=["float32"], regimes=[regime],  # type: ignore[list-item]
        launches=["eager"], batch=batch,
    )  # fmt: skip
    return one


def problem(one: Bucket, heads: int = 2) -> Problem:
    found = problem_of(signature_of_bucket(one, "cpu", heads))
    assert found is not None
    return found


def lines(problems: dict[Problem, Count]) -> tuple[Met, ...]:
    return parse_problems(dump_problems(problems, defaults_of), "shapes.yaml", defaults_of)


def write(path: Path, problems: dict[Problem, Count]) -> Path:
    path.write_text(dump_problems(problems, defaults_of))
    return path


def slow(dtype: torch.dtype) -> Ceilings:
    return Ceilings(1e9, 1e9)


@pytest.fixture
def rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[Bucket, float]], None]:
    """Puts rows with these times into a user's cache of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def put(times: dict[Bucket, float]) -> None:
        machine = detect("cpu")
        path = tmp_path / "titans_backends" / f"{machine.slug}.yaml"
        changes = {one: Entry("eager/x", us, 0.01, 1.0) for one, us in times.items()}
        file.update(path, device=device_of(machine), environment=Environment("0", "0"), changes=changes, defaults_of=defaults_of)
        tb.reset()

    tb.reset()
    return put


def test_the_lines_of_one_bucket_are_one_demand_with_the_heads_of_the_commonest() -> None:
    four = bucket(heads=2, batch=2)
    assert four == bucket(heads=4, batch=1)
    found = demands(lines({problem(four, 2): Count(3), problem(four, 4): Count(5)}), "cpu")
    assert found == (Demand(four, 8, 0, 4),)


def test_a_direction_of_training_counts_half() -> None:
    (one,) = demands(lines({problem(bucket(regime="training")): Count(6, 4)}), "cpu")
    assert one.runs == 5.0


def test_what_was_met_elsewhere_or_under_batch_invariance_is_no_demand() -> None:
    here = problem(bucket())
    elsewhere, pinned = Problem(here.bucket, here.sizes, "cuda"), Problem(here.bucket, here.sizes, "cpu", batch_invariant=True)
    assert [one.forward for one in demands(lines({here: Count(1), elsewhere: Count(7), pinned: Count(9)}), "cpu")] == [1]


def test_a_line_that_no_input_can_be_made_for_is_named() -> None:
    text = dump_problems({problem(bucket()): Count(1)}, defaults_of).replace("head_dim", "chunk_size: 0, head_dim")
    with pytest.raises(SchemaError, match=r"shapes\.yaml:5: no inputs can be made for it: .*chunk_size"):
        demands(parse_problems(text, "shapes.yaml", defaults_of), "cpu")
    text = dump_problems({problem(bucket()): Count(1)}, defaults_of).replace("head_dim", "launch: graph, head_dim")
    with pytest.raises(SchemaError, match=r"shapes\.yaml:5: launch: graph needs a CUDA device"):
        demands(parse_problems(text, "shapes.yaml", defaults_of), "cpu")


def test_the_most_expensive_comes_first_by_rows_where_there_are_some(rows: Callable[[dict[Bucket, float]], None]) -> None:
    short, long = bucket(64), bucket(128)
    rows({short: 100.0, long: 30.0})
    wanted = demands(lines({problem(short): Count(2), problem(long): Count(5)}), "cpu")
    costs = ordered(wanted, detect("cpu"), lambda dtype: pytest.fail("a floor was asked for"))
    assert [(cost.demand.bucket.seq_len, cost.total_us, cost.known) for cost in costs] == [(64, 200.0, True), (128, 150.0, True)]


def test_a_neighbours_row_counts_in_proportion(rows: Callable[[dict[Bucket, float]], None]) -> None:
    rows({bucket(64): 100.0, bucket(256): 400.0})
    assert table_us(bucket(128), detect("cpu")) == pytest.approx(200.0)
    assert table_us(bucket(64, heads=4), detect("cpu")) == pytest.approx(200.0)
    assert table_us(bucket(64, heads=16), detect("cpu")) is None


def test_what_no_row_knows_counts_at_its_floor_times_what_others_take_over_theirs(rows: Callable[[dict[Bucket, float]], None]) -> None:
    known, unknown, other = bucket(64), bucket(64, heads=16), bucket(64, "gated_rms_norm")
    wanted = demands(lines({problem(known): Count(1), problem(unknown, 16): Count(1), problem(other): Count(1)}), "cpu")
    rows({})
    floor = {cost.demand.bucket: cost.us for cost in ordered(wanted, detect("cpu"), slow)}
    rows({known: 10 * floor[known]})
    costs = {cost.demand.bucket: cost for cost in ordered(wanted, detect("cpu"), slow)}
    assert costs[unknown].us == pytest.approx(10 * floor[unknown], rel=1e-3)
    assert costs[other].us == pytest.approx(10 * floor[other], rel=1e-3)
    assert [costs[one].known for one in (known, unknown, other)] == [True, False, False]


def test_coverage_is_of_time_not_of_buckets(rows: Callable[[dict[Bucket, float]], None]) -> None:
    short, long, norm = bucket(64), bucket(128), bucket(64, "gated_rms_norm")
    rows({short: 100.0, long: 100.0, norm: 100.0})
    counts = {problem(short): Count(9), problem(long): Count(1), problem(norm): Count(10)}
    costs = ordered(demands(lines(counts), "cpu"), detect("cpu"), slow)
    entry = Entry("eager/x", 100.0, 0.01, 1.0)
    found = {one.op: one for one in covered(costs, {short: Row(short, entry, 150.0), norm: Row(norm, None, reason="none passed")})}
    rule, none = found["gated_delta_rule"], found["gated_rms_norm"]
    assert (rule.calls, rule.buckets, rule.rows, rule.total_us, rule.share, rule.covered) == (10, 2, 1, 1000.0, 0.5, 0.9)
    assert (rule.before_us, rule.after_us) == (1350.0, 900.0)
    assert (none.rows, none.covered, none.before_us) == (0, 0.0, None)


def ended(monkeypatch: pytest.MonkeyPatch, path: Path, *more: str, done: int | None = None) -> tuple[Result, list[TuneRequest]]:
    seen: list[TuneRequest] = []

    def tuner(request: TuneRequest, _: object) -> TuneReport:
        seen.append(request)
        rows = [Row(one, Entry("eager/x", 100.0, 0.01, 1.0), 150.0, measured=True) for one in request.buckets[:done]]
        return TuneReport(Path("somewhere.yaml"), tuple(rows), request.buckets[len(rows) :], 1.0)

    monkeypatch.setattr(MODULE, "run_tune", tuner)
    monkeypatch.setattr(importlib.import_module("titans_backends.tuning.ceilings"), "measure", lambda device, dtype: slow(dtype))
    return run(app, ["tune", "--from", str(path), "--device", "cpu", *more]), seen


def test_the_command_tunes_the_file_in_order_and_says_what_is_covered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Callable[[dict[Bucket, float]], None]
) -> None:
    rare, often = bucket(64), bucket(128, heads=4, batch=3)
    rows({rare: 100.0, often: 100.0})
    path = write(tmp_path / "shapes.yaml", {problem(rare): Count(1), problem(often, 4): Count(3)})
    result, (request,) = ended(monkeypatch, path, done=1)
    assert request.buckets == (often, rare)
    assert request.heads_of(often) == 4
    assert result.exit_code == 1
    assert "tuned rows cover 75 % of the recorded time in our ops, 400 µs in all" in result.stdout
    assert "the covered calls took 450 µs by the untuned default and take 300 µs by the winners" in result.stdout
    assert f"titans-backends tune --from {path} --device cpu" in result.stdout
    told = json.loads(ended(monkeypatch, path, "--json")[0].stdout)
    assert [row["seq_len"] for row in told["rows"]] == [128, 64]
    assert told["coverage"][0]["covered"] == 1.0


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--op", "dual_core", "--batch", "2"], "--op, --batch"), (["--seq-lens", "5"], "--seq-lens"), (["--launch", "eager"], "--launch")],
)
def test_options_that_would_change_the_problems_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], named: str
) -> None:
    path = write(tmp_path / "shapes.yaml", {problem(bucket()): Count(1)})
    result, seen = ended(monkeypatch, path, *words)
    assert (result.exit_code, seen) == (2, [])
    assert f"as they were met; leave out {named}, or leave out --from" in " ".join(result.stderr.split())


def test_a_missing_empty_foreign_or_damaged_file_is_status_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "missing.yaml"
    assert f'Make it with: with titans_backends.record("{missing}")' in ended(monkeypatch, missing)[0].stderr
    here = problem(bucket())
    elsewhere = write(tmp_path / "elsewhere.yaml", {Problem(here.bucket, here.sizes, "cuda"): Count(1)})
    result, seen = ended(monkeypatch, elsewhere)
    assert (result.exit_code, seen) == (2, [])
    assert "nothing to tune on cpu: 1 problem met on cuda" in " ".join(result.stderr.split())
    assert "Record on this device, or name another with --device" in " ".join(result.stderr.split())
    pinned = tmp_path / "pinned.yaml"
    pinned.write_text(elsewhere.read_text().replace("device: cuda,", "device: cpu,").replace("forward:", "batch_invariant: true, forward:"))
    empty = tmp_path / "empty.yaml"
    empty.write_text("schema: 1\nproblems: []\n")
    for path, said in ((pinned, "Record outside of policy(batch_invariant=True)"), (empty, "it holds no problem. Record a model that calls the ops")):
        result, seen = ended(monkeypatch, path)
        assert (result.exit_code, seen) == (2, [])
        assert said in " ".join(result.stderr.split())
    damaged = tmp_path / "damaged.yaml"
    damaged.write_text("schema: 1\nproblems:\n  - {op: dual_core}\n")
    result, _ = ended(monkeypatch, damaged)
    assert result.exit_code == 2
    assert "damaged.yaml:3: device, seq_len, when, sizes, forward missing" in " ".join(result.stderr.split())


TABLE = "schema: 1\ndevice: {}\nenvironments: {}\nops: {}\n"


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("t.yaml", TABLE, "PATH: a tuned table, not the problems of a model. To see it: titans-backends cache show PATH. To choose by it: export TITANS_"),
        ("t.timings.yaml", TABLE, "PATH: the timings of a tuned table, not the problems of a model. What is wanted here is written by: with titans_"),
        ("mkdocs.yml", "site_name: x\nnav: [a]\n", "PATH: not the problems of a model: its fields are site_name, nav. What is wanted here is written by"),
        ("none.yaml", "{}\n", "PATH: not the problems of a model: it has no fields. What is wanted here is written by: with titans_backends.record("),
        ("read.md", "# a\nb: c: d\n", 'PATH:2: not YAML, or cut off: mapping values are not allowed in this context. What is wanted here is written by: with'),
        ("list.yaml", "[1, 2]\n", 'PATH:1: expected a mapping, found a list. What is wanted here is written by: with titans_backends.record("shapes.yaml")'),
    ],
)  # fmt: skip
def test_another_file_is_named_for_what_it_is(name: str, text: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    path.write_text(text)
    result, seen = ended(monkeypatch, path)
    assert (result.exit_code, seen) == (2, [])
    assert said.replace("PATH", str(path)) in result.stderr
    with pytest.raises(SchemaError, match=r"written by: with"), tb.record(path):
        pytest.fail("it ran")
    assert path.read_text() == text


def test_a_folder_is_told_with_the_recordings_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "table.yaml").write_text(TABLE)
    said = f"error: --from {tmp_path}: a folder, not a file that titans_backends.record wrote"
    assert f"{said}, and none is in it\n" in ended(monkeypatch, tmp_path)[0].stderr
    write(tmp_path / "shapes.yaml", {problem(bucket()): Count(1)})
    assert f"{said}; in it: titans-backends tune --from {tmp_path / 'shapes.yaml'}\n" in ended(monkeypatch, tmp_path)[0].stderr


def test_a_recording_in_a_tables_place_is_named_and_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "shapes.yaml", {problem(bucket()): Count(1)})
    monkeypatch.setenv("TITANS_BACKENDS_CACHE", str(path))
    tb.reset()
    with torch.no_grad():
        told = tb.get_op("fused_uw").explain(torch.eye(4), torch.ones(4, 16), torch.ones(4, 16))
    assert "a tuned table, which `titans-backends tune --from" in told.consulted[0].answer
    assert "left as it is" in told.consulted[0].answer
    assert sorted(one.name for one in tmp_path.iterdir() if one.is_file()) == ["shapes.yaml"]
    tb.reset()


@pytest.mark.parametrize("name", ["out.yaml", "out.timings.yaml"])
def test_an_output_that_is_a_recording_is_refused_before_anything_is_read_or_measured(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the table's place, or in that of the timings beside it."""
    path = write(tmp_path / "shapes.yaml", {problem(bucket()): Count(1)})
    place = write(tmp_path / name, {problem(bucket()): Count(1)})
    before = place.read_text()
    for more in ((), ("--dry-run",), ("--doubtful",)):
        monkeypatch.setattr(importlib.import_module("titans_backends.cli.tune"), "read_problems", lambda *_: pytest.fail("it was read"))
        result, seen = ended(monkeypatch, path, "--output", str(tmp_path / "out.yaml"), *more)
        assert (result.exit_code, seen) == (2, [])
        said = f"--output {tmp_path / 'out.yaml'}: no table can be written there: {place}: the problems of a model, not a tuned table"
        assert said in result.stderr
    assert place.read_text() == before


def test_an_output_named_as_timings_or_a_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "shapes.yaml", {problem(bucket()): Count(1)})
    result, seen = ended(monkeypatch, path, "--output", "x.timings.yaml")
    assert (result.exit_code, seen) == (2, [])
    assert "name the table: --output x.yaml" in result.stderr
    for folder in (str(tmp_path), ".", "/"):
        result, seen = ended(monkeypatch, path, "--output", folder)
        assert (result.exit_code, seen) == (2, [])
        assert "it is no file but a folder" in result.stderr


def test_the_doubtful_among_a_recordings_are_those_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, other = bucket(64), bucket(128), bucket(256)
    path = write(tmp_path / "shapes.yaml", {problem(first): Count(5), problem(second): Count(1)})
    store = SimpleNamespace(table=SimpleNamespace(rows={}), timings=True, path=tmp_path / "t.yaml")
    doubtful = importlib.import_module("titans_backends.cli.tune_doubtful")
    monkeypatch.setattr(doubtful, "Store", SimpleNamespace(opened=lambda *_: store))
    monkeypatch.setattr(doubtful, "doubtful", lambda *_: ((other, 0.9), (second, 0.5), (first, 0.1)))
    result, (request,) = ended(monkeypatch, path, "--doubtful")
    assert request.buckets == (second, first), "the most doubtful first, not the most expensive"
    assert request.doubtful
    assert f"2 buckets planned (in doubt of {path}, the most doubtful first)" in result.stderr
    assert "tuned rows cover" not in result.stdout  # of the doubtful rows alone it would mean nothing
    assert f"titans-backends tune --from {path} --device cpu --doubtful" in ended(monkeypatch, path, "--doubtful", done=1)[0].stdout
    monkeypatch.setattr(doubtful, "doubtful", lambda *_: ((other, 0.9),))
    nothing = ended(monkeypatch, path, "--doubtful", "--dry-run")[0]
    assert f"that {path} asks for is in doubt" in nothing.stdout


def test_every_recorded_bucket_is_tuned_for_real_and_chosen_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: Callable[[dict[Bucket, float]], None]
) -> None:
    rows({})
    path = tmp_path / "shapes.yaml"
    call = tb.get_op("fused_uw"), (torch.rand(1, 1, 1, 16, 16).tril(), torch.randn(1, 1, 1, 16, 8), torch.randn(1, 1, 1, 16, 8))
    with torch.no_grad(), tb.record(path):
        call[0](*call[1])
    result = run(app, ["tune", "--from", str(path), "--device", "cpu", "--backend", "eager"])
    assert result.exit_code == 0, result.output
    assert "tuned rows cover 100 %" in result.stdout
    assert call[0].explain(*call[1]).as_dict()["origin"] == "tuned"
    again = run(app, ["tune", "--from", str(path), "--device", "cpu", "--backend", "eager"])
    assert "nothing to do" in again.stdout
    assert "tuned rows cover 100 %" in again.stdout
    assert field(bucket(), "saves") == "any"
