"""What a file says, found by a plain parser, against what was read of it: nothing is ignored, nothing is guessed."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from plans.codec import dump_plan


def leaves(data: Any, at: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Every value that is no list or object, by its path."""
    if isinstance(data, dict):
        return {path: value for key, inner in data.items() for path, value in leaves(inner, (*at, key)).items()}
    if isinstance(data, list):
        return {path: value for i, inner in enumerate(data) for path, value in leaves(inner, (*at, i)).items()}
    return {at: data}


def equal(read: Any, said: Any) -> bool:
    """Equal, where a whole number that stands for a real one is read as the nearest."""
    return read == said or (isinstance(read, float) and isinstance(said, int) and read == float(said))


def same_plan(plan: Any, said: Any) -> bool:
    """Defaults that a plan spells out and words that it spells otherwise aside, writing gives the file again."""
    read = json.loads(dump_plan(plan))
    loose = ("mesh", "strategy", "$schema")
    kept = {p: v for p, v in leaves(said).items() if p[-1] not in loose and p[0] != "provenance"}
    written = leaves(read)
    defaults = (0, 1, False, "", "none", True, "bf16", None, 1024.0)
    return all(equal(written[p], v) if p in written else v in defaults or p[:2] == ("workload", "graph")
               for p, v in kept.items())  # fmt: skip


CONFIG_FIELDS = {
    "num_hidden_layers": "layers", "hidden_size": "hidden", "num_attention_heads": "heads", "vocab_size": "vocab",
    "intermediate_size": "ffn", "rms_norm_eps": "norm_eps", "max_position_embeddings": "max_context",
    "tie_word_embeddings": "tied_embeddings",
}  # fmt: skip


def same_config(spec: Any, said: Mapping[str, Any]) -> bool:
    return all(getattr(spec, name) == said[key] for key, name in CONFIG_FIELDS.items() if key in said)


def same_run(run: Any, said: Any) -> bool:
    """Every scalar of the text is in the run file, as a number where it reads as one."""
    read = leaves(run.model_dump(mode="json"))
    for path, text in leaves(said).items():
        value = read.get(path, run.weights if path[0] == "weights" else None)
        if isinstance(value, bool) or value is None:
            if str(value).lower().replace("none", "null") != str(text).lower().replace("~", "null") and text:
                return False
        elif isinstance(value, int | float):
            if float(text) != float(value):
                return False
        elif str(value) != text and not str(value).endswith(text):
            return False
    return True


def same_graph(graph: Any, said: Any) -> bool:
    calls = [(c.name, c.kind.value, c.model, list(c.inputs), list(c.outputs)) for c in graph.calls]
    return graph.name == said["name"] and calls == [
        (c["name"], c["kind"], c.get("model", ""), c.get("inputs", []), c.get("outputs", [])) for c in said["calls"]
    ]


def same_timeline(timeline: Any, said: Any) -> bool:
    spans = [
        {"name": s.name, "kind": s.kind, "iteration": s.iteration, "start_s": s.start_s, "end_s": s.end_s,
         "ranks": list(s.ranks)} for s in timeline.spans
    ]  # fmt: skip
    same = len(spans) == len(said["spans"]) and all(
        equal(a[key], b[key]) for a, b in zip(spans, said["spans"], strict=True) for key in a
    )
    return same and equal(timeline.period_s, said["period_s"])


def same_lines(found: Sequence[Any], said: Sequence[Any]) -> bool:
    return list(found) == list(said)


def same_sheet(rows: list[str], said: str) -> bool:
    table = [row for row in csv.reader(io.StringIO(said.removeprefix("\ufeff"), newline="")) if row]
    return rows == [row[table[0].index("prompt")] for row in table[1:]]


def same_table(table: Any, said: Any) -> bool:
    for name, entry in said["entries"].items():
        if not np.array_equal(table.entries[name].values, np.array(entry["values"], dtype=float)):
            return False
    return all(getattr(table, key) == said[key] for key in ("hardware", "device", "precision", "date", "source"))


def same_numbers(found: Any, said: str) -> bool:
    values = np.array([int(line) for line in said.removeprefix("\ufeff").split("\n") if line.strip()])
    keys = found["response_lengths"]
    return all(keys[f"p{p}"] == round(float(np.percentile(values, p))) for p in (0, 50, 100))


def same_metrics(found: Any, said: list[Any]) -> bool:
    def mean(key: str) -> float | None:
        values = [line[key] for line in said if line.get(key) is not None]
        return math.fsum(values) / len(values) if values else None

    keys = found.get("response_lengths", {})
    return all(
        abs(keys[p] - mean(f"response_length/{p}")) <= 0.51  # type: ignore[operator]
        for p in ("p50", "p99")
        if mean(f"response_length/{p}") is not None
    )
