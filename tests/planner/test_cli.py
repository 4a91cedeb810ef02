"""The `realplan` command as a user types it: what it prints, what it writes, what it says of wrong input."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from plan_cases import tiny_plan

from cost_models.engines.engine import MEGATRON
from planner.baselines import BASELINES
from planner.cli import main
from planner.explanation.whatif import refitted, what_if
from planner.remedies.memory import memory_hint
from plans.checks import check_plan
from plans.codec import BadPlan, load_plan
from runtime.launching.preflight import check_samples

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def realplan(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["realplan", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A searched plan of four 7B models on two nodes."""
    path = tmp_path_factory.mktemp("plans") / "plan.json"
    from planner.best import Effort
    from planner.cli.commands.search import search_command
    from planner.request import build_request
    from planner.search.portfolio import Method
    from planner.space.limits import Limits

    request = build_request(
        models={"actor": "llama-7b"}, sizes={}, cluster="h100-80gb-sxm", gpus=16, gpus_per_node=None, run=None
    )
    code = search_command(
        request,
        engine=MEGATRON,
        limits=Limits(),
        effort=Effort(method=Method.MCMC, seconds=4.0),
        output=path,
        as_json=True,
        verbose=False,
    )
    assert code == 0
    return path


def test_search_prints_what_a_program_needs(realplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    code, out, _ = realplan(
        "search", "--model", "llama-7b", "--gpus", "8", "--method", "mcmc", "--seconds", "4", "-o", str(path), "--json"
    )
    assert code == 0
    answer = json.loads(out)
    keys = {"iteration_s", "lower_bound_s", "gap", "search_s", "method", "evaluated", "peak_gib", "plan"}
    assert keys <= set(answer)
    assert 0 < answer["lower_bound_s"] <= answer["iteration_s"] and answer["method"] == "mcmc"
    assert answer["gap"] == pytest.approx(1 - answer["lower_bound_s"] / answer["iteration_s"], abs=1e-6)
    plan = load_plan(path)
    assert check_plan(plan) == [] and answer["peak_gib"] <= 79.1
    assert plan.estimate is not None and plan.estimate.iteration_s == pytest.approx(answer["iteration_s"], rel=1e-3)


def test_show_fits_a_hundred_columns_and_names_every_call(realplan: Run, found: Path) -> None:
    code, out, _ = realplan("show", str(found))
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= 100
    for call in ("actor_generate", "reward_infer", "ref_infer", "critic_infer", "actor_train", "critic_train"):
        assert call in out


def test_a_legal_edit_gets_a_new_estimate(realplan: Run, found: Path, tmp_path: Path) -> None:
    edited = tmp_path / "edited.json"
    text = found.read_text().replace('"response_tokens": 1024', '"response_tokens": 512')
    edited.write_text(text)
    code, out, err = realplan("check", str(edited))
    assert code == 0 and out.startswith("ok: ") and "out of date" in err
    old = load_plan(found).estimate
    assert realplan("check", "--write", str(edited))[0] == 0
    new = load_plan(edited).estimate
    assert old and new and new.iteration_s < old.iteration_s and new.of != old.of
    assert "out of date" not in realplan("check", str(edited))[2]


def test_check_reports_problems_as_json(realplan: Run, found: Path, tmp_path: Path) -> None:
    code, out, _ = realplan("check", str(found), "--json")
    assert code == 0 and json.loads(out) == {"ok": True, "problems": [], "runtime_refuses": []}
    bad = tmp_path / "bad.json"
    bad.write_text(found.read_text().replace('"minibatches": 4', '"minibatches": 5'))
    code, out, _ = realplan("check", str(bad), "--json")
    (problem,) = json.loads(out)["problems"]
    assert code == 1 and set(problem) == {"line", "column", "rule", "message", "hint"}


def test_samples_beyond_a_context_need_insistence(realplan: Run, found: Path, tmp_path: Path) -> None:
    """Llama-2 has 4,096 positions."""
    long = tmp_path / "long.json"
    long.write_text(found.read_text().replace('"prompt_tokens": 1024', '"prompt_tokens": 4096'))
    code, _, err = realplan("check", str(long))
    assert code == 1 and "[context]" in err
    assert "samples of 4096 + 1024 tokens" in err and "`actor` (llama2-7b)" in err
    assert "hint: at most 4096 tokens in all, or --allow-long to insist" in err
    with pytest.raises(BadPlan, match="context of 4096"):
        check_samples(load_plan(long), long, allow_long=False)
    assert check_samples(load_plan(long), long, allow_long=True).workload.allow_long
    ask = ("search", "--model", "llama-7b", "--prompt-tokens", "1024", "--response-tokens", "8192")
    code, _, err = realplan(*ask)
    assert code == 2 and "1024 + 8192" in err and "response_tokens 3072 or less" in err
    short = ("--method", "mcmc", "--seconds", "0.1", "--batch-size", "8", "-o", str(long))
    assert realplan(*ask, "--allow-long", *short)[0] == 0 and load_plan(long).workload.allow_long
    assert realplan("check", str(long))[0] == 0, "the plan remembers"


def test_samples_that_no_model_can_take_are_no_plan(realplan: Run, found: Path, tmp_path: Path) -> None:
    """Llama-2 knows 32,000 tokens, Llama-3 128,256. Search writes nothing; check names the line."""
    plan = tmp_path / "none.json"
    for words, message in (
        (("--response-tokens", "0"), "response_tokens is 0: there is nothing to learn from\nhint: response_tokens 1"),
        (("--model", "llama3-8b", "--ref", "llama-7b"), "`ref` (llama2-7b) knows 32000 tokens, fewer than the 128256"),
    ):
        code, _, err = realplan("search", "--model", "llama-7b", *words, "-o", str(plan))
        assert code == 2 and message in err and not plan.exists()
    plan.write_text(found.read_text().replace('"response_tokens": 1024', '"response_tokens": 0'))
    code, _, err = realplan("check", str(plan))
    assert code == 1 and err.startswith(f"{plan}:") and "learn from [response]" in err
    with pytest.raises(BadPlan, match="response_tokens is 0"):
        check_samples(load_plan(plan), plan, allow_long=True)


def test_out_of_memory_names_the_call_the_place_and_the_terms(realplan: Run, found: Path, tmp_path: Path) -> None:
    huge = tmp_path / "huge.json"
    huge.write_text(found.read_text().replace('"prompt_tokens": 1024', '"prompt_tokens": 131072'))
    code, _, err = realplan("check", str(huge), "--allow-long")
    assert code == 1
    assert "[memory]" in err and "GiB" in err and "largest:" in err and "hint:" in err
    assert err.startswith(f"{huge}:")


def test_estimate_and_what_if(realplan: Run, found: Path) -> None:
    code, out, _ = realplan("estimate", str(found))
    assert code == 0 and "memory: peak" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    longer = realplan("estimate", str(found), "--what-if", "response_tokens=2048", "--json")
    base = realplan("estimate", str(found), "--json")
    assert json.loads(longer[1])["iteration_s"] > json.loads(base[1])["iteration_s"]
    bigger = realplan("estimate", str(found), "--what-if", "gpus=32", "--json")
    assert json.loads(bigger[1])["iteration_s"] < json.loads(base[1])["iteration_s"]


@pytest.fixture
def halves(tmp_path: Path) -> Path:
    """Four 7B models on two nodes: generation on both, scoring and training on a node or a part of one."""
    rest = (("reward_infer", 0), ("ref_infer", 1), ("critic_infer", 1))
    calls: list[dict[str, object]] = [{"call": "actor_generate", "mesh": "nodes 0-1", "strategy": "d8 t2 p1"}]
    calls += [{"call": c, "mesh": f"node {n}", "strategy": "d8 t1 p1", "micro_batches": 32} for c, n in rest]
    calls += [{"call": "actor_train", "mesh": "node 0", "strategy": "d4 t1 p2 v4", "micro_batches": 16}]
    calls += [{"call": "critic_train", "mesh": "node 1 gpus 4-7", "strategy": "d1 t1 p4 v2", "micro_batches": 64}]
    workload = {"algorithm": "ppo", "batch_size": 512, "prompt_tokens": 1024, "response_tokens": 1024, "minibatches": 4}
    workload |= {"models": dict.fromkeys(("actor", "reward", "ref", "critic"), "llama2-7b")}
    cluster = {"nodes": 2, "gpus_per_node": 8, "gpu": "h100-80gb-sxm", "inter_node_gbps": 50.0}
    path = tmp_path / "halves.json"
    path.write_text(json.dumps({"format": "realplan/1", "workload": workload, "cluster": cluster, "calls": calls}))
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("memory_gib=40", " of 40 GiB on rank "),
        ("gpu=rtx-4090", " of 23.5 GiB on rank "),
        ("host_memory_gib=0.001", "does not fit: node 1 needs "),
    ],
)
def test_estimate_says_what_does_not_fit(realplan: Run, halves: Path, change: str, words: str) -> None:
    if change.startswith("host"):
        text = halves.read_text()
        halves.write_text(text.replace('"call": "ref_infer",', '"call": "ref_infer", "offload": true,'))
    code, out, err = realplan("estimate", str(halves), "--what-if", change)
    assert code == 0, err
    assert out.splitlines()[1].startswith("does not fit: ") and words in out
    assert max(len(line) for line in out.splitlines()) <= 80
    answer = json.loads(realplan("estimate", str(halves), "--what-if", change, "--json")[1])
    assert answer["fits"] is False


def test_estimate_of_a_plan_that_fits(realplan: Run, halves: Path) -> None:
    _, out, _ = realplan("estimate", str(halves), "--what-if", "gpu=b300-288gb")
    assert "does not fit" not in out
    assert json.loads(realplan("estimate", str(halves), "--what-if", "gpu=b300-288gb", "--json")[1])["fits"] is True


def test_hints_for_memory_are_legal_for_the_call(realplan: Run, halves: Path) -> None:
    plan = load_plan(halves)
    for call, named, foreign in (
        ("actor_generate", '"slots": ', ("micro_batches", "recompute", "offload")),
        ("ref_infer", '"offload": true', ("waves", "recompute")),
        ("critic_infer", '"micro_batches": 64', ("offload", "recompute")),
        ("actor_train", '"recompute": "full"', ("waves",)),
    ):
        hint = memory_hint(plan, call)
        assert named in hint and f"`{call}`" in hint
        assert not any(word in hint for word in foreign), hint
        assert ("a larger mesh" in hint) == (call != "actor_generate")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("response_tokens=nan", "response_tokens: nan is not a whole number from 0 to 10,000,000"),
        ("gpus=inf", "gpus: inf is not a whole number from 1 to 65,536"),
        ("batch_size=0.5", "batch_size: 0.5 is not a whole number"),
        ("prompt_tokens=1e30", "prompt_tokens: 1e30 is not a whole number"),
        ("inter_node_gbps=nan", "nan is not a positive, finite number"),
        ("memory_gib=1e400", "1e400 is not a positive, finite number"),
        ("hbm_gbps=1e300", "hbm_gbps is 1e+300; it must be a number from"),
        ("gpus", "`gpus=256`"),
        ("gpus=12", "`gpus=16`"),
        ("mean_response_tokens=5000", "5000 is above response_tokens 1024"),
        ("gpus=24", "`reward_infer` on mesh `node 0` cannot have 3/2 of it"),
        ("gpus=8", "`critic_train` has dp 1 (`d1 t1 p4 v2`), which cannot become 1/2"),
        ("tokens=8", "not one of the known changes"),
    ],
)
def test_impossible_circumstances_are_one_clear_error(realplan: Run, halves: Path, change: str, words: str) -> None:
    code, out, err = realplan("estimate", str(halves), "--what-if", change)
    assert code == 2 and not out
    assert words in err and "hint:" in err and "Traceback" not in err


def test_bounds_follow_the_samples_of_a_what_if(realplan: Run, halves: Path) -> None:
    """The bound of packs is the longest sample, and slots are all samples of a dp rank, where either is passed."""
    text = halves.read_text()
    for call, bound in (("ref_infer", 4096), ("critic_infer", 2048)):
        at = text.index(f'"{call}"')
        text = text[:at] + text[at:].replace('"micro_batches": 32', f'"micro_batch_tokens": {bound}', 1)
    text = text.replace('"d8 t2 p1"', '"d8 t2 p1", "slots": 48')
    halves.write_text(text)
    code, out, err = realplan("estimate", str(halves), "--what-if", "response_tokens=2048")
    assert code == 0 and out, err
    grown = "critic_infer: micro_batch_tokens 2048 becomes 3072, which the longest samples need"
    assert grown in " ".join(err.split()) and "ref_infer" not in err and "slots" not in err
    changed = what_if(load_plan(halves), ["response_tokens=2048", "batch_size=256"])
    found = {c.call: (c.strategy.micro_batch_tokens, c.strategy.slots) for c in changed.calls}
    assert found["ref_infer"] == (4096, 0) and found["critic_infer"] == (3072, 0)
    assert found["actor_generate"] == (0, 32), "of 256 samples each of 8 replicas has 32"
    said = refitted(load_plan(halves), changed)
    assert said == [
        "actor_generate: slots 48 become 32, all samples of a dp rank",
        grown,
    ]
    assert refitted(changed, what_if(changed, ["response_tokens=1024"])) == [], "what still fits stays"


def test_pairs_stay_within_the_bound_of_a_what_if() -> None:
    order = ("ref_infer", "actor_train")
    plan = tiny_plan(1, {"ref_infer": "d1 t1 p1", "actor_train": ("node 0", "d1 t1 p1", {"micro_batch_tokens": 40})},
                     algorithm="dpo", order=order, group_size=2)  # fmt: skip
    assert what_if(plan, ["response_tokens=64"]).planned("actor_train").strategy.micro_batch_tokens == 2 * (8 + 64)


def test_fewer_gpus_keep_the_samples_that_a_rank_holds_at_once(halves: Path) -> None:
    text = halves.read_text().replace("node 1 gpus 4-7", "node 1").replace("d1 t1 p4 v2", "d2 t1 p4 v2")
    halves.write_text(text)
    plan = what_if(load_plan(halves), ["gpus=8"])
    assert {c.call: c.mesh.text(plan.cluster) for c in plan.calls} == {
        "actor_generate": "node 0",
        "reward_infer": "node 0 gpus 0-3",
        "ref_infer": "node 0 gpus 4-7",
        "critic_infer": "node 0 gpus 4-7",
        "actor_train": "node 0 gpus 0-3",
        "critic_train": "node 0 gpus 4-7",
    }
    generate, train = plan.planned("actor_generate").strategy, plan.planned("actor_train").strategy
    assert (generate.dp, generate.waves, generate.micro_batches) == (4, 2, 1)
    assert (train.dp, train.waves, train.micro_batches) == (2, 1, 32)


def test_a_part_of_a_node_grows_and_a_cluster_names_its_gpu(halves: Path) -> None:
    plan = what_if(load_plan(halves), ["gpus=32", "gpu=local-cpu"])
    assert plan.planned("critic_train").mesh.text(plan.cluster) == "node 3"
    assert plan.cluster.gpu.name == "cpu"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["search", "--model", "lama-7b"], 2, "did you mean `llama-7b`"),
        (["search"], 2, "--model llama-70b"),
        (["search", "--model", "llama-7b", "--gpus", "12"], 2, "8 or 16 GPUs"),
        (["search", "--model", "llama-7b", "--cluster", "h100"], 2, "h100-80gb-sxm"),
        (["search", "--model", "llama-7b", "--algorithm", "pppo"], 2, "`ppo`"),
        (["search", "--model", "llama-7b", "--pin", "actor_train.tp"], 2, "call.field=value"),
        (["search", "--model", "llama-7b", "--forbid", "actor_trian.tp>2"], 2, "`actor_train`"),
        (["search", "--model", "llama-7b", "--max-memory", "lots"], 2, "72GiB"),
        (["search", "--model", "llama-7b", "--engine", "megatorn"], 2, "`megatron`"),
        (["search", "--model", "llama-70b", "--gpus", "8"], 1, "infeasible"),
        (
            ["search", "--model", "llama-7b", "--response-tokens", "-4"],
            2,
            "response_tokens is -4; it must be at least 0",
        ),
        (["search", "--model", "llama-7b", "--mean-response-tokens", "2000"], 2, "2000 is above response_tokens 1024"),
        (["search", "--model", "llama-7b", "--mean-prompt-tokens", "2000"], 2, "2000 is above prompt_tokens 1024"),
        (["search", "--model", "llama-7b", "--prompt-lengths", "none"], 2, "cannot read --prompt-lengths `none`"),
        (["search", "--model", "llama-7b", "-o", "/dev/null/plan.json"], 2, "cannot write `/dev/null/plan.json`"),
        (["search", "--model", "llama-7b", "--group-size", "0"], 2, "group_size is 0"),
        (["search", "--model", "llama-7b", "--gpus", "0"], 2, "--gpus is 0"),
        (["search", "--model", "llama-7b", "--async", "-1"], 2, "--async is -1"),
        (["search", "--model", "llama-7b", "--seed", "-1"], 2, "--seed is -1"),
        (["search", "--model", "llama-7b", "--seconds", "nan"], 2, "--seconds is nan"),
        (["show", "nowhere.json"], 2, "cannot read plan"),
        (["estimate", "nowhere.json"], 2, "cannot read plan"),
    ],
)
def test_wrong_use_is_one_clear_error(
    realplan: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], code: int, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    ended, _, err = realplan(*arguments)
    assert ended == code, err
    assert words in err and "hint:" in err and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_pins_and_bounds_are_kept(realplan: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    rules = ["--pin", "actor_train.tp=4", "--forbid", "*.pp>1", "--max-memory", "60GiB"]
    search = ["search", "--model", "llama-7b", "--gpus", "16", "--method", "mcmc", "--seconds", "4"]
    code, out, err = realplan(*search, *rules, "-o", str(path), "--json", "-v")
    assert code == 0, err
    plan = load_plan(path)
    assert plan.planned("actor_train").strategy.tp == 4
    assert all(planned.strategy.pp == 1 for planned in plan.calls)
    assert json.loads(out)["peak_gib"] <= 60.0
    assert "forbidden: *.pp>1" in err


def test_every_algorithm_can_be_planned(realplan: Run, tmp_path: Path) -> None:
    for algorithm in ("grpo", "remax", "dpo", "sft", "reward-modelling"):
        path = tmp_path / f"{algorithm}.json"
        arguments = ["--algorithm", algorithm, "--group-size", "2", "--method", "mcmc", "--seconds", "1"]
        code, _, err = realplan("search", "--model", "llama-7b", "--gpus", "8", *arguments, "-o", str(path), "--json")
        assert code == 0, (algorithm, err)
        assert check_plan(load_plan(path)) == []


def test_models_clusters_and_schema(realplan: Run) -> None:
    lines = realplan("models")[1].splitlines()
    said = {line.split()[0]: line.rsplit("  ", 1)[-1] for line in lines}
    assert said["llama-70b"] == said["phi-4"] == said["gemma2-9b"] == said["glm4-9b"] == said["olmo2-7b"] == "runs"
    assert said["gpt3-175b"] == said["bloom-176b"] == "plan only"
    refused = json.loads(realplan("models", "--json")[1])
    assert refused["llama-7b"]["runtime_refuses"] == [] and "`alibi`" in refused["bloom-176b"]["runtime_refuses"][0]
    assert "local-cpu" in realplan("clusters")[1]
    assert json.loads(realplan("schema")[1])["title"] == "PlanFile"


def test_it_is_said_that_baselines_ignore_the_rules(realplan: Run, tmp_path: Path) -> None:
    """One layout for all calls can have one tp for all of them, and not two."""
    rules = ["actor_generate.tp=1", "actor_train.tp=8"]
    path, pins = str(tmp_path / "plan.json"), [word for rule in rules for word in ("--pin", rule)]
    command = ["search", "--model", "llama-7b", "--gpus", "8", "--method", "mcmc", "--seconds", "2", "-o", path, *pins]
    code, _, said = realplan(*command)
    said = " ".join(said.split())
    under = ", ".join(f"--pin {rule}" for rule in rules)
    assert code == 0 and "the best symmetric plan takes" in said and f"x), but ignores {under} wrote" in said
    strategies = [load_plan(Path(path)).planned(call).strategy for call in ("actor_generate", "actor_train")]
    assert [strategy.tp for strategy in strategies] == [1, 8]
    code, _, said = realplan("show", path)
    assert code == 0 and f"under {under}; the baselines ignore that: {', '.join(BASELINES)}" in " ".join(said.split())
