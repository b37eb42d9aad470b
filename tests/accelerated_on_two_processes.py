"""A script for test_accelerate: a swapped model trained by DistributedDataParallel and by FSDP2 on two gloo processes, against one with both halves of the batch.

`accelerate` comes before the wrapping, then after it. Forks after its imports, so that they are paid for once.
"""

from __future__ import annotations

import os
import sys
import tempfile
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

X = torch.randn(2, 20, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def model_of() -> LamModel:
    torch.manual_seed(1)
    return LamModel(LamAfter, d_model=16).double()


def trained(model: nn.Module, x: Tensor) -> Tensor:
    """The loss after two steps of SGD."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model(x).square().mean()


def sharded(model: LamModel) -> LamModel:
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def main() -> None:
    want = trained(model_of(), X)
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = int(child == 0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        for wrap, first in product((lambda model: DistributedDataParallel(model, find_unused_parameters=True), sharded), (True, False)):
            model = model_of()
            report = tb.accelerate(model) if first else None
            wrapped = wrap(model)
            report = report or tb.accelerate(wrapped)
            assert len(report.swapped) == 2, report
            found = trained(wrapped, X[rank : rank + 1])
            dist.all_reduce(found)
            torch.testing.assert_close(found / 2, want, rtol=1e-9, atol=1e-12)
            assert all(layer.calls == 0 for layer in model.layers), "the old forward ran"
        dist.destroy_process_group()
        if rank:
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert status == 0, f"the other process ended with {status}"


if __name__ == "__main__":
    main()
