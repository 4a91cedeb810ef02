"""ParallelStrategy: how one call is cut over its mesh. Degrees in Megatron's words; `d4 t8 p4` in the plan file.

Every field carries its description (`Setting`): the plan file's keys and schema, the rules of `plans.checks`, the
limits of a search, `diff` and the help texts read it there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from typing import Any

from plans.cluster import MOST_GPUS
from plans.errors import SpecError
from plans.graph import CallKind
from plans.problems import shortened
from plans.workload import MOST_SAMPLES


class Recompute(StrEnum):
    """Activation recomputation in training: none, the attention core (`selective`), or every block (`full`)."""

    NONE = "none"
    SELECTIVE = "selective"
    FULL = "full"


_GENERATE, _SCORE, _TRAIN = CallKind.GENERATE, CallKind.INFERENCE, CallKind.TRAIN_STEP


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """Description of one field of a strategy.

    name: the attribute, and the key in the plan file where there is no letter. letter: how `d4 t8 p4` writes it.
    kinds: the kinds of calls that have it; other calls keep the default. most: the largest legal number. shown: how
    `realplan show` words a value that is not the default.
    """

    name: str = ""
    meaning: str
    letter: str = ""
    kinds: tuple[CallKind, ...] = (_GENERATE, _SCORE, _TRAIN)
    default: Any = 1
    most: int = MOST_GPUS
    shown: str = ""

    @property
    def type(self) -> type:
        """Type of its values: int, bool, Recompute or tuple (of whole numbers)."""
        return type(self.default)

    def words(self, value: Any) -> str:
        """A value in words, empty for the default and for degrees that every strategy shows."""
        if value == self.default:
            return ""
        return self.shown.format("+".join(map(str, value)) if isinstance(value, tuple) else value)


def _field(meaning: str, **about: Any) -> Any:
    setting = Setting(meaning=meaning, **about)
    return field(default=setting.default, metadata={"setting": setting})


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class ParallelStrategy:
    """Parallel degrees and settings of one call; `SETTINGS` describes each."""

    dp: int = _field("data parallel degree", letter="d")
    tp: int = _field("tensor parallel degree", letter="t")
    pp: int = _field("pipeline parallel degree", letter="p")
    cp: int = _field("context parallel degree", letter="c", kinds=(_SCORE, _TRAIN), shown="cp {}")
    ep: int = _field("expert parallel degree, inside dp x cp x tp", letter="e", shown="ep {}")
    vpp: int = _field("model chunks per pipeline stage (interleaving)", letter="v", kinds=(_TRAIN,), shown="vpp {}")
    layers_per_stage: tuple[int, ...] = _field(
        "layers of each pipeline stage, empty for equal stages with what is left over in the middle",
        default=(),
        most=10**4,
        shown="layers per stage {}",
    )
    micro_batches: int = _field(
        "forward passes per dp rank and minibatch", kinds=(_SCORE, _TRAIN), most=MOST_SAMPLES, shown="{} micro-batches"
    )
    micro_batch_tokens: int = _field(
        "most tokens of a micro-batch, which takes as many samples as fit; in the place of micro_batches",
        kinds=(_SCORE, _TRAIN),
        default=0,
        most=MOST_SAMPLES * 100,
        shown="micro-batches of {} tokens",
    )
    groups: int = _field(
        "groups of sequences in flight in pipelined generation",
        kinds=(_GENERATE,),
        most=MOST_SAMPLES,
        shown="{} groups in flight",
    )
    slots: int = _field(
        "samples that a dp rank generates at a time; the next one takes the slot of one that has ended (default: all)",
        kinds=(_GENERATE,),
        default=0,
        most=MOST_SAMPLES,
        shown="{} slots",
    )
    waves: int = _field(
        "slots as a part of a dp rank's samples: one in so many",
        kinds=(_GENERATE,),
        most=MOST_SAMPLES,
        shown="{} waves",
    )
    sequence_parallel: bool = _field(
        "cut the tokens between the tensor-parallel parts over tp",
        kinds=(_SCORE, _TRAIN),
        default=False,
        shown="sequence parallel",
    )
    recompute: Recompute = _field(  # noqa: RUF009 - it makes a field, and no value that objects would share
        "activations that the backward pass makes anew: none, the attention core, or every block",
        kinds=(_TRAIN,),
        default=Recompute.NONE,
        shown="recompute {}",
    )
    shard_optimizer: bool = _field(
        "masters and Adam states sharded over dp (Megatron's distributed optimizer)",
        kinds=(_TRAIN,),
        default=True,
        shown="optimizer not sharded",
    )
    offload: bool = _field(
        "frozen model: weights in host memory between calls; trained model: optimizer state",
        default=False,
        shown="offloaded",
    )

    def __post_init__(self) -> None:
        for name, default, most in _RANGES:
            value = getattr(self, name)
            if value == default:
                continue
            if not isinstance(value, int) or not 1 <= value <= most:
                raise SpecError(
                    f"{name} is {shortened(value)}; it must be a whole number from 1 to {most:,}",
                    f"{name} {1 if not isinstance(value, int) or value < 1 else most}, for example",
                )
        if any(layers < 1 for layers in self.layers_per_stage):
            raise SpecError(
                f"layers_per_stage {list(self.layers_per_stage)} has a stage without layers",
                "at least one layer on every stage",
            )
        stage = self.dp * self.cp * self.tp
        if stage % self.ep:
            raise SpecError(
                f"ep {self.ep} must divide dp x cp x tp = {stage}",
                f"ep {max(e for e in range(1, min(self.ep, stage) + 1) if stage % e == 0)}, for example",
            )

    @property
    def size(self) -> int:
        """GPUs that the strategy needs: dp x tp x pp x cp."""
        return self.dp * self.tp * self.pp * self.cp

    @property
    def degrees(self) -> str:
        """The degrees as the plan file writes them; dp, tp and pp always, the others when above one."""
        degrees = {letter: getattr(self, name) for letter, name in LETTERS.items()}
        return " ".join(f"{letter}{degree}" for letter, degree in degrees.items() if letter in "dtp" or degree > 1)


SETTINGS: Mapping[str, Setting] = {
    item.name: replace(item.metadata["setting"], name=item.name) for item in fields(ParallelStrategy)
}
"""Name -> description of every field of a strategy, in the order of the plan file."""
LETTERS: Mapping[str, str] = {setting.letter: name for name, setting in SETTINGS.items() if setting.letter}
"""Letter -> name of the degrees."""
KEYS: tuple[str, ...] = tuple(name for name, setting in SETTINGS.items() if not setting.letter)
"""Fields that are keys of their own in a call of a plan file."""
_RANGES = tuple((name, setting.default, setting.most) for name, setting in SETTINGS.items() if setting.type is int)
_PART = re.compile(r"([a-z])(\d{1,6})")


def parse_degrees(text: str) -> dict[str, int]:
    """Degrees of `d4 t8 p4` (spaces optional, AReaL's `d4t8p4` reads too) as keyword arguments."""
    compact, words = text.replace(" ", ""), ", ".join(f"{k} ({name})" for k, name in LETTERS.items())
    parts = _PART.findall(compact)
    if not parts or "".join(k + v for k, v in parts) != compact:
        raise SpecError(
            f"strategy `{shortened(text)}` is not of the form `d4 t8 p4`", f"letters with a number each: {words}"
        )
    degrees: dict[str, int] = {}
    for letter, value in parts:
        if letter not in LETTERS:
            raise SpecError(f"strategy `{text}`: unknown degree `{letter}`", f"one of {words}")
        if LETTERS[letter] in degrees:
            raise SpecError(f"strategy `{text}`: degree `{letter}` is given twice")
        degrees[LETTERS[letter]] = int(value)
    return degrees
