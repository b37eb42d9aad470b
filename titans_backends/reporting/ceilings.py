"""The ceilings of a machine as benchmark results hold them: the best rate of each kind that any file saw on a device of that name."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from titans_backends.reporting.facts import Ceilings

__all__ = ["KINDS", "ceilings_in"]

KINDS = ("copy", "bf16", "tf32", "fp32")
"""Bytes per second of a copy, read and written; FLOP per second of a square product in bfloat16, TF32 and float32."""


def ceilings_in(folder: Path) -> dict[str, Ceilings]:
    """Ceilings by device name, from every `*.json` of a folder that has `device` and `ceilings`; other files are none of its business."""
    best: dict[str, dict[str, float]] = {}
    sources: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*.json")):
        device, found = _read(path)
        if not found:
            continue
        known = best.setdefault(device, {})
        known.update({kind: max(rate, known.get(kind, 0.0)) for kind, rate in found.items()})
        sources.setdefault(device, []).append(path.name)
    return {device: Ceilings(rates, tuple(sources[device])) for device, rates in best.items()}


def _read(path: Path) -> tuple[str, dict[str, float]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):  # another program's file, or half of one
        return "", {}
    if not isinstance(content, Mapping) or not isinstance(content.get("device"), str) or not isinstance(content.get("ceilings"), Mapping):
        return "", {}
    rates = {kind: content["ceilings"].get(kind) for kind in KINDS}
    return content["device"], {
        kind: float(rate) for kind, rate in rates.items() if isinstance(rate, (int, float)) and math.isfinite(rate) and rate > 0
    }
