"""What the launcher that started this process says about its place among the ranks."""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Callable
from pathlib import Path

import deepspeed.comm

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
"""How many processes mpirun started: the words of OpenMPI, MVAPICH2, and MPICH or Intel MPI."""


def find_place() -> None:
    """Put this process's place into the environment: `PLACE`, and LOCAL_WORLD_SIZE if mpirun or srun started it.

    The deepspeed launcher and torchrun have done so. mpirun's processes ask each other, through mpi4py; srun tells its
    own. MASTER_ADDR and MASTER_PORT may be set for both. A process that nothing launched is the only rank.
    ValueError if a launcher is there and does not tell enough.
    """
    mpi_size = next((os.environ[name] for name in MPI_SIZES[:2] if name in os.environ), None)
    if "RANK" in os.environ:
        if missing := [name for name in PLACE if name not in os.environ]:
            raise ValueError(
                f"RANK is {os.environ['RANK']}, but {', '.join(missing)} is not set: start the ranks with deepspeed, "
                "torchrun, mpirun or srun, or unset RANK for a single process"
            )
    elif mpi_size:
        _ask_mpi(int(mpi_size))
    elif "SLURM_STEP_NUM_TASKS" in os.environ:  # before PMI_SIZE, which srun may set as well
        _ask_slurm()
    elif "PMI_SIZE" in os.environ:
        _ask_mpi(int(os.environ["PMI_SIZE"]))
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        raise ValueError(
            f"this is a single process in a Slurm job of {os.environ['SLURM_NTASKS']} tasks: start one per task with "
            "srun in front of the command, or unset SLURM_NTASKS to run alone"
        )
    else:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port())


def deepspeed_is_gone() -> Callable[[], bool]:
    """Whether the `deepspeed` command that started this rank has ended since this call.

    It starts a launcher for each machine, and that the ranks. A SIGTERM to the command alone ends it, and neither the
    launcher nor the ranks hear of it.
    """
    launcher = os.getppid()
    try:
        command = _parent(launcher)
        if any(b"deepspeed" not in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in (launcher, command)):
            return lambda: False
    except OSError:  # a system without /proc
        return lambda: False

    def is_gone() -> bool:
        with contextlib.suppress(OSError):
            return _parent(launcher) != command
        return True

    return is_gone


def _parent(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def tasks_per_node(text: str) -> list[int]:
    """Tasks on each node from Slurm's short form: "2(x3),1" is [2, 2, 2, 1]."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, nodes in runs for _ in range(int(nodes or 1))]


def first_node(nodes: str) -> str:
    """The first host name in Slurm's short form: "gpu[03-06,09],big1" is "gpu03"."""
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", nodes).split(",")[0]


def _ask_mpi(size: int) -> None:
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: it is there, but finds no MPI library
        raise ValueError(
            f"mpirun started {size} processes, but without mpi4py they cannot find each other ({error}): "
            "pip install mpi4py, or start them with deepspeed, torchrun or srun"
        ) from error
    given = {name: os.environ[name] for name in ("MASTER_ADDR", "MASTER_PORT") if name in os.environ}
    deepspeed.comm.mpi_discovery(verbose=False)
    os.environ.update(given)
    os.environ["LOCAL_WORLD_SIZE"] = str(MPI.COMM_WORLD.Split_type(MPI.COMM_TYPE_SHARED).Get_size())
    # Or a rank that fails would wait at its exit for the others, and they for it in a collective of torch.
    MPI.Finalize()
    if int(os.environ["WORLD_SIZE"]) != size:
        raise ValueError(
            f"mpirun started {size} processes, but mpi4py sees {os.environ['WORLD_SIZE']}: it uses another MPI library "
            "than this mpirun's; take mpirun and library from the same installation (PATH, LD_LIBRARY_PATH)"
        )


def _ask_slurm() -> None:
    """By the variables of the step: those of the job also stand in a batch script, whose only process is no task."""
    of_node = tasks_per_node(os.environ["SLURM_STEP_TASKS_PER_NODE"])
    os.environ.update(
        RANK=os.environ["SLURM_PROCID"],
        LOCAL_RANK=os.environ["SLURM_LOCALID"],
        WORLD_SIZE=os.environ["SLURM_STEP_NUM_TASKS"],
        LOCAL_WORLD_SIZE=str(of_node[int(os.environ["SLURM_NODEID"])]),
    )
    os.environ.setdefault("MASTER_ADDR", first_node(os.environ["SLURM_STEP_NODELIST"]))
    # The same for all tasks, and another one for a job that shares the node.
    os.environ.setdefault("MASTER_PORT", str(20_000 + int(os.environ["SLURM_JOB_ID"]) % 10_000))


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
