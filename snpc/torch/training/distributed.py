"""Where a run computes: one process, or several started by torchrun, which share each batch (torch's DDP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Worker:
    """A process's device, its number and how many there are. Number 0 writes and reports."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed_worker() -> Iterator[Worker]:
    """The place of this process: a GPU of its own where there are any, else the CPU. Under torchrun (it sets
    WORLD_SIZE) the processes find each other, by NCCL on GPUs and gloo on CPUs; a group that is there already is used
    as it is."""
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world == 1:
        yield Worker(device)
        return
    ours = not dist.is_initialized()
    if ours:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Worker(device, rank, world)
    finally:
        if ours:
            dist.destroy_process_group()


def wait_for_workers(place: Worker) -> None:
    """Wait until every process is here."""
    if place.world_size > 1:
        dist.barrier()
