"""Weights of machines that do not have their folder: what their ranks read comes from one that has it, and no more."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from plan_cases import tiny_plan, tiny_run
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from plans.errors import RealplanError
from plans.huggingface import spec_from_folder
from plans.layout import Layout, model_units
from runtime.machines.files import FileServer
from runtime.machines.loading import holders, spread_weights
from runtime.machines.machines import Machines
from runtime.machines.named import weight_folders
from runtime.machines.station import Station
from runtime.machines.weights import WeightFolders
from runtime.machines.wire import Pace
from runtime.processes.member import Address
from runtime.processes.network import free_port
from runtime.weights.hf_files import WeightFiles
from runtime.weights.hf_names import hf_names, hf_shape
from runtime.weights.hf_parts import join

HOST = "127.0.0.1"
VOCABULARY = ("embedding.word", "output_layer")
POISON = b"\xff"
"""Of a hole: no number in any float format."""


def read(folder: Path, layout: Layout, rank: int) -> dict[str, torch.Tensor]:
    """What a rank loads, tensor by tensor."""
    files, units = WeightFiles(folder), {unit.name: unit for unit in model_units(layout.spec)}
    found = {}
    for unit in layout.rank_units(rank):
        for p in units[unit].parameters:
            parts = [files.tensor(n, hf_shape(layout.spec, p, i)) for i, n in enumerate(hf_names(layout.spec, p.name))]
            found[p.name] = join(layout.spec, p, parts, layout.tp, layout.places[rank].tp)
    return found


@pytest.mark.parametrize("kind", ["llama", "five", "glm4", "phi3", "qwen3-moe", "scaled"])
@pytest.mark.parametrize("degrees", ["d2 t1 p1", "d1 t1 p2"])
def test_a_machine_fetches_what_its_rank_reads(kind: str, degrees: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    tiny_model("llama" if kind == "scaled" else kind).save_pretrained(there)
    if kind == "scaled":
        scale_projections(there)
    plan = tiny_plan(2, degrees, nodes=2, algorithm="sft", order=("actor_train",))
    spec = replace(spec_from_folder(there), name="other")
    plan = replace(plan, workload=replace(plan.workload, models={"actor": spec}))
    run, layout = tiny_run(tmp_path / "out", weights=str(there)), plan.layout("actor_train")
    with closing(FileServer(HOST, tmp_path)) as server:
        here = WeightFolders(run, server, 0).describe()["folders"]["0"]
        for rank in range(2):
            ours = WeightFolders(run, server, rank)
            come = ours.fetch(plan, [rank], {"0": here | {"sources": [server.source]}})["bytes"]
            place = Path(ours.placed[str(there)])
            assert place == tmp_path / "out" / f".weights-{rank}" / "0"
            poison_holes(place, ours)
            wanted = read(there, layout, rank)
            for name, tensor in read(place, layout, rank).items():
                assert torch.equal(tensor, wanted[name]), name
            beside = sum(here["small"].values()) + headers(there)
            if kind != "scaled":  # padding of the vocabulary is in no file
                padding = sum(t.numel() for name, t in wanted.items() if name.startswith(VOCABULARY)) * 4 * 6 // 256
                assert come - beside == 4 * sum(t.numel() for t in wanted.values()) - padding
            again = ours.fetch(plan, [rank], {"0": here | {"sources": []}})["bytes"]
            assert again == 0, "what is there is not fetched again"
            ours.close()
    assert not (tmp_path / "out").exists()


def headers(folder: Path) -> int:
    """Bytes of the files that are in no tensor."""
    return sum(
        path.stat().st_size - sum(t.nbytes for t in load_file(path).values()) for path in folder.glob("*.safetensors")
    )


def scale_projections(folder: Path) -> None:
    """Write the projections of a folder in float8, with a scale per row."""
    held = load_file(folder / "model.safetensors")
    for name in [name for name in held if "_proj" in name]:
        scales = held[name].abs().amax(1, keepdim=True) / 448
        held[name], held[f"{name}_scale"] = (held[name] / scales).to(torch.float8_e4m3fn), scales
    save_file(held, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    (folder / "config.json").write_text(json.dumps(config))


def poison_holes(place: Path, folders: WeightFolders) -> None:
    """Overwrite what was not fetched of the files with tensors."""
    for path in place.glob("*.safetensors"):
        content = path.read_bytes()
        poisoned = bytearray(POISON * len(content))
        for start, stop in folders._held[path]:
            poisoned[start:stop] = content[start:stop]
        path.write_bytes(poisoned)


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Machines]:
    """The first of two machines, with its own station."""
    found = Machines(Address(HOST, free_port(HOST)), 2, {}, Pace(0.1, 2.0))
    with Station(tiny_run(tmp_path / "first", weights=str(tmp_path / "w")), HOST, found.say, tmp_path) as station:
        found.settle(station)
        yield found
        found.close("", done=True)


def test_weights_that_no_machine_has(alone: Machines, tmp_path: Path) -> None:
    plan, run = tiny_plan(2, "d2 t1 p1", nodes=2), tiny_run(tmp_path / "first", weights=str(tmp_path / "w"))
    with pytest.raises(RealplanError, match=r"weights `.*w`: no machine has it; there are node 0"):
        spread_weights(alone, run, plan, {0: [0]}, 60.0)
    tiny_model("llama").save_pretrained(tmp_path / "w")
    spread_weights(alone, run, plan, {0: [0]}, 60.0)


def test_other_weights_of_the_same_shape_are_refused(alone: Machines, tmp_path: Path) -> None:
    found = {}
    for node in range(3):
        folder = tmp_path / str(node)
        tiny_model("llama").save_pretrained(folder)
        if node == 2:
            held = load_file(folder / "model.safetensors")
            save_file(
                {name: 2 * tensor for name, tensor in held.items()}, folder / "model.safetensors", {"format": "pt"}
            )
        with closing(FileServer(HOST, tmp_path)) as server:
            run = tiny_run(tmp_path / "out", weights=str(folder))
            found[node] = WeightFolders(run, server, node).describe()["folders"]
    assert found[0] == found[1] and found[0]["0"]["tensors"] == found[2]["0"]["tensors"]
    assert holders(alone, {node: found[node] for node in (0, 1)} | {3: {}}, "0", "weights `w`") == [0, 1]
    with pytest.raises(RealplanError, match=r"weights `w`: node 2 has other files than node 0"):
        holders(alone, found, "0", "weights `w`")


def test_folders_have_the_same_numbers_everywhere(tmp_path: Path) -> None:
    run = tiny_run(tmp_path, weights={"actor": "b", "critic": "a", "ref": "b", "reward": "random"})
    assert weight_folders(run) == ["b", "a"] and weight_folders(tiny_run(tmp_path, weights="random")) == []
