"""Facts about the device that a call runs on, gathered once at the edge and passed in.

Nothing here decides anything: decisions take a `Machine`, so that tests can cover machines that nobody owns.
"""

from __future__ import annotations

import functools
import platform
from dataclasses import dataclass

import torch

from titans_backends.device_names import slug_of, slugify

__all__ = ["Machine", "detect"]


@dataclass(frozen=True, slots=True)
class Machine:
    """One device.

    `kind` is torch's device type; `sm` the compute capability as one number (90), `sms` the number of
    multiprocessors, `threads` torch's intra-op threads, `isa` the widest vector instructions that torch uses.
    """

    kind: str
    name: str
    slug: str
    sm: int | None = None
    sms: int | None = None
    shared_memory_bytes: int | None = None
    threads: int | None = None
    isa: str | None = None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module knows less, but something
    return platform.processor() or platform.machine() or "cpu"


@functools.lru_cache(maxsize=64)
def _cpu(threads: int) -> Machine:
    name, isa = _cpu_name(), torch.backends.cpu.get_cpu_capability()
    return Machine(kind="cpu", name=name, slug=slugify(f"cpu {name} {isa} {threads} threads"), threads=threads, isa=isa)


@functools.lru_cache(maxsize=64)
def _cuda(index: int) -> Machine:
    facts = torch.cuda.get_device_properties(index)
    return Machine(
        kind="cuda",
        name=facts.name,
        slug=slug_of(facts.name),
        sm=facts.major * 10 + facts.minor,
        sms=facts.multi_processor_count,
        shared_memory_bytes=getattr(facts, "shared_memory_per_block_optin", None),
    )


def detect(device: torch.device | str = "cpu") -> Machine:
    """The machine behind a torch device; a device type without an entry of its own gets its name only."""
    device = torch.device(device)
    if device.type == "cpu":
        return _cpu(torch.get_num_threads())
    if device.type == "cuda":
        return _cuda(torch.cuda.current_device() if device.index is None else device.index)
    return Machine(kind=device.type, name=device.type, slug=slugify(device.type))
