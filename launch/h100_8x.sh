#!/usr/bin/env bash
# Pre-trains Llama-2-7B with Adam-mini at ZeRO-3 on the eight GPUs of one machine. By `ds-memopt plan` micro-batches of
# 8 sequences leave room on 80 GB.
#     bash launch/h100_8x.sh --data FOLDER --tokenizer FOLDER    text or JSONL files; results in runs/h100_8x
#     bash launch/h100_8x.sh --steps 20                          random tokens: to see speed and memory
#     bash launch/h100_8x.sh --dry_run                           shows the command
# GPUS and OUTPUT_DIR change what their names say; all options of launch/pretrain.py may follow, such as --resume.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/commands.sh "$@"

gpus=${GPUS:-8}
need_gpus "$gpus"
run deepspeed --num_gpus "$gpus" launch/pretrain.py --model llama2-7b --seq_length 4096 \
    --deepspeed_config ds_configs/zero3_adam_mini.json --micro_batch 8 --gradient_checkpointing \
    --data synthetic --output_dir "${OUTPUT_DIR:-runs/h100_8x}" "${options[@]}"
