"""dual_core's recurrent mode from Python; its variants:

composed   uw_transform, then slow_core's scan with S_fast in the same pass: every option
scan       the exact rule: gated_delta_rule's preparation and scan, S_fast in the same pass; chunks of whole blocks
split      the same with every sequence cut into segments that begin chunks and run side by side
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.dual_core import DualCore
from titans_backends.contracts.uw_transform import CONTRACT as TRANSFORM
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from . import slow_core, uw_transform
from .dual_exact import exact, exact_candidates
from .dual_flat import HOPPER
from .dual_inputs import core_weights, unit_operands
from .serving import narrow_warps, tile_width
from .slow_scan import Tiling, slow_scan

__all__ = ["recurrent", "recurrent_candidates", "transform_signature"]

_SOURCES = tuple(
    f"titans_backends.backends.triton.{name}"
    for name in (
        "dual_recurrent", "dual_inputs", "uw_transform", "uw_blocks", "slow_core", "slow_scan", "decay", "inverse", "grid", "launch", "serving",
    )
)  # fmt: skip
_COMPOSED = 3
_TRANSFORM_PREFIX = "transform_"


def recurrent_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """For the exact rule its own schedules first, then the composition."""
    found = exact_candidates(signature, machine)
    return [*found, *_composed_candidates(signature, machine, 1 if found else _COMPOSED)]


def _composed_candidates(signature: Signature, machine: Machine, most: int) -> list[Candidate]:
    """The transform's default before each of the scan's first candidates, and the transform's second before its default."""
    transforms = uw_transform.candidates(transform_signature(signature), machine)
    scans = slow_core.candidates(replace(signature, batch_invariant=True), machine)[: most + 1]  # the same for any number of heads
    if machine.sm is not None and machine.sm in HOPPER:
        transforms = [_careful(signature, way) for way in transforms]
    found = [_joined(transforms[0], scan) for scan in scans[:most]] if transforms else []
    if len(transforms) > 1 and scans:
        found.append(_joined(transforms[1], scans[0]))
    return found


def _careful(signature: Signature, transform: Candidate) -> Candidate:
    """With the warps that are right for narrow products outside of a pipelined loop."""
    chosen = dict(transform.params)
    if transform.variant != "block" and not chosen.get("pairs"):
        return transform
    keys, values = tile_width(signature.dim("K")), tile_width(signature.dim("V"))
    rows = int(chosen["block"]) if transform.variant == "block" else max(int(chosen["block"]), keys)
    chosen["warps"] = narrow_warps(signature.dtype, rows, min(int(chosen["columns"]), keys, values), int(chosen["warps"]))
    return replace(transform, params=tuple(chosen.items()))


def _joined(transform: Candidate, scan: Candidate) -> Candidate:
    prefixed = tuple((_TRANSFORM_PREFIX + name, value) for name, value in transform.params)
    return Candidate("triton", "composed", (*scan.params, (f"{_TRANSFORM_PREFIX}variant", transform.variant), *prefixed), sources=_SOURCES)


def transform_signature(signature: Signature) -> Signature:
    """The signature of the u and w inside, of at least a chunk of tokens: a chunk_offset, which no key has, may put few tokens at a chunk's end."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    dims = tuple((letter, max(size, chunk) if letter == "T" else size) for letter, size in signature.dims)
    names = {option.name for option in TRANSFORM.options}
    options = tuple((name, value) for name, value in signature.options if name in names)
    tensors = tuple((name, facts) for name, facts in signature.tensors if name in TRANSFORM.argument_by_name)
    return Signature(
        op=TRANSFORM.name,
        device=signature.device,
        dtype=signature.dtype,
        dims=dims,
        options=options,
        tensors=tensors,
        launch=signature.launch,
        float32=signature.float32,
        deterministic=signature.deterministic,
        batch_invariant=signature.batch_invariant,
    )


def recurrent(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` and both final states `[N, H, K, V]` in float32, None unless asked."""
    return _composed(call, dict(candidate.params)) if candidate.variant == "composed" else exact(call, candidate)


def _composed(call: DualCore, params: Mapping[str, Param]) -> tuple[Tensor | None, ...]:
    q, k = unit_operands(call)
    weights = core_weights(call)
    inner = {name.removeprefix(_TRANSFORM_PREFIX): value for name, value in params.items() if name.startswith(_TRANSFORM_PREFIX)}
    transform = Candidate("triton", str(inner.pop("variant")), tuple(inner.items()))
    u, w = uw_transform.transformed(
        UWTransform(k, call.v, call.beta, call.g, chunk_size=call.chunk_size, transform=call.transform, cu_seqlens=call.cu_seqlens),
        transform,
        call.chunk_offset,
    )
    tiling = Tiling(int(params["block"]), int(params["block_v"]), int(params["warps"]), int(params["stages"]), str(params["dot"]))
    return slow_scan(
        q, k, u, w if call.delta else None, tiling, g=call.g, chunk_decay=call.chunk_decay, gate=weights[1], chunk_size=call.chunk_size,
        scale=call.scale, initial_state=call.initial_state, output_final_state=call.output_final_state, cu_seqlens=call.cu_seqlens,
        normalize_read=call.normalize_read, normalize_final=call.normalize_final, v=call.v, beta=call.beta, fast_gate=weights[0],
        initial_fast_state=call.initial_fast_state, chunk_offset=call.chunk_offset,
    )  # fmt: skip
