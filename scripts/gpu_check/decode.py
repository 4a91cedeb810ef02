"""Decode and prefill: bytes that a step must read over the copy rate, and `transformers` beside it."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from typing import Any

from gpu_check.ceilings import copy_bytes_per_s
from gpu_check.rows import Case, Row, Skip, judged
from gpu_check.setting import FIXTURE, Setting
from gpu_check.shapes import SHAPES, fitting_layers, layers_of, model_alone, precision
from plans.kvcache import BURST_STEPS
from plans.model import ModelSpec

LAYERS, STEPS = 8, 48
DEGREES = (1, 4, 8)
BATCHES = (1, 64, 16, 256)
CONTEXTS = (512, 4096)
LEAST_SHARE = 0.70
"""Of the copy ceiling, at batch 1 and 64."""
SLOWEST = 1.05
"""Time over that of `transformers.generate`."""


def step_bytes(spec: ModelSpec, rows: int, context: int, element: int) -> float:
    """Bytes that one decoding step reads: every weight but the embedding, and keys and values of every row."""
    weights = spec.params - spec.padded_vocab * spec.hidden * (not spec.tied_embeddings)
    cache = 2 * spec.layers * spec.kv_heads * spec.head_dim * context
    return float(element * (weights + rows * cache))


def generation(
    model: Any,
    rows: int,
    context: int,
    steps: int,
    *,
    burst: int = BURST_STEPS,
    capture: bool = True,
    ended: Any = None,
) -> Any:
    """A generation of `steps` tokens after random prompts, to be called."""
    import torch

    from runtime.generation.generate import FlightLimits, generate
    from runtime.generation.sampling import Sampling

    prompts = torch.randint(model.spec.vocab, (rows, context)).tolist()
    limits = FlightLimits(burst=burst, capture=capture, allow_long=True)
    words = {"sampling": Sampling(), "seed": 0, "iteration": 0, "limits": limits, "ended": ended}
    return lambda: generate(model, prompts, range(rows), response_tokens=steps, **words)


def seconds_of(setting: Setting, run: Any) -> float:
    """Seconds until an operation and its work on the device are done."""
    import torch

    began = time.perf_counter()
    run()
    if setting.kind == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _shape(shape: str, tp: int) -> Case:
    def run(setting: Setting) -> Iterator[Row]:
        if setting.tiny and shape != next(iter(SHAPES)):
            raise Skip("a rehearsal measures one shape")
        wanted = layers_of(setting, shape, tp, LAYERS, small_vocabulary=False)
        spec = fitting_layers(wanted, precision(setting).itemsize, setting)
        ceiling = copy_bytes_per_s(setting)
        with model_alone(setting, spec) as model:
            generation(model, 1, 16, 4)()  # compiles and loads kernels
            for context in setting.pick(CONTEXTS, (16,)):
                for rows in setting.pick(BATCHES, (1, 4)):
                    case = f"{shape} tp {tp}, batch {rows}, context {context}"
                    yield from _point(setting, model, case, rows, context, ceiling)

    return Case(f"{shape} tp {tp}", run, needs_s=5.0 if tp > 1 else 0.0)


def _point(setting: Setting, model: Any, case: str, rows: int, context: int, ceiling: float) -> Iterator[Row]:
    """Prefill out of a generation of one token, a step out of the later bursts of a longer one."""
    import torch

    element = precision(setting).itemsize
    cache = step_bytes(model.spec, rows, context + STEPS, element)
    if setting.kind == "cuda" and cache > 0.8 * torch.cuda.mem_get_info()[0]:
        yield Row(case=case, verdict="skipped", note=f"its cache of {cache / 2**30:.0f} GiB does not fit")
        return
    if setting.left_s < setting.pick(4.0, 0.0):
        yield Row(case=case, verdict="skipped", note="no time is left")
        return
    first = context == setting.pick(CONTEXTS, (16,))[0]
    step = _step_seconds(setting, model, rows, context)
    note = f"{step * 1e3:.3f} ms a step"
    if first:
        prefill = seconds_of(setting, generation(model, rows, context, 1))
        note += f"; prefill {rows * context / prefill:,.0f} tokens/s"
    rate = step_bytes(model.spec, rows, context, element) / step
    goal = LEAST_SHARE if setting.kind == "cuda" and rows in (1, 64) else None
    yield (
        judged(f"{case}: share of the copy ceiling", rate / ceiling, "", least=goal, note=note)
        if goal
        else Row(case=f"{case}: share of the copy ceiling", value=rate / ceiling, note=note)
    )
    if rows == 1 and first:
        eager = _step_seconds(setting, model, rows, context, capture=False)
        yield Row(case=f"{case}: uncaptured step over captured step", value=eager / step)


def _step_seconds(setting: Setting, model: Any, rows: int, context: int, *, capture: bool = True) -> float:
    """Median seconds of a step in the bursts of a generation behind the first, which runs uncaptured after the prefill,
    and the second, which records. A burst has ended when its tokens are read, which waits for the device."""
    burst, steps = setting.pick((BURST_STEPS, STEPS), (2, 10))
    read: dict[int, float] = {}

    def ended(_: object, old: int) -> None:
        read.setdefault(old, time.perf_counter())

    generation(model, rows, context, steps, burst=burst, capture=capture, ended=ended)()
    times = list(read.values())
    return median((after - before) / burst for before, after in pairwise(times[1:]))


def _against_transformers(setting: Setting) -> Iterator[Row]:
    """Greedy generation on the same weights: the tokens, and the time of the second run of each."""
    import torch

    if importlib.util.find_spec("transformers") is None:
        raise Skip("transformers is not installed")
    from profiler.alone import alone
    from runtime.generation.generate import generate
    from runtime.generation.sampling import Sampling
    from runtime.models.model import build_model
    from runtime.weights.hf import load_weights

    folder, spec = _weights(setting)
    rows, context, steps = setting.pick((16, 512, 64), (4, 16, 8))
    device, dtype = setting.device, precision(setting)
    prompts = torch.randint(3, spec.vocab, (rows, context), generator=torch.Generator().manual_seed(0)).to(device)
    with alone(device) as groups, torch.inference_mode():
        from plans.layout import Layout

        layout = Layout(spec, (0,))
        model = build_model(layout, groups.collection(layout), dtype=dtype, device=device)
        load_weights(model, folder)
        words = {"sampling": Sampling(temperature=0), "seed": 0, "iteration": 0}
        found: list[Any] = []

        def ours() -> None:
            made = generate(model, prompts.tolist(), range(rows), response_tokens=steps, **words)
            found[:] = [made.sequences.tokens.view(rows, -1)[:, context:]]

        mine = [seconds_of(setting, ours) for _ in range(2)][1]
        wanted, its = _theirs(setting, folder, prompts, steps)
    case = f"transformers.generate, batch {rows}, context {context}"
    yield _same_tokens(case, found[0], wanted, dtype)
    time_ratio, note = mine / its, f"{mine:.3f} s and {its:.3f} s"
    if setting.kind == "cuda":
        yield judged(f"{case}: time over theirs", time_ratio, "", most=SLOWEST, note=note)
    else:
        yield Row(case=f"{case}: time over theirs", value=time_ratio, note=note)


def _same_tokens(case: str, found: Any, wanted: Any, dtype: Any) -> Row:
    """The share of rows whose tokens are the same; float32 alone promises all of them."""
    import torch

    same, case = float((found == wanted).all(1).float().mean()), f"{case}: rows with the same tokens"
    if dtype is torch.float32:
        return judged(case, same, "", least=1.0)
    return Row(case=case, value=same, note="bf16 parts ways where logits are close")


def _theirs(setting: Setting, folder: Any, prompts: Any, steps: int) -> tuple[Any, float]:
    """What `transformers` generates after prompts [rows, context], and the seconds of its second run."""
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder, dtype=precision(setting)).to(setting.device).eval()
    model.generation_config.eos_token_id = None  # both go on to the last token
    options = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    made: list[Any] = []

    def theirs() -> None:
        found = model.generate(prompts, attention_mask=torch.ones_like(prompts), **options)
        made[:] = [found[:, prompts.shape[1] :]]

    seconds = [seconds_of(setting, theirs) for _ in range(2)][1]
    return made[0], seconds


def _weights(setting: Setting) -> tuple[Any, ModelSpec]:
    """A folder of weights: the fixture's, or eight random layers of the 7B shape written once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from plans.library import load_model

    if setting.tiny:
        return FIXTURE, load_model(str(FIXTURE))
    folder = setting.output / "decode" / "7B"
    if not (folder / "config.json").exists():
        spec = load_model(SHAPES["7B"])
        config = LlamaConfig(
            hidden_size=spec.hidden, intermediate_size=spec.ffn, num_hidden_layers=LAYERS,
            num_attention_heads=spec.heads, num_key_value_heads=spec.kv_heads, vocab_size=spec.vocab,
            max_position_embeddings=4096, rms_norm_eps=spec.norm_eps, tie_word_embeddings=False,
        )  # fmt: skip
        with setting.device:
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder, load_model(str(folder))


CASES = (
    *(_shape(shape, 1) for shape in SHAPES),
    Case("transformers", _against_transformers, needs_s=0.0),
    *(_shape(shape, tp) for tp in DEGREES[1:] for shape in SHAPES),
)
