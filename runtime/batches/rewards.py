"""Rewards that are Python functions: `(prompts, responses) -> scores`, built in or the user's own."""

from __future__ import annotations

import importlib
import importlib.util
import math
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from plans.errors import RealplanError, nearest

RewardFunction = Callable[[list[str], list[str]], Sequence[float]]


class RewardError(RealplanError):
    """A reward function that cannot be loaded, fails, or returns what is no score."""


@dataclass(frozen=True)
class Reward:
    """A reward function under the name that the user gave."""

    name: str
    function: RewardFunction

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        """One finite score per response; RewardError names the function when it fails or returns something else."""
        try:
            scores = self.function(prompts, responses)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            raise RewardError(
                f"reward `{self.name}` raised {type(error).__name__}: {error}", f"{place.filename}:{place.lineno}"
            ) from error
        return self._checked(scores, responses)

    def _checked(self, scores: Sequence[float], responses: list[str]) -> list[float]:
        try:
            values = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise RewardError(f"reward `{self.name}` returned {scores!r:.80}, not a list of numbers") from error
        if len(values) != len(responses):
            raise RewardError(f"reward `{self.name}` returned {len(values)} scores for {len(responses)} responses")
        for index, value in enumerate(values):
            if not math.isfinite(value):
                raise RewardError(
                    f"reward `{self.name}` returned {value} for response {index}: {responses[index]!r:.80}"
                )
        return values


def load_reward(name: str) -> Reward:
    """A built-in reward (`vader`), or a function given as `package.module:function` or `path/to/file.py:function`."""
    if name in BUILT_IN:
        return Reward(name, BUILT_IN[name])
    source, _, attribute = name.rpartition(":")
    if not source or not attribute:
        raise RewardError(
            f"reward `{name}` is no built-in reward", nearest(name, [*BUILT_IN, "module:function", "file.py:function"])
        )
    module = _load_file(name, Path(source)) if source.endswith(".py") else _load_module(name, source)
    function = getattr(module, attribute, None)
    if not callable(function):
        legal = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise RewardError(f"reward `{name}`: `{source}` has no function `{attribute}`", nearest(attribute, legal))
    return Reward(name, function)


def _load_file(name: str, path: Path) -> ModuleType:
    if not path.is_file():
        raise RewardError(f"reward `{name}`: no such file", f"a path seen from {Path.cwd()}")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise RewardError(f"reward `{name}`: loading {path} raised {type(error).__name__}: {error}") from error
    return module


def _load_module(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except Exception as error:
        raise RewardError(
            f"reward `{name}`: importing `{source}` raised {type(error).__name__}: {error}",
            "the module must lie on PYTHONPATH; a file is given as `path/to/file.py:function`",
        ) from error


def vader(prompts: list[str], responses: list[str]) -> list[float]:
    """VADER's compound sentiment of each response, in [-1, 1] (Hutto and Gilbert, ICWSM 2014)."""
    analyzer = _vader_analyzer()
    return [float(analyzer.polarity_scores(response)["compound"]) for response in responses]


@lru_cache(maxsize=1)
def _vader_analyzer() -> Any:
    try:
        from vader import SentimentIntensityAnalyzer
    except ImportError:
        raise RewardError("reward `vader` needs a package", "pip install nltk-vader-sentiment") from None
    return SentimentIntensityAnalyzer()


BUILT_IN: dict[str, RewardFunction] = {"vader": vader}
