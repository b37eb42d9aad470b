"""Instructions that read and write memory: the tensors', shared, a thread's own; matrices by row; asynchronous copies, which are done when they are waited for."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from tests.hopper_emulator.block import U32, Block, Lanes
from tests.hopper_emulator.listing import Instruction

__all__ = ["OPERATIONS"]

_MATRIX_ROW = 16


def _bytes(one: Instruction) -> int:
    return next((size for name, size in (("U8", 1), ("U16", 2), ("64", 8), ("128", 16)) if name in one.opcode), 4)


def load(block: Block, one: Instruction) -> None:
    """LDG, LDS and LDL."""
    to, at = one.operands[:2]
    if to == "RZ" or not block.active.any():
        return
    addresses, size = block.address(at), _bytes(one)
    if one.name == "LDG":
        data = block.memory.read(addresses, size)
    elif one.name == "LDS":
        data = block.shared.read(addresses, size)
        if block.races:
            block.races.reads(block.lane[block.active] // 32, addresses, size, block.place)
    else:
        data = block.local[addresses[:, None] + np.arange(size), block.lane[block.active][:, None]]
    words = np.zeros((addresses.size, max(size, 4)), np.uint8)
    words[:, :size] = data
    for index, word in enumerate(words.view(U32).T):
        held = np.zeros(block.threads, U32)
        held[block.active] = word
        block.write(to, held, index)


def store(block: Block, one: Instruction) -> None:
    """STG, STS and STL."""
    if not block.active.any():
        return
    addresses, size = block.address(one.operands[0]), _bytes(one)
    words = np.stack(block.many(one.operands[1], max(size // 4, 1)), -1)[block.active]
    data = np.ascontiguousarray(words).view(np.uint8)[:, :size]
    if one.name == "STG":
        block.memory.write(addresses, data)
    elif one.name == "STS":
        block.shared.write(addresses, data)
        if block.races:
            block.races.writes(block.lane[block.active] // 32, addresses, size, block.place)
    else:
        block.local[addresses[:, None] + np.arange(size), block.lane[block.active][:, None]] = data


def copy(block: Block, one: Instruction) -> None:
    """LDGSTS: from memory to shared memory, zeros where its predicate is false."""
    if not block.active.any():
        return
    to, source, size = block.address(one.operands[0]), block.address(one.operands[1]), _bytes(one)
    wanted = block.predicate(one.operands[2])[block.active] if len(one.operands) > 2 else np.ones(to.size, np.bool_)
    data = np.zeros((to.size, size), np.uint8)
    if wanted.any():
        data[wanted] = block.memory.read(source[wanted], size)
    warps = block.lane[block.active] // 32
    for warp in np.unique(warps):
        block.copying[warp].append((to[warps == warp], data[warps == warp]))
    if block.races:
        block.races.writes(warps, to, size, block.place, lands=False)


def commit(block: Block, one: Instruction) -> None:
    """LDGDEPBAR: the copies so far are a group."""
    for warp in np.unique(block.lane[block.active] // 32):
        block.committed[warp].append(block.copying[warp])
        block.copying[warp] = []


def wait(block: Block, one: Instruction) -> None:
    """DEPBAR: until so many groups are left."""
    left = int(one.operands[1], 16)
    for warp in np.unique(block.lane[block.active] // 32):
        while len(block.committed[warp]) > left:
            for to, data in block.committed[warp].pop(0):
                block.shared.write(to, data)
                if block.races:
                    block.races.landed(int(warp), to, data.shape[1])


def _rows(block: Block, operand: str, matrix: int) -> NDArray[np.int64]:
    """Where the eight rows of each warp's matrix lie: eight threads hold their addresses."""
    return block.address(operand).reshape(-1, 32)[:, 8 * matrix : 8 * matrix + 8].reshape(-1)


def _count(one: Instruction) -> int:
    return int(one.opcode[-1]) if one.opcode[-1].isdigit() else 1


def load_matrices(block: Block, one: Instruction) -> None:
    """LDSM: 8 x 8 of 16 bits, a row's pair to each thread; MT: a column's."""
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4
    found: list[Lanes] = []
    for matrix in range(_count(one)):
        rows = _rows(block, one.operands[1], matrix)
        data = block.shared.read(rows, _MATRIX_ROW)
        if block.races:
            block.races.reads(np.repeat(block.warps_of(block.active), 8), rows, _MATRIX_ROW, block.place)
        held = np.ascontiguousarray(data).view(np.uint16).reshape(-1, 8, 8)
        if "MT88" in one.opcode:
            held = held.transpose(0, 2, 1)
        lower, upper = held[:, row, 2 * pair], held[:, row, 2 * pair + 1]
        words = np.zeros(block.threads, U32)
        words[block.active] = (lower.astype(U32) | upper.astype(U32) << U32(16)).reshape(-1)
        found.append(words)
    for index, word in enumerate(found):
        block.write(one.operands[0], word, index)


def store_matrices(block: Block, one: Instruction) -> None:
    """STSM: the other way."""
    lane = np.arange(32)
    row, pair = lane // 4, lane % 4
    for matrix, word in enumerate(block.many(one.operands[1], _count(one))):
        given = word[block.active].reshape(-1, 32)
        held = np.zeros((given.shape[0], 8, 8), np.uint16)
        held[:, row, 2 * pair], held[:, row, 2 * pair + 1] = given & U32(0xFFFF), given >> U32(16)
        if "MT88" in one.opcode:
            held = held.transpose(0, 2, 1)
        rows = _rows(block, one.operands[0], matrix)
        block.shared.write(rows, np.ascontiguousarray(held).view(np.uint8).reshape(-1, _MATRIX_ROW))
        if block.races:
            block.races.writes(np.repeat(block.warps_of(block.active), 8), rows, _MATRIX_ROW, block.place)


OPERATIONS: Mapping[str, Callable[[Block, Instruction], None]] = {
    **dict.fromkeys(("LDG", "LDS", "LDL"), load),
    **dict.fromkeys(("STG", "STS", "STL"), store),
    "LDGSTS": copy,
    "LDGDEPBAR": commit,
    "DEPBAR": wait,
    "LDSM": load_matrices,
    "STSM": store_matrices,
}
"""By name."""
