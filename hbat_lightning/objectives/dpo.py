"""Direct preference optimisation."""

from __future__ import annotations

from typing import Any

from hbat_lightning.functional import dpo_loss
from hbat_lightning.objectives.pairwise import Comparison, Pairs, ReferencePairwiseModule
from hbat_lightning.policy import Reference


class DPOModule(ReferencePairwiseModule):
    """Preference training by DPO (Rafailov et al. 2023, eq. 7), a mean over the window's pairs.

    Training compares with ``reference``. Held-out pairs are always compared with the *initial* policy of the run, whose
    log-probabilities are computed once: so the curve of one run stays on one scale over all rounds.

    Args:
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability that a label is wrong (cDPO).
        reference: ``phase_start`` (the policy at the start of the phase, as the official code), ``initial`` (at the start
            of the run), or ``base`` (without adapter).
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        reference: Reference = "phase_start",
        **settings: Any,
    ) -> None:
        if beta <= 0 or not 0 <= label_smoothing < 0.5:
            raise ValueError(f"beta must be > 0 and label_smoothing in [0, 0.5), got {beta} and {label_smoothing}")
        super().__init__(beta, reference, **settings)
        self.label_smoothing = label_smoothing

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        smoothing = f", label smoothing {self.label_smoothing:g}" if self.label_smoothing else ""
        return f"DPO: beta {self.beta:g}{smoothing}, reference {self.reference}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.dpo_loss`."""
        return Comparison(*dpo_loss(*pairs.by_answer, self.beta, self.label_smoothing))
