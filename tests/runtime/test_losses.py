"""Losses against the textbook formula and its gradient by autograd, and against sums written out."""

from __future__ import annotations

import math

import pytest
import torch
from sample_cases import LENGTHS, MASK, R, random, samples

from plans.hyperparameters import Ppo
from runtime.algorithms.groups import first_of, spread
from runtime.algorithms.importance import importance, mismatch
from runtime.algorithms.kl_control import adapted
from runtime.algorithms.losses import Clip, kl_estimate, kl_loss, policy_loss, value_loss
from runtime.algorithms.offline import dpo_loss, sft_loss
from runtime.algorithms.samples import (
    overlong,
    token_rewards,
)
from runtime.algorithms.table import ADVANTAGES
from runtime.calls.train_call import WEIGHTS, actor_loss, sample_weights
from runtime.passes.forward import TokenOutput
from runtime.passes.packs import Batch
from runtime.sequences import Sequences


def test_policy_loss_and_its_gradient() -> None:
    old, advantages = random(5), random(6)
    logprobs = (old + 0.5 * random(7)).requires_grad_()
    loss, terms = policy_loss(logprobs[MASK], old[MASK], advantages[MASK], Clip(0.2, 0.2), 1 / 9, tokens=9.0)
    loss.backward()
    for n in range(len(LENGTHS)):
        for t in range(R):
            ratio = float((logprobs.detach()[n, t] - old[n, t]).exp())
            a = float(advantages[n, t])
            clipped = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
            expected = 0.0 if clipped or not MASK[n, t] else -a * ratio / 9
            assert float(logprobs.grad[n, t]) == pytest.approx(expected)  # type: ignore[index]
    assert float(terms["ppo_kl"].detach()) == pytest.approx(float(((old - logprobs.detach()) * MASK).sum()) / 9)


def test_kl_loss_estimates_the_kl() -> None:
    """k3 is unbiased: its mean over samples of p is KL(p, p_ref); and it is 0 only where both agree."""
    generator = torch.Generator().manual_seed(8)
    p, ref = (torch.randn(6, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    tokens = torch.multinomial(p.exp(), 200_000, replacement=True, generator=generator)
    loss, _ = kl_loss(p[tokens], ref[tokens], 1 / len(tokens))
    assert float(loss) == pytest.approx(float((p.exp() * (p - ref)).sum()), rel=0.02)
    logprobs = random(0).requires_grad_()
    kl_loss(logprobs[MASK], random(1)[MASK], 1 / 9)[0].backward()
    expected = (1 - (random(1) - random(0)).exp()) * MASK / 9
    torch.testing.assert_close(logprobs.grad, expected)


def test_clip_higher_and_dual_clip() -> None:
    old, advantages = random(5), random(6)
    logprobs = old + 1.5 * random(7)
    loss, _ = policy_loss(logprobs[MASK], old[MASK], advantages[MASK], Clip(0.2, 0.28, dual=3.0), 1 / 9, tokens=9.0)
    total, capped = 0.0, 0
    for n, length in enumerate(LENGTHS.tolist()):
        for t in range(length):
            ratio, a = math.exp(float(logprobs[n, t] - old[n, t])), float(advantages[n, t])
            objective = min(ratio * a, min(max(ratio, 0.8), 1.28) * a)
            capped += a < 0 and objective < 3.0 * a
            total -= max(objective, 3.0 * a) if a < 0 else objective
    assert capped and float(loss) == pytest.approx(total / 9)


def test_gspo_is_the_objective_of_whole_responses() -> None:
    """Zheng et al. 2025, eq. 5 and 7, by autograd of the formula."""
    lengths, counts = [5, 1, 3], 3
    old, scores = random(5)[:3], [0.7, -1.1, 0.4]
    ours, theirs = ((old + 0.3 * random(7)[:3]).requires_grad_() for _ in range(2))
    mask = MASK[:3]
    each = torch.tensor([score for score, n in zip(scores, lengths, strict=True) for _ in range(n)]).double()
    weights = torch.tensor([1 / (counts * n) for n in lengths for _ in range(n)]).double()
    loss, _ = policy_loss(ours[mask], old[mask], each, Clip(0.1, 0.2), weights, tokens=9.0, lengths=lengths)
    loss.backward()
    total = torch.zeros(()).double()
    for n, length in enumerate(lengths):
        ratio = (theirs[n, :length].sum() - old[n, :length].sum()).div(length).exp()
        total = total - torch.minimum(ratio * scores[n], ratio.clamp(0.9, 1.2) * scores[n]) / counts
    total.backward()
    assert float(loss.detach()) == pytest.approx(float(total.detach()))
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize(("estimator", "bias"), [("k1", 0.02), ("k2", 0.2), ("k3", 0.02)])
def test_kl_estimators(estimator: str, bias: float) -> None:
    """k1 and k3 are unbiased, k2 is close where the distributions are."""
    generator = torch.Generator().manual_seed(8)
    p, noise = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    p, ref = p.log_softmax(0), (p + 0.4 * noise).log_softmax(0)
    tokens = torch.multinomial(p.exp(), 400_000, replacement=True, generator=generator)
    wanted = float((p.exp() * (p - ref)).sum())
    assert float(kl_estimate(p[tokens] - ref[tokens], estimator).mean()) == pytest.approx(wanted, rel=bias)


def test_the_kl_goes_where_it_is_asked() -> None:
    plain, log_ratio = samples(), random(0) - random(1)
    scores = token_rewards(plain, Ppo(kl_in="loss", reward_clip=10.0), "reward")
    assert float(scores.sum()) == pytest.approx(1.0 - 10.0 + 0.5)
    squared = token_rewards(plain, Ppo(kl_coefficient=0.1, kl_in="reward", kl_estimator="k2", reward_clip=10.0), "loss")
    torch.testing.assert_close(squared, scores - 0.05 * log_ratio.square() * MASK)


@pytest.mark.parametrize(
    ("average", "wanted"),
    [
        ("token", [1 / 9, 1 / 9, 0.0]),  # 5 + 1 + 3 tokens count
        ("sequence", [1 / (3 * 5), 1 / (3 * 3), 0.0]),
        ("constant", [1 / (3 * 8), 1 / (3 * 8), 0.0]),
    ],
)
def test_what_a_token_counts(average: str, wanted: list[float]) -> None:
    """Of a minibatch whose samples that count have 5, 1 and 3 tokens, of at most 8; here are the first, the last, and
    one that does not count."""
    assert sample_weights(average, [5, 1, 3], [5, 3, 0], 8) == pytest.approx(wanted)


def test_long_responses_lose_reward() -> None:
    """DAPO, eq. 13, with L_max 5 and L_cache 4: lengths 5, 1, 3 and 0."""
    found = overlong(samples(), Ppo(overlong_tokens=4, overlong_penalty=0.5), 5).scores - samples().scores
    assert found.tolist() == pytest.approx([-0.5, 0.0, -0.25, 0.0])
    plain = samples()
    assert overlong(plain, Ppo(), 5) is plain


def test_groups_without_spread_do_not_count() -> None:
    flat = samples(scores=torch.tensor([0.1, 0.1, 0.5, 9.0]).double())
    assert spread(flat).tolist() == [False, False, True, True]


def test_the_first_groups_that_count_fill_the_batch() -> None:
    """Against a loop: three minibatches of four groups of two, of which two each are wanted."""
    counts = torch.rand(24, generator=torch.Generator().manual_seed(1)) < 0.4
    found, wanted = first_of(counts, 2, 3, 6).tolist(), [False] * 24
    for minibatch in range(3):
        taken = 0
        for group in range(4 * minibatch, 4 * minibatch + 4):
            own = range(2 * group, 2 * group + 2)
            if taken < 2 and any(counts[i] for i in own):
                taken += 1
                for i in own:
                    wanted[i] = bool(counts[i])
    assert found == wanted and 0 < sum(wanted) < int(counts.sum())


def test_dr_grpo_does_not_divide_by_the_deviation() -> None:
    found = ADVANTAGES["grpo"](samples(), Ppo(divide_by_deviation=False)).advantages[:, 0]
    assert found.tolist() == pytest.approx([10.5, -10.5, 0.25, 0.0])  # the last sample has no token


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_importance_is_truncated(level: str) -> None:
    """min(p_old / p_gen, C) of each token, or of the product over the response's tokens; the KL between both."""
    lengths = [5, 1, 3]
    old, gen = random(5)[:3], random(5)[:3] + 0.4 * random(7)[:3]
    mask, settings = MASK[:3], Ppo(importance_cap=0.45 if level == "sequence" else 0.5, importance=level)  # type: ignore[arg-type]
    found = importance(old[mask], gen[mask], lengths, settings).tolist()
    tokens = [[math.exp(float(old[n, t] - gen[n, t])) for t in range(length)] for n, length in enumerate(lengths)]
    wanted = [
        min(math.prod(ratios) if level == "sequence" else r, settings.importance_cap)
        for ratios in tokens
        for r in ratios
    ]
    assert found == pytest.approx(wanted) and len(set(wanted)) > 2 and settings.importance_cap in wanted
    told = mismatch(old[mask], gen[mask], 1.5)
    each = [r for ratios in tokens for r in ratios]
    assert told["rollout_corr/kl"].tolist() == pytest.approx([-math.log(r) for r in each])
    assert told["rollout_corr/k3_kl"].tolist() == pytest.approx([r - 1 - math.log(r) for r in each])
    assert told["rollout_corr/rollout_is"].tolist() == pytest.approx(each)
    assert told["rollout_corr/rollout_is/clip_ratio"].tolist() == [r > 1.5 for r in each]


def test_the_kl_coefficient_follows_its_target() -> None:
    """Ziegler et al. 2019: e = clip((KL - target) / target, -0.2, 0.2), beta <- beta (1 + K e), K = 64 / 1,000."""
    beta = wanted = 0.1
    for kl in (12.0, 6.3, 6.0, 5.9, 0.0, -1.0, 6.6):
        error = (kl - 6.0) / 6.0
        wanted *= 1 + 0.064 * (0.2 if error > 0.2 else -0.2 if error < -0.2 else error)
        beta = adapted(beta, kl, 6.0, 64, 1_000)
        assert beta == pytest.approx(wanted, rel=1e-12)
    assert adapted(beta, math.nan, 6.0, 64, 1_000) == beta
    assert adapted(1.0, 12.0, 6.0, 512, 64) == pytest.approx(1.2), "never more than the error itself"


def test_dpo_is_the_textbook_formula() -> None:
    logprobs, ref = random(9).requires_grad_(), random(10)
    loss, terms = dpo_loss(logprobs[MASK], ref[MASK], LENGTHS.tolist(), 0.3, 2)
    total, right = 0.0, 0
    for chosen, rejected in [(0, 1), (2, 3)]:
        ratios = [float(((logprobs - ref).detach() * MASK)[n].sum()) for n in (chosen, rejected)]
        margin = 0.3 * (ratios[0] - ratios[1])
        total += math.log1p(math.exp(-margin)) / 2
        right += margin > 0
    assert float(loss.detach()) == pytest.approx(total)
    assert float(terms["rewards/accuracies"]) == right / 2
    loss.backward()
    assert logprobs.grad is not None and not logprobs.grad[~MASK].any()


def test_sft_is_the_cross_entropy() -> None:
    logprobs = random(11)
    expected = -sum(float(logprobs[n, t]) for n in range(4) for t in range(int(LENGTHS[n]))) / 9
    assert float(sft_loss(logprobs[MASK], 9.0)[0]) == pytest.approx(expected)


def test_value_loss_takes_the_larger_error() -> None:
    old = torch.zeros(3)
    values = torch.tensor([1.0, 0.1, -1.0])
    returns = torch.tensor([2.0, 0.0, -0.5])
    loss, terms = value_loss(values, old, returns, 0.2, 1.0, tokens=3.0)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 0.1**2 + 0.5**2) / 3)
    assert float(terms["vf_clipfrac"]) == pytest.approx(1 / 3)


def test_values_that_stay_near_are_not_counted_as_clipped() -> None:
    old, returns = random(5).float() * 100, random(6).float() * 100
    values = old + 0.1
    _, terms = value_loss(values, old, returns, 0.2, 1.0, tokens=old.numel())
    assert float(terms["vf_clipfrac"]) == 0.0


def test_an_entropy_bonus_raises_the_objective_by_the_mean_entropy() -> None:
    entropy, weights = random(7).flatten().float().abs(), random(8).flatten().float().abs()
    output = TokenOutput(random(5).flatten().float(), entropy.requires_grad_(), torch.empty(0), torch.empty(0))
    lengths = (entropy.numel() - 3, 3)
    sequences = Sequences(torch.zeros(2 + sum(lengths), dtype=torch.int64), (1, 1), lengths)
    fields = {"old_logprobs": random(6).flatten().float(), "advantages": random(9).flatten().float(), WEIGHTS: weights}

    def loss(**keys: float) -> torch.Tensor:
        settings = Ppo.model_validate({"kl_coefficient": 0.0, **keys})
        return actor_loss(settings, 10.0, output, Batch(sequences, fields), kl_in_loss=False)[0]

    bonus = loss() - loss(entropy_coefficient=0.01)
    assert float(bonus.detach()) == pytest.approx(0.01 * float((entropy.detach() * weights).sum()), rel=1e-4)
    (gradient,) = torch.autograd.grad(bonus, entropy)
    torch.testing.assert_close(gradient, 0.01 * weights, rtol=1e-4, atol=1e-8)
