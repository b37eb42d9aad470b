"""A stand-in for the original's layer, written from its formulas: parameters, calling convention, cache, returns and training of both of its versions.

`LamAfter` is the current version, `LamBefore` the earlier one. One torch call after the other on `[B, H, N, C, D]`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["LamAfter", "LamBefore", "LamModel", "randomized"]

States = tuple[Tensor, Tensor]


class Convolution(nn.Module):
    """Four taps, two of them before: one token of look-ahead."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 4, padding=2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(self.conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)


class Norm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight, self.gate = nn.Parameter(torch.ones(width)), nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor, g: Tensor | None = None) -> Tensor:
        normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * self.weight
        return normed * (self.gate if g is None else g).sigmoid()


class Flux(nn.Module):
    def __init__(self, heads: int, keys: int, values: int) -> None:
        super().__init__()
        self.W_bilinear = nn.Parameter(0.1 * torch.randn(heads, keys, values) / math.sqrt(keys))
        self.temp = nn.Parameter(torch.full((heads,), math.sqrt(keys)))
        self.flux_net, self.token_flux_proj = (
            nn.Sequential(nn.Linear(inputs, keys // 2), nn.SiLU(), nn.Linear(keys // 2, 1), nn.Sigmoid())
            for inputs in (keys + values + 1, keys + values)
        )

    def forward(self, k: Tensor, u: Tensor) -> Tensor:
        """psi `[B, H, N]` from k, u `[B, H, N, C, D]`."""
        energy = torch.einsum("bhnck,hkv,bhncv->bhnc", k, self.W_bilinear, u) / self.temp[:, None, None]
        features = torch.cat([k.mean(3), u.mean(3), energy.mean(3, keepdim=True)], -1)
        return self.flux_net(features)[..., 0].clamp(0.01, 0.99)

    def tokens(self, k: Tensor, v: Tensor) -> Tensor:
        return self.token_flux_proj(torch.cat([k, v], -1)).clamp(0.01, 0.99)


class LamLayer(nn.Module):
    """What both versions share."""

    chunk = 0
    keeps_states = False

    def __init__(
        self, d_model: int, num_heads: int, expand_v: float = 1.0, layer_idx: int = 0, norm_eps: float = 1e-5, use_delta_rule: bool = True
    ) -> None:
        super().__init__()
        values = int(d_model * expand_v)
        self.num_heads, self.layer_idx, self.use_delta_rule, self.calls = num_heads, layer_idx, use_delta_rule, 0
        self.q_proj, self.k_proj = (nn.Linear(d_model, d_model, bias=False) for _ in range(2))
        self.v_proj, self.g_proj = (nn.Linear(d_model, values, bias=False) for _ in range(2))
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (Convolution(width) for width in (d_model, d_model, values))
        self.b_proj, self.fast_gate_proj, self.slow_gate_proj = (nn.Linear(d_model, num_heads, bias=False) for _ in range(3))
        self.fast_decay_proj, self.slow_decay_proj = (nn.Linear(d_model, num_heads) for _ in range(2))
        self.fast_decay_bias, self.slow_decay_bias = (nn.Parameter(torch.full((num_heads,), math.log(init))) for init in (0.3, 0.9))
        self.resonance_flux = Flux(num_heads, d_model // num_heads, values // num_heads)
        self.o_norm = Norm(values // num_heads, norm_eps)
        self.o_proj = nn.Linear(values, d_model, bias=False)

    def forward(self, hidden_states, attention_mask=None, past_key_values=None, use_cache=False, output_attentions=False, **kwargs):  # type: ignore[no-untyped-def]
        self.calls += 1
        assert attention_mask is None or attention_mask.dim() == 2
        tokens = hidden_states.shape[1]
        x = F.pad(hidden_states, (0, 0, 0, -tokens % 32 if tokens >= 64 else 0))
        heads = (self.num_heads, -1)

        def gate(projection: nn.Module, bias: Tensor | float = 0.0) -> Tensor:
            return (projection(x) + bias).sigmoid().transpose(1, 2)

        q, k = (
            F.normalize(conv(p(x)).unflatten(-1, heads), dim=-1).transpose(1, 2)
            for p, conv in ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d))
        )
        beta = gate(self.b_proj)[..., None]
        v = self.v_conv1d(self.v_proj(x)).unflatten(-1, heads).transpose(1, 2) * beta
        decays = gate(self.fast_decay_proj, self.fast_decay_bias), gate(self.slow_decay_proj, self.slow_decay_bias)
        gates = gate(self.fast_gate_proj)[..., None], gate(self.slow_gate_proj)[..., None]
        size = x.shape[1] if x.shape[1] % self.chunk or x.shape[1] <= 32 else self.chunk
        chunked = [each.unflatten(2, (-1, size)) for each in (q, k, v, k * beta, *decays, *gates)]
        o, states = self.memory(*chunked, wanted=self.keeps_states or self.training or bool(use_cache))
        o = self.o_norm(o.flatten(2, 3).transpose(1, 2), self.g_proj(x).unflatten(-1, heads))
        loss = None if states is None else sum((s @ s.mT - torch.eye(s.shape[-2]).to(s)).square().mean((-2, -1)).mean() for s in states)
        if use_cache:
            past_key_values = [{}] if past_key_values is None else past_key_values
            held = past_key_values
            if isinstance(held, list):
                held.extend({} for _ in range(self.layer_idx + 1 - len(held)))
                held = held[self.layer_idx]
            held.update(recurrent_state=states, conv_state=held.get("conv_state") or (None,) * 3, layer_idx=self.layer_idx, offset=x.shape[1])
        return self.o_proj(o.flatten(2))[:, :tokens], None, past_key_values, loss

    def transformed(self, k: Tensor, v: Tensor, k_beta: Tensor) -> tuple[Tensor, Tensor]:
        """u and w by the original's T = I + A + stril(A A^T)."""
        a = (-(k_beta @ k.mT)).tril(-1)
        t = a + (a @ a.mT).tril(-1) + torch.eye(k.shape[-2]).to(k)
        return t @ v, t @ k_beta


class LamAfter(LamLayer):
    """No chunk sees another; a state is tracked where it is asked for."""

    chunk = 128

    def memory(self, q, k, v, k_beta, fast_decay, slow_decay, fast_gate, slow_gate, *, wanted):  # type: ignore[no-untyped-def]
        u, _ = self.transformed(k, v, k_beta)
        scores = (q @ k.mT).tril()
        o = 0.1 * fast_gate * (scores @ v) + 0.9 * slow_gate * (scores @ u)
        if not wanted:
            return o, None
        decay = (slow_decay.mean(-1) * (1 - 0.05 * self.resonance_flux(k, u)))[..., None, None]
        state = torch.zeros_like(k[:, :, 0].mT @ u[:, :, 0])
        for n in range(q.shape[2]):
            state = decay[:, :, n] * state + k[:, :, n].mT @ u[:, :, n]
        return o, (torch.zeros_like(state), _unit(state))


class LamBefore(LamLayer):
    """Two states cross the chunks and mix after each; in training each update is dropped out."""

    chunk = 64
    keeps_states = True

    def memory(self, q, k, v, k_beta, fast_decay, slow_decay, fast_gate, slow_gate, *, wanted):  # type: ignore[no-untyped-def]
        u, w = self.transformed(k, v, k_beta)
        psi = self.resonance_flux(k, u)[..., None, None]
        alpha = 0.5 + 0.3 * self.resonance_flux.tokens(k_beta, v)
        scores, outputs = (q @ k.mT).tril(), []
        fast = slow = torch.zeros_like(k[:, :, 0].mT @ u[:, :, 0])
        for n in range(q.shape[2]):
            found = []
            for state, decay, by, gate in ((fast, fast_decay, 0.1, fast_gate), (slow, slow_decay, 0.05, slow_gate)):
                state = decay[:, :, n].mean(-1)[..., None, None] * (1 - by * psi[:, :, n]) * state
                read = _unit(state)
                update = u[:, :, n] - (w[:, :, n] @ read if self.use_delta_rule else 0.0)
                written = k[:, :, n].mT @ update
                found.append((gate[:, :, n] * (q[:, :, n] @ read + scores[:, :, n] @ update), state + F.dropout(written, 0.1, self.training)))
            (fast_o, fast), (slow_o, slow) = found
            outputs.append(alpha[:, :, n] * fast_o + (1 - alpha[:, :, n]) * slow_o)
            p, coupling = psi[:, :, n], 0.05 + 0.1 * psi[:, :, n].mean()
            fast, slow = _unit(fast + coupling * p * slow), _unit(slow + coupling * (1 - p) * fast)
        return torch.stack(outputs, 2), (fast, slow)


def _unit(state: Tensor) -> Tensor:
    return state / (state.norm(dim=(-2, -1), keepdim=True) + 1e-8)


class LamModel(nn.Module):
    """Layers with a residual and a norm each, a head behind them."""

    def __init__(self, kind: type[LamLayer] = LamAfter, d_model: int = 32, num_heads: int = 2, layers: int = 2) -> None:
        super().__init__()
        self.layers = nn.ModuleList(kind(d_model, num_heads, layer_idx=index) for index in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(d_model) for _ in range(layers))
        self.head = nn.Linear(d_model, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm in zip(self.layers, self.norms, strict=True):
            x = norm(x + layer(x)[0])
        return self.head(x)


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """The same with parameters far from their initial values; not training."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator).to(parameter))
    return module.eval()
