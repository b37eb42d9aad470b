"""FLA's gates in one launch: the code that torch compiles for a GPU, compiled here by the C++ compiler, and who is given it."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.cuda.jiterator import _CodeParser

from titans_backends.integrations import fla as ours
from titans_backends.integrations.fla import gates

COMPILER = shutil.which("c++")
LOOP = """
extern "C" void run(int n, float* g, float* beta, float* a, float* bias, float factor, float* decay, float* rate) {{
  for (int i = 0; i < n; i++) delta_gates<float>(g[i], beta[i], a[i], {bias}factor, decay[i], rate[i]);
}}
"""


@pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler on PATH: c++")
@pytest.mark.parametrize("biased", [False, True])
def test_the_code_of_the_one_launch_is_the_gates(biased: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = []
    monkeypatch.setattr(torch.cuda.jiterator, "_create_multi_output_jit_fn", lambda code, outputs, **numbers: texts.append((code, outputs, numbers)))
    gates._together.__wrapped__(biased)
    ((code, outputs, numbers),) = texts
    assert (_CodeParser(code).function_name, outputs, numbers) == ("delta_gates", 2, {"factor": 1.0})
    source, made = tmp_path / "gates.cpp", tmp_path / "gates.so"
    source.write_text("#include <cmath>\n#include <math.h>\n" + code + LOOP.format(bias="bias[i], " if biased else ""))
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", made, source], check=True)
    values = torch.tensor(
        list(itertools.product([-90.0, -8.0, -0.5, 0.0, 3.0, 19.0, 25.0, 90.0], [-30.0, 0.0, 2.0, 40.0], [-3.0, 0.0, 2.7], [-1.0, 4.0]))
    )
    g, beta, a, bias = (x.contiguous() for x in values.unbind(1))
    decay, rate = torch.empty_like(g), torch.empty_like(g)
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (g, beta, a, bias, decay, rate)]
    ctypes.CDLL(str(made)).run(len(g), *pointers[:4], ctypes.c_float(2.0), *pointers[4:])
    for each in range(len(g)):  # a head each
        wanted = gates.decay_of("here", g[each : each + 1].double(), a[each : each + 1], bias[each : each + 1] if biased else None)
        torch.testing.assert_close(decay[each : each + 1].double(), wanted, rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(rate.double(), gates.rate_of(beta.double(), True, True), rtol=1e-6, atol=1e-30)


class OnGpu:
    """What `_in_one` asks of a tensor on a GPU."""

    is_cuda, device, requires_grad = True, "cuda:0", False

    def __init__(self, shape: tuple[int, ...] = (2, 1, 4), dtype: torch.dtype = torch.float32, **facts: object) -> None:
        self.shape, self.dtype = shape, dtype
        for name, value in facts.items():
            setattr(self, name, value)

    def numel(self) -> int:
        return 8

    def stride(self) -> tuple[int, ...]:
        return (4, 4, 1)

    def data_ptr(self) -> int:
        return 0


def test_lengths_without_end_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(gates, "_warm", set())
    monkeypatch.setattr(gates, "_MOST_WARM", 3)
    for length in range(1, 9):
        assert gates._in_one((OnGpu((2, length, 4)), OnGpu((2, length, 4)), OnGpu((4,))))  # type: ignore[arg-type]  # a stand-in for a GPU's tensor
        assert len(gates._warm) <= 3


def test_one_launch_is_for_loaded_plain_calls_of_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(gates, "_warm", set())

    def able(g: OnGpu | None = None, beta: OnGpu | None = None, a: OnGpu | None = None) -> bool:
        return gates._in_one((g or OnGpu(), beta or OnGpu(), a or OnGpu((4,))))  # type: ignore[arg-type]

    half, double = OnGpu(dtype=torch.bfloat16), OnGpu(dtype=torch.float64)
    capturing = True
    assert not able()  # what is not loaded cannot be now
    capturing = False
    assert able()
    capturing = True
    assert able()
    assert not able(half)
    capturing = False
    assert able(half, half)
    assert not able(half, half, OnGpu((4,), torch.bfloat16))  # nothing says float32
    assert not able(double)
    assert not able(OnGpu((2, 1, 1)))
    assert not able(OnGpu(is_cuda=False))
    assert not able(a=OnGpu((4,), device="cuda:1"))
    assert not able(a=OnGpu((4,), requires_grad=True))
    with torch.no_grad():
        assert able(a=OnGpu((4,), requires_grad=True))


@pytest.mark.parametrize("biased", [False, True])
def test_what_the_one_launch_returns_reaches_the_rule(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def together(g: Tensor, beta: Tensor, a: Tensor, bias: Tensor | None = None, *, factor: float) -> tuple[Tensor, Tensor]:
        calls.append((a.shape, None if bias is None else bias.shape, factor))
        return -a.exp() * torch.nn.functional.softplus(g if bias is None else g + bias), factor * beta.sigmoid()

    calls: list[object] = []
    made = torch.Generator().manual_seed(0)
    q, k, v = (torch.nn.functional.normalize(torch.randn(2, 1, 4, 8, generator=made), dim=-1) for _ in range(3))
    g, beta, a, bias = (torch.randn(*shape, generator=made) for shape in ((2, 1, 4), (2, 1, 4), (1, 4), (4,)))
    on = ("use_gate_in_kernel", "use_beta_sigmoid_in_kernel", "allow_neg_eigval", "output_final_state")
    given = {"g": g, "beta": beta, "A_log": a, "dt_bias": bias if biased else None, "initial_state": torch.randn(2, 4, 8, 8, generator=made)}

    def call() -> tuple[Tensor, Tensor | None]:
        return ours.fused_recurrent_gated_delta_rule(q, k, v, **given, **dict.fromkeys(on, True))

    want = call()
    monkeypatch.setattr(gates, "_in_one", lambda given: True)
    monkeypatch.setattr(gates, "_together", lambda asked: together if asked == biased else None)
    torch.testing.assert_close(call(), want)
    assert calls == [(torch.Size([4]), torch.Size([4]) if biased else None, 2.0)]
    given["A_log"] = a[:, :3]
    with pytest.raises(ValueError, match=r"A_log has shape \(1, 3\), but g has 4 heads"):
        call()
