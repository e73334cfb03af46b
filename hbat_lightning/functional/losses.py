"""Losses as pure functions of logits or log-probabilities."""

from __future__ import annotations

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


def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Direct preference optimisation with the sigmoid loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With :math:`h = \beta[(\log\pi_w - \log\pi^{ref}_w) - (\log\pi_l - \log\pi^{ref}_l)]` the loss is
    :math:`-(1-\epsilon)\log\sigma(h) - \epsilon\log\sigma(-h)`; :math:`\epsilon > 0` is the conservative form for labels
    that are wrong with that probability (Mitchell 2023, "cDPO").

    Args:
        policy_chosen: ``(B,)`` summed log-probabilities of the chosen completions under the policy.
        policy_rejected: ``(B,)``, of the rejected ones.
        reference_chosen: ``(B,)``, of the chosen ones under the reference.
        reference_rejected: ``(B,)``, of the rejected ones under the reference.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: :math:`\epsilon` in ``[0, 0.5)``.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``; the rewards are
        :math:`\beta\log(\pi/\pi^{ref})`, detached.
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margin = chosen_rewards - rejected_rewards
    losses = -(1.0 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()
