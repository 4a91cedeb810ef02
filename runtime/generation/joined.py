"""Replicas that share experts generate in step: each computes its experts on the tokens of them all.

A replica decodes its own queue, so that replicas have different numbers of samples, steps and packs of prompts. Before
every round they agree on the most of each (`most`): who has less computes rows that nobody reads, or lends its experts
alone. Inside a round nothing is agreed, so that shapes are static and a step can be recorded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from runtime.models.model import Model


class Joined:
    """The replicas that share experts with this one (`Layout.joined_replicas`), seen from this rank.

    count: how many they are. place: which of them this rank belongs to. All methods are collective over the ranks at
    this rank's place in each of them, and do nothing where the replica is alone.
    """

    def __init__(self, model: Model) -> None:
        self.count = model.layout.joined_replicas
        self.place = model.place.dp % self.count
        self._group, self._device = model.groups.joined, model.device
        assert (self._group is None) == (self.count == 1), "the groups are those of another layout"

    def most(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over the replicas, which give equally many."""
        if self.count == 1:
            return list(numbers)
        values = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        dist.all_reduce(values, op=dist.ReduceOp.MAX, group=self._group)
        return [int(value) for value in values.tolist()]

    def gather(self, own: Tensor, rows: int) -> Tensor:
        """Rows [at most `rows`, hidden] of every replica: [count x rows, hidden], zeros behind those of each."""
        if self.count == 1:
            return own
        padded = own if len(own) == rows else F.pad(own, (0, 0, 0, rows - len(own)))
        whole = own.new_empty(self.count * rows, own.shape[1])
        dist.all_gather_into_tensor(whole, padded.contiguous(), group=self._group)
        return whole

    def scatter(self, whole: Tensor) -> Tensor:
        """Of rows as `gather` gives them this replica's, summed over the replicas: [rows, hidden]."""
        if self.count == 1:
            return whole
        own = whole.new_empty(len(whole) // self.count, whole.shape[1])
        dist.reduce_scatter_tensor(own, whole, group=self._group)
        return own
