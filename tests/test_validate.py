"""Strict arguments: every error names the argument, what it got, and what it accepts."""

from __future__ import annotations

import pytest
import torch

import titans_backends as tb

B, T, H, D = 2, 12, 4, 8


def given(**changes: object) -> dict[str, object]:
    base = {
        "q": torch.randn(B, T, H, D), "k": torch.randn(B, T, H, D), "v": torch.randn(B, T, H, D),
        "beta": torch.rand(B, T, H), "g": -torch.rand(B, T, H),
    }  # fmt: skip
    return {name: value for name, value in {**base, **changes}.items() if value is not ...}


def packed(ends: object, tokens: int = T) -> dict[str, object]:
    return given(**{n: t[:1, :tokens] for n, t in given().items()}, cu_seqlens=ends)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"bta": 1}, TypeError, "got an unexpected keyword 'bta'; its parameters are q, k, v, beta, g, gate"),
        ({"q": ...}, TypeError, "missing 1 required positional argument: 'q'"),
        ({"q": [1]}, TypeError, "q must be a torch.Tensor, got list"),
        ({"g": 1.0}, TypeError, "g must be a torch.Tensor or None, got float"),
        ({"q": torch.randn(B, T, H)}, ValueError, r"q must have shape \[B, T, G, K\], got \(2, 12, 4\) \(3 dimensions\)"),
        ({"k": torch.randn(B, T + 1, H, D)}, ValueError, "k has T = 13 .* but q has T = 12"),
        ({"beta": torch.rand(B, T, H + 1)}, ValueError, "beta has H = 5 .* but v has H = 4"),
        ({"q": torch.randn(B, T, 3, D), "k": torch.randn(B, T, 3, D)}, ValueError, "q and k have 3 heads and v has 4; .* must divide"),
        ({"q": torch.randn(B, T, 2, D)}, ValueError, "k has G = 4 .* but q has G = 2"),
        ({"k": torch.randn(B, T, H, D).double()}, ValueError, r"k has dtype float64; it must be float32 \(that of q\)"),
        ({"q": torch.zeros(B, T, H, D, dtype=torch.int32)}, ValueError, "q has dtype int32; accepted are float64, float32, bfloat16, float16"),
        ({"beta": torch.rand(B, T, H).bfloat16()}, ValueError, "beta has dtype bfloat16; it must be float32"),
        ({"initial_state": torch.zeros(B, H, D, D).half()}, ValueError, "initial_state has dtype float16; it must be float32"),
        ({"initial_state": torch.zeros(3, H, D, D)}, ValueError, "initial_state has B = 3|but q has B = 2"),
        ({"k": torch.randn(B, T, H, D, device="meta")}, ValueError, r"k is on meta, but q is on cpu; it must be on cpu: k.to\('cpu'\)"),
        ({"q": torch.randn(B, T, H, D).to_sparse()}, TypeError, "q must be a strided tensor, got layout torch.sparse_coo"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1, got 0"),
        ({"chunk_size": "64"}, TypeError, r"chunk_size must be an int or None, got '64' \(str\)"),
        ({"chunk_size": True}, TypeError, "chunk_size must be an int or None, got True"),
        ({"scale": "x"}, TypeError, "scale must be a number or None, got 'x'"),
        ({"qk_l2norm": 1}, TypeError, "qk_l2norm must be True or False, got 1"),
        ({"cu_seqlens": torch.tensor([0, T])}, ValueError, "so B must be 1, got 2"),
        ({"cu_seqlens": [0, T]}, TypeError, "cu_seqlens must be a torch.Tensor or None, got list"),
    ],
)
def test_gated_delta_rule_refuses(changes: dict[str, object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=f"gated_delta_rule: .*{message}"):
        tb.get_op("gated_delta_rule")(**given(**changes))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        (torch.tensor([1, T]), "must start at 0 and end at T = 12, got 1 and 12"),
        (torch.tensor([0, 11]), "must start at 0 and end at T = 12, got 0 and 11"),
        (torch.tensor([0, 8, 4, T]), "must not fall, but goes from 8 to 4 at entry 2"),
        (torch.tensor([0.0, 12.0]), "cu_seqlens has dtype float32; it must be int32 or int64"),
        (torch.tensor([[0, T]]), r"cu_seqlens must have shape \[E\], got \(1, 2\)"),
        (torch.tensor([], dtype=torch.int64), r"must have N \+ 1 entries"),
    ],
)
def test_cu_seqlens_is_checked(ends: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tb.get_op("gated_delta_rule")(**packed(ends))


def test_cu_seqlens_values_are_checked_at_every_call() -> None:
    op = tb.get_op("gated_delta_rule")
    op(**packed(torch.tensor([0, 5, T])))
    op(**packed(torch.tensor([0, 7, T])))
    with pytest.raises(ValueError, match="must not fall"):
        op(**packed(torch.tensor([0, 13, T])))


def test_a_packed_state_has_one_row_per_sequence() -> None:
    with pytest.raises(ValueError, match="a state has N = 3 rows, but cu_seqlens has 3 entries"):
        tb.get_op("gated_delta_rule")(**packed(torch.tensor([0, 5, T])), initial_state=torch.zeros(3, H, D, D))


def test_float64_takes_states_of_either_width() -> None:
    wide = {n: t.double() for n, t in given().items()}
    op = tb.get_op("gated_delta_rule")
    for dtype in (torch.float32, torch.float64):
        assert op(**wide, initial_state=torch.zeros(B, H, D, D, dtype=dtype), output_final_state=True)[1].dtype == torch.float64


def test_slow_core_takes_one_kind_of_decay() -> None:
    q, k, v, _, g = given().values()
    with pytest.raises(ValueError, match="g and chunk_decay are both given"):
        tb.get_op("slow_core")(q, k, v, k, g=g, chunk_decay=torch.ones(B, 1, H))


def test_chunk_decay_has_one_factor_per_chunk() -> None:
    q, k, v, _, _ = given().values()
    with pytest.raises(ValueError, match=r"chunk_decay has M = 2 chunks .* it must have ceil\(T / chunk_size\) = 3"):
        tb.get_op("slow_core")(q, k, v, k, chunk_decay=torch.ones(B, 2, H), chunk_size=4)
    ends = torch.tensor([0, 5, 5, 12])
    with pytest.raises(ValueError, match=r"the sum of ceil\(len / chunk_size\) = 4"):
        tb.get_op("slow_core")(q[:1], k[:1], v[:1], k[:1], chunk_decay=torch.ones(1, 3, H), chunk_size=4, cu_seqlens=ends)


@pytest.mark.parametrize("offset", [-1, 16, 100])
def test_chunk_offset_lies_inside_a_chunk(offset: int) -> None:
    q, k, v, _, _ = given().values()
    with pytest.raises(ValueError, match="chunk_offset must be"):
        tb.get_op("fast_core")(q, k, v, chunk_size=16, chunk_offset=offset)


@pytest.mark.parametrize(
    "changes", [{"delta": False}, {"transform": "lam"}, {"normalize_read": True}, {"chunk_decay": torch.ones(B, 1, H), "g": None}]
)
def test_dual_core_offset_only_where_a_sequence_can_be_split(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="chunk_offset=3 cannot be combined with"):
        tb.get_op("dual_core")(**given(**changes), chunk_offset=3)


@pytest.mark.parametrize(
    "changes",
    [{"output_final_state": True}, {"initial_state": torch.zeros(B, H, D, D)}, {"initial_fast_state": torch.zeros(B, H, D, D)}, {"delta": False}],
)
def test_flat_memory_has_no_states(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="memory='flat' carries no state"):
        tb.get_op("dual_core")(**given(**changes), memory="flat")


@pytest.mark.parametrize("alpha", ["0.1", None, True])
def test_alpha_is_a_number_or_a_tensor(alpha: object) -> None:
    with pytest.raises(TypeError, match=r"alpha must be a number or a torch\.Tensor"):
        tb.get_op("dual_core")(**given(), alpha=alpha)


@pytest.mark.parametrize("shape", [(), (H,), (B, T, H)])
def test_alpha_shapes(shape: tuple[int, ...]) -> None:
    fast = tb.get_op("dual_core")(**given(), alpha=torch.full(shape, 0.25))[0]
    assert fast.shape == (B, T, H, D)
    with pytest.raises(ValueError, match=r"alpha must have shape \[\] or \[H\] or \[B, T, H\]"):
        tb.get_op("dual_core")(**given(), alpha=torch.ones(B, T))


def test_unknown_choices_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match="transform must be one of 'exact', 'lam', 'none', got 'fast'"):
        tb.get_op("dual_core")(**given(), transform="fast")


def step(**changes: object) -> dict[str, object]:
    base = {n: t[:, :2] for n, t in given().items()}
    return {**base, "state": torch.zeros(5, H, D, D), "state_indices": torch.tensor([0, 3]), **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"state_indices": torch.tensor([0, 0])}, "names slot 0 more than once"),
        ({"state_indices": torch.tensor([0, 5])}, r"must be -1 \(skip\) or in \[0, 5\), the pool's slots, got 5"),
        ({"state_indices": torch.tensor([0, -2])}, "got -2"),
        ({"state_indices": torch.tensor([0])}, "state_indices has B = 1"),
        ({"state_indices": None}, "state has 5 rows and q, k, v have 2 sequences"),
    ],
)
def test_a_pool_is_checked(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tb.get_op("gated_delta_step")(**step(**changes))


def test_a_slot_named_twice_is_found_on_a_memo_hit() -> None:
    op = tb.get_op("gated_delta_step")
    op(**step())
    with pytest.raises(ValueError, match="more than once"):
        op(**step(state_indices=torch.tensor([1, 1])))


@pytest.mark.parametrize("tokens", [0, 9])
def test_a_step_is_one_to_eight_tokens(tokens: int) -> None:
    with pytest.raises(ValueError, match=f"T must be 1 to 8, got {tokens}; use gated_delta_rule"):
        tb.get_op("gated_delta_step")(**{n: t[:, :tokens] for n, t in given().items()}, state=torch.zeros(B, H, D, D))


def test_fused_uw_wants_square_matrices_and_one_set_of_leading_dimensions() -> None:
    op = tb.get_op("fused_uw")
    with pytest.raises(ValueError, match="attn_const has C = "):
        op(torch.zeros(2, 4, 5), torch.zeros(2, 4, 3), torch.zeros(2, 4, 3))
    with pytest.raises(ValueError, match="v_beta has leading dimensions"):
        op(torch.zeros(2, 4, 4), torch.zeros(3, 4, 3), torch.zeros(2, 4, 3))


def test_nan_goes_through() -> None:
    broken = given(v=torch.full((B, T, H, D), float("nan")))
    assert bool(torch.isnan(tb.get_op("gated_delta_rule")(**broken)[0]).any())


def test_the_chunks_of_a_packed_decay_are_counted_at_every_call() -> None:
    q, k, v, _, _ = (t[:1] for t in given().values())
    op, decay = tb.get_op("slow_core"), torch.rand(1, 3, H)
    op(q, k, v, k, chunk_decay=decay, chunk_size=8, cu_seqlens=torch.tensor([0, 1, 12]))
    with pytest.raises(ValueError, match=r"chunk_decay has M = 3 chunks .* = 2"):
        op(q, k, v, k, chunk_decay=decay, chunk_size=8, cu_seqlens=torch.tensor([0, 8, 12]))


@pytest.mark.parametrize("state", [torch.zeros(1, 1, D, D).expand(B, H, D, D), torch.zeros(999).as_strided((B, H, D, D), (64, 64, 8, 1))])
def test_a_state_that_overlaps_itself_is_not_changed_in_place(state: torch.Tensor) -> None:
    tokens = {n: t[:, :2] for n, t in given().items()}
    with pytest.raises(ValueError, match=r"some elements share memory; .* Pass state\.clone\(\)"):
        tb.get_op("gated_delta_step")(**tokens, state=state, inplace=True)
    tb.get_op("gated_delta_step")(**tokens, state=state)
    kept = torch.zeros(H, B, D, D).transpose(0, 1)
    assert tb.get_op("gated_delta_step")(**tokens, state=kept, inplace=True)[1] is kept
    assert bool(kept.any())


def test_nested_tensors_and_numbers_beyond_a_float_are_refused_by_name() -> None:
    nested = torch.nested.nested_tensor([torch.randn(T, H, D), torch.randn(T - 1, H, D)])
    with pytest.raises(TypeError, match="q must be an ordinary tensor, got a nested one"):
        tb.get_op("gated_delta_rule")(**given(q=nested))
    with pytest.raises(ValueError, match="scale must be a number that a float can hold, got an int of 401 digits"):
        tb.get_op("gated_delta_rule")(**given(), scale=10**400)
    with pytest.raises(ValueError, match="alpha must be a number that a float can hold"):
        tb.get_op("dual_core")(**given(), alpha=10**400)
