"""Products of matrices: HMMA of a warp, whose operands are registers, and HGMMA of four warps, which read shared memory through descriptors."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from tests.hopper_emulator.block import U32, Block, Lanes
from tests.hopper_emulator.listing import Instruction
from tests.hopper_emulator.memory import Fault

__all__ = ["large", "small", "to_half"]

Matrix = NDArray[np.float64]

_SWIZZLES = {1: (128, 7), 2: (64, 3), 3: (32, 1)}
"""By a descriptor's mode: bytes of a row, and which bits of the row's number are exchanged with those of the 16-byte column's."""
_GROUP = 128


def _kind(one: Instruction) -> str:
    return "tf32" if "TF32" in one.opcode else "bf16" if "BF16" in one.opcode else "f16"


def to_half(value: NDArray[np.float32], is_bfloat: bool) -> NDArray[np.uint16]:
    """float32 in 16 bits, to the nearest, ties to even."""
    if not is_bfloat:
        with np.errstate(over="ignore"):
            return value.astype(np.float16).view(np.uint16)
    bits = value.view(U32).astype(np.uint64)
    return (bits + np.uint64(0x7FFF) + (bits >> np.uint64(16) & np.uint64(1)) >> np.uint64(16)).astype(np.uint16)


def _halves(bits: NDArray[np.uint16], kind: str) -> Matrix:
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(U32) << U32(16)).view(np.float32).astype(np.float64)


def _cut(bits: Lanes) -> Matrix:
    """What a tensor core reads of float32."""
    return (bits & U32(0xFFFFE000)).view(np.float32).astype(np.float64)


def _left(registers: list[Lanes], warps: int, kind: str) -> Matrix:
    """`[warps, 16, k]` from four registers of each thread."""
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4
    found = np.zeros((warps, 16, 8 if kind == "tf32" else 16))
    for index, word in enumerate(register.reshape(warps, 32) for register in registers):
        rows = row + 8 * (index & 1)
        if kind == "tf32":
            found[:, rows, pair + 4 * (index >> 1)] = _cut(word)
        else:
            column = 2 * pair + 8 * (index >> 1)
            found[:, rows, column] = _halves((word & U32(0xFFFF)).astype(np.uint16), kind)
            found[:, rows, column + 1] = _halves((word >> U32(16)).astype(np.uint16), kind)
    return found


def small(block: Block, one: Instruction) -> None:
    """HMMA: 16 x 8 of each warp."""
    kind, lane = _kind(one), np.arange(32)
    row, pair = lane // 4, lane % 4
    left = _left(block.many(one.operands[1], 4), block.warps, kind)
    right = np.zeros((block.warps, left.shape[2], 8))
    for index, word in enumerate(register.reshape(block.warps, 32) for register in block.many(one.operands[2], 2)):
        if kind == "tf32":
            right[:, pair + 4 * index, row] = _cut(word)
        else:
            right[:, 2 * pair + 8 * index, row] = _halves((word & U32(0xFFFF)).astype(np.uint16), kind)
            right[:, 2 * pair + 8 * index + 1, row] = _halves((word >> U32(16)).astype(np.uint16), kind)
    product = left @ right
    before = [word.copy() for word in block.many(one.operands[3], 4)]
    for index in range(4):
        found = product[:, row + 8 * (index >> 1), 2 * pair + (index & 1)].reshape(-1) + before[index].view(np.float32)
        block.write(one.operands[0], found.astype(np.float32), index)


def large(block: Block, one: Instruction) -> None:
    """HGMMA: 64 rows of each four warps; the left operand in registers or, as the right one, behind a descriptor in uniform registers."""
    size = re.match(r"64x(\d+)x(\d+)", one.opcode[1])
    assert size is not None
    columns, depth, kind = int(size[1]), int(size[2]), _kind(one)
    in_registers = one.operands[1].startswith("R")
    operand, before = one.operands[1 + in_registers], one.operands[2 + in_registers]
    place = re.search(r"UR(\d+)", operand)
    assert place is not None
    held = block.uniform[int(place[1]) :][:4]
    if in_registers:
        lefts = _left(block.many(one.operands[1], 4), block.warps, kind).reshape(-1, 64, depth)
    products = []
    for group in range(block.threads // _GROUP):
        if not block.active[group * _GROUP]:
            products.append(np.zeros((64, columns)))
            continue
        words = held[:, group * _GROUP : (group + 1) * _GROUP]
        block.group = group
        left = lefts[group] if in_registers else _described(block, words[:2], 64, depth, kind, "tnspA" in operand)
        products.append(left @ _described(block, words[2:], columns, depth, kind, "tnspB" in operand).T)
    found = np.concatenate(products)
    warp, lane = block.lane // 32, block.lane % 32
    row, pair = lane // 4, lane % 4
    for index in range(columns // 2):
        value = found[16 * warp + row + 8 * (index >> 1 & 1), 8 * (index >> 2) + 2 * pair + (index & 1)]
        if before != "RZ":
            value = value + block.many(before, index + 1)[index].view(np.float32)
        block.write(one.operands[0], value.astype(np.float32), index)
    if block.races and "gsb0" in one.operands:
        for group in np.unique(block.lane[block.active] // _GROUP):
            block.races.commit(int(group))


def _described(block: Block, words: NDArray[np.uint32], rows: int, depth: int, kind: str, transposed: bool) -> Matrix:
    """`[rows, depth]` of an operand in shared memory. Transposed: its rows, not its depth, are contiguous."""
    if (words != words[:, :1]).any():
        raise Fault("the warps of a product have different descriptors")
    whole = int(words[0, 0]) | int(words[1, 0]) << 32
    start, leading, stride, mode = (whole & 0x3FFF) << 4, (whole >> 16 & 0x3FFF) << 4, (whole >> 32 & 0x3FFF) << 4, whole >> 62
    if mode not in _SWIZZLES:
        raise Fault(f"no kernel of Triton's makes such a descriptor: {whole:#x}")
    width, exchanged = _SWIZZLES[mode]
    size = 4 if kind == "tf32" else 2
    row, column = np.meshgrid(np.arange(rows), np.arange(depth), indexing="ij")
    if transposed:
        across = width // size
        at = start + row // across * leading + row % across * size + column // 8 * stride + column % 8 * width
    else:
        at = start + row // 8 * stride + row % 8 * width + column * size
    at ^= (at >> 7 & exchanged) << 4
    data = np.ascontiguousarray(block.shared.read(at.reshape(-1), size))
    if block.races:
        block.races.product(block.group, at.reshape(-1), size, block.place)
    if size == 4:
        return _cut(data.view(U32).reshape(rows, depth))
    return _halves(data.view(np.uint16).reshape(rows, depth), kind)
