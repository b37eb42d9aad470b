"""Which table decides: the order of precedence, what is ignored and why, what is borrowed, and that every answer is told."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import titans_backends as tb
from titans_backends import dispatch
from titans_backends.buckets import Bucket, bucket_of, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.lookup import Hit
from titans_backends.cache.neighbour import silent
from titans_backends.cache.schema import Device, Entry, Table, device_of
from titans_backends.dispatch import choose
from titans_backends.machine import Machine
from titans_backends.offers import Pair
from titans_backends.request import PLAIN
from titans_backends.tables import current_environment

pytestmark = pytest.mark.usefixtures("eager_first")

OP = tb.get_op("uw_transform")
ARGUMENTS = (torch.randn(1, 70, 2, 8), torch.randn(1, 70, 2, 8), torch.rand(1, 70, 2))


def signature() -> tb.Signature:
    call = OP.contract.make_call(*ARGUMENTS)
    return OP._planner.signature(call, {"B": 1, "T": 70, "G": 2, "H": 2, "K": 8, "V": 8, "N": 1}, PLAIN)


def pair(inverse: str) -> Pair:
    return next(
        p for p in (Pair(c) for o in choose(signature(), tb.detect()).offers for c in o.forward) if p.forward.params == (("inverse", inverse),)
    )


def write(path: Path, inverse: str = "solve", *, device: Device | None = None, bucket: Bucket | None = None, **changes: object) -> None:
    """A table with one row for the call, whose winner is not the default."""
    found = pair(inverse)
    entry = Entry("eager/chunked", 5.0, 0.0, 0.0, params=found.forward.params, source=dispatch.pair_source(found, "uw_transform"))
    file.update(
        path,
        device=device or device_of(tb.detect()),
        environment=replace(current_environment("cpu"), **changes.pop("environment", {})),  # type: ignore[arg-type]
        changes={bucket or bucket_of(signature()): replace(entry, **changes)},  # type: ignore[type-var]
        defaults_of=defaults_of,
    )
    tb.reset()


@pytest.fixture(autouse=True)
def user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache folder for each test; yields the user's path."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tb.reset()
    yield paths.user_cache_path(tb.detect().slug)
    monkeypatch.undo()
    tb.reset()


def kernel() -> str:
    return OP.explain(*ARGUMENTS).kernel


def test_the_users_row_decides_and_is_named(user: Path) -> None:
    assert kernel() == "eager/chunked inverse=blocks"
    write(user)
    told = OP.explain(*ARGUMENTS)
    assert told.kernel == "eager/chunked inverse=solve"
    assert told.choice.origin == "tuned"
    assert str(user) in told.choice.reason
    assert OP.bind(*ARGUMENTS).choice.pair.label == told.kernel


def test_a_named_file_comes_before_the_users(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(user, "solve")
    write(tmp_path / "named.yaml", "blocks")
    monkeypatch.setenv("TITANS_BACKENDS_CACHE", str(tmp_path / "named.yaml"))
    tb.reset()
    told = OP.explain(*ARGUMENTS)
    assert told.kernel == "eager/chunked inverse=blocks"
    assert "named.yaml" in told.choice.reason


def test_the_users_comes_before_the_shipped_and_that_before_a_relatives(user: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(tb.detect(), sm=90)
    own, relative = tmp_path / "own.yaml", tmp_path / "relative.yaml"
    write(own, device=device_of(machine))
    write(relative, device=Device(machine.kind, "another", "Another", sm=90))
    monkeypatch.setattr(paths, "shipped_paths", lambda: (relative, own))
    tb.reset()
    assert [asked.source.kind for asked in choose(signature(), machine).consulted] == ["user", "shipped"]
    own.unlink()
    tb.reset()
    borrowed = choose(signature(), machine)
    assert (borrowed.origin, borrowed.pair.label) == ("borrowed", "eager/chunked inverse=solve")
    assert "borrowed table" in borrowed.reason
    stranger: Machine = replace(machine, sm=80)
    tb.reset()
    assert choose(signature(), stranger).origin == "default"  # another architecture's is not asked


def test_a_row_whose_source_changed_is_ignored_with_the_reason(user: Path) -> None:
    write(user, source="000000000000")
    told = OP.explain(*ARGUMENTS)
    assert told.choice.origin == "default"
    assert "ignored: eager/chunked inverse=solve has changed since" in str(told)


def test_a_row_measured_with_another_torch_is_used_and_marked(user: Path) -> None:
    write(user, environment={"torch": "1.0.0"})
    told = OP.explain(*ARGUMENTS)
    assert told.kernel == "eager/chunked inverse=solve"
    assert "measured with torch 1.0.0" in told.stale
    assert "titans-backends tune --op uw_transform" in told.stale
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a call never says it
        OP(*ARGUMENTS)


def test_a_row_that_memory_decided_says_so_and_is_renewed_so(user: Path) -> None:
    write(user)
    assert "tuned with" not in str(OP.explain(*ARGUMENTS))
    write(user, objective="memory", environment={"torch": "1.0.0"})
    told = OP.explain(*ARGUMENTS)
    assert told.choice.reason.endswith("eager/chunked inverse=solve, 5 us, tuned with --objective memory")
    assert told.stale.endswith("--objective memory")


def test_a_row_that_names_what_is_not_offered_is_told_and_passed_over(user: Path) -> None:
    write(user, use="triton/imagined")
    told = OP.explain(*ARGUMENTS)
    assert told.choice.origin == "default"
    assert "its row names triton/imagined inverse=solve, which is not among the candidates" in str(told)


@pytest.mark.parametrize(("nearer", "farther"), [(64, 128), (80, 32)])
def test_where_the_nearer_rows_choice_is_not_offered_the_other_row_decides(user: Path, nearer: int, farther: int) -> None:
    at = bucket_of(signature())
    write(user, bucket=at._replace(seq_len=farther))
    write(user, bucket=at._replace(seq_len=nearer), use="triton/imagined")
    told = OP.explain(*ARGUMENTS)
    assert (told.choice.origin, told.kernel) == ("tuned", "eager/chunked inverse=solve")
    assert f"nearest row, seq_len {farther}" in told.choice.reason
    assert f"the row of seq_len {nearer} names triton/imagined inverse=solve, which is not among the candidates for this call" in told.choice.reason
    write(user, bucket=at._replace(seq_len=nearer))
    assert f"nearest row, seq_len {nearer}" in OP.explain(*ARGUMENTS).choice.reason
    for length in (nearer, farther):
        write(user, bucket=at._replace(seq_len=length), use="triton/imagined")
    assert OP.explain(*ARGUMENTS).choice.origin == "default"


def test_a_miss_shows_the_closest_row_field_by_field(user: Path) -> None:
    other = bucket_of(signature())
    write(user, bucket=other._replace(when=tuple((n, (64, 64) if n == "head_dim" else v) for n, v in other.when)))
    text = str(OP.explain(*ARGUMENTS))
    assert "no row with this key" in text
    assert "head_dim (64, 64) there, (8, 8) here" in text


def test_a_forced_backend_takes_its_own_row(user: Path) -> None:
    write(user)
    assert OP.explain(*ARGUMENTS, backend="eager").kernel == "eager/chunked inverse=solve"


def test_batch_invariance_asks_no_table(user: Path) -> None:
    write(user)
    with tb.policy(batch_invariant=True):
        told = OP.explain(*ARGUMENTS)
    assert told.kernel == "eager/chunked inverse=blocks"
    assert told.consulted == ()


def test_a_table_that_is_not_used_is_named_once_beside_its_reason(user: Path) -> None:
    write(user)
    user.write_text("schema: 99\n")
    tb.reset()
    told = OP.explain(*ARGUMENTS)
    assert told.consulted[0].answer == "line 1: schema 99, this version reads schema 1: ignored and left as it is"
    assert str(told).count(str(user)) == 1


def test_a_damaged_cache_warns_once_and_loses_nothing(user: Path) -> None:
    write(user)
    user.write_text("ops: {[")
    tb.reset()
    with pytest.warns(UserWarning, match="damaged-1"):
        assert kernel() == "eager/chunked inverse=blocks"
    assert user.with_name(f"{user.name}.damaged-1").read_text() == "ops: {["
    tb.reset()
    later = OP.explain(*ARGUMENTS).consulted[0].answer
    assert later == f"there is no such file (damaged, it was moved to {user.name}.damaged-1 beside)"


def captured(us: float = 100.0, **changes: object) -> dispatch.Choice:
    """The choice of the call in a graph, where the user's table has an eager row of that time."""
    write(paths.user_cache_path(tb.detect().slug), us=us, **changes)
    return choose(replace(signature(), launch="graph"), tb.detect())


def test_for_a_graph_without_a_row_the_eager_row_speaks_and_is_named_as_a_neighbour() -> None:
    found = captured()
    assert (found.origin, found.pair.label) == ("neighbour", "eager/chunked inverse=solve")
    assert "neighbour (eager row): exact row, seq_len 70" in found.reason
    told = [asked.answer for asked in found.consulted if asked.source.kind == "user"]
    assert told[0] == "no row with this key"  # the graph's own row is asked for first
    assert dict(found.bucket.when)["launch"] == "graph"


def test_an_eager_row_that_is_mostly_the_hosts_time_is_told_and_passed_over() -> None:
    found = captured(99.0)
    assert (found.origin, found.pair.label) == ("default", "eager/chunked inverse=blocks")
    assert "passed over: below 100 us an eager time is mostly the host's" in found.consulted[-1].answer


def test_a_graphs_own_row_comes_before_the_eager_one(user: Path) -> None:
    write(user, "blocks", bucket=bucket_of(replace(signature(), launch="graph")), us=5.0)
    found = captured()
    assert (found.origin, found.pair.label) == ("tuned", "eager/chunked inverse=blocks")


def test_between_two_rows_the_shorter_ones_end_decides_and_the_choice_says_so(user: Path) -> None:
    here = bucket_of(signature())
    write(user, "solve", bucket=here._replace(seq_len=32))
    write(user, "blocks", bucket=here._replace(seq_len=128))

    def ended(table: Table) -> Table:
        return replace(table, rows={b: replace(e, until=(128, 70)) if b.seq_len == 32 else e for b, e in table.rows.items()})

    file.edit(user, ended, device=device_of(tb.detect()), defaults_of=defaults_of)
    tb.reset()
    found = choose(signature(), tb.detect())  # of 70 tokens: nearer to 128
    assert (found.origin, found.pair.label) == ("tuned", "eager/chunked inverse=solve")
    assert "nearest row, seq_len 32" in found.reason
    assert "(between 32 and 128 the choice changes after 70, by the times of both at either)" in found.reason


def test_for_an_eager_call_without_a_row_the_graphs_row_speaks_where_it_is_long(user: Path) -> None:
    graph = bucket_of(replace(signature(), launch="graph"))
    write(user, bucket=graph, us=100.0)
    found = choose(signature(), tb.detect())
    assert (found.origin, found.pair.label) == ("neighbour", "eager/chunked inverse=solve")
    assert "neighbour (graph row): exact row, seq_len 70" in found.reason
    write(user, bucket=graph, us=99.0)
    passed_over = choose(signature(), tb.detect())
    assert (passed_over.origin, passed_over.pair.label) == ("default", "eager/chunked inverse=blocks")
    assert "passed over: below 100 us an eager call waits for its host" in passed_over.consulted[-1].answer
    write(user, "blocks", us=5.0)  # its own row
    assert choose(signature(), tb.detect()).origin == "tuned"


def test_a_stale_neighbour_is_marked_and_one_whose_source_changed_is_ignored() -> None:
    found = captured(environment={"torch": "1.0.0"})
    assert found.answered is not None
    assert found.answered.staleness is not None
    assert (found.origin, found.answered.staleness.kind) == ("neighbour", "stale")
    ignored = captured(source="000000000000")
    assert ignored.origin == "default"
    assert "ignored: eager/chunked" in ignored.consulted[-1].answer


def test_a_relatives_eager_row_is_no_neighbour(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another card and another launch at once: nobody measured what that costs."""
    relative, machine = tmp_path / "relative.yaml", replace(tb.detect(), sm=90)
    write(relative, device=Device(machine.kind, "another", "Another", sm=90), us=500.0)
    monkeypatch.setattr(paths, "shipped_paths", lambda: (relative,))
    tb.reset()
    assert choose(signature(), machine).origin == "borrowed"
    assert choose(replace(signature(), launch="graph"), machine).origin == "default"


def test_a_pair_speaks_from_twice_the_time() -> None:
    entry = Entry("eager/chunked", 199.0, 0.0, 0.0, backward="eager/chunked")
    bucket = bucket_of(signature())
    assert silent(Hit("exact", bucket, entry), "eager").startswith("below 200 us")
    assert not silent(Hit("exact", bucket, replace(entry, us=200.0)), "graph")
    assert not silent(Hit("exact", bucket, replace(entry, backward=None)), "eager")
