"""Preference losses on pairs that need no reference: neither a snapshot nor a second pass."""

from __future__ import annotations

from typing import Any

from hbat_lightning.functional import orpo_loss, rrhf_loss, simpo_loss
from hbat_lightning.objectives.pairwise import Comparison, Pairs, PairwiseModule


class SimPOModule(PairwiseModule):
    """Preference training by SimPO (Meng et al. 2024): mean log-probabilities per token as rewards, and a margin.

    Rewards are beta times the mean log-probability per token; the logged ``margin`` is before gamma is taken off.

    Args:
        beta: Scale of the rewards.
        gamma: The margin that the chosen answer's reward shall have. The authors tell it as a share of beta, 0.25 here.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(self, beta: float = 2.0, gamma: float = 0.5, **settings: Any) -> None:
        if beta <= 0 or gamma < 0:
            raise ValueError(f"beta must be > 0 and gamma not negative, got {beta} and {gamma}")
        super().__init__(**settings)
        self.beta, self.gamma = beta, gamma

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"SimPO: beta {self.beta:g}, gamma {self.gamma:g}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.simpo_loss`."""
        chosen, rejected, *_ = pairs.per_token().by_answer
        return Comparison(*simpo_loss(chosen, rejected, self.beta, self.gamma))


class ORPOModule(PairwiseModule):
    """Preference training by ORPO (Hong et al. 2024): likelihood of the chosen answer, and the odds ratio of both.

    The likelihood, logged as ``nll``, is of the chosen answer's tokens and not of its prompt, as in the authors' code with
    ``--disable_prompt_loss``; a mean over each answer's own tokens, and then over pairs. Rewards are log-odds, so that
    ``margin`` is the log odds ratio.

    Args:
        weight: Weight of the odds ratio term; the paper's lambda.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(self, weight: float = 0.1, **settings: Any) -> None:
        if weight < 0:
            raise ValueError(f"weight must not be negative, got {weight}")
        super().__init__(**settings)
        self.weight = weight

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"ORPO: weight of the odds ratio {self.weight:g}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.orpo_loss`."""
        chosen, rejected, *_ = pairs.per_token().by_answer
        return Comparison(*orpo_loss(chosen, rejected, self.weight), {"nll": pairs.chosen_nll})


class RRHFModule(PairwiseModule):
    """Preference training by RRHF (Yuan et al. 2023): ranks answers by likelihood, and imitates the best.

    The paper ranks any number of answers to a prompt; :func:`~hbat_lightning.functional.rrhf_loss` does too, but data here
    are pairs, so this is its case of two. Rewards are the scores that are ranked, log-probabilities over length to the
    power of ``length_penalty``. The likelihood of the chosen answer is logged as ``nll``.

    Args:
        rank_weight: Weight of the ranking term; 1 as in the paper and the authors' script (their code's default is 100).
        length_penalty: Exponent of the length; 1 makes scores means per token.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(self, rank_weight: float = 1.0, length_penalty: float = 1.0, **settings: Any) -> None:
        if rank_weight < 0 or length_penalty < 0:
            raise ValueError(
                f"rank_weight and length_penalty must not be negative, got {rank_weight}, {length_penalty}"
            )
        super().__init__(**settings)
        self.rank_weight, self.length_penalty = rank_weight, length_penalty

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"RRHF: weight of the ranking {self.rank_weight:g}, length penalty {self.length_penalty:g}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.rrhf_loss`."""
        losses, scores = rrhf_loss(pairs.log_probs.T, pairs.tokens.T, self.rank_weight, self.length_penalty)
        return Comparison(losses, scores[:, 0], scores[:, 1], {"nll": pairs.chosen_nll})
