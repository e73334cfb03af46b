"""What all losses on pairs of a chosen and a rejected answer have in common: the one step that they share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hbat_lightning.data.kinds import PAIRS
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.objectives.held_out import ROUNDING, InitialScores
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.scoring import IGNORE, Scorer, TokenScores
from hbat_lightning.sums import Sums, of_all, of_each


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the answers of some pairs; in each tensor the chosen ones first, then the rejected ones.

    Attributes:
        log_probs: ``(2, B)`` sums over an answer's tokens under the policy.
        tokens: ``(2, B)`` supervised tokens of each answer, its stop token among them; at least 1.
        reference: ``(2, B)`` the sums under what the policy is compared with; 0 for a loss without a reference.
    """

    log_probs: Tensor
    tokens: Tensor
    reference: Tensor

    @property
    def by_answer(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities ``(B,)`` of chosen and rejected under the policy, and of both under the reference."""
        return self.log_probs[0], self.log_probs[1], self.reference[0], self.reference[1]

    @property
    def chosen_nll(self) -> Tensor:
        """``(B,)`` negative log-likelihood per token of each chosen answer, without its graph."""
        return -self.log_probs[0].detach() / self.tokens[0]

    def per_token(self) -> Pairs:
        """The same with means over an answer's tokens in the place of sums."""
        return Pairs(self.log_probs / self.tokens, self.tokens, self.reference / self.tokens)

    def where(self, mask: Tensor) -> Pairs:
        """Only the pairs that a mask ``(B,)`` keeps."""
        return Pairs(self.log_probs[:, mask], self.tokens[:, mask], self.reference[:, mask])


@dataclass(frozen=True)
class Comparison:
    """What a loss says of some pairs, each tensor ``(B,)``.

    Attributes:
        losses: The losses, with their graph.
        chosen_rewards: The score of each chosen answer, in the units in which the loss compares them; detached.
        rejected_rewards: The same of the rejected ones.
        parts: Further quantities to log by name, detached.
    """

    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class PairwiseModule(ObjectiveModule):
    """Base of the losses on pairs: a mean over the window's pairs of what :meth:`compare` says of each.

    Logged are the means over pairs of the ``loss``, of the rewards that the loss compares (``chosen_reward``,
    ``rejected_reward``, and ``margin``, their difference), and ``accuracy``, the share of pairs whose chosen answer has
    the higher reward. Held-out pairs have the same figures. A loss of this class has no reference: its held-out figures
    need nothing but the policy.

    Args:
        settings: See :class:`ObjectiveModule`.
    """

    slot = PREFERENCE
    rows = PAIRS
    dropout = False  # noise would hide which answer is the likelier one; TRL switches it off for all of these losses

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)

    @abstractmethod
    def compare(self, pairs: Pairs) -> Comparison:
        """Losses and rewards of pairs, none of which is padding."""

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`. Pairs without a supervised token count for nothing."""
        return of_all(self._compared(policy, inputs))

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """The same of held-out pairs, each for itself."""
        return of_each(self._compared(policy, inputs))

    def _compared(self, policy: Policy, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        reference = self._reference_log_probs(policy, inputs)
        return _values(self.compare(_real_pairs(policy.score(inputs), reference, inputs)))

    def _reference_log_probs(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        """``(2, B)`` what training compares the policy with."""
        return torch.zeros(2, len(inputs["labels"]) // 2, device=inputs["labels"].device)


class ReferencePairwiseModule(PairwiseModule):
    r"""Base of the losses on pairs that compare the policy with a reference.

    Their rewards are :math:`\beta\log(\pi/\pi^{ref})`. Training compares with ``reference``. Held-out pairs are always
    compared with the *initial* policy of the run, whose log-probabilities are computed once: so the curve of one run
    stays on one scale over all rounds.

    Args:
        beta: Strength of the pull towards the reference.
        reference: ``phase_start`` (the policy at the start of the phase, as the official code), ``initial`` (at the start
            of the run), or ``base`` (without adapter).
        settings: See :class:`ObjectiveModule`.
    """

    dropout = False  # with it, policy and reference would differ at the same weights, and the first DPO loss from ln 2

    def __init__(self, beta: float = 0.1, reference: Reference = "phase_start", **settings: Any) -> None:
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        super().__init__(**settings)
        self.beta, self.reference = beta, reference
        self._initial = InitialScores()

    @property
    def references(self) -> tuple[Reference, ...]:
        """The one it compares with."""
        return (self.reference,)

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """The same against the initial policy; a pair whose log-ratios differ by no more than rounding counts half.

        Before training all pairs are such ties, and the order of a sum would decide whether the accuracy is 0 or 1.
        """
        pairs = _real_pairs(policy.score(inputs), self._initial.of(inputs), inputs)
        compared = self.compare(pairs)
        ratios = pairs.log_probs - pairs.reference
        ties = (ratios[0] - ratios[1]).abs() <= ROUNDING
        won = (compared.chosen_rewards > compared.rejected_rewards) & ~ties
        return of_each(_values(compared) | {"accuracy": won + 0.5 * ties})

    def held_out_scale(self, figure: str) -> str:
        """Which answer is the likelier one, measured from where the run began, is the same question for all losses."""
        return "sums of log-ratios" if figure == "accuracy" else super().held_out_scale(figure)

    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Keep the initial policy's log-probabilities of the held-out pairs, in their order."""
        self._initial.keep(score, batches)

    def _reference_log_probs(self, policy: Policy, inputs: dict[str, Tensor]) -> Tensor:
        return policy.score_reference(inputs, self.reference).row_sums().view(2, -1)


def _values(compared: Comparison) -> dict[str, Tensor]:
    """What is logged, ``(B,)`` each."""
    chosen, rejected = compared.chosen_rewards, compared.rejected_rewards
    return {
        "loss": compared.losses,
        "accuracy": chosen > rejected,
        "chosen_reward": chosen,
        "rejected_reward": rejected,
        "margin": chosen - rejected,
        **compared.parts,
    }


def _real_pairs(scores: TokenScores, reference: Tensor, inputs: dict[str, Tensor]) -> Pairs:
    """The pairs that have anything supervised; padding pairs have not."""
    tokens = scores.row_sums(torch.ones_like(scores.log_probs)).view(2, -1).clamp(min=1)
    real = (inputs["labels"][:, 1:] != IGNORE).any(-1).view(2, -1).any(0)
    return Pairs(scores.row_sums().view(2, -1), tokens, reference).where(real)
