"""Measure tokens/s, memory and traffic of optimizers under ZeRO stages and micro-batches, each case in processes of its
own, and find the largest micro-batch that fits. Then `ds-memopt report FOLDER` makes a page of it.

python launch/throughput.py --model llama2-7b --seq_length 4096 --optimizer AdamW AdamMini --stage 2 3 \\
    --gradient_checkpointing                                              # all GPUs of this machine
python launch/throughput.py --seq_length 128 --micro_batch 4 16          # 2 CPU ranks where there is no GPU

A case that fails is a line with its reason; --resume goes on after an interruption, and tries failed cases again.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections import Counter
from itertools import product
from pathlib import Path

from arguments import CONFIGS, add_options

from ds_memopt.train.options import SPEED, RunOptions

LAUNCH = Path(__file__).resolve().parent


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what to sweep")
    what.add_argument(
        "--optimizer",
        nargs="+",
        default=["AdamW", "AdamMini"],
        help="types, or ds_configs with an optimizer block, for other hyper-parameters",
    )
    what.add_argument("--stage", nargs="+", type=int, choices=range(4), default=[2])
    what.add_argument("--micro_batch", nargs="+", default=["auto"], help='sizes, or "auto" to find the largest')
    what.add_argument("--largest_micro_batch", type=int, default=128, help='where "auto" ends')
    what.add_argument(
        "--vary",
        nargs="+",
        default=[],
        metavar="OPTION=VALUE,VALUE",
        help="of the options below that make steps faster and smaller, all combinations: attention=sdpa,eager "
        "loss_chunks=1,8 compile=,inductor; an empty value leaves the option out",
    )
    case = parser.add_argument_group("every case")
    case.add_argument("--model", default="tiny", help="as in launch/pretrain.py")
    case.add_argument("--gpus", type=int, help="default: all of this machine; 2 CPU ranks where it has none")
    case.add_argument("--seq_length", type=int, help="tokens; default: the model's recipe")
    case.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on CPU, bf16 on GPU")
    case.add_argument("--data", default="synthetic", help="as in launch/pretrain.py")
    case.add_argument("--memory_limit_gib", type=float, help="of each rank, as if its GPU were smaller")
    case.add_argument("--warm_up", type=int, default=5, help="steps that are not measured")
    case.add_argument("--measure", type=int, default=20, help="steps after them")
    case.add_argument("--timeout", type=float, default=1800, help="seconds until a case is given up")
    speed = add_options(parser.add_argument_group(f"every case: {SPEED}"), RunOptions, SPEED)
    parser.set_defaults(speed=speed)
    parser.add_argument("--output_dir", type=Path, help="default: the first free of runs/throughput-1, -2, ...")
    parser.add_argument("--resume", action="store_true", help="keep what --output_dir has and run the rest")
    return parser.parse_args()


def check(arguments: argparse.Namespace, gpus: int) -> list[int] | None:
    """The micro-batches, None to find the largest. ValueError for a number out of range, and for two optimizers whose
    cases could not be told apart."""
    if twice := [name for name, count in Counter(Path(one).stem for one in arguments.optimizer).items() if count > 1]:
        raise ValueError(f"--optimizer names {twice[0]} twice, and cases are named after it: rename one of the files")
    for name in ("warm_up", "measure", "largest_micro_batch", "timeout", "memory_limit_gib", "gpus"):
        value = gpus if name == "gpus" else getattr(arguments, name)
        if value is not None and value <= 0:
            raise ValueError(f"--{name} {value} is out of range: it must be more than 0")
    if arguments.micro_batch == ["auto"]:
        return None
    for size in arguments.micro_batch:
        if not size.isdecimal() or int(size) < 1:
            raise ValueError(f'--micro_batch {size} is neither a size of at least 1 nor, alone, "auto"')
    return [int(size) for size in arguments.micro_batch]


def combinations(vary: list[str]) -> list[str]:
    """The command-line words of every combination. ValueError for what is no option, or no value of it."""
    reader = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    known = add_options(reader, RunOptions, SPEED)
    varied = []
    for word in vary:
        name, _, values = word.partition("=")
        if name not in known or not values:
            raise ValueError(f"--vary {word} is none of {', '.join(known)} with values: write attention=sdpa,eager")
        options = [f"--{name} {value}" if value else "" for value in values.split(",")]
        try:
            for option in options:
                reader.parse_args(option.split())
        except argparse.ArgumentError as error:
            raise ValueError(f"--vary {word}: {error}") from error
        varied.append(options)
    return [" ".join(filter(None, chosen)) for chosen in product(*varied)]


def main() -> int:
    arguments = parse()
    import torch
    from tqdm import tqdm

    from ds_memopt.results.record import RESULTS, first_free
    from ds_memopt.results.schema import OK
    from ds_memopt.train import sweep
    from ds_memopt.train.config_check import check_optimizer_type
    from ds_memopt.train.presets import find_model

    gpus = (torch.cuda.device_count() or 2) if arguments.gpus is None else arguments.gpus
    shared = {"model": arguments.model, "data": arguments.data, "seq_length": arguments.seq_length}
    shared |= {"dtype": arguments.dtype, "memory_limit_gib": arguments.memory_limit_gib}
    shared |= {name: getattr(arguments, name) for name in arguments.speed}
    steps = {"logging_interval": arguments.warm_up, "steps": arguments.warm_up + arguments.measure}
    options = {name: value for name, value in (shared | steps).items() if value is not None}

    def command(case: sweep.Case, folder: Path, port: str) -> list[str]:
        config = folder / "ds_config.json"
        config.write_text(json.dumps(sweep.ds_config(case.optimizer, case.zero_stage, CONFIGS), indent=2))
        words = [f"{Path(sys.executable).parent}/deepspeed", "--num_gpus", gpus, "--master_port", port]
        words += [LAUNCH / "pretrain.py", "--deepspeed_config", config, "--output_dir", folder]
        words += ["--micro_batch", case.micro_batch, "--accumulation", 1]
        words += ["--validation_interval", 0, "--save_interval", 0]
        words += [word for name, value in options.items() for word in (f"--{name}", value)]
        return [*map(str, words), *case.options.split()]

    try:
        sizes, varied = check(arguments, gpus), combinations(arguments.vary)
        for optimizer in arguments.optimizer:  # a trial: a wrong one must fail now
            check_optimizer_type(sweep.ds_config(optimizer, arguments.stage[0], CONFIGS)["optimizer"]["type"])
        find_model(arguments.model)
        settings = shared | steps | {"gpus": gpus}
        folder = arguments.output_dir or first_free("runs/throughput")
        cases = sweep.Sweep(folder, settings, command, arguments.timeout, arguments.resume, tqdm.write)
    except ValueError as error:
        sys.exit(f"ValueError: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the case that runs is ended too
    total = len(arguments.optimizer) * len(arguments.stage) * len(varied)
    largest = arguments.largest_micro_batch
    sweep.progress(sweep.run_all(cases, arguments.optimizer, arguments.stage, sizes, largest, varied), total)
    print(sweep.summary(cases.results))
    print(f"{folder}/{RESULTS} has all figures; a page: ds-memopt report {folder}")
    return 0 if any(result["status"] == OK for result in cases.results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
