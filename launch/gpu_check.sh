#!/usr/bin/env bash
# Checks the fused steps on this machine's GPU, and measures what the documents leave open: launch/README.md says what.
# Under 8 minutes on one H100. Needs torch, Triton, numpy and regex; no DeepSpeed, no transformers, no installation.
#     bash launch/gpu_check.sh                                results in runs/gpu_check
#     bash launch/gpu_check.sh --output_dir FOLDER --memory_cap_gib 40
#     bash launch/gpu_check.sh --device cpu --small           tries the command out where there is no GPU
# PYTHON names the interpreter, by default that of .venv, else python3.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=python3
    if [ -x .venv/bin/python ]; then PYTHON=.venv/bin/python; fi
fi
PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} exec "$PYTHON" launch/benchmarks/gpu_check.py "$@"
