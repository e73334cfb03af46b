"""Log-probabilities of given tokens under a causal language model."""

from __future__ import annotations

import torch
from torch import Tensor


def selected_log_probs(logits: Tensor, targets: Tensor) -> Tensor:
    """Log-probability of one target per row of logits, in fp32 or better.

    ``log softmax(x)[y] = x[y] - logsumexp(x)``: nothing of the size of the vocabulary is kept beside the logits.

    Args:
        logits: ``(..., V)``, any floating dtype; computed in fp32 (fp64 stays fp64).
        targets: ``(...)``, integer ids in ``[0, V)``.

    Returns:
        ``(...)`` log-probabilities, at least fp32.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    picked = wide.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return picked - torch.logsumexp(wide, dim=-1)


def token_log_probs(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Log-probability of every label under the logits one position before it.

    Args:
        logits: ``(B, T, V)``; ``logits[:, t]`` predicts token ``t + 1``.
        labels: ``(B, T)`` token ids, ``ignore_index`` where a token is not supervised. Not shifted: the shift is made here.
        ignore_index: The label of positions that do not count.

    Returns:
        ``(B, T - 1)``, 0 where the label is ``ignore_index``.
    """
    targets = labels[:, 1:]
    ignored = targets == ignore_index
    log_probs = selected_log_probs(logits[:, :-1], targets.masked_fill(ignored, 0))
    return log_probs.masked_fill(ignored, 0.0)


def sequence_log_probs(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Sum of the log-probabilities of a row's supervised tokens.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``, not shifted, ``ignore_index`` where a token is not supervised.
        ignore_index: The label of positions that do not count.

    Returns:
        ``(B,)``; 0 for a row without a supervised token.
    """
    return token_log_probs(logits, labels, ignore_index).sum(-1)
