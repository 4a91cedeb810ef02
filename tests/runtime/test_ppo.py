"""PPO's arithmetic against sums written out, and against autograd of the textbook formula."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import Tensor

from runtime.ppo import (
    gae,
    gather_samples,
    moments,
    policy_loss,
    response_mask,
    sample_sums,
    token_rewards,
    value_loss,
    whiten,
)

LENGTHS = torch.tensor([5, 1, 3, 0])
R = 5
MASK = response_mask(LENGTHS, R)


def random(seed: int) -> Tensor:
    return torch.randn(len(LENGTHS), R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_reward_stands_at_the_last_token() -> None:
    logprobs, ref = random(0), random(1)
    rewards = token_rewards(torch.tensor([1.0, -20.0, 0.5, 9.0]).double(), logprobs, ref, MASK, 0.1, 10.0)
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


def test_whitening_uses_real_tokens_only() -> None:
    values = random(4)
    mean, variance = moments(sample_sums(values, MASK))
    real = whiten(values, MASK, mean, variance)[MASK]
    assert float(real.mean()) == pytest.approx(0, abs=1e-12)
    assert float(real.var(unbiased=False)) == pytest.approx(1, abs=1e-6)


def test_samples_gather_in_their_places() -> None:
    def gathered() -> list[list[float]]:
        rows = torch.tensor([[0, 2], [1, 3]])[dist.get_rank()]
        return gather_samples(rows.double()[:, None] * 10, rows, 4, dist.group.WORLD).tolist()

    assert run_ranks(2, gathered) == [[[0], [10], [20], [30]]] * 2


def test_policy_loss_and_its_gradient() -> None:
    old, advantages = random(5), random(6)
    logprobs = (old + 0.5 * random(7)).requires_grad_()
    loss, terms = policy_loss(logprobs, old, advantages, MASK, 0.2, 9.0)
    loss.backward()
    for n in range(len(LENGTHS)):
        for t in range(R):
            ratio = float((logprobs.detach()[n, t] - old[n, t]).exp())
            a = float(advantages[n, t])
            clipped = (a > 0 and ratio > 1.2) or (a < 0 and ratio < 0.8)
            expected = 0.0 if clipped or not MASK[n, t] else -a * ratio / 9
            assert float(logprobs.grad[n, t]) == pytest.approx(expected)  # type: ignore[index]
    assert float(terms["ppo_kl"].detach()) == pytest.approx(float(((old - logprobs.detach()) * MASK).sum()) / 9)


def test_value_loss_takes_the_larger_error() -> None:
    old = torch.zeros(1, 3)
    values = torch.tensor([[1.0, 0.1, -1.0]])
    returns = torch.tensor([[2.0, 0.0, -0.5]])
    loss, terms = value_loss(values, old, returns, torch.ones(1, 3, dtype=torch.bool), 0.2, 3.0)
    assert float(loss) == pytest.approx(0.5 * (1.8**2 + 0.1**2 + 0.5**2) / 3)
    assert float(terms["vf_clipfrac"]) == pytest.approx(1 / 3)
