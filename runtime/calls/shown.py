"""Samples that a person looks at: texts with their rewards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from runtime.calls.forward_calls import Values
from runtime.job import Job
from runtime.sequences import Sequences


def shown_samples(job: Job, inputs: Mapping[str, Values], rows: Sequence[int], iteration: int) -> list[dict[str, Any]]:
    """The first `samples` of the run file among rows whose responses were generated, as lines of `samples.jsonl`: what
    a person asked, what the model said, its rewards."""
    places = [place for place, row in enumerate(rows) if row < job.run.samples]
    if job.tokenizer is None or job.prompts is None or not places:
        return []
    (sequences,) = (values for values in inputs.values() if isinstance(values, Sequences))
    numbers = [rows[place] // job.plan.workload.group_size for place in places]
    asked, texts = job.prompts.asked(job.batch(iteration), numbers), sequences.take(places).texts()
    rewards = {
        key: values for key, values in inputs.items() if key.startswith("rewards") and isinstance(values, Tensor)
    }
    return [
        {
            "iteration": iteration,
            "sample": rows[place],
            "prompt": asked[i] if asked else job.tokenizer.decode(texts[i][0]),
            "response": job.tokenizer.decode(texts[i][1]),
            **{key: _shown(float(values[place])) for key, values in rewards.items()},
        }
        for i, place in enumerate(places)
    ]


def _shown(score: float) -> float | None:
    """A score as JSON has it: null where the reward of the sample failed."""
    return None if math.isnan(score) else score
