"""The experiments that ship with the package, and the run file's answers to mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

import plans.library
from plans.algorithms import algorithm_graph
from plans.runfile import RunFileError, load_run

EXPERIMENTS = sorted((Path(plans.library.__file__).parent / "experiments").glob("*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_is_a_run_file(path: Path) -> None:
    run = load_run(path)
    assert algorithm_graph(run.workload.algorithm).trainers and run.weights and run.data.source
    assert run.output.endswith(path.stem), "runs do not overwrite each other"


@pytest.mark.parametrize(("override", "words"), [
    ("ppo.kl_coeficient=0.1", ["unknown key `ppo.kl_coeficient`", "did you mean `kl_coefficient`"]),
    ("dpo.betta=0.1", ["unknown key `dpo.betta`", "did you mean `beta`"]),
    ("dpo.beta=0", ["dpo.beta", "must be above 0"]),
])  # fmt: skip
def test_mistakes_are_named(override: str, words: list[str]) -> None:
    with pytest.raises(RunFileError) as raised:
        load_run(None, [override])
    assert all(word in str(raised.value) for word in words), str(raised.value)
