"""One of two processes that train a patched model together over gloo; prints every way's losses as JSON.

Usage: python two_processes.py CHECKPOINT STORE RANK
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from patching import batch, image, randomise_grafts
from surgeon import models
from surgeon.memory.graft import Graft

GRID = (1, 4, 6)
STEPS = 3


def rows(model: PreTrainedModel, step: int) -> list[dict[str, torch.Tensor]]:
    """A row for each process. Without an image the second, in the second step: its grafts have nothing to do."""
    batches = []
    for rank in range(2):
        tokens = torch.randint(5, 500, (6,), generator=torch.Generator().manual_seed(10 * step + rank)).tolist()
        grids = [GRID] if (step, rank) != (1, 1) else []
        kwargs = batch(model, [[5, *(image(GRID) if grids else []), *tokens]], grids, seed=step)
        labels = kwargs["input_ids"].clone()
        labels[:, :-6] = -100
        batches.append({**kwargs, "labels": labels, "use_cache": False})
    return batches


def grafted(path: str) -> PreTrainedModel:
    model = models.load(path, dtype=torch.float32)
    randomise_grafts(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".pvm." in name or ".mixin." in name)
    return model.train()


def losses(model: PreTrainedModel, call: Any, ranks: list[int]) -> list[float]:
    """Of each step, the mean over all rows. `ranks`: whose rows this process has."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    means = []
    for step in range(STEPS):
        optimizer.zero_grad()
        own = [rows(model, step)[rank] for rank in ranks]
        total = torch.zeros(())
        for kwargs in own:
            loss = call(**kwargs).loss / len(own)
            loss.backward()
            total += loss.detach()
        optimizer.step()
        if len(ranks) == 1:
            dist.all_reduce(total)
            total /= 2
        means.append(float(total))
    return means


def sharded(model: PreTrainedModel, each_graft: bool, **options: Any) -> PreTrainedModel:
    """As accelerate's FSDP2 does it: every layer by itself, then the rest; `each_graft` by itself too. The vision tower
    is of the rest: a process without an image does not call its blocks, patched or not."""
    mesh = init_device_mesh("cpu", (2,))
    for layer in model.model.language_model.layers:
        for graft in (child for child in layer.children() if isinstance(child, Graft) and each_graft):
            fully_shard(graft, mesh=mesh, **options)
        fully_shard(layer, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def main(path: str, store: str, rank: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
    own = [int(rank)]

    def alone() -> list[float]:
        model = grafted(path)
        return losses(model, model, [0, 1])

    def ddp() -> list[float]:
        model = grafted(path)
        return losses(model, DistributedDataParallel(model), own)

    def layers() -> list[float]:
        model = sharded(grafted(path), each_graft=False)
        return losses(model, model, own)

    def layers_and_grafts() -> list[float]:
        model = sharded(grafted(path), each_graft=True)
        return losses(model, model, own)

    def checkpointed() -> list[float]:
        model = grafted(path)
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
        model = sharded(model, each_graft=False)
        return losses(model, model, own)

    def mixed_precision() -> list[float]:
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        model = sharded(grafted(path), each_graft=False, mp_policy=policy)
        return losses(model, model, own)

    ways: list[Callable[[], list[float]]] = [alone, ddp, layers, layers_and_grafts, checkpointed, mixed_precision]
    losses_by_way = {way.__name__: way() for way in ways}
    dist.destroy_process_group()
    if rank == "0":
        print(json.dumps(losses_by_way))


if __name__ == "__main__":
    main(*sys.argv[1:])
