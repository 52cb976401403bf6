"""What a pre-training run may be told. launch/pretrain.py offers each field as an option of the same name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Options:
    """Settings of a run. None means: what the DeepSpeed config says, else the recipe, else the stated default."""

    deepspeed_config: str  # path of a DeepSpeed JSON; may hold "auto" values
    model: str = "tiny"  # a preset, or a local Hugging Face folder
    data: str = "stdlib"  # "stdlib", "synthetic", or a text/JSONL file or folder
    tokenizer: str | None = None  # local folder, for text and JSONL data
    output_dir: str | None = None  # default: the first free of runs/pretrain-1, runs/pretrain-2, ...
    resume: bool = False  # continue from the latest checkpoint of output_dir

    steps: int | None = None  # optimizer steps of the whole run, resumed parts included
    seq_length: int | None = None  # tokens
    micro_batch: int | None = None  # sequences per rank and forward pass
    accumulation: int | None = None  # micro-batches per step; default: recipe's global batch / (micro_batch * ranks)
    gradient_checkpointing: bool = False
    dtype: str | None = None  # "fp32" or "bf16"; default fp32 on CPU, bf16 elsewhere
    seed: int = 0  # of weights and data order

    optimizer: str | None = None  # replaces the type in the DeepSpeed config
    lr: float | None = None
    betas: tuple[float, float] | None = None  # default 0.9, 0.95
    eps: float | None = None  # default 1e-8
    weight_decay: float | None = None  # default 0.1, on weights with 2 or more dimensions
    gradient_clipping: float | None = None  # default 1.0; 0 switches clipping off
    schedule: str | None = None  # a name of transformers.get_scheduler; default "linear": decay to 0
    warmup_steps: int | None = None  # default: the recipe's fraction of the steps

    logging_interval: int | None = None  # steps; default a fortieth of the run, at most 10
    validation_interval: int | None = None  # steps; default a tenth of the run; 0 = never
    validation_batches: int = 32  # global batches of held-out sequences
    save_interval: int | None = None  # steps; default: only after the last step (never with synthetic data); 0 = never

    def check(self) -> None:
        """ValueError for a number out of range, naming the option, the value and the limit."""
        limits = {"steps": 1, "seq_length": 2, "micro_batch": 1, "accumulation": 1, "logging_interval": 1}
        limits |= dict.fromkeys(("validation_interval", "save_interval", "warmup_steps", "gradient_clipping"), 0)
        limits |= {"validation_batches": 1, "seed": 0}
        for name, least in limits.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name} {value} is out of range: it must be at least {least}")
