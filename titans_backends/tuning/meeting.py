"""How the ranks of a job meet through their store: each gives signs of life, waits for what another says, and learns by name who is missing, dead or failed.

A thread per rank writes a count that grows; rank 0 watches everybody's, the others rank 0's, so that a store serves many ranks. Nothing here knows what is
said, and nobody waits for a rank that has died.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from titans_backends.errors import RanksError

if TYPE_CHECKING:
    from torch.distributed import Store  # type: ignore[attr-defined]  # torch exports it by `import *`

__all__ = ["Meeting", "Patience", "Ranks"]

Answer = TypeVar("Answer")
_POLL_S = 0.05
_GONE = "ended before, hanging, late, or on another way. Every rank must come to the same call"


@dataclass(frozen=True, slots=True)
class Ranks:
    """A job's processes as one of them sees them. `store` is shared by all; `steps` counts what was done on it, since every rank does the same in turn."""

    store: Store
    rank: int
    size: int
    steps: dict[str, int] = field(default_factory=dict)

    def step(self, name: str) -> str:
        """A name that no other step has, the same on every rank."""
        self.steps[name] = self.steps.get(name, 0) + 1
        return f"{name}/{self.steps[name]}"


@dataclass(frozen=True, slots=True)
class Patience:
    """In seconds: how long a rank may take to come, how long one that came may give no sign of life, and how often it gives one."""

    join_s: float = 60.0
    dead_s: float = 10.0
    beat_s: float = 0.5


@dataclass(slots=True, eq=False)
class Meeting:
    """One step that ranks take together, under a name that no other step of the store has; a context manager.

    `together`: rank 0 waits for the others too. Otherwise it speaks and goes, and the others hear it whenever they come; those that have come by then it
    sees off, so that one that died on the way is named. Who leaves by an exception has failed for everybody: RanksError there says whose it was.
    """

    ranks: Ranks
    name: str
    patience: Patience = field(default_factory=Patience)
    together: bool = True
    failure: str = ""
    _stop: threading.Event = field(default_factory=threading.Event)
    _pulse: threading.Thread | None = None

    def __enter__(self) -> Meeting:
        self._tell(f"beat/{self.ranks.rank}", "0")
        self._pulse = threading.Thread(target=self._beat, name=f"titans_backends {self.name}", daemon=True)
        self._pulse.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is not None and not self.failure:
                self.fail(f"rank {self.ranks.rank} left: {type(error).__name__}: {error}" if not isinstance(error, RanksError) else str(error))
            elif error is None:
                self._leave()
        finally:
            self._stop.set()
            if self._pulse is not None:
                self._pulse.join()

    def tell(self, key: str, text: str) -> None:
        """Says something to whoever waits for it; RanksError where somebody has failed."""
        self.check()
        self._tell(key, text)

    def heard(self, key: str, what: str) -> str:
        """What rank 0 says, waited for as long as it lives; RanksError where it does not come, dies or fails. `what`: that it was to come to."""
        if self._wait([key, "beat/0", "failed"], self.patience.join_s) == []:
            raise RanksError(f"rank 0 did not come to {what} within {self.patience.join_s:g} s: it has ended, hangs or goes another way")
        while key not in self._wait([key], 1.0):
            self.check()
        return self._get(key)

    def gather(self, key: str, text: str, what: str) -> tuple[str, ...]:
        """What every rank says, in their order; RanksError names those that do not come within the patience, on every rank that did."""
        self.tell(f"{key}/{self.ranks.rank}", text)
        keys = [f"{key}/{rank}" for rank in range(self.ranks.size)]
        deadline = time.monotonic() + self.patience.join_s
        missing = keys
        while missing := [one for one in missing if not self._has(one)]:
            self.check()
            if time.monotonic() > deadline:
                names = _named([int(one.rpartition("/")[2]) for one in missing])
                self.fail(f"{names} of {self.ranks.size} did not come to {what} within {self.patience.join_s:g} s: {_GONE}")
                self.check()
            time.sleep(_POLL_S)
        return tuple(self._get(one) for one in keys)

    def check(self) -> None:
        """RanksError where somebody has failed or died."""
        if not self.failure and self._has("failed"):
            self.failure = self._get("failed")
        if self.failure:
            raise RanksError(self.failure)

    def fail(self, reason: str) -> None:
        """Says to everybody why this cannot go on; the first reason stands."""
        self.failure = self.failure or reason
        if not self._has("failed"):
            self._tell("failed", self.failure)

    def _leave(self) -> None:
        """Rank 0 goes last: its process may keep the store. What another rank came for it has, so that it may find the store gone where nobody waits."""
        if self.ranks.rank:
            with contextlib.suppress(*(() if self.together else (RanksError,))):
                self._tell(f"left/{self.ranks.rank}", "")
            return
        self._tell("left/0", "")
        keys = [f"left/{rank}" for rank in range(1, self.ranks.size) if self.together or self._has(f"beat/{rank}")]
        while keys := [one for one in keys if not self._has(one)]:
            self.check()
            time.sleep(_POLL_S)

    def _wait(self, keys: Sequence[str], most_s: float) -> list[str]:
        """Those of the keys that are there as soon as one is; none after so many seconds."""
        deadline = time.monotonic() + most_s
        while not (found := [key for key in keys if self._has(key)]) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        return found

    def _beat(self) -> None:
        """The thread: gives a sign of life, and looks at those of the ranks that this one watches."""
        rank, count = self.ranks.rank, 0
        others = range(1, self.ranks.size)
        seen: dict[int, tuple[str, float]] = {}
        while not self._stop.wait(self.patience.beat_s):
            count += 1
            try:
                self._tell(f"beat/{rank}", str(count))
                dead = self._silent(others if rank == 0 else range(1), seen)
                if dead:
                    self.fail(f"{_named(dead)} died or hangs: no sign of life for {self.patience.dead_s:g} s")
            except RanksError as error:
                self.failure = self.failure or str(error)
                return

    def _silent(self, watched: Sequence[int], seen: dict[int, tuple[str, float]]) -> list[int]:
        """Those that came, have not left, and whose count stands still; `seen` holds each one's last count and since when."""
        now, silent = time.monotonic(), []
        for rank in watched:
            if not self._has(f"beat/{rank}") or self._has(f"left/{rank}"):
                continue
            count = self._get(f"beat/{rank}")
            if rank not in seen or seen[rank][0] != count:
                seen[rank] = (count, now)
            elif now - seen[rank][1] > self.patience.dead_s:
                silent.append(rank)
        return silent

    def _tell(self, key: str, text: str) -> None:
        self._ask(lambda: self.ranks.store.set(f"{self.name}/{key}", text))

    def _has(self, key: str) -> bool:
        return bool(self._ask(lambda: self.ranks.store.check([f"{self.name}/{key}"])))

    def _get(self, key: str) -> str:
        return self._ask(lambda: self.ranks.store.get(f"{self.name}/{key}")).decode()

    def _ask(self, question: Callable[[], Answer]) -> Answer:
        try:
            return question()
        except (RuntimeError, OSError) as error:
            said = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            keeper = "rank 0, or the launcher that keeps it, has ended" if self.ranks.rank else "its keeper has ended"
            raise RanksError(f"rank {self.ranks.rank} lost the ranks' store: {keeper} ({said})") from error


def _named(ranks: Sequence[int]) -> str:
    return f"rank{'s' * (len(ranks) != 1)} {', '.join(map(str, ranks))}"
