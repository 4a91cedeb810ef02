"""Megatron on the CPU: global torch stays whole, global process groups stay uninitialised, drift is noticed."""

from __future__ import annotations

import math
import subprocess
import sys
import types

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from ranks import RankError, run_ranks

from runtime.models import installation

CPU = torch.device("cpu")


def test_install_leaves_global_torch_alone():
    zeros, cuda, compile_ = torch.zeros, torch.cuda, torch.compile
    installation.install(CPU)
    installation.install(CPU)
    assert (torch.zeros, torch.cuda, torch.compile) == (zeros, cuda, compile_)
    assert isinstance(cuda, types.ModuleType)
    assert not parallel_state.is_initialized()


def test_megatron_sees_the_cpu():
    installation.install(CPU)
    from megatron.core.tensor_parallel import layers

    assert layers.torch.cuda.current_device() == CPU
    assert layers.torch.zeros(2, device="cuda").device == CPU
    assert layers.torch.zeros(2, device=layers.torch.cuda.current_device()).device == CPU
    assert layers.torch.nn.Linear is torch.nn.Linear


def test_groups_of_megatron_cannot_be_used_by_mistake():
    installation.install(CPU)
    with pytest.raises(AssertionError):
        parallel_state.get_tensor_model_parallel_group()


def test_the_norm_of_many_numbers_is_that_of_float64():
    def norm() -> float:
        installation.install(CPU)
        from megatron.core.optimizer.clip_grads import get_grad_norm_fp32

        return get_grad_norm_fp32(gradients, grad_stats_parallel_group=dist.group.WORLD)

    drawn = torch.Generator().manual_seed(0)
    gradients = [torch.randn(size, generator=drawn) * 1e-3 for size in ((1 << 22) + 5, 7)]
    wanted = math.hypot(*(float(x.double().norm()) for x in gradients))
    assert run_ranks(1, norm) == [pytest.approx(wanted, rel=2e-7)]


def test_import_is_quiet():
    code = "import torch; from runtime.models import installation; installation.install(torch.device('cpu'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert "megatron" not in done.stderr.lower()
    assert "warn" not in done.stderr.lower()


def test_ranks_report_what_failed():
    def fail() -> None:
        if torch.distributed.get_rank() == 1:
            raise ValueError("the reason")
        torch.distributed.barrier()

    with pytest.raises(RankError, match=r"rank 1:(?s:.*)the reason"):
        run_ranks(2, fail)


def test_ranks_that_hang_are_killed():
    def hang() -> None:
        if torch.distributed.get_rank() == 0:
            import time

            time.sleep(60)

    with pytest.raises(TimeoutError, match=r"\[0\]"):
        run_ranks(2, hang, timeout=1.0)
