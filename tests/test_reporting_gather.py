"""What the report finds on disk: the user's rows before the shipped ones, timings that belong to a row, and files that are damaged, foreign or empty."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from titans_backends.backend import Candidate
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Device, Entry, Environment, canonical_when, device_of
from titans_backends.cache.source_hash import source_hash
from titans_backends.cache.timings import Measurement
from titans_backends.cli.row_state import row_state, tune_command
from titans_backends.contracts import CONTRACTS
from titans_backends.machine import detect
from titans_backends.offers import offers, source_modules
from titans_backends.reporting.answers import answers
from titans_backends.reporting.ceilings import ceilings_in
from titans_backends.reporting.facts import Facts, MachineFacts, Refusal
from titans_backends.reporting.floors import work_of_bucket
from titans_backends.reporting.gather import Edge, gather
from titans_backends.reporting.rows import rows_of
from titans_backends.tables import current_environment
from titans_backends.tuning.problem import signature_of_bucket

OP = "gated_delta_rule"
SHORT, LONG = (Bucket(OP, canonical_when({"dtype": "float32", "head_dim": (16, 16), "streams": 2}, defaults_of(OP)), length) for length in (64, 128))
HERE = detect("cpu")
GPU = Device("cuda", "another_gpu", "Another GPU", sm=90, sms=132)


@pytest.fixture(autouse=True)
def own_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder, and no shipped table but what a test writes into `shipped`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    monkeypatch.setattr(paths, "shipped_paths", lambda: tuple(sorted(p for p in shipped.glob("*.yaml") if ".timings." not in p.name)))
    paths.user_cache_path("x").parent.mkdir(parents=True)
    return tmp_path


def candidates() -> list[Candidate]:
    """Everything that is offered here, the default first."""
    return [candidate for one in offers(signature_of_bucket(SHORT), HERE) for candidate in one.forward]


def source(of: int = 0) -> str:
    return source_hash(source_modules(candidates()[of], OP))


def entry(us: float = 100.0, *, of: int = 0, **changes: object) -> Entry:
    one = candidates()[of]
    return replace(Entry(one.name, us, 0.01, 2.0, one.params, next="eager/other", next_us=2 * us, source=source(of)), **changes)  # type: ignore[arg-type]


def write(path: Path, rows: dict[Bucket, Entry], *, device: Device | None = None, environment: Environment | None = None) -> Path:
    file.update(path, device=device or device_of(HERE), environment=environment or current_environment("cpu"), changes=rows, defaults_of=defaults_of)
    return path


def write_timings(path: Path, rows: dict[Bucket, list[Measurement]], *, device: Device | None = None) -> Path:
    changes = {bucket: tuple(found) for bucket, found in rows.items()}
    file.update_timings(path, device=device or device_of(HERE), environment=current_environment("cpu"), changes=changes, defaults_of=defaults_of)
    return path


def measurement(us: float, of: int = 0) -> Measurement:
    one = candidates()[of]
    return Measurement(one.name, one.params, us=us, spread=0.01, samples=9, peak_mib=1.0, source=source(of))


def user(slug: str = HERE.slug) -> Path:
    return paths.user_cache_path(slug)


def found(results: Path | None = None) -> Facts:
    return gather(Edge(HERE, row_state, lambda bucket: tune_command(bucket, [bucket.seq_len]), results))


def only(facts: Facts) -> MachineFacts:
    (machine,) = facts.machines
    return machine


def test_with_nothing_at_all_there_is_nothing_and_no_fault() -> None:
    assert found() == replace(found(), machines=(), problems=())


def test_nothing_tuned_shows_the_shipped_table(own_files: Path) -> None:
    write(own_files / "shipped" / "another_gpu.yaml", {SHORT: entry(), LONG: entry()}, device=GPU)
    machine = only(found())
    assert (machine.device, machine.here, len(machine.cells)) == (GPU, False, 2)
    assert {cell.origin for cell in machine.cells} == {"shipped"}


def test_the_users_row_comes_before_the_shipped_one_of_its_bucket(own_files: Path) -> None:
    write(own_files / "shipped" / f"{HERE.slug}.yaml", {SHORT: entry(100.0), LONG: entry(100.0)})
    write(user(), {SHORT: entry(50.0)})
    machine = only(found())
    assert machine.here
    told = {cell.bucket.seq_len: (cell.origin, cell.entry.us) for cell in machine.cells if cell.entry is not None}
    assert told == {64: ("user", 50.0), 128: ("shipped", 100.0)}
    assert {cell.state.kind for cell in machine.cells} == {"fresh"}


def test_a_row_that_decides_nothing_gives_way_to_the_shipped_one(own_files: Path) -> None:
    write(own_files / "shipped" / f"{HERE.slug}.yaml", {SHORT: entry(100.0)})
    write(user(), {SHORT: entry(50.0, source="of another time")})
    (cell,) = only(found()).cells
    assert (cell.origin, cell.state.kind) == ("shipped", "fresh")


def test_a_stale_row_has_the_command_that_renews_it() -> None:
    write(user(), {SHORT: entry()}, environment=replace(current_environment("cpu"), torch="1.0"))
    (cell,) = only(found()).cells
    assert cell.state.kind == "stale"
    assert "torch 1.0" in cell.state.reason
    assert cell.state.command == tune_command(SHORT, [64])


def test_of_another_machines_row_only_the_source_is_checked(own_files: Path) -> None:
    eager = next(index for index, one in enumerate(candidates()) if one.backend == "eager")
    rows = {SHORT: entry(of=eager), LONG: entry(of=eager, source="of another time")}
    write(own_files / "shipped" / "another_gpu.yaml", rows, device=GPU, environment=replace(current_environment("cpu"), torch="1.0"))
    assert {cell.bucket.seq_len: cell.state.kind for cell in only(found()).cells} == {64: "fresh", 128: "ignored"}


def test_timings_lie_beside_a_table_or_in_the_results(own_files: Path) -> None:
    write(user(), {SHORT: entry()})
    write_timings(paths.timings_path(user()), {SHORT: [measurement(100.0), measurement(300.0, of=1)]})
    (cell,) = only(found()).cells
    assert sorted(one.us or 0 for one in cell.measurements) == [100.0, 300.0]
    (row,) = rows_of(only(found()))
    assert row.kept_default
    results = own_files / "results"
    results.mkdir()
    paths.timings_path(user()).rename(results / paths.timings_path(user()).name)
    assert only(found()).cells[0].measurements == ()
    assert set(only(found(results)).cells[0].measurements) == set(cell.measurements)


def test_the_default_is_the_first_that_is_offered_and_has_its_time_of_the_race() -> None:
    write(user(), {SHORT: entry(100.0, of=1)})
    write_timings(paths.timings_path(user()), {SHORT: [measurement(100.0, of=1), measurement(250.0)]})
    (row,) = rows_of(only(found()))
    assert row.default is not None
    assert (row.default.label, row.over_default) == (candidates()[0].label, 2.5)
    write_timings(paths.timings_path(user()), {LONG: [measurement(100.0, of=1)]})
    write(user(), {LONG: entry(100.0, of=1)})
    unknown = next(row for row in rows_of(only(found())) if row.place.seq_len == 128)
    assert unknown.default is None
    assert unknown.default_reason == f"today's default, {candidates()[0].label}, has no time in this race"


def test_timings_of_other_code_than_the_rows_are_not_the_rows_race() -> None:
    write(user(), {SHORT: entry()})
    write_timings(paths.timings_path(user()), {SHORT: [replace(measurement(100.0), source="of another time")]})
    assert only(found()).cells[0].measurements == ()


def test_timings_without_a_table_are_a_machine_that_nothing_decides_on(own_files: Path) -> None:
    write_timings(own_files / "another_gpu.timings.yaml", {SHORT: [measurement(100.0), measurement(50.0, of=1)]}, device=GPU)
    (row,) = rows_of(only(found(own_files)))
    assert (row.decided, row.origin, row.winner and row.winner.us) == (False, "results", 50.0)


def test_the_row_for_traced_graphs_counts_once_where_it_says_the_same() -> None:
    training = SHORT._replace(when=canonical_when({**dict(SHORT.when), "regime": "training"}, defaults_of(OP)))
    traced = SHORT._replace(when=canonical_when({**dict(training.when), "saves": "inputs"}, defaults_of(OP)))
    pair = entry(backward="eager/any", source="a+b")
    write(user(), {training: pair, traced: pair})
    machine = only(found())
    assert (len(machine.cells), machine.repeated) == (1, 1)
    write(user(), {training: pair, traced: replace(pair, us=200.0)})
    assert (len(only(found()).cells), only(found()).repeated) == (2, 0)


def test_a_damaged_file_is_named_and_left_as_it_is() -> None:
    write(user(), {SHORT: entry()})
    user("other").write_text("schema: 1\ndevice: [\n")
    user("empty").write_text("")
    paths.timings_path(user()).write_bytes(b"\xff\xfe")
    facts = found()
    assert {Path(one.path).name for one in facts.problems} == {"other.yaml", "empty.yaml"}
    assert all(one.problem for one in facts.problems)
    assert not any(Path(one.path).name in one.problem for one in facts.problems)  # the path stands beside it
    assert any("not UTF-8" in one.problem for one in only(facts).files)
    assert user("other").read_text() == "schema: 1\ndevice: [\n"
    assert len(only(facts).cells) == 1


def test_a_file_of_a_later_schema_and_one_under_anothers_name_are_named() -> None:
    user("later").write_text("schema: 99\n")
    write(user("somebody_else"), {SHORT: entry()})
    told = {Path(one.path).name: one.problem for one in found().problems}
    assert "schema 99" in told["later.yaml"]
    assert f"it holds rows of {HERE.slug}" in told["somebody_else.yaml"]
    assert found().machines == ()


def test_an_op_of_a_later_version_is_shown_and_ignored() -> None:
    strange = Bucket("op_of_tomorrow", (("dtype", "float32"), ("head_dim", (16, 16)), ("streams", 2)), 64)
    write(user(), {SHORT: entry()})
    text = user().read_text()
    user().write_text(text + text.partition("ops:\n")[2].replace(OP, strange.op))
    cells = {cell.bucket.op: cell for cell in only(found()).cells}
    assert cells[strange.op].state.kind == "ignored"
    assert cells[strange.op].work is None
    assert {row.place.op for row in rows_of(only(found()))} == {OP, strange.op}


def test_only_the_ops_that_are_asked_for() -> None:
    write(user(), {SHORT: entry()})
    assert gather(Edge(HERE, row_state, lambda bucket: "", ops=["slow_core"])).machines == ()


def test_ceilings_are_the_best_that_any_file_saw(tmp_path: Path) -> None:
    for name, content in (
        ("a.json", {"device": "Another GPU", "ceilings": {"copy": 1e12, "bf16": 2e14}}),
        ("b.json", {"device": "Another GPU", "ceilings": {"copy": 2e12, "bf16": 1e14, "tf32": float("nan"), "fp32": -1, "else": 5}}),
        ("c.json", {"device": "Another GPU"}), ("d.json", [1]), ("e.json", {"device": 3, "ceilings": {"copy": 1}}),
    ):  # fmt: skip
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "half.json").write_text('{"device": "Another GPU", "ceil')
    (one,) = ceilings_in(tmp_path).values()
    assert one.rates == {"copy": 2e12, "bf16": 2e14}
    assert one.sources == ("a.json", "b.json")


def test_the_work_of_a_bucket_is_its_contracts() -> None:
    """By hand: 64 tokens of 2 heads of 16 in float32; q, k, v and o, beta, and the final state; training has no state, gradients of all, arriving o's."""
    tokens, heads, size = 64, 2, 16
    rows, scalars, state = 4 * tokens * heads * size, 4 * tokens * heads, 4 * heads * size * size
    inference = work_of_bucket(SHORT)
    assert inference.bytes == 3 * rows + scalars + rows + state
    training = work_of_bucket(SHORT._replace(when=canonical_when({**dict(SHORT.when), "regime": "training"}, defaults_of(OP))))
    assert training.bytes == (3 * rows + scalars + rows) + (3 * rows + scalars) + rows
    assert training.flop == 3 * inference.flop
    with pytest.raises((KeyError, ValueError)):
        work_of_bucket(SHORT._replace(op="op_of_tomorrow"))
    assert OP in CONTRACTS


def test_who_refuses_here_leaves_the_default_known_and_elsewhere_not() -> None:
    """On this machine a refusal is an answer; of another machine's race it is only this installation's."""
    raced = [measurement(5.0), Measurement("triton/any", us=1.0)]  # triton serves no CPU
    assert answers(SHORT, HERE, True).default(raced)[0] == (raced[0].identity,)
    assert answers(SHORT, HERE, False).default(raced[:1])[0] == (raced[0].identity,)
    refusing = replace(answers(SHORT, HERE, False), unasked=(Refusal("triton", "it is not there"),))
    assert refusing.default(raced) == (None, "triton was in the race and cannot be asked for its default here: it is not there")
    assert replace(refusing, here=True).default(raced)[0] == (raced[0].identity,)
