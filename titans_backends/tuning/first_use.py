"""A fresh process's first call of a bucket, timed: what a table that is there costs a user before the first result. Started by `assess`, never by a person."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from titans_backends.buckets import Bucket

__all__ = ["TIMEOUT_S", "FirstUse", "first_use", "main"]

TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class FirstUse:
    """Seconds of `import titans_backends` and the first call together, after torch and the device are up, and of the second call; `origin`: who chose.

    `shipped`: the process had the tables that ship with the library and no others.
    """

    bucket: Bucket
    first_s: float
    second_s: float
    origin: str
    shipped: bool = False


def first_use(bucket: Bucket, device: str, heads: int | None, table: Path | None, most_s: float = TIMEOUT_S) -> FirstUse | str:
    """The first use of a bucket whose row is in a table, or in a shipped one (None); a sentence where it failed or took over `most_s`."""
    from titans_backends.tuning import wire

    asked = json.dumps({"bucket": wire.bucket_to(bucket), "device": device, "heads": heads})
    path = os.pathsep.join(os.path.abspath(entry) for entry in sys.path)
    environment = {name: value for name, value in os.environ.items() if name != "TITANS_BACKENDS_CACHE"}
    with tempfile.TemporaryDirectory() as empty:
        own = {"XDG_CACHE_HOME": empty} if table is None else {"TITANS_BACKENDS_CACHE": str(table)}
        command, given = [sys.executable, "-c", _START, asked], {**environment, **own, "PYTHONPATH": path}
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=most_s, check=False, env=given)
        except subprocess.TimeoutExpired:
            return f"it took over {most_s:.0f} s"
    if done.returncode:
        return (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1][:300]
    told = json.loads(done.stdout.splitlines()[-1])
    return FirstUse(bucket, told["first_s"], told["second_s"], told["origin"], table is None)


_START = """
import json, sys, time
import torch
asked = json.loads(sys.argv[1])
torch.zeros(8, device=asked["device"]) @ torch.zeros(8, device=asked["device"])
start = time.perf_counter()
import titans_backends
imported = time.perf_counter() - start
from titans_backends.tuning.first_use import main
main(asked, imported)
"""


def main(asked: dict[str, object], imported_s: float) -> None:
    """Prints the answer; the inputs are made beforehand."""
    import torch

    import titans_backends as tb
    from titans_backends.buckets import field
    from titans_backends.contracts import contract
    from titans_backends.contracts.case import build
    from titans_backends.tuning import wire
    from titans_backends.tuning.problem import case_of

    bucket, device, heads = wire.bucket_from(asked["bucket"]), str(asked["device"]), asked["heads"]
    training, made = field(bucket, "regime") == "training", contract(bucket.op)
    torch.set_float32_matmul_precision(str(field(bucket, "float32")))
    call = build(made, case_of(bucket, heads if isinstance(heads, int) else None), device, requires_grad=training)
    given: dict[str, Any] = dict(zip(made.parameters, made.values(call), strict=True))
    op = tb.get_op(bucket.op)
    launch = "graph" if field(bucket, "launch") == "graph" else None

    def once() -> float:
        start = time.perf_counter()
        with torch.set_grad_enabled(training), tb.policy(launch=launch):  # type: ignore[arg-type]  # one of the two words
            outputs = op(**given)
            if training:
                torch.autograd.backward([o for o in outputs if o is not None], [torch.ones_like(o) for o in outputs if o is not None])
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first, second = once(), once()
    with torch.set_grad_enabled(training), tb.policy(launch=launch):  # type: ignore[arg-type]  # as above
        origin = op.explain(**given).as_dict()["origin"]
    sys.stdout.write(json.dumps({"first_s": imported_s + first, "second_s": second, "origin": origin}) + "\n")
