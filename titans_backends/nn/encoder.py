"""TitansEncoder: the stack that the seed documents time, from a config: layers of TitansDualCore and a feed-forward, each with residual and LayerNorm.

    x = norm1(x + mixer(x))        x = norm2(x + down(gelu(up(x))))        embedding = pool(x) / |pool(x)|

No table of positions (the memory has an order of its own), no dropout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_backends.errors import UnknownNameError
from titans_backends.nn.dual_core import TitansDualCore
from titans_backends.nn.forms import Chunking, Convolution, Coupling, Decay, Merge, Mode, Transform
from titans_backends.nn.level import Level
from titans_backends.nn.pooling import POOLINGS, pooled
from titans_backends.nn.sequences import Packing
from titans_backends.nn.streaming import DualCoreCache

__all__ = ["EncoderLayer", "EncoderOutput", "FeedForward", "TitansEncoder", "TitansEncoderConfig"]

_ACTIVATIONS = ("gelu", "gelu_twice")


@dataclass(frozen=True, slots=True)
class TitansEncoderConfig:
    """The sizes of the documents' model, and each layer's form as `TitansDualCore` takes it (None: the mode's own).

    `vocab_size=0`: no embeddings, `inputs_embeds` only. `activation="gelu_twice"`: gelu(gelu(up(x))), which LAM's model computes. `normalize`: embeddings of norm 1;
    `norm_eps`: the LayerNorms'.
    """

    vocab_size: int = 30522
    d_model: int = 384
    num_layers: int = 6
    num_heads: int = 12
    d_ff: int = 1536
    mode: Mode = "recurrent"
    chunking: Chunking = "regular"
    chunk_size: int | None = None
    merge: Merge | None = None
    alpha: float | None = None
    expand_k: float = 1.0
    expand_v: float = 1.0
    convolution: Convolution | None = None
    transform: Transform | None = None
    decay: Decay | None = None
    resonance: bool | None = None
    coupling: Coupling | None = None
    levels: Sequence[Level] | None = None
    activation: Literal["gelu", "gelu_twice"] = "gelu"
    pooling: Literal["mean", "first", "last", "max"] = "mean"
    normalize: bool = True
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for option, value, known in (("activation", self.activation, _ACTIVATIONS), ("pooling", self.pooling, POOLINGS)):
            if value not in known:
                raise UnknownNameError(f"TitansEncoderConfig: unknown {option} {value!r}; known: {', '.join(map(repr, known))}")
        if self.num_layers < 1 or self.d_ff < 1 or self.vocab_size < 0:
            raise ValueError(
                f"TitansEncoderConfig: num_layers={self.num_layers} and d_ff={self.d_ff} must be at least 1, vocab_size={self.vocab_size} at least 0"
            )

    def mixer(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> TitansDualCore:
        """A layer's memory."""
        return TitansDualCore(
            self.d_model, self.num_heads,
            expand_k=self.expand_k, expand_v=self.expand_v, mode=self.mode, chunking=self.chunking, chunk_size=self.chunk_size,
            convolution=self.convolution, transform=self.transform, decay=self.decay, resonance=self.resonance, coupling=self.coupling,
            merge=self.merge, alpha=self.alpha, levels=self.levels, device=device, dtype=dtype,
        )  # fmt: skip


class EncoderOutput(NamedTuple):
    """`tokens` `[B, T, D]`, 0 where a mask hides; `pooled` `[B, D]`, packed `[N, D]`, None with `pool=False`."""

    tokens: Tensor
    pooled: Tensor | None


class FeedForward(nn.Module):
    """down(gelu(up(x))), the exact GELU; twice where the config says so."""

    def __init__(self, config: TitansEncoderConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, device=device, dtype=dtype)
        self.down = nn.Linear(config.d_ff, config.d_model, device=device, dtype=dtype)
        self.times = 1 + _ACTIVATIONS.index(config.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x's shape."""
        hidden = self.up(x)
        kept = torch.is_grad_enabled() or torch.compiler.is_compiling() or type(self.up) is not nn.Linear or bool(self.up._forward_hooks)
        kept = kept or bool(torch.nn.modules.module._global_forward_hooks)
        for _ in range(self.times):  # the widest tensor of the model, in place where nobody looks at it again
            hidden = F.gelu(hidden) if kept else torch.ops.aten.gelu_(hidden)
        return cast(Tensor, self.down(hidden))


class EncoderLayer(nn.Module):
    """`mixer`, which loads an original layer's state dict, `norm1`, `ff`, `norm2`."""

    def __init__(self, config: TitansEncoderConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.mixer = config.mixer(device, dtype)
        self.norm1 = nn.LayerNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)
        self.ff = FeedForward(config, device, dtype)
        self.norm2 = nn.LayerNorm(config.d_model, config.norm_eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, cu_seqlens: Tensor | None = None, cache: DualCoreCache | None = None) -> Tensor:
        """x `[B, T, D]` to the same."""
        x = self.norm1(x + self.mixer(x, cu_seqlens=cu_seqlens, cache=cache))
        return cast(Tensor, self.norm2(x + self.ff(x)))


class TitansEncoder(nn.Module):
    """Token states and one embedding a sequence: `TitansEncoder(TitansEncoderConfig(...))`, then `encoder(input_ids, attention_mask)`."""

    def __init__(self, config: TitansEncoderConfig, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.d_model, device=device, dtype=dtype) if config.vocab_size else None
        self.layers = nn.ModuleList(EncoderLayer(config, device, dtype) for _ in range(config.num_layers))

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Sequence[DualCoreCache] | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        pool: bool = True,
    ) -> EncoderOutput:
        """`(tokens, pooled)` from `input_ids` `[B, T]` or `inputs_embeds` `[B, T, D]`; mask, packing and cache as `TitansDualCore.forward` takes them.

        A mask is packed once for all layers. Raises ValueError or TypeError for what does not fit.
        """
        x = self._embedded(input_ids, inputs_embeds)
        caches = [None] * len(self.layers) if cache is None else cache
        if len(caches) != len(self.layers):
            raise ValueError(
                f"TitansEncoder: cache must hold one entry for each of {len(self.layers)} layers, got {len(caches)}; make one with encoder.new_cache(B)"
            )
        if cache is not None and (None in caches or len({id(one) for one in caches}) < len(caches)):
            raise ValueError("TitansEncoder: cache must hold a cache of its own for every layer; make them with encoder.new_cache(B)")
        if attention_mask is None:
            tokens = self._stack(x, cu_seqlens, caches)
            return EncoderOutput(tokens, self._pooled(tokens, cu_seqlens) if pool else None)
        first = cast(EncoderLayer, self.layers[0])
        first.mixer.check(x, attention_mask, cu_seqlens, caches[0])
        packing = Packing.of(attention_mask.to(x.device))
        packed = self._stack(packing.pack(x), packing.cu_seqlens, caches)
        return EncoderOutput(packing.unpack(packed), self._pooled(packed, packing.cu_seqlens) if pool else None)

    def new_cache(self, batch_size: int, device: torch.device | str | None = None) -> list[DualCoreCache]:
        """The memories of `batch_size` sequences that have not begun, one for each layer; recurrent only."""
        return [cast(EncoderLayer, layer).mixer.new_cache(batch_size, device) for layer in self.layers]

    def _embedded(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(f"TitansEncoder: pass one of input_ids and inputs_embeds, got {'neither' if input_ids is None else 'both'}")
        if inputs_embeds is not None:
            return inputs_embeds
        if self.embeddings is None:
            raise ValueError("TitansEncoder: vocab_size=0 means no embeddings; pass inputs_embeds [B, T, D], or make the encoder with a vocabulary")
        return cast(Tensor, self.embeddings(input_ids))

    def _stack(self, x: Tensor, cu_seqlens: Tensor | None, caches: Sequence[DualCoreCache | None]) -> Tensor:
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, cu_seqlens, cache)
        return x

    def _pooled(self, tokens: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        found = pooled(tokens, self.config.pooling, cu_seqlens)
        return F.normalize(found, dim=-1) if self.config.normalize else found
