"""TitansDualCore: the dual-core memory layer, with the parameters of the original LAM layer, on the registry's ops.

    q, k, v = SiLU(conv(x W))          q, k of norm 1          beta, gates, decays = sigmoid(x W)
    o = alpha o_fast + (1 - alpha) o_slow                      y = (RMSNorm(o) * weight * sigmoid(x Wg)) Wo

One product for all of x's projections, `qkv_prepare`, the memory (`memory.py`), `gated_rms_norm`, one product: a layer is six to a dozen launches.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from titans_backends.nn.flux import ResonanceFlux
from titans_backends.nn.forms import Chunking, Convolution, Coupling, Decay, Merge, Mode, Transform, resolve
from titans_backends.nn.joint import Standing, takes
from titans_backends.nn.level import Level
from titans_backends.nn.levels import empty_carry
from titans_backends.nn.memory import States
from titans_backends.nn.merge import LearnedMerge
from titans_backends.nn.mixing import LEVELS, Mixing, stand_together
from titans_backends.nn.normalization import GatedRMSNorm
from titans_backends.nn.sequences import Packing
from titans_backends.nn.short_conv import TAPS, ShortConv
from titans_backends.nn.states import orthogonality_loss
from titans_backends.nn.streaming import DualCoreCache

__all__ = ["TitansDualCore"]

_CHUNK_KEEPS = 0.9
"""What a fresh layer keeps of S_slow from one chunk to the next: the 0.9 that the original names, and misses (it keeps 0.474)."""


class TitansDualCore(Mixing):
    """A token-mixing layer with two memories: S_fast inside each chunk, and S_slow, a delta rule.

    `TitansDualCore(d_model, num_heads)`, then `layer(x)` for x `[B, T, d_model]`. The parameters have the original's names and shapes in every mode, so
    that `load_state_dict(original, strict=True)` works unless `merge` or `levels` add some of their own.

    **mode** says what crosses from one chunk to the next, what it costs and what it loses:

    - `"recurrent"` (default): S_slow is the exact gated delta rule over the whole sequence, the convolution is causal, so y[t] depends on x[:t + 1] only.
      `decay="token"` forgets by each token's own factor; `"previous_chunk"` by the mean over the chunk before, on a chunk's first token. Streams, with a `cache`.
    - `"dual"`: S_slow crosses chunks and forgets by the chunk's mean decay (times 1 - 0.05 psi with `resonance=True`), and is divided by its norm where it is
      returned. Sees one token ahead in the convolution, and in a chunk's mean the rest of the chunk. `transform="lam"` is no inverse: for short
      sequences only, since its error grows from chunk to chunk (a fresh layer of 2 heads of 32: NaN within 2048 tokens).
    - `"loop"`: the original's earlier version. Two states, read and kept at norm 1, which mix after every chunk of 64; the blend is the flux's. One chunk after
      another, and the dearest. `coupling="head"`: by each head's own resonance; `"batch"`, the original's: by its mean over batch and heads, so that a row depends
      on its neighbours. The original's dropout on the state updates in training is not there.
    - `"flat"`: the original's current inference. Nothing crosses a chunk: no long memory, and the cheapest. Its S_slow, on request, is tracked
      beside the output and never read. Sees one token ahead.

    **chunking**: `"regular"` chunks of `chunk_size` (64 in the loop mode, 128 in the others), the last one shorter. `"original"` (flat, dual, loop): lengths
    from 64 on are padded with zeros to a multiple of 32 and a length that is no multiple of `chunk_size` is one chunk, so that 257 tokens cost a chunk of 288
    and change the first 256 outputs; needed to reproduce the original's numbers, and for nothing else.

    **merge**: alpha, the share of S_fast: `"fixed"` at `alpha` (0.1); learned from there, `"scalar"` or per `"head"` (adds `merge.logit`);
    `"flux"`: 0.5 + 0.3 token flux, for each token, the loop mode's default.

    **levels** (experimental): more cores that learn one block of chunks at a time, `[Level(period=4, weight=0.1)]`; each takes its weight from the two cores.

    The other options default to the mode's: `convolution` `"original"` or `"causal"`, `transform`, `decay`, `resonance`.
    `expand_k`, `expand_v`: the width of all keys, all values, as a multiple of d_model; `norm_eps` is o_norm's.

    Parameters that a mode does not use (`fast_decay*` outside of the loop mode, the flux networks where no flux is asked for, `o_norm.gate`) get no
    gradient: DistributedDataParallel needs `find_unused_parameters=True`.
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
        chunk_size: int | None = None,
        convolution: Convolution | None = None,
        transform: Transform | None = None,
        decay: Decay | None = None,
        resonance: bool | None = None,
        coupling: Coupling | None = None,
        merge: Merge | None = None,
        alpha: float | None = None,
        levels: Sequence[Level] | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.form = resolve(mode, chunking, chunk_size, convolution, transform, decay, resonance, coupling, merge, alpha, levels)
        keys, values = _widths(d_model, num_heads, expand_k, expand_v)
        self.d_model, self.num_heads = d_model, num_heads

        def linear(inputs: int, outputs: int, bias: bool = False) -> nn.Linear:
            return nn.Linear(inputs, outputs, bias, device, dtype)

        self.q_proj, self.k_proj, self.v_proj = linear(d_model, keys), linear(d_model, keys), linear(d_model, values)
        self.q_conv1d, self.k_conv1d, self.v_conv1d = (ShortConv(width, device, dtype) for width in (keys, keys, values))
        self.b_proj = linear(d_model, num_heads)
        self.fast_decay_proj, self.slow_decay_proj = linear(d_model, num_heads, True), linear(d_model, num_heads, True)
        self.fast_decay_bias, self.slow_decay_bias = (nn.Parameter(torch.empty(num_heads, device=device, dtype=dtype)) for _ in range(2))
        self.fast_gate_proj, self.slow_gate_proj = linear(d_model, num_heads), linear(d_model, num_heads)
        self.resonance_flux = ResonanceFlux(num_heads, keys // num_heads, values // num_heads, device, dtype)
        self.g_proj, self.o_proj = linear(d_model, values), linear(values, d_model)
        self.o_norm = GatedRMSNorm(values // num_heads, norm_eps, device, dtype)
        learned = self.form.merge in ("scalar", "head")
        self.merge = LearnedMerge(num_heads if merge == "head" else None, self.form.alpha, device, dtype) if learned else None
        for name in LEVELS if self.form.levels else ():
            setattr(self, name, linear(d_model, num_heads * len(self.form.levels)))
        self._standing = Standing()
        self.reset_decay()
        self.register_load_state_dict_post_hook(stand_together)  # type: ignore[no-untyped-call]
        stand_together(self)

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
        cache: DualCoreCache | None = None,
        *,
        return_states: bool = False,
    ) -> Tensor | tuple[Tensor, States, Tensor]:
        """y `[B, T, d_model]`, or `(y, (S_fast, S_slow), orthogonality_loss)` with `return_states=True`.

        x `[B, T, d_model]`; `attention_mask` `[B, T]`, bool or int, non-zero where a token counts: what it hides is taken out before anything else, and y is 0 there.
        Or `cu_seqlens` `[N + 1]` for sequences packed along T, with B = 1. The states are `[N, H, K, V]`, N = B unless packed: after the last token; in the flat
        mode S_fast is 0. `cache`, of `new_cache`: x continues what it holds, and it is brought up to date in place (recurrent only).
        Raises ValueError or TypeError for what does not fit.
        """
        self.check(x, attention_mask, cu_seqlens, cache)
        if attention_mask is None:
            y, states = self._in_chunks(x, cu_seqlens, return_states, cache)
        else:
            packing = Packing.of(attention_mask.to(x.device))
            y, states = self._in_chunks(packing.pack(x), packing.cu_seqlens, return_states, None)
            y = packing.unpack(y)
        return y if states is None else (y, states, orthogonality_loss(*states))

    def new_cache(self, batch_size: int, device: torch.device | str | None = None) -> DualCoreCache:
        """The memory of `batch_size` sequences that have not begun, for `layer(x, cache=cache)`; on the parameters' device unless told."""
        self._check_streamed()
        weight = self.q_proj.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        heads, keys, values = self.num_heads, self.q_proj.out_features // self.num_heads, self.v_proj.out_features // self.num_heads

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(batch_size, heads, *shape, dtype=dtype, device=weight.device if device is None else device)

        slow = zeros(keys, values)
        positions = torch.zeros(batch_size, dtype=torch.int64, device=slow.device)
        return DualCoreCache(
            0, positions, self.form.chunk_size, slow, zeros(keys, values), zeros(keys, TAPS), zeros(keys, TAPS), zeros(values, TAPS),
            zeros() if self.form.decay == "previous_chunk" else None, [empty_carry(slow) for _ in self.form.levels],
            self._periods,
        )  # fmt: skip

    @property
    def _periods(self) -> tuple[int, ...]:
        """Its levels' periods, in chunks."""
        return tuple(level.period for level in self.form.levels)

    def _check_streamed(self) -> None:
        why = self.form.not_streamed_because
        if why is not None:
            raise ValueError(f"TitansDualCore: a cache cannot continue this layer: {why}, or call the layer on the whole sequence, without cache")

    def _check_cache(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: DualCoreCache) -> None:
        self._check_streamed()
        if mask is not None or cu_seqlens is not None:
            raise ValueError(
                f"TitansDualCore: cache with {'attention_mask' if cu_seqlens is None else 'cu_seqlens'}: the rows of a cache advance together, each by all T tokens. "
                "Feed rows of different lengths with a cache each, or without one"
            )
        if not isinstance(cache, DualCoreCache):
            raise TypeError(f"TitansDualCore: cache must be a DualCoreCache, made by layer.new_cache({x.shape[0]}), got {type(cache).__name__}")
        wanted = (x.shape[0], self.num_heads, self.q_proj.out_features // self.num_heads, self.v_proj.out_features // self.num_heads)
        if cache.slow.shape != wanted or cache.chunk_size != self.form.chunk_size:
            raise ValueError(
                f"TitansDualCore: this cache holds states {tuple(cache.slow.shape)} with chunks of {cache.chunk_size}, and this call needs {wanted} with chunks of "
                f"{self.form.chunk_size}; make one with layer.new_cache({x.shape[0]})"
            )
        if (cache.decay_sum is None) == (self.form.decay == "previous_chunk"):
            raise ValueError(
                f"TitansDualCore: this cache is of a layer with another decay than {self.form.decay!r}; make one with layer.new_cache({x.shape[0]})"
            )
        if cache.periods != self._periods:
            raise ValueError(
                f"TitansDualCore: this cache is of a layer whose levels have the periods {cache.periods}, and this layer's have {self._periods}; "
                f"make one with layer.new_cache({x.shape[0]})"
            )

    def check(self, x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, cache: DualCoreCache | None) -> None:
        """Raises the sentence of what does not fit; `forward` asks it first."""
        if not isinstance(x, Tensor):
            raise TypeError(f"TitansDualCore: x must be a tensor [B, T, {self.d_model}], got {type(x).__name__}")
        if x.dim() != 3 or x.shape[2] != self.d_model:
            raise ValueError(f"TitansDualCore: x must have shape [B, T, {self.d_model}], got {tuple(x.shape)}")
        if not takes(self.q_proj, x):
            wanted = self.q_proj.weight.dtype
            raise TypeError(
                f"TitansDualCore: x is {x.dtype} and the layer's weights are {wanted}; pass x.to({wanted}), or convert the layer, or call it under torch.autocast "
                "(which leaves float64 as it is)"
            )
        if cu_seqlens is not None and mask is not None:
            raise ValueError("TitansDualCore: attention_mask and cu_seqlens both say where sequences lie; pass one")
        if cu_seqlens is not None and (cu_seqlens.dim() != 1 or x.shape[0] != 1):
            raise ValueError(
                f"TitansDualCore: cu_seqlens packs sequences along T: it must be [N + 1] and x [1, T, {self.d_model}], "
                f"got {tuple(cu_seqlens.shape)} and {tuple(x.shape)}; reshape x to [1, B * T, {self.d_model}]"
            )
        if cache is not None:
            self._check_cache(x, mask, cu_seqlens, cache)
        if mask is None:
            return
        if mask.is_floating_point():
            raise TypeError(
                f"TitansDualCore: attention_mask must be bool or int, non-zero where a token counts, got {mask.dtype}; "
                "of an additive mask (0 where a token counts) pass mask == 0"
            )
        if mask.shape != x.shape[:2]:
            raise ValueError(f"TitansDualCore: attention_mask must have shape [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}")


def _widths(d_model: int, num_heads: int, expand_k: float, expand_v: float) -> tuple[int, int]:
    """The widths of all keys and of all values."""
    widths = int(d_model * expand_k), int(d_model * expand_v)
    for name, expand, width in (("expand_k", expand_k, widths[0]), ("expand_v", expand_v, widths[1])):
        if num_heads < 1 or width < 1 or width % num_heads:
            raise ValueError(
                f"TitansDualCore: d_model={d_model} with {name}={expand} gives {width} channels, which num_heads={num_heads} must divide"
            )
    return widths
