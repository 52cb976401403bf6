"""Run a function on several ranks of a gloo process group on this machine: `run_ranks(function, world_size, *args)`;
or a script, by itself or as one of several ranks: `run_script(path, *arguments)`.

Processes are forked from a server that has imported the slow packages once, so that a spawn costs about a second.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import multiprocessing
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

import torch

from ds_memopt.train.launcher import MPI_SIZES, PLACE

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([
    "torch", "deepspeed", "transformers", "torch.distributed.fsdp",
    # What these import late, 2 s in each rank: transformers a name's file when it is asked for, DeepSpeed's optimizers
    # and torch's both compilers.
    "transformers.trainer", "transformers.models.llama.modeling_llama", "torch._dynamo", "torch._inductor.compile_fx",
    "deepspeed.runtime.zero.muon.muon_optimizer", "ds_memopt.engines.register", "ds_memopt.optimizers",
    "ds_memopt.train.finetune_job", "ds_memopt.results.comparison",
])  # fmt: skip


# Below the ports that the system gives away by itself, and for each worker of pytest-xdist others: between the look at
# a port and its use nobody takes it. Two runs of the tests begin at different numbers.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
PORTS = itertools.count(12_000 + 1_000 * WORKER + os.getppid() % 1_000)
TIME_LIMIT = 1200
"""Seconds for what takes some: only what hangs takes them, so that a busy machine fails no test."""


@contextlib.contextmanager
def with_torchao():
    """Let torchao be found, which run.sh has put aside."""
    folder = str(Path(sys.prefix, "torchao"))
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def free_port() -> int:
    """One that nobody uses, and that is never returned again."""
    while True:
        port = next(PORTS)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def run_ranks(function, world_size: int, *args, timeout_s: float = TIME_LIMIT):
    """Return [function(*args) of each rank]; rank and size are in torch.distributed and in the environment.

    Raises RuntimeError with the first failing rank's traceback, or if a rank is not done after timeout_s.
    """
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        ranks = [
            CONTEXT.Process(target=_rank_main, args=(function, rank, world_size, port, folder, args))
            for rank in range(world_size)
        ]
        for rank in ranks:
            rank.start()
        deadline = time.monotonic() + timeout_s
        try:
            while any(rank.is_alive() for rank in ranks) and not any(Path(folder).glob("*.failed")):
                time.sleep(0.05)
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{function.__name__} on {world_size} ranks was not done after {timeout_s} s")
            # A rank that crashes raises nothing, and the others say that it is gone: say who began, and where it stood.
            crashed = [
                f"rank {number} ended by signal {-rank.exitcode}:\n{Path(folder, f'{number}.stacks').read_text()}\n"
                for number, rank in enumerate(ranks)
                if (rank.exitcode or 0) < 0
            ]
            failed = sorted(Path(folder).glob("*.failed"))
            if failed:
                message = f"{function.__name__}, {''.join(crashed)}rank {failed[0].stem}:\n{failed[0].read_text()}"
                raise RuntimeError(message)
        finally:
            for rank in ranks:
                rank.join(60 if not any(Path(folder).glob("*.failed")) else 0)
                if rank.is_alive():
                    rank.kill()
            remove_shared_memory(port)
        if missing := [rank for rank in range(world_size) if not Path(folder, f"{rank}.result").exists()]:
            raise RuntimeError(
                f"{function.__name__}: {''.join(crashed)}ranks {missing} of {world_size} died without a result"
            )
        return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]


def place_of(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What a launcher puts into a rank's environment."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def remove_shared_memory(port: int) -> None:
    """DeepSpeed's CPU all_reduce leaves 66 MiB of it per rank behind."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_*_{port}_*"):
        buffer.unlink(missing_ok=True)


def begin() -> None:
    """What a forked process does first."""
    torch.set_num_threads(1)
    gc.freeze()  # ZeRO-3 collects garbage at every build: spare it the imported packages
    # As in a new interpreter. The server's own way starts another server for the workers of a DataLoader, and these
    # outlive a rank that is killed.
    multiprocessing.set_start_method("fork", force=True)


def _rank_main(function, rank: int, world_size: int, port: int, folder: str, args: tuple) -> None:
    os.environ.update(place_of(rank, world_size, port))
    begin()
    faulthandler.enable(os.open(Path(folder, f"{rank}.stacks"), os.O_CREAT | os.O_WRONLY))
    try:
        import deepspeed

        deepspeed.init_distributed("gloo", verbose=False)
        result = function(*args)
        torch.save(result, Path(folder, f"{rank}.tmp"))
        Path(folder, f"{rank}.tmp").rename(Path(folder, f"{rank}.result"))
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException:
        Path(folder, f"{rank}.failed").write_text(traceback.format_exc())
        raise


def run_script(
    script: str | Path, *arguments: object, ranks: int | None = None, cwd: str | Path = ROOT, **environment: str
) -> subprocess.CompletedProcess:
    """What `python script arguments` does, or `python -m script` for the name of a module, without its 8 s of imports.

    ranks: so many processes, each with its place in its environment, as a launcher starts them; None is one without.
    All write into the same stdout and stderr. The first exit code that is not 0 is returned, and ends the others.
    What reads the environment when a package is imported, like OMP_NUM_THREADS, sees what it was at the first spawn.
    """
    outside = {name: value for name, value in os.environ.items() if name not in {*PLACE, *MPI_SIZES}} | environment
    port = free_port()
    places = [{}] if ranks is None else [place_of(rank, ranks, port) for rank in range(ranks)]
    words = [str(script), *map(str, arguments)]
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        processes = [
            CONTEXT.Process(target=_script_main, args=(words, str(cwd), outside | place, said)) for place in places
        ]
        deadline = time.monotonic() + TIME_LIMIT
        try:
            for process in processes:
                process.start()
            while (alive := [one.sentinel for one in processes if one.exitcode is None]) and not any(
                one.exitcode for one in processes
            ):
                if not wait(alive, deadline - time.monotonic()):
                    raise subprocess.TimeoutExpired(words, TIME_LIMIT, *(file.read_bytes() for file in said))
            code = next((one.exitcode for one in processes if one.exitcode), 0)
        finally:
            for process in processes:
                process.kill()
                process.join()
            remove_shared_memory(port)
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in said))


def _script_main(words: list[str], cwd: str, environment: dict[str, str], said: list[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for number, file in enumerate(said, start=1):
        os.dup2(os.open(file, os.O_CREAT | os.O_APPEND | os.O_WRONLY), number)
    os.chdir(cwd)
    begin()
    sys.argv = words
    is_file = words[0].endswith(".py")
    sys.path.insert(0, str(Path(words[0]).parent.absolute()) if is_file else cwd)
    try:
        if is_file:
            runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    except Exception:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
