"""Advantages, clipped losses and divergences against plain loops, closed forms and a bandit small enough to enumerate."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from hbat_lightning.functional.reinforcement import (
    clipped_policy_loss,
    clipped_value_loss,
    gae,
    group_advantages,
    kl_k1,
    kl_k3,
    leave_one_out_advantages,
    sampling_entropy,
    truncation_log_mass,
    whiten,
)


def double(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gae_by_sums(rewards: np.ndarray, values: np.ndarray, gamma: float, lam: float) -> np.ndarray:
    """The definition: an exponentially weighted sum of the residuals of one episode."""
    steps = len(rewards)
    deltas = [rewards[t] + (gamma * values[t + 1] if t + 1 < steps else 0.0) - values[t] for t in range(steps)]
    return np.array([sum((gamma * lam) ** (u - t) * deltas[u] for u in range(t, steps)) for t in range(steps)])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.95, 1.0), (0.9, 0.8), (1.0, 0.0)])
@pytest.mark.parametrize("left", [False, True], ids=["padded right", "padded left"])
def test_gae_is_the_weighted_sum_of_residuals_of_every_episode(gamma: float, lam: float, left: bool) -> None:
    lengths, width = [5, 3, 1, 0], 6
    rewards, values = double(4, width), double(4, width, seed=1)
    mask = torch.zeros(4, width, dtype=torch.bool)
    for row, length in enumerate(lengths):
        mask[row, width - length if left else 0 : None if left else length] = True
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(4):
        own = mask[row]
        truth = gae_by_sums(rewards[row, own].numpy(), values[row, own].numpy(), gamma, lam)
        assert np.allclose(advantages[row, own].numpy(), truth, rtol=1e-12)
        assert np.allclose(returns[row, own].numpy(), truth + values[row, own].numpy(), rtol=1e-12)
        assert not advantages[row, ~own].any()
        assert not returns[row, ~own].any()


def test_whitening_is_that_of_the_counted_values() -> None:
    values, mask = double(3, 4), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]]).bool()
    kept = values[mask].numpy()
    truth = (kept - kept.mean()) / kept.std(ddof=1)
    assert np.allclose(whiten(values, mask)[mask].numpy(), truth, rtol=1e-7)
    assert not whiten(values, mask)[~mask].any()
    assert np.allclose(whiten(values, mask, shift_mean=False)[mask].numpy(), truth + kept.mean(), rtol=1e-7)
    assert torch.allclose(whiten(values), (values - values.mean()) / values.std(), rtol=1e-7)
    assert whiten(torch.tensor([7.0])).tolist() == [0.0]
    assert whiten(values, torch.zeros_like(mask)).sum() == 0


def test_both_estimates_of_the_divergence_have_it_as_their_mean() -> None:
    p, q = torch.softmax(double(6), -1), torch.softmax(double(6, seed=1), -1)
    truth = (p * (p / q).log()).sum()
    for estimate in (kl_k1, kl_k3):
        assert torch.allclose((p * estimate(p.log(), q.log())).sum(), truth, rtol=1e-12)
    assert bool((kl_k3(p.log(), q.log()) >= 0).all())
    assert bool((kl_k1(p.log(), q.log()) < 0).any())
    assert not kl_k3(p.log(), p.log()).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.0),
        (1.5, 2.0, -2.4, 0.0),  # far enough already
        (0.5, 2.0, -1.0, -2.0),
        (0.5, -2.0, 1.6, 0.0),
        (1.5, -2.0, 3.0, 2.0),
    ],
)
def test_the_clipped_surrogate_in_every_case(ratio: float, advantage: float, loss: float, slope: float) -> None:
    log_prob = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    got = clipped_policy_loss(log_prob, torch.zeros((), dtype=torch.float64), torch.tensor(advantage), 0.2)
    assert got.item() == pytest.approx(loss)
    (gradient,) = torch.autograd.grad(got, log_prob)
    assert gradient.item() == pytest.approx(slope * ratio)  # d ratio / d log p = ratio


@pytest.mark.parametrize(
    ("value", "old", "target", "loss"),
    [(1.1, 1.0, 3.0, 0.5 * 1.9**2), (2.0, 1.0, 3.0, 0.5 * 1.8**2), (2.0, 1.0, 1.0, 0.5), (0.0, 1.0, 0.5, 0.125)],
)
def test_the_clipped_value_loss_in_every_case(value: float, old: float, target: float, loss: float) -> None:
    got = clipped_value_loss(torch.tensor(value), torch.tensor(old), torch.tensor(target), 0.2)
    assert got.item() == pytest.approx(loss, rel=1e-6)


def test_advantages_within_a_group() -> None:
    rewards = torch.tensor([[1.0, 0.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0]])
    assert torch.allclose(leave_one_out_advantages(rewards)[0], torch.tensor([0.0, -4 / 3, 4 / 3, 0.0]))
    assert not leave_one_out_advantages(rewards)[1].any()
    deviation = np.std([1, 0, 2, 1], ddof=1)
    assert np.allclose(group_advantages(rewards)[0], np.array([0.0, -1, 1, 0]) / (deviation + 1e-4))
    assert group_advantages(rewards, scale=False)[0].tolist() == [0.0, -1.0, 1.0, 0.0]
    assert not group_advantages(rewards)[1].any()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.6), (0.7, 4, 0.8)]
)
def test_the_mass_that_truncation_leaves(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * double(5, 9)
    got = truncation_log_mass(logits, temperature, top_k, top_p)
    for row, mass in zip(logits.numpy(), got.exp().tolist(), strict=True):
        probabilities = np.exp(row / temperature) / np.exp(row / temperature).sum()
        order = np.argsort(-probabilities)
        kept = list(order[:top_k] if top_k else order)
        among = probabilities[kept] / probabilities[kept].sum()
        nucleus = next(n for n in range(1, len(kept) + 1) if among[:n].sum() >= top_p - 1e-9)
        assert mass == pytest.approx(probabilities[kept[:nucleus]].sum(), rel=1e-5)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 3, 1.0), (1.3, 0, 0.6), (0.7, 4, 0.8), (1.0, 1, 1.0)]
)
def test_the_entropy_of_what_is_sampled_from(temperature: float, top_k: int, top_p: float) -> None:
    logits = 2 * double(5, 9, seed=2)
    got = sampling_entropy(logits, temperature, top_k, top_p)
    for row, entropy in zip(logits.numpy(), got.tolist(), strict=True):
        probabilities = np.sort(np.exp(row / temperature) / np.exp(row / temperature).sum())[::-1]
        probabilities = probabilities[: top_k or None]
        probabilities = probabilities / probabilities.sum()
        kept = probabilities[: next(n for n in range(1, 10) if probabilities[:n].sum() >= top_p - 1e-9)]
        assert entropy == pytest.approx(-sum(p * math.log(p) for p in kept / kept.sum()), abs=1e-5)


def bandit_gradient(logits: Tensor, rewards: Tensor) -> Tensor:
    """Of the expected reward, with every arm's probability written out."""
    leaf = logits.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((torch.softmax(leaf, -1) * rewards).sum(), leaf)
    return gradient


@pytest.mark.parametrize("baseline", [0.0, 0.7], ids=["no baseline", "a baseline"])
def test_the_surrogate_s_gradient_is_the_policy_gradient_of_a_bandit(baseline: float) -> None:
    """Each arm drawn as often as its probability says: the mean of sampled gradients without the noise."""
    logits, rewards = double(5), double(5, seed=1)
    leaf = logits.clone().requires_grad_()
    log_probs = torch.log_softmax(leaf, -1)
    weights = log_probs.detach().exp()
    loss = (weights * clipped_policy_loss(log_probs, log_probs.detach(), rewards - baseline, 0.2)).sum()
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.allclose(-gradient, bandit_gradient(logits, rewards), rtol=1e-12)


def test_leave_one_out_has_the_policy_gradient_of_a_bandit_as_its_mean() -> None:
    """Over all pairs of two draws, weighted with their probability."""
    logits, rewards = double(4), double(4, seed=1)
    leaf = logits.clone().requires_grad_()
    log_probs = torch.log_softmax(leaf, -1)
    chance = log_probs.detach().exp()
    total = leaf.new_zeros(())
    for one in range(4):
        for other in range(4):
            advantages = leave_one_out_advantages(torch.stack([rewards[one], rewards[other]]).unsqueeze(0))[0]
            pair = torch.stack([log_probs[one], log_probs[other]])
            total = (
                total + chance[one] * chance[other] * clipped_policy_loss(pair, pair.detach(), advantages, 0.2).mean()
            )
    (gradient,) = torch.autograd.grad(total, leaf)
    assert torch.allclose(-gradient, bandit_gradient(logits, rewards), rtol=1e-12)
