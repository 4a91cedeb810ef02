"""The algorithms' arithmetic against sums written out, and against autograd of the textbook formula."""

from __future__ import annotations

from statistics import mean, stdev

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from sample_cases import LENGTHS, MASK, R, random, samples
from torch import Tensor

from plans.algorithms import ALGORITHMS as RECORDS
from plans.hyperparameters import Ppo
from runtime.algorithms.groups import spread
from runtime.algorithms.losses import Clip, counted, policy_loss, value_loss
from runtime.algorithms.ppo import gae
from runtime.algorithms.samples import (
    gather_samples,
    moments,
    sample_sums,
    token_rewards,
)
from runtime.algorithms.table import ADVANTAGES


def test_reward_stands_at_the_last_token() -> None:
    logprobs, ref = random(0), random(1)
    rewards = token_rewards(samples(), SETTINGS, "reward")
    expected = -0.1 * (logprobs - ref)
    expected[0, 4] += 1.0
    expected[1, 0] -= 10.0
    expected[2, 2] += 0.5
    torch.testing.assert_close(rewards, expected * MASK)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 1.0), (0.99, 0.0)])
def test_gae_is_the_weighted_sum_of_errors(gamma: float, lam: float) -> None:
    rewards, values = random(2) * MASK, random(3)
    result = gae(rewards, values, MASK, gamma, lam)
    for n, length in enumerate(LENGTHS.tolist()):
        v = [*values[n, :length].tolist(), 0.0]
        delta = [float(rewards[n, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(R):
            expected = sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length))
            assert float(result[n, t]) == pytest.approx(expected)


SETTINGS = Ppo(kl_coefficient=0.1, gamma=0.9, reward_clip=10.0)


def kl_rewards() -> list[float]:
    """Clipped score less the KL penalty of each sample."""
    kl = ((random(0) - random(1)) * MASK).sum(1).tolist()
    # The last sample has no token that could carry its score.
    return [score - 0.1 * k for score, k in zip([1.0, -10.0, 0.5, 0.0], kl, strict=True)]


def test_grpo_compares_with_the_group() -> None:
    signal = ADVANTAGES["grpo"](samples(), SETTINGS)
    for low, high, a, b in [(1, 0, -10.0, 1.0), (3, 2, 0.0, 0.5)]:
        half = (b - a) / 2  # two samples lie half their distance from the mean, and its square root of 2 is their std
        expected = half / (half * 2**0.5 + 1e-6)
        torch.testing.assert_close(signal.advantages[high], expected * MASK[high].double())
        torch.testing.assert_close(signal.advantages[low], -expected * MASK[low].double())
    assert float(signal.rewards.sum()) == pytest.approx(1.0 - 10.0 + 0.5), "the KL is not in the reward"
    assert RECORDS["grpo"].kl_in_loss and not RECORDS["rloo"].kl_in_loss


def test_grpo_learns_nothing_from_a_group_without_spread() -> None:
    mask = torch.ones(4, R, dtype=torch.bool)
    alike = torch.tensor([0.1, 0.1, 0.7, 0.7], dtype=torch.float32)
    signal = ADVANTAGES["grpo"](samples(mask=mask, scores=alike, group_size=2), SETTINGS)
    assert float(signal.advantages.abs().max()) == 0.0
    signal = ADVANTAGES["grpo"](samples(mask=mask, scores=alike, group_size=4), SETTINGS)
    assert float(signal.advantages.abs().min()) > 0.8, "two pairs of one group differ"


def test_rloo_leaves_the_sample_out() -> None:
    together = samples(group_size=4)
    signal, rewards = ADVANTAGES["rloo"](together, SETTINGS), kl_rewards()
    for n in range(4):
        others = [reward for i, reward in enumerate(rewards) if i != n]
        expected = (rewards[n] - sum(others) / 3) * MASK[n].double()
        torch.testing.assert_close(signal.advantages[n], expected)


def following(n: int, t: int) -> float:
    """Discounted rewards of a sample from token t on, as REINFORCE++ and ReMax have them."""
    score, length = [1.0, -10.0, 0.5, 0.0][n], int(LENGTHS[n])
    kl = (random(0) - random(1))[n].tolist()
    return sum(0.9 ** (k - t) * (-0.1 * kl[k] + score * (k == length - 1)) for k in range(t, length))


def test_reinforce_pp_normalises_over_the_batch() -> None:
    signal = ADVANTAGES["reinforce++"](samples(), SETTINGS)
    returns = torch.tensor([following(n, t) for n in range(4) for t in range(int(LENGTHS[n]))]).double()
    torch.testing.assert_close(signal.returns[MASK], returns)
    expected = (returns - returns.mean()) / returns.std(correction=0)
    torch.testing.assert_close(signal.advantages[MASK], expected)
    assert not signal.advantages[~MASK].any()


def test_remax_compares_with_the_greedy_response() -> None:
    greedy = torch.tensor([0.5, -30.0, 1.0, 2.0]).double()
    signal = ADVANTAGES["remax"](samples(greedy_scores=greedy), SETTINGS)
    for n in range(4):
        for t in range(R):
            expected = following(n, t) - max(float(greedy[n]), -10.0) if MASK[n, t] else 0.0
            assert float(signal.advantages[n, t]) == pytest.approx(expected)


def test_ppo_whitens_over_real_tokens_only() -> None:
    values = random(4)
    signal = ADVANTAGES["ppo"](samples(values=values), SETTINGS)
    real = signal.advantages[MASK]
    assert float(real.mean()) == pytest.approx(0, abs=1e-12)
    assert float(real.var(unbiased=False)) == pytest.approx(1, abs=1e-6)
    plain = gae(signal.rewards, values, MASK, 0.9, SETTINGS.gae_lambda)
    torch.testing.assert_close(signal.returns, (plain + values) * MASK)
    mean, variance = moments(sample_sums(plain, MASK))
    torch.testing.assert_close(real, (plain[MASK] - mean) / variance**0.5)


@pytest.mark.parametrize("name", [name for name, record in RECORDS.items() if record.least_group > 1])
def test_a_group_may_be_spread(name: str) -> None:
    whole = ADVANTAGES[name](samples(), SETTINGS).advantages

    def part() -> Tensor:
        rows = torch.tensor([[0, 2], [1, 3]])[dist.get_rank()]
        every = samples()
        own = samples(
            rows=rows,
            **{key: getattr(every, key)[rows] for key in ("mask", "old_logprobs", "ref_logprobs", "scores", "kept")},
            gather=lambda own: gather_samples(own, rows, 4, dist.group.WORLD),
        )
        return ADVANTAGES[name](own, SETTINGS).advantages

    first, second = run_ranks(2, part)
    assert torch.equal(torch.stack([first, second], 1).view(4, R), whole)


@pytest.mark.parametrize("divide", [True, False])
def test_a_sample_without_a_score_is_no_member_of_its_group(divide: bool) -> None:
    """Groups of four of which one, and three, have no score: as if those that have one were the whole group."""
    scores, kept = [1.0, 4.0, 0.0, 2.5, 0.0, 0.0, 7.0, 0.0], [1, 1, 0, 1, 0, 0, 1, 0]
    alone = {
        "rows": torch.arange(8), "group_size": 4, "mask": torch.tensor(kept).bool()[:, None].expand(8, R),
        "old_logprobs": random(0).repeat(2, 1), "ref_logprobs": random(0).repeat(2, 1),
        "scores": torch.tensor(scores).double(), "kept": torch.tensor(kept).bool(),
    }  # fmt: skip
    settings = Ppo(divide_by_deviation=divide)
    grpo, rloo = (ADVANTAGES[name](samples(**alone), settings).advantages for name in ("grpo", "rloo"))
    group = [1.0, 4.0, 2.5]
    for n, score in ((0, 1.0), (1, 4.0), (3, 2.5)):
        wanted = (score - mean(group)) / ((stdev(group) + 1e-6) if divide else 1.0)
        assert grpo[n].tolist() == pytest.approx([wanted] * R)
        assert rloo[n].tolist() == pytest.approx([score - (7.5 - score) / 2] * R)
    assert not grpo[[2, 4, 5, 6, 7]].any() and not rloo[[2, 4, 5, 6, 7]].any(), "one alone has nobody to compare with"
    assert spread(samples(**alone)).tolist() == [True] * 4 + [False] * 4


def test_tokens_that_do_not_count_are_in_no_term() -> None:
    """Losses and what they report of two samples, of which the second weighs nothing, are those of the first."""
    old, new, advantages = random(5)[0], random(5)[0] + 0.3 * random(7)[0], random(6)[0]
    weights, first = torch.tensor([0.5, 0.5, 0.0, 0.0, 0.0]).double(), slice(2)
    both = policy_loss(new, old, advantages, Clip(0.2, 0.2), weights, tokens=2.0)[1]
    one = policy_loss(new[first], old[first], advantages[first], Clip(0.2, 0.2), 0.5, tokens=2.0)[1]
    values = value_loss(new, old, advantages, 0.2, counted(weights), tokens=2.0)[1]
    value = value_loss(new[first], old[first], advantages[first], 0.2, 1.0, tokens=2.0)[1]
    assert {k: float(v) for k, v in {**both, **values}.items()} == pytest.approx(
        {k: float(v) for k, v in {**one, **value}.items()}
    )


def test_every_algorithm_has_a_name() -> None:
    assert set(ADVANTAGES) == {name for name, record in RECORDS.items() if not record.offline}


def test_samples_gather_in_their_places() -> None:
    def gathered() -> list[list[float]]:
        rows = torch.tensor([[0, 2], [1, 3]])[dist.get_rank()]
        return gather_samples(rows.double()[:, None] * 10, rows, 4, dist.group.WORLD).tolist()

    assert run_ranks(2, gathered) == [[[0], [10], [20], [30]]] * 2
