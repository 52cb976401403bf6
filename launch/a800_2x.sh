#!/usr/bin/env bash
# The throughput experiment of the Adam-mini paper (arXiv 2406.16793) as one command: Llama-2-7B on two A800-80GB, AdamW
# against Adam-mini. Finds the largest micro-batch that fits for each at ZeRO-2 and ZeRO-3, measures tokens/s, and makes
# a report. The paper has 3,725.59 tokens/s for AdamW, of which micro-batches of 1 fit, and 5,572.19 (+49.6 %) for
# Adam-mini, of which 4 fit. What was measured before is not measured again.
#     bash launch/a800_2x.sh                                 results in runs/a800_2x
#     bash launch/a800_2x.sh --dry_run                       shows the commands
#     bash launch/a800_2x.sh --optimizer AdamW AdamMini GWT  more options of launch/throughput.py
# GPUS, SEQ_LENGTH and OUTPUT_DIR change what their names say.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/commands.sh "$@"

gpus=${GPUS:-2}
output_dir=${OUTPUT_DIR:-runs/a800_2x}
need_gpus "$gpus"
run python launch/throughput.py --model llama2-7b --gpus "$gpus" --seq_length "${SEQ_LENGTH:-4096}" \
    --optimizer AdamW AdamMini --stage 2 3 --micro_batch auto --gradient_checkpointing \
    --output_dir "$output_dir" --resume "${options[@]}"
run ds-memopt report "$output_dir"
