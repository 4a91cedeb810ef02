"""Reward functions: where they are found, which arguments they take, and what counts as scores.

Runs in the processes of rewards, so it imports nothing heavy.
"""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import inspect
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

from plans.errors import nearest
from runtime.batches.reward_errors import RewardError
from runtime.batches.verifiable import code, exact, math_answer, reasoning_format

TEXTS = ("prompts", "responses", "completions")
ONE = {"prompt": "prompts", "response": "responses", "completion": "completions"}
"""Parameters of a function that scores one sample at a time, which has at least one of the last two."""
_FLOAT32_MAX = 3.4028234663852886e38
RewardFunction = Callable[..., Any]


def load_function(name: str) -> RewardFunction:
    """A built-in reward (`vader`), or a function given as `package.module:function` or `path/to/file.py:function`."""
    if name in BUILT_IN:
        return BUILT_IN[name]
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
    return function  # type: ignore[no-any-return]


def _load_file(name: str, path: Path) -> ModuleType:
    """The module of a file, under a name by which pools of processes find it again, with its folder on the path so that
    it finds the files beside it; at the end of the path, since a folder may hold a `string.py`."""
    if not os.path.isfile(path):
        raise RewardError(f"reward `{name}`: no such file", f"a path seen from {Path.cwd()}")
    sys.path.append(str(path.resolve().parent))
    free = path.stem not in sys.modules and path.stem not in sys.stdlib_module_names
    module_name = path.stem if free and _finds(path) else f"reward_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # dataclasses and pickle look their module up while it loads
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise RewardError(f"reward `{name}`: loading {path} raised {type(error).__name__}: {error}") from error
    return module


def _finds(path: Path) -> bool:
    """Whether importing a file's stem finds that file and no other."""
    try:
        found = importlib.util.find_spec(path.stem)
    except (ImportError, ValueError):
        return False
    return found is not None and found.origin is not None and Path(found.origin).resolve() == path.resolve()


def _load_module(name: str, source: str) -> ModuleType:
    try:
        return importlib.import_module(source)
    except (Exception, SystemExit) as error:
        raise RewardError(
            f"reward `{name}`: importing `{source}` raised {type(error).__name__}: {error}",
            "the module must lie on PYTHONPATH; a file is given as `path/to/file.py:function`",
        ) from error


def bind(name: str, function: RewardFunction, columns: Sequence[str]) -> list[inspect.Parameter]:
    """The parameters that a reward is called with: by name, the texts and the columns of the data.

    Raises RewardError for a parameter that must be given and has another name.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        raise RewardError(
            f"reward `{name}` does not say which parameters it has", "wrap it: `def f(prompts, responses): ...`"
        ) from None
    single = _takes_one(parameters)
    known = [*(ONE if single else TEXTS), *columns]
    several = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for parameter in parameters:
        given = parameter.name in known or parameter.kind in several
        if not given and parameter.default is inspect.Parameter.empty:
            raise RewardError(
                f"reward `{name}` needs a parameter `{parameter.name}`, which nothing provides",
                f"parameters are bound by name: {', '.join(known)}; others need a default",
            )
    return [p for p in parameters if p.name in known or p.kind is inspect.Parameter.VAR_KEYWORD]


def _takes_one(parameters: Sequence[inspect.Parameter]) -> bool:
    return any(p.name in ("response", "completion") for p in parameters)


def call(function: RewardFunction, parameters: Sequence[inspect.Parameter], values: Mapping[str, list[Any]]) -> Any:
    """What a reward returns for lists of texts and columns; of one that scores a sample at a time, the list."""
    if not _takes_one(parameters):
        return _call(function, parameters, values)
    lists = {**values, **{one: values[several] for one, several in ONE.items()}}
    found = []
    for place in range(len(values["responses"])):
        try:
            found.append(_call(function, parameters, {key: value[place] for key, value in lists.items()}))
        except RewardError as error:
            raise RewardError(error.message, error.hint, place) from error
    return found


def _call(function: RewardFunction, parameters: Sequence[inspect.Parameter], values: Mapping[str, Any]) -> Any:
    positional = [values[p.name] for p in parameters if p.kind is inspect.Parameter.POSITIONAL_ONLY]
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    keywords = {p.name: values[p.name] for p in named}
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        # What a function for other trainers takes: prompts, completions and the columns.
        keywords |= {key: value for key, value in values.items() if key != "responses" and key not in keywords}
    result = function(*positional, **keywords)
    return asyncio.run(result) if inspect.iscoroutine(result) else result


def scores_of(name: str, result: Any, count: int) -> list[float]:
    """One finite number per sample, or RewardError with the place of the one that is none."""
    shown = f"{result!r:.80}"
    if isinstance(result, str | bytes | Mapping | set | frozenset) or not hasattr(result, "__iter__"):
        raise RewardError(f"reward `{name}` returned {shown}, not a list of numbers", "one number per response")
    values = [_score(name, score, place) for place, score in enumerate(result)]
    if len(values) != count:
        raise RewardError(f"reward `{name}` returned {len(values)} scores for {count} responses")
    return values


def _score(name: str, score: Any, place: int) -> float:
    text = f"{score!r:.80}"
    if isinstance(score, str | bytes) or not hasattr(score, "__float__"):
        raise RewardError(f"reward `{name}` returned {text}, which is no number", "a float per response", place)
    try:
        value = float(score)
    except (TypeError, ValueError, OverflowError):
        raise RewardError(
            f"reward `{name}` returned {text}, which is no score", "a float per response", place
        ) from None
    if not math.isfinite(value):
        raise RewardError(f"reward `{name}` returned {value}", "a finite number", place)
    if abs(value) > _FLOAT32_MAX:
        raise RewardError(f"reward `{name}` returned {text}, which float32 does not hold", "a smaller number", place)
    return value


def vader(responses: list[str]) -> list[float]:
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


BUILT_IN: dict[str, RewardFunction] = {
    "vader": vader, "exact": exact, "math": math_answer, "format": reasoning_format, "code": code
}  # fmt: skip
