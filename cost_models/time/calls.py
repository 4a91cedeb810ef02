"""Time of any model call under every candidate layout."""

from __future__ import annotations

import numpy as np

from cost_models.candidates import Candidates
from cost_models.engines.machine import Machine
from cost_models.packing import attended, packed, packing_of
from cost_models.terms import Terms
from cost_models.time.data_parallel import state_load
from cost_models.time.generation import Generation, generation_time
from cost_models.time.inference import ForwardPass, inference_time, weight_load
from cost_models.time.training import TrainingStep, training_time
from plans.graph import CallKind
from plans.lengths import Lengths
from plans.workload import Workload


def call_time(machine: Machine, workload: Workload, call: str, candidates: Candidates) -> Terms:
    """Seconds of a model call by term, arrays [candidates].

    Training and scoring compute the real tokens of the workload's lengths, packed and dealt over dp by the work they
    are. A training call is `minibatches` optimizer steps. Where a frozen model (or a trained one's optimizer state)
    lives in host memory, the load is the term `offload`. Where a run has measured the call, all terms are longer by the
    same factor: it does not say which of them is.
    """
    c, spec, kind = packed(workload, call, candidates), workload.spec(call), workload.graph.call(call).kind
    assert kind is not CallKind.FUNCTION, f"`{call}` is a function call"
    prompts, responses = workload.prompts.mean, workload.responses.mean
    tokens, length = prompts + responses, attended(workload.prompts, workload.responses)
    head_tokens = responses if machine.constants.response_head and responses else tokens
    if kind is CallKind.TRAIN_STEP:
        samples = workload.samples / workload.minibatches
        step = TrainingStep(spec, samples, tokens, head_tokens, length, packing_of(workload, call, c))
        terms = {k: v * workload.minibatches for k, v in training_time(machine, step, c).items()}
        terms["offload"] = state_load(machine, spec, c)
    elif kind is CallKind.INFERENCE:
        packing = packing_of(workload, call, c)
        work = ForwardPass(spec, workload.samples, tokens, head_tokens, attended=length, packing=packing)
        terms = dict(inference_time(machine, work, c))
        terms["offload"] = weight_load(machine, spec, c)
    else:
        alone = attended(workload.prompts, Lengths(0))
        generation = Generation(spec, workload.samples, prompts, workload.responses, workload.group_size, alone)
        terms = dict(generation_time(machine, generation, c))
    terms["call"] = np.full(len(c), machine.constants.call_s)
    factor = machine.call_factors.get(call, 1.0)
    return Terms({name: seconds * factor for name, seconds in terms.items()})
