"""Layouts of published rows: degrees, micro-batches and switches, with the usual setting where a row states none."""

from __future__ import annotations

from typing import Any

from cost_models.candidates import Candidates
from cost_models.validation.published import Row, Unpredictable, number, row_gpus, train_engine_name, whole
from plans.cluster import ClusterSpec, DeviceMesh
from plans.strategy import ParallelStrategy, Recompute

MODERN = "megatron-te"
"""The engine whose usual settings are a sharded optimizer and sequence parallelism."""


def row_mesh(row: Row, cluster: ClusterSpec) -> DeviceMesh:
    """All GPUs of a row."""
    gpus = row_gpus(row)
    return DeviceMesh(
        first_node=0, nodes=cluster.nodes, first_gpu=0, gpus=cluster.gpus_per_node if cluster.nodes > 1 else gpus
    )


def row_dp(row: Row) -> int:
    """Data-parallel ranks of a row: as stated, or what the other degrees leave of its GPUs."""
    if row.get("dp") is not None:
        return whole(row, "dp")
    model_ranks = whole(row, "tp", 1) * whole(row, "pp", 1) * whole(row, "cp", 1)
    gpus = row_gpus(row)
    if gpus % model_ranks:
        raise Unpredictable(f"gpus is {gpus}; it must be a multiple of tp x pp x cp, {model_ranks}")
    return gpus // model_ranks


def row_zero(row: Row) -> int:
    """ZeRO stage of a training row; not stated, FSDP's is 3 and that of Megatron with flash attention 1."""
    if row.get("zero") is not None:
        return int(row["zero"])
    return {"fsdp": 3, MODERN: 1}.get(train_engine_name(row), 0)


def row_sequence_parallel(row: Row) -> bool:
    """Sequence parallelism of a training row; not stated, on under TP of Megatron with flash attention."""
    if row.get("seq_parallel") is not None:
        return bool(row["seq_parallel"])
    return train_engine_name(row) == MODERN and whole(row, "tp", 1) > 1


def row_degrees(row: Row) -> dict[str, Any]:
    """Degrees of a training row beside dp, 1 where they are not published."""
    return {name: whole(row, name, 1) for name in ("tp", "pp", "cp", "ep", "vpp")}


def train_candidates(row: Row, cluster: ClusterSpec) -> Candidates:
    """The layout of a training row; what is not published takes the engine's usual setting."""
    dp = row_dp(row)
    per_rank = number(row, "gbs") / (dp * number(row, "mbs"))
    recompute = str(row.get("recompute") or "none")
    if recompute.split("(")[0] not in set(Recompute):
        raise Unpredictable(f"recompute `{recompute}` is not modelled")
    strategy = ParallelStrategy(
        dp=dp,
        **row_degrees(row),
        micro_batches=max(round(per_rank), 1),
        sequence_parallel=row_sequence_parallel(row),
        recompute=Recompute(recompute.split("(")[0]),
        shard_optimizer=row_zero(row) > 0,
    )
    return Candidates.of([(row_mesh(row, cluster), strategy)])


def inference_candidates(row: Row, cluster: ClusterSpec) -> Candidates:
    """The layout of an inference row, whose batch its dp replicas share. Pipelined prefill is cut into passes of at
    most 1,024 tokens, the rule of FasterTransformer (`getLocalBatchSize`); its decoding keeps the batch whole."""
    tp, pp, dp = whole(row, "tp", 1), whole(row, "pp", 1), row_dp(row)
    if whole(row, "cp", 1) > 1:
        raise Unpredictable(f"cp is {row['cp']}; inference has no model of context parallelism")
    batch = whole(row, "batch")
    if batch % dp:
        raise Unpredictable(f"batch is {batch}; it must be a multiple of dp (gpus / (tp x pp)), {dp}")
    own = local = batch // dp
    while pp > 1 and local % 2 == 0 and local * number(row, "input_len") > 1024:
        local //= 2
    strategy = ParallelStrategy(dp=dp, tp=tp, pp=pp, micro_batches=own // local)
    return Candidates.of([(row_mesh(row, cluster), strategy)])
