#!/usr/bin/env bash
# Show everything that one GPU can show about realplan, within eight minutes, without a network:
#   scripts/gpu_check.sh [STAGE ...] [--device cuda|cpu] [--tiny] [--backend gloo|nccl] [--output FOLDER]
# Uses the Python that has torch (PYTHON, default python3). Packages that it lacks come from the folder of wheels that
# scripts/gpu_wheels.sh filled (WHEELS, default ./wheels); torch is never replaced. They go to a folder of their own.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${PYTHON:-python3}"
wheels="${WHEELS:-wheels}"
"$python" -c 'import torch' 2>/dev/null || {
  echo "error: $python has no torch" >&2
  echo "hint: PYTHON=/path/to/python3.12 scripts/gpu_check.sh, of an environment with torch 2.11 or newer" >&2
  exit 2
}
site="$(mktemp -d)"
trap 'rm -rf "$site"' EXIT
"$python" scripts/gpu_packages.py install --wheels "$wheels" --target "$site"
PYTHONPATH="$site:scripts:.${PYTHONPATH:+:$PYTHONPATH}" "$python" -m gpu_check "$@"
