"""short_conv's properties, on whatever dispatch chooses: the original's alignment, causality, states, neighbours, and what it refuses."""

from __future__ import annotations

import pytest
import torch

import titans_backends as tb

B, T, H, V = 2, 19, 2, 6
F64 = torch.float64


def given(tokens: int = T, batch: int = B) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, weight and bias."""
    source = torch.Generator().manual_seed(7)
    sizes = ((batch, tokens, H, V), (H, V, 4), (H, V))
    x, weight, bias = (torch.randn(size, generator=source, dtype=F64) for size in sizes)
    return x, weight, bias


@pytest.mark.parametrize(("lookahead", "padding"), [(1, 2), (0, 3)], ids=["original", "causal"])
def test_it_is_torchs_padded_convolution_cut_to_the_length(lookahead: int, padding: int) -> None:
    x, weight, bias = given()
    conv = torch.nn.Conv1d(H * V, H * V, 4, groups=H * V, padding=padding, dtype=F64)
    conv.weight.data, conv.bias.data = weight.view(H * V, 1, 4), bias.flatten()
    want = torch.nn.functional.silu(conv(x.flatten(2).transpose(1, 2))[..., :T].transpose(1, 2)).view_as(x)
    got = tb.get_op("short_conv")(x, weight, bias, lookahead=lookahead)[0]
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("lookahead", [0, 1, 3])
def test_a_token_reaches_its_own_output_and_as_many_before_it_as_it_looks_ahead(lookahead: int) -> None:
    x, weight, bias = given(batch=1)
    changed = x.clone()
    changed[:, 9] += 1
    op = tb.get_op("short_conv")
    differs = (op(x, weight, bias, lookahead=lookahead)[0] != op(changed, weight, bias, lookahead=lookahead)[0]).flatten(2).any(-1)[0]
    assert differs.nonzero().flatten().tolist() == list(range(9 - lookahead, 13 - lookahead))


@pytest.mark.parametrize("pieces", [[1] * T, [0, 2, 0, 3, 1, 13], [18, 1]], ids=str)
def test_a_sequence_fed_in_pieces_equals_the_sequence_fed_at_once(pieces: list[int]) -> None:
    x, weight, bias = given()
    op = tb.get_op("short_conv")
    want, last = op(x, weight, bias, output_final_state=True)
    state, outputs = None, []
    for piece in x.split(pieces, 1):
        y, state = op(piece, weight, bias, initial_state=state, output_final_state=True)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), want)
    torch.testing.assert_close(state, last)
    assert torch.equal(last, x[:, -4:].movedim(1, -1))


@pytest.mark.parametrize("lookahead", [0, 1])
def test_a_packed_sequence_knows_nothing_of_its_neighbours(lookahead: int) -> None:
    x, weight, bias = (t.requires_grad_() for t in given(batch=1))
    ends = torch.tensor([0, 7, 7, 9, T])
    broken = x.detach().clone()
    broken[:, 7:9] = float("nan")
    op = tb.get_op("short_conv")
    want, got = (op(one, weight, bias, lookahead=lookahead, cu_seqlens=ends)[0] for one in (x, broken))
    assert got[:, 7:9].isnan().all()
    for part in (slice(0, 7), slice(9, T)):
        assert torch.equal(got[:, part], want[:, part])
        alone = op(x[:, part], weight, bias, lookahead=lookahead)[0]
        torch.testing.assert_close(got[:, part], alone)
    (reached,) = torch.autograd.grad(want[:, 7:9].sum(), x)
    assert reached[:, 7:9].all()
    assert not reached[:, :7].any()
    assert not reached[:, 9:].any()


def test_what_cannot_be_is_refused_with_a_sentence() -> None:
    x, weight, bias = given()
    op = tb.get_op("short_conv")
    with pytest.raises(ValueError, match=r"lookahead must be 0 \(causal\) to 3, got 4"):
        op(x, weight, bias, lookahead=4)
    for keywords in ({"initial_state": torch.zeros(B, H, V, 4, dtype=F64)}, {"output_final_state": True}):
        with pytest.raises(ValueError, match=r"cannot be continued from a state\. Pass lookahead=0"):
            op(x, weight, bias, lookahead=1, **keywords)
    with pytest.raises(ValueError, match="weight has 3 taps"):
        op(x, weight[..., 1:].contiguous(), bias)
    with pytest.raises(ValueError, match="initial_state has W = 3"):
        op(x, weight, bias, initial_state=torch.zeros(B, H, V, 3, dtype=F64))
