"""Broken command lines, rules, overrides and environments, run in this process up to where work would begin."""

from __future__ import annotations

import contextlib
import io
import os
import random
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from fuzz_faults import ODD_VALUES, ODD_WORDS, broken_words
from fuzz_files import METRICS, NUMBERS, RUN
from fuzz_runs import Outcome
from plan_cases import SEVEN_CALLS, tiny_plan

import cost_models.validation.validation as validation_module
import planner.cli.commands.explain as explain_module
import planner.cli.commands.headline as headline_module
import planner.cli.commands.search as search_module
import profiler.command as profile_module
import runtime.cli
import runtime.launching.entry as entry_module
import runtime.launching.launch as launch_module
from planner.cli import main as planner_main
from planner.space.limits import parse_limits
from plans.codec import dump_plan
from plans.errors import Infeasible, RealplanError
from plans.runfile import load_run
from runtime.launching.slurm import rank_variables
from runtime.processes.member import outside_member

CALLS = ["actor_generate", "reward_infer", "actor_train"]
MODEL = "--model llama-7b --cluster h100-80gb-sxm -o out.json"
COMMANDS = (
    f"search {MODEL} --gpus 8 --batch-size 64 --prompt-tokens 128 --response-tokens 256 --minibatches 2",
    f"search {MODEL} --gpus 16 --gpus-per-node 8 --dtype bf16 --algorithm grpo --group-size 4 --seconds 2 --seed 3",
    f"search {MODEL} --pin actor_train.tp=4 --forbid *.pp>2 --same-mesh actor_generate,ref_infer --max-memory 72GiB",
    f"search {MODEL} --lengths lengths.txt --response-tokens 1024 --engine megatron+cuda-graphs --method mcmc"
    " --prompt-lengths lengths.txt",
    f"search {MODEL} --run run.yaml --async 1 --mean-response-tokens 200 --recompute-logprobs --json -v"
    " --mean-prompt-tokens 90",
    f"search {MODEL} --critic llama-13b --reward llama-7b --ref llama-7b --lengths metrics.jsonl --allow-long"
    " --lora-rank 16 --lora-alpha 32",
    "check plan.json --engine megatron --json",
    "check plan.json --resume-from runs --allow-long",
    "estimate plan.json --what-if batch_size=16 --what-if response_tokens=16 --engine eager",
    "estimate plan.json --what-if gpus=4 --what-if memory_gib=40 --json",
    "explain plan.json --seconds 1 --seed 2",
    "show plan.json --html page.html",
    "show plan.json --timeline timeline.json",
    "trace plan.json -o out.trace.json --timeline timeline.json",
    "compare plan.json other.json --engine megatron --html page.html --json",
    "diff plan.json other.json --json",
    "headline --engine megatron --seconds 1 --seed 2 --html page.html",
    "profile --model llama-7b --device cpu --tp 1,2 --dtype fp32 -o table.json",
    "validate rows.json --json",
    "report .",
    "models --json",
    "schema",
)
RUNS = (
    "plan.json iterations=3 actor.lr=1e-6 --run run.yaml --dry-run",
    "plan.json weights=random data.max_prompts=5 output=out --allow-stale --run run.yaml",
    "plan.json ppo.kl_coefficient=0.1 sampling.top_p=0.9 seed=4 --allow-long --run run.yaml",
    "plan.json resume_from=runs timeout_s=100 checkpoint.every=2 --resume --run run.yaml",
)
ROW = '[{"id": "a", "stage": "train", "model": "llama2-7b", "gpus": 8, "measured": {"step_time_s": 1.5}}]'
SIZES = {
    "--batch-size": "batch_size", "--prompt-tokens": "prompt_tokens", "--response-tokens": "response_tokens",
    "--minibatches": "minibatches", "--group-size": "group_size", "--dtype": "dtype",
}  # fmt: skip
STATIC = {
    "RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "node1", "MASTER_PORT": "29500", "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RESTART_COUNT": "0",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2", "SLURM_STEP_NODELIST": "gpu[018-019]", "SLURM_STEP_NUM_NODES": "2",
}  # fmt: skip
RULE = re.compile(r"\s*(\*|\w+)\.(\w+)\s*(>=|<=|!=|==|=|<|>)\s*(.+?)\s*")


class Options:
    """A folder with legal files, in which attempts run; what would take long is left out."""

    TURNS = ("rule", "override", "environment", "command", "command", "run")  # the method for each number in turn

    def __init__(self, folder: Path) -> None:
        self.commands = cache(typer.main.get_command)  # made once instead of for every command line
        plan = tiny_plan(2, "d2 t1 p1", reward_model=True, order=SEVEN_CALLS)
        (folder / "plan.json").write_text(dump_plan(plan))
        (folder / "other.json").write_text(dump_plan(plan))
        (folder / "run.yaml").write_text(RUN)
        (folder / "lengths.txt").write_text(NUMBERS)
        (folder / "metrics.jsonl").write_text(METRICS)
        (folder / "rows.json").write_text(ROW)
        head = '{"format": "realplan-timeline/1", "source": "measured", "period_s": 2.0, "spans": ['
        span = '{"name": "actor_train", "kind": "call", "iteration": 0, "start_s": 0.5, "end_s": 1.5, "ranks": [0, 1]}'
        (folder / "timeline.json").write_text(f"{head}{span}]}}")
        self.folder = folder

    def attempt(self, number: int) -> Outcome:
        """One broken input of some kind."""
        os.chdir(self.folder)
        rng = random.Random(f"option {number}")
        return getattr(self, self.TURNS[number % len(self.TURNS)])(rng)

    def rule(self, rng: random.Random) -> Outcome:
        """A rule of `--pin`."""
        call = rng.choice([*CALLS, "*", "actor_trian", ""])
        name = rng.choice(["tp", "dp", "mesh", "recompute", "tpp", "gpus", "offload", ""])
        value = rng.choice(["4", "-1", "9" * 5000, "full", "x", "", "4.5", "²", "true", "node 0", "\x1b[31m"])
        text = f"{call}.{name}{rng.choice(['=', '>', '<=', '!=', '=>', ''])}{value}"

        def same(limits: Any) -> bool:
            match = RULE.fullmatch(text)
            (rule,) = limits.pins
            return match is not None and (rule.call, rule.field, rule.comparison) == match.groups()[:3]

        return _answer("a rule", lambda: parse_limits([text], [], [], "", CALLS), same, text)

    def override(self, rng: random.Random) -> Outcome:
        """A `key=value` of realrun."""
        keys = ["iterations", "actor.lr", "actor.beta1", "seed", "ppo", "itertions", "a.b.c", "", "sampling.top_p"]
        key, value = rng.choice(keys), rng.choice((*ODD_VALUES, *ODD_WORDS))
        text = key + rng.choice(["=", "", "=="]) + value

        def same(run: Any) -> bool:
            for part in key.split("."):
                run = getattr(run, part)
            return value in ("{}", "null") or key == "ppo" or float(run) == float(value)

        return _answer("an override", lambda: load_run(Path("run.yaml"), [text]), same, text)

    def environment(self, rng: random.Random) -> Outcome:
        """Variables of another launcher."""
        found = dict(STATIC) if rng.random() < 0.5 else dict(SRUN)
        for _ in range(rng.randint(1, 2)):
            name = rng.choice(list(found))
            if rng.random() < 0.3:
                del found[name]
            else:
                found[name] = rng.choice(ODD_WORDS)
            if not found:
                break

        def same(member: Any) -> bool:
            said = {**found, **rank_variables(found)}
            if member is None:
                return not {"RANK", "WORLD_SIZE"} & set(said)
            return str(member.rank) == str(int(said["RANK"])) and 0 <= member.rank < member.world

        return _answer("the environment", lambda: outside_member({**found, **rank_variables(found)}), same, found)

    def command(self, rng: random.Random) -> Outcome:
        """A command line of realplan."""
        words = broken_words(rng.choice(COMMANDS).split(), rng)
        known = {line.split()[0] for line in COMMANDS}
        kind = words[0] if words and words[0] in known else "of no name"
        kept: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(typer.main, "get_command", self.commands)
            _leave_out_work(patch, kept)
            return _line(f"realplan {kind}", planner_main, ["realplan", *words], kept, patch)

    def unbroken(self) -> list[tuple[str, Outcome]]:
        """Every command line as it stands, and what became of it."""
        os.chdir(self.folder)
        found = []
        for line in COMMANDS:
            kept: list[Any] = []
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(typer.main, "get_command", self.commands)
                _leave_out_work(patch, kept)
                found.append((line, _line(line, planner_main, ["realplan", *line.split()], kept, patch)))
        for line in RUNS:
            with pytest.MonkeyPatch.context() as patch:
                _leave_out_launch(patch)
                found.append((line, _line(line, runtime.cli.main, ["realrun", *line.split()], [], patch)))
        return found

    def run(self, rng: random.Random) -> Outcome:
        """A command line of realrun."""
        words = broken_words(["realrun", *rng.choice(RUNS).split()], rng)[1:]
        with pytest.MonkeyPatch.context() as patch:
            _leave_out_launch(patch)
            return _line("realrun", runtime.cli.main, ["realrun", *words], [], patch)


def _answer(kind: str, read: Callable[[], Any], same: Callable[[Any], bool], said: object) -> Outcome:
    try:
        found = read()
    except RealplanError as error:
        assert error.message.strip() and len(str(error)) < 5000, (said, str(error)[:300])
        return Outcome(kind, True, bool(error.hint.strip()), said=f"{said!r}: {error}"[:500])
    assert same(found), ("accepted", said)
    return Outcome(kind)


def _line(kind: str, main: Callable[[], None], words: list[str], kept: list[Any], patch: pytest.MonkeyPatch) -> Outcome:
    """Run a command line; what it says of a mistake, and that a request that was built has the sizes it names."""
    out, err = io.StringIO(), io.StringIO()
    patch.setattr(sys, "argv", words)
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    said = err.getvalue()
    assert code in (0, 1, 2, None), (words, code)
    assert "Traceback" not in said and "\x1b" not in said + out.getvalue(), (words, said)
    for workload in filter(None, kept):
        _check_sizes(words, workload)
    refused = code not in (0, None) and not kept
    assert not refused or said.strip() or out.getvalue().strip(), words
    hinted = any(part in said + out.getvalue() for part in ("hint", "--help", "did you mean", "Usage"))
    return Outcome(kind, refused, hinted and refused, said=f"{words}: {said}"[:500])


def _check_sizes(words: list[str], workload: Any) -> None:
    """Sizes of a workload are those of the command line, the last of two counting."""
    given: Mapping[str, str] = dict(pairwise(words))
    for option, name in SIZES.items():
        if option in given and name != "group_size":
            said, got = given[option], getattr(workload, name)
            whole = isinstance(got, int)
            assert got == (int(said) if whole else said), (words, option)
            assert not whole or re.fullmatch("[+-]?[0-9]+", said), (words, option)


def _leave_out_launch(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(entry_module, "prepare_ranks", lambda *_: None)
    patch.setattr(launch_module, "launch", lambda *_: [])


def _leave_out_work(patch: pytest.MonkeyPatch, kept: list[Any]) -> None:
    """Searches and profiles end where they would begin; `kept` gets the workloads that were to be searched."""

    def begun(workload: Any, *_: Any, **__: Any) -> Infeasible:
        kept.append(workload)
        return Infeasible("left out", "")

    def stop(*_: Any, **__: Any) -> Iterator[None]:
        kept.append(None)
        raise RealplanError("left out", "hint")

    patch.setattr(search_module, "build_space", begun)
    patch.setattr(search_module, "with_nearest", lambda reason, *_: reason)
    patch.setattr(explain_module, "explain", stop)
    patch.setattr(headline_module.published, "searched", stop)
    patch.setattr(profile_module, "profile", stop)
    patch.setattr(validation_module, "library_files", list)
