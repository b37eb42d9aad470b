"""The instructions of a cubin, as `nvdisasm` writes them."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton

__all__ = ["Instruction", "Listing", "listing"]

_TOOL = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
_LABEL = re.compile(r"^(\.L_x_\d+):")
_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PARTS = re.compile(r"(?:@(!?U?P\w+)\s+)?(\S+)\s*(.*)$")
_COMMA = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True, slots=True)
class Instruction:
    """`@predicate opcode operands`; an opcode's parts are what dots divide."""

    address: int
    predicate: str
    opcode: tuple[str, ...]
    operands: tuple[str, ...]
    text: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode[0]


@dataclass(frozen=True, slots=True)
class Listing:
    """The instructions in order, and at which of them each label stands."""

    instructions: tuple[Instruction, ...]
    labels: dict[str, int]


def listing(cubin: bytes) -> Listing:
    """Takes a cubin with one kernel apart."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([_TOOL, "-c", file.name], capture_output=True, text=True, check=True).stdout
    found: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in said.splitlines():
        label, code = _LABEL.match(line.strip()), _LINE.match(line)
        if label:
            labels[label[1]] = len(found)
        elif code:
            text = code[2].replace(".reuse", "").strip()
            parts = _PARTS.match(text)
            assert parts is not None, text
            operands = tuple(part.strip() for part in _COMMA.split(parts[3])) if parts[3] else ()
            found.append(Instruction(int(code[1], 16), parts[1] or "", tuple(parts[2].split(".")), operands, text))
    return Listing(tuple(found), labels)
