"""A script for test_accelerate: swapped models trained by DistributedDataParallel and by FSDP2 on two gloo processes, against one with both halves of the batch.

`accelerate` comes before the wrapping, then after it. Forks after its imports, so that they are paid for once. Prints which models it trained: the LAM
layer's, and one of transformers where that is installed.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import titans_backends as tb
from tests.lam_layer import LamAfter, LamModel


@dataclass(frozen=True, slots=True)
class Case:
    """A model, its batch of two rows, its loss, the layers that are swapped in it, and how far the loss may be off, relatively."""

    name: str
    make: Callable[[], nn.Module]
    batch: Tensor
    loss: Callable[[nn.Module, Tensor], Tensor]
    layers: Callable[[nn.Module], list[nn.Module]]
    limit: float = 1e-9


def lam() -> Case:
    def make() -> LamModel:
        torch.manual_seed(1)
        return LamModel(LamAfter, d_model=16).double()

    x = torch.randn(2, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Case("lam", make, x, lambda model, x: model(x).square().mean(), lambda model: [m for m in model.modules() if isinstance(m, LamAfter)])


def qwen() -> Case:
    """transformers' Qwen3.5, of one gated delta layer and one of attention, which computes its loss in float32."""
    from benchmarks.drop_in_models import delta_layers, small_model

    ids = torch.randint(1, 60, (2, 20), generator=torch.Generator().manual_seed(0))

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(ids, labels=ids, use_cache=False).loss

    return Case("qwen3_5", lambda: small_model("qwen3_5").double(), ids, loss, delta_layers, 3e-6)


def alone() -> None:
    """From here on transformers' own function raises."""

    def broken(*args: object, **kwargs: object) -> None:
        raise AssertionError("transformers' own function ran")

    if "transformers" in sys.modules:
        importlib.import_module("transformers.models.qwen3_5.modeling_qwen3_5").torch_chunk_gated_delta_rule = broken


def trained(model: nn.Module, batch: Tensor, case: Case) -> Tensor:
    """The loss after two steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        case.loss(model, batch).backward()
        optimizer.step()
    with torch.no_grad():
        return case.loss(model, batch)


def sharded(model: nn.Module, case: Case) -> nn.Module:
    mesh = init_device_mesh("cpu", (2,))
    for layer in case.layers(model):
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def replicated(model: nn.Module, case: Case) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=True)


def main() -> None:
    cases = [lam(), *([qwen()] if importlib.util.find_spec("transformers") else [])]
    wanted = [trained(case.make(), case.batch, case) for case in cases]
    alone()
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = int(child == 0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        for (case, want), wrap, first in product(zip(cases, wanted, strict=True), (replicated, sharded), (True, False)):
            model = case.make()
            report = tb.accelerate(model) if first else None
            wrapped = wrap(model, case)
            report = report or tb.accelerate(wrapped)
            assert len(report.swapped) == len(case.layers(model)), report
            found = trained(wrapped, case.batch[rank : rank + 1], case)
            dist.all_reduce(found)
            torch.testing.assert_close(found / 2, want, rtol=case.limit, atol=0)
            assert not any(getattr(layer, "calls", 0) for layer in case.layers(model)), "the old forward ran"
            assert not report.lost, report
        dist.destroy_process_group()
        if rank:
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert status == 0, f"the other process ended with {status}"
    print(*(case.name for case in cases))


if __name__ == "__main__":
    main()
