"""What the instructions do: integers, floating point, predicates, moves. The table of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tests.hopper_emulator import accesses, products
from tests.hopper_emulator.block import U32, U64, Block, Lanes, Mask
from tests.hopper_emulator.listing import Instruction

__all__ = ["OPERATIONS"]

Operation = Callable[[Block, Instruction], None]

_IS_PREDICATE = re.compile(r"U?P(\d|T)")


def _looked_up(table: int, first: NDArray[np.generic], second: NDArray[np.generic], third: NDArray[np.generic]) -> NDArray[np.generic]:
    """A logical function of three values, bit by bit, by its table of eight."""
    found = first ^ first
    for index in range(8):
        if table >> index & 1:
            term = (first if index & 4 else ~first) & (second if index & 2 else ~second) & (third if index & 1 else ~third)
            found = found | term
    return found


def nothing(block: Block, one: Instruction) -> None:
    """Waits and fences: everything is done at once here."""


def registers(block: Block, one: Instruction) -> None:
    """USETMAXREG: who asks for more gets them."""
    if len(one.operands) > 1:
        block.write_predicate(one.operands[0], np.ones(block.threads, np.bool_))


def barrier(block: Block, one: Instruction) -> None:
    """BAR: SYNC waits until as many threads as it says have come, ARV goes on."""
    operands = [name for name in one.operands if not _IS_PREDICATE.fullmatch(name)]
    ids = block.read(operands[0])
    counts = block.read(operands[1]) if len(operands) > 1 else np.full(block.threads, block.threads, U32)
    for barrier in np.unique(ids[block.active]):
        come = block.active & (ids == barrier)
        block.arrive(int(barrier), come, int(counts[come][0]), one.opcode[1] == "SYNC")


def fence(block: Block, one: Instruction) -> None:
    """FENCE: what a thread wrote so far, products may read."""
    if block.races and "ASYNC" in one.opcode:
        block.races.fence(block.warps_of(block.active))


def warpgroup(block: Block, one: Instruction) -> None:
    """WARPGROUP: DEPBAR waits until so many groups of products are left; they were done at once."""
    if block.races and "DEPBAR" in one.opcode:
        for group in np.unique(block.lane[block.active] // 128):
            block.races.wait(int(group), int(one.operands[-1], 16))


def multiply_add(block: Block, one: Instruction) -> None:
    """IMAD and its kinds: MOV, SHL, IADD, U32, X, WIDE, HI."""
    ops = one.operands
    if not {"WIDE", "HI"} & set(one.opcode):
        found = block.read(ops[1]) * block.read(ops[2]) + block.read(ops[3])
        block.write(ops[0], found + block.predicate(ops[4]).astype(U32) if "X" in one.opcode else found)
        return
    if "U32" in one.opcode:
        first, second = block.read(ops[1]).astype(U64), block.read(ops[2]).astype(U64)
    else:
        first, second = (block.signed(name).astype(np.int64).view(U64) for name in ops[1:3])
    wide = first * second + block.pair(ops[3])
    if "WIDE" in one.opcode:
        block.write_pair(ops[0], wide)
    else:
        block.write(ops[0], (wide >> U64(32)).astype(U32))


def add(block: Block, one: Instruction) -> None:
    """IADD3: three numbers, carries out, with X carries in; `.64` of register pairs."""
    ops = one.operands
    if one.opcode[-1] == "64":
        parts = [U64(0) - block.pair(name[1:]) if name[0] == "-" and name[1] == "U" else block.pair(name) for name in ops[1:4]]
        block.write_pair(ops[0], parts[0] + parts[1] + parts[2])
        return
    first = next(index for index, name in enumerate(ops) if index and not _IS_PREDICATE.fullmatch(name))
    total = np.zeros(block.threads, U64)
    for name in ops[first : first + 3]:
        if name[0] == "-" and not name.startswith("-0x"):  # the complement, and one, so that the carry is right
            total += (~block.read(name[1:])).astype(U64) + U64("X" not in one.opcode)
        else:
            total += block.read(name).astype(U64)
    if "X" in one.opcode:
        for name in ops[first + 3 : first + 5]:
            total += block.predicate(name).astype(U64)
    carry = total >> U64(32)
    block.write(ops[0], (total & U64(0xFFFFFFFF)).astype(U32))
    for index, name in enumerate(ops[1:first]):
        block.write_predicate(name, carry > index)


def add_two(block: Block, one: Instruction) -> None:
    """VIADD."""
    block.write(one.operands[0], block.read(one.operands[1]) + block.read(one.operands[2]))


def shifted_add(block: Block, one: Instruction) -> None:
    """LEA: the low half of a shifted number and another, with its carry; HI: the high half."""
    ops = one.operands
    if "HI" not in one.opcode:
        first = 2 if _IS_PREDICATE.fullmatch(ops[1]) else 1
        shift = int(ops[first + 2], 16) if len(ops) > first + 2 else 0
        total = (block.read(ops[first]) << U32(shift)).astype(U64) + block.read(ops[first + 1]).astype(U64)
        block.write(ops[0], (total & U64(0xFFFFFFFF)).astype(U32))
        if first == 2:
            block.write_predicate(ops[1], total >> U64(32) > 0)
        return
    carries = ops[1] if _IS_PREDICATE.fullmatch(ops[1]) else ""
    if carries:
        ops = (ops[0], *ops[2:])
    if "SX32" in one.opcode:
        wide, rest = block.signed(ops[1]).astype(np.int64).view(U64), ops[3:]
    else:
        wide, rest = block.read(ops[1]).astype(U64) | block.read(ops[3]).astype(U64) << U64(32), ops[4:]
    carry = block.predicate(rest[1]).astype(U32) if len(rest) > 1 else U32(0)
    total = (wide << U64(int(rest[0], 16)) >> U64(32)) + block.read(ops[2]).astype(U64) + carry.astype(U64)
    block.write(ops[0], (total & U64(0xFFFFFFFF)).astype(U32))
    if carries:
        block.write_predicate(carries, total >> U64(32) > 0)


def shift(block: Block, one: Instruction) -> None:
    """SHF: left or right, of one word or of two."""
    ops = one.operands
    low, count, high = block.read(ops[1]), block.read(ops[2]).astype(np.int64), block.read(ops[3])
    wide = low.astype(U64) | high.astype(U64) << U64(32)
    if one.opcode[1] == "L" and "U64" in one.opcode:
        found = wide << count.astype(U64)
        block.write(ops[0], (found >> U64(32) if "HI" in one.opcode else found & U64(0xFFFFFFFF)).astype(U32))
    elif one.opcode[1] == "L":
        block.write(ops[0], np.where(count < 32, low << np.minimum(count, 31).astype(U32), U32(0)))
    elif "HI" in one.opcode and "S32" in one.opcode:
        block.write(ops[0], (high.view(np.int32) >> np.minimum(count, 31).astype(np.int32)).view(U32))
    elif "HI" in one.opcode:
        block.write(ops[0], np.where(count < 32, high >> np.minimum(count, 31).astype(U32), U32(0)))
    else:
        block.write(ops[0], (wide >> count.astype(U64) & U64(0xFFFFFFFF)).astype(U32))


def logic(block: Block, one: Instruction) -> None:
    """LOP3: any function of three words, and whether it is not zero."""
    ops = one.operands
    first = 1 if _IS_PREDICATE.fullmatch(ops[0]) else 0
    words = [block.read(name) for name in ops[first + 1 : first + 4]]
    found = _looked_up(int(ops[first + 4], 16), *words).astype(U32)
    block.write(ops[first], found)
    if first:
        block.write_predicate(ops[0], found != 0)


def predicate_logic(block: Block, one: Instruction) -> None:
    """PLOP3: two functions of three predicates."""
    ops = one.operands
    given = [block.predicate(name) for name in ops[2:5]]
    for name, table in zip(ops[:2], (*ops[5:7], "0x0"), strict=False):
        block.write_predicate(name, _looked_up(int(table, 16), *given).astype(np.bool_))


def permute(block: Block, one: Instruction) -> None:
    """PRMT: four bytes of two words."""
    ops = one.operands
    wide = block.read(ops[1]).astype(U64) | block.read(ops[3]).astype(U64) << U64(32)
    chosen = block.read(ops[2]).astype(U64)
    found = np.zeros(block.threads, U64)
    for byte in range(4):
        place = chosen >> U64(4 * byte) & U64(7)
        found |= (wide >> (U64(8) * place) & U64(255)) << U64(8 * byte)
    block.write(ops[0], found.astype(U32))


def extend(block: Block, one: Instruction) -> None:
    """SGXT: the lowest bits, with their sign or without."""
    bits = int(one.operands[2], 16)
    value = block.read(one.operands[1])
    if "U32" in one.opcode:
        block.write(one.operands[0], value & U32((1 << bits) - 1))
    else:
        block.write(one.operands[0], ((value << U32(32 - bits)).view(np.int32) >> np.int32(32 - bits)).view(U32))


def _extreme(block: Block, one: Instruction, first: Lanes, rest: tuple[str, ...]) -> None:
    second = block.read(rest[0])
    given = (first, second) if "U32" in one.opcode else (first.view(np.int32), second.view(np.int32))
    block.write(one.operands[0], np.where(block.predicate(rest[1]), np.minimum(*given), np.maximum(*given)).view(U32))


def extreme(block: Block, one: Instruction) -> None:
    """VIMNMX: the smaller, or by its predicate the larger."""
    _extreme(block, one, block.read(one.operands[1]), one.operands[2:])


def sum_extreme(block: Block, one: Instruction) -> None:
    """VIADDMNMX: of a sum and a number."""
    _extreme(block, one, block.read(one.operands[1]) + block.read(one.operands[2]), one.operands[3:])


def absolute(block: Block, one: Instruction) -> None:
    """IABS."""
    block.write(one.operands[0], np.abs(block.signed(one.operands[1]).astype(np.int64)).astype(U32))


def move(block: Block, one: Instruction) -> None:
    """MOV, and constants; `.64` of pairs."""
    if "64" in one.opcode:
        block.write_pair(one.operands[0], block.pair(one.operands[1]))
    else:
        block.write(one.operands[0], block.read(one.operands[1]))


def constant_halves(block: Block, one: Instruction) -> None:
    """HFMA2 of zeros: two float16 numbers become a register's halves, the upper one first."""
    if one.operands[1:3] != ("-RZ", "RZ"):
        raise NotImplementedError(one.text)
    upper, lower = (int(np.float16(float(operand)).view(np.uint16)) for operand in one.operands[3:5])
    block.write(one.operands[0], np.full(block.threads, upper << 16 | lower, U32))


def zeros(block: Block, one: Instruction) -> None:
    """CS2R of no special register."""
    block.write_pair(one.operands[0], np.zeros(block.threads, U64))


def special(block: Block, one: Instruction) -> None:
    """S2R: which thread and block it is; there is one dimension, and no cluster."""
    known = {"SR_TID.X": block.lane.astype(U32), "SR_CTAID.X": np.full(block.threads, block.index, U32), "SR_LANEID": (block.lane % 32).astype(U32)}
    block.write(one.operands[0], known.get(one.operands[1], np.zeros(block.threads, U32)))


def to_uniform(block: Block, one: Instruction) -> None:
    """R2UR: a warp's first thread decides."""
    block.write(one.operands[0], np.repeat(block.read(one.operands[1])[::32], 32))


def select(block: Block, one: Instruction) -> None:
    """SEL and FSEL."""
    block.floats = one.name == "FSEL"
    block.write(one.operands[0], np.where(block.predicate(one.operands[3]), block.read(one.operands[1]), block.read(one.operands[2])))


def pack_predicates(block: Block, one: Instruction) -> None:
    """P2R: predicates as bits of a word."""
    held = block.uniform_predicates if one.name[0] == "U" else block.predicates
    bits = np.zeros(block.threads, U32)
    for index in range(7):
        bits |= held[index].astype(U32) << U32(index)
    chosen = U32(int(one.operands[3], 16))
    block.write(one.operands[0], block.read(one.operands[2]) & ~chosen | bits & chosen)


def unpack_predicates(block: Block, one: Instruction) -> None:
    """R2P."""
    word, chosen = block.read(one.operands[1]), int(one.operands[2], 16)
    for index in range(7):
        if chosen >> index & 1:
            block.write_predicate(f"P{index}", (word >> U32(index) & U32(1)).astype(np.bool_))


def _joined(block: Block, one: Instruction, found: Mask) -> None:
    """With the predicate that stands behind, into both results."""
    other = block.predicate(one.operands[4])
    join = np.logical_or if "OR" in one.opcode else np.logical_xor if "XOR" in one.opcode else np.logical_and
    block.write_predicate(one.operands[0], join(found, other))
    block.write_predicate(one.operands[1], join(~found, other))


def compare(block: Block, one: Instruction) -> None:
    """ISETP; EX compares the upper words of numbers whose lower ones were compared before."""
    ops, kind = one.operands, one.opcode[1]
    first, second = (block.read(ops[2]), block.read(ops[3])) if "U32" in one.opcode else (block.signed(ops[2]), block.signed(ops[3]))
    found = {"GE": first >= second, "GT": first > second, "LE": first <= second, "LT": first < second, "EQ": first == second, "NE": first != second}[
        kind
    ]
    if "EX" in one.opcode:
        lower = block.predicate(ops[5])
        strict = {
            "GE": first > second,
            "GT": first > second,
            "LE": first < second,
            "LT": first < second,
            "EQ": first != first,
            "NE": first != second,
        }[kind]
        found = strict | ((first == second) & lower)
    _joined(block, one, found)


def compare_floats(block: Block, one: Instruction) -> None:
    """FSETP; kinds that end in U are true of what is no number."""
    first, second = block.number(one.operands[2]), block.number(one.operands[3])
    unordered = np.isnan(first) | np.isnan(second)
    kind = one.opcode[1]
    if kind in ("NAN", "NUM"):
        _joined(block, one, unordered if kind == "NAN" else ~unordered)
        return
    plain = {"GE": first >= second, "GT": first > second, "LE": first <= second, "LT": first < second, "EQ": first == second, "NE": first != second}
    _joined(block, one, plain[kind[:2]] | unordered if kind.endswith("U") else plain[kind[:2]] & ~unordered)


def add_floats(block: Block, one: Instruction) -> None:
    """FADD."""
    block.write(one.operands[0], (block.number(one.operands[1]) + block.number(one.operands[2])).astype(np.float32))


def multiply_floats(block: Block, one: Instruction) -> None:
    """FMUL."""
    block.write(one.operands[0], (block.number(one.operands[1]) * block.number(one.operands[2])).astype(np.float32))


def multiply_add_floats(block: Block, one: Instruction) -> None:
    """FFMA."""
    first, second, third = (block.number(name) for name in one.operands[1:4])
    block.write(one.operands[0], (first * second + third).astype(np.float32))


def extreme_float(block: Block, one: Instruction) -> None:
    """FMNMX."""
    first, second = block.number(one.operands[1]), block.number(one.operands[2])
    block.write(one.operands[0], np.where(block.predicate(one.operands[3]), np.fmin(first, second), np.fmax(first, second)).astype(np.float32))


def function(block: Block, one: Instruction) -> None:
    """MUFU: functions that a card computes nearly."""
    x = block.number(one.operands[1])
    with np.errstate(all="ignore"):
        known = {"EX2": np.exp2, "LG2": np.log2, "SQRT": np.sqrt, "RCP": lambda value: 1 / value, "RSQ": lambda value: 1 / np.sqrt(value)}
        block.write(one.operands[0], known[one.opcode[1]](x).astype(np.float32))


def round_float(block: Block, one: Instruction) -> None:
    """FRND."""
    way = next((way for name, way in (("FLOOR", np.floor), ("CEIL", np.ceil), ("TRUNC", np.trunc)) if name in one.opcode), np.rint)
    block.write(one.operands[0], way(block.number(one.operands[1])).astype(np.float32))


def to_float(block: Block, one: Instruction) -> None:
    """I2F."""
    given = block.read(one.operands[1]) if {"U32", "RP"} & set(one.opcode) else block.signed(one.operands[1])
    block.write(one.operands[0], given.astype(np.float32))


def to_integer(block: Block, one: Instruction) -> None:
    """F2I, cut."""
    cut = np.trunc(np.nan_to_num(block.number(one.operands[1]), posinf=2**32 - 1))
    block.write(one.operands[0], np.clip(cut, 0, 2**32 - 1).astype(U64).astype(U32))


def pack_halves(block: Block, one: Instruction) -> None:
    """F2FP: two numbers in 16 bits each, the first in the upper half."""
    upper, lower = (products.to_half(block.number(name).astype(np.float32), "BF16" in one.opcode) for name in one.operands[1:3])
    block.write(one.operands[0], lower.astype(U32) | upper.astype(U32) << U32(16))


def narrow_float(block: Block, one: Instruction) -> None:
    """F2F: one number in 16 bits."""
    if {"BF16", "F16"}.isdisjoint(one.opcode[1:2]):
        raise NotImplementedError(one.text)
    block.write(one.operands[0], products.to_half(block.number(one.operands[1]).astype(np.float32), one.opcode[1] == "BF16").astype(U32))


def from_half(block: Block, one: Instruction) -> None:
    """HADD2.F32 of nothing and one half of a word."""
    word = block.read(one.operands[2].split(".")[0])
    half = word >> U32(16) if "H1_H1" in one.operands[2] else word & U32(0xFFFF)
    block.write(one.operands[0], half.astype(np.uint16).view(np.float16).astype(np.float32))


def shuffle(block: Block, one: Instruction) -> None:
    """SHFL: another thread's word."""
    ops = one.operands
    given, by, lane = block.read(ops[2]), block.read(ops[3]).astype(np.int64) & 31, block.lane % 32
    source = {"IDX": by, "BFLY": lane ^ by, "UP": lane - by, "DOWN": lane + by}[one.opcode[1]]
    inside = (source >= 0) & (source < 32)
    source = np.where(inside, source, lane)
    block.write_predicate(ops[0], inside)
    block.write(ops[1], given[block.lane - lane + source])


def turn(block: Block, one: Instruction) -> None:
    """MOVM.16.MT88: an 8 x 8 matrix of a warp, two numbers a thread, transposed."""
    words = block.read(one.operands[1]).reshape(-1, 32)
    matrix = np.stack([words & U32(0xFFFF), words >> U32(16)], 2).reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1, 32, 2)
    block.write(one.operands[0], (matrix[..., 0] | matrix[..., 1] << U32(16)).reshape(-1).astype(U32))


def vote(block: Block, one: Instruction) -> None:
    """VOTEU: whether a predicate holds in all of a warp's active threads, or in any."""
    held = block.predicate(one.operands[-1]).reshape(-1, 32)
    come = block.active.reshape(-1, 32)
    found = (held | ~come).all(1) if "ALL" in one.opcode else (held & come).any(1)
    block.write_predicate(one.operands[0], np.repeat(found, 32))


OPERATIONS: Mapping[str, Operation] = {
    **dict.fromkeys(("NOP", "MEMBAR", "WARPSYNC", "ENDCOLLECTIVE", "BREAK", "BSSY", "BSYNC", "ERRBAR"), nothing),
    **dict.fromkeys(("IMAD", "UIMAD"), multiply_add),
    **dict.fromkeys(("IADD3", "UIADD3"), add),
    **dict.fromkeys(("LEA", "ULEA"), shifted_add),
    **dict.fromkeys(("SHF", "USHF"), shift),
    **dict.fromkeys(("LOP3", "ULOP3"), logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), predicate_logic),
    **dict.fromkeys(("SGXT", "USGXT"), extend),
    **dict.fromkeys(("VIMNMX", "IMNMX", "UIMNMX"), extreme),
    **dict.fromkeys(("MOV", "UMOV", "LDC", "ULDC"), move),
    **dict.fromkeys(("S2R", "S2UR"), special),
    **dict.fromkeys(("SEL", "USEL", "FSEL"), select),
    **dict.fromkeys(("P2R", "UP2UR"), pack_predicates),
    **dict.fromkeys(("ISETP", "UISETP"), compare),
    "VIADD": add_two, "VIADDMNMX": sum_extreme, "IABS": absolute, "CS2R": zeros, "R2UR": to_uniform, "R2P": unpack_predicates, "PRMT": permute, "UPRMT": permute,
    "FADD": add_floats, "FMUL": multiply_floats, "FFMA": multiply_add_floats, "FMNMX": extreme_float, "FSETP": compare_floats, "MUFU": function,
    "FRND": round_float, "I2F": to_float, "F2I": to_integer, "F2FP": pack_halves, "HADD2": from_half, "SHFL": shuffle, "VOTEU": vote, "MOVM": turn,
    "FENCE": fence, "WARPGROUP": warpgroup, "HFMA2": constant_halves,
    "BAR": barrier, "USETMAXREG": registers, "F2F": narrow_float, **accesses.OPERATIONS, "HMMA": products.small, "HGMMA": products.large,
}  # fmt: skip
"""By name."""
