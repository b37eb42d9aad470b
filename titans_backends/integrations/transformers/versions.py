"""Which classes of transformers are known, by name, and how a forward is recognised as one of those that this integration was written for.

Nothing is imported: a class says its module and its name, and its forward's code says where it is from and which names it uses. A forward of another's,
or one that uses a name that is not listed here, does something that the swapped one would not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from titans_backends.integrations.origin import names_used, strangers
from titans_backends.integrations.transformers.forms import FusedProjection, JointProjection, SeparateProjections
from titans_backends.integrations.transformers.forward import GatedDelta

__all__ = ["FAMILIES", "NORM_FORWARD", "Family", "family_of", "unfamiliar"]


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_BOTH = _names(
    "A_log apply_mask_to_padding_states causal_conv1d_fn causal_conv1d_update conv1d dt_bias exp sigmoid softplus "
    "torch_chunk_gated_delta_rule torch_recurrent_gated_delta_rule update_conv_state update_recurrent_state"
)
"""What every form's forward uses, in every version."""
_PLUMBING = _names(
    "F activation bias cat conv_kernel_size conv_states float get_conv_state get_recurrent_state has_previous_state head_k_dim head_v_dim "
    "is_recording_past key_dim layer_idx layers num_k_heads num_v_heads pop record_past recurrent_states repeat_interleave reshape shape split squeeze torch transpose "
    "value_dim view weight"
)
"""What one version or another uses on the way, to the same effect."""

NORM_FORWARD = _names("ACT2FN activation dtype float32 mean pow rsqrt to torch variance_epsilon weight")
"""The names in the gated norm's forward: norm before the gate, in float32."""


@dataclass(frozen=True, slots=True)
class Family:
    """One class of transformers. `parts`: the names that its forward uses beside those that all do; `modules`: its submodules, the norm and the output's
    projection last."""

    module: str
    layer: str
    form: type[GatedDelta]
    parts: frozenset[str]
    modules: tuple[str, ...]

    def differences(self, layer: nn.Module | type) -> tuple[str, ...]:
        """Why a layer's forward, or a method that it calls, is none that this integration was written for; nothing where it is."""
        kind = layer if isinstance(layer, type) else type(layer)
        forward: Callable[..., object] = kind.forward  # type: ignore[attr-defined]  # a module's class has a forward
        told = list(strangers(layer, "transformers"))
        parameters = tuple(inspect.signature(forward).parameters)
        if parameters != _PARAMETERS:
            told.append(f"its forward takes ({', '.join(parameters)}); known is ({', '.join(_PARAMETERS)})")
        used = names_used(forward)
        strange, missing = sorted(used - _BOTH - _PLUMBING - self.parts), sorted((_BOTH | self.parts) - used)
        if strange:
            told.append(f"its forward uses {', '.join(strange)}, which this integration does not know")
        if missing:
            told.append(f"its forward does not use {', '.join(missing)}, which every known version does")
        return tuple(told)


_PARAMETERS = ("self", "hidden_states", "cache_params", "attention_mask", "kwargs")
_QWEN = ("norm", "out_proj")
_JOINT = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", *_QWEN)
_FUSED = ("in_proj_qkvz", "in_proj_ba", *_QWEN)
_SEPARATE = ("q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_norm", "o_proj")


def _family(name: str, layer: str, form: type[GatedDelta], modules: tuple[str, ...], *others: str) -> Family:
    return Family(f"transformers.models.{name}.modeling_{name}", layer, form, frozenset((*modules, *others)), modules)


FAMILIES = (
    _family("qwen3_next", "Qwen3NextGatedDeltaNet", FusedProjection, _FUSED, "fix_query_key_value_ordering"),
    _family("qwen3_5", "Qwen3_5GatedDeltaNet", JointProjection, _JOINT),
    _family("qwen3_5_moe", "Qwen3_5MoeGatedDeltaNet", JointProjection, _JOINT),
    _family("qwen4_exp", "Qwen4ExpTextGatedDeltaNet", JointProjection, _JOINT),
    _family("olmo_hybrid", "OlmoHybridGatedDeltaNet", SeparateProjections, _SEPARATE, "allow_neg_eigval"),
)
_BY_NAME = {(family.module, family.layer): family for family in FAMILIES}


def family_of(layer: type) -> Family | None:
    """The family that a class, or one of those that it derives from, belongs to."""
    for base in layer.__mro__:
        found = _BY_NAME.get((base.__module__, base.__name__))
        if found is not None:
            return found
    return None


def unfamiliar(norm: type) -> bool:
    """Whether a gated norm's forward is not the one that our op computes."""
    return bool(strangers(norm, "transformers")) or names_used(norm.forward) != NORM_FORWARD  # type: ignore[attr-defined]  # a module's class has a forward
