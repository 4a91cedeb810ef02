"""Every kind of file that a person writes, downloads or passes on: a legal text, how it is read, and what it says.

`same` holds what was read against what a plain parser of that language finds: nothing is ignored, nothing is guessed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import yaml
from fuzz_meaning import (
    same_config,
    same_graph,
    same_lines,
    same_metrics,
    same_numbers,
    same_plan,
    same_run,
    same_sheet,
    same_table,
    same_timeline,
)
from plan_cases import TINY, tiny_plan
from safetensors.torch import save, save_file

from cost_models.engines.engine import MEGATRON
from cost_models.estimate import PlanCost, cost_plan
from cost_models.tables.table_file import load_table
from cost_models.validation.published import read_rows
from planner.pictures.run_files import RunFiles, read_run
from planner.pictures.run_page import run_page
from plans.checkpoint_files import CheckpointIndex, open_checkpoint, sealed_index
from plans.checks import check_plan
from plans.codec import dump_plan, load_plan, sealed
from plans.errors import RealplanError
from plans.graphfile import load_graph
from plans.huggingface import config_from_spec, spec_from_config, spec_from_folder
from plans.layout import model_units
from plans.lengthsfile import lengths_file
from plans.library import load_model
from plans.plan import Estimate
from plans.problems import blank_comments
from plans.runfile import load_run
from plans.seals import seal_of
from plans.timeline import load_timeline
from runtime.batches.files import read_data_rows
from runtime.batches.tokenizer import Tokenizer
from runtime.weights.hf_files import INDEX, WeightFiles
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_quantised import quantisation

GRAPH = """name: best-of-n
calls:
- {name: actor_generate, kind: generate, model: actor, inputs: [prompts], outputs: [sequences]}
- {name: score, kind: function, inputs: [sequences], outputs: [rewards], seconds_per_sample: 0.1}
- {name: actor_train, kind: train_step, model: actor, inputs: [sequences, rewards]}
"""
RUN = """weights: random
iterations: 5
seed: 1
sampling: {temperature: 0.7, top_k: 50}
actor: {lr: 1.0e-4, beta1: 0.9, clip: 1.0}
ppo:
  kl_coefficient: 0.02
checkpoint: {every: 3, keep: 1}
reward_limits: {seconds: 5.0, memory_gib: 1.0}
workload: {algorithm: ppo, batch_size: 32, dtype: fp32, models: {actor: llama-7b}}
"""
ROWS = "".join(json.dumps({"prompt": f"the movie number {i}", "id": i}) + "\n" for i in range(20))
PAIRS = "".join(json.dumps({"prompt": f"p {i}", "chosen": "good", "rejected": "bad"}) + "\n" for i in range(9))
SHEET = "id,prompt\n" + "".join(f'{i},"one, two {i}"\n' for i in range(20))
NUMBERS = "".join(f"{n}\n" for n in range(5, 200, 7))
METRICS = "".join(
    json.dumps({"iteration": i, "response_length/p50": 100 + i, "response_length/p99": 200, "prompt_length/mean": 9.5})
    + "\n"
    for i in range(4)
)
EVALUATED = "".join(
    json.dumps(
        {"iteration": i, "val/score/mean": 0.5 + i, "scores": [0.5, 1.0],
         "samples": [{"prompt": "two and two", "response": "four", "score": 1.0}]}
    )
    + "\n"
    for i in range(3)
)  # fmt: skip
SHOWN = "".join(
    json.dumps({"iteration": i, "sample": 0, "prompt": "two and two", "response": "four", "rewards": 1.0}) + "\n"
    for i in range(3)
)
TABLE = {
    "format": "realplan-costs/1", "hardware": "h100-80gb-sxm", "device": "NVIDIA H100", "model": "llama2-7b",
    "precision": "bf16", "clocks_mhz": {"graphics": 1980}, "versions": {"torch": "2.13.0"}, "date": "2026-08-21",
    "source": "realplan profile",
    "entries": {
        "block_forward": {
            "axes": {"tp": [1, 2], "sequences": [1, 4], "sequence_tokens": [512, 2048]},
            "values": [[[0.001, 0.0035], [0.0034, 0.013]], [[0.0006, 0.0019], [0.0018, 0.0067]]],
            "spread": 0.01,
        },
        "optimizer_step": {"axes": {"parameters": [1000000, 100000000]}, "values": [0.0001, 0.004]},
    },
}  # fmt: skip
MEASURED = {
    "rows": [
        {"id": f"row-{i}", "stage": "train", "model": "llama2-7b", "gpu": "A100-80GB-SXM", "gpus": 8, "tp": 2, "pp": 1,
         "mbs": 1, "gbs": 8, "seq_len": 2048, "precision": "bf16", "measured": {"step_time_s": 1.5}}
        for i in range(3)
    ]
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of file: its name, a legal content, how it is read where it stands, and whether that is what it says.

    parse: what a plain parser finds in it. beside: what lies in its folder.
    """

    name: str
    content: str | bytes
    read: Callable[[Path], Any]
    same: Callable[[Any, Any], bool]
    parse: Callable[[str], Any] = json.loads
    beside: Callable[[Path], None] = field(default=lambda folder: None)
    title: str = ""


def _plan_text() -> str:
    plan = tiny_plan(2, "d2 t1 p1")
    figures = Estimate(
        iteration_s=9.5, latency_s=12.0, calls_s={"actor_train": 3.0}, peak_gib=70.0, peak_at="actor_train, rank 0",
        host_gib=1.0, engine="e", of="",
    )  # fmt: skip
    return dump_plan(plan.with_estimate(sealed(plan, figures)))


def _timeline_text() -> str:
    span = {"name": "actor_train", "kind": "call", "iteration": 0, "start_s": 0.5, "end_s": 1.5, "ranks": [0, 1]}
    head = {"format": "realplan-timeline/1", "source": "measured", "period_s": 2.0, "spans": [span] * 3}
    return json.dumps(head, indent=1)


def _legal_plan(path: Path) -> Any:
    plan = load_plan(path)
    problems = check_plan(plan)
    if problems:  # their places are the business of the commands
        raise RealplanError(f"{path}:1:1: {problems[0].message}", problems[0].hint)
    return plan


def _scalars(node: yaml.Node | None) -> Any:
    """A YAML text as its words, without a view on what they mean; keys that stand twice are an error."""
    if isinstance(node, yaml.MappingNode):
        keys = [key.value for key, _ in node.value]
        assert len(set(keys)) == len(keys), keys
        return {key.value: _scalars(value) for key, value in node.value}
    if isinstance(node, yaml.SequenceNode):
        return [_scalars(value) for value in node.value]
    return node.value if node is not None else {}


def _words(text: str) -> Any:
    return _scalars(yaml.compose(text, Loader=yaml.CSafeLoader))


def _json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.removeprefix("\ufeff").split("\n") if line.strip()]


def _reported(path: Path) -> RunFiles:
    """The files of a run, of which a page has been drawn."""
    run = read_run(path.parent)
    run_page(run, _cost(), "a run")
    return run


@cache
def _cost() -> PlanCost:
    return cost_plan(tiny_plan(2, "d2 t1 p1"), MEGATRON)


def _a_run(folder: Path) -> None:
    """What else a run has left."""
    (folder / "plan.json").write_text(_plan_text())
    (folder / "metrics.jsonl").write_text(METRICS)


def _whole_lines(text: str) -> list[Any]:
    """A last line that has no end is left out, as a run that goes on may be writing it."""
    return _json_lines(text[: text.rfind("\n") + 1])


def _checkpoint_text(folder: Path) -> str:
    """An index over three files that lie beside it."""
    (folder / "plan.json").write_text(dump_plan(tiny_plan(2, "d2 t1 p1")))
    (folder / "run.yaml").write_text(RUN)
    (folder / "metrics.jsonl").write_text(METRICS)
    files = {name: seal_of(folder / name) for name in ("plan.json", "run.yaml", "metrics.jsonl")}
    return sealed_index(CheckpointIndex(iteration=4, roles={}, entries=[], files=files))


SMALL = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 4, "intermediate_size": 8, "vocab_size": 16, "tie_word_embeddings": True,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip


def _small_tensors() -> dict[str, torch.Tensor]:
    """The tensors of a model of one narrow layer."""
    spec = spec_from_config(SMALL, "small")
    named = (
        (name, hf_shape(spec, parameter, i))
        for unit in model_units(spec)
        for parameter in unit.parameters
        for i, name in enumerate(hf_names(spec, parameter.name))
    )
    return {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in named}


def _with_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(SMALL))


def _shards(folder: Path) -> None:
    """The small model's tensors in two files."""
    tensors = _small_tensors()
    for file, names in (("a.safetensors", sorted(tensors)[::2]), ("b.safetensors", sorted(tensors)[1::2])):
        save_file({name: tensors[name] for name in names}, folder / file)
    _with_config(folder)


def _index_text() -> str:
    places = {name: "ab"[i % 2] + ".safetensors" for i, name in enumerate(sorted(_small_tensors()))}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": places}, indent=1)


def _weights(path: Path) -> Any:
    checkpoint = WeightFiles(path.parent)
    checkpoint.check(spec_from_folder(path.parent))
    return checkpoint.files


def _tokens(path: Path) -> Any:
    tokenizer = Tokenizer.of_folder(path.parent)
    tokenizer.decode(tokenizer.encode("the movie was good"))
    return tokenizer


def _copies(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "config.json"):
        shutil.copy(TINY / name, folder)


def _vocabulary() -> str:
    """A tokenizer of a few words, as `tokenizers` writes it."""
    data = json.loads((TINY / "tokenizer.json").read_text("utf-8"))
    data["model"]["vocab"] = dict(list(data["model"]["vocab"].items())[:40])
    return json.dumps(data, indent=1)


def _anything(found: Any, said: Any) -> bool:
    return True


def _texts(path: Path, *columns: str) -> list[tuple[str, ...]]:
    return [tuple(row.text(column) for column in columns) for row in read_data_rows(path, columns)]


def _prompts(path: Path) -> list[str]:
    return [text for (text,) in _texts(path, "prompt")]


def kinds() -> list[Kind]:
    """Every kind."""
    config = config_from_spec(load_model("qwen2.5-7b")) | {"use_cache": True, "torch_dtype": "bfloat16"}
    block = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
    tiny = json.loads((TINY / "config.json").read_text("utf-8"))
    lengths = partial(lengths_file, prompt_tokens=512, response_tokens=8192)
    plain = partial(json.dumps, indent=1)
    return [
        Kind("plan.json", _plan_text(), _legal_plan, same_plan, lambda text: json.loads(blank_comments(text))),
        Kind("config.json", plain(config), spec_from_folder, same_config),
        Kind("run.yaml", RUN, load_run, same_run, _words),
        Kind("graph.yaml", GRAPH, load_graph, same_graph, _words),
        Kind("timeline.json", _timeline_text(), load_timeline, same_timeline),
        Kind("rows.jsonl", ROWS, _prompts, lambda rows, said: rows == [r["prompt"] for r in said], _json_lines),
        Kind("pairs.jsonl", PAIRS, lambda p: _texts(p, "prompt", "chosen", "rejected"),
             lambda rows, said: rows == [(r["prompt"], r["chosen"], r["rejected"]) for r in said], _json_lines),
        Kind("sheet.csv", SHEET, _prompts, same_sheet, str),
        Kind("table.json", plain(TABLE), load_table, same_table),
        Kind("measured.json", plain(MEASURED), read_rows,
             lambda rows, said: rows == (said["rows"] if isinstance(said, dict) else said)),
        Kind("lengths.txt", NUMBERS, lengths, same_numbers, str),
        Kind("metrics.jsonl", METRICS, lengths, same_metrics, _json_lines),
        Kind("evaluation.jsonl", EVALUATED, lambda p: _reported(p).evaluated, same_lines, _whole_lines, beside=_a_run),
        Kind("samples.jsonl", SHOWN, lambda p: _reported(p).samples, same_lines, _whole_lines, beside=_a_run),
        Kind(INDEX, _index_text(), _weights, lambda files, said: files == said["weight_map"], beside=_shards),
        Kind("model.safetensors", save(_small_tensors()), _weights, _anything, beside=_with_config),
        Kind("tokenizer.json", _vocabulary(), _tokens, _anything, beside=_copies),
        Kind("tokenizer_config.json", plain({"eos_token": "<eos>", "pad_token": "<pad>"}), _tokens, _anything,
             beside=_copies),
        Kind("generation_config.json", plain({"eos_token_id": [1, 2], "pad_token_id": 0}), _tokens,
             lambda t, said: not said.get("eos_token_id") or not isinstance(said["eos_token_id"], list)
             or list(t.eos_ids) == [i for i in said["eos_token_id"] if i not in (None, -1)], beside=_copies),
        Kind("config.json", plain(tiny | {"quantization_config": block}),
             lambda p: quantisation(p.parent, RealplanError),
             lambda form, said: not said.get("quantization_config") or list(form.block) == (
                 said["quantization_config"].get("weight_block_size") or [128, 128]), title="quantised config.json"),
        Kind("index.json", "", lambda p: open_checkpoint(p.parent), _anything, title="checkpoint"),
    ]  # fmt: skip


def prepared(folder: Path) -> list[tuple[Kind, Path]]:
    """Every kind with a folder of its own, in which its file and what belongs beside it lie."""
    found = []
    for number, kind in enumerate(kinds()):
        place = folder / f"{number:02}"
        place.mkdir()
        kind.beside(place)
        if kind.title == "checkpoint":
            text = _checkpoint_text(place)
            digest = hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()
            kind = Kind(kind.name, text, kind.read, _untouched(digest), title=kind.title)
        (place / kind.name).write_bytes(kind.content if isinstance(kind.content, bytes) else kind.content.encode())
        found.append((kind, place / kind.name))
    return found


def _untouched(digest: str) -> Callable[[Any, Any], bool]:
    """Whether an index says what it said."""
    return lambda found, said: hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest() == digest
