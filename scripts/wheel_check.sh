#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment and plan from outside the tree. Usage: scripts/wheel_check.sh [PYTHON]
# The planner alone is installed; it needs no torch. Needs a package index.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# The build leaves folders beside the sources, so it works on a copy.
mkdir "$work/tree"
git ls-files -z | tar --null -T - -c | tar -x -C "$work/tree"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip wheel -q --no-deps -w "$work/dist" "$work/tree"
"$work/venv/bin/python" -m pip install -q -c constraints.txt "$work"/dist/realplan-*.whl
cd "$work"
bin="$work/venv/bin"
"$bin/python" - <<'PY'
import importlib.util, pathlib, plans

assert "site-packages" in plans.__file__, plans.__file__
assert importlib.util.find_spec("torch") is None, "the planner has pulled in torch"
for name, pattern in (("plans", "library/*.json"), ("plans", "library/experiments/*.yaml"), ("cost_models", "library/**/*.json")):
    assert list(pathlib.Path(importlib.util.find_spec(name).origin).parent.glob(pattern)), (name, pattern)
PY
"$bin/realplan" models | grep -q llama2-7b
"$bin/realplan" clusters | grep -q h100-80gb-sxm
"$bin/realplan" search --model llama-7b --gpus 8 --method mcmc --seconds 1 -o plan.json >search.txt
"$bin/realplan" check plan.json
"$bin/realplan" show plan.json >show.txt
"$bin/realplan" validate --json | "$bin/python" -c 'import json, sys; json.load(sys.stdin)'
echo "the wheel runs on $("$bin/python" --version)"
