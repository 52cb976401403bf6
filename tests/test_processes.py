"""Ranks that fail, that do not arrive and that leave: each is told once, by name, and ends the job."""

from __future__ import annotations

import mmap
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from spawn import CONTEXT, TIME_LIMIT, free_port, place_of, remove_shared_memory, run_script

from ds_memopt.engines import processes
from ds_memopt.engines.processes import AskedToEnd, SharedError, fail, remove_abandoned_shared_memory
from ds_memopt.train import loop, watchdog
from ds_memopt.train.fsdp2_job import pretrain_fsdp2
from ds_memopt.train.launcher import MPI_SIZES, PLACE, deepspeed_is_gone
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.ranks import start_ranks
from ds_memopt.train.saving import Saving
from ds_memopt.train.termination import NOT_SAVED, SAVED, Termination
from ds_memopt.train.watchdog import Beat, Watchdog

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent

JOB = f"""
import sys; sys.path.insert(0, {str(ROOT / "launch")!r})
import dataclasses, torch
from arguments import run_job
from ds_memopt.train.ranks import start_ranks

@dataclasses.dataclass
class Options:
    pass

def job(options):
    with start_ranks() as ranks:
        if ranks.rank == 1:
            {{fault}}
        torch.distributed.all_reduce(torch.ones(1))

run_job(job, Options())
"""
UNAWARE = """
import deepspeed, torch
deepspeed.init_distributed()
if torch.distributed.get_rank() == 1:
    raise ValueError("row 17")
torch.distributed.all_reduce(torch.ones(1))
"""


def check_the_only_words(done: subprocess.CompletedProcess, told: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode > 0, said
    assert said.count(f"[rank1]: {told}") == 1, said
    assert "Connection closed" not in said and "[rank0]: Traceback" not in said


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("raise ValueError('row 17')", "ValueError: row 17"),
        ("sys.exit(0)", "SystemExit: 0"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ],
)
def test_whatever_ends_a_rank_is_told_and_ends_the_job(fault, told, tmp_path):
    (tmp_path / "program.py").write_text(JOB.format(fault=fault))
    check_the_only_words(run_script(tmp_path / "program.py", ranks=2), told)


def test_the_launcher_ends_the_others_also_of_a_script_that_knows_nothing_of_us(tmp_path):
    """tests/test_launchers.py has mpirun."""
    (tmp_path / "program.py").write_text(UNAWARE)
    outside = {name: value for name, value in os.environ.items() if name not in {*PLACE, *MPI_SIZES}}
    outside |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    command = [str(BIN / "deepspeed"), "--master_port", str(free_port()), "--num_gpus", "2", "--module"]
    command += ["ds_memopt.run", str(tmp_path / "program.py")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, env=outside, cwd=ROOT)
    check_the_only_words(done, "ValueError: row 17")


def _rank_main(work, rank: int, world_size: int, port: int, folder: Path, args: tuple) -> None:
    """As launch/arguments.run_job does, with stderr in a file."""
    os.environ.update(place_of(rank, world_size, port))
    os.dup2(os.open(folder / f"{rank}.err", os.O_CREAT | os.O_WRONLY), 2)
    torch.set_num_threads(1)
    try:
        work(*args)
    except BaseException as error:
        fail(error)


def launch(
    work, folder: Path, *args, ranks: int = 2, started: int | None = None, apart: bool = False
) -> tuple[list[str], float]:
    """What each rank wrote on stderr, and after how many seconds the first one ended: like a launcher, this then ends
    the others, be they stopped. started: of the ranks, which alone are there. apart: like those of two machines, this
    waits until all have ended."""
    port = free_port()
    numbers = range(ranks) if started is None else [started]
    tasks = [CONTEXT.Process(target=_rank_main, args=(work, r, ranks, port, folder, args)) for r in numbers]
    began = time.monotonic()
    for task in tasks:
        task.start()
    while (any if apart else all)(task.is_alive() for task in tasks) and time.monotonic() < began + TIME_LIMIT:
        time.sleep(0.05)
    seconds = time.monotonic() - began
    time.sleep(1)
    codes = [task.exitcode for task in tasks]
    for task in tasks:
        task.kill()
        task.join()
    remove_shared_memory(port)
    said = [(folder / f"{rank}.err").read_text() for rank in numbers]
    assert any(codes), (codes, said)  # one has ended, with a failure
    return said, seconds


def _train_with_a_fault(pretrain, options: PretrainOptions, fault: str) -> None:
    """Rank 1 stops before its third step."""
    load = loop.train_loader

    def loads_until_the_fault(*args):
        for number, batch in enumerate(load(*args)):
            if number == 2 and os.environ["RANK"] == "1":
                os.kill(os.getpid(), signal.SIGSTOP) if fault == "stop" else time.sleep(1000)
            yield batch

    loop.train_loader = loads_until_the_fault
    pretrain(options)


SIZE = dict(steps=5, seq_length=16, micro_batch=2, accumulation=1, validation_interval=0, save_interval=0)


@pytest.mark.parametrize(
    ("pretrain", "config", "fault", "sentence"),
    [
        # The stopped rank may not have had the time to say that its third step has begun.
        (loop.pretrain, "zero2_adam_mini", "stop",
         r"no answer for 0.2 minutes \(--timeout_minutes\) from rank 1 in (step [123]|the start), by its last word, "
         r"while this rank is in step 3: "),
        (pretrain_fsdp2, "zero3_adam_mini", "sleep",
         r"the others have waited 0.2 minutes \(--timeout_minutes 0.2\) for rank 1 in step 3: "),
    ],
)  # fmt: skip
def test_a_rank_that_does_not_arrive_is_named(pretrain, config, fault, sentence, tmp_path):
    options = PretrainOptions(
        deepspeed_config=str(ROOT / f"ds_configs/{config}.json"), output_dir=str(tmp_path / "run"), data="synthetic",
        timeout_minutes=0.2, **SIZE,
    )  # fmt: skip
    said, seconds = launch(_train_with_a_fault, tmp_path, pretrain, options, fault)
    assert len(re.findall(rf"^\[rank0\]: TimeoutError: {sentence}", said[0], re.MULTILINE)) == 1, said
    assert seconds < 600  # gloo's own limit is half an hour


def _hang_after_sigterm(options: PretrainOptions) -> None:
    def load(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1000)
        yield

    loop.train_loader = load
    loop.pretrain(options)


def test_a_run_that_cannot_save_within_the_grace_says_so(tmp_path):
    options = PretrainOptions(
        deepspeed_config=str(ROOT / "ds_configs/zero2_adam_mini.json"), output_dir=str(tmp_path / "run"),
        data="synthetic", grace_seconds=1, **SIZE | {"save_interval": 1},
    )  # fmt: skip
    said, _ = launch(_hang_after_sigterm, tmp_path, options, ranks=1)
    told = "\nSIGTERM: --grace_seconds 1 leaves no time to save; there is none before\n"
    assert f"\n{said[0]}".endswith(told), said


def test_a_rank_sees_that_the_deepspeed_command_was_ended(monkeypatch):
    """It starts a launcher, which lives on."""
    program = "bash -c 'echo $$; read; : deepspeed'; : deepspeed"
    command = subprocess.Popen(["bash", "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    launcher = int(command.stdout.readline())
    assert not deepspeed_is_gone()()  # of a process that it did not start
    monkeypatch.setattr(os, "getppid", lambda: launcher)
    is_gone = deepspeed_is_gone()
    assert not is_gone()
    command.terminate()
    command.wait()
    assert is_gone()
    command.stdin.close()


def _long_stages(seconds: float) -> None:
    """Longer than the timeout: one rank alone where it may, then both. Then the first one stops."""
    with start_ranks(timeout_minutes=0.1) as ranks:
        ranks.enter("the saving of the model", alone=True)
        if ranks.is_main:
            time.sleep(seconds)
        torch.distributed.barrier()
        ranks.enter("the validation after step 1")
        time.sleep(seconds)
        torch.distributed.barrier()
        ranks.enter("step 2")
        torch.distributed.barrier()
        time.sleep(1)  # a few beats
        if ranks.is_main:
            os.kill(os.getpid(), signal.SIGSTOP)
        torch.distributed.barrier()


def test_long_stages_end_nothing_and_the_second_rank_watches_the_first(tmp_path):
    said, seconds = launch(_long_stages, tmp_path, 8.0)
    assert said[0] == "" and said[1].count("TimeoutError") == 1, said
    assert "[rank1]: TimeoutError: no answer for 0.1 minutes (--timeout_minutes) from rank 0 in step 2" in said[1]
    assert seconds > 2 * 8 + 1 + 0.1 * 60


def _fail_apart() -> None:
    watchdog.FAREWELL_S = 0.2
    with start_ranks(timeout_minutes=0.1) as ranks:
        torch.distributed.barrier()
        if ranks.rank == 1:
            raise ValueError("row 17")
        time.sleep(1000)


def test_a_failure_on_another_machine_ends_a_rank(tmp_path):
    """Whose launcher knows nothing of it, while the rank waits in something that does not notice."""
    said, _ = launch(_fail_apart, tmp_path, apart=True)
    assert said[0] == "[rank0]: ended, for rank 1 failed: ValueError: row 17\n"
    assert "[rank1]: ValueError: row 17" in said[1]


def _fail_alike(error: type[Exception]) -> None:
    with start_ranks():
        raise error("the loss is nan")


@pytest.mark.parametrize("error", [RuntimeError, SharedError])
def test_an_error_of_all_ranks_is_told_once(error, tmp_path):
    said = "".join(launch(_fail_alike, tmp_path, error)[0])
    line = "^ValueError: the loss is nan" if error is SharedError else r"^\[rank[01]\]: RuntimeError: the loss is nan"
    assert len(re.findall(line, said, re.MULTILINE)) == said.count("the loss is nan\n") == 1, said


def _start(timeout_minutes: float) -> None:
    start_ranks(timeout_minutes=timeout_minutes)


@pytest.mark.parametrize(
    ("rank", "message"),
    [(0, "of 3 ranks these did not start within 0:00:03: [1, 2]"), (1, "rank 1 found no rank 0 at 127.0.0.1:")],
)
def test_ranks_that_do_not_start_are_named(rank, message, tmp_path):
    said, _ = launch(_start, tmp_path, 0.05, ranks=3, started=rank)
    assert f"[rank{rank}]: TimeoutError: {message}" in said[0], said


@pytest.mark.parametrize("minutes", [0, -1, 20_000, float("nan")])
def test_a_timeout_out_of_range_is_refused(minutes):
    with pytest.raises(ValueError, match="--timeout_minutes .* must be more than 0 and at most 10000"):
        start_ranks(timeout_minutes=minutes)


EXIT = """
import atexit, os
import torch

def tell(when):
    print(when, "fork" if os.getpid() != owner else "self", torch.distributed.is_initialized(), flush=True)

owner = os.getpid()
atexit.register(tell, "after")
import ds_memopt
ds_memopt.register()
atexit.register(tell, "before")
torch.distributed.init_process_group(rank=0, world_size=1, store=torch.distributed.HashStore())
if not os.fork():
    atexit._run_exitfuncs()
    os._exit(0)  # an ordinary exit would wait for gloo's threads, which a fork does not have
os.wait()
{end}
"""


@pytest.mark.parametrize(("end", "in_group"), [("", False), ("raise OSError", True)])
def test_registered_processes_leave_their_group_at_exit(end, in_group):
    """Unless an exception ends them: then the others may never come. A forked process leaves it to its parent."""
    done = subprocess.run(
        [sys.executable, "-c", EXIT.format(end=end)], capture_output=True, text=True, timeout=TIME_LIMIT, check=False
    )
    assert done.returncode == bool(end), done.stderr
    said = [line for line in done.stdout.splitlines() if line.startswith(("before", "after"))]
    assert said == ["before fork True", "after fork True", "before self True", f"after self {in_group}"]


def test_only_shared_memory_that_nobody_uses_is_removed(monkeypatch):
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        monkeypatch.setattr(processes, "SHARED_MEMORY", Path(folder))
        name = f"deepspeed_allreduce_buffer_{os.getuid()}_127.0.0.1_29500"
        for rank in range(4):
            Path(folder, f"{name}_{rank}").write_bytes(bytes(mmap.PAGESIZE))
        Path(folder, "another").touch()
        with open(f"{folder}/{name}_0", "r+b") as opened, open(f"{folder}/{name}_1", "r+b") as file:
            mapped = mmap.mmap(file.fileno(), 0)
            file.close()  # a mapping remains
            remove_abandoned_shared_memory()
            assert sorted(os.listdir(folder)) == ["another", f"{name}_0", f"{name}_1"]
            assert opened.read(1) == mapped[:1] == b"\0"
            mapped.close()
        remove_abandoned_shared_memory()
        assert os.listdir(folder) == ["another"]


@pytest.mark.parametrize(("silent_s", "told"), [(0.3, "the others have waited 0.1 minutes"), (5.0, "")])
def test_a_rank_is_waited_for_only_while_it_answers(silent_s, told):
    """It was behind for the whole timeout in both cases; one that was stopped is told as silent a little later."""
    one, said = object.__new__(Watchdog), []
    one._rank, one._interval, one._stage = 0, 0.3, (3, 0, "step 3", False)
    one._timeout = one._patience = timedelta(seconds=6)
    one._end = said.append
    beats = {0: Beat(9, 3, 0, "step 3", False), 1: Beat(4, 1, 0, "step 1", False)}
    one._judge(beats, {0: 0.0, 1: silent_s}, {0: 0.0, 1: 6.0})
    assert told in "".join(said) and len(said) == bool(told)


def test_a_save_that_would_take_longer_than_what_is_left_is_not_begun(tmp_path, monkeypatch):
    """By the time that the last one took: the deadline alone would end the run in the middle of it."""
    settings, begun = SimpleNamespace(output_dir=tmp_path, save_interval=1), []
    monkeypatch.setattr("ds_memopt.train.checkpoint.save", lambda *_: begun.append(1))
    ranks = SimpleNamespace(largest=lambda *numbers: [*numbers], enter=lambda *_, **__: None)
    saving, termination = Saving(None, settings, ranks), Termination(10, lambda: "step 4 is left")
    termination.tell()
    for last_s, code in ((1.0, SAVED), (20.0, NOT_SAVED)):
        saving._last_s = last_s
        with pytest.raises(AskedToEnd) as ended:
            saving.save_and_end(5, termination)
        assert ended.value.code == code
    assert begun == [1] and "--grace_seconds 10 leaves no time to save; step 4 is left" in str(ended.value.args)
