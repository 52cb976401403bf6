"""Portable checkpoints beside those of transformers' Trainer, and a Trainer that goes on from them anywhere.

Private names of transformers 5 used here: Trainer's `_prepare_for_training`, which builds the engine and loads the
checkpoint, `_load_from_checkpoint`, `_load_optimizer_and_scheduler` and `_load_scaler`, which it loads parts with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ds_memopt.checkpoint import load, save

FOLDER = "portable"
"""In Trainer's folder checkpoint-N, so that it is removed with it."""

NEEDED = ("_prepare_for_training", "_load_from_checkpoint", "_load_optimizer_and_scheduler", "_load_scaler")


class PortableCheckpoint(transformers.TrainerCallback):
    """Lets a Trainer write a portable checkpoint into each of its checkpoints, and resume from it.

        trainer = Trainer(...)
        trainer.add_callback(ds_memopt.PortableCheckpoint(trainer))
        trainer.train(resume_from_checkpoint=True)

    Under DeepSpeed, DistributedDataParallel or in one process. Where the checkpoint that it resumes from has a portable
    one, weights, optimizer and scheduler come from there, and DeepSpeed's own files are not read: the run goes on from
    another number of ranks, stage or engine. Where it has none, Trainer resumes as ever.

    Raises ValueError for Trainer's own FSDP, and when training begins, if the global batch has changed, in which
    Trainer counts what it has seen of the data.
    """

    def __init__(self, trainer: transformers.Trainer) -> None:
        if lacking := [name for name in NEEDED if not hasattr(trainer, name)]:
            raise RuntimeError(
                f"The Trainer of transformers {transformers.__version__} lacks {', '.join(lacking)}, which "
                "PortableCheckpoint needs. Install transformers 5.*, or use ds_memopt.save and load in your own loop."
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "PortableCheckpoint does not know the FSDP of Trainer. Use DeepSpeed, or your own loop with "
                "fully_shard, ds_memopt.save and load."
            )
        self._trainer = trainer
        self._prepare, self._load_weights = trainer._prepare_for_training, trainer._load_from_checkpoint
        trainer._prepare_for_training, trainer._load_from_checkpoint = self._prepare_and_load, self._load_other_weights

    def on_save(self, args, state, control, **others) -> None:
        folder = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", FOLDER)
        save(self._target(), folder, state.global_step, extra={"global_batch": self._global_batch()})

    def _target(self) -> Any:
        trainer = self._trainer
        if trainer.is_deepspeed_enabled:
            return trainer.deepspeed
        return trainer.model, getattr(trainer.optimizer, "optimizer", trainer.optimizer), trainer.lr_scheduler

    def _global_batch(self) -> int:
        args = self._trainer.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    def _load_other_weights(self, checkpoint: str, model: Any = None) -> None:
        """In the place of Trainer's `_load_from_checkpoint`."""
        if model is not None or not Path(checkpoint, FOLDER).exists():
            self._load_weights(checkpoint, model)

    def _prepare_and_load(self, max_steps: int, train_dataloader: Any, checkpoint: str | None) -> tuple[Any, Any]:
        """In the place of Trainer's `_prepare_for_training`."""
        if checkpoint is None or not Path(checkpoint, FOLDER).exists():
            return self._prepare(max_steps, train_dataloader, checkpoint)
        prepared = self._prepare(max_steps, train_dataloader, None)
        saved = load(self._target(), Path(checkpoint, FOLDER))["extra"]["global_batch"]
        args, here = self._trainer.args, self._global_batch()
        if saved != here and not args.ignore_data_skip:
            raise ValueError(
                f"{checkpoint} was made with a global batch of {saved} rows, this run has {here}: "
                f"{args.train_batch_size} on each of {args.world_size} ranks, {args.gradient_accumulation_steps} "
                "times. Trainer would skip other rows than it has seen. Keep the product by changing "
                "per_device_train_batch_size and gradient_accumulation_steps, or set ignore_data_skip."
            )
        if self._trainer.is_deepspeed_enabled:  # the schedule, where the engine has none
            self._trainer._load_optimizer_and_scheduler(checkpoint)
        self._trainer._load_scaler(checkpoint)
        return prepared
