"""ParallelStrategy: how one call is cut over its mesh. Degrees in Megatron's words; `d4 t8 p4` in the plan file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from plans.errors import SpecError


class Recompute(StrEnum):
    """Activation recomputation in training: none, the attention core (`selective`), or every block (`full`)."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


_DEGREES = {"d": "dp", "t": "tp", "p": "pp", "c": "cp", "e": "ep", "v": "vpp"}
_PART = re.compile(r"([a-z])(\d{1,6})")


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ParallelStrategy:
    """Parallel degrees and settings of one call.

    dp, tp, pp, cp, ep: data, tensor, pipeline, context, expert degrees (ep lies inside dp x cp); vpp: model chunks
    per pipeline stage (interleaving). micro_batches: forward passes per dp rank, per minibatch in training.
    groups: groups of sequences in flight in pipelined generation; waves: parts of a dp rank's samples that generate one
    after the other, so that the KV cache holds one part at a time. shard_optimizer: masters and Adam states sharded
    over dp (Megatron's distributed optimizer). offload: the weights of a frozen model, or the optimizer state of a
    trained one, live in host memory between calls.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    ep: int = 1
    vpp: int = 1
    micro_batches: int = 1
    groups: int = 1
    waves: int = 1
    sequence_parallel: bool = False
    recompute: Recompute = Recompute.NONE
    shard_optimizer: bool = True
    offload: bool = False

    def __post_init__(self) -> None:
        for field in ("dp", "tp", "pp", "cp", "ep", "vpp", "micro_batches", "groups", "waves"):
            value = getattr(self, field)
            if not isinstance(value, int) or value < 1:
                raise SpecError(f"{field} is {value!r}; it must be a whole number of at least 1")
        if (self.dp * self.cp) % self.ep:
            raise SpecError(
                f"ep {self.ep} must divide dp x cp = {self.dp * self.cp}",
                f"ep one of {[e for e in range(1, self.dp * self.cp + 1) if (self.dp * self.cp) % e == 0]}",
            )

    @property
    def size(self) -> int:
        """GPUs that the strategy needs: dp x tp x pp x cp."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def degrees(self) -> str:
        """The degrees as the plan file writes them; dp, tp and pp always, the others when above one."""
        rare = {letter: getattr(self, name) for letter, name in _DEGREES.items() if letter not in "dtp"}
        extra = "".join(f" {letter}{degree}" for letter, degree in rare.items() if degree > 1)
        return f"d{self.dp} t{self.tp} p{self.pp}{extra}"


def parse_degrees(text: str) -> dict[str, int]:
    """Degrees of `d4 t8 p4` (spaces optional, AReaL's `d4t8p4` reads too) as keyword arguments."""
    compact = text.replace(" ", "")
    parts = _PART.findall(compact)
    if not parts or "".join(k + v for k, v in parts) != compact:
        raise SpecError(f"strategy `{text}` is not of the form `d4 t8 p4`", "letters d t p c e v, each with a number")
    degrees: dict[str, int] = {}
    for key, value in parts:
        if key not in _DEGREES:
            raise SpecError(f"strategy `{text}`: unknown degree `{key}`", "d (data) t (tensor) p (pipeline) c e v")
        if _DEGREES[key] in degrees:
            raise SpecError(f"strategy `{text}`: degree `{key}` is given twice")
        degrees[_DEGREES[key]] = int(value)
    return degrees
