"""What starts the ranks: mpirun for real, torchrun and srun by their variables, and the scripts for clusters.

tests/test_train_multirank.py has the deepspeed launcher, and test_processes.py torchrun."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from deepspeed.launcher import runner
from safetensors.torch import load_file
from spawn import CONTEXT, TIME_LIMIT, free_port, run_ranks, run_script, with_torchao
from torch.distributed.run import get_args_parser
from transformers import LlamaConfig

from ds_memopt import cli
from ds_memopt.results.record import read_metrics
from ds_memopt.train.fsdp2_job import pretrain_fsdp2
from ds_memopt.train.launcher import MPI_SIZES, PLACE, find_place, first_node, tasks_per_node
from ds_memopt.train.loop import pretrain
from ds_memopt.train.options import PretrainOptions
from ds_memopt.train.ranks import start_ranks

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SIZE = dict(steps=3, seq_length=16, micro_batch=4, accumulation=2, validation_batches=1)
EVERY = dict(logging_interval=1, validation_interval=2, save_interval=2, checkpoint_format="engine")
COMPARED = ("step", "tokens", "loss", "validation_loss", "lr", "grad_norm")
MPIRUN = [str(BIN / "mpirun"), "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    outside = {name: value for name, value in os.environ.items() if name not in {*PLACE, *MPI_SIZES}}
    outside |= {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{os.environ['PATH']}"}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=ROOT, env=outside | environment, check=False
    )


def run_job(script: str, folder: Path) -> subprocess.CompletedProcess:
    """The job of both engines on two ranks, at ZeRO-3 or its equal."""
    sizes = [word for name, value in {**SIZE, **EVERY}.items() for word in (f"--{name}", value)]
    config = ROOT / "ds_configs/zero3_adam_mini.json"
    where = ["--model", folder.parent / "model", "--output_dir", folder]
    done = run_script(f"launch/{script}", "--deepspeed_config", config, *where, *sizes, ranks=2)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def agree(ours: dict, theirs: dict, limit: float) -> None:
    """limit: of the relative difference of what was computed; 0 is bit for bit."""
    for key in COMPARED:
        assert ours[key] == theirs[key] or ours[key] == pytest.approx(theirs[key], rel=limit, abs=0), key


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    """Of the runs, and with the model of all of them: smaller than the preset "tiny"."""
    folders = tmp_path_factory.mktemp("runs")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, vocab_size=256)
    LlamaConfig(**sizes, max_position_embeddings=16).save_pretrained(folders / "model")
    return folders


@pytest.fixture(scope="module")
def by_zero3(folders) -> Path:
    run_job("pretrain.py", folders / "zero3")
    return folders / "zero3"


@pytest.fixture(scope="module")
def by_fsdp2(folders) -> Path:
    assert "AdamMini, FSDP2, 2 x cpu" in run_job("pretrain_fsdp2.py", folders / "fsdp2").stdout
    return folders / "fsdp2"


def test_two_processes_are_one_run(by_zero3):
    assert [row["step"] for row in read_metrics(by_zero3)] == [1, 2, 3]
    assert json.loads((by_zero3 / "environment.json").read_text())["world_size"] == 2


def test_fsdp2_repeats_zero_3(by_fsdp2, by_zero3):
    """The same weights, data order and updates: what differs is the rounding of sums (another seed: by 1e-2)."""
    for ours, theirs in zip(read_metrics(by_fsdp2), read_metrics(by_zero3), strict=True):
        assert ours.keys() == theirs.keys()
        agree(ours, theirs, 2e-6)
        assert ours["optimizer_state_bytes_per_parameter"] == pytest.approx(4.11, abs=0.01)
    ours, theirs = (load_file(folder / "model/model.safetensors") for folder in (by_fsdp2, by_zero3))
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max() for name in ours) < 1e-6  # a step moves a weight by up to 2e-4
    resolved = json.loads((by_fsdp2 / "resolved_config.json").read_text())
    assert resolved["zero_stage"] == "FSDP2" and "zero_optimization" not in resolved["deepspeed"]


def test_mpirun_starts_one_run_whose_first_failure_ends_it():
    """Each rank knows its place, which mpirun tells by variables of its own, and they find each other."""
    program = (
        "import os, time; from ds_memopt.train.launcher import find_place; find_place();"
        "import torch; torch.distributed.init_process_group('gloo'); total = torch.ones(1, dtype=int);"
        "torch.distributed.all_reduce(total);"
        "print(*(os.environ[name] for name in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'LOCAL_WORLD_SIZE', 'MASTER_PORT')),"
        "total.item(), flush=True);"
        "time.sleep(900 if os.environ['RANK'] == '0' else 1); raise RuntimeError('out of luck')"
    )
    began, port = time.monotonic(), str(free_port())
    done = run([*MPIRUN, sys.executable, "-c", program], MASTER_PORT=port)
    assert done.returncode != 0 and "out of luck" in done.stderr
    assert time.monotonic() - began < 600
    assert sorted(re.findall(r"^[\d ]+$", done.stdout, re.MULTILINE)) == [f"0 0 2 2 {port} 2", f"1 1 2 2 {port} 2"]


def _place_by(variables: dict[str, str], results) -> None:
    for name in (*PLACE, *MPI_SIZES):
        os.environ.pop(name, None)
    os.environ.update(variables)
    ranks = start_ranks()
    total = torch.tensor([1 + ranks.rank])
    torch.distributed.all_reduce(total)
    results.put((ranks.rank, ranks.local_rank, ranks.world_size, os.environ["LOCAL_WORLD_SIZE"], total.item()))
    torch.distributed.destroy_process_group()


def test_srun_starts_one_run_of_all_tasks():
    """The variables are those that srun of Slurm 22.05 gave three tasks on two nodes."""
    step = {
        "SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_STEP_NODELIST": "localhost,other",
        "SLURM_JOB_ID": "4", "SLURM_NTASKS": "3", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    results = CONTEXT.Queue()
    places = [("0", "0", "0"), ("1", "1", "0"), ("2", "0", "1")]
    tasks = [
        CONTEXT.Process(
            target=_place_by,
            args=(step | {"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node}, results),
        )
        for rank, local, node in places
    ]
    for task in tasks:
        task.start()
    seen = sorted(results.get(timeout=TIME_LIMIT) for _ in tasks)
    for task in tasks:
        task.join()
    assert seen == [(0, 0, 3, "2", 6), (1, 1, 3, "2", 6), (2, 0, 3, "1", 6)]


def test_slurms_short_forms():
    assert tasks_per_node("2(x3),1") == [2, 2, 2, 1] and tasks_per_node("8") == [8]
    assert first_node("gpu[03-06,09],big1") == "gpu03" and first_node("a,b") == "a" and first_node("n7") == "n7"
    assert first_node("rack[1-2]gpu[04-07]") == "rack1gpu04"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "mpirun started 2 processes, but without mpi4py .* pip install mpi4py"),
        ({"PMI_SIZE": "16"}, "mpirun started 16 processes, but without mpi4py"),
        ({"SLURM_NTASKS": "16", "SLURM_PROCID": "0"}, "a single process in a Slurm job of 16 tasks: .* srun"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "RANK is 1, but LOCAL_RANK, MASTER_ADDR, MASTER_PORT is not set"),
    ],
)
def test_no_process_runs_alone_where_a_launcher_is(variables, message, monkeypatch):
    for name in (*PLACE, *MPI_SIZES):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setitem(sys.modules, "mpi4py", None)  # as if it were not installed
    with pytest.raises(ValueError, match=message):
        find_place()


def _config(folder: Path, method: str, **params) -> str:
    config = json.loads((ROOT / f"ds_configs/zero3_{method}.json").read_text())
    config["optimizer"]["params"] |= params
    path = folder / f"{method} {list(params)}.json"
    path.write_text(json.dumps(config))
    return str(path)


def _try_all(runs: list[tuple], from_step_2: list[tuple[Path, Path]]) -> list[str]:
    """The message of each run, of those with resume=True from step 2 of another run."""
    torch.set_num_threads(1)
    messages = []
    for pretrain_with, options in runs:
        source = dict(from_step_2).get(Path(options.output_dir))
        if source and torch.distributed.get_rank() == 0:
            shutil.copytree(source, options.output_dir)
            (Path(options.output_dir) / "checkpoints/latest").write_text("step2")
            if "damaged" in options.output_dir:
                file = Path(options.output_dir) / "checkpoints/step2/__1_0.distcp"
                with file.open("r+b") as stream:
                    stream.seek(file.stat().st_size // 2)
                    stream.write(b"damaged!")
        torch.distributed.barrier()
        try:
            with with_torchao() if options.float8 else nullcontext():
                pretrain_with(options)
            messages.append("")
        except ValueError as error:
            messages.append(str(error))
    return messages


@pytest.fixture(scope="module")
def under_both(folders, by_fsdp2) -> dict[str, str]:
    """Runs under FSDP2 and ZeRO-3 in one process pair, and what was refused, by folder."""
    configs = {
        "AdamW": _config(folders, "adamw", torch_adam=True),
        "BAdam": _config(folders, "badam", switch_every=1),
        "MeZO": _config(folders, "mezo", compiled=False),
        "IPSGD": _config(folders, "ipsgd", rule="adalomo"),
    }
    sizes = dict(model=str(folders / "model")) | SIZE | EVERY
    jobs, copies = {}, []
    for method, config in configs.items():
        options = dict(deepspeed_config=config) | (dict(accumulation=1) if method == "IPSGD" else {})
        jobs[f"{method} zero3"] = (pretrain, options | dict(save_interval=0))
        jobs[f"{method} fsdp2"] = (pretrain_fsdp2, options)
        if method in ("BAdam", "MeZO"):
            jobs[f"{method} resumed"] = (pretrain_fsdp2, options | dict(resume=True))
            copies.append((folders / f"{method} resumed", folders / f"{method} fsdp2"))
    adam_mini = str(ROOT / "ds_configs/zero3_adam_mini.json")
    for name in ("resumed", "damaged"):
        jobs[name] = (pretrain_fsdp2, dict(deepspeed_config=adam_mini, resume=True))
        copies.append((folders / name, by_fsdp2))
    jobs["bf16, checkpointing"] = (
        pretrain_fsdp2,
        dict(deepspeed_config=adam_mini, dtype="bf16", gradient_checkpointing="full", attention="eager"),
    )
    faster = dict(deepspeed_config=adam_mini, gradient_checkpointing="selective", loss_chunks=3, save_interval=0)
    compiled = dict(deepspeed_config=str(ROOT / "ds_configs/zero2_adam_mini.json"), compile="aot_eager")
    jobs["faster zero3"], jobs["compiled zero2"] = (pretrain, faster), (pretrain, compiled | dict(save_interval=0))
    jobs["faster fsdp2"] = (pretrain_fsdp2, faster | dict(compile="aot_eager", reduce_once=True))
    bf16 = dict(deepspeed_config=adam_mini, dtype="bf16", save_interval=0)
    jobs["bf16"] = (pretrain_fsdp2, bf16)
    jobs["float8"] = (pretrain_fsdp2, bf16 | dict(float8="tensorwise", gradient_checkpointing="selective"))
    jobs["float8 fp32"] = (pretrain_fsdp2, dict(deepspeed_config=adam_mini, float8="rowwise"))
    jobs["float8 zero3"] = (pretrain, bf16 | dict(float8="rowwise"))
    jobs["compiled zero3"] = (pretrain, faster | dict(compile="aot_eager"))
    jobs["once zero3"] = (pretrain, faster | dict(reduce_once=True))
    offload = str(ROOT / "ds_configs/zero3_offload_adam_mini.json")
    jobs["offload"] = (pretrain_fsdp2, dict(deepspeed_config=offload))
    addax = _config(folders, "addax", length_threshold=None, compiled=False)
    jobs["Addax"] = (pretrain_fsdp2, dict(deepspeed_config=addax, micro_batch=10, accumulation=1))
    ipsgd = _config(folders, "ipsgd", clip="two_pass")
    jobs["two_pass"] = (pretrain_fsdp2, dict(deepspeed_config=ipsgd, accumulation=1))
    for name in ("kept", "released"):
        config = Path(_config(folders, "adam_mini", release_gradients=name == "released"))
        config = config.rename(folders / f"adam_mini {name}.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | {"gradient_clipping": "auto"}))
        options = dict(deepspeed_config=str(config), accumulation=1, gradient_clipping=0.0)
        jobs[name] = (pretrain_fsdp2, options)
    jobs["released, accumulated"] = (pretrain_fsdp2, options | dict(accumulation=3))
    jobs["released, clipped"] = (pretrain_fsdp2, options | dict(gradient_clipping=0.5))
    jobs["Lion"] = (pretrain_fsdp2, dict(deepspeed_config=adam_mini, optimizer="Lion"))
    runs = [
        (with_, PretrainOptions(output_dir=str(folders / name), **sizes | options))
        for name, (with_, options) in jobs.items()
    ]
    first, second = run_ranks(_try_all, 2, runs, copies)
    assert first == second
    return dict(zip(jobs, first, strict=True))


@pytest.mark.parametrize(("method", "limit"), [("AdamW", 2e-6), ("BAdam", 2e-6), ("IPSGD", 2e-6), ("MeZO", 0.0)])
def test_methods_under_fsdp2_repeat_zero_3(under_both, folders, method, limit):
    assert under_both[f"{method} fsdp2"] == under_both[f"{method} zero3"] == ""
    ours, theirs = (read_metrics(folders / f"{method} {name}") for name in ("fsdp2", "zero3"))
    for one, other in zip(ours, theirs, strict=True):
        assert one.get("active_block") == other.get("active_block")
        agree(one, other, limit)


@pytest.mark.parametrize("run", ["", "BAdam ", "MeZO "])
def test_fsdp2_resumes_bit_for_bit(under_both, folders, run):
    """AdamMini from what the script left; BAdam between two visits, where it has no state yet; MeZO, whose state is no
    DTensor."""
    assert under_both[f"{run}resumed"] == ""
    resumed, whole = folders / f"{run}resumed", folders / f"{run}fsdp2"
    ours, theirs = ([[row[key] for key in COMPARED] for row in read_metrics(path)] for path in (resumed, whole))
    assert ours == theirs
    assert (resumed / "model/model.safetensors").read_bytes() == (whole / "model/model.safetensors").read_bytes()


def test_fsdp2_trains_alike_with_released_gradients(under_both, folders):
    assert under_both["kept"] == under_both["released"] == ""
    weights = [(folders / name / "model/model.safetensors").read_bytes() for name in ("kept", "released")]
    assert weights[0] == weights[1]
    kept, released = (read_metrics(folders / name)[-1] for name in ("kept", "released"))
    assert kept["held_gib"]["gradients"] > 0 == released["held_gib"]["gradients"]
    assert kept["grad_norm"] > 0 and released["grad_norm"] is None


@pytest.mark.parametrize("run", ["faster zero3", "compiled zero2", "faster fsdp2"])
def test_what_is_faster_or_smaller_computes_the_same(under_both, folders, by_zero3, run):
    """The loss in the head and selective checkpointing, layers compiled, gradients reduced once a step."""
    assert under_both[run] == ""
    for ours, theirs in zip(read_metrics(folders / run), read_metrics(by_zero3), strict=True):
        agree(ours, theirs, 2e-6)


def test_gradients_reduced_once_a_step_are_sent_once(under_both, folders, by_fsdp2):
    """42,720 parameters of 4 bytes in two micro-batches, of which a ring of two sends half."""
    once, each = (read_metrics(folder)[-1] for folder in (folders / "faster fsdp2", by_fsdp2))
    sent = {
        name: each["sent_by_collective"][name] - once["sent_by_collective"][name] for name in each["sent_by_collective"]
    }
    assert sent == {"reduce_scatter": 4 * 42_720 // 2} | {name: 0 for name in sent if name != "reduce_scatter"}
    told = json.loads((folders / "faster fsdp2" / "resolved_config.json").read_text())["speed"]
    assert told["attention"] == "sdpa" and told["compile"] == "aot_eager" and told["reduce_once"]


def test_float8_under_fsdp2_follows_bf16(under_both, folders):
    """Measured beside bf16: losses 3e-4, norms of gradients 7e-3. Without torchao the run is refused."""
    if not Path(sys.prefix, "torchao").exists():
        assert "needs the package torchao, which is not installed here: pip" in under_both["float8"]
        return
    assert under_both["float8"] == ""
    for ours, theirs in zip(*(read_metrics(folders / name) for name in ("float8", "bf16")), strict=True):
        print(ours["loss"] / theirs["loss"] - 1, ours["grad_norm"] / theirs["grad_norm"] - 1)
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-3) and ours["loss"] != theirs["loss"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=3e-2)


def test_fsdp2_in_bf16_with_checkpointing(under_both, folders, by_fsdp2):
    """And plain attention. bf16 has 3 digits; the masters are saved."""
    assert under_both["bf16, checkpointing"] == ""
    told = json.loads((folders / "bf16, checkpointing" / "resolved_config.json").read_text())["speed"]
    assert told["attention"] == "eager" and told["gradient_checkpointing"] == "full"
    for bf16, fp32 in zip(read_metrics(folders / "bf16, checkpointing"), read_metrics(by_fsdp2), strict=True):
        assert bf16["loss"] == pytest.approx(fp32["loss"], rel=3e-3) and bf16["loss"] != fp32["loss"]
    weights = load_file(folders / "bf16, checkpointing/model/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ("damaged", r"__1_0.distcp is damaged: its SHA-256 is not the one in run.json; no other is left"),
        ("offload", "offload_optimizer, .*offload_param.* is DeepSpeed's, and FSDP2 would not hear it"),
        ("Addax", "Addax has its batches divided by DeepSpeed's engine: run launch/pretrain.py"),
        ("two_pass", 'IPSGD with clip="two_pass" runs each batch twice'),
        (
            "released, accumulated",
            "gradient_accumulation_steps=3, but AdamMini with release_gradients uses .* set it to 1 and "
            "train_micro_batch_size_per_gpu to 12",
        ),
        ("released, clipped", "gradient_clipping=0.5, but AdamMini with release_gradients never .* set it to 0"),
        ("compiled zero3", "--compile aot_eager: ZeRO-3 gathers each matrix by a hook .* take ZeRO-2, or FSDP2"),
        ("float8 fp32", "--float8 rowwise .* add --dtype bf16|needs the package torchao"),
        ("float8 zero3", "--float8 rowwise is FSDP2's"),
        ("once zero3", "--reduce_once is FSDP2's .*Leave it out"),
        ("Lion", "optimizer Lion runs inside DeepSpeed alone: choose AdamW or AdamMini"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(under_both, run, message):
    assert re.search(message, under_both[run]), under_both[run]


def dry_run(script: str, *arguments: str, **environment: str) -> list[list[str]]:
    """The words of each command that a script would run."""
    done = run(["bash", f"launch/{script}", *arguments, "--dry_run"], **environment)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def job_options(words: list[str], monkeypatch) -> dict:
    """What the script in a command makes of the options that follow it, by its own parser."""
    number = next(number for number, word in enumerate(words) if word.endswith(".py"))
    monkeypatch.setattr(sys, "argv", words[number:])
    monkeypatch.syspath_prepend(ROOT / "launch")
    script = runpy.run_path(ROOT / words[number])
    if "parse" in script:
        return vars(script["parse"]())
    given = []
    script["main"].__globals__["run_job"] = lambda job, options: given.append(vars(options))
    script["main"]()
    return given[0]


def test_a800_2x_sweeps_and_reports(monkeypatch, capsys):
    sweep, report = dry_run("a800_2x.sh")
    options = job_options(sweep, monkeypatch)
    assert sweep[:2] == ["python", "launch/throughput.py"]
    assert options["model"] == "llama2-7b" and options["gpus"] == 2 and options["seq_length"] == 4096
    assert options["optimizer"] == ["AdamW", "AdamMini"] and options["stage"] == [2, 3]
    assert options["micro_batch"] == ["auto"] and options["resume"]
    assert options["gradient_checkpointing"] == "full"
    assert report == ["ds-memopt", "report", "runs/a800_2x"] and str(options["output_dir"]) == report[-1]
    assert cli.main(["report", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err  # the command is there
    sweep, report = dry_run("a800_2x.sh", "--optimizer", "GWT", GPUS="4", OUTPUT_DIR="runs/b c")
    options = job_options(sweep, monkeypatch)
    assert options["gpus"] == 4 and options["optimizer"] == ["GWT"] and report[-1] == "runs/b c"


def test_h100_8x_pretrains(monkeypatch):
    ((*words,),) = dry_run("h100_8x.sh", "--steps", "20")
    launcher = runner.parse_args(words[1:])
    assert words[0] == "deepspeed" and launcher.num_gpus == 8 and launcher.user_script == "launch/pretrain.py"
    options = job_options(words, monkeypatch)
    assert options["model"] == "llama2-7b" and options["data"] == ["synthetic"] and options["steps"] == 20
    assert (ROOT / options["deepspeed_config"]).is_file()
    ((*words,),) = dry_run("h100_8x.sh", "--data", "texts", "--tokenizer", "llama", GPUS="4")
    options = job_options(words, monkeypatch)
    assert runner.parse_args(words[1:]).num_gpus == 4
    assert (options["data"], options["tokenizer"]) == (["texts"], "llama")


@pytest.mark.parametrize("script", ["a800_2x.sh", "h100_8x.sh"])
def test_too_few_gpus_are_told_before_anything_starts(script):
    done = run(["bash", f"launch/{script}"], CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 1 and done.stdout == ""
    assert re.search(rf"{script}: this needs [28] GPUs, and this machine has 1. Set GPUS", done.stderr)


HOSTS = ("--hostfile", "launch/hostfile.example")


def test_multi_node_by_pdsh(monkeypatch):
    ((*words,),) = dry_run("multi_node.sh", "--launcher", "pdsh", *HOSTS, "--model", "llama2-7b")
    launcher = runner.parse_args(words[1:])
    assert launcher.launcher == "pdsh" and launcher.hostfile == HOSTS[1] and launcher.master_addr == "node01"
    assert runner.fetch_hostfile(ROOT / launcher.hostfile) == {"node01": 8, "node02": 8}
    assert job_options(words, monkeypatch)["model"] == "llama2-7b"


def test_multi_node_by_openmpi(monkeypatch):
    ((*words,),) = dry_run("multi_node.sh", "--launcher", "openmpi", *HOSTS, "--lr", "1e-4", INTERFACE="ib0")
    assert words[:3] == ["env", "MASTER_ADDR=node01", "MASTER_PORT=29500"]
    launcher = runner.parse_args(words[4:])
    hosts = runner.fetch_hostfile(ROOT / launcher.hostfile)
    command = runner.OpenMPIRunner(launcher, "", hosts).get_cmd({}, hosts)
    assert command[:3] == ["mpirun", "-n", "16"] and "btl_tcp_if_include ib0" in " ".join(command)
    assert job_options(command, monkeypatch)["lr"] == 1e-4


def test_multi_node_by_torchrun(monkeypatch, tmp_path):
    ((*words,),) = dry_run("multi_node.sh", "--launcher", "torchrun", *HOSTS, "--data", "my texts")
    assert words[:-1] == ["pdsh", "-S", "-R", "ssh", "-w", "node01,node02"]
    place, torchrun = words[-1].split(" && ")
    assert place == f"cd {shlex.quote(str(ROOT))}"
    words = shlex.split(torchrun.replace("%n", "1"))  # as pdsh does on the second machine
    launcher = get_args_parser().parse_args(words[1:])
    assert (launcher.nnodes, launcher.node_rank, launcher.nproc_per_node) == ("2", 1, "8")
    assert (launcher.master_addr, launcher.master_port) == ("node01", 29500)
    assert launcher.training_script == "launch/pretrain_fsdp2.py"
    assert job_options(words, monkeypatch)["data"] == ["my texts"]
    (tmp_path / "hosts").write_text("a slots=8\nb slots=4\n")
    done = run(
        ["bash", "launch/multi_node.sh", "--launcher", "torchrun", "--hostfile", str(tmp_path / "hosts"), "--dry_run"]
    )
    assert done.returncode == 1 and "torchrun needs as many slots on all machines" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--launcher", "ssh", *HOSTS], "--launcher 'ssh' is none of pdsh, openmpi and torchrun"),
        (["--launcher", "pdsh"], "--hostfile '' is no file"),
        (["--hostfile"], "--hostfile needs a value"),
    ],
)
def test_multi_node_needs_to_know_where_and_how(arguments, message):
    done = run(["bash", "launch/multi_node.sh", *arguments, "--dry_run"])
    assert done.returncode == 1 and message in done.stderr


def test_the_readmes_commands_are_accepted(monkeypatch):
    section = (ROOT / "launch/README.md").read_text().split("## On a cluster")[1]
    commands = [shlex.split(line, comments=True) for line in section.split("```")[1].splitlines()[1:]]
    assert len(commands) == 6
    for command in commands:
        if scripts := [word for word in command if word.endswith((".sh", ".sbatch"))]:
            words = ["launch/hostfile.example" if word == "FILE" else word for word in command]
            script = scripts[0]
            command = dry_run(script.removeprefix("launch/"), *words[words.index(script) + 1 :])[0]
        assert job_options(command, monkeypatch)["model"] in ("tiny", "llama-1b", "llama2-7b")


def test_slurm_starts_one_task_per_gpu(monkeypatch):
    ((*words,),) = dry_run("slurm.sbatch", "--model", "llama2-7b", JOB="launch/pretrain_fsdp2.py")
    assert words[0] == "srun" and words[words.index("python") + 1] == "launch/pretrain_fsdp2.py"
    assert job_options(words, monkeypatch)["model"] == "llama2-7b"
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)=(\w+)$", (ROOT / "launch/slurm.sbatch").read_text(), re.MULTILINE))
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
