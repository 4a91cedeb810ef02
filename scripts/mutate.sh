#!/usr/bin/env bash
# Which wrong formulas the tests let pass. Usage: scripts/mutate.sh PACKAGE... [--mutants 150] [--seed 0]
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -c 'import cosmic_ray, pytest_cov' 2>/dev/null || {
  echo "error: Cosmic Ray and pytest-cov are not installed" >&2
  echo 'hint: .venv/bin/python -m pip install -e ".[mutation]" -c constraints.txt' >&2
  exit 2
}
export OMP_NUM_THREADS=1
exec .venv/bin/python scripts/mutate.py "$@"
