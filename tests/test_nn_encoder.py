"""TitansEncoder: its formula, its masks and poolings, its cache, and the original layers that it loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import titans_backends as tb
from tests.test_nn_dual_core import original
from titans_backends.nn import TitansEncoder, TitansEncoderConfig


def encoder_of(**changes: object) -> TitansEncoder:
    """Two small layers in float64, their LayerNorms' parameters away from 1 and 0."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "d_model": 24, "num_layers": 2, "num_heads": 2, "d_ff": 40, "chunk_size": 16}
    encoder = TitansEncoder(TitansEncoderConfig(**{**sizes, **changes}), dtype=torch.float64).requires_grad_(False)
    for layer in encoder.layers:
        for norm in (layer.norm1, layer.norm2):
            norm.weight.add_(0.2 * torch.randn_like(norm.weight))
            norm.bias.add_(0.2 * torch.randn_like(norm.bias))
    return encoder


def ids(batch: int, seq_len: int) -> Tensor:
    return torch.randint(0, 50, (batch, seq_len), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("mode", ["flat", "loop", "dual", "recurrent"])
@pytest.mark.parametrize("activation", ["gelu", "gelu_twice"])
def test_an_encoder_is_its_formula(mode: str, activation: str) -> None:
    encoder = encoder_of(mode=mode, activation=activation)
    tokens = ids(2, 37)
    x = encoder.embeddings.weight[tokens]
    for layer in encoder.layers:
        x = layer.norm1(x + layer.mixer(x))
        hidden = F.gelu(F.linear(x, layer.ff.up.weight, layer.ff.up.bias))
        hidden = hidden if activation == "gelu" else F.gelu(hidden)
        x = layer.norm2(x + F.linear(hidden, layer.ff.down.weight, layer.ff.down.bias))
    found = encoder(tokens)
    torch.testing.assert_close(found.tokens, x)
    torch.testing.assert_close(found.pooled, x.mean(1) / x.mean(1).norm(dim=-1, keepdim=True))
    torch.testing.assert_close(encoder(inputs_embeds=encoder.embeddings.weight[tokens], pool=False), (x, None))


@pytest.mark.parametrize("pooling", ["mean", "first", "last", "max"])
def test_a_mask_gives_each_row_what_its_tokens_alone_give(pooling: str) -> None:
    encoder, tokens = encoder_of(pooling=pooling), ids(4, 40)
    mask = torch.zeros(4, 40, dtype=torch.int64)
    mask[0, :25], mask[1, 7:], mask[2, 3:30:2] = 1, 1, 1
    found = encoder(tokens, mask)
    lengths = mask.sum(1)
    packed = encoder(tokens[mask.bool()][None], cu_seqlens=F.pad(lengths.cumsum(0), (1, 0)).to(torch.int32))
    torch.testing.assert_close(packed.pooled, found.pooled)
    for row in range(3):
        alone = encoder(tokens[row][mask[row].bool()][None])
        torch.testing.assert_close(found.pooled[row], alone.pooled[0])
        torch.testing.assert_close(found.tokens[row][mask[row].bool()], alone.tokens[0])
    assert not found.tokens[mask == 0].any()
    assert not found.pooled[3].any()
    assert encoder(tokens[:, :0]).pooled.shape == (4, 24)


def test_an_encoder_fed_in_pieces_is_the_encoder_fed_at_once() -> None:
    encoder, tokens = encoder_of(decay="previous_chunk"), ids(2, 40)
    cache = encoder.new_cache(2)
    parts = [encoder(part, cache=cache, pool=False).tokens for part in tokens.split([1, 20, 3, 16], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), encoder(tokens).tokens)


@pytest.mark.golden("lam_*_layer_d64h2v1_T64")
def test_every_layer_loads_an_originals(golden_file: Path) -> None:
    state_dict, stored, sizes = original(golden_file)
    mode = "flat" if "after" in golden_file.name else "loop"
    encoder = TitansEncoder(TitansEncoderConfig(vocab_size=0, num_layers=2, d_ff=40, mode=mode, chunking="original", **sizes))
    for layer in encoder.layers:
        layer.mixer.load_state_dict(state_dict, strict=True)
        torch.testing.assert_close(layer.mixer(stored["x"].float()), stored["y"].float(), rtol=1e-4, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    encoder = encoder_of()
    with pytest.raises(ValueError, match="got neither"):
        encoder()
    with pytest.raises(ValueError, match="got both"):
        encoder(ids(1, 3), inputs_embeds=torch.zeros(1, 3, 24))
    with pytest.raises(ValueError, match=r"got 1; make one with encoder.new_cache\(B\)"):
        encoder(ids(1, 3), cache=encoder.new_cache(1)[:1])
    with pytest.raises(ValueError, match="pass inputs_embeds"):
        encoder_of(vocab_size=0)(ids(1, 3))
    with pytest.raises(tb.UnknownNameError, match="known: 'mean', 'first', 'last', 'max'"):
        TitansEncoderConfig(pooling="cls")
    with pytest.raises(ValueError, match="num_layers=0"):
        TitansEncoderConfig(num_layers=0)


def test_every_layer_needs_a_cache_of_its_own() -> None:
    encoder = TitansEncoder(TitansEncoderConfig(vocab_size=0, d_model=24, num_heads=2, num_layers=2, d_ff=32))
    one, x = encoder.new_cache(1)[0], torch.randn(1, 4, 24)
    for caches in ([one, one], [None, one]):
        with pytest.raises(ValueError, match="a cache of its own for every layer"):
            encoder(inputs_embeds=x, cache=caches)


def test_what_a_global_hook_kept_stays_as_it_was() -> None:
    encoder, kept = TitansEncoder(TitansEncoderConfig(vocab_size=0, d_model=24, num_heads=2, num_layers=1, d_ff=32)), list[tuple[torch.Tensor, ...]]()
    with (
        torch.no_grad(),
        torch.nn.modules.module.register_module_forward_hook(
            lambda module, given, y: kept.append((y, y.clone())) if isinstance(y, torch.Tensor) else None
        ),
    ):
        encoder(inputs_embeds=torch.randn(1, 4, 24), pool=False)
    assert kept
    assert all(torch.equal(y, copy) for y, copy in kept)
