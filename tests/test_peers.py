"""The adapters of FLA, FlashQLA and FlashInfer, on likenesses of those packages (`tests/peer_likenesses/`) that compute on the eager backend in float64.

So what is tested is ours: arguments, layouts, refusals, switches, versions, and that an import happens when it is wanted and no earlier. What the real
packages compute is seen on a GPU alone; where FLA is installed, its real signatures are asked.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch

import titans_backends as tb
from tests import fresh
from titans_backends import dispatch, plans, registry
from titans_backends.backend import Candidate
from titans_backends.buckets import bucket_of, defaults_of
from titans_backends.cache import file, paths
from titans_backends.cache.schema import Entry, device_of
from titans_backends.conformance import Item, examine
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build, cases
from titans_backends.contracts.validate import validate
from titans_backends.facts import signature_of
from titans_backends.integrations.fla import register_with_fla
from titans_backends.machine import Machine
from titans_backends.offers import offer, offers, source_modules
from titans_backends.signature import Signature
from titans_backends.tables import current_environment

pytest.importorskip("triton", reason="FLA needs Triton, and its adapter looks for it")

LIKENESSES = Path(__file__).with_name("peer_likenesses")
PEERS = {"fla": ("fla", "einops"), "flash_qla": ("flash_qla", "tilelang"), "flashinfer": ("flashinfer", "cutlass")}
ROOTS = {root for roots in PEERS.values() for root in roots} | {"peer_math"}
H100 = Machine("cuda", "NVIDIA H100", "nvidia_h100", sm=90, sms=132)
A100 = Machine("cuda", "NVIDIA A100", "nvidia_a100", sm=80, sms=108)


def adapter(name: str) -> Any:
    return importlib.import_module(f"titans_backends.backends.{name}")


def shared() -> Any:
    return importlib.import_module("titans_backends.backends.peers")


def forget() -> None:
    shared().version_of.cache_clear()
    shared()._FAILED.clear()
    tb.reset()


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The likenesses in a folder of their own, first on the path; an nvcc; no shipped table, an empty user's cache."""
    folder = tmp_path / "site"
    shutil.copytree(LIKENESSES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "cuda" / "bin").mkdir(parents=True)
    (tmp_path / "cuda" / "bin" / "nvcc").touch()
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("FLA_FLASH_QLA", "FLA_INTRACARD_CP", "FLA_TILELANG", "FLA_DISABLE_BACKEND_DISPATCH", "TITANS_BACKENDS_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "shipped_paths", tuple)
    monkeypatch.syspath_prepend(str(folder))
    forget()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] in ROOTS]:
        del sys.modules[name]
    monkeypatch.undo()
    forget()


@pytest.fixture
def on_cpu(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The site, and adapters that serve the CPU too, last of all as on a GPU: so calls go the whole way."""
    found = registry._found()
    ranked = {name: replace(one, rank={"cuda": 9, "cpu": 9}) if name in PEERS else one for name, one in found.backends.items()}
    answer = replace(found, backends=MappingProxyType(ranked))
    monkeypatch.setattr(registry, "_found", functools.lru_cache(maxsize=1)(lambda: answer))
    plans.invalidate()
    return site


def seen() -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = importlib.import_module("peer_math").SEEN
    return calls


def ran() -> list[str]:
    return [call["function"] for call in seen()]


def case(**changes: Any) -> Case:
    base = Case("a", B=1, T=70, G=1, H=2, K=128, V=128, dtype=torch.bfloat16, options={"output_final_state": True}, given=("g",))
    return replace(base, **changes)


def signature(op: str = "gated_delta_rule", *, regime: str = "inference", launch: str = "eager", **changes: Any) -> Signature:
    made = contract(op)
    call = build(made, case(**changes), "cpu")
    return signature_of(made, call, validate(made, call), regime=regime, launch=launch)  # type: ignore[arg-type]


def refusal(name: str, machine: Machine = H100, op: str = "gated_delta_rule", **changes: Any) -> str:
    return str(offer(registry.get(name), signature(op, **changes), machine).verdict)


def labels(name: str, machine: Machine = H100, **changes: Any) -> tuple[list[str], list[str]]:
    found = offer(registry.get(name), signature(**changes), machine)
    assert found.verdict, found.verdict
    return [one.label for one in found.forward], [one.label for one in found.backward]


# what runs, and whether it is right

WORTH = (
    "gated, transposed", "gated, expanded", "gated, misaligned", "gated, grouped heads", "gated, correlated keys, beta 0 1 2", "gated, g 0 and -20", "gated, T=1", "plain",
    "normalized keys", "given chunk", "gated, packed with empty sequences", "plain, packed with empty sequences", "normalized keys, packed with empty sequences",
)  # fmt: skip


def worth(op: str, dtype: torch.dtype) -> list[Case]:
    """Cases of the contract in which an adapter can go wrong."""
    return [one for one in cases(contract(op), dtype) if one.name in WORTH or one.name.startswith(WORTH[0])]


@pytest.mark.parametrize("name", PEERS)
def test_what_it_serves_is_right_through_get_op_and_through_every_candidate(name: str, on_cpu: Path) -> None:
    passed: dict[str, list[str]] = {"inference": [], "training": []}
    for one in worth("gated_delta_rule", torch.bfloat16):
        sized = one if name == "fla" else replace(one, K=128, V=128, T=min(one.T, 66))
        for regime in ("inference",) if name == "flashinfer" else ("inference", "training"):
            result = examine(Item(name, "gated_delta_rule", sized, regime))  # type: ignore[arg-type]
            assert result.status == "passed", (one.name, regime, result)
            assert all(kernel.partition("/")[0].rpartition(" ")[2] == name for kernel in result.kernels), result.kernels
            passed[regime].append(one.name)
    print(passed)
    assert len(passed["inference"]) >= 10


def test_nothing():
    import titans_backends.contracts.case as c
    print([x.name for x in cases(contract("gated_delta_rule"), torch.bfloat16)])
