"""coupled_core in Triton: all that does not hang on the states in parallel, the walk of both states over the chunks, the output in parallel.

    prepared   chunks of at most 64 tokens: coupled_prepare, the walk (coupled_walks), the output: three launches, four with `qk_l2norm`
    walked     longer ones: uw_transform's default, the factors, the walk, the outputs (coupled_chunks): one more

Between the launches stand, a chunk and head, the factors and both states in float32, K^2 + 3 K V numbers: at 1x8192, 12 heads of 32, chunks of 64, 25 MB.
The states are one program's a v head: above 64 x 64 they lie in memory (coupled_wide). The backward is coupled_gradients'.

Served is what an H100 has examined: K of up to 32 and V of up to 64 (trained in float32 32), float32 and bfloat16, chunks of up to 64; of longer ones
float32 alone. float16 missed its tolerances.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate, Param
from titans_backends.contracts.coupled_core import CoupledCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict, refused

from . import uw_transform
from .ahead import ahead_of
from .coupled_chunks import OUTPUTS
from .coupled_gradients import backward_candidates, run_backward
from .coupled_prepare import READ
from .coupled_states import MAKE, Plan, Walked, grid_of, parts_of, prepared, shares_of, sizes_of, tile_of, walk_bytes, walked, walks
from .dual_recurrent import transform_signature
from .grid import strides
from .program import remembering, remembering_backward
from .serving import CONSUMER_SHARED_BYTES, dots, serves

__all__ = ["backward_candidates", "candidates", "compile_ahead", "remember", "remember_backward", "run", "run_backward", "supports"]

EXAMINED = {"K": 32, "V": 64}
"""The widest tiles of both directions that were right on a card."""
EXAMINED_TRAINED = {"V": 32}
"""The same in training in float32, where that is less."""
_BLOCK = 64
_FLOAT16 = (
    "dtype float16 misses its tolerances: of 46 cases on an H100 5 were wrong (o by 3.5e-3 of 3e-3, dpsi by 1.6e-2 and dalpha by 3.5e-2 of 1e-2); "
    "use bfloat16 or float32, or backend='eager'"
)


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Of what the backend serves that which a card has examined, where the tiles fit the card; the same in both directions."""
    verdict = serves(signature, machine)
    if signature.dtype == torch.float16:
        verdict &= refused(_FLOAT16)
    trained = signature.dtype == torch.float32 and signature.regime == "training"
    for letter, widest in {**EXAMINED, **(EXAMINED_TRAINED if trained else {})}.items():
        if signature.dim(letter) > widest:
            which = ", trained in float32" if trained and letter in EXAMINED_TRAINED else ""
            verdict &= refused(
                f"head_dim {letter}={signature.dim(letter)} is above {widest}, the widest that a card has examined{which}; use backend='eager'"
            )
    chunk = signature.option("chunk_size")
    if signature.dtype == torch.bfloat16 and isinstance(chunk, int) and chunk > _BLOCK:
        verdict &= refused(f"chunk_size={chunk} is above {_BLOCK}, the longest that a card has examined in bfloat16; use float32, or backend='eager'")
    if verdict and not candidates(signature, machine):
        sizes = f"K={signature.dim('K')}, V={signature.dim('V')}"
        verdict = refused(f"no tiles of {sizes} fit the shared memory of {machine.name}; use backend='eager'")
    return verdict


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Warps and stages of the walk, which limits the op; the first is the default."""
    chunk = signature.option("chunk_size")
    assert isinstance(chunk, int)
    room = machine.shared_memory_bytes or CONSUMER_SHARED_BYTES
    made = [None] if chunk <= _BLOCK else uw_transform.candidates(transform_signature(signature), machine)[:1]
    return [plan for make in made for plan in _plans(signature, chunk, make) if shared_bytes(signature, plan, machine) <= room]


def _plans(signature: Signature, chunk: int, make: Candidate | None) -> list[Candidate]:
    """Ways through the walk, behind a transform where a chunk is more than one block."""
    keys, values = tile_of(signature.dim("K")), tile_of(signature.dim("V"))
    ways = walks(keys, values, backward=False)
    staged = [(*way, 1, False) for way in ways] if ways[0][1] else [(*ways[0], 3, False), (4, 0, 3, True), (*ways[1], 3, False), (*ways[0], 2, False)]
    block = min(64 if keys <= 64 else 32, tile_of(chunk)) if make else tile_of(chunk)
    found = []
    for walk_warps, walk_tile, walk_stages, walk_pair in staged:
        params: dict[str, Param] = {
            "block": block,
            "tile": min(64 if keys <= 64 else 32, max(keys, values)),
            "warps": 8 if keys > 64 else 4,
        }
        params |= {"walk_warps": walk_warps, "walk_stages": walk_stages, "walk_tile": walk_tile, "walk_pair": walk_pair, "dot": dots(signature)[0]}
        if make is not None:
            params |= {f"{MAKE}variant": make.variant, **{MAKE + name: value for name, value in make.params}}
        found.append(Candidate("triton", "walked" if make else "prepared", tuple(params.items()), sources=_SOURCES))
    return found


def shared_bytes(signature: Signature, candidate: Candidate, machine: Machine) -> int:
    """An upper bound of a program's shared memory: the walk's pipeline and the state turned into an operand; the outputs' operands."""
    params = dict(candidate.params)
    keys, values, block = tile_of(signature.dim("K")), tile_of(signature.dim("V")), int(params["block"])
    outputs = 4 * parts_of(params, machine) * (2 * block * keys + min(int(params["tile"]), values) * max(block, keys) + block * block)
    return max(walk_bytes(params, machine, keys, values, matrices=1, products=1 + bool(params["walk_pair"])), outputs) + 1024


def run(call: CoupledCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o `[B, T, H, V]` in v's dtype and both final states `[N, H, K, V]` in float32, None unless asked."""
    plan, call = Plan.of(dict(candidate.params)), prepared(call)
    found = walked(call, plan, finals=call.output_final_state, operands=plan.make is not None, outputs=plan.make is None)
    o = torch.empty(call.v.shape, dtype=call.v.dtype, device=call.v.device)
    (_outputs if plan.make is not None else _read)(call, plan, found, o)
    return o, found.final, found.final_fast


def _read(call: CoupledCore, plan: Plan, found: Walked, o: Tensor) -> None:
    """The output of chunks of one block."""
    sequences, slots, heads, keys, values = sizes_of(call)
    shares, number = shares_of(call)
    args = (
        found.factors.reader, found.factors.inside, *shares, found.starts, found.numbers, o, call.cu_seqlens, o.shape[1],
        0 if call.cu_seqlens is None else sequences, number, *(step for x in shares for step in strides(x)),
    )  # fmt: skip
    tile = min(plan.tile, tile_of(values))
    constants = (heads, keys, values, grid_of(call), plan.block, tile_of(keys), tile, plan.dot)
    READ(slots * heads * -(-values // tile), args, constants, 4, 1)


def _outputs(call: CoupledCore, plan: Plan, found: Walked, o: Tensor) -> None:
    """The output of chunks of any length."""
    sequences, slots, heads, keys, values = sizes_of(call)
    (u, w), (shares, number) = (found.factors.u, found.factors.w), shares_of(call)
    chunk, tile, tokens = grid_of(call), min(plan.tile, tile_of(values)), o.shape[1]
    per = -(-min(chunk, tokens) // plan.block)
    args = (
        call.q, call.k, u, w, *shares, found.starts, found.numbers, o, call.cu_seqlens, tokens, 0 if call.cu_seqlens is None else sequences, per, number,
        float(call.scale), *strides(call.q), *strides(call.k), *strides(u), *strides(w), *(step for x in shares for step in strides(x)),
    )  # fmt: skip
    constants = (heads, heads // max(call.k.shape[2], 1), keys, values, chunk, plan.block, tile_of(keys), tile, plan.dot, 2)
    OUTPUTS(slots * per * heads * -(-values // tile), args, constants, plan.warps, 2)


_SOURCES = tuple(
    f"titans_backends.backends.triton.{name}"
    for name in (
        "coupled_states", "coupled_prepare", "coupled_walks", "coupled_wide", "coupled_chunks", "dual_inputs", "dual_recurrent", "uw_transform", "uw_blocks", "decay",
        "inverse", "grid", "launch", "rounding", "serving",
    )
)  # fmt: skip
compile_ahead = ahead_of(run, "coupled_core", run_backward)
remember, remember_backward = remembering(run), remembering_backward(run_backward)
