"""Weights, gradients and the optimiser's state shared out among processes (torch's FSDP2), and how to get them back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

from snpc.torch.operators.registry import Tensor
from snpc.torch.training.distributed import Worker


def shard_module(module: torch.nn.Module, place: Worker) -> None:
    """Leave to each process its part of every parameter. They come together for a pass forward and for one backward
    (Zhao et al. 2023, arXiv 2304.11277)."""
    mesh = init_device_mesh(place.device.type, (place.world_size,))
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


def gather_tensors(values: Any) -> Any:
    """``values``, lists and dictionaries of tensors, with all parts together. Every process has to ask."""
    return tree_map(lambda x: x.full_tensor() if isinstance(x, DTensor) else x, values)


def local_shard(value: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of ``value``, where ``parameter`` is shared out too."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value.to(parameter.device)
    return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)


def shard_optimizer_state(state: dict[str, Any], parameters: Sequence[Tensor]) -> dict[str, Any]:
    """An optimiser's state, of whole tensors, as that of the parts. ``parameters``: in the optimiser's order."""
    found = {
        number: {name: local_shard(x, parameters[number]) if x.ndim else x for name, x in slots.items()}
        for number, slots in state["state"].items()
    }
    return {**state, "state": found}


def copy_gathered_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy the weights of a module that is shared out to one of the same kind that is not. Every process has to."""
    taken = dict(source.named_parameters())
    with torch.no_grad():
        for name, parameter in target.named_parameters():
            parameter.copy_(gather_tensors(taken[name]))
    dist.barrier()
