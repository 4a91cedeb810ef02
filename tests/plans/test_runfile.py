"""Run files: every shipped one loads, overrides reach any key, every mistake is one clear error."""

from __future__ import annotations

from pathlib import Path

import pytest

from plans.library import load_cluster, load_model
from plans.runfile import RunFile, RunFileError, load_run

EXPERIMENTS = Path(__file__).resolve().parents[2] / "plans" / "library" / "experiments"


@pytest.mark.parametrize("path", sorted(EXPERIMENTS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_experiments_load(path: Path) -> None:
    run = load_run(path)
    assert run.weights_of("critic") == run.weights_of("actor") != ""
    assert run.workload.batch_size % run.workload.minibatches == 0


def test_defaults_need_no_file() -> None:
    assert load_run(None) == RunFile()
    assert load_model("llama-70b").kv_heads == 8 and load_cluster("local-cpu").size == 2


def test_overrides_are_typed_and_dotted(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text("iterations: 5\nactor: {lr: 1.0e-4}\n")
    run = load_run(path, ["iterations=7", "ppo.kl_coefficient=0.5", "actor.lr=2e-5", "weights=random"])
    assert (run.iterations, run.ppo.kl_coefficient, run.actor.lr) == (7, 0.5, 2e-5)
    assert run.weights_of("ref") == "random"


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "prompts.jsonl").write_text("")
    (tmp_path / "score.py").write_text("")
    path = tmp_path / "run.yaml"
    path.write_text("weights: {actor: model}\ndata: {source: prompts.jsonl}\nreward: score.py:good\n")
    run = load_run(path)
    assert run.weights_of("critic") == str(tmp_path / "model")
    assert run.data.source == str(tmp_path / "prompts.jsonl")
    assert run.reward == f"{tmp_path / 'score.py'}:good"


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("iterationz: 3", [], "did you mean `iterations`"),
        ("ppo: {clipp: 0.1}", [], "did you mean `clip`"),
        ("iterations: 0", [], "iterations (it is 0)"),
        ("- a list", [], "mapping"),
        ("a: [", [], "not YAML"),
        ("", ["iterations"], "key=value"),
        ("", ["actor.lr=fast"], "actor.lr"),
        ("iterations: 3", ["iterations.x=1"], "holds a value"),
    ],
)
def test_mistakes_are_one_clear_error(tmp_path: Path, text: str, overrides: list[str], words: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(RunFileError) as error:
        load_run(path, overrides)
    assert words in str(error.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="cannot read run file"):
        load_run(tmp_path / "none.yaml")
