"""The token rule by its reference, with a hook that raises, dies or hangs where a variant's name says so. Running it is always right."""

from __future__ import annotations

import json
import os
import time
import uuid
from pathlib import Path

from titans_backends import ACCEPTED, Candidate
from titans_backends.contracts import contract

CONTRACT = contract("gated_delta_rule")
VARIANTS = os.environ["FORESIGHT_VARIANTS"].split(",")


def supports(signature, machine):
    return ACCEPTED


def candidates(signature, machine):
    return [Candidate("foresight", name) for name in VARIANTS]


def backward_candidates(signature, machine):
    return [Candidate("foresight", name, direction="backward") for name in VARIANTS]


def run(call, candidate):
    return tuple(None if o is None else o.contiguous().clone() for o in CONTRACT.reference(call))


def run_backward(call, grads, states, needs, candidate):
    raise NotImplementedError


if "blind" not in VARIANTS:

    def compile_ahead(call, candidate, machine):
        mark = {
            "variant": candidate.variant,
            "direction": candidate.direction,
            "batch": call.q.shape[0],
            "tokens": call.q.shape[1],
            "device": call.q.device.type,
            "contiguous": call.q.is_contiguous(),
            "pid": os.getpid(),
            "gpus": os.environ.get("CUDA_VISIBLE_DEVICES"),
            "threads": os.environ.get("OMP_NUM_THREADS"),
            "machine": machine.name,
        }
        path = Path(os.environ["FORESIGHT_MARKS"]) / uuid.uuid4().hex
        path.with_suffix(".part").write_text(json.dumps(mark))
        path.with_suffix(".part").rename(path.with_suffix(".json"))
        if candidate.variant == "raises":
            raise ValueError("no such instruction\nsecond line")
        if candidate.variant == "dies":
            os._exit(3)
        if candidate.variant == "hangs":
            time.sleep(3600)
