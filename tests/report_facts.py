"""Facts of a made-up machine for the tests of the report: a few buckets with round numbers, one of each kind that the page tells apart."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache.schema import Device, Entry, Environment, WhenValue, canonical_when
from titans_backends.cache.timings import Measurement
from titans_backends.contracts.contract import Work
from titans_backends.reporting.facts import Ceilings, Facts, FileFacts, MachineFacts, Measured, RaceFacts, Refusal, State
from titans_backends.reporting.race_file import Chosen, Entrant, Part, Picked, Race

__all__ = ["CEILINGS", "ENVIRONMENT", "GPU", "bucket", "cell", "facts", "machine", "race", "timed"]

GPU = Device("cuda", "made_up_gpu", "Made-up GPU", sm=90, sms=10)
ENVIRONMENT = Environment("0.1", "2.11.0", triton="3.6.0", date="2026-01-01")
CEILINGS = Ceilings({"copy": 1e12, "bf16": 1e14, "tf32": 6e13, "fp32": 1e13}, ("made up",))


def bucket(seq_len: int, op: str = "gated_delta_rule", **given: WhenValue) -> Bucket:
    """A bucket of 4 streams of 16."""
    values: dict[str, WhenValue] = {"dtype": "bfloat16", "head_dim": (16, 16), "streams": 4, **given}
    return Bucket(op, canonical_when(values, defaults_of(op)), seq_len)


def timed(
    name: str, us: float | None, direction: Literal["forward", "backward"] = "forward", *, saves: bool = False, samples: int = 9, **params: int
) -> Measurement:
    """A measurement that passed with a spread of 10 %; without a time, one that failed."""
    given = Measurement(name, tuple(params.items()), direction, saves, env="a", source=f"hash of {name}")
    if us is None:
        return replace(given, status="failed", reason="o is wrong by 3.0e-01, at most 1.0e-02", errors=(("o", 0.3),))
    return replace(given, us=us, spread=0.1, samples=samples, peak_mib=2.0, errors=(("o", 1e-3), ("final_state", 2e-3)))


def cell(seq_len: int = 512, **changes: object) -> Measured:
    """triton at 10 µs, the tuned choice; its default at 20, cupy at 30, eager at 100, a candidate that fails; a floor of 5 µs from bytes."""
    measurements = (
        timed("triton/scan", 10.0, block=32), timed("triton/scan", 20.0, block=64), timed("cupy/walk", 30.0), timed("eager/plain", 100.0, samples=1),
        timed("cupy/bad", None), Measurement("reference/contract", us=9000.0, samples=1, env="a"),
    )  # fmt: skip
    entry = Entry("triton/scan", 10.0, 0.1, 2.0, (("block", 32),), next="cupy/walk", next_us=30.0, env="a", source="hash of triton/scan")
    base = Measured(
        bucket(seq_len), "shipped", entry, ENVIRONMENT, measurements, State("fresh"), default=(timed("triton/scan", 20.0, block=64).identity,),
        work=Work(flop=1e8, bytes=5e6), refusals=(Refusal("inductor", "it does not implement this op"),), renew="titans-backends tune --seq-lens 512 --op x",
    )  # fmt: skip
    return replace(base, **changes)  # type: ignore[arg-type]


def machine(*cells: Measured, ceilings: Ceilings | None = CEILINGS) -> MachineFacts:
    """The made-up machine with some cells."""
    return MachineFacts(GPU, False, cells, (FileFacts("shipped", "autotune_cache/made_up_gpu.yaml", "5 rows"),), (ENVIRONMENT,), ceilings, repeated=1)


def training(seq_len: int = 512) -> Measured:
    """A pair of two backends: cupy's forward and triton's backward."""
    measurements = (
        timed("cupy/walk", 10.0), timed("triton/scan", 20.0), timed("triton/scan", 15.0, saves=True),
        timed("cupy/walk", 50.0, "backward"), timed("triton/again", 40.0, "backward"), timed("triton/kept", 30.0, "backward", saves=True),
    )  # fmt: skip
    entry = Entry("cupy/walk", 50.0, 0.1, 2.0, backward="triton/again", env="a", source="hash of cupy/walk+hash of triton/again")
    default = (timed("triton/scan", 20.0).identity, timed("triton/again", 40.0, "backward").identity)
    return cell(seq_len, bucket=bucket(seq_len, regime="training"), entry=entry, measurements=measurements, default=default)


def facts() -> Facts:
    """One machine with a curve, a training bucket, a stale row, an ignored one, one without timings, and a damaged file."""
    stale = State("stale", "measured with torch 2.10.0, now 2.11.0", "titans-backends tune --seq-lens 2048 --op gated_delta_rule")
    gone = State("ignored", "triton/scan is no longer there", "titans-backends tune --seq-lens 8192 --op gated_delta_rule")
    bare = cell(8192, measurements=(), default=None, default_reason="its timings are not kept here", state=gone)
    mine = machine(cell(), cell(2048, state=stale), bare, training(), cell(1, bucket=bucket(1, "gated_delta_step")))
    raced = (RaceFacts("benchmarks/results/race.json", race()),)
    return Facts((mine,), "2026-01-02", "0.1", (FileFacts("user", "~/x.yaml", "", f"~/{'long_name_' * 9}/x.yaml:3: <b>not</b> a table"),), raced)


def entrant(label: str, us: float, kind: Literal["backend", "own", "other"] = "backend") -> Entrant:
    """Eagerly it takes twice as long as in a graph; its name begins with whose it is."""
    who = "+".join(dict.fromkeys(one.partition("/")[0] for one in label.partition(",")[0].split(" + ")))
    return Entrant(label, who, kind, us, 0.01, 2 * us, 0.02, pick_us=2 * us, pick_spread=0.0, errors={"o": 2e-3})


def race() -> Race:
    """Three cases. 16/32 at 512 forward: Triton 300, CuPy 280; FlashInfer, where all take half as long, 110, its own function 100. At 2048 twice of all that.

    Eight sequences, trained: a pair of CuPy's forward and Triton's backward 90, Triton 100, eager 4000; FlashQLA fails.
    """

    def forward(factor: float) -> dict[str, Part]:
        first = (entrant("triton/scan", 300 * factor), entrant("cupy/walk", 280 * factor), entrant("fla_ungated, own call", 9.0, "other"))
        later = (
            entrant("triton/scan", 150 * factor),
            entrant("flashinfer/prefill", 110 * factor),
            entrant("flashinfer, own call", 100 * factor, "own"),
        )
        chosen = {way: Chosen("cupy/walk", "tuned", "a row") for way in ("graph", "wall")}
        refused = {"flashinfer": "not installed", "numba_cpu": "it does not run on cuda"}
        return {
            "fla": Part(first, _picked(first), chosen, refused, "triton/scan", floor_us=70 * factor),
            "flashinfer": Part(later, _picked(later)),
        }

    trained = (entrant("triton/scan + triton/again", 100.0), entrant("cupy/walk + triton/again", 90.0), entrant("eager/plain + eager/plain", 4000.0))
    failed = Entrant("flash_qla/chunked + flash_qla/chunked", "flash_qla", failed="wrong: dg is off by 0.2")
    whole = Part((*trained, failed), _picked(trained), {}, {}, "triton/scan + triton/again", floor_us=30.0)
    facts: dict[str, object] = {"device": "Made-up GPU", "date": "2026-01-01", "torch": "2.11.0", "versions": {"triton": "3.6.0"}}
    cases = {"1x512 16/32 D128 forward": forward(1.0), "1x2048 16/32 D128 forward": forward(2.0), "8x1024 2/8 D128 training": {"fla": whole}}
    return Race({"fla": facts, "flashinfer": facts}, cases)


def _picked(entrants: tuple[Entrant, ...]) -> tuple[Picked, ...]:
    return tuple(Picked(one.label, one.who, one.graph_us or 0.0, 0.001, 3, index) for index, one in enumerate(entrants) if one.kind == "backend")
