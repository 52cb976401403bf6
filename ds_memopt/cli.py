"""The command `ds-memopt`."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand; returns the exit status: 0, or 2 with one line on stderr for a user's mistake."""
    parser = argparse.ArgumentParser(prog="ds-memopt", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("replay", help="rebuild the weights of a MeZO run from its trajectory")
    command.add_argument("base", type=Path, help="weights before the first step: a file or a Hugging Face folder")
    command.add_argument("trajectory", type=Path, help="the file that the run wrote")
    command.add_argument("out", type=Path, help="where to write the weights after the last step")
    _add_plan(commands)
    command = commands.add_parser("report", help="one page, with plots, that lays runs side by side")
    command.add_argument("run", nargs="+", type=Path, help="the folder of a run or of a sweep")
    command.add_argument("--output", type=Path, help="folder to write, by default in the sweep or in runs/")
    command = commands.add_parser("methods", help="the methods, and what each may be told")
    command.add_argument("method", nargs="?", help="the one whose hyper-parameters to list")
    command.add_argument("--markdown", action="store_true", help="as the table of the documents")
    _add_checkpoint(commands)
    commands.add_parser("doctor", help="what this machine has for training, and what will not work")
    given = parser.parse_args(arguments)
    try:
        COMMANDS[given.command](given)
    except ValueError as error:
        print(f"ds-memopt {given.command}: {error}", file=sys.stderr)
        return 2
    return 0


def _add_plan(commands) -> None:
    command = commands.add_parser("plan", help="what fits, and what it sends, under every method and ZeRO stage")
    command.add_argument("--model", required=True, help="a preset, or a folder with a Hugging Face config.json")
    command.add_argument("--gpus", type=int, required=True, help="ranks of the run")
    command.add_argument("--gpu_memory", required=True, help="of each, such as 80GB (10^9 bytes) or 75GiB")
    command.add_argument("--seq_length", type=int, required=True, help="tokens per sequence")
    command.add_argument("--optimizer", default="all", help="all (default), or some: AdamW,GWT,my_ds_config.json")
    command.add_argument("--dtype", default="bf16", choices=["bf16", "fp32"], help="of weights and gradients")
    command.add_argument("--loss_chunks", type=int, default=1, help="as the jobs' option: of the logits, 1/N at a time")
    command.add_argument(
        "--attention", default="sdpa", choices=["sdpa", "flash_attention_2", "eager"], help="as the jobs' option"
    )
    command.add_argument("--fsdp2", action="store_true", help="under FSDP2, instead of at ZeRO's stages")
    command.add_argument("--reduce_once", action="store_true", help="as the FSDP2 job's option; with --fsdp2")
    command.add_argument("--replicas", type=int, default=1, help="as the FSDP2 job's option; with --fsdp2")
    command.add_argument("--tflops", type=float, help="that a GPU keeps, to tell how much faster a step is")
    command.add_argument("--bandwidth", help="that a GPU sends in a second, such as 200GB; with --tflops")
    command.add_argument("--gpu", help="whose memory tells the time of the method's step: H100, A100-80GB, ...")
    command.add_argument("--by_kind", action="store_true", help="list each state and all traffic, in bytes")
    command.add_argument("--output", type=Path, help="write the ds_config that is recommended to this file")


def _add_checkpoint(commands) -> None:
    command = commands.add_parser(
        "checkpoint", help="what is in a portable checkpoint, whether it is whole, its weights"
    )
    actions = command.add_subparsers(dest="action", required=True)
    for name, help in (
        ("inspect", "what it holds: bytes by kind, step, method, ranks"),
        ("verify", "read every file of every checkpoint in the folder"),
        ("export", "write its weights as a Hugging Face folder"),
    ):
        action = actions.add_parser(name, help=help)
        action.add_argument("folder", type=Path, help="a checkpoint, or a folder of them: then the newest whole one")
    action.add_argument("out", type=Path, help="folder to write")
    action.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], help="of the weights; default: as they were saved")
    action = actions.add_parser("reshard", help="turn a run's portable checkpoint into DeepSpeed's own files, or back")
    action.add_argument("run", type=Path, help="output folder of a pre-training run")
    action.add_argument("out", type=Path, help="folder to write, for a run to go on in")
    action.add_argument("--ranks", type=int, help="that will resume from DeepSpeed's own files")
    action.add_argument("--zero_stage", type=int, choices=range(4), help="of that run")
    action.add_argument("--step", type=int, help="default: the newest whole checkpoint")


def _checkpoint(given: argparse.Namespace) -> None:
    if given.action == "reshard":
        from ds_memopt.train.reshard import reshard

        print(reshard(given.run, given.out, given.ranks, given.zero_stage, given.step))
        return
    from ds_memopt.checkpoint import inspection

    if given.action == "inspect":
        print(inspection.describe(given.folder))
    elif given.action == "verify":
        for line in inspection.verify(given.folder):
            print(line)
    else:
        print(inspection.export(given.folder, given.out, given.dtype))


def _plan(given: argparse.Namespace) -> None:
    from ds_memopt.plan.table import run

    run(**{name: value for name, value in vars(given).items() if name != "command"})


def _report(given: argparse.Namespace) -> None:
    from ds_memopt.results.report_page import write_report

    print(write_report(given.run, given.output))


def _methods(given: argparse.Namespace) -> None:
    from ds_memopt.optimizers import METHODS

    if given.method is None:
        for word, method in METHODS.items():
            print(f"{word}: {sys.modules[method.__module__].__doc__.splitlines()[0].partition(': ')[2]}")
        return
    if given.method not in METHODS:
        raise ValueError(f"{given.method!r} is no method: choose {', '.join(METHODS)}")
    hyper_parameters = METHODS[given.method].hyper_parameters
    print(hyper_parameters.table() if given.markdown else hyper_parameters.listing())


def _doctor(given: argparse.Namespace) -> None:
    from ds_memopt.doctor import report

    amiss = report()
    print(f"{amiss} of these will keep something from working." if amiss else "All is there.")


def _replay(given: argparse.Namespace) -> None:
    from tqdm import tqdm

    from ds_memopt.replay import replay

    steps = replay(given.base, given.trajectory, given.out, partial(tqdm, unit="step", disable=not sys.stderr.isatty()))
    print(f"{given.out}: {steps} steps applied")


COMMANDS = {
    "replay": _replay, "plan": _plan, "report": _report, "methods": _methods, "doctor": _doctor,
    "checkpoint": _checkpoint,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
