"""What a run may be told: the one list of options. launch/arguments.py makes the command line from it."""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

LARGEST = 2**31 - 1
"""Of any number that a run is told: beyond it, sums of steps, seeds and ranks do not fit into 64 bits."""

RUN = "run"
SIZE = "size (default: what the DeepSpeed config fixes, else the model's recipe)"
OPTIMIZER = "optimizer (default: the DeepSpeed config, else the model's recipe)"
INTERVALS = "how often, in steps"
SPEED = "faster and smaller steps, with the same result but for rounding"
DATA = "model and data"


def option(group: str, help: str, default: Any = None, at_least: int | None = None, **argparse: Any) -> Any:
    """A field of the classes below. group, help: of `--help`. at_least: less is refused. argparse: arguments of
    add_argument, for an option whose type does not tell how to read it."""
    return field(default=default, metadata={"group": group, "help": help, "at_least": at_least, "argparse": argparse})


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of every run. None means: what the DeepSpeed config says, else the model's recipe (`presets.Recipe`),
    else what `defaults` gives."""

    job: ClassVar[str]
    """Names the default output folder."""

    deepspeed_config: str = option(RUN, 'DeepSpeed JSON; "auto" values are filled', MISSING)
    output_dir: str | None = option(
        RUN, "metrics.jsonl, checkpoints, ... go here; default: the first free of runs/{job}-1, runs/{job}-2, ..."
    )
    resume: bool | int = option(
        RUN, "continue from the latest whole checkpoint of --output_dir, or from that of a step",
        default=False, at_least=1, nargs="?", type=int, const=True, metavar="STEP",
    )  # fmt: skip
    trust_checkpoint: bool = option(RUN, "resume even if its files name code that loading them may run", default=False)
    timeout_minutes: float = option(
        RUN, "until the job ends because a rank does not answer, or the others wait for it in a step or validation; "
        "default: 10", default=10,
    )  # fmt: skip
    grace_seconds: float = option(
        RUN, "from a SIGTERM, at which the run saves a checkpoint, to its end; default: 25", default=25, at_least=1
    )
    seed: int = option(RUN, "of new weights, data order and method; default: 0", default=0, at_least=0)

    steps: int | None = option(SIZE, "optimizer steps of the whole run, resumed parts included", at_least=1)
    seq_length: int | None = option(SIZE, "tokens per sequence", at_least=2)
    micro_batch: int | None = option(SIZE, "sequences per rank and forward pass", at_least=1)
    accumulation: int | None = option(
        SIZE, "micro-batches per step; default: what makes up the recipe's global batch", at_least=1
    )
    memory_limit_gib: float | None = option(SIZE, "fail beyond it, as on a GPU of this size")
    dtype: Literal["fp32", "bf16"] | None = option(SIZE, "default: fp32 on CPU, bf16 on GPU")

    attention: Literal["sdpa", "flash_attention_2", "eager"] | None = option(
        SPEED, "who computes attention: PyTorch, the package flash-attn, plain products; default: what transformers "
        "chooses for the model",
    )  # fmt: skip
    gradient_checkpointing: Literal["none", "full", "selective"] = option(
        SPEED, "compute activations again in backward, to save memory; selective: but for matrix products and "
        "attention; without a word: full; default: none", default="none", nargs="?", const="full",
        choices=("none", "full", "selective"),
    )  # fmt: skip
    loss_chunks: int = option(
        SPEED, "hold the logits of 1/N of the tokens at a time, and compute them again in backward; default: 1",
        default=1, at_least=1,
    )  # fmt: skip
    compile: str | None = option(
        SPEED, "torch.compile each layer, with this backend or inductor; default: no", nargs="?", const="inductor"
    )

    optimizer: str | None = option(OPTIMIZER, "replaces the type in the DeepSpeed config: AdamW, AdamMini, ...")
    lr: float | None = option(OPTIMIZER, "learning rate after warm-up", at_least=0)
    betas: tuple[float, float] | None = option(OPTIMIZER, "decay rates of the two moments")
    eps: float | None = option(OPTIMIZER, "added to the root of the second moment; default: 1e-8", at_least=0)
    weight_decay: float | None = option(
        OPTIMIZER, "on weights with 2 or more dimensions; norms and biases: none", at_least=0
    )
    gradient_clipping: float | None = option(
        OPTIMIZER, "largest gradient norm; default: 1.0; 0 = no clipping", at_least=0
    )
    schedule: str | None = option(
        OPTIMIZER, "linear (default), cosine, warmup_stable_decay, ...: a name of transformers.get_scheduler"
    )
    schedule_kwargs: tuple[str, ...] = option(
        OPTIMIZER, "what else the schedule takes: num_decay_steps=1000 min_lr_ratio=0.1", (),
        nargs="+", metavar="NAME=VALUE",
    )  # fmt: skip
    warmup_steps: int | None = option(OPTIMIZER, "default: the recipe's fraction of the steps", at_least=0)

    logging_interval: int | None = option(
        INTERVALS, "lines of metrics.jsonl; default: a fortieth of the run, at most 10", at_least=1
    )
    validation_interval: int | None = option(INTERVALS, "default: a tenth of the run; 0 = never", at_least=0)
    save_interval: int | None = option(
        INTERVALS, "checkpoints; default: after the last step (never if synthetic); 0 = never", at_least=0
    )

    profile: int = option(
        INTERVALS, "write a trace of this many steps, default 2, after the first three: trace.json.gz of the output "
        "folder, by PyTorch's profiler", default=0, at_least=0, nargs="?", type=int, const=2, metavar="STEPS",
    )  # fmt: skip

    checkpoint_format: Literal["portable", "engine"] = option(
        INTERVALS, "portable (default): resumes on any number of ranks, at any stage; engine: DeepSpeed's or "
        "torch.distributed's own files", default="portable",
    )  # fmt: skip
    async_save: bool = option(
        INTERVALS, "write portable checkpoints behind the next steps, from a copy in host memory", default=False
    )
    keep_checkpoints: int | None = option(INTERVALS, "the newest to keep; default: all", at_least=1)

    model: str = option(DATA, "local Hugging Face folder", MISSING)
    data: str = option(DATA, "file", MISSING)
    tokenizer: str | None = option(DATA, "local Hugging Face tokenizer folder")

    @property
    def sources(self) -> list[str]:
        """The words of --data."""
        return [self.data] if isinstance(self.data, str) else list(self.data)

    def defaults(self, steps: int, warmup_fraction: float, on_cpu: bool) -> dict[str, Any]:
        """Values of options that are None here and that neither DeepSpeed config nor recipe knows.

        steps, warmup_fraction: of the run and its recipe.
        """
        return {
            "dtype": "fp32" if on_cpu else "bf16",
            "eps": 1e-8,
            "gradient_clipping": 1.0,
            "schedule": "linear",
            "warmup_steps": math.ceil(warmup_fraction * steps),
            "logging_interval": min(10, math.ceil(steps / 40)),
            "validation_interval": max(1, steps // 10),
            "save_interval": 0 if self.sources == ["synthetic"] else steps,
        }

    def check(self) -> None:
        """ValueError for a number out of range, naming the option, the value and the limit."""
        for one in fields(self):
            value, least = getattr(self, one.name), one.metadata["at_least"]
            if least is None or value is None or value is False:
                continue
            if not least <= value <= LARGEST:
                limit = f"at least {least}" if value < least else f"a number, at most {LARGEST}"
                raise ValueError(f"--{one.name} {value} is out of range: it must be {limit}")


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(RunOptions):
    """Options of a pre-training run."""

    job: ClassVar[str] = "pretrain"

    model: str = option(DATA, "tiny, llama-39m ... llama-1b, llama2-7b, ... or a local HF folder", "tiny")
    float8: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] | None = option(
        SIZE, "FSDP2: products with layers' weights in float8, by torchao, with a scale for each tensor, each row, or "
        "each row but weights' gradients in bf16; default: no",
    )  # fmt: skip
    replicas: int = option(
        SPEED, "FSDP2: copies of the model, each sharded over a group of neighbouring ranks (HSDP); default: 1",
        default=1, at_least=1,
    )  # fmt: skip
    reduce_once: bool = option(
        SPEED, "FSDP2: reduce gradients after the last micro-batch of a step, and hold whole ones in fp32 until then",
        default=False,
    )  # fmt: skip
    data: str | tuple[str, ...] = option(
        DATA, "stdlib, synthetic, or files, folders or globs of text, JSON, Parquet or tokens, each with a weight if "
        "there are several: web=FOLDER:0.7 code='*.parquet':0.3", "stdlib", nargs="+", metavar="[NAME=]PATH[:WEIGHT]",
    )  # fmt: skip
    tokenizer: str | None = option(DATA, "local Hugging Face tokenizer folder, for all but token files")
    text_field: tuple[str, ...] = option(
        DATA, "field of a row that holds its text; of several, the first that it has; default: text", ("text",),
        nargs="+", metavar="NAME",
    )  # fmt: skip
    end_of_text: int | None = option(
        DATA, "id that ends a document in token files; default: the tokenizer's, if there is one", at_least=0
    )
    document_borders: bool = option(DATA, "attention does not leave a document, positions restart", default=False)
    bad_rows: float = option(
        DATA, "rows without a text that are left out, a count, or below 1 a fraction; one more is an error; default: 0",
        default=0.0, at_least=0,
    )  # fmt: skip
    num_proc: int | None = option(
        DATA, "processes that cut text into tokens, once; default: one for 32 MiB, at most one a core", at_least=1
    )
    workers: int = option(DATA, "processes of each rank that read batches ahead; default: 0", default=0, at_least=0)
    streaming: bool = option(
        DATA, "cut Parquet files into tokens while training, and keep no tokens on disk", default=False
    )
    validation_data: tuple[str, ...] = option(
        DATA, "sources to validate on; default: a twentieth of the documents of --data, which are not trained on", (),
        nargs="+", metavar="[NAME=]PATH",
    )  # fmt: skip
    validation_batches: int = option(DATA, "global batches of held-out text; default: 32", default=32, at_least=1)


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """Options of a fine-tuning run. The files are described in `train.data.rows`."""

    job: ClassVar[str] = "finetune"

    model: str = option(DATA, "output folder of a run, or a local HF folder with weights", MISSING)
    data: str = option(DATA, "JSONL file of rows to train on; a row too long is an error", MISSING)
    validation_data: str | None = option(
        DATA, "JSONL file of rows to validate on, all of them, also before training; default: no validation"
    )
    tokenizer: str | None = option(DATA, "local HF tokenizer folder; default: the model's own, else bytes")
