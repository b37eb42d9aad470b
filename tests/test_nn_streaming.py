"""The layer's cache: a sequence fed in any pieces is the sequence fed at once, in place, with gradients; and who refuses one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import titans_backends as tb
from tests.test_nn_dual_core import FORMS, layer_of, replace_ops, tokens
from titans_backends.nn import DualCoreCache, Level, TitansDualCore

STREAMED = pytest.mark.parametrize("form", [form for form in FORMS if form.startswith("recurrent")])
PIECES = ([1] * 5 + [11, 1, 15, 16, 0, 23], [33, 38], [16, 16, 16, 16, 7], [71])


@STREAMED
def test_a_sequence_in_pieces_is_the_sequence_at_once(form: str) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(2, 71)
    y, states, _ = layer(x, return_states=True)
    for pieces in PIECES:
        cache = layer.new_cache(2)
        held = [tensor.data_ptr() for tensor in cache.tensors()]
        parts = [layer(part, cache=cache, return_states=True) for part in x.split(pieces, 1)]
        torch.testing.assert_close(torch.cat([part[0] for part in parts], 1), y, rtol=1e-9, atol=1e-10)
        for got, want in zip(parts[-1][1], states, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)
        assert cache.position == 71
        assert [tensor.data_ptr() for tensor in cache.tensors()] == held


@STREAMED
def test_gradients_run_through_the_cache_until_it_is_detached(form: str) -> None:
    layer, x, weight = layer_of(form), tokens(1, 40), tokens(1, 40, seed=2)

    def gradients(pieces: list[int], *, detached: bool = False) -> dict[str, torch.Tensor]:
        layer.zero_grad()
        cache, total = layer.new_cache(1), torch.zeros((), dtype=x.dtype)
        for part, weights in zip(x.split(pieces, 1), weight.split(pieces, 1), strict=True):
            total = total + (layer(part, cache=cache) * weights).sum()
            if detached:
                cache.detach_()
        total.backward()
        return {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}

    whole, carried, cut = gradients([40]), gradients([3, 20, 17]), gradients([3, 20, 17], detached=True)
    assert whole.keys() == carried.keys()
    for name in whole:
        torch.testing.assert_close(carried[name], whole[name], rtol=1e-8, atol=1e-10, msg=lambda told, name=name: f"{name}: {told}")
    assert not torch.allclose(cut["q_proj.weight"], whole["q_proj.weight"])


@STREAMED
def test_a_cache_that_was_reset_is_a_new_one(form: str) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(2, 30)
    cache = layer.new_cache(2)
    first = layer(x, cache=cache)
    cache.reset()
    assert cache.position == 0
    assert torch.equal(layer(x, cache=cache), first)


@STREAMED
def test_a_call_that_fails_leaves_the_cache_as_it_was(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(form).requires_grad_(False), tokens(2, 30)
    cache = layer.new_cache(2)
    layer(x, cache=cache)
    before = [tensor.clone() for tensor in cache.tensors()]

    def failing(name: str) -> Callable[..., object]:
        if name.startswith("dual_core"):
            raise RuntimeError("no memory left")
        return tb.get_op(name)

    with monkeypatch.context() as patch:
        replace_ops(patch, failing)
        for length in (1, 20):
            with pytest.raises(RuntimeError, match="no memory left"):
                layer(x[:, :length], cache=cache)
    assert cache.position == 30
    assert all(map(torch.equal, cache.tensors(), before))


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("recurrent")])
def test_a_form_that_looks_ahead_refuses_a_cache(form: str) -> None:
    layer = layer_of(form)
    with pytest.raises(ValueError, match="Use mode='recurrent', or call the layer on the whole sequence"):
        layer.new_cache(1)
    with pytest.raises(ValueError, match="cannot continue this layer"):
        layer(tokens(1, 3), cache=layer_of("recurrent").new_cache(1))


def test_a_cache_that_does_not_fit_is_refused() -> None:
    layer = layer_of("recurrent")
    with pytest.raises(ValueError, match="Use convolution='causal'"):
        TitansDualCore(24, 2, convolution="original").new_cache(1)
    with pytest.raises(ValueError, match=r"make one with layer.new_cache\(3\)"):
        layer(tokens(3, 4), cache=layer.new_cache(2))
    with pytest.raises(ValueError, match="with attention_mask: the rows of a cache advance together"):
        layer(tokens(1, 4), torch.ones(1, 4, dtype=torch.bool), cache=layer.new_cache(1))
    with pytest.raises(ValueError, match="with cu_seqlens: the rows"):
        layer(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]), cache=layer.new_cache(1))
    with pytest.raises(ValueError, match="another decay than 'token'"):
        layer(tokens(1, 4), cache=layer_of("recurrent by chunks").new_cache(1))
    levels = layer_of("recurrent of four cores")  # with periods 1 and 2
    for other, had in ((layer_of("recurrent", levels=[Level(2), Level(1)]), r"\(2, 1\)"), (layer, r"\(\)")):
        with pytest.raises(ValueError, match=rf"levels have the periods {had}, and this layer's have \(1, 2\); make one"):
            levels(tokens(1, 4), cache=other.new_cache(1))
    with pytest.raises(TypeError, match="got list"):
        layer(tokens(1, 4), cache=[layer.new_cache(1)])
    assert isinstance(layer.new_cache(1), DualCoreCache)


@STREAMED
def test_a_piece_without_gradients_changes_nothing_that_an_earlier_graph_holds(form: str) -> None:
    layer, x = layer_of(form), tokens(1, 40)

    def gradients(*, detached: bool) -> torch.Tensor:
        layer.zero_grad()
        cache = layer.new_cache(1)
        first = layer(x[:, :10], cache=cache)
        held = cache.slow
        if detached:
            cache.detach_()
        with torch.no_grad():
            layer(x[:, 10:14], cache=cache)
        assert detached or cache.slow is not held
        (first.sum() + layer(x[:, 14:], cache=cache).sum()).backward()
        assert layer.k_proj.weight.grad is not None
        return layer.k_proj.weight.grad.clone()

    torch.testing.assert_close(gradients(detached=False), gradients(detached=True))
