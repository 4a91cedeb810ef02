#!/usr/bin/env bash
# Which wrong formulas the tests let pass. Usage: scripts/mutate.sh FOLDER... [--mutants 150] [--seed 0]
set -euo pipefail
cd "$(dirname "$0")/.."
.venv/bin/python -c 'import cosmic_ray, coverage' 2>/dev/null || {
  echo "error: Cosmic Ray and coverage are not installed" >&2
  echo 'hint: .venv/bin/python -m pip install -e ".[mutation]" -c constraints.txt' >&2
  exit 2
}
export OMP_NUM_THREADS=1
# Every child imports the project anew: from compiled files, kept apart from the tree.
unset PYTHONDONTWRITEBYTECODE
export PYTHONPYCACHEPREFIX="${PYTHONPYCACHEPREFIX:-${TMPDIR:-/tmp}/mutate-pycache-$(id -u)}"
exec nice -n 19 .venv/bin/python scripts/mutate.py "$@"
