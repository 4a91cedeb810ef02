"""A request to stop becomes one decision of all ranks: the iteration before which they stop."""

from __future__ import annotations

import os
import signal
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from runtime.checkpoints.folder import stop_request
from runtime.groups import meet

_FOREVER = timedelta(days=365)  # whoever hangs is found by the collectives of the calls


class StopAgreement:
    """Whether to stop before an iteration, the same on every rank. Making it is collective over all ranks.

    `timeout`: how long making it waits for the other ranks.

    Ranks reach an iteration at different times, so none may decide by itself. At the start of iteration i each sends
    whether it was asked to stop, and goes on; at the start of i + 1 it takes the sum. No rank waits for one that is
    less than an iteration behind.
    """

    def __init__(self, scratch: Path, timeout: timedelta) -> None:
        self._request = stop_request(scratch)
        self._asked = False
        everyone = range(dist.get_world_size())
        self._group = meet(lambda: dist.new_group(timeout=_FOREVER, backend="gloo"), everyone, timeout)
        self._sent: dict[int, tuple[Tensor, Any]] = {}

    def listen(self, *signals: signal.Signals) -> None:
        """Take signals to this process as requests. Main thread only."""
        for number in signals:
            signal.signal(number, self._ask)

    def _ask(self, number: int, _: object) -> None:
        self._asked = True
        if number == signal.SIGINT:  # the second one ends the process
            signal.signal(number, signal.SIG_DFL)

    def before(self, iteration: int) -> bool:
        """Whether all ranks stop before this iteration. Every rank calls it for every iteration that it reaches."""
        asked = torch.tensor([int(self._asked or os.path.exists(self._request))])
        self._sent[iteration] = asked, dist.all_reduce(asked, group=self._group, async_op=True)
        return self._answer(iteration - 1)

    def close(self) -> None:
        """Take the answers that are still on their way."""
        for iteration in sorted(self._sent):
            self._answer(iteration)

    def _answer(self, iteration: int) -> bool:
        if iteration not in self._sent:
            return False
        total, work = self._sent.pop(iteration)
        work.wait()
        return bool(total.item())
