"""What the runtime around the models costs: a GRPO iteration under its executor, with records, metrics and reward
processes, against the same computations in a plain loop. CPU seconds of one process, both sides in turn.

    bench_overhead.py [--prompts 4] [--group 4] [--tokens 32] [--response 32] [--repeats 5] [--weights FOLDER]

SmolLM2-135M in fp32, one thread, one rank. The plain loop calls the same generation, scoring and optimizer step with
models of its own, and the reward in its own process.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from bench_grpo import BETA, LR, letters, our_side, prompt_texts
from one_process import CPU, add_weights, one_process
from transformers import AutoTokenizer

from plans.huggingface import spec_from_folder
from plans.layout import Layout
from runtime.algorithms.losses import Clip, Loss, kl_loss, policy_loss
from runtime.generation.generate import FlightLimits, generate
from runtime.generation.sampling import Sampling
from runtime.groups import GroupCache
from runtime.models.model import Model, build_model
from runtime.passes.forward import TokenOutput, token_logprobs
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer
from runtime.reports.monitor import Monitor
from runtime.weights.hf import load_weights


class PlainLoop:
    """GRPO without an executor: the same functions, one after the other."""

    def __init__(self, folder: Path, texts: Sequence[str], group: int, response: int) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.texts, self.group, self.response = texts, group, response
        self.trainer = Trainer(_loaded(folder), AdamSettings(lr=LR, beta2=0.999))
        self.reference = _loaded(folder)

    def iteration(self, number: int, prompts: int) -> float:
        """One iteration on the next prompts; its gradient norm."""
        texts = [text for text in self.texts[number * prompts :][:prompts] for _ in range(self.group)]
        rows = range(len(texts))
        made = generate(
            self.trainer.model, self.tokenizer(texts)["input_ids"], rows, response_tokens=[self.response] * len(texts),
            sampling=Sampling(), seed=0, iteration=number, limits=FlightLimits(slots=len(texts)),
        )  # fmt: skip
        sequences, old = made.sequences, made.logprobs
        reference = token_logprobs(self.reference, sequences, micro_batches=[list(rows)])
        decoded = [(self.tokenizer.decode(a), self.tokenizer.decode(b)) for a, b in sequences.texts()]
        scores = torch.tensor(letters(*zip(*decoded, strict=True))).view(-1, self.group)
        advantages = (scores - scores.mean(1, keepdim=True)) / (scores.std(1, keepdim=True) + 1e-6)
        lengths = torch.tensor(sequences.responses)
        tokens = float(lengths.sum())
        fields = {"old": old, "reference": reference, "advantages": advantages.flatten().repeat_interleave(lengths)}

        def loss(output: TokenOutput, batch: Batch) -> Loss:
            clipped, terms = policy_loss(
                output.logprobs, batch["old"], batch["advantages"], Clip(0.2, 0.2), 1 / tokens, tokens=tokens
            )
            kl, _ = kl_loss(output.logprobs, batch["reference"], 1 / tokens)
            return clipped + BETA * kl, {**terms, "entropy": output.entropy.sum() / tokens}

        return self.trainer.step(Batch(sequences, fields), loss, [list(rows)]).grad_norm


def _loaded(folder: Path) -> Model:
    layout = Layout(spec_from_folder(folder), (0,))
    model = build_model(layout, GroupCache(CPU).collection(layout), device=CPU)
    load_weights(model, folder)
    return model


def main() -> None:
    """Measure both sides and print their medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, number in {"prompts": 4, "group": 4, "tokens": 32, "response": 32, "repeats": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=number)
    add_weights(parser)
    options = parser.parse_args()
    with one_process(options.weights) as folder, tempfile.TemporaryDirectory() as scratch:
        ours, plain = measure(folder, Path(scratch), options)
    print(
        f"an iteration of {options.prompts} x {options.group}: {ours:.2f} CPU seconds under the executor, {plain:.2f}"
        f" in a plain loop: {ours / plain:.3f} x"
    )


def measure(folder: Path, scratch: Path, options: argparse.Namespace) -> tuple[float, float]:
    """Median CPU seconds of an iteration of both sides; the first of each does not count."""
    rounds = options.repeats + 1
    texts = prompt_texts(folder, options.prompts * rounds, options.tokens)
    lengths = [options.response] * options.prompts * options.group
    executor, plan = our_side(folder, scratch, texts, options.tokens, lengths, options.group, tailed=False)
    loop = PlainLoop(folder, texts, options.group, options.response)
    times: list[tuple[float, float]] = []
    with Monitor(plan, rounds, scratch, scratch):
        for number in range(rounds):
            began = time.process_time()
            executor.run(number + 1, number)
            between = time.process_time()
            loop.iteration(number, options.prompts)
            times.append((between - began, time.process_time() - between))
    ours, plain = (statistics.median(side) for side in zip(*times[1:], strict=True))
    return ours, plain


if __name__ == "__main__":
    main()
