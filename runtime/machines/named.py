"""The paths of weights, data and tokenizer that a run file names. What they hold is alike on all machines of a run;
where it lies is each machine's own affair, so machines speak of it by number."""

from __future__ import annotations

from collections.abc import Mapping

from plans.runfile import MOVIE_REVIEWS, RANDOM, RunFile


def weight_folders(run: RunFile) -> list[str]:
    """The folders of weights, each once; their numbers are the same on every machine."""
    named = [run.weights] if isinstance(run.weights, str) else [run.weights[role] for role in sorted(run.weights)]
    return list(dict.fromkeys(folder for folder in named if folder not in ("", RANDOM)))


def input_paths(run: RunFile) -> list[str]:
    """The tokenizer's folder and the files and folders of data, each once; their numbers are the same on every
    machine."""
    named = [run.tokenizer, *(part.path for part in run.data.parts), run.evaluation.source]
    return list(dict.fromkeys(path for path in named if path not in ("", MOVIE_REVIEWS)))


def renamed(run: RunFile, weights: Mapping[str, str], inputs: Mapping[str, str]) -> RunFile:
    """The run file with other paths for some of those."""
    source = run.data.source
    update = {
        "weights": _at(run.weights, weights)
        if isinstance(run.weights, str)
        else {role: _at(folder, weights) for role, folder in run.weights.items()},
        "tokenizer": _at(run.tokenizer, inputs),
        "data": run.data.model_copy(
            update={
                "source": _at(source, inputs)
                if isinstance(source, str)
                else tuple(part.model_copy(update={"path": _at(part.path, inputs)}) for part in source)
            }
        ),
        "evaluation": run.evaluation.model_copy(update={"source": _at(run.evaluation.source, inputs)}),
    }
    return run.model_copy(update=update)


def _at(path: str, places: Mapping[str, str]) -> str:
    return places.get(path, path)
