"""Names of the files in a run's output folder: the runtime writes them, plans, pictures and checkpoints read them."""

from __future__ import annotations

PLAN = "plan.json"
RUN = "run.yaml"
METRICS = "metrics.jsonl"  # a line per iteration done
TIMELINE = "timeline.json"  # the measured one
SAMPLES = "samples.jsonl"  # prompts and responses as texts
EVALUATIONS = "evaluation.jsonl"
BEST = "best"  # folder of the weights with the best evaluation
PAGE = "report.html"


def adapter_of(name: str) -> str:
    """Name of the folder of the adapter of a model that is exported to the folder `name`, beside it."""
    return f"{name}-adapter"


def partial_of(name: str) -> str:
    """Name under which an exported folder stands beside its place before it is whole."""
    return f".{name}.partial"


def replaced_of(name: str) -> str:
    """Name under which the folder that an exported one replaces stands beside it until it is gone."""
    return f".{name}.old"
