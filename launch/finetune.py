"""Fine-tune a trained model on prompts and their completions.

On one machine, GPUs or CPU:    deepspeed --num_gpus 2 launch/finetune.py --model runs/pretrain-1 --data train.jsonl \\
                                    --validation_data valid.jsonl --lr 1e-4 --steps 200
One process:                    python launch/finetune.py --model ... --data ...

The files hold one JSON object per line: {"prompt": "2 + 3 =", "completion": " 5"}. Only the completion is trained.
A validation row is right if the model gives its completion, token by token; with "choices": [" 4", " 5"] beside it,
if its completion is the most likely of them.

With Addax in the ds_config every rank gets, at every step, zo_batch rows of more than length_threshold tokens and
fo_batch others. "auto", the default, is what fits the GPU; without a GPU give memory_gib or a number. With null, or
where all rows are longer or none is, both halves are drawn from all rows.
"""

from arguments import parse_options, run_job

from ds_memopt.train.options import FinetuneOptions


def main() -> None:
    options = parse_options(FinetuneOptions, __doc__, "zero2_adamw.json")
    from ds_memopt.train.finetune_job import finetune  # slow to import: --help and a wrong option should answer at once

    run_job(finetune, options)


if __name__ == "__main__":
    main()
