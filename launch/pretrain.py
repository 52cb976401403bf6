"""Pre-train a causal language model: the main job.

On one machine, GPUs or CPU:        deepspeed --num_gpus 2 launch/pretrain.py
One process:                        python launch/pretrain.py
A larger model, another config:     deepspeed --num_gpus 8 launch/pretrain.py --model llama2-7b --seq_length 4096 \\
                                        --deepspeed_config ds_configs/zero3_adam_mini.json --data FILE --tokenizer DIR
"""

from arguments import parse_options, run_job

from ds_memopt.train.options import PretrainOptions


def main() -> None:
    options = parse_options(PretrainOptions, __doc__, "zero2_adam_mini.json")
    from ds_memopt.train.loop import pretrain  # slow to import: --help and a wrong option should answer at once

    run_job(pretrain, options)


if __name__ == "__main__":
    main()
