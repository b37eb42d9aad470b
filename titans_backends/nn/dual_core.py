"""TitansDualCore: the dual-core memory layer, with the parameters of the original LAM layer, on the op `dual_core`.

    q, k, v = SiLU(conv(x W))          q, k of norm 1          beta, gates, decays = sigmoid(x W)
    o = alpha o_fast + (1 - alpha) o_slow                      y = (RMSNorm(o) * weight * sigmoid(x Wg)) Wo

Not here: mode "loop", a cache for streaming, more than two cores. Each is refused with a sentence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from titans_backends.nn.chunk_grid import ChunkGrid
from titans_backends.nn.flux import ResonanceFlux
from titans_backends.nn.forms import Chunking, Convolution, Decay, Merge, Mode, Transform, resolve
from titans_backends.nn.merge import LearnedMerge, flux_merge
from titans_backends.nn.normalization import GatedRMSNorm, unit_norm
from titans_backends.nn.sequences import Packing, original_chunk_size, original_groups, original_length, pad_tokens
from titans_backends.nn.short_conv import ShortConv
from titans_backends.nn.states import orthogonality_loss, tracked_state
from titans_backends.op import get_op

__all__ = ["TitansDualCore"]

States = tuple[Tensor, Tensor]
_CHUNK_KEEPS = 0.9
"""What a fresh layer keeps of S_slow from one chunk to the next: the 0.9 that the original names, and misses (it keeps 0.474)."""


@dataclass(frozen=True, slots=True)
class Memory:
    """What the memory ops take: unit q, k `[B, T, H, K]`, v `[B, T, H, V]`, the rest `[B, T, H]`; `decay_logit`: the sigmoid's argument."""

    q: Tensor
    k: Tensor
    v: Tensor
    beta: Tensor
    fast_gate: Tensor
    slow_gate: Tensor
    decay_logit: Tensor
    chunk_size: int
    cu_seqlens: Tensor | None

    def grid(self) -> ChunkGrid:
        """Where its chunks lie."""
        return ChunkGrid.of(self.v.shape[1], self.chunk_size, self.cu_seqlens, self.v.device)


class TitansDualCore(nn.Module):
    """A token-mixing layer with two memories: S_fast inside each chunk, and S_slow, a delta rule.

    `TitansDualCore(d_model, num_heads)`, then `layer(x)` for x `[B, T, d_model]`. The parameters have the original's names and shapes in every mode, so
    that `load_state_dict(original, strict=True)` works unless `merge` adds one of its own.

    **mode** says what crosses from one chunk to the next, what it costs and what it loses:

    - `"recurrent"` (default): S_slow is the exact gated delta rule over the whole sequence, the convolution is causal, so y[t] depends on x[:t + 1] only.
      `decay="token"` forgets by each token's own factor; `"previous_chunk"` by the mean over the chunk before, on a chunk's first token.
    - `"dual"`: S_slow crosses chunks and forgets by the chunk's mean decay (times 1 - 0.05 psi with `resonance=True`), and is divided by its norm where it is
      returned. Sees one token ahead in the convolution, and in a chunk's mean the rest of the chunk. `transform="lam"` is no inverse: for short
      sequences only, since its error grows from chunk to chunk (a fresh layer of 2 heads of 32: NaN within 2048 tokens).
    - `"flat"`: the original's current inference. Nothing crosses a chunk: no long memory, and the cheapest. Its S_slow, on request, is tracked
      beside the output and never read. Sees one token ahead.

    **chunking**: `"regular"` chunks of `chunk_size`, the last one shorter. `"original"` (flat, dual): lengths from 64 on are padded with zeros to a multiple of 32
    and a length that is no multiple of `chunk_size` is one chunk, so that 257 tokens cost a chunk of 288 and change the first 256 outputs; needed to
    reproduce the original's numbers, and for nothing else.

    **merge**: alpha, the share of S_fast: `"fixed"` at `alpha` (0.1); learned from there, `"scalar"` or per `"head"` (adds `merge.logit`);
    `"flux"`: 0.5 + 0.3 token flux, for each token.

    The other options default to the mode's: `convolution` `"original"` or `"causal"`, `transform`, `decay`, `resonance`.
    `expand_k`, `expand_v`: the width of all keys, all values, as a multiple of d_model; `norm_eps` is o_norm's.

    Not implemented, and refused: `mode="loop"`, `cache`. Parameters that a mode does not use (`fast_decay*` in all three, the flux networks where
    no flux is asked for, `o_norm.gate`) get no gradient: DistributedDataParallel needs `find_unused_parameters=True`.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        expand_k: float = 1.0,
        expand_v: float = 1.0,
        mode: Mode = "recurrent",
        chunking: Chunking = "regular",
        chunk_size: int = 128,
        convolution: Convolution | None = None,
        transform: Transform | None = None,
        decay: Decay | None = None,
        resonance: bool | None = None,
        merge: Merge = "fixed",
        alpha: float = 0.1,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form = resolve(mode, chunking, chunk_size, convolution, transform, decay, resonance, merge, alpha)
        keys, values = _widths(d_model, num_heads, expand_k, expand_v)
        self.d_model, self.num_heads = d_model, num_heads

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias, device, dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(d_model, keys), linear(d_model, keys), linear(d_model, values)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(width, self.form.look_ahead, device, dtype) for width in (keys, keys, values))
        self.b_proj = linear(d_model, num_heads)
        self.fast_decay_proj, self.slow_decay_proj = linear(d_model, num_heads, True), linear(d_model, num_heads, True)
        self.fast_decay_bias, self.slow_decay_bias = (nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) for _ in range(2))
        self.fast_gate_proj, self.slow_gate_proj = linear(d_model, num_heads), linear(d_model, num_heads)
        self.resonance_flux = ResonanceFlux(num_heads, keys // num_heads, values // num_heads, device, dtype)
        self.g_proj, self.o_proj = linear(d_model, values), linear(values, d_model)
        self.o_norm = GatedRMSNorm(values // num_heads, norm_eps, device, dtype)
        self.merge = LearnedMerge(num_heads if merge == "head" else None, alpha, device, dtype) if merge in ("scalar", "head") else None
        self.reset_decay()

    def reset_decay(self) -> None:
        """Sets the decay's biases for a new model: S_slow keeps 0.9 of itself from one chunk to the next, or as much in `chunk_size` tokens of their own."""
        keeps = _CHUNK_KEEPS ** (1 / self.form.chunk_size) if self.form.decay == "token" else _CHUNK_KEEPS
        nn.init.constant_(self.slow_decay_bias, math.log(keeps / (1 - keeps)))
        nn.init.constant_(self.fast_decay_bias, math.log(0.3 / 0.7))
        for projection in (self.slow_decay_proj, self.fast_decay_proj):
            nn.init.zeros_(projection.bias)

    def extra_repr(self) -> str:
        """The form, as it was resolved."""
        return f"d_model={self.d_model}, num_heads={self.num_heads}, {self.form}"

    def forward(
        self,
        x: Tensor,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: object | None = None,
        *,
        return_states: bool = False,
    ) -> Tensor | tuple[Tensor, States, Tensor]:
        """y `[B, T, d_model]`, or `(y, (S_fast, S_slow), orthogonality_loss)` with `return_states=True`.

        x `[B, T, d_model]`; `attention_mask` `[B, T]`, bool or int, non-zero where a token counts: what it hides is taken out before anything else, and y is 0 there.
        Or `cu_seqlens` `[N + 1]` for sequences packed along T, with B = 1. The states are `[N, H, K, V]`, N = B unless packed: the recurrent forms' after the last
        token; in the flat mode S_fast is 0. Raises NotImplementedError for a cache, ValueError or TypeError for what does not fit.
        """
        self._check(x, attention_mask, cu_seqlens, cache)
        if attention_mask is None:
            y, states = self._in_chunks(x, cu_seqlens, return_states)
        else:
            packing = Packing.of(attention_mask.to(x.device))
            y, states = self._in_chunks(packing.pack(x), packing.cu_seqlens, return_states)
            y = packing.unpack(y)
        return y if states is None else (y, states, orthogonality_loss(*states))

    def _check(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: object | None) -> None:
        if cache is not None:
            raise NotImplementedError("TitansDualCore: cache is not implemented; call the layer on the whole sequence, without cache")
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"TitansDualCore: x must have shape [B, T, {self.d_model}], got {tuple(x.shape)}")
        if cu_seqlens is not None and mask is not None:
            raise ValueError("TitansDualCore: attention_mask and cu_seqlens both say where sequences lie; pass one")
        if cu_seqlens is not None and (cu_seqlens.dim() != 1 or x.shape[0] != 1):
            raise ValueError(
                f"TitansDualCore: cu_seqlens packs sequences along T: it must be [N + 1] and x [1, T, {self.d_model}], "
                f"got {tuple(cu_seqlens.shape)} and {tuple(x.shape)}; reshape x to [1, B * T, {self.d_model}]"
            )
        if mask is None:
            return
        if mask.is_floating_point():
            raise TypeError(
                f"TitansDualCore: attention_mask must be bool or int, non-zero where a token counts, got {mask.dtype}; "
                "of an additive mask (0 where a token counts) pass mask == 0"
            )
        if mask.shape != x.shape[:2]:
            raise ValueError(f"TitansDualCore: attention_mask must have shape [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")

    def _in_chunks(self, x: Tensor, cu_seqlens: Tensor | None, return_states: bool) -> tuple[Tensor, States | None]:
        """By the form's chunk rule."""
        size = self.form.chunk_size
        if self.form.chunking == "regular" or (cu_seqlens is not None and len(cu_seqlens) < 2):
            return self._mix(x, size, cu_seqlens, return_states)
        if cu_seqlens is None:
            length = original_length(x.shape[1])
            y, states = self._mix(pad_tokens(x, length), original_chunk_size(length, size), None, return_states)
            return y[:, : x.shape[1]], states
        y, order, found = torch.zeros_like(x), [], []
        for group in original_groups(cu_seqlens, size, x.device):
            part, states = self._mix(group.gather(x), group.chunk_size, group.cu_seqlens, return_states)
            y = y.to(part.dtype).index_copy(1, group.source, part[:, group.place])
            order += group.members
            found += [] if states is None else [states]
        if not found:
            return y, None
        place = torch.tensor(order, device=x.device).argsort()
        fast, slow = (torch.cat(group_states)[place] for group_states in zip(*found, strict=True))
        return y, (fast, slow)

    def _mix(self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None, return_states: bool) -> tuple[Tensor, States | None]:
        """Projections, memory, merge, norm and output on one grid of chunks."""
        memory = self._memory(x, chunk_size, cu_seqlens)
        alpha = self._alpha(memory)
        if self.form.mode == "flat":
            o, states = self._flat(memory, alpha, return_states)
        elif self.form.mode == "dual":
            o, states = self._dual(memory, alpha, return_states)
        else:
            o, states = self._recurrent(memory, alpha, return_states)
        gate = self.g_proj(x).unflatten(-1, (self.num_heads, -1))
        y: Tensor = self.o_proj(self.o_norm(o, gate).flatten(2))
        return y, states

    def _memory(self, x: Tensor, chunk_size: int, cu_seqlens: Tensor | None) -> Memory:
        """Everything that the memory ops take, from x."""
        heads = (self.num_heads, -1)
        q, k, v = (
            convolution(projection(x), cu_seqlens).unflatten(-1, heads)
            for projection, convolution in ((self.q_proj, self.q_conv1d), (self.k_proj, self.k_conv1d), (self.v_proj, self.v_conv1d))
        )
        beta, fast_gate, slow_gate = (projection(x).sigmoid() for projection in (self.b_proj, self.fast_gate_proj, self.slow_gate_proj))
        decay_logit = self.slow_decay_proj(x) + self.slow_decay_bias
        return Memory(unit_norm(q), unit_norm(k), v, beta, fast_gate, slow_gate, decay_logit, chunk_size, cu_seqlens)

    def _alpha(self, x: Memory) -> Tensor | float:
        """The merge's weight of S_fast: a number, 0-d, `[H]` or `[B, T, H]`."""
        if self.form.merge == "flux":
            return flux_merge(self.resonance_flux.tokens(x.k, x.v, x.beta))
        return self.form.alpha if self.merge is None else self.merge()

    def _flat(self, x: Memory, alpha: Tensor | float, return_states: bool) -> tuple[Tensor, States | None]:
        """Every chunk from an empty memory; the state that the original tracks only where it is asked for."""
        o, _, _ = get_op("dual_core")(
            x.q, x.k, x.v, x.beta,
            fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
            memory="flat", transform=self.form.transform, chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens,
        )  # fmt: skip
        assert o is not None
        if not return_states:
            return o, None
        u, w = self._transformed(x)
        slow = tracked_state(x.q, x.k, u, w, self._chunk_decay(x, u), x.chunk_size, x.cu_seqlens)
        return o, (torch.zeros_like(slow), slow)

    def _dual(self, x: Memory, alpha: Tensor | float, return_states: bool) -> tuple[Tensor, States | None]:
        """S_slow over the whole sequence, one factor a chunk, normalised at the end."""
        u = self._transformed(x)[0] if self.form.resonance else None
        o, slow, fast = get_op("dual_core")(
            x.q, x.k, x.v, x.beta,
            fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha, chunk_decay=self._chunk_decay(x, u),
            transform=self.form.transform, chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens,
            output_final_state=return_states, normalize_final=return_states,
        )  # fmt: skip
        assert o is not None
        return o, None if fast is None or slow is None else (fast, slow)

    def _recurrent(self, x: Memory, alpha: Tensor | float, return_states: bool) -> tuple[Tensor, States | None]:
        """The exact delta rule, with a log decay for each token: its own, or the chunk before's on a chunk's first."""
        if self.form.decay == "token":
            g = nn.functional.logsigmoid(_gate_dtype(x.decay_logit))
        else:
            grid = x.grid()
            g = grid.from_the_chunk_before(grid.mean(_gate_dtype(x.decay_logit).sigmoid()).log())
        o, slow, fast = get_op("dual_core")(
            x.q, x.k, x.v, x.beta, g,
            fast_gate=x.fast_gate, slow_gate=x.slow_gate, alpha=alpha,
            chunk_size=x.chunk_size, cu_seqlens=x.cu_seqlens, output_final_state=return_states,
        )  # fmt: skip
        assert o is not None
        return o, None if fast is None or slow is None else (fast, slow)

    def _transformed(self, x: Memory) -> tuple[Tensor, Tensor]:
        """u and w, for those who look at them; `dual_core` makes its own."""
        u, w = get_op("uw_transform")(x.k, x.v, x.beta, chunk_size=x.chunk_size, transform=self.form.transform, cu_seqlens=x.cu_seqlens)
        assert u is not None
        assert w is not None
        return u, w

    def _chunk_decay(self, x: Memory, u: Tensor | None) -> Tensor:
        """d `[B, M, H]`: the chunk's mean decay, times 1 - 0.05 psi where u is given."""
        grid = x.grid()
        decay = grid.mean(_gate_dtype(x.decay_logit).sigmoid())
        return decay if u is None else decay * (1 - 0.05 * self.resonance_flux.chunks(x.k, u, grid))


def _gate_dtype(x: Tensor) -> Tensor:
    """float32, or float64: a decay near 1 has no place in 16 bits."""
    return x if x.dtype == torch.float64 else x.float()


def _widths(d_model: int, num_heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """The widths of all keys and of all values."""
    widths = int(d_model * expand_k), int(d_model * expand_v)
    for name, expand, width in (("expand_k", expand_k, widths[0]), ("expand_v", expand_v, widths[1])):
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(
                f"TitansDualCore: d_model={d_model} with {name}={expand} gives {width} channels, which num_heads={num_heads} must divide"
            )
    return widths
