"""Starting the ranks, and errors that all of them share."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import deepspeed
import torch
import transformers
from deepspeed.accelerator import get_accelerator

from ds_memopt.engines.processes import (
    host_group,
    largest_of_all_ranks,
    leave_group,
    on_all_ranks,
    remove_abandoned_shared_memory,
    remove_shared_memory,
    set_timeout_of_new_groups,
)
from ds_memopt.measure import limit_memory, resident_gib
from ds_memopt.train.launcher import find_place
from ds_memopt.train.watchdog import Watchdog

Result = TypeVar("Result")

MAX_TIMEOUT_MINUTES = 10_000  # a week
MIN_PATIENCE = timedelta(minutes=30)  # with a rank that loads or saves alone


@dataclass(frozen=True)
class Ranks:
    """Where this process stands. device: the accelerator of this rank, or the CPU. process_gib: on a CPU, what
    interpreter and libraries take, in GiB. watchdog: None if there is no other rank. hosts: the group for what lies in
    host memory, None where the usual one is.

    A job holds it in a `with` block, at whose end the watch over the ranks ends.
    """

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    process_gib: float | None = None
    watchdog: Watchdog | None = None
    hosts: Any = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def enter(self, stage: str, alone: bool = False) -> None:
        """The job comes to its next stage, "step 7". alone: one rank may work in it while the others wait."""
        if self.watchdog:
            self.watchdog.enter(stage, alone)

    def largest(self, *numbers: float) -> list[float]:
        """Of each number, over all ranks, without waiting for a GPU. All ranks call."""
        return largest_of_all_ranks(numbers, self.hosts) if self.world_size > 1 else [*numbers]

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if self.watchdog:
            self.watchdog.stop(together=error is None)


def start_ranks(memory_limit_gib: float | None = None, timeout_minutes: float = 10) -> Ranks:
    """Join the process group that the launcher describes (deepspeed, torchrun, mpirun, srun); alone if there is none.

    On CPU the cores are shared out among the local ranks unless OMP_NUM_THREADS says otherwise. memory_limit_gib: more
    memory each rank shall not get, see `measure.limit_memory`. timeout_minutes: how long a rank may leave the others
    waiting, see `watchdog`; it watches from here on. ValueError if the launcher tells too little, started more ranks
    on this machine than it has GPUs, or if there is no such limit. TimeoutError if not all ranks start in that time.
    """
    if not 0 < timeout_minutes <= MAX_TIMEOUT_MINUTES:
        raise ValueError(
            f"--timeout_minutes {timeout_minutes} is out of range: it must be more than 0 and at most "
            f"{MAX_TIMEOUT_MINUTES}"
        )
    transformers.utils.logging.disable_progress_bar()  # every rank would draw one for each file of weights
    # DeepSpeed 0.19 calls names that torch 2.13 deprecates; the user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, message="`torch.distributed.*deprecated")
    find_place()
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    if on_cpu and "OMP_NUM_THREADS" not in os.environ:
        local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or world_size)
        # A launcher may have bound this process to its share already.
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (os.cpu_count() or 1) // local_ranks)))
    if not on_cpu:
        if local_rank >= accelerator.device_count():
            raise ValueError(
                f"local rank {local_rank} has no GPU: it sees {accelerator.device_count()}. Start one process per GPU, "
                "all of which see all GPUs of their machine (Slurm: --gpus-per-node, not --gpus-per-task)"
            )
        accelerator.set_device(local_rank)
    if local_rank == 0:
        remove_abandoned_shared_memory()
    timeout = timedelta(minutes=timeout_minutes)
    patience = max(MIN_PATIENCE, 3 * timeout)
    watchdog = Watchdog(rank, world_size, timeout, patience) if world_size > 1 else None
    # The watchdog names the rank and its place, so it shall come first. Groups that DeepSpeed makes later name none.
    group_timeout = patience + timedelta(minutes=5)
    set_timeout_of_new_groups(group_timeout)
    deepspeed.init_distributed(verbose=False, timeout=group_timeout)
    device = torch.device("cpu" if on_cpu else accelerator.device_name(local_rank))
    if memory_limit_gib is not None:
        on_all_ranks(lambda: limit_memory(device, memory_limit_gib))
    hosts = None if on_cpu or world_size == 1 else host_group()
    return Ranks(rank, local_rank, world_size, device, resident_gib() if on_cpu else None, watchdog, hosts)


def stop_ranks() -> None:
    """Leave the process group, and remove the shared memory that DeepSpeed's CPU all_reduce leaves behind: 66 MiB."""
    leave_group()
    remove_shared_memory(*(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")))


def first_rank_of_node_first(work: Callable[[], Result], local_rank: int) -> Result:
    """Run `work` on the first rank of each node, then on the others, which find its cache. Errors as `on_all_ranks`."""
    result = on_all_ranks(lambda: work() if local_rank == 0 else None)
    return on_all_ranks(lambda: result if local_rank == 0 else work())
