"""Processes that train together: how they meet, how one leaves, what it leaves behind, and how it says why it failed.

Private names used here are in private_names.py.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch.distributed
from torch.distributed import DistError, PrefixStore, Store, TCPStore, distributed_c10d

Result = TypeVar("Result")

FIRST_FAILURE = "first failure"
SHARED_MEMORY = Path("/dev/shm")
PACKAGE = Path(__file__).resolve().parent.parent

_store: Store | None = None  # what `meet` returned
_meetings = 0


class SharedError(ValueError):
    """An error that all ranks raise alike, whichever had it: one of them says it for all."""


class AskedToEnd(SystemExit):
    """The end of a run that was told to stop, to which all ranks come alike: one says why. code: of the exit."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def rank_and_world_size() -> tuple[int, int]:
    """Of this process among all that train together; a lone one is (0, 1)."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def of_all_ranks(value: Any) -> list[Any]:
    """What each rank has, in their order; a lone process has its own. A collective."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return [value]
    values = [None] * world_size
    torch.distributed.all_gather_object(values, value)
    return values


def host_group() -> Any:
    """A process group of all ranks for numbers in host memory, beside the usual one of a GPU."""
    return torch.distributed.new_group(backend="gloo")


def largest_of_all_ranks(numbers: Sequence[float], group: Any) -> list[float]:
    """Of each number, over all ranks. group: a `host_group`, so that the hosts wait for each other and for no GPU."""
    largest = torch.tensor(numbers, dtype=torch.float64)
    torch.distributed.all_reduce(largest, torch.distributed.ReduceOp.MAX, group)
    return largest.tolist()


def on_all_ranks(work: Callable[[], Result]) -> Result:
    """Run `work` on every rank. If it raises on any, raise one SharedError, a ValueError, on all, so that no rank waits
    for another."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:  # whatever it is, the other ranks must hear of it before this one leaves
        error = raised
    message = error and (str(error) if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: {error}")
    for rank, said in enumerate(of_all_ranks(message)):
        if said is not None:
            raise SharedError(said if rank == 0 else f"rank {rank}: {said}") from error
    return result


def meet(rank: int, world_size: int, sign: bytes, timeout: timedelta) -> Store:
    """Put `sign` into a store that all ranks share, under f"beat/{rank}", and wait for the signs of all others.

    The store's server is torch's own, at MASTER_ADDR and MASTER_PORT; it is there before the process group is, so that
    ranks that do not start can be named. TimeoutError names them. ValueError if rank 0 cannot open the port.
    """
    global _store, _meetings
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # As torch's own rendezvous does: torchrun hosts the server itself, and a second store of this process shares it.
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    try:
        server = TCPStore(address, port, world_size, hosts, timeout=timeout, wait_for_workers=False, multi_tenant=True)
    except DistError as error:
        reason = str(error).splitlines()[0]
        if hosts:
            raise ValueError(
                f"rank 0 cannot listen at {address}:{port} ({reason}): choose another --master_port or MASTER_PORT"
            ) from error
        raise TimeoutError(f"rank {rank} found no rank 0 at {address}:{port} within {timeout} ({reason})") from error
    _meetings += 1  # a process may run several jobs
    _store = PrefixStore(f"ds_memopt {_meetings}", server)
    _store.set(f"beat/{rank}", sign)
    # One rank waits for all, and all for that one: else the server would have ranks * ranks waits to look after.
    try:
        if rank == 0:
            _store.wait([f"beat/{other}" for other in range(world_size)], timeout)
            _store.set("all are here", b"")
        else:
            _store.wait(["all are here"], timeout + timedelta(seconds=5))  # the first rank shall speak first
    except DistError as error:
        if rank:
            raise TimeoutError(f"rank 0 did not answer within {timeout} at {address}:{port}") from error
        missing = [other for other in range(world_size) if not _store.check([f"beat/{other}"])]
        raise TimeoutError(f"of {world_size} ranks these did not start within {timeout}: {missing}") from error
    server.set_timeout(timedelta(days=1))  # whoever asks from here on has another thread to count the time
    return _store


def set_timeout_of_new_groups(timeout: timedelta) -> None:
    """Of groups made by callers who name none, as DeepSpeed does: torch has 10 minutes for NCCL and 30 for gloo."""
    distributed_c10d.default_pg_timeout = distributed_c10d.default_pg_nccl_timeout = timeout


def leave_group() -> None:
    """Leave all process groups, if there are any, after the collectives that are still on their way.

    A process that ends before them is aborted by a thread of gloo's, which finds their memory gone (signal 6 or 11).
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def leave_group_at_exit() -> None:
    """`leave_group` when Python exits: after what was registered later, so that it may still communicate.

    Not after an exception, where the other ranks may never answer; nor in a process that was forked from this one,
    which would close the connections of both.
    """
    owner = os.getpid()

    def leave() -> None:
        if os.getpid() == owner and getattr(sys, "last_value", None) is None:
            leave_group()

    atexit.register(leave)


def remove_shared_memory(address: str, port: str, rank: str) -> None:
    """What DeepSpeed's CPU communication leaves behind, 66 MiB a rank; "*" stands for any."""
    for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_*_{address}_{port}_{rank}"):
        buffer.unlink(missing_ok=True)


def remove_abandoned_shared_memory() -> None:
    """What killed ranks of this user left behind on this machine. To be called on its first rank, before the ranks
    join: none of them has a buffer yet, and the lock keeps other jobs that start now from making theirs meanwhile.

    The kernel knows whether a buffer is in use, also by a process of another container: it grants a write lease only on
    a file that nobody else has open or mapped.
    """
    if not SHARED_MEMORY.is_dir():
        return
    with _opened(SHARED_MEMORY) as folder:
        fcntl.flock(folder, fcntl.LOCK_EX)
        for buffer in SHARED_MEMORY.glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*"):
            # OSError: it is in use, or has just gone, or this kernel knows no leases here.
            with contextlib.suppress(OSError), _opened(buffer) as file:
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
                fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_UNLCK)
                buffer.unlink()


@contextlib.contextmanager
def _opened(path: Path):
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield file
    finally:
        os.close(file)


def fail(error: BaseException) -> NoReturn:
    """Say on stderr which rank failed and why, and end this process with an exit status other than 0.

    At once: an ordinary exit would wait for collectives that the others never join. The launcher then ends the others,
    whose errors are most often a consequence of the first. So a rank that has lost the connection to another, or fails
    after another, gives the launcher 2 seconds; the former speaks only after them, the latter has one line.
    """
    kind = "ValueError" if isinstance(error, SharedError) else type(error).__name__
    summary = f"{kind}: {error}" if str(error) else kind
    if isinstance(error, AskedToEnd):
        summary = str(error)
    if _is_lost_connection(error):
        time.sleep(2)
        say(summary.splitlines()[0])
    elif (first := _first_failure(summary)) is None:
        sys.stdout.flush()
        if isinstance(error, SharedError | AskedToEnd):
            print(summary, file=sys.stderr, flush=True)
        elif isinstance(error, KeyboardInterrupt) or isinstance(error, ValueError) and _raised_here(error):
            say(summary)  # of our own errors the message says all
        else:
            say("".join(traceback.format_exception(error)))
        if os.environ.get("RANK") == "0":
            time.sleep(1)  # it holds the store in which the others, failing now, see that they are not the first
    else:
        if first != summary:
            say(f"{summary.splitlines()[0]} (another rank failed before: {first.splitlines()[0]})")
        time.sleep(2)
    end(error.code if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code else 1)


def say(text: str) -> None:
    """Write on stderr, each line with this rank before it, as torch does."""
    speaker = f"[rank{os.environ['RANK']}]: " if "RANK" in os.environ else ""
    lines = text.rstrip().splitlines()
    sys.stderr.write("".join(f"{speaker}{line}\n" for line in lines))  # in one piece: other ranks write as well
    sys.stderr.flush()


def end(status: int) -> NoReturn:
    """End this process now, whatever its threads do."""
    remove_shared_memory(*(os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT", "RANK")))
    sys.stdout.flush()
    os._exit(status)


def _is_lost_connection(error: BaseException) -> bool:
    """gloo raises a bare RuntimeError, which names its source file."""
    return isinstance(error, DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def _raised_here(error: BaseException) -> bool:
    return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(PACKAGE)


def first_failure(store: Store) -> str:
    """The first rank to fail and the first line of what it said, "3 failed: ValueError: ..."; "" if none has."""
    if not store.check([FIRST_FAILURE]):
        return ""
    rank, _, summary = store.get(FIRST_FAILURE).decode().partition(" ")
    return f"{rank} failed: {summary.splitlines()[0]}"


def _first_failure(summary: str) -> str | None:
    """What the first rank to fail said; None if that is this rank, or if the store does not answer."""
    store = _store
    if store is None and torch.distributed.is_initialized():
        store = distributed_c10d._get_default_store()
    if store is None:
        return None
    mine, answers = f"{os.environ.get('RANK')} {summary}", []

    def ask() -> None:
        with contextlib.suppress(RuntimeError):
            answers.append(store.compare_set(FIRST_FAILURE, "", mine).decode())

    asking = threading.Thread(target=ask, daemon=True)  # the server may hang: its process may be stopped
    asking.start()
    asking.join(3)
    return None if not answers or answers[0] == mine else answers[0].partition(" ")[2]
