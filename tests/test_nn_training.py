"""The layer and the encoder in torch's machinery: one graph under torch.compile, no wait for the device, autocast, checkpointing, 16 bits, two processes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from tests import fresh
from tests.test_nn_encoder import encoder_of, ids
from tests.test_nn_joint import Launches
from titans_backends.nn import TitansEncoder

MODES = pytest.mark.parametrize("mode", ["flat", "loop", "dual", "recurrent"])


def gradients(encoder: TitansEncoder, loss: Tensor) -> dict[str, Tensor]:
    encoder.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


@MODES
def test_an_encoder_is_one_graph_under_a_compiler(mode: str) -> None:
    torch.compiler.reset()
    encoder, ends = encoder_of(mode=mode, num_layers=1, merge="flux"), torch.tensor([0, 20, 20, 37], dtype=torch.int32)
    for given in ({}, {"cu_seqlens": ends}) if mode == "recurrent" else ({},):
        compiled = torch.compile(encoder, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(ids(1, 37), **given), encoder(ids(1, 37), **given))


def test_a_compiled_encoder_trains() -> None:
    torch.compiler.reset()
    encoder, tokens = encoder_of(num_layers=1, merge="flux").requires_grad_(True), ids(2, 37)
    found, want = torch.compile(encoder, backend="aot_eager", fullgraph=True)(tokens), encoder(tokens)
    torch.testing.assert_close(gradients(encoder, found.pooled[0, 0]), gradients(encoder, want.pooled[0, 0]))


@MODES
def test_inference_does_not_wait_for_the_device(mode: str) -> None:
    encoder = encoder_of(mode=mode, merge="flux")
    for ends in (None, torch.tensor([0, 20, 37])) if mode in ("flat", "recurrent") else (None,):
        with Launches() as counted:
            encoder(ids(1, 37), cu_seqlens=ends)
        assert not {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "is_nonzero"} & set(counted.names)


@MODES
def test_a_checkpointed_encoder_has_the_same_gradients(mode: str) -> None:
    encoder, tokens = encoder_of(mode=mode, merge="flux").requires_grad_(True), ids(2, 37)
    x = encoder.embeddings(tokens)
    for layer in encoder.layers:
        x = checkpoint(layer, x, use_reentrant=False)
    again = gradients(encoder, x.square().mean())
    torch.testing.assert_close(again, gradients(encoder, encoder(tokens).tokens.square().mean()))
    assert again


@MODES
def test_an_encoder_in_sixteen_bits_and_under_autocast(mode: str) -> None:
    encoder, tokens = encoder_of(mode=mode, merge="flux").float().requires_grad_(True), ids(2, 37)
    want = encoder(tokens).pooled
    with torch.autocast("cpu", torch.bfloat16):
        mixed = encoder(tokens).pooled
        assert gradients(encoder, mixed[0, 0])["layers.0.mixer.q_proj.weight"].dtype == torch.float32
    plain = encoder.bfloat16()(tokens).pooled
    gradients(encoder, plain[0, 0])
    assert plain.dtype == torch.bfloat16
    for found in (mixed, plain):
        assert torch.nn.functional.cosine_similarity(found.float(), want, dim=-1).min() > 0.99


def test_two_processes_train_as_one() -> None:
    script = Path(__file__).with_name("nn_on_two_processes.py")
    done = fresh.run(f"import runpy\nrunpy.run_path({str(script)!r})['main']('recurrent')")
    assert done.returncode == 0, done.stderr
