"""Direct preference optimisation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from hbat_lightning.alignment import OptimizerState, default_optimizer
from hbat_lightning.functional import dpo_loss
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.lr import LRSchedule
from hbat_lightning.objectives.base import ObjectiveModule
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.schedules import PREFERENCE
from hbat_lightning.scoring import IGNORE, Scorer
from hbat_lightning.sums import Sums

ROUNDING = 1e-3  # nats; two passes over the same rows at the same weights differ by less
_DEFAULT_GENERATION = GenerationSettings()


class DPOModule(ObjectiveModule):
    """Preference training by DPO (Rafailov et al. 2023, eq. 7), a mean over the window's pairs.

    Training compares with ``reference``. Held-out pairs are always compared with the *initial* policy of the run, whose
    log-probabilities are computed once: so the curve of one run stays on one scale over all rounds.

    Args:
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability that a label is wrong (cDPO).
        reference: ``phase_start`` (the policy at the start of the phase, as the official code), ``initial`` (at the start
            of the run), or ``base`` (without adapter).
        policy: See :class:`ObjectiveModule`, as for what follows.
        lr: Peak learning rate of this objective's phases.
        epochs: Passes over the data when it trains alone.
        optimizer: Makes the optimizer when it trains alone.
        optimizer_state: Without effect when it trains alone.
        lr_schedule: Shape of the learning rate when it trains alone.
        generation: How ``test`` and ``predict`` complete prompts.
        seed: Seed of the run when it trains alone.
    """

    slot = PREFERENCE
    dropout = False  # with it, policy and reference would differ at the same weights, and the first loss from ln 2

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: Reference = "phase_start",
        policy: Policy | None = None,
        lr: float | None = None,
        epochs: int = 1,
        optimizer: OptimizerCallable = default_optimizer,
        optimizer_state: OptimizerState = "reset",
        lr_schedule: LRSchedule | None = None,
        generation: GenerationSettings = _DEFAULT_GENERATION,
        seed: int | None = None,
    ) -> None:
        if beta <= 0 or not 0 <= label_smoothing < 0.5:
            raise ValueError(f"beta must be > 0 and label_smoothing in [0, 0.5), got {beta} and {label_smoothing}")
        super().__init__(policy, lr, epochs, optimizer, optimizer_state, lr_schedule, generation, seed)
        self.beta, self.label_smoothing, self.reference = beta, label_smoothing, reference
        self._initial = torch.empty(0, 2)

    @property
    def references(self) -> tuple[Reference, ...]:
        """The one it compares with."""
        return (self.reference,)

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """See :meth:`ObjectiveModule.loss`. Pairs without a supervised token count for nothing."""
        reference = policy.score_reference(inputs, self.reference).row_sums().view(2, -1)
        return self._sums(policy.score(inputs).row_sums().view(2, -1), reference, inputs)

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """The same against the initial policy; a pair whose rewards differ by no more than rounding counts half.

        Before training all pairs are such ties, and the order of a sum would decide whether the accuracy is 0 or 1.
        """
        reference = self._initial[inputs["index"].cpu()].T.to(inputs["labels"].device)
        scores = policy.score(inputs).row_sums().view(2, -1)
        sums = self._sums(scores, reference, inputs)
        differences = (scores - reference)[:, _real_pairs(inputs)]
        ties = (differences[0] - differences[1]).abs() <= ROUNDING
        won = (differences[0] > differences[1]) & ~ties
        return sums | {"accuracy": (won.sum() + 0.5 * ties.sum(), sums["accuracy"][1])}

    @torch.no_grad()
    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Keep the initial policy's log-probabilities of the held-out pairs, in their order."""
        parts = [score(inputs).row_sums().view(2, -1).T.cpu() for inputs in batches]
        self._initial = torch.cat(parts)

    def _sums(self, scores: Tensor, reference: Tensor, inputs: dict[str, Tensor]) -> Sums:
        real = _real_pairs(inputs)
        policy, anchor = scores[:, real], reference[:, real]
        losses, chosen, rejected = dpo_loss(policy[0], policy[1], anchor[0], anchor[1], self.beta, self.label_smoothing)
        count = real.sum()
        return {
            "loss": (losses.sum(), count),
            "accuracy": ((chosen > rejected).sum(), count),
            "chosen_reward": (chosen.sum(), count),
            "rejected_reward": (rejected.sum(), count),
            "margin": ((chosen - rejected).sum(), count),
        }


def _real_pairs(inputs: dict[str, Tensor]) -> Tensor:
    """Which pairs ``(B,)`` have anything supervised; padding pairs have not."""
    return (inputs["labels"][:, 1:] != IGNORE).any(-1).view(2, -1).any(0)
