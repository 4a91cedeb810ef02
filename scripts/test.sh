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
.venv/bin/mypy
.venv/bin/python -m pytest -n 4 --dist loadfile --no-loadscope-reorder "$@"
