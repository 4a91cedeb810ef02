"""Time a training step on packed samples against a plain Hugging Face loop over the same samples.

One process, one thread, float32, CPU seconds, both sides in turn in one run. Cases: samples of long-tailed lengths, one
per forward pass in the plain loop; the same samples filled up to the longest, which is what padding would cost; and
samples of equal length, with 1 and 4 micro-batches, where the plain loop computes its head on all columns.

    python scripts/bench_training.py --weights FOLDER [--samples 16] [--tokens 128] [--repeats 5]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import torch
import torch.distributed as dist
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from plans.batches import packs
from plans.huggingface import spec_from_folder
from plans.layout import Layout
from runtime.algorithms.losses import Loss
from runtime.algorithms.offline import sft_loss
from runtime.groups import GroupCache
from runtime.models.installation import install
from runtime.models.model import build_model
from runtime.passes.forward import TokenOutput
from runtime.passes.optimizer import AdamSettings
from runtime.passes.packs import Batch
from runtime.passes.training import Trainer
from runtime.sequences import Sequences
from runtime.weights.hf import load_weights
from runtime.weights.smollm import prepare_smollm2

CPU = torch.device("cpu")
PROMPT = 8
LR = 1e-5


class Sides:
    """The runtime's trainer and a plain loop on the same weights."""

    def __init__(self, folder: Path) -> None:
        layout = Layout(spec_from_folder(folder), (0,))
        model = build_model(layout, GroupCache(CPU).collection(layout), device=CPU)
        load_weights(model, folder)
        self.vocab = layout.spec.vocab
        self.trainer = Trainer(model, AdamSettings(lr=LR))
        self.plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
        self.plain.train()
        self.adam = torch.optim.AdamW(self.plain.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0)

    def packed(self, sequences: Sequences, parts: Sequence[Sequence[int]]) -> float:
        """A step of the runtime; its loss."""
        tokens = float(sum(sequences.responses))

        def loss(output: TokenOutput, _: Batch) -> Loss:
            return sft_loss(output.logprobs, tokens)

        return self.trainer.step(Batch(sequences, {}), loss, parts).terms["loss"]

    def looped(self, sequences: Sequences, parts: Sequence[Sequence[int]]) -> float:
        """A step of the plain loop, whose forward passes take samples of one length; its loss."""
        tokens, total = sum(sequences.responses), 0.0
        self.adam.zero_grad()
        texts = sequences.texts()
        for part in parts:
            ids = torch.tensor([texts[i][0] + texts[i][1] for i in part])
            labels = ids.clone()
            labels[:, : len(texts[part[0]][0])] = -100
            logits = self.plain(ids).logits[:, :-1]
            loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum") / tokens
            loss.backward()
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(self.plain.parameters(), 1.0)
        self.adam.step()
        return total


def cpu_seconds(work: Callable[[], float]) -> tuple[float, float]:
    """CPU seconds of a step, and its loss."""
    start = time.process_time()
    loss = work()
    return time.process_time() - start, loss


def compare(name: str, repeats: int, ours: Callable[[], float], theirs: Callable[[], float]) -> None:
    """Print both sides and their ratio; the first round, which touches memory for the first time, does not count."""
    found: list[tuple[float, float]] = []
    for turn in range(repeats + 1):
        (a, loss), (b, other) = cpu_seconds(ours), cpu_seconds(theirs)
        if turn:
            found.append((a, b))
        else:
            print(f"{name}: first loss {loss:.5f} and {other:.5f}", flush=True)
    a, b = (median(side) for side in zip(*found, strict=True))
    print(f"{name}: {a:.2f} s and {b:.2f} s of CPU time, {a / b:.3f} x", flush=True)


def lengths(count: int, longest: int, seed: int = 0) -> list[int]:
    """Response lengths whose mean is about a quarter of the longest, which is among them."""
    draw = random.Random(seed)
    found = [max(1, min(longest, round(longest / 4 * draw.lognormvariate(-0.35, 0.85)))) for _ in range(count - 1)]
    return [longest, *found]


def samples(responses: Sequence[int], prompt: int, vocab: int) -> Sequences:
    """Random samples."""
    generator = torch.Generator().manual_seed(0)
    total = sum(responses) + prompt * len(responses)
    tokens = torch.randint(vocab, (total,), generator=generator)
    return Sequences(tokens, (prompt,) * len(responses), tuple(responses))


def main() -> None:
    """Run the cases."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--weights", type=Path, required=True, help="a Hugging Face folder; SmolLM2 is put there if new"
    )
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="longest sample")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    install(CPU)
    with tempfile.TemporaryDirectory() as scratch:
        store = dist.FileStore(f"{scratch}/store", 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        run(Sides(prepare_smollm2(options.weights)), options.samples, options.tokens, options.repeats)
        dist.destroy_process_group()


def run(sides: Sides, count: int, tokens: int, repeats: int) -> None:
    """All comparisons."""
    tail = lengths(count, tokens - PROMPT)
    real = samples(tail, PROMPT, sides.vocab)
    singles = [[i] for i in range(count)]
    parts = packs(real.lengths, 4 * tokens)
    compare(
        "long tail: packed, plain loop", repeats, lambda: sides.packed(real, parts), lambda: sides.looped(real, singles)
    )
    filled = samples([tokens - PROMPT] * count, PROMPT, sides.vocab)
    whole = packs(filled.lengths, 4 * tokens)
    share = sum(real.lengths) / sum(filled.lengths)
    compare(
        f"long tail: packed, filled up ({share:.3f} of the tokens)",
        repeats,
        lambda: sides.packed(real, parts),
        lambda: sides.packed(filled, whole),
    )
    equal = samples([tokens - 1] * count, 1, sides.vocab)
    for cuts in (1, 4):
        even = [list(range(count))[at::cuts] for at in range(cuts)]
        compare(
            f"equal lengths, {cuts} micro-batches: packed, plain loop",
            repeats,
            lambda even=even: sides.packed(equal, even),  # type: ignore[misc]
            lambda even=even: sides.looped(equal, even),  # type: ignore[misc]
        )


if __name__ == "__main__":
    main()
