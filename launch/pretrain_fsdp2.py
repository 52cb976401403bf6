"""The main job under FSDP2: launch/pretrain.py without DeepSpeed's engine.

On one machine, GPUs or CPU:        torchrun --nproc_per_node 2 launch/pretrain_fsdp2.py
Another method:                     torchrun --nproc_per_node 8 launch/pretrain_fsdp2.py --model llama2-7b \\
                                        --deepspeed_config ds_configs/zero3_gwt.json --data FILE --tokenizer DIR

Of the DeepSpeed config method, batch, clipping and bf16 are heard. Parameters, gradients and states are sharded as by
ZeRO-3.
"""

import argparse

from arguments import pretrain_parser, run_job


def parse() -> argparse.Namespace:
    return pretrain_parser(__doc__, "zero3_adam_mini.json").parse_args()


def main() -> None:
    arguments = parse()
    # These are slow to import: --help and a wrong option should answer at once.
    from ds_memopt.train.fsdp2_job import pretrain_fsdp2
    from ds_memopt.train.options import Options

    run_job(pretrain_fsdp2, Options, arguments)


if __name__ == "__main__":
    main()
