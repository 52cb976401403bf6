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

import argparse

from arguments import run_job, shared_parser


def parse() -> argparse.Namespace:
    parser = shared_parser(__doc__, "finetune", "zero2_adamw.json", "data order and method")
    what = parser.add_argument_group("model and data")
    what.add_argument("--model", required=True, help="output folder of a run, or a local HF folder with weights")
    what.add_argument("--data", required=True, help="JSONL file of rows to train on; a row too long is an error")
    what.add_argument("--validation_data", help="JSONL file of rows to validate on, all of them, also before training")
    what.add_argument("--tokenizer", help="local HF tokenizer folder; default: the model's own, else bytes")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    # These are slow to import: --help and a wrong option should answer at once.
    from ds_memopt.train.finetune_job import finetune
    from ds_memopt.train.options import FinetuneOptions

    run_job(finetune, FinetuneOptions, arguments)


if __name__ == "__main__":
    main()
