"""What the analytic model says about every entry of a profile: the same points, seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache

import numpy as np

from cost_models.candidates import Array, Candidates
from cost_models.engines.machine import Machine
from cost_models.tables.shards import call_spec, shard_spec
from cost_models.tables.table_schema import CALL_VOCAB, STEP_PROMPT, STEP_TOKENS
from cost_models.tables.tables import TableEntry
from cost_models.time import operations
from cost_models.time.data_parallel import accumulation
from cost_models.time.generation import decode_step
from cost_models.time.inference import ForwardPass, forward_host_s, inference_time
from cost_models.time.layer import forward_layer, trained_layer
from cost_models.time.training import TrainingStep, backward_time, training_time
from plans.cluster import DeviceMesh
from plans.model import ModelSpec
from plans.strategy import ParallelStrategy

Points = Mapping[str, Array]
TablePredictor = Callable[[Machine, ModelSpec, Points], Array]


def predict_entry(machine: Machine, spec: ModelSpec, operation: str, entry: TableEntry) -> Array:
    """Seconds of a model's operation at the points of an entry, in the shape of its values."""
    axes = dict(entry.axes)
    if "tp" not in axes:
        return TABLE_PREDICTORS[operation](machine, spec, axes)
    degrees = axes.pop("tp")
    grid = np.meshgrid(*axes.values(), indexing="ij")
    points = {name: values.reshape(-1) for name, values in zip(axes, grid, strict=True)}
    rows = [TABLE_PREDICTORS[operation](machine, shard_spec(spec, int(tp)), points) for tp in degrees]
    return np.stack(rows).reshape(entry.values.shape)


@cache
def _alone(count: int) -> Candidates:
    """One device without any parallelism, `count` times."""
    mesh = DeviceMesh(first_node=0, nodes=1, first_gpu=0, gpus=1)
    return Candidates.of([(mesh, ParallelStrategy())]).take(np.zeros(count, dtype=np.intp))


def _block_forward(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    return np.maximum(_forward_gpu(machine, spec, points), machine.constants.host_forward_layer_s)


def _block_inference(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    return np.maximum(_forward_gpu(machine, spec, points), forward_host_s(machine, generates=False))


def _block_prefill(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    return np.maximum(_forward_gpu(machine, spec, points), forward_host_s(machine, generates=True))


def _forward_gpu(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    length = points["sequence_tokens"]
    return forward_layer(machine, spec, _alone(len(length)), points["sequences"] * length, length).gpu


def _block_backward(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    length = points["sequence_tokens"]
    layer = trained_layer(machine, spec, _alone(len(length)), points["sequences"] * length, length)
    backward = backward_time(machine, layer)
    return np.maximum(backward, machine.constants.host_backward_layer_s) + accumulation(machine, spec.layer_params)


def _block_decode(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    terms = _step(machine, spec, points["sequences"], points["cached_tokens"])
    return _total({name: seconds for name, seconds in terms.items() if name != "decode_head"})


def _generate_step(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    length = np.full_like(points["sequences"], STEP_PROMPT + 0.5 * STEP_TOKENS)
    return _total(_step(machine, spec, points["sequences"], length))


def _step(machine: Machine, spec: ModelSpec, rows: Array, length: Array) -> Mapping[str, Array]:
    return decode_step(machine, spec, _alone(len(rows)), rows, length)


def _head_forward(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    tokens, one = points["tokens"], np.ones_like(points["tokens"])
    return operations.head(machine, spec, tokens, one) + operations.loss(machine, spec, tokens, one)


def _head_backward(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    tokens, one = points["tokens"], np.ones_like(points["tokens"])
    _, gemms = operations.head_both_ways(machine, spec, tokens, one)
    vocabulary = accumulation(machine, float(spec.padded_vocab * spec.hidden))
    return gemms + operations.loss(machine, spec, tokens, one) * machine.constants.loss_backward_ratio + vocabulary


def _optimizer_step(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    return operations.optimizer_update(machine, points["parameters"])


def _inference_call(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    tokens = points["sequence_tokens"]
    work = ForwardPass(call_spec(spec, CALL_VOCAB), points["sequences"], tokens, head_tokens=tokens)
    return inference_time(machine, work, _alone(len(tokens))).total_s


def _train_call(machine: Machine, spec: ModelSpec, points: Points) -> Array:
    step = TrainingStep(call_spec(spec, CALL_VOCAB), points["sequences"], points["sequence_tokens"])
    return training_time(machine, step, _alone(len(points["sequences"]))).total_s


def _total(terms: Mapping[str, Array]) -> Array:
    total = np.zeros_like(next(iter(terms.values())))
    for seconds in terms.values():
        total = total + seconds
    return total


TABLE_PREDICTORS: Mapping[str, TablePredictor] = {
    "block_forward": _block_forward,
    "block_backward": _block_backward,
    "block_recompute": _block_forward,
    "block_inference": _block_inference,
    "block_prefill": _block_prefill,
    "block_decode": _block_decode,
    "head_forward": _head_forward,
    "head_backward": _head_backward,
    "optimizer_step": _optimizer_step,
    "generate_step": _generate_step,
    "inference_call": _inference_call,
    "train_call": _train_call,
}
"""Operations of which the analytic model speaks alone (it has no embedding: on a GPU that is a rounding error)."""
