"""What benchmarks/fla_check.py found: a line for each check and time, kept for its JSON. Measures nothing itself."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from torch import Tensor

__all__ = ["Found", "error"]

Figure = int | float | str


@dataclass(slots=True)
class Found:
    """Checks and times so far, and the seconds that remain. OK and BAD are checks; LEFT is what was not reached, or what the other side cannot do."""

    device: torch.device
    seconds: float
    only: Sequence[str] = ("*",)
    started: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Figure]] = field(default_factory=list)
    times: list[dict[str, object]] = field(default_factory=list)

    @property
    def gpu(self) -> bool:
        """Whether the full sizes and FLA's own kernels run."""
        return self.device.type == "cuda"

    @property
    def passed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.started

    @property
    def left(self) -> float:
        """Seconds of the budget that remain."""
        return self.seconds - self.passed

    def wants(self, name: str) -> bool:
        """Whether this layer, model or case was asked for."""
        return any(fnmatchcase(name, pattern) for pattern in self.only)

    def say(self, right: bool | None, what: str, **figures: Figure) -> None:
        """One check: right, wrong, or (None) neither."""
        word = "LEFT" if right is None else "OK" if right else "BAD"
        print(word, what, " ".join(f"{k}={v:.2e}" if isinstance(v, float) else f"{k}={v}" for k, v in figures.items()), flush=True)
        self.checks.append({"result": word, "what": what, **figures})

    def attempt(self, what: str, function: Callable[..., object], *given: object) -> object:
        """What a part returns; one that raises is a line, not the end."""
        try:
            return function(*given)
        except Exception as failed:
            self.say(False, what, error=f"{type(failed).__name__}: {str(failed)[:200]}")
            traceback.print_exc(limit=-4)
            return None

    def count(self, result: str) -> int:
        """How many checks ended so."""
        return sum(check["result"] == result for check in self.checks)


def error(a: Tensor, b: Tensor) -> float:
    """Relative L2 distance of a from b."""
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).norm() / b.norm().clamp_min(1e-12))
