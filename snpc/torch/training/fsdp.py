"""Fully sharded data parallelism (torch's FSDP2): weights, gradients and optimizer state, sharded over processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from snpc.torch.operators import Tensor
from snpc.torch.training.distributed import Worker


def shard_module(module: torch.nn.Module, worker: Worker) -> None:
    """Leave each process its shard of every parameter. Whole parameters exist during forward and backward passes only
    (Zhao et al. 2023, arXiv 2304.11277)."""
    mesh = init_device_mesh(worker.device.type, (worker.world_size,))
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def gather_tensors(values: Any) -> Any:
    """``values`` (lists and dictionaries of tensors) with every sharded tensor gathered. Every process has to call
    this."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, values)


def local_shard(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's shard of ``value``, where ``parameter`` is sharded too; else the whole of it, on its device."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """The state of an optimizer, given with whole tensors, with the shards of this process. ``parameters``: in the
    optimizer's order."""
    sharded = {
        index: {name: local_shard(x, parameters[index]) if x.ndim else x for name, x in slots.items()}
        for index, slots in state["state"].items()
    }
    return {**state, "state": sharded}


def copy_gathered_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy the weights of a sharded module to an unsharded one of the same kind. Every process has to call this."""
    parameters = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(gather_tensors(parameters[name]))
    dist.barrier()
