"""Which machine and which versions a file of results is of, as plain data: without them a figure says nothing."""

from __future__ import annotations

import os
import platform
from dataclasses import asdict

import torch

from titans_backends.machine import detect
from titans_backends.tables import current_environment

__all__ = ["fingerprint"]

Fact = str | int | float | None


def fingerprint(device: str) -> dict[str, dict[str, Fact]]:
    """The device's facts, the versions that rows are graded by, and the host's."""
    machine = detect(device)
    versions = {name: value for name, value in asdict(current_environment(machine.kind)).items() if value is not None}
    host: dict[str, Fact] = {"system": platform.platform(), "cores": os.cpu_count(), "torch_threads": torch.get_num_threads()}
    if machine.kind == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        host |= {"gpu_mib": total >> 20, "gpu_mib_free": free >> 20}
    return {"device": {name: value for name, value in asdict(machine).items() if value is not None}, "environment": versions, "host": host}
