"""Training: model FLOPs of a step over the card's peak, and the time in which no kernel runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gpu_check.ceilings import product_flops
from gpu_check.gaps import outside_kernels
from gpu_check.rows import Case, Row, Skip, judged
from gpu_check.setting import Setting
from gpu_check.shapes import SHAPES, fitting_layers, layers_of, model_alone
from plans.model import ModelSpec

LAYERS, TOKENS = 4, 4096
DEGREES = (1, 8)
STATE_BYTES = 18
"""Weights, gradients, masters and two moments of a bf16 parameter."""
LEAST_MFU, MOST_IDLE = 0.45, 0.03


def step_flops(spec: ModelSpec, sequences: int, tokens: int) -> float:
    """FLOPs of forward and backward: 6 per parameter and token of matrices, and causal attention's
    6 x layers x tokens x sequence x heads x head_dim (Narayanan et al. 2021, without recomputation)."""
    matrices = spec.params - spec.padded_vocab * spec.hidden  # the embedding is looked up
    attention = spec.layers * tokens * spec.heads * spec.head_dim
    return 6.0 * sequences * tokens * (matrices + attention)


def _shape(shape: str, tp: int) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        if setting.tiny and shape != next(iter(SHAPES)):
            raise Skip("a rehearsal measures one shape")
        wanted = layers_of(setting, shape, tp, LAYERS, small_vocabulary=True)
        spec = fitting_layers(wanted, STATE_BYTES, setting)
        sequences, tokens = setting.pick((4, TOKENS), (2, 32))
        with model_alone(setting, spec) as model:
            seconds, idle = _measured(setting, model, sequences, tokens)
        rate = step_flops(spec, sequences, tokens) / seconds
        note = f"{spec.layers} layers, {sequences} x {tokens} tokens, {seconds * 1e3:.1f} ms"
        if setting.kind == "cuda":
            yield judged(f"{shape} tp {tp}: MFU", rate / peak_flops(setting), "", least=LEAST_MFU, note=note)
            yield judged(f"{shape} tp {tp}: outside kernels", idle, "", most=MOST_IDLE)
        else:
            share = rate / product_flops(setting)
            yield Row(case=f"{shape} tp {tp}: share of a large product's rate", value=share, note=note)
            yield Row(case=f"{shape} tp {tp}: outside operators", value=idle)

    return Case(f"{shape} tp {tp}", run)


def _measured(setting: Setting, model: Any, sequences: int, tokens: int) -> tuple[float, float]:
    """Seconds of an optimizer step in micro-batches of one full sequence, and its share outside kernels."""
    import torch

    from profiler.timers import Timed, measure
    from runtime.batches.sequences import Sequences
    from runtime.passes.forward import TokenOutput
    from runtime.passes.optimizer import AdamSettings
    from runtime.passes.packs import Batch
    from runtime.passes.training import Trainer

    trainer = Trainer(model, AdamSettings())
    ids = torch.randint(model.spec.vocab, (sequences * tokens,), device=setting.device)
    batch = Batch(Sequences(ids, (1,) * sequences, (tokens - 1,) * sequences), {})

    def loss(output: TokenOutput, _: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = output.logprobs.mean()
        return value, {"loss": value}

    def step(_: object = None) -> object:
        return trainer.step(batch, loss, [[i] for i in range(sequences)])

    seconds = measure(Timed(step), setting.device, setting.pick(2.0, 0.02)).seconds
    return seconds, outside_kernels(step, setting.device)


def peak_flops(setting: Setting) -> float:
    """Vendor peak of the card in bf16, FLOP/s."""
    from plans.library import load_gpu
    from profiler.devices import hardware_kind

    return 1e12 * load_gpu(hardware_kind(setting.device)).bf16_tflops


CASES = tuple(_shape(shape, tp) for tp in DEGREES for shape in SHAPES)
