"""fused_uw in slices of matrices that stay in a cache: the kernel of docs/writing-a-backend.md, as a distribution of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends import ACCEPTED, Candidate, Machine, Signature, Verdict, refused
from titans_backends.contracts.fused_uw import FusedUW


def supports(signature: Signature, machine: Machine) -> Verdict:
    return ACCEPTED if signature.dtype == torch.float32 else refused("it takes float32 only")


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    return [Candidate("sliced", "slices", (("matrices", count),)) for count in (64, 8)]  # the first runs untuned


def run(call: FusedUW, candidate: Candidate) -> tuple[Tensor, Tensor]:
    attn = call.attn_const.reshape(-1, *call.attn_const.shape[-2:])
    found = []
    for given in (call.v_beta, call.k_beta):
        out = torch.empty(given.shape, dtype=given.dtype, device=given.device)
        right, into = given.reshape(attn.shape[0], *given.shape[-2:]), out.view(attn.shape[0], *given.shape[-2:])
        for first in range(0, attn.shape[0], int(candidate.param("matrices"))):
            part = slice(first, first + int(candidate.param("matrices")))
            torch.bmm(attn[part], right[part], out=into[part])
        found.append(out)
    return found[0], found[1]
