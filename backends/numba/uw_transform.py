"""uw_transform: u and w of all chunks at once, each column of a chunk by forward substitution (SPEC.md 3)."""

from __future__ import annotations

import torch
from torch import Tensor

from titans_backends.backend import Candidate
from titans_backends.contracts.uw_transform import UWTransform
from titans_backends.machine import Machine
from titans_backends.signature import Signature
from titans_backends.verdict import Verdict

from .grid import Grid
from .log_decay import running_log
from .serving import gradients, refuse_chunk, refuse_training, serves, wide
from .uw_chunks import LARGEST_CHUNK, transform_chunks
from .uw_gradients import uw_gradients

__all__ = ["backward_candidates", "candidates", "run", "run_backward", "supports"]


def supports(signature: Signature, machine: Machine) -> Verdict:
    """Every option, in chunks of up to 128 tokens; the backward has no lam."""
    lam = {"transform='lam'": signature.option("transform") == "lam"}
    return serves(signature, machine) & refuse_chunk(signature, LARGEST_CHUNK) & refuse_training(signature, **lam)


def candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks")]


def backward_candidates(signature: Signature, machine: Machine) -> list[Candidate]:
    """One way."""
    return [Candidate("numba", "chunks", direction="backward")]


def run(call: UWTransform, candidate: Candidate) -> tuple[Tensor | None, ...]:
    """u `[B, T, H, V]` and w `[B, T, H, K]`."""
    k, v = wide(call.k), wide(call.v)
    grid = Grid(v, call.chunk_size, call.cu_seqlens)
    u = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    w = torch.empty(*v.shape[:3], k.shape[3], dtype=v.dtype, device=v.device)
    transform_chunks(k, v, wide(call.beta), running_log(call.g, grid, v), grid, call.transform, u, w)
    return u.to(call.v.dtype), w.to(call.v.dtype)


def run_backward(
    call: UWTransform, grads: tuple[Tensor | None, ...], states: Tensor | None, needs: frozenset[str], candidate: Candidate
) -> tuple[Tensor | None, ...]:
    """Gradients of k, v, beta and g, in that order."""
    return gradients(call, ("k", "v", "beta", "g"), uw_gradients(call, grads[0], grads[1]), needs)
