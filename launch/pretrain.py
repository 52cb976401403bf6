"""Pre-train a causal language model: the main job.

On one machine, GPUs or CPU:        deepspeed --num_gpus 2 launch/pretrain.py
One process:                        python launch/pretrain.py
A larger model, another config:     deepspeed --num_gpus 8 launch/pretrain.py --model llama2-7b --seq_length 4096 \\
                                        --deepspeed_config ds_configs/zero3_adam_mini.json --data FILE --tokenizer DIR
"""

import argparse

from arguments import run_job, shared_parser


def parse() -> argparse.Namespace:
    parser = shared_parser(__doc__, "pretrain", "zero2_adam_mini.json", "weights, data order and method")
    what = parser.add_argument_group("model and data")
    what.add_argument(
        "--model", default="tiny", help="tiny, llama-39m ... llama-1b, llama2-7b, ... or a local HF folder"
    )
    what.add_argument("--data", default="stdlib", help="stdlib, synthetic, or a text/JSONL file or folder")
    what.add_argument("--tokenizer", help="local Hugging Face tokenizer folder, for text and JSONL data")
    what.add_argument("--validation_batches", type=int, default=32, help="global batches of held-out text")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    # These are slow to import: --help and a wrong option should answer at once.
    from ds_memopt.train.loop import pretrain
    from ds_memopt.train.options import Options

    run_job(pretrain, Options, arguments)


if __name__ == "__main__":
    main()
