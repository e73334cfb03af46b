"""Importance of parameters and the weights of the EWC penalty that follow from it."""

from __future__ import annotations

import torch
from torch import Tensor


def squared_displacement(before: Tensor, after: Tensor) -> Tensor:
    """Squared change of every element, in fp32 or better: the raw material of drift importance.

    Args:
        before: A parameter at the start of a phase, any shape.
        after: The same parameter at its end, same shape.

    Returns:
        ``(after - before)²``, same shape. The official code takes the mean of it per tensor (arXiv 2406.15178, §3).
    """
    wide = torch.promote_types(after.dtype, torch.float32)
    return (after.to(wide) - before.to(wide)).square()


def literal_weights(importance: Tensor, kappa: float = 1e10) -> Tensor:
    r"""The official weights, :math:`w = \mathrm{softmax}(\kappa^2 I)` over tensors.

    With κ = 1e10 a root-mean-square drift of 1e-8 already gives :math:`\kappa^2 I = 10^4`: the softmax is one-hot, and
    the penalty holds a single tensor. Computed in fp64, since :math:`\kappa^2 I` overflows what fp32 resolves.

    Args:
        importance: ``(N,)``, one non-negative number per tensor.
        kappa: The official ``ewc_mse_factor``.

    Returns:
        ``(N,)`` fp64 weights that sum to 1.
    """
    return torch.softmax(kappa**2 * importance.double(), dim=0)


def proportional_weights(importance: Tensor, tau: float = 1.0) -> Tensor:
    r"""Scale-free weights :math:`w_n = N I_n^{1/\tau} / \sum_m I_m^{1/\tau}` with mean 1.

    τ = 1 is proportional to the importance, τ → ∞ uniform over tensors with any importance, τ → 0 one-hot.

    Args:
        importance: Non-negative numbers, any shape; zero stays zero.
        tau: Temperature, > 0.

    Returns:
        fp64 weights of the same shape and of mean 1; all zero when the importance is all zero.
    """
    if tau <= 0:
        raise ValueError(f"tau must be > 0, got {tau}")
    wide = importance.double()
    if not bool((wide > 0).any()):
        return torch.zeros_like(wide)
    scores = wide.log().flatten() / tau  # log(0) = -inf: such an element gets weight 0, whatever tau
    return (torch.softmax(scores, dim=0) * wide.numel()).reshape(importance.shape)


def effective_number(weights: Tensor) -> float:
    r"""How many of N weights carry the mass: :math:`\exp(-\sum_n p_n\log p_n)` with :math:`p = w/\sum w`.

    Args:
        weights: ``(N,)`` non-negative.

    Returns:
        1 for a one-hot vector, N for a uniform one, 0 when all weights are 0.
    """
    total = weights.double().sum()
    if total <= 0:
        return 0.0
    shares = weights.double() / total
    return float(torch.exp(torch.special.entr(shares).sum()))
