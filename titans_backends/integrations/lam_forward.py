"""The original LAM layer's forward on our ops: its calling convention, its cache, its returns. Which of its versions it is, `form` says.

The parameters are read where the original has them, at every call, by the code that `TitansDualCore` runs.
"""

from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from titans_backends.integrations.bypassed import is_plain
from titans_backends.nn.memory import States
from titans_backends.nn.mixing import Mixing
from titans_backends.nn.sequences import original_length
from titans_backends.nn.states import orthogonality_loss

__all__ = ["BYPASSED", "OPS", "LamForward"]

BYPASSED = ("q_conv1d", "k_conv1d", "v_conv1d", "resonance_flux")
"""Parts whose parameters an op reads; their forward is not called."""

OPS = {
    "flat": ("dual_core", "qkv_prepare", "gated_rms_norm", "uw_transform", "chunk_flux", "slow_core"),
    "loop": ("coupled_core", "qkv_prepare", "gated_rms_norm", "uw_transform", "chunk_flux", "token_flux"),
}
"""The ops that each version calls; the first is its memory."""

Cache = list[dict[str, object]] | dict[str, object]


class LamForward(Mixing):
    """`form`: the version; `_trains_as_before`: in training the layer's own forward runs, which does there what no op of ours does."""

    layer_idx: int
    _trains_as_before: bool
    _norm_class: type

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        **kwargs: object,
    ) -> tuple[Tensor, None, Cache | None, Tensor | None]:
        """`(y, None, past_key_values, orthogonality_loss)` for hidden_states `[B, T, D]`; the loss None where the original makes no states.

        As the original: `attention_mask` `[B, T]` and everything in `kwargs` is accepted and not looked at, a cache is written and never read.
        """
        if self.training and self._trains_as_before:
            return super().forward(hidden_states, attention_mask, past_key_values, use_cache, output_attentions, **kwargs)  # type: ignore[no-any-return]
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"{type(self).__name__}: attention_mask must have shape [B, T], got {tuple(attention_mask.shape)}")
        self._expect_weights(hidden_states)
        wanted = self.form.mode == "loop" or self.training or bool(use_cache)
        y, states = self._in_chunks(hidden_states, None, wanted, None)
        if use_cache:
            past_key_values = self._stored(past_key_values, states, original_length(hidden_states.shape[1]))
        return y, None, past_key_values, None if states is None else orthogonality_loss(*states)

    def _projections(self, x: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        """The flat version's decay by itself: only its states depend on it, and where nobody uses those it must get no gradient, not one of zeros."""
        alone = tuple(name for name in names if self.form.mode == "flat" and name == "slow_decay_proj")
        found = super()._projections(x, tuple(name for name in names if name not in alone))
        return {**found, **super()._projections(x, alone)} if alone else found

    def _normed(self, o: Tensor, gate: Tensor) -> Tensor:
        norm = self.o_norm
        if not is_plain(norm, self._norm_class):
            return cast(Tensor, norm(o, gate))
        (y,) = self.ops.op("gated_rms_norm")(o, gate, norm.weight, eps=norm.eps)
        return cast(Tensor, y)

    def _expect_weights(self, x: Tensor) -> None:
        """RuntimeError where a part that is not called has its weights elsewhere until it is."""
        weight = cast(nn.Module, self._modules["q_conv1d"])._modules["conv"]._parameters.get("weight")  # type: ignore[union-attr]
        if weight is not None and weight.is_meta and not x.is_meta:
            raise RuntimeError(
                f"{type(self).__name__}: q_conv1d's weights are on the meta device: offloading brings them when q_conv1d is called, and one op stands in for "
                f"{', '.join(BYPASSED)}. Let the whole layer be brought: dispatch_model(..., preload_module_classes=[{type(self).__name__!r}])"
            )

    def _stored(self, past: Cache | None, states: States | None, tokens: int) -> Cache:
        """The cache with this layer's entry, written into the one that was given."""
        place = getattr(self, "layer_idx", 0)
        if past is None:
            past = [{}]
        if not isinstance(past, (list, dict)):
            raise TypeError(f"{type(self).__name__}: past_key_values must be a list of dictionaries or a dictionary, got {type(past).__name__}")
        if isinstance(past, list):
            past.extend({} for _ in range(place + 1 - len(past)))
        held = (past[place] or {}) if isinstance(past, list) else past
        convolutions = held.get("conv_state")
        entry: dict[str, object] = {
            "recurrent_state": states,
            "conv_state": (None, None, None) if convolutions is None else convolutions,
            "layer_idx": place,
            "offset": tokens,
        }
        if isinstance(past, list):
            past[place] = entry
        else:
            past.update(entry)
        return past
