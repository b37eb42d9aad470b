"""Whether accesses to a block's shared memory are ordered: a clock for each warp, which barriers pass on, also through a third warp (happens before).

A read after a write, a write after a read and a write after a write of different warps are a race unless a chain of barriers lies between them. Asynchronous copies
write from where they are issued to where they are waited for; products read likewise, and only what its writer fenced for them (`fence.proxy.async`) before the
barrier. What orders the lanes of one warp is not looked at.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

__all__ = ["Races"]

Indices = NDArray[np.int64]
_NEVER = np.int64(1) << np.int64(60)
_GROUP = 4


@dataclass(slots=True)
class _Products:
    """Of a warpgroup: the words that products under way read, by groups; the last one is still open."""

    groups: list[list[Indices]] = field(default_factory=lambda: [[]])


class Races:
    """Follows a block of `warps` warps; `found` counts (what, where the earlier access stands, where the later one)."""

    def __init__(self, warps: int, end: int) -> None:
        words = -(-end // 4)
        self.warps = warps
        self.clock = np.eye(warps, dtype=np.int64)
        self.writer = np.full(words, -1, np.int64)
        self.written = np.zeros(words, np.int64)
        self.fenced = np.zeros(words, np.int64)
        self.wrote = np.zeros(words, np.int64)
        self.read = np.zeros((words, warps), np.int64)
        self.reader = np.zeros((words, warps), np.int64)
        self.products = [_Products() for _ in range(-(-warps // _GROUP))]
        self.came: dict[int, Indices] = {}
        self.found: Counter[tuple[str, int, int]] = Counter()

    def reads(self, warps: Indices, addresses: Indices, size: int, place: int) -> None:
        """Reads by threads of these warps."""
        for warp in np.unique(warps):
            words = _words(addresses[warps == warp], size)
            self._after_writes(int(warp), words, "read after write", place)
            self.read[words, warp], self.reader[words, warp] = self.clock[warp, warp], place

    def writes(self, warps: Indices, addresses: Indices, size: int, place: int, lands: bool = True) -> None:
        """Writes; those that do not land yet are under way until `landed`."""
        for warp in np.unique(warps):
            words = _words(addresses[warps == warp], size)
            self._after_writes(int(warp), words, "write after write", place)
            late = self.read[words] > self.clock[warp]
            late[:, warp] = False
            for word, other in zip(*np.nonzero(late), strict=True):
                self.found["write after read", int(self.reader[words[word], other]), place] += 1
            self.read[words] = 0
            self.writer[words], self.wrote[words], self.fenced[words] = warp, place, _NEVER
            self.written[words] = self.clock[warp, warp] if lands else _NEVER

    def landed(self, warp: int, addresses: Indices, size: int) -> None:
        """The copies of a warp are there."""
        self.written[_words(addresses, size)] = self.clock[warp, warp]

    def fence(self, warps: Indices) -> None:
        """Products may read what these warps wrote, once they are told."""
        for warp in np.unique(warps):
            mine = (self.writer == warp) & (self.fenced == _NEVER) & (self.written < _NEVER)
            self.fenced[mine] = self.clock[warp, warp]

    def product(self, group: int, addresses: Indices, size: int, place: int) -> None:
        """A product of a warpgroup reads from here on."""
        words = _words(addresses, size)
        for warp in range(_GROUP * group, _GROUP * group + _GROUP):
            self._after_writes(warp, words, "read after write", place)
            known = np.where(self.writer[words] == warp, self.clock[warp, warp], self.clock[warp][self.writer[words]])
            for word in words[(self.writer[words] >= 0) & (self.fenced[words] > known)]:
                self.found["no fence", int(self.wrote[word]), place] += 1
            self.read[words, warp], self.reader[words, warp] = _NEVER, place
        self.products[group].groups[-1].append(words)

    def commit(self, group: int) -> None:
        """The products so far are a group."""
        self.products[group].groups.append([])

    def wait(self, group: int, left: int) -> None:
        """Until so many groups are under way."""
        groups = self.products[group].groups
        warps = np.arange(_GROUP * group, _GROUP * group + _GROUP)
        while len(groups) - 1 > left:
            for words in groups.pop(0):
                for warp in warps:
                    self.read[words, warp] = np.where(self.read[words, warp] == _NEVER, self.clock[warp, warp], self.read[words, warp])
        for words in (words for one in groups for words in one):
            for warp in warps:
                self.read[words, warp] = _NEVER

    def arrive(self, barrier: int, warps: Indices) -> None:
        """Warps reach a barrier: whoever waits there knows what they did so far."""
        came = self.came.setdefault(barrier, np.zeros(self.warps, np.int64))
        for warp in warps:
            np.maximum(came, self.clock[warp], out=came)
            self.clock[warp, warp] += 1

    def release(self, barrier: int, warps: Indices) -> None:
        """As many have come as were to come; these waited."""
        came = self.came.pop(barrier)
        for warp in warps:
            np.maximum(self.clock[warp], came, out=self.clock[warp])

    def _after_writes(self, warp: int, words: Indices, what: str, place: int) -> None:
        writer = self.writer[words]
        late = (writer >= 0) & (writer != warp) & (self.written[words] > self.clock[warp][writer])
        for word in words[late]:
            self.found[what, int(self.wrote[word]), place] += 1


def _words(addresses: Indices, size: int) -> Indices:
    return np.unique((addresses[:, None] + np.arange(0, max(size, 4), 4)) // 4)
