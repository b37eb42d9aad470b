"""Writes the project's own golden files, beside this one, by the contracts' float64 references; no backend is asked.

    python -m tests.golden.make          (in the repository's root)

The files are numbers to hold every backend to, and the references themselves: a reference that changes its mind no longer matches them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch

from tests.golden.stored import Golden, compute, save
from titans_backends.contracts import contract
from titans_backends.contracts.case import Case, build, cotangents

FOLDER = Path(__file__).parent

GROUPED = Case("grouped", B=2, T=19, G=1, H=2, K=16, V=16)
PACKED = replace(GROUPED, name="packed", lengths=(11, 0, 6))
STEP = replace(GROUPED, name="step", B=3, T=3)

FILES: Mapping[str, tuple[str, Case]] = {
    "fast_core_continued": (
        "fast_core",
        replace(
            GROUPED,
            options={"chunk_size": 8, "chunk_offset": 5, "scale": 0.5, "output_final_state": True},
            given=("gate", "g", "initial_state"),
        ),
    ),
    "fast_core_packed": ("fast_core", replace(PACKED, options={"chunk_size": 8, "output_final_state": True}, given=("gate",))),
    "fused_uw": ("fused_uw", replace(GROUPED, options={"_chunk": 8})),
    "uw_transform_exact_packed": ("uw_transform", replace(PACKED, options={"chunk_size": 8}, given=("g",), beta="extreme")),
    "uw_transform_lam": ("uw_transform", replace(GROUPED, options={"chunk_size": 8, "transform": "lam"}, given=("g",))),
    "uw_transform_none": ("uw_transform", replace(GROUPED, options={"chunk_size": 8, "transform": "none"}, given=("g",))),
    "slow_core_packed": (
        "slow_core",
        replace(PACKED, options={"chunk_size": 8, "scale": 0.5, "output_final_state": True}, given=("g", "gate", "initial_state")),
    ),
    "slow_core_normalized": (
        "slow_core",
        replace(
            GROUPED,
            options={"chunk_size": 8, "output_final_state": True, "normalize_read": True, "normalize_final": True},
            given=("chunk_decay", "gate", "initial_state"),
        ),
    ),
    "slow_core_without_delta": (
        "slow_core",
        replace(PACKED, options={"chunk_size": 8, "output_final_state": True, "delta": False}, given=("chunk_decay",), decay="hard"),
    ),
    "gated_delta_rule_grouped": (
        "gated_delta_rule",
        replace(GROUPED, options={"output_final_state": True, "qk_l2norm": True}, given=("g", "gate", "initial_state")),
    ),
    "gated_delta_rule_packed": (
        "gated_delta_rule",
        replace(PACKED, options={"output_final_state": True}, given=("g", "initial_state"), decay="hard"),
    ),
    "gated_delta_step": ("gated_delta_step", replace(STEP, given=("g",))),
    "gated_delta_step_pool": ("gated_delta_step", replace(STEP, options={"qk_l2norm": True, "scale": 1.0}, given=("g", "state_indices"))),
    "deep_core_packed": (
        "deep_core",
        replace(
            PACKED,
            K=8,
            V=12,
            options={"chunk_size": 2, "period": 2, "block_offset": 3, "output_final_state": True},
            given=("g", "gate", "initial_state", "initial_error", "initial_mass", "initial_log_decay"),
        ),
    ),
    "deep_core_mean": (
        "deep_core",
        replace(
            GROUPED,
            K=8,
            V=12,
            options={"chunk_size": 8, "period": 1, "normalize": "mean", "scale": 0.5, "output_final_state": True},
            given=("g", "initial_state"),
        ),
    ),
    "deep_core_step": ("deep_core_step", replace(STEP, K=8, V=12, options={"chunk_size": 2, "period": 2}, given=("g", "gate"))),
    "dual_core_step": (
        "dual_core_step",
        replace(STEP, V=12, options={"chunk_size": 4}, given=("g", "fast_gate", "slow_gate", "alpha"), seed=2),  # alpha [B, T, H]
    ),
    "dual_core_step_pool": (
        "dual_core_step",
        replace(
            STEP,
            K=8,
            V=12,
            options={"chunk_size": 2, "qk_l2norm": True, "scale": 0.5},
            given=("g", "alpha", "state_indices"),
            seed=1,  # alpha [H]
        ),
    ),
    "dual_core_packed": (
        "dual_core",
        replace(
            PACKED,
            options={"chunk_size": 8, "output_final_state": True},
            given=("g", "fast_gate", "slow_gate", "alpha", "initial_state", "initial_fast_state"),
            seed=2,  # alpha [B, T, H]
        ),
    ),
    "dual_core_continued": (
        "dual_core",
        replace(
            GROUPED,
            options={"chunk_size": 8, "chunk_offset": 5, "output_final_state": True, "qk_l2norm": True},
            given=("g", "alpha", "initial_state", "initial_fast_state"),
            seed=1,  # alpha [H]
        ),
    ),
    "dual_core_flat_packed": (
        "dual_core",
        replace(PACKED, options={"chunk_size": 8, "memory": "flat", "transform": "lam"}, given=("fast_gate", "slow_gate")),
    ),
    "dual_core_lam_decay": (
        "dual_core",
        replace(
            GROUPED,
            options={"chunk_size": 8, "transform": "lam", "output_final_state": True, "normalize_read": True},
            given=("chunk_decay", "slow_gate", "alpha", "initial_state"),
            seed=0,  # alpha a 0-d tensor
        ),
    ),
    "short_conv_original": ("short_conv", replace(GROUPED, V=6, options={"lookahead": 1}, given=("bias",))),
    "short_conv_packed": (
        "short_conv",
        replace(PACKED, V=6, lengths=(11, 0, 6, 2), options={"output_final_state": True}, given=("bias", "initial_state")),
    ),
    "qkv_prepare": (
        "qkv_prepare",
        replace(
            GROUPED,
            K=8,
            V=6,
            options={"output_final_state": True},
            given=("q_bias", "k_bias", "v_bias", "q_state", "k_state", "v_state"),
        ),
    ),
    "qkv_prepare_original_packed": (
        "qkv_prepare",
        replace(PACKED, K=8, V=6, options={"lookahead": 1, "qk_norm": "l2_eps"}, given=("q_bias", "k_bias", "v_bias")),
    ),
    "token_flux": ("token_flux", replace(GROUPED, V=12)),
    "chunk_flux": ("chunk_flux", replace(GROUPED, V=12, options={"chunk_size": 8})),
    "chunk_flux_packed": ("chunk_flux", replace(PACKED, V=12, options={"chunk_size": 8})),
    "gated_rms_norm": ("gated_rms_norm", replace(GROUPED, V=12)),
    "coupled_core_packed": (
        "coupled_core",
        replace(
            PACKED,
            options={"chunk_size": 8, "output_final_state": True},
            given=("coupling", "fast_decay", "slow_decay", "fast_gate", "slow_gate", "alpha", "initial_state", "initial_fast_state"),
            seed=2,  # alpha [B, T, H]
        ),
    ),
    "coupled_core_lam": (
        "coupled_core",
        replace(
            GROUPED,
            options={"chunk_size": 8, "transform": "lam", "output_final_state": True},
            given=("fast_decay", "slow_decay", "slow_gate", "alpha"),
            seed=1,  # alpha [H]
        ),
    ),
}


def make(name: str) -> Golden:
    """One file's contents."""
    op, case = FILES[name]
    made = contract(op)
    call = build(made, case)
    wide = made.to(call, torch.float64)
    outputs = made.reference(wide)
    rounded = {spec.name: g.float() for spec, g in zip(made.outputs, cotangents(made, wide, outputs, case.seed), strict=True) if g is not None}
    named, gradients = compute(made, wide, rounded)
    options = {option: value for option, value in case.options.items() if not option.startswith("_")}
    told = {
        "producer": f"titans_backends.contracts.{op}: its reference in float64, and autograd through it, on the stored float32 inputs",
        "command": "python -m tests.golden.make",
        "seed": str(case.seed),
        "loss": "the sum over outputs of <output, cotangent>",
    }
    return Golden(op, options, made.tensors(call), named, rounded, gradients, told)


def main() -> None:
    """Writes every file."""
    torch.set_num_threads(1)
    for name in FILES:
        path = FOLDER / f"{name}.safetensors"
        save(make(name), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
