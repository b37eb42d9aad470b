"""Whole models, and compiled calls, as benchmarks/fla_check.py compares them: FLA's two models and transformers' Qwen3Next on our ops."""

from __future__ import annotations

from collections.abc import Callable

import fla.models
import torch
from fla_found import Found, error
from fla_layers import layers_of
from fla_times import Cell, operands, raw_gates
from torch import Tensor, nn

import titans_backends as tb
from titans_backends.integrations.fla import chunk_gated_delta_rule, register_with_fla

__all__ = ["compiled", "models"]

LIMIT, SLACK = 3e-2, 1.1
"""How far logits in bfloat16 may be from FLA's; or, beyond that, how much further from the model in float32 than FLA's are."""
VOCABULARY = 1000


def truth(model: nn.Module, logits: Callable[[], Tensor]) -> Tensor:
    """The model in float32, its memory on eager, which has no kernel of anybody's."""
    with torch.no_grad(), tb.accelerate(model.float(), backend="eager"):
        found = logits()
    model.to(torch.bfloat16)
    return found


def as_right(ours: Tensor, theirs: Tensor, exact: Tensor) -> tuple[bool, dict[str, float]]:
    """Whether our logits are FLA's, or no further from the model in float32 than those; and the figures."""
    figures = {"logits": error(ours, theirs), "ours_vs_float32": error(ours, exact), "flas_vs_float32": error(theirs, exact)}
    return figures["logits"] < LIMIT or figures["ours_vs_float32"] <= SLACK * figures["flas_vs_float32"], figures


def registered(found: Found, what: str, logits: Callable[[], Tensor], exact: Tensor, expected: int | None = None) -> Tensor:
    """Logits before, on our ops, and after; they are the old ones to the bit when FLA has its functions back. Returns the first."""
    with torch.no_grad():
        before = logits()
        with register_with_fla() as registration:
            during = logits()
        again = bool(torch.equal(before, logits()))
    calls, (right, figures) = sum(registration.calls.values()), as_right(during, before, exact)
    right = right and again and (calls > 0 if expected is None else calls == expected)
    found.say(right, f"{what} registered", **figures, calls=calls, refusals=str(dict(registration.refusals)), unregistered_again=again)
    return before


def flas(found: Found, kind: str) -> None:
    """A model of FLA's: registered where FLA asks its backends, accelerated, and 20 greedy tokens of both."""
    torch.manual_seed(2)
    heads = {"num_heads": 4, **({"head_dim": 128} if kind == "GatedDeltaNet" else {})}
    config = getattr(fla.models, f"{kind}Config")(hidden_size=512, num_hidden_layers=3, vocab_size=VOCABULARY, **heads)
    model = getattr(fla.models, f"{kind}ForCausalLM")(config).to(found.device, torch.bfloat16).eval()
    ids = torch.randint(0, VOCABULARY, (2, 200), device=found.device)

    def logits() -> Tensor:
        with torch.no_grad():
            return model(ids).logits  # type: ignore[no-any-return]

    def generated() -> Tensor:
        with torch.no_grad():
            return model.generate(ids[:, :50], max_new_tokens=20, do_sample=False)[:, 50:]  # type: ignore[no-any-return]

    what = f"FLA's {kind}ForCausalLM"
    exact = truth(model, logits)
    before = registered(found, what, logits, exact) if kind == "GatedDeltaNet" else logits()
    tokens = generated()
    with tb.accelerate(model) as report:
        (right, figures), same = as_right(logits(), before, exact), generated() == tokens
    found.say(right and len(report.swapped) == 3, f"{what} accelerated", **figures, swapped=len(report.swapped))
    found.say(None, f"{what}: greedy tokens in bfloat16 that are the same", equal=int(same.sum()), of=same.numel())


def qwen3_next(found: Found) -> None:
    """transformers calls FLA's functions where FLA is installed: three layers of four."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(2)
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4}
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **attention, **linear, **experts)).to(found.device, torch.bfloat16).eval()
    ids = torch.randint(0, VOCABULARY, (2, 200), device=found.device)

    def logits() -> Tensor:
        return model(ids, use_cache=False).logits  # type: ignore[no-any-return]

    registered(found, "transformers' Qwen3Next", logits, truth(model, logits), expected=3)


def models(found: Found) -> None:
    """On a GPU: FLA's models run FLA's kernels."""
    if not found.gpu:
        return found.say(None, "models need FLA's kernels: a GPU")
    for kind in filter(found.wants, ("GatedDeltaNet", "DeltaNet")):
        found.attempt(f"FLA's {kind}ForCausalLM", flas, found, kind)
    if found.wants("Qwen3Next"):
        found.attempt("transformers' Qwen3Next", qwen3_next, found)
    return None


def compiled(found: Found) -> None:
    """A function and two layers without a graph break, against the same called eagerly."""
    dtype = torch.bfloat16 if found.gpu else torch.float32
    cell = Cell(1, 1024, 8, 16, 128) if found.gpu else Cell(1, 96, 2, 4, 32)
    given = raw_gates(operands(cell, found.device, dtype))
    function = torch.compile(lambda given: chunk_gated_delta_rule(**given)[0], fullgraph=True)
    e = error(function(given), chunk_gated_delta_rule(**given)[0])
    found.say(e < 1e-2, "chunk_gated_delta_rule under torch.compile(fullgraph=True)", o=e)
    for name, layer in layers_of(found):
        if name in ("GatedDeltaNet", "DeltaNet") and found.wants(name) and found.left > 30:
            found.attempt(f"{name} under torch.compile(fullgraph=True)", compiled_layer, found, name, layer.to(found.device, torch.bfloat16))


def compiled_layer(found: Found, name: str, layer: nn.Module) -> None:
    """A swapped layer in inference."""
    tb.accelerate(layer)
    x = torch.randn(1, 512 if found.gpu else 96, layer.hidden_size, device=found.device, dtype=torch.bfloat16)
    with torch.no_grad():
        e = error(torch.compile(layer, fullgraph=True)(x)[0], layer(x)[0])
    found.say(e < 2e-2, f"{name} under torch.compile(fullgraph=True)", o=e)
