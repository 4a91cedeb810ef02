#!/usr/bin/env bash
# Fill a folder (default ./wheels, under 60 MB) with what scripts/gpu_check.sh needs on a machine without a network that
# has Python 3.12 and torch. Needs a package index. Usage: scripts/gpu_wheels.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
exec "${PYTHON:-python3}" scripts/gpu_packages.py download --wheels "${1:-wheels}"
