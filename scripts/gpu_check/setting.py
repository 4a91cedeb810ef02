"""What every stage is told: the device, how small, which backend, where to write, and until when."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures"
FIXTURE = FIXTURES / "tiny-llama"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One run of the check.

    kind: `cuda` or `cpu`. tiny: fixture-sized shapes, for the rehearsal. backend: of two ranks on the one card, `gloo`
    or `nccl` (which refuses them); one rank uses the device's own. output: folder of files. end_s: time.time() at
    which the stage is killed.
    """

    kind: str
    tiny: bool
    backend: str
    output: Path
    end_s: float = float("inf")

    @property
    def device(self) -> Any:
        """The torch device; imports torch."""
        import torch

        return torch.device("cuda", 0) if self.kind == "cuda" else torch.device("cpu")

    @property
    def left_s(self) -> float:
        """Seconds until the stage is killed."""
        return self.end_s - time.time()

    def pick(self, whole: Any, tiny: Any) -> Any:
        """The size for a card, or the one of the rehearsal."""
        return tiny if self.tiny else whole
