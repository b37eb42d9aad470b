"""The peers' own functions as `race.py` calls them: the op's tensors in, o and the final state out, whatever conversion that takes included.

FLA and FlashQLA take the tensors as they are (`training_peers`); FlashInfer wants sequences packed, the decay as a factor and gives the state with its
sides exchanged. FLA's rule without a decay computes something else: it is timed beside the others and wins nothing.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import cast

import torch
from race_cells import Case
from torch import Tensor
from training_peers import UNGATED
from training_peers import loaded as loaded_with_backward

__all__ = ["TITLES", "Function", "hurried", "loaded", "releases", "takes"]

Function = Callable[[Mapping[str, Tensor], bool], tuple[Tensor | None, ...]]
"""From q, k, v, beta, g and whether the final state is asked for, to o and that."""
TITLES = {"fla": "FLA", "flash_qla": "FlashQLA", "flashinfer": "FlashInfer", "fla_ungated": "FLA without a decay"}
_DISTRIBUTIONS = {
    "fla": ("fla-core",), "flash_qla": ("flash_qla",), "flashinfer": ("flashinfer-python",), "fla_ungated": ("fla-core",),
    "tilelang": ("tilelang",), "triton": ("triton",), "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"), "numba": ("numba-cuda",),
}  # fmt: skip


def loaded(names: Iterable[str]) -> tuple[dict[str, Function], dict[str, str]]:
    """The functions, and why the others cannot be had."""
    found: dict[str, Function] = {}
    absent: dict[str, str] = {}
    for name in names:
        try:
            if name == "flashinfer":
                found[name] = _flashinfer()
                continue
            function = loaded_with_backward([name]).get(name)
            if function is None:
                absent[name] = "its package is not importable, or lacks what its backward wants; see the log"
                continue
            found[name] = _ungated(function) if name == "fla_ungated" else _gated(function)
        except Exception as error:  # whatever a stranger's import raises
            absent[name] = f"{type(error).__name__}: {str(error)[:200]}"
    return found, absent


def _gated(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Function:
    return lambda x, state: function(x["q"], x["k"], x["v"], x["g"], x["beta"], output_final_state=state)


def _ungated(function: Callable[..., tuple[Tensor, Tensor | None]]) -> Function:
    """It has no grouped heads, and wants beta in q's dtype."""

    def run(x: Mapping[str, Tensor], state: bool) -> tuple[Tensor | None, ...]:
        times = x["v"].shape[2] // x["q"].shape[2]
        q, k = (x[name].repeat_interleave(times, 2) if times > 1 else x[name] for name in ("q", "k"))
        return function(q, k, x["v"], x["beta"].to(q.dtype), output_final_state=state)

    return run


def _flashinfer() -> Function:
    function = cast("Callable[..., tuple[Tensor, Tensor]]", _flashinfer_module().chunk_gated_delta_rule)

    def run(x: Mapping[str, Tensor], state: bool) -> tuple[Tensor | None, ...]:
        batch, tokens = x["q"].shape[:2]
        q, k, v = (x[name].flatten(0, 1) for name in ("q", "k", "v"))
        ends = torch.arange(batch + 1, device=q.device, dtype=torch.int64) * tokens
        o, final = function(q, k, v, x["g"].exp().flatten(0, 1), x["beta"].flatten(0, 1), None, None, True, ends, max_seqlen=tokens)
        return o.view(batch, tokens, *o.shape[1:]), final.transpose(-1, -2) if state else None

    return run


def _flashinfer_module() -> ModuleType:
    """Its prefill module. Its package imports much that the rule does not need; where some of that is missing the package is stood in for by a bare one."""
    try:
        return importlib.import_module("flashinfer.gdn_prefill")
    except Exception as error:  # whatever its top-level import raises
        spec = importlib.util.find_spec("flashinfer")
        if spec is None or spec.submodule_search_locations is None:
            raise
        print(f"flashinfer: imported as a bare package: {type(error).__name__}: {str(error)[:160]}", file=sys.stderr, flush=True)
        for name in [name for name in sys.modules if name.split(".")[0] == "flashinfer"]:
            del sys.modules[name]
        bare = ModuleType("flashinfer")
        bare.__path__ = list(spec.submodule_search_locations)
        bare.__dict__["__version__"] = version("flashinfer-python")
        sys.modules["flashinfer"] = bare
        return importlib.import_module("flashinfer.gdn_prefill")


def takes(name: str, case: Case) -> bool:
    """Whether a peer's own function is measured on a case."""
    if name == "fla_ungated":
        return str(case.cell) in UNGATED
    return name == "fla" or (case.cell.D == 128 and (name == "flash_qla" or case.mode == "forward"))


def hurried() -> None:
    """FLA's kernels tune themselves with Triton's autotuner, which is made to measure a configuration for a few milliseconds."""
    if importlib.util.find_spec("triton") is not None:
        from against_fla import hurry

        hurry()


def releases() -> dict[str, str]:
    """The versions of what takes part, as far as it is installed."""
    found = {}
    for name, distributions in _DISTRIBUTIONS.items():
        for one in distributions:
            try:
                found.setdefault(name, version(one))
            except PackageNotFoundError:
                continue
    return found
