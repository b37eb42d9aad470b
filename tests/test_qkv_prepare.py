"""qkv_prepare's properties, on whatever dispatch chooses: it is its parts, it streams, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import titans_backends as tb

B, T, G, H, K, V = 2, 11, 2, 4, 6, 5
F64 = torch.float64


def given() -> dict[str, torch.Tensor]:
    """All tensors but the states."""
    source = torch.Generator().manual_seed(11)
    sizes = {"q": (G, K), "k": (G, K), "v": (H, V)}
    found = {name: torch.randn(B, T, *size, generator=source, dtype=F64) for name, size in sizes.items()}
    found |= {f"{name}_weight": torch.randn(*size, 4, generator=source, dtype=F64) for name, size in sizes.items()}
    return found | {f"{name}_bias": torch.randn(*size, generator=source, dtype=F64) for name, size in sizes.items()}


@pytest.mark.parametrize("lookahead", [0, 1])
def test_it_is_three_short_convolutions_and_unit_q_and_k(lookahead: int) -> None:
    x = given()
    got = tb.get_op("qkv_prepare")(**x, lookahead=lookahead)[:3]
    q, k, v = (tb.get_op("short_conv")(x[n], x[f"{n}_weight"], x[f"{n}_bias"], lookahead=lookahead)[0] for n in "qkv")
    for mine, want in zip(got, (torch.nn.functional.normalize(q, dim=-1), torch.nn.functional.normalize(k, dim=-1), v), strict=True):
        torch.testing.assert_close(mine, want)


def test_the_norms_part_where_a_head_is_small() -> None:
    x = {name: 1e-3 * t for name, t in given().items()}
    op = tb.get_op("qkv_prepare")
    plain, eps, none = (op(**x, qk_norm=norm)[1] for norm in ("l2", "l2_eps", "none"))
    torch.testing.assert_close(plain.norm(dim=-1), torch.ones(B, T, G, dtype=F64))
    torch.testing.assert_close(eps, none * torch.rsqrt((none * none).sum(-1, keepdim=True) + 1e-6))
    assert eps.norm(dim=-1).max() < 0.9


def test_pieces_equal_the_whole() -> None:
    x, op = given(), tb.get_op("qkv_prepare")
    want = op(**x, output_final_state=True)
    first = op(**{n: t[:, :3] if n in "qkv" else t for n, t in x.items()}, output_final_state=True)
    states = dict(zip(("q_state", "k_state", "v_state"), first[3:], strict=True))
    second = op(**{n: t[:, 3:] if n in "qkv" else t for n, t in x.items()}, **states, output_final_state=True)
    for index, whole in enumerate(want):
        torch.testing.assert_close(torch.cat([first[index], second[index]], 1) if index < 3 else second[index], whole)


def test_biases_and_states_come_in_threes() -> None:
    x, op = given(), tb.get_op("qkv_prepare")
    del x["k_bias"]
    with pytest.raises(ValueError, match="q_bias, v_bias without the others; pass q_bias, k_bias and v_bias, or none of them"):
        op(**x)
    with pytest.raises(ValueError, match="q_state without the others"):
        op(**given(), q_state=torch.zeros(B, G, K, 4, dtype=F64))
    states = {f"{n}_state": torch.zeros(B, *size, 4, dtype=F64) for n, size in {"q": (G, K), "k": (G, K), "v": (H, V)}.items()}
    with pytest.raises(ValueError, match="q_state with lookahead=1: its last outputs wait"):
        op(**given(), **states, lookahead=1)
