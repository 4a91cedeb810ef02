"""The loss of `distillation.yaml`: what a function of one's own looks like."""

from __future__ import annotations

from typing import Any


def reverse_kl(output: Any, batch: Any, tokens: float) -> tuple[Any, dict[str, Any]]:
    """KL of the student to the teacher on the student's tokens, by the estimator r - 1 - log r with
    r = p_teacher / p_student (Schulman 2020).

    output: what the student says of a micro-batch (`logprobs`, `entropy`, each per response token). batch: what the
    call reads, by name, per response token. tokens: response tokens of the whole minibatch, so that micro-batches and
    replicas add up.
    """
    difference = batch["teacher_logprobs"] - output.logprobs
    loss = (difference.exp() - 1 - difference).sum() / tokens
    return loss, {"teacher_kl": loss, "entropy": output.entropy.sum() / tokens}
