"""Time of any model call under every candidate layout."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Candidates
from cost_models.engines.machine import Machine
from cost_models.terms import Terms
from cost_models.time.data_parallel import state_load
from cost_models.time.generation import Generation, generation_time
from cost_models.time.inference import ForwardPass, inference_time, weight_load
from cost_models.time.training import TrainingStep, training_time
from plans.graph import CallKind
from plans.workload import Workload


def call_time(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> Terms:
    """Seconds of a model call by term, arrays [candidates].

    A training call is `minibatches` optimizer steps. Where a frozen model (or a trained one's optimizer state) lives
    in host memory, the load is the term `offload`.
    """
    spec, kind = workload.spec(call), workload.graph.call(call).kind
    assert kind is not CallKind.FUNCTION, f"`{call}` is a function call"
    if kind is CallKind.TRAIN_STEP:
        step = TrainingStep(spec, workload.samples / workload.minibatches, workload.tokens)
        terms = {k: v * workload.minibatches for k, v in training_time(machine, step, candidates).items()}
        terms["offload"] = state_load(machine, spec, candidates)
    elif kind is CallKind.INFERENCE:
        work = ForwardPass(spec, workload.samples, workload.tokens, head_tokens=workload.tokens)
        terms = dict(inference_time(machine, work, candidates))
        terms["offload"] = weight_load(machine, spec, candidates)
    else:
        generation = Generation(spec, workload.samples, workload.prompt_tokens, workload.responses)
        terms = dict(generation_time(machine, generation, candidates))
    terms["call"] = np.full(len(candidates), machine.constants.call_s)
    return Terms(terms)
