"""`record`: every way to a kernel counts, in every thread, and the file holds the distinct problems with the sum of all counts."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import titans_backends as tb
from titans_backends import recording
from titans_backends.buckets import defaults_of
from titans_backends.cache.nodes import SchemaError
from titans_backends.cache.problems import Count, Problem, dump_problems, parse_problems
from titans_backends.cache.writing import CacheError
from titans_backends.contracts import CONTRACTS
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket

B, T, H, D = 1, 8, 2, 16


def inputs(length: int = T, *, train: bool = False, batch: int = B) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(batch, length, H, D, generator=source) for _ in range(3))
    return tuple(x.requires_grad_(train) for x in (q, k / k.norm(dim=-1, keepdim=True), v, torch.rand(batch, length, H, generator=source)))


def found(path: Path) -> dict[Problem, Count]:
    return {met.problem: met.count for met in parse_problems(path.read_text(), str(path), defaults_of)}


def only(path: Path) -> tuple[Problem, Count]:
    (one,) = found(path).items()
    return one


@pytest.fixture
def shapes(tmp_path: Path) -> Path:
    return tmp_path / "shapes.yaml"


def test_the_first_call_and_those_that_hit_the_memo_count_and_the_sizes_are_there(shapes: Path) -> None:
    rule, given = tb.get_op("gated_delta_rule"), inputs(batch=3)
    with tb.record(shapes), torch.no_grad():
        for _ in range(4):
            rule(*given)
    problem, count = only(shapes)
    assert count == Count(4, 0)
    assert (problem.bucket.op, problem.bucket.seq_len, problem.device) == ("gated_delta_rule", T, "cpu")
    assert dict(problem.bucket.when) == {"dtype": "float32", "head_dim": (D, D), "streams": 6}
    assert dict(problem.sizes) == {"B": 3, "T": T, "N": 3, "G": H, "H": H}


def test_remembered_repeats_and_bound_calls_count(shapes: Path, plugin_backend: Callable[..., list[str]]) -> None:
    outputs: list[tuple[Tensor, None]] = [(torch.zeros(B, T, H, D), None)]
    plugin_backend("remembers", remember=lambda call, candidate: (outputs[0], lambda values: outputs[0]))
    rule, given = tb.get_op("gated_delta_rule"), inputs()
    with torch.no_grad():
        bound = rule.bind(*given)
        bound(*given)
        assert bound._plan.again is not None
        with tb.record(shapes):
            rule(*given)
            bound(*given)
            bound(*given)
    assert only(shapes)[1] == Count(3, 0)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_training_counts_both_directions_in_one_problem(shapes: Path, compiled: bool) -> None:
    rule = tb.get_op("gated_delta_rule")

    def model(*given: Tensor) -> Tensor:
        o = rule(*given)[0]
        assert o is not None
        return o.sum()

    called = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    with tb.record(shapes):
        for _ in range(2):
            called(*inputs(train=True)).backward()
    problem, count = only(shapes)
    assert count == Count(2, 2)
    assert dict(problem.bucket.when)["regime"] == "training"
    assert "saves" not in dict(problem.bucket.when)


def test_a_step_in_place_counts(shapes: Path) -> None:
    state = torch.zeros(B, H, D, D)
    with tb.record(shapes), torch.no_grad():
        tb.get_op("gated_delta_step")(*inputs(1), state=state, inplace=True)
    assert only(shapes)[1] == Count(1, 0)


def test_threads_count_and_what_comes_after_does_not(shapes: Path) -> None:
    rule, given = tb.get_op("gated_delta_rule"), inputs()

    def several() -> None:
        with torch.no_grad():
            for _ in range(20):
                rule(*given)

    with tb.record(shapes):
        threads = [threading.Thread(target=several) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    several()
    assert recording.listening == []
    assert only(shapes)[1] == Count(80, 0)


def test_nested_recordings_each_count(shapes: Path, tmp_path: Path) -> None:
    rule, given, inner = tb.get_op("gated_delta_rule"), inputs(), tmp_path / "inner.yaml"
    with torch.no_grad(), tb.record(shapes):
        rule(*given)
        with tb.record(inner):
            rule(*given)
        rule(*given)
    assert (only(shapes)[1], only(inner)[1]) == (Count(3, 0), Count(1, 0))


def test_a_recording_says_what_it_has_met_and_its_context_what_to_type(shapes: Path) -> None:
    context = tb.record(shapes)
    assert (
        repr(context) == f"<titans_backends.record('{shapes}'): a context, not entered; type: with titans_backends.record('{shapes}'): model(batch)>"
    )
    with torch.no_grad(), context as recording:
        assert "a context, entered" in repr(context)
        assert repr(recording) == f"<recording into {shapes}: 0 problems, 0 runs>"
        tb.get_op("gated_delta_rule")(*inputs())
    assert repr(recording) == f"<recording into {shapes}: 1 problem, 1 run>"


def test_one_context_serves_twice_and_decorates(shapes: Path) -> None:
    context, rule, given = tb.record(shapes), tb.get_op("gated_delta_rule"), inputs()
    with torch.no_grad():
        for _ in range(2):
            with context:
                rule(*given)
        tb.record(shapes)(lambda: rule(*given))()
    assert only(shapes)[1] == Count(3)


def test_a_packed_call_has_its_sequences_and_its_total(shapes: Path) -> None:
    given = inputs(30)
    with torch.no_grad(), tb.record(shapes):
        tb.get_op("gated_delta_rule")(*given, cu_seqlens=torch.tensor([0, 4, 30], dtype=torch.int32))
    problem, _ = only(shapes)
    assert dict(problem.sizes) == {"B": 1, "T": 30, "N": 2, "G": H, "H": H}
    assert (problem.bucket.seq_len, dict(problem.bucket.when)["packed"]) == (15, True)


def test_calls_without_tokens_and_calls_that_raise_are_no_problem(shapes: Path, plugin_backend: Callable[..., list[str]]) -> None:
    def fails(call: object, candidate: object) -> None:
        raise RuntimeError("out of luck")

    plugin_backend("unlucky", run=fails)
    rule = tb.get_op("gated_delta_rule")
    with torch.no_grad(), tb.record(shapes):
        rule(*inputs(0), backend="eager")
        with pytest.raises(RuntimeError, match="out of luck"):
            rule(*inputs())
        with pytest.raises(ValueError, match="beta has T = 1"):
            rule(*inputs()[:3], torch.zeros(1, 1, 1))
    assert found(shapes) == {}


def test_what_was_met_before_an_exception_is_written(shapes: Path) -> None:
    def unlucky() -> None:
        with torch.no_grad(), tb.record(shapes):
            tb.get_op("gated_delta_rule")(*inputs())
            raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"):
        unlucky()
    assert only(shapes)[1] == Count(1, 0)


def test_a_cleared_memo_and_more_signatures_than_are_kept_lose_no_count(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_MOST_SIGNATURES", 2)
    rule = tb.get_op("gated_delta_rule")
    with torch.no_grad(), tb.record(shapes):
        for _ in range(2):
            for length in (3, 4, 5, 6):
                rule(*inputs(length))
            tb.reset()
    assert {problem.bucket.seq_len: count.forward for problem, count in found(shapes).items()} == {3: 2, 4: 2, 5: 2, 6: 2}


def test_recordings_that_end_at_the_same_time_add_up_in_one_file(shapes: Path) -> None:
    signature = signature_of_bucket(plan("cpu", ops=["fused_uw"], seq_lens=[64])[0])
    one = recording.Recording(shapes)
    one.count(signature, backward=False)
    threads = [threading.Thread(target=recording._add, args=(one,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert only(shapes)[1] == Count(8, 0)


def test_what_names_no_file_is_refused_at_once_with_what_is_wanted() -> None:
    for wrong, said in (
        (None, r"got None \(NoneType\)"),
        (3, r"got 3 \(int\)"),
        (b"x.yaml", r"got b'x.yaml' \(bytes\)"),
        (recording.read, "got the function read"),
    ):
        with pytest.raises(TypeError, match=rf'record: it wants the file to write, as a str or a path, {said}; type: with .*record\("shapes.yaml"\)'):
            tb.record(wrong)  # type: ignore[arg-type]
    for wrong in ("", "a\0b"):
        with pytest.raises(ValueError, match=r"record: it wants the file to write, got '.*', which names none; type: with"):
            tb.record(wrong)


def test_a_file_that_cannot_be_written_or_is_none_of_ours_is_said_before_anything_runs(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with (
            pytest.raises(CacheError, match=r"record: .* is read-only\. To write another file: titans_backends\.record"),
            tb.record(tmp_path / "x.yaml"),
        ):
            pytest.fail("it ran")
    finally:
        tmp_path.chmod(0o700)
    other = tmp_path / "other.yaml"
    other.write_text("schema: 1\nproblems:\n  - {op: nothing, forward: 1}\n")
    with pytest.raises(SchemaError, match=r"other\.yaml:3: device, seq_len, when, sizes missing"), tb.record(other):
        pytest.fail("it ran")
    assert other.read_text().endswith("forward: 1}\n")


LINE = "{op: gated_delta_rule, device: cpu, seq_len: 8, when: {dtype: float32, head_dim: [16, 16], streams: 2}, sizes: {B: 1, T: 8, N: 1, G: 2, H: 2}, forward: 1}"


@pytest.mark.parametrize(
    ("was", "becomes", "said"),
    [
        ("gated_delta_rule", "gated_rule", r":3: unknown op 'gated_rule'"),
        ("float32", "int8", r":3: expected one of bfloat16, float16, float32, float64, found 'int8'"),
        ("forward: 1", "forward: 0", r":3: it ran neither forward nor backward"),
        ("forward: 1", "forward: -1", r":3: expected a whole number of at least 0, found '-1'"),
        ("forward: 1", "times: 1", r":3: unknown field 'times'; known here: backward, batch_invariant"),
        ("[16, 16]", "16", r":3: head_dim must be two sizes, \[K, V\], found '16'"),
        ("streams: 2", "streams: 3", r":3: these sizes make streams 2, but it says streams 3"),
        ("seq_len: 8", "seq_len: 9", r":3: these sizes make seq_len 8, but it says seq_len 9"),
        ("streams: 2", "streams: 2, group: 2", r":3: these sizes make group 1, but it says group 2"),
        ("B: 1, T: 8, N: 1, G: 2, H: 2", "B: 2, T: 8, N: 1, G: 2, H: 2", r":3: N = 1 sequences in B = 2 rows are packed"),
        ("streams: 2", "streams: 2, regime: sleeping", r":3: expected one of inference, training"),
        ("streams: 2", "streams: 2, packed: 2", r":3: expected true or false, found '2'"),
        ("streams: 2", "streams: 2, bogus: 2", r":3: unknown field 'bogus'"),
        ("H: 2}", "H: 2, K: 4}", r":3: unknown field 'K'; known here: B, G, H, N, T"),
        ("forward: 1}", "forward: 1}\n  - " + LINE, r":4: this problem stands here twice, first in line 3"),
        (LINE, "text", r":3: expected a mapping, found 'text'"),
    ],
)
def test_a_bad_line_is_named_with_what_would_do(was: str, becomes: str, said: str) -> None:
    with pytest.raises(SchemaError, match=r"shapes\.yaml" + said):
        parse_problems(f"schema: 1\nproblems:\n  - {LINE.replace(was, becomes)}\n", "shapes.yaml", defaults_of)


def test_every_op_and_key_survives_the_file() -> None:
    buckets = [*plan("cuda", quick=True), *plan("cuda", quick=False), *plan("cpu", ops=list(CONTRACTS), regimes=["inference", "training"])]
    problems = {recording.problem_of(signature_of_bucket(bucket)): Count(number + 1, number % 3) for number, bucket in enumerate(buckets[::7])}
    assert None not in problems
    kept = {problem: count for problem, count in problems.items() if problem is not None}
    text = dump_problems(kept, defaults_of)
    again = {met.problem: met.count for met in parse_problems(text, "x", defaults_of)}
    assert again == kept
    assert dump_problems(again, defaults_of) == text
    assert all(problem.bucket in buckets for problem in kept)
