"""Pre-train a causal language model: the main job.

On one machine, GPUs or CPU:        deepspeed --num_gpus 2 launch/pretrain.py
One process:                        python launch/pretrain.py
A larger model, another config:     deepspeed --num_gpus 8 launch/pretrain.py --model llama2-7b --seq_length 4096 \\
                                        --deepspeed_config ds_configs/zero3_adam_mini.json --data FILE --tokenizer DIR
"""

import argparse

from arguments import pretrain_parser, run_job


def parse() -> argparse.Namespace:
    return pretrain_parser(__doc__, "zero2_adam_mini.json").parse_args()


def main() -> None:
    arguments = parse()
    # These are slow to import: --help and a wrong option should answer at once.
    from ds_memopt.train.loop import pretrain
    from ds_memopt.train.options import Options

    run_job(pretrain, Options, arguments)


if __name__ == "__main__":
    main()
