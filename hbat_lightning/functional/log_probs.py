"""Log-probabilities of given tokens under a causal language model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

CHUNK_ELEMENTS = 2**24  # logits at a time: 64 MiB in fp32
# On a CPU smaller pieces stay nearer to its caches, and with 131 rows of a vocabulary of 32,000 its products are as fast.
CPU_CHUNK_ELEMENTS = 2**22


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


def rows_per_chunk(vocabulary: int, device: str = "cuda") -> int:
    """How many rows of logits are made at a time: within :data:`CHUNK_ELEMENTS`, on a CPU :data:`CPU_CHUNK_ELEMENTS`.

    Args:
        vocabulary: Logits in a row.
        device: Type of the device.
    """
    return max(1, (CPU_CHUNK_ELEMENTS if device == "cpu" else CHUNK_ELEMENTS) // vocabulary)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    rows: int | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """Log-probability of one target per row under ``softmax((hidden @ weight.T + bias) / temperature)``, logits not kept.

    Logits are made for some rows at a time. Their gradient is known up to a factor per row that comes later,
    ``d log p[y] / d hidden = weight[y] - p @ weight``: so under a frozen output layer it is computed at once, and the
    backward pass costs nothing more. Where ``weight`` or ``bias`` train, the backward pass makes the logits again.

    Args:
        hidden: ``(N, H)``, any floating dtype; under autocast products are in its dtype.
        weight: ``(V, H)``.
        targets: ``(N,)``, integer ids in ``[0, V)``.
        bias: ``(V,)``.
        rows: Rows at a time; as many as :func:`rows_per_chunk` says when not given.
        temperature: What the logits are divided by, in fp32.

    Returns:
        ``(N,)`` log-probabilities, at least fp32. They can be differentiated once.
    """
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    apply: Callable[..., Tensor] = _LinearLogProbs.apply
    return apply(hidden, weight, bias, targets, rows or rows_per_chunk(weight.shape[0], device), 1.0 / temperature)


class _LinearLogProbs(torch.autograd.Function):
    """See :func:`linear_log_probs`."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, rows: int, scale: float
    ) -> Tensor:
        ctx.rows, ctx.scale, ctx.layer_trains = rows, scale, ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ahead = ctx.needs_input_grad[0] and not ctx.layer_trains
        slopes = torch.empty_like(hidden) if ahead else None
        normaliser = hidden.new_empty(len(hidden), dtype=_wide(hidden.dtype))
        log_probs = torch.empty_like(normaliser)
        for part in _parts(len(hidden), rows):
            logits = _scaled_logits(hidden[part], weight, bias, scale)
            picked = _picked(logits, targets[part])
            # In place, and with one exp for the normaliser and the gradient: most of the time beside the products is here.
            top = logits.amax(-1, keepdim=True)
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)
            normaliser[part] = (top + total.log()).squeeze(-1)
            log_probs[part] = picked - normaliser[part]
            if slopes is not None:  # onehot(y) - p
                slope = logits.mul_(-scale / total)
                slope.scatter_add_(-1, targets[part].unsqueeze(-1), torch.full_like(top, scale))
                slopes[part] = slope.to(weight.dtype) @ weight
        if ctx.layer_trains:
            ctx.save_for_backward(hidden, weight, bias, targets, normaliser)
        elif slopes is not None:
            ctx.save_for_backward(slopes)
        return log_probs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None, None]:
        if not ctx.layer_trains:
            (slopes,) = ctx.saved_tensors
            return slopes * gradient.unsqueeze(-1).to(slopes.dtype), None, None, None, None, None
        hidden, weight, bias, targets, normaliser = ctx.saved_tensors
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if to_hidden else None
        d_weight = torch.zeros_like(weight) if to_weight else None
        d_bias = torch.zeros_like(weight[:, 0]) if to_bias else None
        for part in _parts(len(hidden), ctx.rows):
            logits = _scaled_logits(hidden[part], weight, bias, ctx.scale)
            slope = _slope(logits, normaliser[part], targets[part])
            slope = slope.mul_(ctx.scale * gradient[part].unsqueeze(-1)).to(weight.dtype)
            if d_hidden is not None:
                d_hidden[part] = slope @ weight
            if d_weight is not None:
                d_weight.addmm_(slope.T, hidden[part])
            if d_bias is not None:
                d_bias += slope.sum(0)
        return d_hidden, d_weight, d_bias, None, None, None


def _parts(count: int, rows: int) -> list[slice]:
    return [slice(begin, begin + rows) for begin in range(0, count, rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    logits = linear(hidden, weight, bias).to(_wide(hidden.dtype))
    return logits if scale == 1 else logits.mul_(scale)


def _picked(logits: Tensor, targets: Tensor) -> Tensor:
    return logits.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _slope(logits: Tensor, normaliser: Tensor, targets: Tensor) -> Tensor:
    """``d log p[y] / d logits``, that is onehot(y) - p, in the place of the logits."""
    slope = logits.sub_(normaliser.unsqueeze(-1)).exp_().neg_()
    return slope.scatter_add_(-1, targets.unsqueeze(-1), torch.ones_like(normaliser).unsqueeze(-1))


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
