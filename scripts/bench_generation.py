"""Generation against transformers on one core, in CPU seconds, both sides in one run.

    bench_generation.py [--only equal tail group host ...] [--repeats 5] [--response 128] [--folder FOLDER]

equal: prompts of 64 tokens, responses of equal forced length, batches of 1, 16 and 64. tail: forced lengths from a long
tail (mean a quarter of the longest), 64 prompts through 16 slots against all 64 in one batch of transformers. group:
eight samples of one prompt of 512 tokens against one. host: time per decoding step and layer at hidden size 64, where
arithmetic is nothing. Weights are those of SmolLM2-135M in fp32, written to FOLDER where they are missing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from scipy.stats import lognorm
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from plans.huggingface import spec_from_folder
from plans.layout import Layout
from profiler.alone import alone
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.sampling import Sampling
from runtime.models.model import Model, build_model
from runtime.weights.hf import load_weights
from runtime.weights.smollm import prepare_smollm2

PROMPT, GROUP, GROUP_PROMPT, SLOTS, TAILED = 64, 8, 512, 16, 64
BATCHES = (1, 16, 64)
HOST_LAYERS, HOST_STEPS = (4, 24), 64
CPU = torch.device("cpu")


def main() -> None:
    """Measure what was asked for and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--repeats", type=int, default=5, help="runs of each side, in turn; medians are printed")
    parser.add_argument("--response", type=int, default=128, help="longest response, tokens")
    parser.add_argument("--batch", type=int, nargs="*", default=list(BATCHES), help="batches of `equal`")
    parser.add_argument("--folder", type=Path, default=Path("runs/weights/smollm2-135m-instruct"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in options.only:
        for line in CASES[name](options):
            print(line, flush=True)


def medians(repeats: int, *sides: Callable[[], object]) -> list[float]:
    """Median CPU seconds of each side, run in turn after one run of each that does not count."""
    times: list[list[float]] = [[] for _ in sides]
    for repeat in range(repeats + 1):
        for side, found in zip(sides, times, strict=True):
            began = time.process_time()
            side()
            if repeat:
                found.append(time.process_time() - began)
    return [statistics.median(found) for found in times]


@contextmanager
def both(folder: Path) -> Iterator[tuple[Model, Any]]:
    """The weights of a folder as our model and as that of transformers, fp32."""
    other = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with alone(CPU) as groups:
        layout = Layout(spec_from_folder(folder), (0,))
        model = build_model(layout, groups.collection(layout), device=CPU)
        load_weights(model, folder)
        yield model, other


def ours(
    model: Model, prompts: Sequence[Sequence[int]], lengths: int | Sequence[int], limits: FlightLimits | None = None
) -> Callable[[], object]:
    """A generation of ours with forced lengths."""
    words = {"sampling": Sampling(temperature=0), "seed": 0, "iteration": 0}
    return lambda: generate(model, prompts, range(len(prompts)), response_tokens=lengths, limits=limits, **words)


def theirs(model: Any, prompts: Sequence[Sequence[int]], length: int) -> Callable[[], object]:
    """A generation of transformers of one forced length."""
    ids = torch.tensor(prompts)
    words = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 0}
    return lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **words)


def random_prompts(vocab: int, count: int, tokens: int) -> list[list[int]]:
    """Prompts that differ."""
    made = torch.randint(5, vocab, (count, tokens), generator=torch.Generator().manual_seed(0))
    return [list(row) for row in made.tolist()]


def long_tail(count: int, longest: int) -> list[int]:
    """Lengths of a log-normal tail cut off at `longest`, whose mean is a quarter of it, in a random order."""
    quantiles = lognorm.ppf([(i + 0.5) / count for i in range(count)], 1.0)
    low, high = 0.0, float(longest)
    for _ in range(60):
        middle = (low + high) / 2
        mean = sum(min(longest, middle * q) for q in quantiles) / count
        low, high = (middle, high) if mean < longest / 4 else (low, middle)
    lengths = [max(1, min(longest, round(low * q))) for q in quantiles]
    lengths[-1] = longest
    random.Random(0).shuffle(lengths)
    return lengths


def equal(options: argparse.Namespace) -> Iterator[str]:
    """Equal lengths."""
    with both(prepare_smollm2(options.folder)) as (model, other):
        for batch in options.batch:
            prompts = random_prompts(model.spec.vocab, batch, PROMPT)
            mine, its = medians(
                options.repeats, ours(model, prompts, options.response), theirs(other, prompts, options.response)
            )
            tokens = batch * options.response
            yield (
                f"equal, batch {batch}: {tokens / mine:.1f} tokens per CPU second, transformers {tokens / its:.1f}:"
                f" {its / mine:.2f} x"
            )


def tail(options: argparse.Namespace) -> Iterator[str]:
    """Long-tailed lengths."""
    lengths = long_tail(TAILED, options.response)
    with both(prepare_smollm2(options.folder)) as (model, other):
        prompts = random_prompts(model.spec.vocab, TAILED, PROMPT)
        mine, its = medians(
            options.repeats,
            ours(model, prompts, lengths, FlightLimits(slots=SLOTS)),
            theirs(other, prompts, max(lengths)),
        )
    tokens = sum(lengths)
    yield (
        f"tail, {TAILED} prompts, mean {tokens / TAILED:.1f} of {max(lengths)} tokens: {tokens / mine:.1f} useful ones"
        f" per CPU second in {SLOTS} slots, transformers {tokens / its:.1f} in one batch: {its / mine:.2f} x"
    )


def group(options: argparse.Namespace) -> Iterator[str]:
    """Samples that share a prompt."""
    with both(prepare_smollm2(options.folder)) as (model, _):
        prompt = random_prompts(model.spec.vocab, 1, GROUP_PROMPT)
        many, one = medians(options.repeats, ours(model, prompt * GROUP, 1), ours(model, prompt, 1))
    yield (
        f"group, {GROUP} samples of one prompt of {GROUP_PROMPT} tokens: {many:.2f} CPU seconds, one sample {one:.2f}:"
        f" {many / one:.2f} x"
    )


def host(options: argparse.Namespace) -> Iterator[str]:
    """Time per decoding step and layer without arithmetic: the difference between a deep and a shallow model."""
    found = []
    for layers in HOST_LAYERS:
        with TemporaryDirectory() as folder:
            config = LlamaConfig(
                hidden_size=64, intermediate_size=128, num_hidden_layers=layers, num_attention_heads=4,
                num_key_value_heads=2, vocab_size=256, max_position_embeddings=512,
            )  # fmt: skip
            LlamaForCausalLM(config).save_pretrained(folder)
            with both(Path(folder)) as (model, other):
                prompts = random_prompts(256, 1, 16)
                found.append(
                    medians(options.repeats, ours(model, prompts, HOST_STEPS), theirs(other, prompts, HOST_STEPS))
                )
    more = (HOST_LAYERS[1] - HOST_LAYERS[0]) * HOST_STEPS
    mine, its = ((deep - shallow) / more * 1e6 for shallow, deep in zip(*found, strict=True))
    yield f"host: {mine:.0f} microseconds per step and layer, eager transformers {its:.0f}: {mine / its:.2f} x"


CASES: dict[str, Callable[[argparse.Namespace], Iterator[str]]] = {
    "equal": equal,
    "tail": tail,
    "group": group,
    "host": host,
}


if __name__ == "__main__":
    main()
