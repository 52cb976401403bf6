#!/usr/bin/env bash
# Sets up everything, then pre-trains a small Llama on the source text of the Python standard library, first with
# AdamW, then with Adam-mini (same weights, data order and schedule), on all GPUs of this machine or on 2 CPU ranks.
# Prints one table and the path of a plot. Later runs reuse the set-up and write into a new folder. Options of
# launch/pretrain.py may follow, e.g. --steps 400.
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

for method in adamw adam_mini; do
    echo "quickstart: pre-training with ds_configs/zero2_$method.json"
    deepspeed --log_level warning --num_gpus "$ranks" launch/pretrain.py \
        --deepspeed_config "ds_configs/zero2_$method.json" --output_dir "$folder/$method" "$@"
done
echo
python launch/compare.py "$folder/adamw" "$folder/adam_mini" --plot "$folder/loss.png"
