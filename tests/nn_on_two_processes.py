"""A script for test_nn_training: an encoder trained by DistributedDataParallel and by FSDP2 on two gloo processes, against one with both halves of the batch.

Forks after its imports, so that they are paid for once.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from titans_backends.nn import TitansEncoder, TitansEncoderConfig

IDS = torch.randint(0, 20, (2, 12), generator=torch.Generator().manual_seed(0))


def encoder_of(mode: str) -> TitansEncoder:
    torch.manual_seed(1)
    return TitansEncoder(TitansEncoderConfig(20, 16, 2, 2, 24, mode, chunk_size=4, merge="flux"), dtype=torch.float64)


def trained(model: torch.nn.Module, ids: Tensor) -> Tensor:
    """The loss after two steps of SGD; of an encoder without noise, so that a wrong gradient shows."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(ids, pool=False).tokens[:, -1, :4].sum(-1).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model(ids, pool=False).tokens[:, -1, :4].sum(-1).square().mean()


def main(mode: str) -> None:
    want = trained(encoder_of(mode), IDS)
    with tempfile.TemporaryDirectory() as folder:
        child = os.fork()
        rank = int(child == 0)
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
        mine = IDS[rank : rank + 1]
        sharded = encoder_of(mode)
        mesh = init_device_mesh("cpu", (2,))
        for layer in sharded.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
        for model in (DistributedDataParallel(encoder_of(mode), find_unused_parameters=True), sharded):
            found = trained(model, mine)
            dist.all_reduce(found)
            torch.testing.assert_close(found / 2, want, rtol=1e-9, atol=1e-12)
        assert all(layer.mixer._standing.joint is None for layer in sharded.layers), "the unsharded weights are still held"
        dist.destroy_process_group()
        if rank:
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert status == 0, f"the other process ended with {status}"


if __name__ == "__main__":
    main(sys.argv[1])
