#!/usr/bin/env bash
# Sets up everything, then pre-trains a small Llama on the source text of the Python standard library with AdamW, Adam-mini,
# GWT and BAdam (same weights, data order and schedule), on all GPUs of this machine or on 2 CPU ranks. Prints one table and
# the path of a plot, and what the methods would take of eight 80 GB GPUs for a model of 7B. Later runs reuse the set-up and
# write into a new folder. Options of launch/pretrain.py may follow, e.g. --steps 1000.
set -euo pipefail
trap 'echo "quickstart: interrupted" >&2; exit 130' INT TERM
trap 'echo "quickstart: failed, see the messages above" >&2' ERR

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh train

folder=$(python -c 'from ds_memopt.results.record import first_free; print(first_free("runs/quickstart"))')
mkdir -p "$folder"

ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$ranks" -eq 0 ]; then
    ranks=2
    export DS_ACCELERATOR=cpu
fi
echo "quickstart: $ranks ranks on ${DS_ACCELERATOR:-cuda}, results in $folder"

pretrain() { # name, learning rate, ds_config, further options
    echo "quickstart: pre-training with $3, lr $2"
    deepspeed --log_level warning --num_gpus "$ranks" launch/pretrain.py --steps 200 --lr "$2" \
        --validation_interval 40 --validation_batches 16 \
        --deepspeed_config "$3" --output_dir "$folder/$1" "${@:4}"
}
# The best learning rates of those tried. BAdam stays with a block for 12 steps: with 100 it would not come to most of them.
sed 's/"switch_every": 100/"switch_every": 12/' ds_configs/zero2_badam.json >"$folder/badam.json"
pretrain adamw 5e-4 ds_configs/zero2_adamw.json "$@"
pretrain adam_mini 2.5e-4 ds_configs/zero2_adam_mini.json "$@"
pretrain gwt 3e-3 ds_configs/zero2_gwt.json "$@"
pretrain badam 2e-3 "$folder/badam.json" "$@"
echo
python launch/compare.py "$folder"/{adamw,adam_mini,gwt,badam} --plot "$folder/loss.png"
echo
ds-memopt plan --model llama2-7b --gpus 8 --gpu_memory 80GB --seq_length 4096 --optimizer AdamW,AdamMini,GWT,BAdam
