r"""Training a reward model on pairs, and how far its probabilities can be believed.

Under Bradley and Terry (1952) the chosen answer :math:`w` is preferred to the rejected one :math:`l` with probability
:math:`p = \sigma(r_w - r_l)`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_loss(chosen_rewards: Tensor, rejected_rewards: Tensor, margins: Tensor) -> Tensor:
    r"""Negative log-likelihood of the preferences, :math:`-\log\sigma(r_w - r_l - m)`.

    Without margins as in InstructGPT (Ouyang et al. 2022, arXiv 2203.02155, eq. 1), with them as in Llama 2 (Touvron et
    al. 2023, arXiv 2307.09288, eq. 2).

    Args:
        chosen_rewards: ``(B,)``.
        rejected_rewards: ``(B,)``.
        margins: ``(B,)``, the distance m that is asked for; 0 where nothing is known of it.

    Returns:
        Losses ``(B,)``.
    """
    return -logsigmoid(chosen_rewards - rejected_rewards - margins)


def preference_calibration(chosen_rewards: Tensor, rejected_rewards: Tensor) -> tuple[Tensor, Tensor]:
    r"""What a reward model claims to know of pairs, and how wrong that is.

    Args:
        chosen_rewards: ``(B,)``.
        rejected_rewards: ``(B,)``.

    Returns:
        ``(confidences, brier_scores)``, each ``(B,)``: the probability :math:`\max(p, 1 - p)` that it gives to the answer
        which it prefers itself, whose mean is the accuracy where it is calibrated; and :math:`(1 - p)^2` (Brier 1950), 0
        for certainty that is right, 1/4 for none, 1 for certainty that is wrong.
    """
    difference = chosen_rewards - rejected_rewards
    return torch.sigmoid(difference.abs()), torch.sigmoid(-difference).square()
