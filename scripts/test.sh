#!/usr/bin/env bash
# Set up everything and pass the tests: lint, types, tests.
set -euo pipefail
cd "$(dirname "$0")/.."
# Tests start many processes; without bytecode on disk each of them compiles torch and megatron-core anew for 15 s.
unset PYTHONDONTWRITEBYTECODE
scripts/setup.sh dev
export OMP_NUM_THREADS=1
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# mypy has one thread for a minute. Beside it one process compiles whatever the tests import, which every worker would do
# else; a file that cannot be imported is reported by the run of the tests.
.venv/bin/mypy &
types=$!
.venv/bin/python -m pytest --collect-only >/dev/null || true
wait "$types"
# Tests of runs wait for processes and time limits: more workers than cores keep the cores at work.
.venv/bin/python -m pytest -n 6 --dist loadfile --no-loadscope-reorder "$@"
