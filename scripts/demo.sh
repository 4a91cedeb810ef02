#!/usr/bin/env bash
# Set up everything and train: PPO on SmolLM2-135M-Instruct with a sentiment reward. --quick: a tiny model instead;
# --math: GRPO on sums, with 200 held-out ones before and after.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup.sh demo
exec .venv/bin/python scripts/demo.py "$@"
