"""The child process: reads one request a line, answers with one line, and does nothing else. Started by `host`, never by a person.

It dies with its parent, is the first to go when memory runs out, and writes to the two given file descriptors only: what a kernel prints
goes where its standard output goes.
"""

from __future__ import annotations

import contextlib
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast

from titans_backends.tuning.tether import tether

__all__ = ["main", "serve"]

_LEAST_LIMIT = 1 << 30


def _limit_memory(kind: str) -> None:
    """Exhausted memory ends in an error here before it reaches anybody else."""
    if kind != "cpu":
        return  # a CUDA context reserves more than there is
    with contextlib.suppress(OSError, ValueError):
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        available = next(int(line.split()[1]) << 10 for line in text.splitlines() if line.startswith("MemAvailable:"))
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        wanted = max(_LEAST_LIMIT, available * 9 // 10)
        resource.setrlimit(resource.RLIMIT_DATA, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard))


def serve(read: Callable[[], bytes], write: Callable[[bytes], object], device: str) -> None:
    """Answers requests until there are no more. An exception of a candidate is an answer; one of ours too, as an `error`."""
    from titans_backends import registry
    from titans_backends.machine import detect
    from titans_backends.tuning import wire
    from titans_backends.tuning.session import Session

    session: Session | None = None
    write(wire.dump({"ready": os.getpid()}))
    while line := read():
        request = wire.load(line)
        kind, answer = request["do"], dict[str, object]()
        try:
            if kind == "probe":
                status = registry.probe(registry.get(str(request["backend"])), detect(device))
                answer = {"state": status.state, "reason": str(status.verdict) if not status.verdict else ""}
            elif kind == "open":
                if session is not None:
                    session.close()
                heads, references = cast("int | None", request["heads"]), bool(request.get("references", True))
                session = Session(wire.bucket_from(request["bucket"]), device, heads, references=references)
            elif session is None:
                raise RuntimeError(f"{kind} before open")
            elif kind == "reference":
                answer = {"us": session.reference(float(cast(float, request["most_s"])))}
            else:
                candidate = wire.candidate_from(request["candidate"])
                states_from = None if request["states_from"] is None else wire.candidate_from(request["states_from"])
                if kind == "sample":
                    answer = {"us": session.sample(candidate, states_from)}
                else:
                    checked = session.check(candidate, states_from)
                    answer = {
                        "reason": checked.result.reason,
                        "errors": checked.result.errors,
                        "skipped": checked.result.skipped,
                        "peak_mib": checked.peak_mib,
                        "compile_s": checked.compile_s,
                    }
        except Exception as error:  # the parent decides what it means
            answer = {"error": f"{type(error).__name__}: {str(error).strip()[:300]}"}
        write(wire.dump(answer))


def main() -> None:
    """`worker REQUESTS ANSWERS PARENT DEVICE THREADS`: two inherited descriptors, the parent's id, the device, torch's threads."""
    requests, answers, parent, device, threads = sys.argv[1:]
    tether(int(parent))
    _limit_memory(device.split(":")[0])
    import torch

    torch.set_num_threads(int(threads))
    if torch.device(device).index is not None:
        torch.cuda.set_device(torch.device(device))
    with open(int(requests), "rb") as source, open(int(answers), "wb", buffering=0) as sink:
        serve(source.readline, sink.write, device)


if __name__ == "__main__":
    main()
