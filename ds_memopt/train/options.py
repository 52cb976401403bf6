"""What a run may be told. launch/pretrain.py and launch/finetune.py offer each field as an option of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

LARGEST = 2**31 - 1
"""Of any number that a run is told: beyond it, sums of steps, seeds and ranks do not fit into 64 bits."""


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Settings of every run. None means: what the DeepSpeed config says, else the recipe, else the stated default."""

    job: ClassVar[str]  # names the default output folder

    deepspeed_config: str  # path of a DeepSpeed JSON; may hold "auto" values
    model: str
    data: str
    tokenizer: str | None = None  # local Hugging Face tokenizer folder
    output_dir: str | None = None  # default: the first free of runs/<job>-1, runs/<job>-2, ...
    resume: bool | int = False  # continue from the latest whole checkpoint of output_dir, or from that of this step
    trust_checkpoint: bool = False  # load it even if its files name functions, which loading them may call

    steps: int | None = None  # optimizer steps of the whole run, resumed parts included
    seq_length: int | None = None  # tokens
    micro_batch: int | None = None  # sequences per rank and forward pass
    accumulation: int | None = None  # micro-batches per step; default: recipe's global batch / (micro_batch * ranks)
    gradient_checkpointing: bool = False
    dtype: str | None = None  # "fp32" or "bf16"; default fp32 on CPU, bf16 elsewhere
    memory_limit_gib: float | None = None  # a rank that needs more fails, as on a smaller GPU
    timeout_minutes: float = 10  # until the job ends for a rank that the others wait for
    seed: int = 0  # of random weights, data order, and methods that draw at random

    optimizer: str | None = None  # replaces the type in the DeepSpeed config
    lr: float | None = None
    betas: tuple[float, float] | None = None
    eps: float | None = None  # default 1e-8
    weight_decay: float | None = None  # on weights with 2 or more dimensions
    gradient_clipping: float | None = None  # default 1.0; 0 switches clipping off
    schedule: str | None = None  # a name of transformers.get_scheduler; default "linear": decay to 0
    warmup_steps: int | None = None  # default: the recipe's fraction of the steps

    logging_interval: int | None = None  # steps; default a fortieth of the run, at most 10
    validation_interval: int | None = None  # steps; default a tenth of the run; 0 = never
    save_interval: int | None = None  # steps; default: only after the last step (never with synthetic data); 0 = never

    def check(self) -> None:
        """ValueError for a number out of range, naming the option, the value and the limit."""
        for name, least in self._limits().items():
            value = getattr(self, name)
            if value is not None and not least <= value <= LARGEST:
                limit = f"at least {least}" if value < least else f"a number, at most {LARGEST}"
                raise ValueError(f"--{name} {value} is out of range: it must be {limit}")

    def _limits(self) -> dict[str, int]:
        limits = {"resume": 1} if self.resume is not False else {}
        limits |= {"steps": 1, "seq_length": 2, "micro_batch": 1, "accumulation": 1, "logging_interval": 1}
        others = "seed", "validation_interval", "save_interval", "warmup_steps", "gradient_clipping", "lr", "eps"
        return limits | dict.fromkeys((*others, "weight_decay"), 0)


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    """Settings of a pre-training run."""

    job: ClassVar[str] = "pretrain"

    model: str = "tiny"  # a preset, or a local Hugging Face folder
    data: str = "stdlib"  # "stdlib", "synthetic", or a text/JSONL file or folder
    validation_batches: int = 32  # global batches of held-out sequences

    def _limits(self) -> dict[str, int]:
        return super()._limits() | {"validation_batches": 1}


@dataclass(frozen=True, kw_only=True)
class FinetuneOptions(RunOptions):
    """Settings of a fine-tuning run. model: the output folder of an earlier run, or a local Hugging Face folder. data
    and validation_data: JSONL files, see `train.rows`. tokenizer: default the model folder's, else bytes."""

    job: ClassVar[str] = "finetune"

    validation_data: str | None = None  # without it nothing is validated
