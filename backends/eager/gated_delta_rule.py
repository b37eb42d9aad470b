"""gated_delta_rule: u and w of a slab at once, the state chunk by chunk; or token by token where there are few (SPEC.md 3, 4, 10).

The rule is the same on every chunk grid, so a given chunk_size above 512 runs on blocks of 64. A packed call's cu_seqlens is read on the host.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GRID, GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .causal import row_sum
from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .delta_rule import RuleInputs
from .delta_scan import DeltaScan
from .packing import refuse_packed_graph
from .recurrence import retreat
from .scratch import chunk_bytes, slab_budget
from .token_recurrence import Tokens, token_steps
from .triangular import DEPENDS_ON_PLACE
from .unit_norm import unit
from .workspace import Workspace

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("q", "k", "v", "beta", "g", "gate", "initial_state")
_WANTS = {"q": "q", "k": "k", "v": "u", "beta": "u", "g": "g", "gate": "y", "initial_state": "state"}
_FREE = ((32, "blocks"), (64, "blocks"), (16, "blocks"), (32, "solve"))
_FREE_TRAINING = ((GRID, "blocks"), (32, "blocks"))
_LARGEST = 512
_FEW = 16


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but packed calls in a captured graph."""
    return refuse_packed_graph(signature)


def _chunked(chunk: int, inverse: str) -> Candidate:
    return Candidate("eager", "chunked", (("chunk_size", chunk), ("inverse", inverse)), batch_invariant=inverse not in DEPENDS_ON_PLACE)


def _grids(signature: Signature) -> list[tuple[int, str]]:
    """Chunk sizes and inverses, the default first."""
    asked = signature.option("chunk_size")
    if asked is not None:
        chunk = int(asked) if int(asked) <= _LARGEST else GRID
        return [(chunk, "blocks"), (chunk, "solve")]
    free = _FREE if signature.regime == "inference" else _FREE_TRAINING
    tokens = signature.dim("T")
    return [free[0], *(pair for pair in free[1:] if pair[0] < 2 * tokens)]


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Chunk sizes, where the call leaves them free, ways to the inverse, and the token loop for up to 16 tokens; in training with kept states too."""
    found = [_chunked(chunk, inverse) for chunk, inverse in _grids(signature)]
    if signature.regime == "training":
        grid = signature.option("chunk_size") or GRID
        saving = [replace(one, saves_states=True) for one in found if one.param("chunk_size") == grid] if signature.may_save else []
        return saving + found
    if 0 < signature.dim("T") <= _FEW and not (signature.packed or signature.batch_invariant or signature.option("chunk_size")):
        return [Candidate("eager", "tokens"), *found]
    return found


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """The reverse sweep, from kept states or from recomputed ones."""
    return [replace(one, direction="backward") for one in candidates(replace(signature, regime="training"), machine)]


class _Rule:
    """A call on a chunk grid."""

    def __init__(self, call: GatedDeltaRule, chunk: int, inverse: str) -> None:
        self.call, v = call, call.v
        self.heads, self.dtype = v.shape[2], compute_dtype(v)
        self.widths = (call.k.shape[3], v.shape[3])
        self.grid = ChunkGrid(v.shape[0], v.shape[1], chunk, cu_seqlens=call.cu_seqlens, device=v.device)
        scale = _scale(call)
        self.inputs = RuleInputs(call.q, call.k, v, call.beta, call.g, None, scale, call.qk_l2norm, "exact", inverse, True)

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        size = chunk_bytes(self.heads, self.grid.chunk, *self.widths, self.dtype, states=5 if backward else 0)
        return list(self.grid.slabs(size, slab_budget(self.call.v.device, backward=backward)))

    def states(self, given: Tensor | None) -> Tensor:
        return self.grid.states(given, self.call.v, self.heads, self.widths)

    def scan(self, *, outputs: bool = True) -> DeltaScan:
        call, x = self.call, self.inputs
        workspace = Workspace(self.dtype, call.v.device)
        return DeltaScan(self.grid, call.q, call.k, call.v, call.beta, call.g, x.scale, x.qk_l2norm, x.inverse, workspace, outputs)

    def forward(self, *, save: bool) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        state = self.states(call.initial_state)
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        saved = torch.empty(*self.grid.per_chunk_shape, *state.shape[1:], dtype=state.dtype, device=v.device) if save else None
        scan = self.scan()
        for slab in self.slabs():
            starts = None if saved is None else torch.empty(slab.size, *state.shape[1:], dtype=state.dtype, device=v.device)
            y = scan.advance(state, slab, starts)
            assert y is not None
            if call.gate is not None:
                y.mul_(self.grid.gather(slab, call.gate, self.heads, self.dtype))
            self.grid.scatter(slab, y, o)
            if saved is not None and starts is not None:
                self.grid.scatter_per_chunk(slab, starts, saved)
        final = self.grid.in_call_order(state) if call.output_final_state else None
        return (o, final) if saved is None else (o, final, saved)

    def backward(self, d_o: Tensor | None, d_final: Tensor | None, saved: Tensor | None, needs: frozenset[str]) -> dict[str, Tensor]:
        call, slabs = self.call, self.slabs(backward=True)
        d_state = self.states(d_final)
        recomputed = self._starts(slabs) if saved is None else d_state[:0]
        want = frozenset(_WANTS[name] for name in needs)
        if needs & {"k", "beta", "g"}:
            want |= {"u", "w"}
        out = {name: torch.empty_like(getattr(call, name), memory_format=torch.contiguous_format) for name in needs - {"initial_state"}}
        for slab in reversed(slabs):
            begun = recomputed[slab.first : slab.last] if saved is None else self.grid.gather_per_chunk(slab, saved, self.dtype)
            self._backward_slab(slab, d_state, begun, d_o, want, needs, out)
        if "initial_state" in needs and call.initial_state is not None:
            out["initial_state"] = self.grid.in_call_order(d_state).to(call.initial_state.dtype)
        return out

    def _starts(self, slabs: list[Slab]) -> Tensor:
        """The state at every chunk's start, by a sweep forward."""
        state, scan = self.states(self.call.initial_state), self.scan(outputs=False)
        starts = torch.empty(self.grid.chunks, *state.shape[1:], dtype=self.dtype, device=state.device)
        for slab in slabs:
            scan.advance(state, slab, starts[slab.first : slab.last])
        return starts

    def _backward_slab(
        self, slab: Slab, d_state: Tensor, starts: Tensor, d_o: Tensor | None, want: frozenset[str], needs: frozenset[str], out: dict[str, Tensor]
    ) -> None:
        rule = self.inputs.load(self.grid, slab)
        x = rule.operands()
        do = None if d_o is None else self.grid.gather(slab, d_o, self.heads, self.dtype)
        gate = None if self.call.gate is None else self.grid.gather(slab, self.call.gate, self.heads, self.dtype)
        d = retreat(d_state, slab, x, starts, do if do is None or gate is None else do * gate, normalize_read=False, want=want)
        if "gate" in out and d.y is not None:
            self.grid.scatter(slab, torch.zeros_like(d.y[..., :1]) if do is None else row_sum(do, d.y), out["gate"])
        if not needs & {"q", "k", "v", "beta", "g"}:
            return
        found = rule.gradients(x, d, needs)
        for name, grad in (("q", found.q), ("k", found.k), ("v", found.v), ("beta", found.beta), ("g", found.g)):
            if name in out and grad is not None:
                self.grid.scatter(slab, grad, out[name])


def _scale(call: GatedDeltaRule) -> float:
    return float(call.k.shape[-1] ** -0.5 if call.scale is None else call.scale)


def _by_token(call: GatedDeltaRule) -> tuple[Tensor | None, ...]:
    """o and the final state by the token loop; the tokens are one chunk of the grid."""
    v = call.v
    heads, dtype = v.shape[2], compute_dtype(v)
    grid = ChunkGrid(v.shape[0], v.shape[1], v.shape[1], device=v.device)
    state = grid.states(call.initial_state, v, heads, (call.k.shape[3], v.shape[3]))
    o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    for slab in grid.slabs(1, max(grid.chunks, 1)):
        q, k, values, beta = (grid.gather(slab, x, heads, dtype) for x in (call.q, call.k, v, call.beta))
        decay = None if call.g is None else grid.gather(slab, call.g, heads, dtype).exp_()
        if call.qk_l2norm:
            q, k = unit(q), unit(k)
        y = token_steps(Tokens(q * _scale(call), k, values, beta, decay), state)
        if call.gate is not None:
            y.mul_(grid.gather(slab, call.gate, heads, dtype))
        grid.scatter(slab, y, o)
    return o, state if call.output_final_state else None


def _plan(call: GatedDeltaRule, candidate: Candidate) -> _Rule:
    return _Rule(call, int(candidate.param("chunk_size")), str(candidate.param("inverse")))


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o, the final state, and the chunk-start states where the candidate keeps them."""
    if candidate.variant == "tokens":
        return _by_token(call)
    return _plan(call, candidate).forward(save=candidate.saves_states)


def run_backward(
    call: GatedDeltaRule, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, gate and initial_state, in that order."""
    given = frozenset(name for name in needs if getattr(call, name) is not None)
    found = _plan(call, candidate).backward(grads[0], grads[1], states, given)
    return tuple(found.get(name) for name in _INPUTS)
