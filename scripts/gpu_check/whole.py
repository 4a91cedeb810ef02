"""Whole iterations of a 1.5B-shaped model: seconds of every call, predicted from a profile, and measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from gpu_check.one_gpu import MODEL, device_plan, take_alone
from gpu_check.rows import Case, Row, judged
from gpu_check.setting import FIXTURE, Setting
from plans.library import load_model
from plans.strategy import Recompute

MOST_OFF = 0.10
ITERATIONS = 3
SIZES = {"batch_size": 32, "prompt_tokens": 512, "response_tokens": 256, "minibatches": 2}
SMALL = {"batch_size": 8, "prompt_tokens": 16, "response_tokens": 16, "minibatches": 2}
FEW = {
    "tokens": (16, 64), "sequences": (1, 4), "sequence_tokens": (16, 32), "rows": (1, 8), "cached_tokens": (16, 64),
    "call_sequences": (2,), "call_tokens": (16,), "budget_s": 0.005,
}  # fmt: skip
TRAIN = {"micro_batches": 4, "recompute": Recompute.FULL}
SCORE = {"micro_batches": 4}


def _profile(setting: Setting) -> Iterator[Row]:
    """The cost table that the predictions come from."""
    from profiler.cases import CPU, GPU
    from profiler.profile import ProfileRequest, profile

    cases = replace(CPU, **FEW) if setting.tiny else replace(GPU, budget_s=0.05)
    spec = load_model(str(FIXTURE) if setting.tiny else MODEL)
    if setting.tiny:
        spec = replace(spec, name=str(FIXTURE))  # so that the table finds its architecture again
    dtype = "bf16" if setting.kind == "cuda" else "fp32"
    request = ProfileRequest(
        spec=spec, device=setting.device, dtype=dtype, degrees=(1,), cases=cases, collectives=False
    )
    table = profile(request, _table(setting))
    points = sum(entry.values.size for entry in table.entries.values())
    yield Row(case="profile", value=points, unit="points", note=str(_table(setting).name))


def _table(setting: Setting) -> Path:
    path = setting.output / "whole" / "table.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def _iteration(algorithm: str) -> Case:
    calls = {"*": SCORE, "actor_generate": {}, "actor_train": TRAIN, "critic_train": TRAIN}

    def run(setting: Setting) -> Iterator[Row]:
        from gpu_check.predicted import predicted_seconds

        sizes = setting.pick(SIZES, SMALL)
        if algorithm == "grpo":
            sizes = {**sizes, "group_size": 4, "batch_size": sizes["batch_size"] // 4}
        plan = device_plan(setting, algorithm, sizes, calls)
        predicted, fits = predicted_seconds(plan, _table(setting))
        if not fits:  # then the optimizers take turns on the card
            trained = {call: {**TRAIN, "offload": True} for call in ("actor_train", "critic_train")}
            plan = device_plan(setting, algorithm, sizes, calls | trained)
            predicted, _ = predicted_seconds(plan, _table(setting))
        folder = setting.output / "whole" / algorithm
        last = take_alone(setting, plan, setting.pick(ITERATIONS, 1), folder).metrics[-1]
        measured = {call.name: last[f"plan/{call.name}/measured_s"] for call in plan.workload.graph.model_calls}
        measured["iteration"] = last["timing_s/step"]
        for name, seconds in measured.items():
            note = f"predicted {predicted[name]:.4g} s, measured {seconds:.4g} s"
            error = predicted[name] / seconds - 1
            case = f"{algorithm} {name}: predicted over measured - 1"
            if setting.kind == "cuda":
                yield judged(case, error, "", least=-MOST_OFF, most=MOST_OFF, note=note)
            else:
                yield Row(case=case, value=error, note=note)

    return Case(algorithm, run)


CASES = (Case("profile", _profile), _iteration("ppo"), _iteration("grpo"))
