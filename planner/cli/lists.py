"""The commands that say what there is: models, clusters, this machine, published measurements, the schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from planner.cli.options import AsJson


def models(as_json: AsJson = False) -> None:
    """List the architectures that have a name, and whether `realrun` runs them or they can be planned only."""
    from plans.library import load_model, model_names
    from plans.runnable import spec_problems

    specs = {name: load_model(name) for name in model_names()}
    refused = {name: [problem.message for problem in spec_problems(spec)] for name, spec in specs.items()}
    if as_json:
        rows = {name: {"params": spec.params, "layers": spec.layers} for name, spec in specs.items()}
        print(json.dumps({name: {**row, "runtime_refuses": refused[name]} for name, row in rows.items()}))
        return
    print(f"{'name':25}{'params':>10}{'layers':>8}{'hidden':>8}{'heads':>7}{'kv':>5}{'ffn':>8}{'vocab':>9}  realrun")
    for name, s in specs.items():
        shown = f"{name} = {s.name}" if s.name != name else name
        size = f"{s.params / 1e9:.2f}B"
        verdict = "plan only" if refused[name] else "runs"
        row = f"{shown:25}{size:>10}{s.layers:>8}{s.hidden:>8}{s.heads:>7}{s.kv_heads:>5}{s.ffn:>8}{s.vocab:>9}"
        print(f"{row}  {verdict}")


def clusters(as_json: AsJson = False) -> None:
    """List the clusters that have a name."""
    from plans.library import cluster_names, load_cluster

    specs = {name: load_cluster(name) for name in cluster_names()}
    if as_json:
        print(json.dumps({n: {"gpu": c.gpu.name, "gpus_per_node": c.gpus_per_node} for n, c in specs.items()}))
        return
    print(f"{'name':18}{'GPUs/node':>10}{'GiB':>8}{'bf16 TFLOP/s':>14}{'HBM GB/s':>10}{'link':>7}{'network GB/s':>14}")
    for name, c in specs.items():
        g = c.gpu
        row = f"{name:18}{c.gpus_per_node:>10}{g.memory_gib:>8g}{g.bf16_tflops:>14g}{g.hbm_gbps:>10g}{g.link_gbps:>7g}"
        print(f"{row}{c.inter_node_gbps:>14g}")


def validate(
    files: Annotated[
        list[Path] | None, typer.Argument(help="files of measurements (default: the shipped ones)")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Recompute published measurements and print the errors."""
    from cost_models.validation.validation_report import run_validate

    raise typer.Exit(run_validate(files, as_json))


def schema() -> None:
    """Print the JSON Schema of a plan file, for editors."""
    from plans.planfile import json_schema

    print(json.dumps(json_schema(), indent=2))


def doctor(
    speeds: Annotated[bool, typer.Option("--speeds/--no-speeds", help="measure memory and links, some seconds")] = True,
    as_json: AsJson = False,
) -> None:
    """Say what this machine has and can run, with a hint where something lacks."""
    from planner.doctor.command import doctor_command

    raise typer.Exit(doctor_command(speeds=speeds, as_json=as_json))


COMMANDS = (models, clusters, doctor, validate, schema)
