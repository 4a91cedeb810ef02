"""Which tensors of a Hugging Face folder ranks read when a run starts: of a machine that does not have the folder these
travel, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from plans.flat_tensors import ByteRange, joined_ranges, tensor_places
from plans.layout import Layout, model_units
from plans.plan import ExecutionPlan
from plans.program import Copy, compile_program
from plans.runfile import RunFile
from runtime.weights.hf_files import VALUE_HEADS, WeightFiles
from runtime.weights.hf_names import SCORE, hf_names


def filled(plan: ExecutionPlan, copy: Copy, *, resumed: bool) -> bool:
    """Whether a copy begins with the weights of a folder: a home, where no checkpoint has them (`resumed`: the run goes
    on from one, which has what is trained), and with adapters every copy, whose base is in no checkpoint."""
    trained = copy.role in plan.workload.graph.trainers
    return copy.layout.spec.lora is not None or (copy.home and not (resumed and trained))


def needed_pieces(
    plan: ExecutionPlan, run: RunFile, folder: str, ranks: Sequence[int], here: Path, *, resumed: bool = False
) -> dict[str, list[ByteRange]]:
    """By file the bytes that some ranks of a machine read of a folder of weights, ascending, in as few runs as can be.
    here: a folder like it, of whose files the headers need be there. resumed: the run goes on from a checkpoint. Raises
    WeightsError.

    Tensors are whole, because all tensor ranks of a replica are on one machine.
    """
    files = WeightFiles(here, "np")
    copies = [c for c in compile_program(plan).copies if filled(plan, c, resumed=resumed)]
    layouts = [copy.layout for copy in copies if run.weights_of(copy.role) == folder]
    readers = [(layout, rank) for layout in layouts for rank in ranks if rank in layout.ranks]
    names = {name for layout, rank in readers for name in _tensors(files, layout, rank)}
    places = {file: tensor_places(here / file) for file in set(files.files.values())}
    pieces: dict[str, list[ByteRange]] = {}
    for name in names:
        file = files.files[name]
        pieces.setdefault(file, []).append(places[file][name])
    return {file: joined_ranges(found) for file, found in pieces.items()}


def _tensors(files: WeightFiles, layout: Layout, rank: int) -> Iterator[str]:
    """The tensors of which `load_weights` takes a part for a rank of a layout, and their scales."""
    spec, units = layout.spec, {unit.name: unit for unit in model_units(layout.spec)}
    for parameter in (p for unit in layout.rank_units(rank) for p in units[unit].parameters if not p.adapter):
        names = hf_names(spec, parameter.name)
        for name in VALUE_HEADS if names == (SCORE,) else names:
            found = files.find(name)
            if found is not None:  # a value head may be missing
                yield found
                if scale := files.scale_of(found):
                    yield scale
