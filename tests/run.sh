#!/usr/bin/env bash
# Sets up .venv like the quick start and runs all tests, or those that pytest's arguments select, in three processes.
# A file's tests share what its fixtures started, so each file stays in one process. To see what tests print: -n 0 -s.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh train,test
pip install --quiet --disable-pip-version-check --no-deps -r tests/torchtitan.txt
# Out of the way: where transformers finds torchao, it imports it with every model.
if [ ! -d .venv/torchao ]; then
    pip install --quiet --disable-pip-version-check --no-deps --target .venv/torchao torchao==0.18.0
fi
# Ranks share the cores: one thread each.
export OMP_NUM_THREADS=1
exec python -m pytest --durations=10 -n 3 --dist loadfile --no-loadscope-reorder "$@"
