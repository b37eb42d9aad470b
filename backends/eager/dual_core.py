"""dual_core: both cores on one slab, so that q, k, v are gathered once and Q K^T is shared; or composed of fast_core and gated_delta_rule.

A packed call's cu_seqlens is read on the host. The composed form is for the exact rule, whose own chunk size is free (SPEC.md 5).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import ACCEPTED, Verdict

from .causal import row_sum, scores
from .chunk_grid import ChunkGrid, Slab, compute_dtype
from .delta_rule import RuleInputs, RuleSlab
from .dual_composed import WHOLE, composed_backward, composed_forward
from .fast_chunks import fast_backward, fast_forward
from .frobenius import normalized, normalized_backward
from .packing import refuse_packed_graph
from .recurrence import OperandGradients, Operands, advance, chunk_starts, read, retreat
from .scratch import HeadRange, by_heads, chunk_bytes, head_ranges, refuse_huge_chunk, slab_budget
from .triangular import DEPENDS_ON_PLACE, INVERSES

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]

_INPUTS = ("q", "k", "v", "beta", "g", "fast_gate", "slow_gate", "alpha", "chunk_decay", "initial_state", "initial_fast_state")
_AXES = (2, 2, 2, 2, 2, 2, 2, 2, 2, 1, 1)
_LARGEST_SHARED = 512
"""Tokens of the largest chunk on which the exact rule still shares the fast core's grid."""


def _is_exact_rule(signature: Signature) -> bool:
    """Whether S_slow is the exact delta rule on any grid, which `composed` needs."""
    options = dict(signature.options)
    return (
        options["memory"] == "recurrent"
        and options["transform"] == "exact"
        and bool(options["delta"])
        and not options["normalize_read"]
        and not signature.has("chunk_decay")
    )


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Everything but packed calls in a captured graph, and chunks above 4096 tokens where S_slow depends on them."""
    return refuse_packed_graph(signature) & (ACCEPTED if _is_exact_rule(signature) else refuse_huge_chunk(signature))


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Sharing one grid with either inverse, or composed with the slow core on chunks of 32 or 64, which a CPU runs first: measured faster there."""
    chunk = min(int(signature.option("chunk_size") or 1), max(1, signature.dim("T")))
    exact, graph = _is_exact_rule(signature), signature.launch == "graph"
    inverses = INVERSES if signature.option("transform") == "exact" else INVERSES[:1]
    shared = [Candidate("eager", "shared", (("inverse", inverse),), batch_invariant=inverse not in DEPENDS_ON_PLACE) for inverse in inverses]
    captured = not graph or chunk <= WHOLE  # beyond that S_fast runs in blocks, which a captured graph cannot
    composed = [Candidate("eager", "composed", (("slow_chunk_size", size),)) for size in (32, 64)] if exact and captured else []
    usable = shared if chunk <= _LARGEST_SHARED or not exact or graph else []
    return [*composed, *usable] if machine.kind == "cpu" else [*usable, *composed]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """As forward, from recomputed states."""
    return [replace(candidate, direction="backward") for candidate in candidates(signature, machine)]


class _Shared:
    """A call on its chunk grid."""

    def __init__(self, call: DualCore, inverse: str) -> None:
        self.call, v = call, call.v
        self.heads, self.dtype, self.device = v.shape[2], compute_dtype(v), v.device
        self.widths = (call.k.shape[3], v.shape[3])
        self.grid = ChunkGrid(v.shape[0], v.shape[1], call.chunk_size, offset=call.chunk_offset, cu_seqlens=call.cu_seqlens, device=v.device)
        self.recurrent = call.memory == "recurrent"
        delta = call.delta and self.recurrent
        self.inputs = RuleInputs(call.q, call.k, v, call.beta, call.g, call.chunk_decay, call.scale, call.qk_l2norm, call.transform, inverse, delta)
        self.carry = self.states(call.initial_fast_state) if call.chunk_offset and call.initial_fast_state is not None else None
        self.alpha = call.alpha.expand(v.shape[:3]) if isinstance(call.alpha, Tensor) else None

    def states(self, given: Tensor | None) -> Tensor:
        return self.grid.states(given, self.call.v, self.heads, self.widths)

    def slabs(self, *, backward: bool = False) -> list[Slab]:
        size = chunk_bytes(self.heads, self.grid.chunk, *self.widths, self.dtype, states=5 if backward and self.recurrent else 0)
        return list(self.grid.slabs(2 * size, slab_budget(self.device, backward=backward)))

    def gather(self, slab: Slab, x: Tensor | None) -> Tensor | None:
        return None if x is None else self.grid.gather(slab, x, self.heads, self.dtype)

    def operands(self, slab: Slab) -> Operands:
        return self.inputs.load(self.grid, slab).operands()

    def blend(self, slab: Slab) -> Tensor | float:
        """alpha on the slab's rows, or the number."""
        if self.alpha is None:
            assert not isinstance(self.call.alpha, Tensor)
            return self.call.alpha
        return self.grid.gather(slab, self.alpha, self.heads, self.dtype)

    def forward(self) -> tuple[Tensor | None, ...]:
        call, v = self.call, self.call.v
        o = torch.empty(v.shape, dtype=v.dtype, device=v.device)
        state = self.states(call.initial_state) if self.recurrent else None
        fast_final = self.states(call.initial_fast_state) if call.output_final_state else None
        for slab in self.slabs():
            rule = self.inputs.load(self.grid, slab)
            m = scores(rule.q, rule.k, None)
            fast = fast_forward(self.grid, slab, _fast_operands(rule), m, self.carry, fast_final)
            x = rule.operands()
            held = None if state is None else advance(state, slab, x, normalize_read=call.normalize_read, outputs=True)
            slow = read(x, held, m if rule.decay is None else m.mul_(rule.decay.pair))
            fast_gate, slow_gate, alpha = self.gather(slab, call.fast_gate), self.gather(slab, call.slow_gate), self.blend(slab)
            fast.mul_(alpha if fast_gate is None else fast_gate.mul_(alpha))
            slow.mul_(1 - alpha if slow_gate is None else slow_gate.mul_(1 - alpha))
            self.grid.scatter(slab, fast.add_(slow), o)
        if state is None or not call.output_final_state or fast_final is None:
            return o, None, None
        final = normalized(state) if call.normalize_final else state
        return o, self.grid.in_call_order(final), self.grid.in_call_order(fast_final)

    def backward(self, grads: tuple[Tensor | None, ...], needs: frozenset[str]) -> dict[str, Tensor]:
        call, slabs = self.call, self.slabs(backward=True)
        d_state, starts = self.states(grads[1]), None
        if self.recurrent:
            state = self.states(call.initial_state)
            starts = chunk_starts(state, self.grid, slabs, self.operands, normalize_read=call.normalize_read)
            if call.normalize_final:
                d_state = normalized_backward(state, d_state)
        d_fast = None if grads[2] is None else self.states(grads[2])
        d_carry = self.states(None)
        if d_fast is not None:  # a sequence without tokens returns its initial state
            rows = slice(self.grid.alive[0] if self.grid.alive else 0, None)
            d_carry[rows] = d_fast[rows]
        out = {name: self._target(name) for name in needs - {"initial_state", "initial_fast_state"}}
        for slab in reversed(slabs):
            self._backward_slab(slab, d_state, None if starts is None else starts[slab.first : slab.last], grads[0], d_fast, d_carry, needs, out)
        if "alpha" in out and isinstance(call.alpha, Tensor):
            out["alpha"] = _reduced(out["alpha"], call.alpha)
        for name, grad in (("initial_state", d_state), ("initial_fast_state", d_carry)):
            if name in needs:
                out[name] = self.grid.in_call_order(grad).to(getattr(call, name).dtype)
        return out

    def _target(self, name: str) -> Tensor:
        if name == "alpha":
            return torch.empty(self.call.v.shape[:3], dtype=self.dtype, device=self.device)
        return torch.empty_like(getattr(self.call, name), memory_format=torch.contiguous_format)

    def _backward_slab(
        self,
        slab: Slab,
        d_state: Tensor,
        starts: Tensor | None,
        d_o: Tensor | None,
        d_fast: Tensor | None,
        d_carry: Tensor,
        needs: frozenset[str],
        out: dict[str, Tensor],
    ) -> None:
        call, rule = self.call, self.inputs.load(self.grid, slab)
        do, alpha = self.gather(slab, d_o), self.blend(slab)
        gates = (self.gather(slab, call.fast_gate), self.gather(slab, call.slow_gate))
        shares = [share if gate is None else gate * share for gate, share in zip(gates, (alpha, 1 - alpha), strict=True)]
        inner = frozenset(name for name in ("q", "k", "g") if name in needs)
        through_u = {"u"} if needs & {"k", "v", "beta", "g"} else set()
        x = rule.operands()
        want = inner | through_u | ({"w"} if needs & {"k", "beta", "g"} else set()) | ({"y"} if needs & {"slow_gate", "alpha"} else set())
        want |= {"factor"} if "chunk_decay" in needs else set()
        want |= {"state"} if "initial_state" in needs else set()
        slow = retreat(d_state, slab, x, starts, None if do is None else do * shares[1], normalize_read=call.normalize_read, want=frozenset(want))
        want_fast = (inner - {"g"}) | through_u | ({"y"} if needs & {"fast_gate", "alpha"} else set())
        dy_fast = None if do is None else do * shares[0]
        fast = fast_backward(self.grid, slab, _fast_operands(rule), dy_fast, self.carry, d_fast, d_carry, frozenset(want_fast))
        self._gate_gradients(slab, do, gates, alpha, fast.y, slow.y, out)
        if "chunk_decay" in out and slow.factor is not None:
            self.grid.scatter_per_chunk(slab, slow.factor[..., 0, 0], out["chunk_decay"])
        if needs & {"q", "k", "v", "beta", "g"}:
            self._input_gradients(slab, rule, x, slow, fast, needs, out)

    def _gate_gradients(
        self,
        slab: Slab,
        do: Tensor | None,
        gates: tuple[Tensor | None, Tensor | None],
        alpha: Tensor | float,
        fast: Tensor | None,
        slow: Tensor | None,
        out: dict[str, Tensor],
    ) -> None:
        """dgates and dalpha from both Y."""
        shape = (slab.size, self.heads, self.grid.chunk, 1)
        zero = torch.zeros(shape, dtype=self.dtype, device=self.device)
        by_fast = zero if do is None or fast is None else row_sum(do, fast)
        by_slow = zero if do is None or slow is None else row_sum(do, slow)
        if "fast_gate" in out:
            self.grid.scatter(slab, by_fast * alpha, out["fast_gate"])
        if "slow_gate" in out:
            self.grid.scatter(slab, by_slow * (1 - alpha), out["slow_gate"])
        if "alpha" in out:
            fast_part, slow_part = (part if gate is None else part * gate for part, gate in zip((by_fast, by_slow), gates, strict=True))
            self.grid.scatter(slab, fast_part - slow_part, out["alpha"])

    def _input_gradients(
        self, slab: Slab, rule: RuleSlab, x: Operands, slow: OperandGradients, fast: OperandGradients, needs: frozenset[str], out: dict[str, Tensor]
    ) -> None:
        """Joins both cores' gradients of q, k and of b⊙v."""
        slow.q, slow.k = _sum(slow.q, fast.q), _sum(slow.k, fast.k)
        found = rule.gradients(x, slow, needs)
        if fast.u is not None:
            found.v += fast.u * rule.beta
            found.beta = found.beta + row_sum(fast.u, rule.v)
        for name, grad in (("q", found.q), ("k", found.k), ("v", found.v), ("beta", found.beta), ("g", found.g)):
            if name in out and grad is not None:
                self.grid.scatter(slab, grad, out[name])


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _fast_operands(rule: RuleSlab) -> Operands:
    """S_fast takes b⊙v, and neither g nor chunk_decay."""
    return Operands(rule.q, rule.k, rule.transform.x, None, None, None)


def _reduced(grad: Tensor, alpha: Tensor) -> Tensor:
    """dalpha `[B, T, H]` summed to alpha's shape."""
    return (grad.sum_to_size(alpha.shape) if alpha.dim() else grad.sum()).to(alpha.dtype)


def _ranges(call: DualCore) -> list[HeadRange]:
    return head_ranges(call.v.shape[2], call.q.shape[2], min(call.chunk_size, call.v.shape[1]), compute_dtype(call.v))


def run(call: DualCore, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and both final states."""
    if candidate.variant == "composed":
        return composed_forward(call, int(candidate.param("slow_chunk_size")))
    ranges = _ranges(call)
    if len(ranges) > 1:
        return by_heads(call, ranges, lambda part, _: run(part, candidate), (2, 1, 1))
    return _Shared(call, str(candidate.param("inverse"))).forward()


def run_backward(
    call: DualCore, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g, fast_gate, slow_gate, alpha, chunk_decay, initial_state and initial_fast_state, in that order."""
    given = frozenset(name for name in needs if isinstance(getattr(call, name), Tensor))
    ranges = _ranges(call)
    if candidate.variant == "composed":
        found = composed_backward(call, grads, given, int(candidate.param("slow_chunk_size")))
    elif len(ranges) > 1:

        def part(narrowed: DualCore, heads: HeadRange) -> tuple[Tensor | None, ...]:
            return run_backward(narrowed, (heads.of(grads[0], 2), heads.of(grads[1], 1), heads.of(grads[2], 1)), None, needs, candidate)

        return by_heads(call, ranges, part, _AXES)
    else:
        found = _Shared(call, str(candidate.param("inverse"))).backward(grads, given)
    return tuple(found.get(name) for name in _INPUTS)
