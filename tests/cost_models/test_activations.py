"""Bytes that a block stores, against what autograd keeps of the runtime's own blocks."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from cost_models.memory.activations import block_widths, kept_block_bytes
from cost_models.memory.memory_training import in_flight
from cost_models.validation.memory_rows import training_case_of
from plans.layout import Layout
from plans.model import ModelSpec
from plans.strategy import Recompute
from runtime.groups import GroupCache
from runtime.models import installation
from runtime.models.mcore import schedules
from runtime.models.model import TORCH_DTYPES, build_model
from runtime.passes.forward import hidden_states
from runtime.passes.packs import packs_of
from runtime.sequences import Sequences

CPU = torch.device("cpu")
SPEC = ModelSpec(
    name="small", layers=2, hidden=256, heads=8, kv_heads=2, head_dim=32, ffn=704, vocab=512, max_context=512
)
SEQUENCES, TOKENS = 4, 128


def stored_bytes(layers: int, precision: str, recompute: Recompute) -> int:
    """Bytes of the distinct storages that a forward pass saves for the backward pass, weights apart."""
    layout = Layout(dataclasses.replace(SPEC, layers=layers), (0,))
    groups = GroupCache(CPU).collection(layout)
    model = build_model(layout, groups, dtype=TORCH_DTYPES[precision], device=CPU, recompute=recompute)
    (module,) = model.chunks
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    module.train()
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    stored: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            stored[storage.data_ptr()] = storage.nbytes()
        return tensor

    sequences = Sequences.of([[0]] * SEQUENCES, [[0] * (TOKENS - 1)] * SEQUENCES)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_states(module, packs_of(model, [sequences])[0])
    return sum(stored.values())


def measured(precision: str, recompute: Recompute) -> float:
    """Bytes per token and layer: the difference between models of four and two layers."""
    installation.install(CPU)
    extra = stored_bytes(4, precision, recompute) - stored_bytes(2, precision, recompute)
    return extra / 2 / (SEQUENCES * TOKENS)


def predicted(precision: str, recompute: Recompute) -> float:
    case = training_case_of(dp=1, micro_batch=SEQUENCES, seq_len=TOKENS, recompute=recompute.value, precision=precision)
    widths = block_widths(SPEC, fused_pointwise=True, fused_rotary=False, element=case.element)
    return float(kept_block_bytes(widths, case, gathers_keys=True)[0])


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("vpp", [1, 2, 4])
@pytest.mark.parametrize("micro_batches", [8, 16, 64])
def test_in_flight_is_what_megatrons_schedules_warm_up_with(pp: int, vpp: int, micro_batches: int) -> None:
    for stage in range(pp):
        communicator = SimpleNamespace(
            pp_group=SimpleNamespace(size=lambda: pp, rank=lambda stage=stage: stage),
            virtual_pipeline_model_parallel_size=vpp if vpp > 1 else None,
        )
        total, _, warm_up, _ = schedules.get_pp_rank_microbatches(
            micro_batches, vpp, microbatch_group_size_per_vp_stage=pp, p2p_communicator=communicator
        )
        flight = in_flight(*(np.array([float(x)]) for x in (stage, pp, vpp, micro_batches)))
        assert flight[0] * vpp == min(warm_up + 1, total)


def test_stored_bytes_are_what_autograd_keeps_of_the_runtimes_blocks() -> None:
    cases = [(precision, recompute) for precision in TORCH_DTYPES for recompute in Recompute]
    found = run_ranks(1, lambda: [measured(*case) for case in cases])[0]
    for case, kept in zip(cases, found, strict=True):
        # Beyond the model: fp32 row statistics of the norms, and rotations, which all blocks share.
        assert predicted(*case) == pytest.approx(kept, rel=0.01), case
