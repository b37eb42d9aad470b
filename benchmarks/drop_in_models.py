"""Small models of transformers' gated delta families from a config: random weights, nothing downloaded, heads as the kernels want them.

The weights are larger than a new model's, so that a layer's part in the logits is not lost beside the embedding's.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch

__all__ = ["FAMILIES", "VOCABULARY", "delta_layers", "small_model"]

FAMILIES = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM"),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM"),
    "qwen3_5_moe": ("Qwen3_5MoeTextConfig", "Qwen3_5MoeForCausalLM"),
    "qwen4_exp": ("Qwen4ExpTextConfig", "Qwen4ExpForCausalLM"),
    "olmo_hybrid": ("OlmoHybridConfig", "OlmoHybridForCausalLM"),
}
"""Each family's config and model."""
VOCABULARY = 64
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
_OWN: dict[str, dict[str, object]] = {
    "qwen3_next": {"head_dim": 32, "intermediate_size": 96, **_EXPERTS},
    "qwen3_5": {"head_dim": 32, "intermediate_size": 96},
    "qwen3_5_moe": {"head_dim": 32, **_EXPERTS},
    "qwen4_exp": {
        "head_dim": 32, **_EXPERTS, "hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 1, "indexer_kv_heads": 1, "indexer_head_dim": 32,
        "indexer_budget": 512, "indexer_compress_ratio": 4,
    },
    "olmo_hybrid": {"intermediate_size": 96},
}  # fmt: skip


def small_model(
    family: str,
    layers: Sequence[str] = ("linear_attention", "full_attention"),
    *,
    heads: tuple[int, int] = (2, 4),
    head_dims: tuple[int, int] = (16, 16),
    seed: int = 0,
    **config: object,
) -> Any:  # a class of transformers, which is not imported before it is asked for
    """A causal language model in evaluation mode. `heads`: of keys and of values; `head_dims`: K and V; `config`: whatever else its config takes."""
    module = importlib.import_module(f"transformers.models.{family}")
    make_config, make_model = (getattr(module, name) for name in FAMILIES[family])
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": len(layers), "layer_types": list(layers),
        "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 4096, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None,
        "linear_num_key_heads": heads[0], "linear_num_value_heads": heads[1], "linear_key_head_dim": head_dims[0], "linear_value_head_dim": head_dims[1],
    }  # fmt: skip
    torch.manual_seed(seed)
    model = make_model(make_config(**{**sizes, **_OWN[family], **config})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.copy_(torch.linspace(-4, 1, parameter.numel()))  # from a long memory to a short one
            elif parameter.dim() > 1 and "conv1d" not in name:
                parameter.mul_(4)
    return model


def delta_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Its gated delta layers, swapped or not."""
    return [module for name, module in model.named_modules() if name.endswith(".linear_attn")]
