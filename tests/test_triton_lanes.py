"""What Triton 3.6's LLVM makes of a packed pair of numbers is found in PTX and mended, and nothing else is touched."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

if find_spec("triton") is None:
    pytest.skip("the package triton is not installed: pip install -c constraints.txt -e '.[test]'", allow_module_level=True)

import triton
from titans_backends.backends.triton.lanes import compiled, mended, spilling
from triton import knobs

WRONG = """\
	mul.wide.u32 	%rd7, %r3, 268435456;
	shl.b64 	%rd8, %rd6, 36;
	or.b64 	%rd9, %rd7, %rd8;
	mov.b64 	{%r10, %r11}, %rd9;
	mul.wide.u32 	%rd20, %r4, 2;
	add.s64 	%rd21, %rd1, %rd20;
"""


JOIN = "or.b64 \t%rd9, %rd7, %rd8;"
CUT = "\tand.b64 \t%rd9, %rd7, 4294967295;\n\tor.b64 \t%rd9, %rd9, %rd8;"


def test_of_a_lane_that_reaches_into_the_other_the_lower_32_bits_are_joined() -> None:
    assert spilling(WRONG) == [JOIN.replace("\t", "\t")]
    assert mended(WRONG) == WRONG.replace(f"\t{JOIN}", CUT)


def test_mended_code_is_mended_once() -> None:
    assert not spilling(mended(WRONG))
    assert mended(mended(WRONG)) == mended(WRONG)


def test_the_order_of_the_two_halves_does_not_matter() -> None:
    assert mended(WRONG.replace("%rd7, %rd8;", "%rd8, %rd7;")) == mended(WRONG)


def test_what_reads_the_lane_whole_keeps_it() -> None:
    whole = WRONG + "\tadd.s64 \t%rd30, %rd2, %rd7;\n"
    assert mended(whole) == mended(WRONG) + "\tadd.s64 \t%rd30, %rd2, %rd7;\n"


def test_registers_of_another_function_are_others() -> None:
    function = ".visible .entry one()\n{{\n{0}}}\n.visible .entry two()\n{{\n{1}}}\n"
    product, rest = WRONG.split("\n", 1)
    assert not spilling(function.format(f"{product}\n", rest))
    assert len(spilling(function.format(WRONG, WRONG))) == 2
    assert not spilling(mended(function.format(WRONG, WRONG)))


@pytest.mark.parametrize(
    ("text", "other"),
    [
        ("mov.b64 \t{%r10, %r11}, %rd9;", "st.global.b64 \t[%rd2], %rd9;"),
        ("shl.b64 \t%rd8, %rd6, 36;", "shl.b64 \t%rd8, %rd6, 4;"),
        ("mul.wide.u32 \t%rd7, %r3, 268435456;", "cvt.u64.u32 \t%rd7, %r3;"),
    ],
    ids=["a 64-bit number", "no upper half", "a lane of 32 bits"],
)
def test_what_is_right_stays_as_it_is(text: str, other: str) -> None:
    assert text in WRONG
    right = WRONG.replace(text, other)
    assert mended(right) == right


@pytest.mark.parametrize(("version", "mends"), [("3.6.0", True), ("3.7.1", False)])
def test_what_triton_36_compiles_is_mended_and_its_hook_put_back(version: str, mends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiling(source: str, target: object, options: dict[str, int], **asked: dict[str, str]) -> tuple[str, bool]:
        """As Triton 3.6 does it: the hook may change the stages before they run."""
        stages = {"ptx": lambda module, metadata: source}
        if knobs.runtime.add_stages_inspection_hook is not None:
            knobs.runtime.add_stages_inspection_hook(object(), stages, options, None, 90)
        return stages["ptx"](None, None), "titans_backends" in asked.get("_env_vars", {})

    others: list[object] = []

    def before(*given: object) -> None:
        others.append(given)

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton, "compile", compiling)
    monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", before)
    made, own_entry = compiled(WRONG, {"num_warps": 1})
    assert made == (mended(WRONG) if mends else WRONG)
    assert own_entry == mends
    assert len(others) == 1
    assert knobs.runtime.add_stages_inspection_hook is before
