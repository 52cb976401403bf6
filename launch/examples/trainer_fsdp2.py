"""transformers' Trainer under FSDP2 with one of our methods, on the source text of Python's standard library.

    torchrun --nproc_per_node 8 launch/examples/trainer_fsdp2.py --output_dir runs/trainer --max_steps 100

`--method` is AdamMini, GWT or CAME; the other options are those of TrainingArguments. Trainer can shard on GPUs alone:
on a CPU it trains with DistributedDataParallel instead.
"""

import torch
from torch.utils.data import Dataset
from transformers import AutoModelForCausalLM, HfArgumentParser, Trainer, TrainingArguments, set_seed

from ds_memopt.optimizers import METHODS
from ds_memopt.support import refuse
from ds_memopt.train.data.corpus import load_corpus
from ds_memopt.train.presets import find_model

SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}}


class Rows(Dataset):
    """As Trainer takes them. sequences: of token ids."""

    def __init__(self, sequences: Dataset) -> None:
        self._sequences = sequences

    def __len__(self) -> int:
        return len(self._sequences)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self._sequences[index]
        return {"input_ids": ids, "labels": ids}


def main() -> None:
    parser = HfArgumentParser(TrainingArguments)
    parser.add_argument("--method", default="AdamMini", choices=METHODS)
    parser.set_defaults(**SHARDED, report_to="none")
    arguments, other = parser.parse_args_into_dataclasses()
    method = METHODS[other.method]
    refuse(method, "trainer_fsdp2")
    set_seed(arguments.seed)
    config, recipe = find_model("tiny")
    corpus = load_corpus("stdlib", None, recipe.seq_length, config.vocab_size)
    trainer = Trainer(
        model=AutoModelForCausalLM.from_config(config),
        args=arguments,
        train_dataset=Rows(corpus.train),
        eval_dataset=Rows(corpus.validation),
        # Trainer calls the first with nothing, and what that returns with the model.
        optimizer_cls_and_kwargs=(
            lambda: method.from_model,
            {
                "lr": arguments.learning_rate,
                "betas": (arguments.adam_beta1, arguments.adam_beta2),
                "weight_decay": arguments.weight_decay,
            },
        ),
    )
    trainer.train()


if __name__ == "__main__":
    main()
