"""Run files: every shipped one loads, overrides reach any key, every mistake is one clear error."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from plans.errors import RealplanError
from plans.library import load_cluster, load_model
from plans.plan import Estimate, ExecutionPlan
from plans.runfile import RunFile, RunFileError, load_run, patience_s
from runtime.launching.preflight import read_run

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
        ("iterations: 0", [], "run.yaml:1:13: iterations is 0; it must be at least 1"),
        ("seed: 1\niterations: 010", [], 'run.yaml:2:13: iterations is "010"; it must be a whole number'),
        ("seed: 2020-01-01", [], 'run.yaml:1:7: seed is "2020-01-01"; it must be a whole number'),
        ("seed: 1\nseed: 2", [], "run.yaml:2:1: key `seed` is given twice"),
        ("[]", [], "run.yaml:1:1: a run file is a mapping"),
        ("actor:\n  beta1: 5", [], "run.yaml:2:10: actor.beta1 is 5; it must be below 1"),
        ("actor: {eps: -1}", [], "run.yaml:1:14: actor.eps is -1; it must be above 0"),
        ("timeout_s: .inf", [], "run.yaml:1:12: timeout_s is Infinity; it must be"),
        ("actor: {lr: .nan}", [], "actor.lr is NaN; it must be a finite number"),
        ("sampling: {temperature: 1e-320}", [], "run.yaml:1:25: sampling.temperature is 1e-320: it must be 0 or from"),
        ("iterations: true", [], "iterations is true; it must be a whole number"),
        ("a: !!python/object:os.system x", [], "run.yaml:1:4: tag"),
        ("a: &a [*a]", [], "run.yaml:1:4: too many values, or a list inside itself"),
        ("? [1, 2]\n: 3", [], "run.yaml:1:3: a key must be a text"),
        ("iterations: 1" + "0" * 5000, [], "run.yaml:1:13: `100000000000000000000000...00000000` is no number"),
        ("a: " + "[" * 5000, [], "brackets stand more than 60 deep"),
        ("seed: 1\n\titerations: 2", [], "run.yaml:2:1: not YAML"),
        ("", ["actor.beta1=5"], "`actor.beta1=5`: actor.beta1 is 5; it must be below 1"),
        ("", ["iterations=[1"], '`iterations=[1`: iterations is "[1"; it must be a whole number'),
        ("- a list", [], "mapping"),
        ("a: [", [], "run.yaml:2:1: not YAML"),
        ("", ["iterations"], "key=value"),
        ("", ["actor.lr=fast"], "actor.lr"),
        ("actor: {lr: 1e300}", [], "run.yaml:1:13: actor.lr is 1e+300; it must be at most 1e+30"),
        ("ppo: {clip: 1e300, kl_coefficient: 1e300}", [], "ppo.kl_coefficient is 1e+300; it must be at most 1e+30"),
        ("", ["a.b.c=3"], "`a.b.c=3`: unknown key `a`"),
        ("ppo: {clip: 0.1}", ["seed=1", "ppo.x.y=3"], "`ppo.x.y=3`: unknown key `ppo.x`"),
        ("a: {b: 1}", ["a.c=3"], "run.yaml:1:4: unknown key `a`"),
        ("iterations: 1_0", [], 'run.yaml:1:13: iterations is "1_0"; it must be a whole number'),
        ("iterations: 1e3", [], "run.yaml:1:13: iterations is 1000.0; it must be a whole number"),
        ("", ["iterations=1_0"], '`iterations=1_0`: iterations is "1_0"; it must be a whole number'),
        ("iterations: 3", ["iterations.x=1"], "holds a value"),
        (
            "checkpoint: {every: 0}",
            ["seed=1", "on_nonfinite=rollback"],
            "`on_nonfinite=rollback`: the run file: on_nonfinite: rollback needs checkpoints",
        ),
        (
            "on_nonfinite: rollback\ncheckpoint: {every: 5}",
            ["checkpoint.every=0", "seed=1"],
            "`checkpoint.every=0`: the run file: on_nonfinite: rollback needs checkpoints",
        ),
        (
            "on_nonfinite: rollback\ncheckpoint: {every: 0}",
            ["seed=1"],
            "run.yaml:1:1: the run file: on_nonfinite: rollback needs checkpoints",
        ),
        (
            "evaluation: {held_out: 4}",
            ["evaluation.every=2", "evaluation.source=p"],
            "`evaluation.source=p`: evaluation: it needs prompts of its own",
        ),
        ("evaluation: {every: 2}", ["seed=1"], "run.yaml:1:13: evaluation: it needs prompts of its own"),
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


def test_text_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"\xef\xbb\xbfiterations: 3\n")
    assert load_run(path).iterations == 3
    path.write_bytes(b"seed: 1\noutput: caf\xe9\n")
    with pytest.raises(RunFileError, match=r"run.yaml:2:12: byte 0xe9 is not UTF-8\nhint: `iconv -f Latin-1"):
        load_run(path)
    path.write_bytes("iterations: 3\n".encode("utf-16"))
    with pytest.raises(RunFileError, match=r"run.yaml:1:1: .*\nhint: `iconv -f UTF-16"):
        load_run(path)


def test_a_rank_waits_as_long_as_the_plan_asks_for(plan: ExecutionPlan, tmp_path: Path) -> None:
    assert patience_s(plan, RunFile()) == 300.0
    figures: dict[str, Any] = {"iteration_s": 290.0, "latency_s": 400.0, "peak_gib": 1.0, "calls_s": {"a": 293.0}}
    long = replace(plan, estimate=Estimate(**figures, peak_at="", host_gib=1.0, engine="e", of=""))
    assert patience_s(long, RunFile()) == 1200.0
    assert patience_s(long, RunFile(timeout_s=500.0)) == 500.0
    assert read_run(long, tmp_path / "plan.json", None, []).timeout_s == 1200.0
    with pytest.raises(RealplanError, match="timeout_s is 200, and `a` alone takes 293 s"):
        read_run(long, tmp_path / "plan.json", None, ["timeout_s=200"])
