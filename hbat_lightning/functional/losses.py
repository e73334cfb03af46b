r"""Losses of a policy's own likelihoods, without a reference: of instruction following, and of preferences.

Of preferences: :math:`\bar\ell(y) = \frac{1}{|y|}\log\pi(y\mid x)` is an answer's mean log-probability per token, :math:`w`
the chosen and :math:`l` the rejected answer.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from hbat_lightning.functional.log_probs import token_log_probs


def sft_loss(logits: Tensor, labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Supervised fine-tuning: mean negative log-likelihood of the supervised tokens.

    Args:
        logits: ``(B, T, V)``.
        labels: ``(B, T)``, not shifted, ``ignore_index`` where a token is not supervised.
        ignore_index: The label of positions that do not count.

    Returns:
        A scalar; 0 (with a gradient of 0) when nothing is supervised.
    """
    supervised = (labels[:, 1:] != ignore_index).sum()
    return -token_log_probs(logits, labels, ignore_index).sum() / supervised.clamp(min=1)


def simpo_loss(
    chosen_means: Tensor, rejected_means: Tensor, beta: float, gamma: float
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Simple preference optimisation (Meng et al. 2024, arXiv 2405.14734).

    :math:`-\log\sigma(\beta\bar\ell(w) - \beta\bar\ell(l) - \gamma)`.

    Args:
        chosen_means: ``(B,)`` mean log-probabilities per token of the chosen answers.
        rejected_means: ``(B,)``, of the rejected ones.
        beta: Scale of the rewards, > 0.
        gamma: Margin between rewards at which the loss is ln 2.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``; the rewards :math:`\beta\bar\ell` are detached.
    """
    chosen_rewards, rejected_rewards = beta * chosen_means, beta * rejected_means
    losses = -logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def orpo_loss(chosen_means: Tensor, rejected_means: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
    r"""Odds ratio preference optimisation (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

    :math:`-\bar\ell(w) - \lambda\log\sigma(\mathrm{logit}(w) - \mathrm{logit}(l))` with the log-odds of
    :func:`log_odds`. The likelihood term is over the tokens of the chosen answer alone, a mean of its own for each pair;
    TRL takes it over the prompt as well, and over all tokens of a batch at once.

    Args:
        chosen_means: ``(B,)`` mean log-probabilities per token of the chosen answers.
        rejected_means: ``(B,)``, of the rejected ones.
        weight: :math:`\lambda`.

    Returns:
        ``(losses, chosen_log_odds, rejected_log_odds)``, each ``(B,)``, the log-odds detached.
    """
    chosen, rejected = log_odds(chosen_means), log_odds(rejected_means)
    return -chosen_means - weight * logsigmoid(chosen - rejected), chosen.detach(), rejected.detach()


def log_odds(log_probs: Tensor) -> Tensor:
    r""":math:`\log\frac{p}{1-p} = a - \log(1 - e^a)` of log-probabilities :math:`a = \log p`, any shape.

    A probability nearer to 1 than rounding can tell is taken as one that is one rounding step away.
    """
    return log_probs - log1mexp(log_probs)


def log1mexp(values: Tensor) -> Tensor:
    """``log(1 - exp(a))`` for ``a <= 0``, any shape, without cancellation (Mächler 2012).

    Values above the dtype's -eps are raised to it, so that 0 has a finite result, and there the gradient is 0.
    """
    values = values.clamp(max=-torch.finfo(values.dtype).eps)  # also: of the form not chosen, else nan as gradient
    near_zero, far = torch.log(-torch.expm1(values)), torch.log1p(-torch.exp(values))
    return torch.where(values > -math.log(2.0), near_zero, far)


def rrhf_loss(
    log_probs: Tensor, tokens: Tensor, rank_weight: float = 1.0, length_penalty: float = 1.0
) -> tuple[Tensor, Tensor]:
    r"""Rank responses to align human feedback (Yuan et al. 2023, arXiv 2304.05302).

    With scores :math:`p_i = \log\pi(y_i\mid x) / |y_i|^\alpha` the loss is :math:`\lambda\sum_{y_i \succ y_j}\max(0, p_j -
    p_i) - \bar\ell(y_1)`. The likelihood term is a mean over the best answer's tokens; the paper writes a sum, its code
    takes a mean over the padded length.

    Args:
        log_probs: ``(B, K)`` summed log-probabilities of K answers to each prompt, the best first, none equally good.
        tokens: ``(B, K)`` tokens of each, at least 1.
        rank_weight: :math:`\lambda`.
        length_penalty: :math:`\alpha`; 1 makes scores means per token.

    Returns:
        ``(losses (B,), scores (B, K))``, the scores detached.
    """
    scores = log_probs / tokens**length_penalty
    excess = torch.relu(scores.unsqueeze(1) - scores.unsqueeze(2))  # [b, i, j]: by how much j is above i
    losses = rank_weight * excess.triu(1).sum((1, 2)) - log_probs[:, 0] / tokens[:, 0]
    return losses, scores.detach()
