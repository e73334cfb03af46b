r"""Preference losses that compare a policy with a reference: of pairs, and of single answers with a verdict (KTO).

Throughout, :math:`\Delta(y) = \log\pi(y\mid x) - \log\pi^{ref}(y\mid x)` is an answer's log-ratio, summed over its
tokens, :math:`w` the chosen and :math:`l` the rejected answer. Rewards are :math:`\beta\Delta`, detached.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


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


def robust_dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
    label_smoothing: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""DPO for labels of which a known share is flipped (Chowdhury et al. 2024, arXiv 2403.00409).

    :math:`[-(1-\epsilon)\log\sigma(h) + \epsilon\log\sigma(-h)] / (1-2\epsilon)` with :math:`h = \beta[\Delta(w) -
    \Delta(l)]`: over labels flipped with probability :math:`\epsilon`, its mean is the DPO loss under the right ones.
    It has no lower bound.

    Args:
        policy_chosen: ``(B,)``, and what follows: see :func:`dpo_loss`.
        policy_rejected: ``(B,)``.
        reference_chosen: ``(B,)``.
        reference_rejected: ``(B,)``.
        beta: Strength of the pull towards the reference, > 0.
        label_smoothing: :math:`\epsilon` in ``[0, 0.5)``.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``, the rewards detached.
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    margin = chosen_rewards - rejected_rewards
    losses = -(1.0 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return losses / (1.0 - 2.0 * label_smoothing), chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Identity preference optimisation (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    :math:`\left([\Delta(w) - \Delta(l)] - \frac{1}{2\beta}\right)^2`; the paper calls :math:`\beta` :math:`\tau`.

    Args:
        policy_chosen: ``(B,)`` log-probabilities, summed as in the paper's equation and in Mitchell's code, or means per
            token as in TRL, whose authors had the paper's confirm it. So for what follows.
        policy_rejected: ``(B,)``.
        reference_chosen: ``(B,)``.
        reference_rejected: ``(B,)``.
        beta: Strength of the pull towards the reference, > 0: the margin sought is its half inverse, in nats.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``, the rewards detached.
    """
    chosen, rejected = policy_chosen - reference_chosen, policy_rejected - reference_rejected
    losses = (chosen - rejected - 1.0 / (2.0 * beta)).square()
    return losses, beta * chosen.detach(), beta * rejected.detach()


def hinge_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""Hinge on the normalised margin (Liu et al. 2023, "RSO", arXiv 2309.06657).

    :math:`\max(0, 1 - \beta[\Delta(w) - \Delta(l)])`: the calibration loss of SLiC (Zhao et al. 2023, arXiv 2305.10425)
    with log-ratios in the place of log-probabilities. The paper calls :math:`\beta` :math:`\gamma`.

    Args:
        policy_chosen: ``(B,)``, and what follows: see :func:`dpo_loss`.
        policy_rejected: ``(B,)``.
        reference_chosen: ``(B,)``.
        reference_rejected: ``(B,)``.
        beta: Inverse of the margin at which the loss becomes 0, > 0.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``, the rewards detached.
    """
    chosen_rewards = beta * (policy_chosen - reference_chosen)
    rejected_rewards = beta * (policy_rejected - reference_rejected)
    losses = torch.relu(1.0 - (chosen_rewards - rejected_rewards))
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def rpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    chosen_tokens: Tensor,
    beta: float,
    alpha: float,
) -> tuple[Tensor, Tensor, Tensor]:
    r"""DPO with the likelihood of the chosen answer (Pang et al. 2024, "Iterative RPO", arXiv 2404.19733, eq. 1).

    :math:`-\log\sigma(\beta[\Delta(w) - \Delta(l)]) - \frac{\alpha}{|w|}\log\pi(w\mid x)`. The second term is a mean over
    the tokens of each pair's own chosen answer, so that every pair weighs the same however a batch is cut.

    Args:
        policy_chosen: ``(B,)``, and what follows: see :func:`dpo_loss`.
        policy_rejected: ``(B,)``.
        reference_chosen: ``(B,)``.
        reference_rejected: ``(B,)``.
        chosen_tokens: ``(B,)`` tokens of the chosen answers, at least 1.
        beta: Strength of the pull towards the reference, > 0.
        alpha: Weight of the likelihood term.

    Returns:
        ``(losses, chosen_rewards, rejected_rewards)``, each ``(B,)``, the rewards detached.
    """
    losses, chosen, rejected = dpo_loss(policy_chosen, policy_rejected, reference_chosen, reference_rejected, beta=beta)
    return losses - alpha * policy_chosen / chosen_tokens, chosen, rejected


def kto_reference_point(policy_mismatched: Tensor, reference_mismatched: Tensor) -> Tensor:
    r"""KTO's estimate of KL(policy ‖ reference), against which answers are judged (arXiv 2402.01306).

    :math:`z_0 = \max(0, \mathrm{mean}\,\Delta(y'))` over answers :math:`y'` to other prompts than their own.

    Args:
        policy_mismatched: ``(M,)`` summed log-probabilities of those answers under the policy.
        reference_mismatched: ``(M,)``, under the reference.

    Returns:
        A scalar without a graph; 0 where there are none.
    """
    ratios = (policy_mismatched - reference_mismatched).detach()
    return (ratios.sum() / max(1, ratios.numel())).clamp(min=0.0)


def kto_loss(
    policy: Tensor,
    reference: Tensor,
    desirable: Tensor,
    reference_point: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""Kahneman-Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8).

    :math:`\lambda_D[1 - \sigma(\beta(\Delta(y) - z_0))]` for a desirable answer,
    :math:`\lambda_U[1 - \sigma(\beta(z_0 - \Delta(y)))]` for an undesirable one.

    Args:
        policy: ``(B,)`` summed log-probabilities of the answers under the policy.
        reference: ``(B,)``, under the reference.
        desirable: ``(B,)`` bool, the verdict on each.
        reference_point: :math:`z_0`, a scalar without a graph; see :func:`kto_reference_point`.
        beta: Strength of the pull towards the reference, > 0.
        desirable_weight: :math:`\lambda_D`.
        undesirable_weight: :math:`\lambda_U`.

    Returns:
        ``(losses, rewards)``, each ``(B,)``; the rewards :math:`\beta\Delta(y)` are detached.
    """
    ratios = policy - reference
    side = torch.where(desirable, ratios.new_tensor(1.0), ratios.new_tensor(-1.0))
    weights = torch.where(desirable, ratios.new_tensor(desirable_weight), ratios.new_tensor(undesirable_weight))
    # 1 - σ(x) = σ(-x), which keeps the digits that the subtraction would lose
    losses = weights * torch.sigmoid(-side * beta * (ratios - reference_point))
    return losses, beta * ratios.detach()
