"""The forward that stands before transformers' own in a swapped gated delta layer: its formula, from projection to projection, through our ops.

    q, k, v = silu(conv([q, k, v]))       q, k over their norms       beta = sigmoid(b)       g = -exp(A_log) softplus(a + dt_bias)
    o = gated delta rule(q, k, v, beta, g) / sqrt(K)                  y = out_proj(rms_norm(o) * silu(z))

Everything stays `[B, T, channels]`; parameters and submodules are read at each call, so that whatever replaces one later is seen. The ops are the
module's attributes: a tracer cannot look one up after the cache, which is made of dicts, has changed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from titans_backends.contracts.gated_delta_step import MAX_TOKENS
from titans_backends.contracts.short_conv import TAPS
from titans_backends.integrations.bypassed import is_plain
from titans_backends.integrations.transformers.caching import Cache, held_by, previous_states, records_past
from titans_backends.integrations.transformers.projected import Projected, boundaries
from titans_backends.op import Op

__all__ = ["GatedDelta"]

QKV = tuple[Tensor, Tensor, Tensor]
Prepared = tuple[Tensor, Tensor, Tensor, bool]
_NONE = (None, None, None)


class GatedDelta:
    """The common part of the forms; a form says how it projects, and what it calls its norm and its last projection."""

    layer_idx: int
    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    key_dim: int
    value_dim: int
    conv_kernel_size: int
    conv1d: nn.Conv1d
    A_log: Tensor
    dt_bias: Tensor

    titans_rule: Op
    titans_step: Op
    titans_prepare: Op
    titans_norm: Op | None
    titans_gate: str | None
    titans_norm_class: type

    def _projected(self, x: Tensor) -> Projected:
        """q, k, v, the output's gate, and what beta and g are made of."""
        raise NotImplementedError

    def _beta(self, b: Tensor) -> Tensor:
        """How much of a token is written."""
        return b.sigmoid()

    def _gate_norm(self) -> nn.Module:
        """The gated norm."""
        raise NotImplementedError

    def _output_projection(self) -> nn.Module:
        """The last projection."""
        raise NotImplementedError

    def forward(self, hidden_states: Tensor, cache_params: Cache | None = None, attention_mask: Tensor | None = None, **kwargs: object) -> Tensor:
        """`[B, T, hidden]` as the original's, for prompts, continued prompts, single tokens and packed batches (`cu_seq_lens_q`)."""
        hook = getattr(self.conv1d, "_hf_hook", None)  # the convolution's own forward, which would fire it, is never called
        if hook is not None:
            hook.pre_forward(self.conv1d)
        y = self._run(hidden_states, cache_params, attention_mask, boundaries(kwargs))
        if hook is not None:
            hook.post_forward(self.conv1d, ())
        return y

    def _run(self, x: Tensor, cache: Cache | None, mask: Tensor | None, packed: Tensor | None) -> Tensor:
        if mask is not None:
            x = (x * mask[:, :, None]).to(x.dtype)
        given = self._projected(x)
        before, state = (None, None) if cache is None else previous_states(cache, self.layer_idx)
        if packed is not None and before is not None:
            raise ValueError(
                f"{type(self).__name__}: cu_seq_lens_q begins sequences, but the cache holds one that goes on; pass a fresh cache, or use_cache=False"
            )
        q, k, v, unit = self._prepared(given, cache, before, packed)
        beta = self._beta(given.b).flatten(2)
        decay = (-self.A_log.float().exp()).view(given.a.shape[2:])
        g = (decay * F.softplus(given.a.float() + self.dt_bias.view(given.a.shape[2:]))).flatten(2)
        o = self._remembered(q, k, v, beta, g, cache, state, packed, qk_l2norm=not unit)
        projection = self._output_projection()
        y: Tensor = projection(self._gated(o, given.z).flatten(2))
        return y

    # --- the convolution

    def _heads(self, x: Tensor, dim: int) -> QKV:
        """The parts of q, k and v of a dimension of channels, by head: `[..., G, K, ...]`, `[..., G, K, ...]` and `[..., H, V, ...]`, views."""
        q, k, v = x.split([self.key_dim, self.key_dim, self.value_dim], dim)
        keys, values = (self.num_k_heads, self.head_k_dim), (self.num_v_heads, self.head_v_dim)
        return q.unflatten(dim, keys), k.unflatten(dim, keys), v.unflatten(dim, values)

    def _prepared(self, given: Projected, cache: Cache | None, before: Tensor | None, packed: Tensor | None) -> Prepared:
        """q, k and v convolved, and whether q and k are of unit length already; the cache has their inputs."""
        taps, tokens = self.conv_kernel_size, given.q.shape[1]
        if cache is None:
            return self._convolved(given, None, packed)
        index = self.layer_idx
        recorded = records_past(cache, index)
        if before is None:
            first = 0 if recorded or tokens <= taps else tokens - taps
            cache.update_conv_state(given.channels(first), index, conv_kernel_size=taps)
            return self._convolved(given, None, packed)
        if tokens > MAX_TOKENS and taps == TAPS and not recorded and not torch.is_grad_enabled():
            prepared = self._convolved(given, before, None)  # before the cache's state, which it reads, is overwritten
            cache.update_conv_state(given.channels(tokens - taps), index, conv_kernel_size=taps)
            return prepared
        window = cache.update_conv_state(given.channels(), index, conv_kernel_size=taps)[..., 1 - taps - tokens :]
        if tokens == 1 and not recorded and (taps != TAPS or window.device.type == "cpu"):
            return self._one_token(window)
        mixed = window.transpose(1, 2)
        q, k, v, unit = self._convolved_by_op(self._heads(mixed, -1), None, None) if taps == TAPS else self._convolved_by_torch(mixed, None)
        return q[:, -tokens:], k[:, -tokens:], v[:, -tokens:], unit  # what recorded the past may hold fewer inputs than the taps reach

    def _convolved(self, given: Projected, before: Tensor | None, packed: Tensor | None) -> Prepared:
        if self.conv_kernel_size == TAPS:
            return self._convolved_by_op((given.q, given.k, given.v), before, packed)
        return self._convolved_by_torch(given.channels().transpose(1, 2), packed)

    def _convolved_by_op(self, qkv: QKV, before: Tensor | None, packed: Tensor | None) -> Prepared:
        weights = self._heads(_weight(self.conv1d.weight, qkv[0])[:, 0], 0)
        biases = _NONE if self.conv1d.bias is None else self._heads(_weight(self.conv1d.bias, qkv[0]), 0)
        q_state, k_state, v_state = _NONE if before is None else self._heads(_state(before), 1)
        q, k, v, _, _, _ = self.titans_prepare(
            *qkv, *weights, *biases, qk_norm="l2_eps", q_state=q_state, k_state=k_state, v_state=v_state, cu_seqlens=packed
        )
        assert q is not None
        assert k is not None
        assert v is not None
        return q, k, v, True

    def _convolved_by_torch(self, mixed: Tensor, packed: Tensor | None) -> Prepared:
        """Another number of taps than the op has."""
        if packed is not None:
            raise NotImplementedError(
                f"{type(self).__name__}: cu_seq_lens_q needs a convolution of {TAPS} taps, and this layer's has {self.conv_kernel_size}; "
                "pass the sequences as rows of a padded batch"
            )
        weight, taps = self.conv1d.weight, self.conv_kernel_size
        z = F.conv1d(mixed.transpose(1, 2).to(weight.dtype), weight, self.conv1d.bias, padding=taps - 1, groups=weight.shape[0])
        return *self._heads(F.silu(z[..., : mixed.shape[1]]).to(mixed.dtype).transpose(1, 2), -1), False

    def _one_token(self, window: Tensor) -> Prepared:
        """From `[B, D, taps]`: on a CPU, where an op of many small steps costs more than they do."""
        z = ((window if window.dtype == torch.float64 else window.float()) * self.conv1d.weight[:, 0]).sum(-1)
        z = z if self.conv1d.bias is None else z + self.conv1d.bias
        return *self._heads(F.silu(z).to(window.dtype)[:, None], -1), False

    # --- the memory

    def _remembered(
        self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor,
        cache: Cache | None, state: Tensor | None, packed: Tensor | None, *, qk_l2norm: bool,
    ) -> Tensor:  # fmt: skip
        """o `[B, T, H, V]`; the state goes on from the cache's and back into it, in place where no gradient runs."""
        index = self.layer_idx
        differentiated = torch.is_grad_enabled() and _any_requires_grad(q, k, v, beta, g, state)
        start = None if state is None else _state(state)
        if differentiated and start is not None:
            start = start.clone()  # the cache's own is overwritten before the backward reads it
        if cache is not None and start is not None and q.shape[1] <= MAX_TOKENS:
            inplace = not differentiated and start is state and held_by(cache, index, start)
            o, after = self.titans_step(q, k, v, beta, g, state=start, inplace=inplace, qk_l2norm=qk_l2norm)
        else:
            inplace = False
            o, after = self.titans_rule(
                q, k, v, beta, g, initial_state=start, output_final_state=cache is not None, qk_l2norm=qk_l2norm, cu_seqlens=packed
            )
        if cache is not None and not inplace:
            assert after is not None
            cache.update_recurrent_state(after, index)
        assert o is not None
        return o

    def _gated(self, o: Tensor, z: Tensor) -> Tensor:
        """The gated norm by our op; by the module itself where something waits for its call, or it is none that we know."""
        norm, op = self._gate_norm(), self.titans_norm
        if op is None or not is_plain(norm, self.titans_norm_class):
            y: Tensor = norm(o.reshape(-1, o.shape[-1]), z.reshape(-1, z.shape[-1])).view(o.shape)
            return y
        weight, eps = norm.weight, norm.variance_epsilon
        assert isinstance(weight, Tensor)
        assert isinstance(eps, float)
        (made,) = op(o, z, _weight(weight, o), eps=eps, activation=self.titans_gate)
        assert made is not None
        return made


def _weight(weight: Tensor, x: Tensor) -> Tensor:
    """A parameter in a dtype that the ops take beside x: x's own, or float32."""
    return weight if weight.dtype == x.dtype or (weight.dtype == torch.float32 and x.dtype != torch.float32) else weight.to(x.dtype)


def _state(state: Tensor) -> Tensor:
    """A state as the ops take it."""
    return state if state.dtype in (torch.float32, torch.float64) else state.float()


def _any_requires_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)
