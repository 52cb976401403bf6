"""The main job under FSDP2: launch/pretrain.py without DeepSpeed's engine.

On one machine, GPUs or CPU:        torchrun --nproc_per_node 2 launch/pretrain_fsdp2.py
Another method:                     torchrun --nproc_per_node 8 launch/pretrain_fsdp2.py --model llama2-7b \\
                                        --deepspeed_config ds_configs/zero3_gwt.json --data FILE --tokenizer DIR

Method, batch, clipping and bf16 of the DeepSpeed config apply. Parameters, gradients and states are sharded as by
ZeRO-3. With "masters": "remainder16" or "remainder8" the model stays in bf16: no fp32 copy of a weight is held, and
gradients are reduced in bf16.
"""

from arguments import parse_options, run_job

from ds_memopt.train.options import PretrainOptions


def main() -> None:
    options = parse_options(PretrainOptions, __doc__, "zero3_adam_mini.json")
    from ds_memopt.train.fsdp2_job import (
        pretrain_fsdp2,
    )  # slow to import: --help and a wrong option should answer at once

    run_job(pretrain_fsdp2, options)


if __name__ == "__main__":
    main()
