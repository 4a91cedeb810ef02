"""Training: model FLOPs of a step over the card's peak, and the time in which no kernel runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
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


Packs = Sequence[Sequence[int]]
"""Lengths of the sequences of each micro-batch."""


def step_flops(spec: ModelSpec, packs: Packs) -> float:
    """FLOPs of forward and backward: 6 per parameter and token of matrices, and causal attention's
    6 x layers x sequence^2 x heads x head_dim (Narayanan et al. 2021, without recomputation)."""
    matrices = spec.params - spec.padded_vocab * spec.hidden  # the embedding is looked up
    attention = spec.layers * spec.heads * spec.head_dim
    return 6.0 * sum(length * matrices + length**2 * attention for pack in packs for length in pack)


def _shape(shape: str, tp: int) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        if setting.tiny and shape != next(iter(SHAPES)):
            raise Skip("a rehearsal measures one shape")
        wanted = layers_of(setting, shape, tp, LAYERS, small_vocabulary=True)
        spec = fitting_layers(wanted, STATE_BYTES, setting)
        tokens = setting.pick(TOKENS, 32)
        full = [[tokens]] * setting.pick(4, 2)
        # Halves, quarters ...: what a response distribution with a long tail leaves in a pack.
        mixed = [[tokens // 2, *(tokens // 2**i for i in range(2, 5)), tokens // 16]] * len(full)
        with model_alone(setting, spec) as model:
            for name, packs in (("", full), (", mixed lengths", mixed)):
                seconds, idle = _measured(setting, model, packs)
                yield from _rows(setting, f"{shape} tp {tp}{name}", spec, packs, seconds, idle)

    return Case(f"{shape} tp {tp}", run)


def _rows(setting: Setting, case: str, spec: ModelSpec, packs: Packs, seconds: float, idle: float) -> Iterator[Row]:
    rate = step_flops(spec, packs) / seconds
    note = f"{spec.layers} layers, {len(packs)} x {sum(packs[0])} tokens, {seconds * 1e3:.1f} ms"
    if setting.kind == "cuda":
        yield judged(f"{case}: MFU", rate / peak_flops(setting), "", least=LEAST_MFU, note=note)
        yield judged(f"{case}: outside kernels", idle, "", most=MOST_IDLE)
    else:
        share = rate / product_flops(setting)
        yield Row(case=f"{case}: share of a large product's rate", value=share, note=note)
        yield Row(case=f"{case}: outside operators", value=idle)


def training_step(setting: Setting, model: Any, packs: Packs) -> Callable[..., object]:
    """An optimizer step over packs of random tokens, to be called."""
    import torch

    from runtime.passes.forward import TokenOutput
    from runtime.passes.optimizer import AdamSettings
    from runtime.passes.packs import Batch
    from runtime.passes.training import Trainer
    from runtime.sequences import Sequences

    trainer = Trainer(model, AdamSettings())
    lengths = [length for pack in packs for length in pack]
    ids = torch.randint(model.spec.vocab, (sum(lengths),), device=setting.device)
    batch = Batch(Sequences(ids, (1,) * len(lengths), tuple(length - 1 for length in lengths)), {})
    numbers = iter(range(len(lengths)))
    parts = [[next(numbers) for _ in pack] for pack in packs]

    def loss(output: TokenOutput, _: object) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        value = output.logprobs.mean()
        return value, {"loss": value}

    return lambda *_: trainer.step(batch, loss, parts)


def _measured(setting: Setting, model: Any, packs: Packs) -> tuple[float, float]:
    """Seconds of an optimizer step over packs, and its share outside kernels."""
    from profiler.timers import Timed, measure

    step = training_step(setting, model, packs)
    seconds = measure(Timed(step), setting.device, setting.pick(2.0, 0.02)).seconds
    return seconds, outside_kernels(step, setting.device)


def peak_flops(setting: Setting) -> float:
    """Vendor peak of the card in bf16, FLOP/s."""
    from plans.library import load_gpu
    from profiler.devices import hardware_kind

    return 1e12 * load_gpu(hardware_kind(setting.device)).bf16_tflops


CASES = tuple(_shape(shape, tp) for tp in DEGREES for shape in SHAPES)
