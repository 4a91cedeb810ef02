#!/usr/bin/env bash
# Build the wheel, install it into a fresh environment and use it from outside the tree.
# Usage: scripts/wheel_check.sh [PYTHON] [EXTRA]   (EXTRA `run`: the runtime too; without it the planner, which needs no torch)
# Needs a package index; what scripts/setup.sh has downloaded is taken from uv's cache.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-python3}"
extra="${2:-}"
uv="$(command -v uv || echo "$PWD/.venv/bin/uv")"
export UV_FIND_LINKS="${UV_FIND_LINKS:-${PIP_FIND_LINKS:-}}"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
# The build leaves folders beside the sources, so it works on a copy.
mkdir "$work/tree"
git ls-files -z | tar --null -T - -c | tar -x -C "$work/tree"
"$uv" build -q --wheel -p "$python" -o "$work/dist" "$work/tree"
"$uv" venv -q -p "$python" "$work/venv"
wheel="$(echo "$work"/dist/realplan-*.whl)"
"$uv" pip install -q -p "$work/venv/bin/python" -c constraints.txt "realplan${extra:+[$extra]} @ file://$wheel"
cd "$work"
unset PYTHONPATH # what is installed is to be found, and not this tree
export NUMBA_DISABLE_JIT=1 # nothing is searched for long enough that compiling would pay
bin="$work/venv/bin"
EXTRA="$extra" "$bin/python" - <<'PY'
import importlib.util, os, pathlib, plans

assert "site-packages" in plans.__file__, plans.__file__
assert os.environ["EXTRA"] or importlib.util.find_spec("torch") is None, "the planner has pulled in torch"
for name, pattern in (("plans", "library/*.json"), ("plans", "library/experiments/*.yaml"), ("cost_models", "library/**/*.json")):
    assert list(pathlib.Path(importlib.util.find_spec(name).origin).parent.glob(pattern)), (name, pattern)
PY
"$bin/realplan" models >models.txt
"$bin/realplan" clusters >clusters.txt
grep -q llama2-7b models.txt
grep -q h100-80gb-sxm clusters.txt
"$bin/realplan" search --model llama-7b --gpus 8 --method mcmc --seconds 1 -o plan.json >search.txt
"$bin/realplan" check plan.json
"$bin/realplan" show plan.json >show.txt
"$bin/realplan" validate --json | "$bin/python" -c 'import json, sys; assert json.load(sys.stdin)["groups"]'
if [ "$extra" = run ]; then
  sizes=(--batch-size 4 --group-size 2 --minibatches 1 --prompt-tokens 32 --response-tokens 32 --dtype fp32)
  "$bin/realplan" search --model smollm2-135m --algorithm grpo --cluster local-cpu --gpus 1 "${sizes[@]}" \
    --method mcmc --seconds 1 -o tiny.json >search.txt
  "$bin/realrun" tiny.json weights=random --dry-run >steps.txt
  grep -q actor_train steps.txt
else
  # Each is one line that names the package.
  for words in "plan.json" "export checkpoint folder"; do
    if "$bin/realrun" $words 2>said.txt || grep -q Traceback said.txt; then exit 1; fi
    grep -q "^error: running a plan needs torch" said.txt
  done
fi
echo "the wheel runs on $("$bin/python" --version)"
