"""The options that the jobs share, launch/pretrain.py, pretrain_fsdp2.py and finetune.py, and how they run."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

CONFIGS = Path(__file__).resolve().parent.parent / "ds_configs"


def shared_parser(description: str, job: str, default_config: str, seed_of: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    run = parser.add_argument_group("run")
    run.add_argument(
        "--deepspeed_config", default=str(CONFIGS / default_config), help='DeepSpeed JSON; "auto" values are filled'
    )
    run.add_argument("--output_dir", help=f"metrics.jsonl, checkpoints, ... go here; default: runs/{job}-1, -2, ...")
    run.add_argument(
        "--resume",
        nargs="?",
        type=int,
        const=True,
        default=False,
        metavar="STEP",
        help="continue from the latest whole checkpoint of --output_dir, or from that of a step",
    )
    run.add_argument(
        "--trust_checkpoint", action="store_true", help="resume even if its files name code that loading them may run"
    )
    run.add_argument(
        "--timeout_minutes",
        type=float,
        default=10,
        help="until the job ends because a rank does not answer, or the others wait for it in a step or validation",
    )
    run.add_argument("--seed", type=int, default=0, help=f"of {seed_of}")

    size = parser.add_argument_group("size (default: what the DeepSpeed config fixes, else the model's recipe)")
    size.add_argument("--steps", type=int, help="optimizer steps of the whole run")
    size.add_argument("--seq_length", type=int, help="tokens per sequence")
    size.add_argument("--micro_batch", type=int, help="sequences per rank and forward pass")
    size.add_argument("--accumulation", type=int, help="micro-batches per step")
    size.add_argument("--gradient_checkpointing", action="store_true")
    size.add_argument("--memory_limit_gib", type=float, help="fail beyond it, as on a GPU of this size")
    size.add_argument("--dtype", choices=["fp32", "bf16"], help="default: fp32 on CPU, bf16 on GPU")

    rule = parser.add_argument_group("optimizer (default: the DeepSpeed config, else the model's recipe)")
    rule.add_argument("--optimizer", help="replaces the type in the DeepSpeed config: AdamW, AdamMini, ...")
    rule.add_argument("--lr", type=float)
    rule.add_argument("--betas", type=float, nargs=2)
    rule.add_argument("--eps", type=float)
    rule.add_argument("--weight_decay", type=float, help="on weights with 2 or more dimensions; norms and biases: none")
    rule.add_argument("--gradient_clipping", type=float, help="largest gradient norm, default 1.0; 0 = no clipping")
    rule.add_argument(
        "--schedule", help="linear (default), cosine, constant, ...: a name of transformers.get_scheduler"
    )
    rule.add_argument("--warmup_steps", type=int)

    every = parser.add_argument_group("how often, in steps")
    every.add_argument("--logging_interval", type=int, help="lines of metrics.jsonl; default: a fortieth, at most 10")
    every.add_argument("--validation_interval", type=int, help="default: a tenth of the run; 0 = never")
    every.add_argument("--save_interval", type=int, help="default: after the last step (never if synthetic); 0 = never")

    parser.add_argument("--deepspeed", action="store_true", help=argparse.SUPPRESS)  # always on; launchers pass it
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # passed by the deepspeed launcher
    return parser


def pretrain_parser(description: str, default_config: str) -> argparse.ArgumentParser:
    parser = shared_parser(description, "pretrain", default_config, "weights, data order and method")
    what = parser.add_argument_group("model and data")
    what.add_argument(
        "--model", default="tiny", help="tiny, llama-39m ... llama-1b, llama2-7b, ... or a local HF folder"
    )
    what.add_argument("--data", default="stdlib", help="stdlib, synthetic, or a text/JSONL file or folder")
    what.add_argument("--tokenizer", help="local Hugging Face tokenizer folder, for text and JSONL data")
    what.add_argument("--validation_batches", type=int, default=32, help="global batches of held-out text")
    return parser


def run_job(job: Callable, options: type, arguments: argparse.Namespace) -> None:
    """Call the job with the options, a dataclass whose fields the arguments name."""
    from ds_memopt.engines.processes import fail
    from ds_memopt.train.ranks import stop_ranks

    try:
        job(options(**{field.name: getattr(arguments, field.name) for field in fields(options)}))
    except BaseException as error:  # also an exit or interrupt: a rank that leaves early leaves the others waiting
        fail(error)
    stop_ranks()
