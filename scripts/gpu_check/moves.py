"""Weights and optimizer state that move, compared bit by bit with what was there before."""

from __future__ import annotations

from typing import Any

from gpu_check.setting import FIXTURE
from plans.layout import Layout
from plans.library import load_model

PAIRS = {
    "tp2 to dp2": ({"tp": 2}, {"dp": 2}),
    "dp2 to pp2": ({"dp": 2}, {"pp": 2}),
    "pp2 to tp2": ({"pp": 2}, {"tp": 2}),
}


def moved_weights(device: Any, groups: Any) -> dict[str, int]:
    """Reallocate the fixture's weights between layouts of two ranks; elements that differ from the files', by pair."""
    import torch
    import torch.distributed as dist

    from runtime.models.model import build_model, named_shards
    from runtime.weights.hf import load_weights
    from runtime.weights.reallocate import Reallocator

    spec, found = load_model(str(FIXTURE)), {}
    mover = Reallocator(gpus_per_node=2, wave_bytes=2**14)

    def loaded(degrees: dict[str, int]) -> tuple[Layout, dict[str, Any]]:
        layout = Layout(spec, (0, 1), **degrees)
        model = build_model(layout, groups.collection(layout), device=device)
        load_weights(model, FIXTURE)
        return layout, {parameter.name: held.data for parameter, held in named_shards(model)}

    for name, (source, target) in PAIRS.items():
        (have_layout, have), (want_layout, want) = loaded(source), loaded(target)
        right = {key: value.clone() for key, value in want.items()}
        for value in want.values():
            value.zero_()
        mover.run(have_layout, want_layout, have, want)
        wrong = torch.tensor(sum(int((want[key] != value).sum()) for key, value in right.items()))
        dist.all_reduce(wrong, group=groups.host((0, 1)))
        found[name] = int(wrong)
    return found


def offloaded_state(device: Any, groups: Any) -> dict[str, int]:
    """Train one step, send masters and moments to host memory and back; elements that differ."""
    import torch

    from runtime.models.model import build_model
    from runtime.passes.training import AdamSettings, Trainer
    from runtime.weights.hf import load_weights

    layout, found = Layout(load_model(str(FIXTURE)), (0,)), {}
    for name, dtype in (("fp32 state", torch.float32), ("bf16 state", torch.bfloat16)):
        model = build_model(layout, groups.collection(layout), device=device, dtype=dtype)
        load_weights(model, FIXTURE)
        trainer = Trainer(model, AdamSettings())
        for chunk in model.chunks:
            for parameter in chunk.parameters():
                parameter.main_grad.normal_()
        trainer.update(1e-3)
        before = {key: value.clone() for key, value in _state(trainer).items()}
        trainer.offload()
        trainer.load()
        after = _state(trainer)
        found[name] = sum(int((after[key] != value).sum()) for key, value in before.items())
    return found


def _state(trainer: Any) -> dict[str, Any]:
    state = {}
    for slot in trainer.slots():
        state[f"{slot.parameter}.master"] = slot.master.data
        state |= {f"{slot.parameter}.{name}": value for name, value in slot.moments.items()}
    return state
