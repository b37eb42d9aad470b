"""gated_delta_rule by FlashInfer's `gdn_prefill.chunk_gated_delta_rule`, forward only.

FlashInfer takes packed tokens, exp(g) and beta in float32, and states with the value dimension first. The way there and back, and the output gate, which
it has not, are part of a call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.gated_delta_rule import GatedDeltaRule
from titans_backends.machine import Machine
from titans_backends.signature import Signature

from ..peers import dense, gated, load, sources
from .serving import DISTRIBUTIONS
from .serving import serves as supports

__all__ = ["candidates", "run", "supports"]

_PREFILL = ("chunk_gated_delta_rule",)
_KERNELS = {
    9: ("flashinfer.gdn_kernels.delta_rule_dsl.delta_rule_sm90", ("delta_rule_prefill_dsl_sm90",)),
    10: ("flashinfer.gdn_kernels.blackwell.gdn_prefill", ("chunk_gated_delta_rule_sm100",)),
    12: ("flashinfer.gdn_kernels.delta_rule_dsl.delta_rule_sm120", ("delta_rule_prefill_dsl",)),
}
"""Where FlashInfer has its kernels for the cards of a major compute capability."""


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """FlashInfer's own choice between one fused kernel and context parallelism, which is exact here."""
    return [Candidate("flashinfer", "prefill", batch_invariant=False, sources=sources(*DISTRIBUTIONS))]


def run(call: GatedDeltaRule, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """o and the final state."""
    batch, tokens = call.v.shape[:2]
    q, k, v = (_packed(x) for x in (call.q, call.k, call.v))
    lengths = {}
    if call.cu_seqlens is None:
        offsets = torch.arange(0, (batch + 1) * tokens, tokens, dtype=torch.int64, device=v.device)
        lengths["max_seqlen"] = tokens  # of a packed call it would have to be read from the device
    else:
        offsets = dense(call.cu_seqlens.to(v.device))
    try:
        found = load("flashinfer", "flashinfer.gdn_prefill", _PREFILL).chunk_gated_delta_rule(
            q=q,
            k=k,
            v=v,
            g=None if call.g is None else _packed(call.g.to(torch.float32).exp()),
            beta=_packed(call.beta.to(torch.float32)),
            scale=k.shape[-1] ** -0.5 if call.scale is None else call.scale,
            initial_state=None if call.initial_state is None else dense(call.initial_state.transpose(-1, -2)).detach(),
            output_final_state=call.output_final_state,
            cu_seqlens=offsets,
            use_qk_l2norm_in_kernel=call.qk_l2norm,
            **lengths,
        )
    except NotImplementedError:  # as it says that a kernel is unavailable
        _import_kernels(v.device)
        raise
    o, state = found if call.output_final_state else (found, None)
    return gated(o.view(call.v.shape), call.gate), None if state is None else state.transpose(-1, -2).contiguous()


def _import_kernels(device: torch.device) -> None:
    """BackendError with what importing the kernels of a card raises: FlashInfer swallows that, and knows none then."""
    major = torch.cuda.get_device_capability(device)[0] if torch.cuda.is_available() else 0
    if major in _KERNELS:
        load("flashinfer", *_KERNELS[major])


def _packed(x: Tensor) -> Tensor:
    """`[B, T, ...]` as `[B T, ...]`, contiguous, and no longer known to want a gradient: DLPack, by which some of these kernels take it, refuses what does."""
    return dense(x).flatten(0, 1).detach()
