"""The process that a run computes in: a single one, or one of several that torchrun started (torch's DDP)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist


@dataclass(frozen=True)
class Worker:
    """A process: its device, its rank and how many processes there are. The one of rank 0 writes and reports."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@contextmanager
def distributed_worker() -> Iterator[Worker]:
    """This process as a worker, on a GPU of its own where there are any, else on the CPU.

    Under torchrun (it sets WORLD_SIZE) the processes form a group, with NCCL on GPUs and gloo on CPUs. A group that
    exists already is used and left as it is.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if world_size == 1:
        yield Worker(device)
        return
    creates_group = not dist.is_initialized()
    if creates_group:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield Worker(device, rank, world_size)
    finally:
        if creates_group:
            dist.destroy_process_group()


def wait_for_workers(worker: Worker) -> None:
    """Return once every process has called this."""
    if worker.world_size > 1:
        dist.barrier()
