"""The dual-core layer in plain eager torch, as the original is built: what the layer of the library is measured against, written from the formulas.

One torch call after the other on `[B, H, N, C, D]`, some sixty launches a layer before any loop over chunks. Parameters have the original's names, so
that it loads the state dicts of `titans_backends.nn.TitansDualCore`. A `Plan` says which of the documents' versions it computes; `LADDER` is the
second document's seven steps from the earlier version to the later one. No masks, no packing, no cache, no gradients wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LADDER", "PLANS", "Core", "Flux", "Inputs", "PlainEncoder", "PlainLayer", "Plan", "Step", "in_chunks", "mean", "plain_core"]


@dataclass(frozen=True, slots=True)
class Plan:
    """What the memory computes.

    `memory`: "flat" (no chunk sees another), "states" (S_slow, and S_fast where `fast_state`, cross chunks with one factor a chunk), or "rule" (the gated
    delta rule, a decay for each token). `coupling` of the two states: "none", "batch" (one number for all rows and heads, the original's) or "head".
    `normalize`: "chunk" (before each read and after each update), "end". `fast`: S_fast's output by "state" (read from a state with a delta correction
    of its own) or by "chunk" (tril(QK^T) beta V, for all chunks at once).
    """

    memory: str
    chunk_size: int = 128
    transform: str = "exact"
    chunking: str = "regular"
    causal: bool = False
    coupling: str = "none"
    normalize: str = "end"
    early_transpose: bool = True
    fast: str = "chunk"
    fast_state: bool = False
    resonance: bool = False
    flux_merge: bool = False
    alpha: float = 0.1


@dataclass(frozen=True, slots=True)
class Step:
    """One row of the ladder: the document's words, and what it makes of the layer."""

    name: str
    plan: Plan
    note: str = ""


_BEFORE = Plan(
    "states", 64, "lam", coupling="batch", normalize="chunk", early_transpose=False, fast="state", fast_state=True, resonance=True, flux_merge=True
)
PLANS: Mapping[str, Plan] = {
    "flat": Plan("flat", transform="lam"),
    "loop": _BEFORE,
    "dual": Plan("states"),
    "recurrent": Plan("rule", causal=True),
}
"""The four modes of the layer. With `chunking="original"`, flat and loop are the original's two versions, number for number."""


def _ladder() -> tuple[Step, ...]:
    """Cumulative; the exact transform throughout, since LAM's diverges where the normalisation of every chunk is taken away."""
    steps = [Step("earlier version", replace(_BEFORE, transform="exact"), "chunks of 64, two coupled states, both normalised in every chunk")]

    def then(name: str, note: str = "", **changes: object) -> None:
        steps.append(Step(name, replace(steps[-1].plan, **changes), note))  # type: ignore[arg-type]

    then("(1) chunks of 64 to 128", chunk_size=128)
    then("(2) cross-coupling removed", coupling="none")
    then("(3) one normalisation, at the end", normalize="end")
    then("(4) k transposed beforehand", "of ours a detail of the kernels: it transposes nothing", early_transpose=True)
    then("(5) S_fast vectorised", "its state still follows the chunks", fast="chunk")
    then("(6) S_slow the only recurrent state", fast_state=False)
    then("(7) merge at the end with 0.1", "no token flux", flux_merge=False)
    return tuple(steps)


LADDER = _ladder()


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a memory takes: unit q, k `[B, T, H, K]`, v `[B, T, H, V]`, the rest `[B, T, H]`; `decay_logit`: the argument of S_slow's sigmoid."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    fast_gate: Tensor
    slow_gate: Tensor
    fast_decay: Tensor
    slow_decay: Tensor
    decay_logit: Tensor
    chunk_size: int


Core = Callable[[Plan, Inputs, "Flux"], Tensor]
"""o `[B, T, H, V]`."""


class PlainLayer(nn.Module):
    """x `[B, T, d_model]` to y of the same shape. `core` computes the memory: plain torch, unless the registry's ops are to stand in its place."""

    def __init__(self, d_model: int, num_heads: int, plan: Plan, *, core: Core | None = None, eps: float = 1e-5) -> None:
        super().__init__()
        self.plan, self.heads, self.eps, self.core = plan, num_heads, eps, core or plain_core
        width = d_model // num_heads
        self.q_proj, self.k_proj, self.v_proj, self.g_proj, self.o_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(5))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Conv(d_model, 3 if plan.causal else 2) for _ in range(3))
        self.b_proj, self.fast_gate_proj, self.slow_gate_proj = (nn.Linear(d_model, num_heads, bias=False) for _ in range(3))
        self.fast_decay_proj, self.slow_decay_proj = nn.Linear(d_model, num_heads), nn.Linear(d_model, num_heads)
        self.fast_decay_bias, self.slow_decay_bias = nn.Parameter(torch.zeros(num_heads)), nn.Parameter(torch.zeros(num_heads))
        self.resonance_flux = Flux(num_heads, width)
        self.o_norm = Norm(width)

    def forward(self, x: Tensor) -> Tensor:
        """The layer in the original's order."""
        tokens, length, chunk = x.shape[1], *lengths(x.shape[1], self.plan)
        x = F.pad(x, (0, 0, 0, length - tokens)) if length > tokens else x
        heads = (self.heads, -1)
        q, k, v = (
            conv(projection(x)).unflatten(-1, heads)
            for projection, conv in ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d))
        )
        fast_logit = self.fast_decay_proj(x) + self.fast_decay_bias
        slow_logit = self.slow_decay_proj(x) + self.slow_decay_bias
        inputs = Inputs(
            F.normalize(q, dim=-1, eps=1e-12).to(q.dtype), F.normalize(k, dim=-1, eps=1e-12).to(k.dtype), v,
            self.b_proj(x).sigmoid(), self.fast_gate_proj(x).sigmoid(), self.slow_gate_proj(x).sigmoid(),
            fast_logit.sigmoid(), slow_logit.sigmoid(), slow_logit, chunk,
        )  # fmt: skip
        o = self.core(self.plan, inputs, self.resonance_flux)
        normed = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps) * self.o_norm.weight
        gate = self.g_proj(x).unflatten(-1, heads).sigmoid()
        y: Tensor = self.o_proj((normed * gate).flatten(2))
        return y[:, :tokens]


class PlainEncoder(nn.Module):
    """The stack that the documents time: x `[B, T, d_model]` through layers with a residual, LayerNorm, feed-forward, residual, LayerNorm each."""

    def __init__(self, d_model: int, num_heads: int, num_layers: int, d_ff: int, plan: Plan, *, core: Core | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(PlainLayer(d_model, num_heads, plan, core=core), d_model, d_ff) for _ in range(num_layers))

    def forward(self, x: Tensor) -> Tensor:
        """The tokens' last hidden states."""
        for layer in self.layers:
            x = layer(x)
        return x


class Block(nn.Module):
    """One layer of the stack, under the names of `TitansEncoder`."""

    def __init__(self, mixer: PlainLayer, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.mixer, self.norm1, self.norm2 = mixer, nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.ff = nn.ModuleDict({"up": nn.Linear(d_model, d_ff), "down": nn.Linear(d_ff, d_model)})

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, d_model]`."""
        x = self.norm1(x + self.mixer(x))
        y: Tensor = self.norm2(x + self.ff["down"](F.gelu(self.ff["up"](x))))
        return y


def lengths(tokens: int, plan: Plan) -> tuple[int, int]:
    """The padded length, and the chunk: a multiple of the chunk, or the original's rule (multiples of 32; one chunk where that is no multiple)."""
    chunk = plan.chunk_size
    if plan.chunking == "regular":
        return tokens, min(chunk, max(tokens, 1))
    length = tokens if tokens < 64 else -(-tokens // 32) * 32
    return length, length if length % chunk or length <= 32 else chunk


class Conv(nn.Module):
    """Depthwise, 4 taps, bias, SiLU; `before` of the taps are earlier tokens: 2, the original's, sees one token ahead."""

    def __init__(self, width: int, before: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 4, padding=before, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        """x `[B, T, D]`."""
        return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Norm(nn.Module):
    """`weight` `[V]`, and a `gate` that nothing uses."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.gate = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))


class Flux(nn.Module):
    """The two networks: token flux, and the resonance psi of a chunk."""

    def __init__(self, heads: int, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 2)
        self.W_bilinear, self.temp = nn.Parameter(torch.zeros(heads, width, width)), nn.Parameter(torch.ones(heads))
        self.flux_net = nn.Sequential(nn.Linear(2 * width + 1, hidden), nn.SiLU(), nn.Linear(hidden, 1))
        self.token_flux_proj = nn.Sequential(nn.Linear(2 * width, hidden), nn.SiLU(), nn.Linear(hidden, 1))

    def tokens(self, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        """beta k, beta v and so the flux `[..., C]`; k, v `[..., C, D]`, beta `[..., C]`."""
        features = torch.cat([beta[..., None] * k, beta[..., None] * v], -1)
        flux: Tensor = self.token_flux_proj(features)[..., 0].sigmoid().clamp(0.01, 0.99)
        return flux

    def chunks(self, k: Tensor, u: Tensor, counts: Tensor | None) -> Tensor:
        """psi `[B, H, N]`; k, u `[B, H, N, C, D]`; `counts` `[N]`: tokens of each chunk, where the last is padded with zeros."""
        energy = torch.einsum("bhnck,hkv,bhncv->bhnc", k, self.W_bilinear, u) / self.temp[:, None, None]
        means = [mean(part, counts) for part in (k, u, energy[..., None])]
        psi: Tensor = self.flux_net(torch.cat(means, -1))[..., 0].sigmoid().clamp(0.01, 0.99)
        return psi


def mean(x: Tensor, counts: Tensor | None) -> Tensor:
    """Over the tokens of a chunk: x `[B, H, N, C, D]` to `[B, H, N, D]`."""
    return x.mean(3) if counts is None else x.sum(3) / counts[:, None]


def in_chunks(x: Tensor, chunk: int) -> Tensor:
    """x `[B, T, H]` or `[B, T, H, D]` as `[B, H, N, C]` or `[B, H, N, C, D]`, zeros behind."""
    missing = -x.shape[1] % chunk
    x = x.transpose(1, 2)
    if missing:
        x = F.pad(x, (0, missing) if x.dim() == 3 else (0, 0, 0, missing))
    return x.contiguous().unflatten(2, (-1, chunk)) if x.dim() == 4 else x.unflatten(2, (-1, chunk))


def transformed(k: Tensor, v_beta: Tensor, beta: Tensor, log_decay: Tensor | None, mask: Tensor | None, transform: str) -> tuple[Tensor, Tensor]:
    """u and w. `log_decay` `[..., C]`: its sum from the chunk's start; `mask` `[..., C, C]`: its differences, exponentiated, lower triangle."""
    k_beta = k * beta[..., None]
    attention = -(k_beta @ k.transpose(-1, -2))
    attention = (attention if mask is None else attention * mask).tril(-1)
    if log_decay is not None:
        k_beta = k_beta * log_decay.exp()[..., None]
    if transform == "lam":
        matrix = attention + (attention @ attention.transpose(-1, -2)).tril(-1)
        matrix = matrix + torch.eye(k.shape[-2], dtype=k.dtype, device=k.device)
        return matrix @ v_beta, matrix @ k_beta
    triangle = torch.eye(k.shape[-2], dtype=torch.promote_types(k.dtype, torch.float32), device=k.device) - attention
    both = torch.linalg.solve_triangular(triangle, torch.cat([v_beta, k_beta], -1).to(triangle.dtype), upper=False, unitriangular=True).to(k.dtype)
    return both[..., : v_beta.shape[-1]], both[..., v_beta.shape[-1] :]


def unit(state: Tensor) -> Tensor:
    """A state `[B, H, K, V]` over its norm."""
    return state / (state.norm(dim=(-2, -1), keepdim=True) + 1e-8)


def plain_core(plan: Plan, x: Inputs, flux: Flux) -> Tensor:
    """The memory of a plan, in torch calls."""
    tokens, chunk = x.q.shape[1], x.chunk_size
    q, k, v, beta, fast_gate, slow_gate = (in_chunks(part, chunk) for part in (x.q, x.k, x.v, x.beta, x.fast_gate, x.slow_gate))
    fast_gate, slow_gate = fast_gate[..., None], slow_gate[..., None]
    log_decay = mask = None
    if plan.memory == "rule":
        log_decay = in_chunks(F.logsigmoid(x.decay_logit), chunk).cumsum(-1)
        mask = (log_decay[..., :, None] - log_decay[..., None, :]).tril().exp().tril()
    v_beta = v * beta[..., None]
    u, w = transformed(k, v_beta, beta, log_decay, mask, plan.transform)
    scores = (q @ k.transpose(-1, -2)).tril()
    if plan.memory == "flat":
        fast, slow = fast_gate * (scores @ v_beta), slow_gate * (scores @ u)
    elif log_decay is not None and mask is not None:
        fast, slow = fast_gate * (scores @ v_beta), slow_gate * rule(q, k, u, w, scores * mask, log_decay)
    else:
        o = two_states(plan, x, flux, q, k, v, v_beta, u, w, scores, fast_gate, slow_gate)
        return o.flatten(2, 3)[:, :, :tokens].transpose(1, 2)
    o = plan.alpha * fast + (1 - plan.alpha) * slow
    return o.flatten(2, 3)[:, :, :tokens].transpose(1, 2)


def rule(q: Tensor, k: Tensor, u: Tensor, w: Tensor, scores: Tensor, log_decay: Tensor) -> Tensor:
    """S_slow as the gated delta rule, chunk by chunk."""
    state = torch.zeros(*q.shape[:2], q.shape[-1], u.shape[-1], dtype=u.dtype, device=u.device)
    o = torch.zeros_like(u)
    last = log_decay[..., -1:]
    q, keys = q * log_decay.exp()[..., None], (k * (last - log_decay).exp()[..., None]).transpose(-1, -2)
    kept = last.exp()[..., None]
    for n in range(q.shape[2]):
        update = u[:, :, n] - w[:, :, n] @ state
        o[:, :, n] = q[:, :, n] @ state + scores[:, :, n] @ update
        state = kept[:, :, n] * state + keys[:, :, n] @ update
    return o


def two_states(
    plan: Plan,
    x: Inputs,
    flux: Flux,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    v_beta: Tensor,
    u: Tensor,
    w: Tensor,
    scores: Tensor,
    fast_gate: Tensor,
    slow_gate: Tensor,
) -> Tensor:
    """States that cross chunks with one factor a chunk: S_slow, and S_fast in the earlier versions; `[B, H, N, C, V]`."""
    tokens, chunk, count = x.q.shape[1], x.chunk_size, q.shape[2]
    missing, counts = -tokens % chunk, None
    if missing:
        counts = torch.full((count,), float(chunk), dtype=q.dtype, device=q.device)
        counts[-1] = chunk - missing
    beta = in_chunks(x.beta, chunk)
    slow_decay = mean(in_chunks(x.slow_decay, chunk)[..., None], counts)
    fast_decay = mean(in_chunks(x.fast_decay, chunk)[..., None], counts) if plan.fast_state else slow_decay
    psi, coupling = q.new_zeros(()), q.new_zeros(())
    if plan.resonance:
        psi = flux.chunks(k, u, counts)[..., None]
        slow_decay, fast_decay = slow_decay * (1 - 0.05 * psi), fast_decay * (1 - 0.1 * psi)
        coupling = (0.05 + 0.1 * (psi.mean((0, 1), keepdim=True) if plan.coupling == "batch" else psi)).expand_as(psi)
    alpha = (0.5 + 0.3 * flux.tokens(k, v, beta))[..., None] if plan.flux_merge else q.new_full((), plan.alpha)
    blend = alpha.dim() > 0
    keys = k.transpose(-1, -2).contiguous() if plan.early_transpose else None
    fast_o = fast_gate * (scores @ v_beta) if plan.fast == "chunk" else None
    slow = torch.zeros(*q.shape[:2], q.shape[-1], u.shape[-1], dtype=u.dtype, device=u.device)
    fast, o = slow, torch.zeros_like(u)
    for n in range(count):
        qn, un, wn, scores_n = q[:, :, n], u[:, :, n], w[:, :, n], scores[:, :, n]
        key = k[:, :, n].transpose(-1, -2) if keys is None else keys[:, :, n]
        slow = slow_decay[:, :, n, :, None] * slow
        read = unit(slow) if plan.normalize == "chunk" else slow
        update = un - wn @ read
        slow_n = slow_gate[:, :, n] * (qn @ read + scores_n @ update)
        slow = slow + key @ update
        if plan.fast_state:
            fast = fast_decay[:, :, n, :, None] * fast
            read = unit(fast) if plan.normalize == "chunk" else fast
            update = un - wn @ read
            if fast_o is None:
                fast_n = fast_gate[:, :, n] * (qn @ read + scores_n @ update)
            fast = fast + key @ update
        if fast_o is not None:
            fast_n = fast_o[:, :, n]
        o[:, :, n] = alpha[:, :, n] * fast_n + (1 - alpha[:, :, n]) * slow_n if blend else slow_n
        if plan.coupling != "none":
            both, p = coupling[:, :, n, :, None], psi[:, :, n, :, None]
            fast, slow = fast + both * p * slow, slow + both * (1 - p) * fast
        if plan.normalize == "chunk":
            fast, slow = unit(fast), unit(slow)
    if blend or fast_o is None:
        return o
    return alpha * fast_o + (1 - alpha) * o
