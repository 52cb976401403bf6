#!/usr/bin/env bash
# Sets up .venv like the quick start and runs all tests, or those that pytest's arguments select.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. launch/setup.sh train,test
# Ranks share the cores: one thread each.
export OMP_NUM_THREADS=1
exec python -m pytest --durations=10 "$@"
