"""Starting the ranks, and errors that all of them share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import deepspeed
import deepspeed.comm as dist
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from ds_memopt.measure import limit_memory, resident_gib
from ds_memopt.train.launcher import find_place

Result = TypeVar("Result")


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. device: the accelerator of this rank, or the CPU. process_gib: on a CPU, what
    interpreter and libraries take, in GiB."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    process_gib: float | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def start_ranks(memory_limit_gib: float | None = None) -> Ranks:
    """Join the process group that the launcher describes (deepspeed, torchrun, mpirun, srun); alone if there is none.

    On CPU the cores are shared out among the local ranks unless OMP_NUM_THREADS says otherwise. memory_limit_gib: more
    memory each rank shall not get, see `measure.limit_memory`. ValueError if the launcher tells too little, started
    more ranks on this machine than it has GPUs, or if there is no such limit.
    """
    transformers.utils.logging.disable_progress_bar()  # every rank would draw one for each file of weights
    # DeepSpeed 0.19 calls names that torch 2.13 deprecates; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.*deprecated")
    find_place()
    local_rank = int(os.environ["LOCAL_RANK"])
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(
            os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"]
        )
        # A launcher may have bound this process to its share already.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // local_ranks)))
    if not on_cpu:
        if local_rank >= accelerator.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: it sees {accelerator.device_count()}. Start one process per GPU, "
                "all of which see all GPUs of their machine (Slurm: --gpus-per-node, not --gpus-per-task)"
            )
        accelerator.set_device(local_rank)
    deepspeed.init_distributed(verbose=False)
    device = torch.device("cpu" if on_cpu else accelerator.device_name(local_rank))
    if memory_limit_gib is not None:
        on_all_ranks(lambda: limit_memory(device, memory_limit_gib))
    return Ranks(dist.get_rank(), local_rank, dist.get_world_size(), device, resident_gib() if on_cpu else None)


def stop_ranks() -> None:
    """Leave the process group, and remove the shared memory that DeepSpeed's CPU all_reduce leaves behind: 66 MiB."""
    if dist.is_initialized():
        dist.destroy_process_group()
    remove_shared_memory(*(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")))


def remove_shared_memory(address: str, port: str, rank: str) -> None:
    """What DeepSpeed's CPU all_reduce leaves behind; "*" stands for any."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{address}_{port}_{rank}"):
        buffer.unlink(missing_ok=True)


def on_all_ranks(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank. If it raises on any, raise one ValueError on all, so that no rank waits for another."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # whatever it is, the other ranks must hear of it before this one leaves
        error = raised
    message = error and (str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}")
    messages: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(messages, message)
    for rank, message in enumerate(messages):
        if message is not None:
            raise ValueError(message if rank == 0 else f"rank {rank}: {message}") from error
    return result


def first_rank_of_node_first(work: Callable[[], Result], local_rank: int) -> Result:
    """Run `work` on the first rank of each node, then on the others, which find its cache. Errors as `on_all_ranks`."""
    result = on_all_ranks(lambda: work() if local_rank == 0 else None)
    return on_all_ranks(lambda: result if local_rank == 0 else work())
