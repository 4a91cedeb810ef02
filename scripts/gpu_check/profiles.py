"""Profiles: cost tables of the layers of six models, tp 1 to 8, for the library; cut by time."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

from cost_models.tables.shards import legal_degrees
from gpu_check.rows import Case, Row, Skip
from gpu_check.setting import FIXTURE, Setting
from plans.errors import RealplanError
from plans.library import load_model
from plans.model import ModelSpec

MODELS = ("llama-7b", "llama-70b", "qwen2.5-32b", "qwen3-30b-a3b", "llama-13b", "llama-34b")
DEGREES = (1, 2, 4, 8)
BUDGET_S = 0.03


def _model(name: str) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        from profiler.cases import CPU, GPU
        from profiler.devices import hardware_kind
        from profiler.profile import ProfileRequest, profile

        spec, dtype = load_model(name), "bf16" if setting.kind == "cuda" else "fp32"
        _runnable(spec)
        degrees, cases = legal_degrees(spec, DEGREES), replace(GPU, budget_s=BUDGET_S)
        if setting.tiny:
            if name != MODELS[0]:
                raise Skip("a rehearsal profiles one model")
            spec, degrees = replace(load_model(str(FIXTURE)), name=str(FIXTURE)), (1, 2)
            cases = replace(CPU, tokens=(16,), sequences=(1, 4), sequence_tokens=(16,), rows=(1, 8),
                            cached_tokens=(16,), call_sequences=(2,), call_tokens=(16,), budget_s=0.005)  # fmt: skip
        path = setting.output / "tables" / f"{hardware_kind(setting.device)}-{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        began = time.perf_counter()
        request = ProfileRequest(
            spec=spec, device=setting.device, dtype=dtype, degrees=degrees, cases=cases, collectives=False
        )
        table = profile(request, path)
        points = sum(entry.values.size for entry in table.entries.values())
        note = f"tp {', '.join(map(str, degrees))} in {time.perf_counter() - began:.0f} s: {path.name}"
        yield Row(case=name, value=points, unit="points", note=note)

    return Case(name, run, needs_s=0.0)


def _runnable(spec: ModelSpec) -> None:
    """Raise Skip for a model that this runtime cannot build."""
    from plans.layout import Layout
    from runtime.models.support import check_runnable

    try:
        check_runnable(Layout(spec, (0,)))
    except RealplanError as reason:
        raise Skip(f"this runtime does not run it: {reason.message}") from None


CASES = tuple(_model(name) for name in MODELS)
