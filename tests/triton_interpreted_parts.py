"""What the Triton backend's kernels share, in Triton's interpreter: where packed tokens lie, and the inverse on hostile blocks.

Runs as `TRITON_INTERPRET=1 pytest tests/triton_interpreted_parts.py`; `test_triton_interpreter.py` starts it.
"""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("triton_interpreted_parts.py wants the interpreter: TRITON_INTERPRET=1 pytest tests/triton_interpreted_parts.py")
pytest.importorskip("triton")

import triton
import triton.language as tl
from titans_backends.backends.triton import probe
from titans_backends.backends.triton.grid import locate, slot_count, unit_stride
from titans_backends.backends.triton.inverse import unit_lower_inverse
from titans_backends.backends.triton.launch import Kernel

from tests.triton_interpreter_once import hasten
from titans_backends.machine import detect

hasten()


@triton.jit
def _locate(cu_seqlens, out, tokens, sequences, offset, UNIT: tl.constexpr):
    slot = tl.program_id(0)
    row, sequence, index, first, begin, end = locate(cu_seqlens, slot, tokens, sequences, offset, UNIT)
    tl.store(out + slot * 6 + 0, row)
    tl.store(out + slot * 6 + 1, sequence)
    tl.store(out + slot * 6 + 2, index)
    tl.store(out + slot * 6 + 3, first)
    tl.store(out + slot * 6 + 4, begin)
    tl.store(out + slot * 6 + 5, end)


@triton.jit
def _invert(lower, out, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    row = tl.arange(0, BLOCK)
    at = row[:, None] * BLOCK + row[None, :]
    tl.store(out + at, unit_lower_inverse(tl.load(lower + at), BLOCK, tl.float32, PRECISION))


LOCATE, INVERT = Kernel(_locate), Kernel(_invert)


def slots(tokens: int, unit: int, lengths: tuple[int, ...] | None, batch: int = 1, offset: int = 0) -> list[tuple[int, ...]]:
    """Every slot's (row, sequence, index, first token, begin, end) where it holds a token."""
    ends = None if lengths is None else torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    count = slot_count(batch, tokens, unit, ends, offset)
    out = torch.full((count, 6), -1, dtype=torch.int32)
    LOCATE(count, (ends, out, tokens, batch if lengths is None else len(lengths), offset), (unit,), 1, 1)
    return [tuple(line) for line in out.tolist() if max(line[3], line[4]) < line[5]]


def units(length: int, unit: int, offset: int) -> range:
    """The indices of the units that a sequence touches when it begins `offset` tokens into its first one."""
    return range(-(-(length + offset) // unit) if length else 0)


@pytest.mark.parametrize(("unit", "offset"), [(1, 0), (16, 0), (64, 0), (100, 0), (16, 3), (64, 63)])
@pytest.mark.parametrize(
    "lengths", [(65,), (0,), (0, 0, 1), (64, 64), (63, 1, 0, 130, 0, 2), (1,) * 20, (0, 200, 0), (16, 0, 16, 0, 16)], ids=lambda lengths: f"{lengths}"
)
def test_each_unit_of_each_sequence_has_one_slot(unit: int, offset: int, lengths: tuple[int, ...]) -> None:
    want, begin = [], 0
    for sequence, length in enumerate(lengths):
        end = begin + length
        want += [(0, sequence, index, begin - offset + index * unit, begin, end) for index in units(length, unit, offset)]
        begin = end
    assert slots(begin, unit, lengths, offset=offset) == want


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize("tokens", [1, 63, 64, 65])
def test_dense_rows_are_sequences_of_their_own(tokens: int, offset: int) -> None:
    want = [(row, row, index, index * 32 - offset, 0, tokens) for row in range(3) for index in units(tokens, 32, offset)]
    assert slots(tokens, 32, None, batch=3, offset=offset) == want


@pytest.mark.parametrize("block", [16, 32, 64])
@pytest.mark.parametrize("keys", ["random", "equal", "alternating", "none"])
def test_the_inverse_holds_on_similar_keys(block: int, keys: str) -> None:
    source = torch.Generator().manual_seed(block)
    k = torch.randn(block, 32, generator=source, dtype=torch.float64)
    if keys != "random":
        k = torch.ones_like(k) + 0.01 * k
    if keys == "alternating":
        k[1::2] *= -1
    k /= k.norm(dim=1, keepdim=True)
    beta = 2 * torch.rand(block, 1, generator=source, dtype=torch.float64)
    lower = torch.tril(beta * (k @ k.T), -1).float() if keys != "none" else torch.zeros(block, block)
    out = torch.full((block, block), float("nan"))
    INVERT(1, (lower, out), (block, "ieee"), 4, 2)
    want = torch.linalg.inv(torch.eye(block, dtype=torch.float64) + lower.double())
    assert torch.equal(out, out.tril())
    assert float((out - want).abs().max()) < 2e-6 * max(1.0, float(want.abs().max()))


def test_rows_that_are_not_contiguous_are_copied_and_others_are_not() -> None:
    x = torch.randn(2, 3, 4, 5)
    assert unit_stride(x) is x
    assert unit_stride(x.transpose(1, 2)).data_ptr() == x.data_ptr()
    assert unit_stride(x.transpose(2, 3)).stride(-1) == 1
    assert unit_stride(x[..., :1]).data_ptr() == x.data_ptr()


def test_the_probe_accepts_what_is_right() -> None:
    assert probe.probe(detect("cpu")), probe.probe(detect("cpu"))


def test_the_probe_refuses_what_is_wrong_or_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", lambda call, candidate: (torch.zeros_like(call.v), None))
    assert str(probe.probe(detect("cpu"))).startswith("the smallest case is wrong: o: 1.0e+00")

    def broken(call: object, candidate: object) -> tuple[torch.Tensor | None, ...]:
        raise RuntimeError("no C compiler\nand more")

    monkeypatch.setattr(probe, "run", broken)
    assert str(probe.probe(detect("cpu"))) == "the smallest case failed: RuntimeError: no C compiler"
