"""Profile the layers of Llama 7B, 13B, 34B and 70B on the GPU of this machine.

    profile_gpu.py --output FOLDER [--models llama-7b llama-70b] [--dtype bf16]

One table per model, named after card and model, tp 1, 2, 4 and 8 on one GPU; under ten minutes in all. A model that
fails is reported and the others go on. A second call takes up what is missing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

MODELS = ("llama-7b", "llama-13b", "llama-34b", "llama-70b")


def main() -> int:
    """Profile the models in turn; the number of those that failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--tp", default="1,2,4,8")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from profiler.command import profile_command
    from profiler.devices import hardware_kind, parse_device

    options.output.mkdir(parents=True, exist_ok=True)
    card = hardware_kind(parse_device(options.device))
    failed = 0
    for model in options.models:
        began = time.perf_counter()
        try:
            table = options.output / f"{card}-{Path(model).name}.json"
            profile_command(model, options.device, options.tp, options.dtype, table)
        except Exception:
            failed += 1
            traceback.print_exc()
        print(f"{model}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
