"""Formulas of reinforcement learning from completions: advantages, clipped losses, divergences."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

EPSILON = 1e-8


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), a completion being an episode that ends.

    ``delta_t = r_t + gamma V_{t+1} - V_t`` and ``A_t = delta_t + gamma lam A_{t+1}``, with nothing behind the last token.

    Args:
        rewards: ``(B, T)``, the reward for each token.
        values: ``(B, T)``, the value before each token.
        mask: ``(B, T)``, true on the tokens of the completion, which are contiguous; others count for nothing.
        gamma: Discount per token.
        lam: How far returns are trusted over values; 1 is the return itself, 0 one step ahead.

    Returns:
        Advantages and returns (``A_t + V_t``), each ``(B, T)``, zero where the mask is false.
    """
    kept = mask.to(values.dtype)
    rewards, values = rewards * kept, values * kept
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[0])
    for step in reversed(range(values.shape[1])):
        delta = rewards[:, step] + gamma * next_value - values[:, step]
        next_advantage = (delta + gamma * lam * next_advantage) * kept[:, step]
        next_value = values[:, step]
        advantages[:, step] = next_advantage
    return advantages, advantages + values


def whiten(values: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Bring values to standard deviation 1, and to mean 0 unless the mean is to stay.

    Args:
        values: Any shape.
        mask: The same shape, true where a value counts; all do when not given.
        shift_mean: Whether the mean goes to 0.

    Returns:
        The same shape; where the mask is false, 0. A single value has no deviation and is only shifted.
    """
    counted = values if mask is None else values[mask.bool()]
    if not counted.numel():
        return torch.zeros_like(values)
    mean = counted.mean()
    deviation = (counted.var() + EPSILON).sqrt() if counted.numel() > 1 else values.new_ones(())
    white = (values - mean) / deviation
    white = white if shift_mean else white + mean
    return white if mask is None else white * mask.to(white.dtype)


def kl_k1(log_probs: Tensor, reference: Tensor) -> Tensor:
    """``log p - log q``: unbiased, of either sign (Schulman 2020, k1).

    Args:
        log_probs: Log-probabilities of sampled tokens under the policy that sampled them.
        reference: The same shape, under the reference.
    """
    return log_probs - reference


def kl_k3(log_probs: Tensor, reference: Tensor) -> Tensor:
    """``q/p - 1 - log q/p``: unbiased, never negative (Schulman 2020, k3); arguments as in :func:`kl_k1`."""
    ratio = reference - log_probs
    return torch.expm1(ratio) - ratio


def clipped_policy_loss(log_probs: Tensor, old_log_probs: Tensor, advantages: Tensor, clip: float) -> Tensor:
    """PPO's clipped surrogate (Schulman et al. 2017, eq. 7), as a loss: ``max(-A r, -A clip(r, 1 - c, 1 + c))``.

    Args:
        log_probs: Of the actions (tokens, or whole completions), under the policy that trains.
        old_log_probs: The same shape, under the policy that sampled them; no gradient.
        advantages: The same shape.
        clip: c.

    Returns:
        The same shape, one loss per action.
    """
    ratio = torch.exp(log_probs - old_log_probs)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip))


def clipped_value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float) -> Tensor:
    """``1/2 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)``, as in the authors' implementation of PPO.

    Args:
        values: Under the value function that trains.
        old_values: The same shape, when the completions were sampled.
        returns: The same shape, G.
        clip: c.

    Returns:
        The same shape.
    """
    near = torch.minimum(torch.maximum(values, old_values - clip), old_values + clip)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    """RLOO (Ahmadian et al. 2024, eq. 7): each sample's reward less the mean of the prompt's other samples.

    Args:
        rewards: ``(..., G)``: G samples of each prompt; G is at least 2.

    Returns:
        The same shape.
    """
    others = (rewards.sum(-1, keepdim=True) - rewards) / (rewards.shape[-1] - 1)
    return rewards - others


def group_advantages(rewards: Tensor, scale: bool = True) -> Tensor:
    """GRPO (Shao et al. 2024, section 4.1.2): rewards against their group's mean, in units of its standard deviation.

    Args:
        rewards: ``(..., G)``: G samples of each prompt; G is at least 2.
        scale: Whether to divide by the deviation; without it, as in Dr. GRPO (Liu et al. 2025).

    Returns:
        The same shape.
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    return centred / (rewards.std(-1, keepdim=True) + 1e-4) if scale else centred


def truncation_log_mass(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """How much of the tempered distribution top-k and top-p leave to sample from.

    A sampled token's log-probability under what it was really sampled from is that under the tempered distribution less this.

    Args:
        logits: ``(N, V)``.
        temperature: Above 0.
        top_k: Candidates that stay; 0 is all.
        top_p: Nucleus that stays; 1 is all.

    Returns:
        ``(N,)``, at most 0.
    """
    whole = TemperatureLogitsWarper(float(temperature))(None, logits.float())
    return torch.logsumexp(_truncated(whole, top_k, top_p), -1) - torch.logsumexp(whole, -1)


def sampling_entropy(logits: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """``-sum p log p`` in nats of the distribution that tokens are sampled from: tempered, then cut by top-k and top-p.

    Args:
        logits: ``(N, V)``.
        temperature: Above 0.
        top_k: Candidates that stay; 0 is all.
        top_p: Nucleus that stays; 1 is all.

    Returns:
        ``(N,)``, at least 0.
    """
    whole = TemperatureLogitsWarper(float(temperature))(None, logits.float())
    probabilities = torch.softmax(_truncated(whole, top_k, top_p), -1)
    return -torch.xlogy(probabilities, probabilities).sum(-1)


def _truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    if top_k > 0:
        logits = TopKLogitsWarper(min(top_k, logits.shape[-1]))(None, logits)
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits
