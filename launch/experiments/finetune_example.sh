#!/usr/bin/env bash
# Fine-tuning from start to end, in a few minutes on 2 CPU cores: pre-trains a small Llama on the source text of the
# Python standard library (once), makes a task from that text (launch/experiments/make_task.py: does the line go on
# with ":"?), and fine-tunes on it, on all GPUs of this machine or on 2 CPU ranks. Prints the accuracy on held-out rows
# before and after, beside earlier runs. Choose the method with OPTIMIZER, LR and STEPS; more options of
# launch/finetune.py may follow:
#     bash launch/experiments/finetune_example.sh
#     OPTIMIZER=MeZO bash launch/experiments/finetune_example.sh --seed 1
set -euo pipefail
trap 'echo "finetune_example: interrupted" >&2; exit 130' INT TERM
trap 'echo "finetune_example: failed, see the messages above" >&2' ERR

cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. launch/setup.sh train

optimizer=${OPTIMIZER:-AdamW}
case $optimizer in
    MeZO) lr=${LR:-6e-5} steps=${STEPS:-800} ;; # two forward passes a step, and many small steps
    IPSGD) lr=${LR:-1e-1} steps=${STEPS:-300} ;; # no momentum: large steps, and more of them than AdamW's
    *) lr=${LR:-3e-4} steps=${STEPS:-100} ;;
esac

folder=runs/finetune-example
run=$(python -c 'import sys; from ds_memopt.results.record import first_free; print(first_free(sys.argv[1]))' \
    "$folder/$optimizer")
mkdir -p "$folder"

ranks=$(python -c 'import torch; print(torch.cuda.device_count())')
if [ "$ranks" -eq 0 ]; then
    ranks=2
    export DS_ACCELERATOR=cpu
fi
echo "finetune_example: $ranks ranks on ${DS_ACCELERATOR:-cuda}, results in $run"

if [ ! -d "$folder/pretrained/model" ]; then
    rm -rf "$folder/pretrained"
    deepspeed --log_level warning --num_gpus "$ranks" launch/pretrain.py \
        --deepspeed_config ds_configs/zero2_adamw.json --output_dir "$folder/pretrained"
fi
python launch/experiments/make_task.py --output_dir "$folder/task"
deepspeed --log_level warning --num_gpus "$ranks" launch/finetune.py \
    --model "$folder/pretrained" --data "$folder/task/train.jsonl" --validation_data "$folder/task/valid.jsonl" \
    --optimizer "$optimizer" --lr "$lr" --steps "$steps" --seq_length 32 --output_dir "$run" "$@"
echo
runs=()
for model in "$folder"/*-*/model; do runs+=("${model%/model}"); done
python launch/compare.py "${runs[@]}" --plot "$folder/loss.png"
