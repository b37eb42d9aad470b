"""A block of threads that runs a listing: its registers, its predicates, its shared memory, and which threads an instruction is for.

Threads that part at a branch go on at the lowest address that any of them waits at, so that those that skip ahead wait for the others there. What
takes all threads of a warp, or of four, is a fault while they are apart. Warps may have roles of their own: those that wait at a barrier are passed over
until as many have come as it names, and when all wait it is a fault.
"""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from tests.hopper_emulator.listing import Instruction, Listing
from tests.hopper_emulator.memory import Fault, Memory, Shared
from tests.hopper_emulator.races import Races

__all__ = ["U32", "U64", "Block", "Lanes", "Mask"]

U32, U64 = np.uint32, np.uint64
Lanes = NDArray[np.uint32]
Wide = NDArray[np.uint64]
Mask = NDArray[np.bool_]
Copies = list[tuple[NDArray[np.int64], NDArray[np.uint8]]]

_STACK = 2048
_PARAMETERS = 0x210
_GRID = 0xC
_MOST = 1_000_000
_REGISTER = re.compile(r"(U?R)(\d+|Z)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")
_TOGETHER = {"BAR": 32, "HGMMA": 128, "HMMA": 32, "LDSM": 32, "STSM": 32, "SHFL": 32, "WARPGROUP": 128, "USETMAXREG": 128}
"""Of how many threads an instruction takes all or none."""


class Block:
    """`given`: the kernel's parameters as they lie in the constant bank; `blocks` of the launch; `watched`: races in shared memory are looked for."""

    def __init__(
        self, code: Listing, warps: int, shared: int, memory: Memory, given: bytes, index: int, blocks: int = 1, watched: bool = False
    ) -> None:
        self.code, self.warps, self.threads, self.memory, self.given, self.index = code, warps, 32 * warps, memory, given, index
        self.blocks = blocks
        self.lane = np.arange(self.threads)
        self.shared = Shared(shared)
        self.races = Races(warps, self.shared.end) if watched else None
        self.place = self.group = 0
        self.local = np.zeros((2 * _STACK, self.threads), np.uint8)
        rubbish = np.random.default_rng(index)
        self.registers: NDArray[np.uint32] = rubbish.integers(0, 2**32, (256, self.threads), dtype=U32)
        self.uniform: NDArray[np.uint32] = np.repeat(rubbish.integers(0, 2**32, (64, 1), dtype=U32), self.threads, 1)
        self.predicates = np.zeros((8, self.threads), np.bool_)
        self.uniform_predicates = np.zeros((8, self.threads), np.bool_)
        self.predicates[7] = self.uniform_predicates[7] = True
        self.registers[1] = _STACK
        self.copying: list[Copies] = [[] for _ in range(warps)]
        self.committed: list[list[Copies]] = [[] for _ in range(warps)]
        self.waiting: dict[int, tuple[int, Mask]] = {}
        self.blocked: Mask = np.zeros(self.threads, np.bool_)
        self.active: Mask = np.ones(self.threads, np.bool_)
        self.floats = False

    def run(self) -> None:
        """From the first instruction until every thread has left."""
        from tests.hopper_emulator.operations import OPERATIONS

        at = np.zeros(self.threads, np.int64)
        alive = np.ones(self.threads, np.bool_)
        for _ in range(_MOST):
            if not alive.any():
                return
            free = alive & ~self.blocked
            if not free.any():
                raise Fault(f"all threads wait, at barriers {sorted(self.waiting)}")
            position = int(at[free].min())
            here = free & (at == position)
            one = self.code.instructions[position]
            self.active = here & self.predicate(one.predicate) if one.predicate else here
            self.place = one.address
            at[here] = position + 1
            if one.name == "EXIT":
                alive &= ~self.active
            elif one.name == "BRA":
                at[self.active] = self.code.labels[one.operands[-1].strip("`()")]
            elif self.active.any():  # else its predicate holds for nobody
                self._step(one, OPERATIONS.get(one.name), here, alive)
        raise Fault("it runs on and on")

    def _step(self, one: Instruction, operation: object, here: Mask, alive: Mask) -> None:
        if operation is None:
            raise NotImplementedError(f"{one.text} at {one.address:#x}")
        group = min(_TOGETHER.get(one.name, 1), self.threads)
        if group > 1:
            come, wanted = here.reshape(-1, group), alive.reshape(-1, group)
            if (come.any(1) & (come != wanted).any(1)).any() or (
                here.any() and not self.active.reshape(-1, 32).all(1)[self.active.reshape(-1, 32).any(1)].all()
            ):
                raise Fault(f"threads are apart at {one.address:#x}: {one.text}")
        self.floats = False
        try:
            operation(self, one)  # type: ignore[operator]
        except Fault as fault:
            raise Fault(f"{fault}, at {one.address:#x}: {one.text}") from None

    def arrive(self, barrier: int, come: Mask, count: int, waits: bool) -> None:
        """Threads reach a barrier, and wait there or do not, until `count` have reached it."""
        there, held = self.waiting.get(barrier, (0, np.zeros(self.threads, np.bool_)))
        there, held = there + int(come.sum()), held | come if waits else held
        if there > count:
            raise Fault(f"{there} threads at barrier {barrier}, where {count} meet")
        self.blocked |= come & waits
        if self.races:
            self.races.arrive(barrier, self.warps_of(come))
        if there == count:
            self.blocked &= ~held
            if self.races:
                self.races.release(barrier, self.warps_of(held))
            self.waiting.pop(barrier, None)
        else:
            self.waiting[barrier] = there, held

    def warps_of(self, threads: Mask) -> NDArray[np.int64]:
        """The warps that any of these threads belong to."""
        return np.unique(self.lane[threads] // 32)

    def read(self, operand: str) -> Lanes:
        """32 bits of each thread. `-` negates as `floats` says."""
        minus = operand[0] == "-" and not re.match(r"-(0x|\d|INF)", operand)
        inverted = operand[0] == "~"
        operand = operand[1:] if minus or inverted else operand
        absolute = operand[0] == "|"
        value = self._plain(operand.strip("|"))
        if absolute:
            value = value & U32(0x7FFFFFFF)
        if minus:
            value = value ^ U32(1 << 31) if self.floats else U32(0) - value
        return ~value if inverted else value

    def _plain(self, operand: str) -> Lanes:
        register, constant = _REGISTER.match(operand), _CONSTANT.match(operand)
        if register or operand == "SRZ":
            if register is None or register[2] == "Z":
                return np.zeros(self.threads, U32)
            return (self.registers if register[1] == "R" else self.uniform)[int(register[2])]
        if constant:
            return np.full(self.threads, self._constant(int(constant[1], 16)), U32)
        if re.match(r"-?0x", operand):
            return np.full(self.threads, int(operand, 16) & 0xFFFFFFFF, U32)
        number = float(operand.replace("INF", "inf").replace("QNAN", "nan"))
        return np.full(self.threads, number, np.float32).view(U32) if self.floats else np.full(self.threads, int(number) & 0xFFFFFFFF, U32)

    def _constant(self, offset: int) -> int:
        if offset == 0x28:
            return _STACK
        if offset == _GRID:
            return self.blocks
        return int.from_bytes(self.given[offset - _PARAMETERS :][:4], "little") if offset >= _PARAMETERS else 0

    def signed(self, operand: str) -> NDArray[np.int32]:
        """The same as signed numbers."""
        return self.read(operand).view(np.int32)

    def number(self, operand: str) -> NDArray[np.float64]:
        """The same as float32, in float64."""
        self.floats = True
        return self.read(operand).view(np.float32).astype(np.float64)

    def pair(self, operand: str) -> Wide:
        """64 bits of a register and the next, or of a constant."""
        register, constant = _REGISTER.match(operand), _CONSTANT.match(operand)
        if constant:
            offset = int(constant[1], 16)
            return np.full(self.threads, self._constant(offset) | self._constant(offset + 4) << 32, U64)
        if register is None:
            return np.full(self.threads, int(operand, 16) & (2**64 - 1), U64)
        if register[2] == "Z":
            return np.zeros(self.threads, U64)
        held, first = self.registers if register[1] == "R" else self.uniform, int(register[2])
        return held[first].astype(U64) | held[first + 1].astype(U64) << U64(32)

    def many(self, operand: str, count: int) -> list[Lanes]:
        """Registers in a row."""
        register = _REGISTER.match(operand)
        assert register is not None, operand
        if register[2] == "Z":
            return [np.zeros(self.threads, U32)] * count
        return [self.registers[int(register[2]) + more] for more in range(count)]

    def predicate(self, operand: str) -> Mask:
        """A predicate of each thread, `!` and all."""
        name = operand.lstrip("!")
        value = (self.uniform_predicates if name[0] == "U" else self.predicates)[7 if name[-1] == "T" else int(name[-1])]
        return ~value if operand[0] == "!" else value

    def write(self, operand: str, value: NDArray[np.generic], further: int = 0) -> None:
        """Sets a register, or one further on, of the active threads."""
        register = _REGISTER.match(operand)
        assert register is not None, operand
        if register[2] == "Z":
            return
        held = self.registers if register[1] == "R" else self.uniform
        index = int(register[2]) + further
        held[index] = np.where(self.active, value.view(U32) if value.dtype.itemsize == 4 else value.astype(U32), held[index])

    def write_pair(self, operand: str, value: Wide) -> None:
        """Sets a register and the next."""
        self.write(operand, (value & U64(0xFFFFFFFF)).astype(U32))
        self.write(operand, (value >> U64(32)).astype(U32), 1)

    def write_predicate(self, operand: str, value: Mask) -> None:
        """Sets a predicate; PT stays."""
        if operand[-1] != "T":
            held = self.uniform_predicates if operand[0] == "U" else self.predicates
            held[int(operand[-1])] = np.where(self.active, value, held[int(operand[-1])])

    def address(self, operand: str) -> NDArray[np.int64]:
        """Of the active threads: the sum in the brackets."""
        inside = re.sub(r"^desc\[UR\d+\]", "", operand).strip("[]")
        total = np.zeros(self.threads, np.int64)
        wide = ".64" in inside
        for sign, part in re.findall(r"([+-]?)([^+-]+)", inside):
            name = part.split(".")[0]
            if part.startswith(("R", "UR")):
                value = self.pair(name).astype(np.int64) if ".64" in part else self.read(name).astype(np.int64)
            else:
                value = np.full(self.threads, int(part, 0), np.int64)
            total = total - value if sign == "-" else total + value
        return (total if wide else total & 0xFFFFFFFF)[self.active]
