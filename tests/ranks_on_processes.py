"""A script for test_tuning_ranks: scenes of a job on gloo processes, each rank with a cache of its own; prints what every rank saw, as JSON.

Forks after its imports, so that they are paid for once. What is measured is made up: what is tested is who receives what.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

import titans_backends as tb
from titans_backends import machine as machines
from titans_backends import tables
from titans_backends.buckets import Bucket, defaults_of
from titans_backends.cache import file
from titans_backends.cache.paths import user_cache_path
from titans_backends.cache.schema import Entry, device_of
from titans_backends.dispatch import pair_source
from titans_backends.errors import RanksError
from titans_backends.machine import detect
from titans_backends.offers import offers, pairs
from titans_backends.tuning import meeting, ranks, run
from titans_backends.tuning.events import BucketDone, Planned
from titans_backends.tuning.plan import plan
from titans_backends.tuning.problem import signature_of_bucket

BUCKETS = plan("cpu", ops=["fused_uw"], seq_lens=[64], heads=[(1, 1)], head_dims=[(16, 16)], dtypes=["float32"], regimes=["inference"])
PATIENCE = meeting.Patience(join_s=3.0, dead_s=1.5, beat_s=0.1)
Scene = Callable[[int], object]


def put(bucket: Bucket, place: int) -> str:
    """A row for the bucket that names one of its candidates, in this rank's cache; its label."""
    machine, signature = detect("cpu"), signature_of_bucket(bucket)
    pair = pairs(offers(signature, machine, ["eager"]), signature)[place]
    entry = Entry(pair.forward.name, 1.0 + place, 0.01, 1.0, params=pair.forward.params, source=pair_source(pair, bucket.op))
    environment = tables.current_environment("cpu")
    file.update(user_cache_path(machine.slug), device=device_of(machine), environment=environment, changes={bucket: entry}, defaults_of=defaults_of)
    tb.reset()
    return pair.forward.label


def made_up(request: run.TuneRequest, on_event: Callable[[object], None] = lambda event: None) -> run.TuneReport:
    """Takes a moment, tells an event now and then, and writes each bucket's second candidate."""
    for _ in range(20):
        time.sleep(0.02)
        on_event(Planned(1, 1))
    for bucket in request.buckets:
        put(bucket, 1)
        on_event(BucketDone(bucket, Entry("eager/joined", 2.0, 0.01, 1.0), 1.0, 1.0, 0.4))
    return run.TuneReport(user_cache_path(detect("cpu").slug), (), (), 0.4)


def chosen() -> str:
    """What a call of the bucket runs on this rank."""
    return tb.get_op("fused_uw").explain(*given()).kernel


def given() -> tuple[torch.Tensor, ...]:
    return torch.eye(64)[None, None, None], torch.ones(1, 1, 1, 64, 16), torch.ones(1, 1, 1, 64, 16)


def called() -> None:
    with torch.no_grad(), tb.autotune(budget_s=1.0):
        tb.get_op("fused_uw")(*given())


def tuned() -> object:
    return ranks.tune(run.TuneRequest(BUCKETS), patience=PATIENCE)


# --- scenes: what a rank does, and says


def shares(rank: int) -> object:
    """Ranks whose caches name different candidates take rank 0's."""
    own = put(BUCKETS[0], 0 if rank == 0 else 1)
    before = chosen()
    ranks.share(patience=PATIENCE)
    after = chosen()
    tb.reset()
    return own, before, after, chosen()


def tunes(rank: int) -> object:
    run.tune = made_up
    put(BUCKETS[0], 0)
    report = tuned()
    return report is not None, chosen()


def autotunes(rank: int) -> object:
    """Only rank 1 has a row, which does not count in a job: rank 0 tunes, once."""
    tuned_here = []

    def made_up_call(contract: object, call: object, signature: object, budget_s: float, on_event: object) -> None:
        tuned_here.append(put(BUCKETS[0], 1))

    run.tune_call = made_up_call  # type: ignore[assignment]
    if rank == 1:
        put(BUCKETS[0], 0)
    called()
    called()
    assert len(tuned_here) == (rank == 0)
    answered = tb.get_op("fused_uw").explain(*given()).as_dict()
    return answered["kernel"], answered["origin"], answered["reason"]


def keeps(rank: int) -> object:
    run.tune = made_up
    ranks.tune(run.TuneRequest(BUCKETS), patience=PATIENCE, keep=True)
    tb.reset()
    return chosen()


def dies(who: int) -> Scene:
    def scene(rank: int) -> object:
        run.tune = made_up
        if rank == who:
            beat = meeting.Meeting._silent

            def last(self: meeting.Meeting, watched: object, seen: dict[int, tuple[str, float]]) -> list[int]:
                os.kill(os.getpid(), signal.SIGKILL)
                return beat(self, watched, seen)  # type: ignore[arg-type]

            meeting.Meeting._silent = last  # type: ignore[method-assign]
        return tuned()

    return scene


def stays_away(rank: int) -> object:
    run.tune = made_up
    if rank == 1:
        time.sleep(PATIENCE.join_s + 1)
        return "stayed away"
    return tuned()


def differs(rank: int) -> object:
    run.tune = made_up
    if rank == 1:
        real = machines.detect("cpu")
        ranks.detect = lambda device: replace(real, name="NVIDIA A100", slug="nvidia_a100")
        tables.current_environment("cpu")
        version = replace(tables.current_environment("cpu"), torch="2.0.0")
        tables.current_environment = lambda kind: version  # type: ignore[assignment]
    return tuned()


def dies_after_the_tune(rank: int) -> object:
    """Rank 1 is gone when choices are compared."""
    run.tune = made_up

    def last(*_: object) -> str:
        os.kill(os.getpid(), signal.SIGKILL)
        return ""

    if rank == 1:
        meeting.Meeting.heard = last  # type: ignore[method-assign]
    return tuned()


def fails(rank: int) -> object:
    def broken(request: object, on_event: object) -> object:
        raise OSError("no space left on device")

    run.tune = broken  # type: ignore[assignment]
    return tuned()


def asks_otherwise(rank: int) -> object:
    run.tune = made_up
    buckets = BUCKETS if rank == 0 else plan("cpu", ops=["fused_uw"], seq_lens=[64, 128], heads=[(1, 1)], head_dims=[(16, 16)], dtypes=["float32"])
    return ranks.tune(run.TuneRequest(buckets), patience=PATIENCE)


def changed_code(rank: int) -> object:
    """A rank whose backends are of other code than rank 0's says so, although all versions agree."""
    run.tune = made_up
    if rank == 1:
        ranks.consult = lambda source, bucket, available, kind: real_consult(source, bucket, [], kind)
    return tuned()


def never_meets(rank: int) -> object:
    """A call that rank 0 never makes."""
    ranks.Patience = lambda join_s=1.0: meeting.Patience(1.0, 1.0, 0.1)  # type: ignore[assignment, misc]
    if rank == 0:
        ranks.first_share("cpu")
        return "shared"
    called()
    return "called"


def dies_in_a_call(seconds: float) -> Scene:
    """Rank 1 comes to the call that rank 0 tunes for so many seconds, and is killed there."""

    def made_up_call(contract: object, call: object, signature: object, budget_s: float, on_event: Callable[[object], None]) -> None:
        while not (Path(os.environ["XDG_CACHE_HOME"]).parent / "1 came").exists():
            time.sleep(0.02)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(0.05)
            on_event(Planned(1, 1))
        put(BUCKETS[0], 1)

    def scene(rank: int) -> object:
        ranks.Patience = lambda join_s=20.0: replace(PATIENCE, join_s=20.0)  # type: ignore[assignment, misc]
        ranks.first_share("cpu")
        run.tune_call = made_up_call  # type: ignore[assignment]
        if rank == 1:

            def last(*_: object) -> str:
                (Path(os.environ["XDG_CACHE_HOME"]).parent / "1 came").touch()
                os.kill(os.getpid(), signal.SIGKILL)
                return ""

            meeting.Meeting.heard = last  # type: ignore[method-assign]
        called()
        return "called"

    return scene


def never_comes(rank: int) -> object:
    """Rank 0 tunes a call that the other never makes."""
    run.tune_call = lambda *_: None  # type: ignore[assignment, return-value]
    ranks.first_share("cpu")
    if rank == 0:
        called()
    return "called"


def ended_before(rank: int) -> object:
    """Rank 1 is gone before the first call of either."""
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    ranks.share(patience=PATIENCE)
    return "shared"


real_consult = ranks.consult
SCENES: dict[str, tuple[int, str, Scene]] = {
    "shares": (4, "file", shares),
    "tunes": (2, "tcp", tunes),
    "autotunes": (2, "tcp", autotunes),
    "keeps": (2, "file", keeps),
    "rank 1 of 2 dies": (2, "tcp", dies(1)),
    "rank 2 of 4 dies": (4, "file", dies(2)),
    "rank 0 dies, the store lives": (4, "file", dies(0)),
    "rank 0 dies with the store": (2, "tcp", dies(0)),
    "stays away": (2, "tcp", stays_away),
    "differs": (4, "file", differs),
    "fails": (2, "file", fails),
    "asks otherwise": (2, "file", asks_otherwise),
    "changed code": (2, "file", changed_code),
    "never meets": (2, "file", never_meets),
    "rank 1 dies in a call": (2, "tcp", dies_in_a_call(20.0)),
    "rank 1 dies in a short call": (2, "file", dies_in_a_call(0.1)),
    "never comes": (2, "file", never_comes),
    "ended before": (2, "tcp", ended_before),
    "dies after the tune": (2, "file", dies_after_the_tune),
}


def play(size: int, store: str, scene: Scene) -> dict[str, object]:
    """What each rank said, and the seconds that it took; nothing from one that was killed."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        method = f"file://{folder}/meeting" if store == "file" else f"tcp://127.0.0.1:{free.getsockname()[1]}"
        free.close()
        children = []
        for rank in range(size):
            child = os.fork()
            if child == 0:
                act(rank, size, method, folder, scene)
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return {path.stem: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}


def act(rank: int, size: int, method: str, folder: str, scene: Scene) -> None:
    signal.alarm(60)  # nobody hangs
    os.environ["XDG_CACHE_HOME"] = f"{folder}/{rank}"
    torch.set_num_threads(1)
    tb.reset()
    dist.init_process_group("gloo", init_method=method, rank=rank, world_size=size)
    begun = time.monotonic()
    try:
        said: object = scene(rank)
    except RanksError as error:
        said = f"RanksError: {error}"
    except OSError as error:
        said = f"OSError: {error}"
    Path(folder, f"{rank}.json").write_text(json.dumps([said, time.monotonic() - begun], default=str))


def side_by_side(names: list[str]) -> dict[str, object]:
    """Scenes that mostly wait, at the same time."""
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for number, name in enumerate(names):
            child = os.fork()
            if child == 0:
                Path(folder, str(number)).write_text(json.dumps(play(*SCENES[name])))
                os._exit(0)
            children.append(child)
        for child in children:
            os.waitpid(child, 0)
        return {name: json.loads(Path(folder, str(number)).read_text()) for number, name in enumerate(names)}


if __name__ == "__main__":
    os.environ["TITANS_BACKENDS_DISABLE"] = "numba_cpu,inductor"
    tb.reset()
    chosen()  # imports, before the forks
    asked = sys.argv[1:] or list(SCENES)
    print(json.dumps({name: found for start in range(0, len(asked), 7) for name, found in side_by_side(asked[start : start + 7]).items()}))
