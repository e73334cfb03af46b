"""Kahneman-Tversky optimisation: preference training on single answers, each with a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from hbat_lightning.data.kinds import FEEDBACK
from hbat_lightning.functional import kto_loss, kto_reference_point
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.objectives.held_out import ROUNDING, InitialScores
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.scoring import IGNORE, Scorer
from hbat_lightning.sums import Sums


class KTOModule(ObjectiveModule):
    r"""Preference training by KTO (Ethayarajh et al. 2024, arXiv 2402.01306): a mean over the window's rows.

    A row is a prompt, one answer, and whether that is desirable. It is judged by how far its log-ratio to the reference
    lies above :math:`z_0`, an estimate of the KL divergence: the mean log-ratio of *mismatches*, each prompt of a
    micro-batch with another one's answer. As in TRL, :math:`z_0` is a statistic of the micro-batch, without a gradient.
    So this loss, unlike those on pairs, depends on how a window is cut into micro-batches, and the held-out loss on
    ``val_batch_size``; give both the size that memory allows. A micro-batch of one row has no mismatch, so ``batch_size``
    1 is refused. Where the last window of a pass leaves a slot with one row, that takes an answer from the next row of
    the data (:class:`~hbat_lightning.data.sets.FeedbackSet`).

    Logged are the means over rows of the ``loss`` and of ``kl``, that is :math:`z_0`; ``chosen_reward`` and
    ``rejected_reward``, the means of :math:`\beta\log(\pi/\pi^{ref})` over desirable and over undesirable rows;
    ``margin``, by how much the reward of a row lies on its right side of :math:`\beta z_0`; and ``accuracy``, the share
    of rows on their right side, where a row no further than rounding from :math:`z_0` counts half, as all do before
    training. Training compares with ``reference``, held-out rows with the initial policy of the run.

    Args:
        beta: Strength of the pull towards the reference.
        desirable_weight: Weight of desirable rows. The paper advises to balance the kinds, so that weight times number of
            rows is 1 to 4/3 times as much for the desirable ones as for the undesirable ones.
        undesirable_weight: Weight of undesirable rows.
        reference: ``phase_start`` (the policy at the start of the phase), ``initial`` (at the start of the run), or
            ``base`` (without adapter).
        settings: See :class:`ObjectiveModule`.
    """

    slot = PREFERENCE
    rows = FEEDBACK
    dropout = False  # with it, policy and reference would differ at the same weights

    def __init__(
        self,
        beta: float = 0.1,
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        reference: Reference = "phase_start",
        **settings: Any,
    ) -> None:
        if beta <= 0:
            raise ValueError(f"beta must be > 0, got {beta}")
        if min(desirable_weight, undesirable_weight) < 0 or max(desirable_weight, undesirable_weight) == 0:
            raise ValueError(
                "desirable_weight and undesirable_weight must not be negative, nor both 0, "
                f"got {desirable_weight} and {undesirable_weight}"
            )
        super().__init__(**settings)
        self.beta, self.reference = beta, reference
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self._initial = InitialScores()

    @property
    def references(self) -> tuple[Reference, ...]:
        """The one it compares with."""
        return (self.reference,)

    def describe(self) -> str:
        """See :meth:`ObjectiveModule.describe`."""
        weights = f"weights {self.desirable_weight:g} (desirable) and {self.undesirable_weight:g} (undesirable)"
        return f"KTO: beta {self.beta:g}, {weights}, reference {self.reference}"

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`. Rows without a supervised token count for nothing."""
        reference = policy.score_reference(inputs, self.reference).row_sums().view(2, -1)
        return self._sums(policy, inputs, reference)

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """The same against the initial policy; rows of a micro-batch share a reference point, so they are not told apart."""
        return self._sums(policy, inputs, self._initial.of(inputs))

    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Keep the initial policy's log-probabilities of the held-out answers and of their mismatches."""
        self._initial.keep(score, batches)

    def _sums(self, policy: Policy, inputs: dict[str, Tensor], reference: Tensor) -> Sums:
        matched, mismatched = _halves(inputs)
        real = (matched["labels"][:, 1:] != IGNORE).any(-1)
        # The pass with a graph comes first: under autocast, older releases of torch keep the casts of weights from a pass
        # without one, and the gradient would end there.
        scores = policy.score(matched).row_sums()[real]
        with torch.no_grad():
            samples = policy.score(mismatched).row_sums()[real]
        desirable, own, others = inputs["desirable"][real], reference[0][real], reference[1][real]
        point = kto_reference_point(samples, others)
        losses, rewards = kto_loss(
            scores, own, desirable, point, self.beta, self.desirable_weight, self.undesirable_weight
        )
        lead = (rewards - self.beta * point) * torch.where(desirable, 1.0, -1.0)
        ties = lead.abs() <= self.beta * ROUNDING
        count = real.sum()
        return {
            "loss": (losses.sum(), count),
            "accuracy": (((lead > 0) & ~ties).sum() + 0.5 * ties.sum(), count),
            "chosen_reward": (rewards[desirable].sum(), desirable.sum()),
            "rejected_reward": (rewards[~desirable].sum(), (~desirable).sum()),
            "margin": (lead.sum(), count),
            "kl": (point * count, count),
        }


def _halves(inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The answers of a micro-batch, and the mismatches behind them."""
    names = ("input_ids", "attention_mask", "labels")
    halves = zip(*(inputs[name].chunk(2) for name in names), strict=True)
    matched, mismatched = (dict(zip(names, half, strict=True)) for half in halves)
    return matched, mismatched
