"""dual_core: two scans, the second onto the first one's o (SPEC.md 5).

    o = (1 - alpha) slow_gate scale (...)  +  alpha fast_gate scale (...)

S_fast takes b V, in chunks of the call. S_slow as the exact rule goes token by token or in chunks of any size; every other form, and the flat memory,
in chunks of the call. Gates and alpha are folded into each row's coefficient, so nothing is merged afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.dual_core import DualCore, is_exact_rule
from titans_backends.launching.remember import from_values
from titans_backends.launching.tape import Again
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .launches import TRANSFORMS, Launch, Sizes, bounds_of, chunk_launch, maker, new, token_launch
from .serving import refuse_chunk, serves, tokens_are_less

__all__ = ["candidates", "remember", "run", "supports"]

Outputs = tuple[Tensor | None, ...]

_SHARED = {"q": "q", "k": "k", "v": "v", "beta": "beta", "mix": "alpha"}
_SLOW = {**_SHARED, "g": "g", "gate": "slow_gate", "chunk_decay": "chunk_decay", "start": "initial_state"}
_FAST = {**_SHARED, "gate": "fast_gate", "start": "initial_fast_state"}
_CHUNK = 32
_WIDE = 64
_ALPHA, _ONE_MINUS_ALPHA = 1, 2


def _exact(signature: Signature) -> bool:
    """As `is_exact_rule` of the call."""
    option = signature.option
    recurrent = option("memory") == "recurrent" and option("transform") == "exact"
    return recurrent and bool(option("delta")) and not option("normalize_read") and not signature.has("chunk_decay")


def supports(signature: Signature, machine: Machine) -> Verdict:
    """float32 on a CPU; chunks of up to 512 tokens where S_slow is not the exact rule."""
    verdict = serves(signature, machine)
    return verdict if _exact(signature) else verdict & refuse_chunk(signature)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """Each core in chunks or token by token, where it can be."""
    fast = ["tokens", "chunks"] if tokens_are_less(signature) else ["chunks", "tokens"]
    if not refuse_chunk(signature):
        fast = ["tokens"]
    slow = ["chunks"]
    if _exact(signature) and not signature.option("normalize_final"):
        slow = ["tokens", "chunks"] if min(signature.dim("K"), signature.dim("V")) <= _WIDE else ["chunks", "tokens"]
    return [Candidate("numba_cpu", f"slow_{one}_fast_{other}") for one in slow for other in fast]


def run(call: DualCore, candidate: Candidate) -> Outputs:
    """o, the final state and the final fast state."""
    return _again(call, candidate)(call)


def remember(call: DualCore, candidate: Candidate) -> tuple[Outputs, Again]:
    """`run`, and what repeats it."""
    again = _again(call, candidate)
    return again(call), from_values(DualCore, again)


def _slow(call: DualCore, sizes: Sizes, variant: str, options: dict[str, int | float]) -> Launch:
    options = {**options, "mixing": _ONE_MINUS_ALPHA, "normalize_read": call.normalize_read, "normalize_final": call.normalize_final}
    options |= {"delta": call.delta, "transform": TRANSFORMS[call.transform]}
    if variant.startswith("slow_tokens"):
        return token_launch(call, sizes, _SLOW, options)
    if is_exact_rule(call):
        return chunk_launch(call, sizes, _SLOW, _CHUNK, options)
    flat = call.memory == "flat"
    return chunk_launch(call, sizes, _SLOW, call.chunk_size, {**options, "reset": flat, "offset": call.chunk_offset if flat else 0})


def _fast(call: DualCore, sizes: Sizes, variant: str, options: dict[str, int | float]) -> Launch:
    options = {**options, "mixing": _ALPHA, "accumulate": 1, "delta": 0, "reset": 1, "chunk": call.chunk_size, "offset": call.chunk_offset}
    if variant.endswith("fast_tokens"):
        return token_launch(call, sizes, _FAST, options)
    return chunk_launch(call, sizes, _FAST, call.chunk_size, options)


def _again(call: DualCore, candidate: Candidate) -> Callable[[DualCore], Outputs]:
    sizes = Sizes.of(call.k, call.v, call.cu_seqlens)
    options: dict[str, int | float] = {"scale": call.scale, "l2norm": call.qk_l2norm}
    if not isinstance(call.alpha, Tensor):
        options["alpha"] = float(call.alpha)
    slow, fast = _slow(call, sizes, candidate.variant, options), _fast(call, sizes, candidate.variant, options)
    new_o, states, final = maker(call.v), sizes.states, call.output_final_state

    def again(call: DualCore) -> Outputs:
        o, bounds = new_o(call.v), bounds_of(call.cu_seqlens)
        slow_state, fast_state = (new(states), new(states)) if final else (None, None)
        slow(call, {"o": o, "final": slow_state}, bounds)
        fast(call, {"o": o, "final": fast_state}, bounds)
        return o, slow_state, fast_state

    return again
