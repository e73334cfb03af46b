"""Supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from hbat_lightning.data.kinds import INSTRUCTIONS
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.policy import Policy
from hbat_lightning.schedules import INSTRUCTION
from hbat_lightning.scoring import TokenScores
from hbat_lightning.sums import Sums


class SFTModule(ObjectiveModule):
    """Instruction following: negative log-likelihood, a mean over the window's supervised tokens.

    It is :func:`hbat_lightning.functional.sft_loss` over a whole accumulation window: micro-batches hand on sums, and the
    stream knows the window's number of tokens.
    """

    slot = INSTRUCTION
    rows = INSTRUCTIONS
    dropout = True

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        return "SFT: negative log-likelihood, mean over the supervised tokens of a window"

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`."""
        return {"loss": _negative_log_likelihood(policy.score(inputs))}

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Loss per token, and exact match per row.

        A row matches when every supervised token is the most likely one after the true tokens before it. For the answer
        of a single turn that is the case exactly when greedy decoding gives the answer and stops.
        """
        scores = policy.score(inputs, with_correct=True)
        wrong = scores.row_sums((~scores.correct).float()) if scores.correct is not None else scores.row_sums()
        losses, tokens = loss_of_each(scores)
        return {"loss": (losses, tokens), "exact_match": ((wrong == 0) & (tokens > 0), tokens > 0)}


def loss_of_each(scores: TokenScores) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood and supervised tokens of every row, ``(B,)`` each."""
    return -scores.row_sums(), scores.row_sums(torch.ones_like(scores.log_probs))


def _negative_log_likelihood(scores: TokenScores) -> tuple[Tensor, Tensor]:
    count = torch.tensor(scores.log_probs.numel(), device=scores.log_probs.device)
    return -scores.log_probs.sum(), count
