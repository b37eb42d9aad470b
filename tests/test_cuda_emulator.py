"""The emulator that stands for a GPU in the CuPy backend's tests: what it must find wrong, it finds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from titans_backends.backends.cupy import launch, sources

from tests import cuda_emulator

pytestmark = pytest.mark.skipif(cuda_emulator.missing() is not None, reason=str(cuda_emulator.missing()))

_HEAD = '#include "warp.cuh"\nstruct Params { float* out; const float* in; };\nextern "C" __global__ void probe(const __grid_constant__ Params p) {'
_RUNS = {
    "shared memory starts as NaN": ("SHARED_MEMORY(m); p.out[threadIdx.x] = reinterpret_cast<float*>(m)[threadIdx.x];", "nan"),
    "a block's threads meet": (
        "SHARED_MEMORY(m); float* s = reinterpret_cast<float*>(m); s[threadIdx.x] = threadIdx.x; __syncthreads(); p.out[threadIdx.x] = s[63 - threadIdx.x];",
        "reversed",
    ),
    "a copy lands when it is waited for": (
        "SHARED_MEMORY(m); float* s = reinterpret_cast<float*>(m); if (threadIdx.x < 16) cp_async_16(s + 4 * threadIdx.x, p.in + 4 * threadIdx.x, true);"
        "cp_async_commit(); cp_async_wait<0>(); __syncthreads(); p.out[threadIdx.x] = s[threadIdx.x];",
        "input",
    ),
    "a copy does not land before": (
        "SHARED_MEMORY(m); float* s = reinterpret_cast<float*>(m); if (threadIdx.x < 16) cp_async_16(s + 4 * threadIdx.x, p.in + 4 * threadIdx.x, true);"
        "cp_async_commit(); __syncthreads(); p.out[threadIdx.x] = s[threadIdx.x];",
        "nan",
    ),
}
_FAULTS = {
    "a barrier that some threads pass by": ("if (threadIdx.x < 40) __syncthreads();\n__syncthreads();", "divergence"),
    "a named barrier that too few threads reach": ("if (threadIdx.x < 32) barrier_sync(1, 64);", "deadlock"),
    "a shuffle that half a warp does not reach": ("if (threadIdx.x % 32 < 16) p.out[0] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);", "deadlock"),
    "two instructions in one warp": ("if (threadIdx.x % 2) __syncwarp(); else p.out[0] = warp_sum(1.0f);", "other lanes"),
    "a vector load between two vectors": ("p.out[threadIdx.x] = reinterpret_cast<const float4*>(p.in + 1)->x;", "misaligned"),
    "an asynchronous copy to an odd place": ("SHARED_MEMORY(m); cp_async_16(m + 4, p.in, true);", "misaligned"),
    "a write behind shared memory": ("SHARED_MEMORY(m); m[256 + threadIdx.x] = 1;", "shared memory: byte 256 was written"),
}


def _run(body: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[torch.Tensor, torch.Tensor]:
    """One block of 64 threads with 256 bytes of shared memory: what it wrote and what it was given."""
    text = f"{_HEAD}\n{body}\n}}"
    closure = {"probe.cu": text, **sources.closure("warp.cuh")}
    monkeypatch.setattr(sources, "closure", lambda name: closure)
    (folder / "probe.cu").write_text(text)
    given, out = torch.arange(64.0), torch.zeros(64)
    with launch.using(cuda_emulator.EmulatorEngine(folder, include=(folder,))):
        launch.Kernel("probe.cu", "probe", "PP")((1, 1, 1), 64, (), (out, given), 256)
    return out, given


@pytest.mark.parametrize("name", _RUNS)
def test_a_block_sees_what_a_gpu_would_show_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, wanted = _RUNS[name]
    out, given = _run(body, tmp_path, monkeypatch)
    if wanted == "nan":
        assert out.isnan().all()
    else:
        assert torch.equal(out, given.flip(0) if wanted == "reversed" else given)


@pytest.mark.parametrize("name", _FAULTS)
def test_a_fault_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body, sentence = _FAULTS[name]
    with pytest.raises(cuda_emulator.EmulatorError, match=sentence):
        _run(body, tmp_path, monkeypatch)


def test_a_race_shows_in_the_other_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = f"{_HEAD} SHARED_MEMORY(m); int* s = reinterpret_cast<int*>(m); s[0] = threadIdx.x; __syncthreads(); p.out[threadIdx.x] = s[0]; }}"
    monkeypatch.setattr(sources, "closure", lambda name: {"probe.cu": text})
    (tmp_path / "probe.cu").write_text(text)
    first, second = torch.zeros(64), torch.zeros(64)
    kernel = launch.Kernel("probe.cu", "probe", "PP")
    with launch.using(cuda_emulator.EmulatorEngine(tmp_path, include=(tmp_path,))):
        for out in (first, second):
            kernel((1, 1, 1), 64, (), (out, out), 256)
    assert not torch.equal(first, second)
