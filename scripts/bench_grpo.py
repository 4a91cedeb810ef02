"""GRPO iterations against TRL's GRPOTrainer: CPU seconds of one thread, both sides in turn in one process.

    bench_grpo.py [--only long equal tail] [--prompts 8] [--group 8] [--repeats 5] [--weights FOLDER]

long: prompts of 256 tokens, responses of 128. equal: 32 and 128. tail: the same with lengths forced from a long tail
(mean a quarter of the longest). Generation, a reward that counts letters, the reference model and one optimizer step
on SmolLM2-135M in fp32; what takes seconds on either side is the model. Needs the extra `bench`.
"""

from __future__ import annotations

import argparse
import functools
import inspect
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bench_generation import long_tail
from one_process import CPU, add_weights, one_process
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, TrainerCallback

from plans.algorithms import algorithm_graph
from plans.huggingface import spec_from_folder
from plans.library import load_cluster
from plans.plan import ExecutionPlan, PlannedCall
from plans.runfile import RunFile
from plans.strategy import ParallelStrategy
from plans.workload import Workload
from runtime.calls import forward_calls
from runtime.executor import Executor
from runtime.generation.generate import generate
from runtime.groups import GroupCache
from runtime.job import prepare_job
from runtime.reports.records import Recorder

CASES = {"long": (256, 128, False), "equal": (32, 128, False), "tail": (32, 128, True)}
"""Prompt tokens, longest response, and whether lengths have a long tail."""
LR, BETA, SLOTS, ROWS = 1e-6, 0.04, 16, 16


def letters(prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
    """The reward: the share of letters in a response."""
    return [sum(c.isalpha() for c in text) / max(1, len(text)) for text in completions]


def main() -> None:
    """Measure the cases and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    add_weights(parser)
    options = parser.parse_args()
    with one_process(options.weights) as folder:
        for name in options.only:
            with tempfile.TemporaryDirectory() as scratch:
                times = measure(folder, Path(scratch), name, options.prompts, options.group, options.repeats)
            ours, theirs = (statistics.median(found) for found in times)
            print(
                f"{name}, {options.prompts} prompts x {options.group}: {ours:.2f} CPU seconds an iteration, TRL"
                f" {theirs:.2f}: {theirs / ours:.2f} x",
                flush=True,
            )


def measure(folder: Path, scratch: Path, name: str, prompts: int, group: int, repeats: int) -> list[list[float]]:
    """CPU seconds of iterations of ours and of TRL, which take turns; the first of each does not count."""
    tokens, longest, tailed = CASES[name]
    rows = prompts * group
    lengths = long_tail(rows, longest) if tailed else [longest] * rows
    texts = prompt_texts(folder, prompts * (repeats + 1), tokens)
    executor, _ = our_side(folder, scratch, texts, tokens, lengths, group, tailed)
    times: list[list[float]] = [[], []]

    class Turns(TrainerCallback):  # type: ignore[misc]
        """After every step of TRL's, one of ours."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.process_time()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            times[1].append(time.process_time() - self.began)
            began, done = time.process_time(), state.global_step
            executor.run(done, done - 1)
            times[0].append(time.process_time() - began)

    trainer = their_side(folder, scratch, texts, lengths, group, repeats + 1)
    trainer.add_callback(Turns())
    trainer.train()
    return [found[1:] for found in times]


def prompt_texts(folder: Path, count: int, tokens: int) -> list[str]:
    """Texts of so many tokens, all different."""
    tokenizer, draw = AutoTokenizer.from_pretrained(folder), random.Random(0)
    words = [tokenizer.decode([i]) for i in range(1000, 20000)]
    words = [word for word in words if word.startswith(" ") and word[1:].isalpha() and word.isascii()]
    texts: list[str] = []
    while len(texts) < count:
        text = "".join(draw.choices(words, k=tokens)).lstrip()
        ids = tokenizer(text)["input_ids"][:tokens]
        text = tokenizer.decode(ids)
        if len(tokenizer(text)["input_ids"]) == tokens:
            texts.append(text)
    return texts


def our_side(
    folder: Path, scratch: Path, texts: Sequence[str], tokens: int, lengths: Sequence[int], group: int, tailed: bool
) -> tuple[Executor, ExecutionPlan]:
    """An executor of a plan on one rank, with forced lengths, and the plan."""
    spec, cluster = spec_from_folder(folder), load_cluster("local-cpu", gpus=1, gpus_per_node=1)
    graph = algorithm_graph("grpo", reward_seconds_per_sample=1e-5)
    sizes: dict[str, Any] = {
        "batch_size": len(lengths) // group,
        "group_size": group,
        "minibatches": 1,
        "dtype": "fp32",
    }
    sizes |= {"prompt_tokens": tokens, "response_tokens": max(lengths)}
    workload = Workload(graph=graph, models=dict.fromkeys(graph.roles, spec), **sizes)
    whole = ParallelStrategy(micro_batch_tokens=ROWS * workload.tokens)
    slots = ParallelStrategy(slots=min(SLOTS, len(lengths)) if tailed else 0)
    planned = [
        PlannedCall(call=call.name, mesh=cluster.whole, strategy=slots if call.name == "actor_generate" else whole)
        for call in graph.model_calls
    ]
    plan = ExecutionPlan(workload=workload, cluster=cluster, calls=tuple(planned))
    data = scratch / "prompts.csv"
    data.write_text("prompt\n" + "".join(f'"{text}"\n' for text in texts))
    reward = scratch / "reward.py"  # by itself, so that the processes that compute it import nothing else
    reward.write_text(f"from __future__ import annotations\n\n{inspect.getsource(letters)}")
    settings = {"lr": LR, "clip": 1.0, "beta2": 0.999}
    run = {"weights": str(folder), "data": {"source": str(data)}, "reward": f"{reward}:letters", "actor": settings}
    run |= {"ppo": {"kl_coefficient": BETA}, "sampling": {"stop_at_eos": False}, "output": str(scratch)}
    job = prepare_job(plan, RunFile.model_validate(run | {"checkpoint": {"every": 0}}))

    def forced(model: Any, prompts: Any, rows: Sequence[int], **words: Any) -> Any:
        return generate(model, prompts, rows, **{**words, "response_tokens": [lengths[row] for row in rows]})

    forward_calls.generate = forced
    return Executor(job, GroupCache(CPU), CPU, Recorder(scratch, 0, time.time())), plan


class Forced(LogitsProcessor):  # type: ignore[misc]
    """Rows end at their lengths, and not before."""

    def __init__(self, lengths: Sequence[int], end: int) -> None:
        self.lengths, self.end, self.prompt = torch.tensor(lengths), end, -1

    def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.prompt = ids.shape[1] if self.prompt < 0 else self.prompt
        scores[:, self.end] = -torch.inf
        last = self.lengths[: len(ids)] == ids.shape[1] - self.prompt + 1
        scores[last] = -torch.inf
        scores[last, self.end] = 0.0
        return scores


def their_side(
    folder: Path, scratch: Path, texts: Sequence[str], lengths: Sequence[int], group: int, steps: int
) -> Any:
    """TRL's trainer on the same prompts, with the same lengths forced."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    plain = model.generate

    @functools.wraps(plain)
    def generate_forced(*words: Any, **named: Any) -> Any:
        return plain(*words, **named, logits_processor=[Forced(lengths, tokenizer.eos_token_id)])

    model.generate = generate_forced
    each = min(ROWS, len(lengths))
    config = GRPOConfig(
        output_dir=str(scratch / "trl"), per_device_train_batch_size=each, num_generations=group, beta=BETA,
        gradient_accumulation_steps=len(lengths) // each, max_completion_length=max(lengths), max_steps=steps,
        learning_rate=LR, bf16=False, use_cpu=True, gradient_checkpointing=False, report_to=[], save_strategy="no",
        logging_steps=1000, disable_tqdm=True, temperature=1.0, lr_scheduler_type="constant",
    )  # fmt: skip
    return GRPOTrainer(
        model=model, processing_class=tokenizer, reward_funcs=letters, args=config,
        train_dataset=Dataset.from_dict({"prompt": list(texts)}),
    )  # fmt: skip


if __name__ == "__main__":
    main()
