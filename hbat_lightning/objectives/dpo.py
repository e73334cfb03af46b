"""Direct preference optimisation and its relatives: losses of the margin between two log-ratios."""

from __future__ import annotations

from typing import Any

from hbat_lightning.functional import dpo_loss, hinge_loss, ipo_loss, robust_dpo_loss, rpo_loss
from hbat_lightning.objectives.pairwise import Comparison, Pairs, ReferencePairwiseModule
from hbat_lightning.policy import Reference

_PER_TOKEN = "mean log-ratios per token"


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


class RobustDPOModule(ReferencePairwiseModule):
    """DPO that stays right on average where a known share of the labels is flipped (Chowdhury et al. 2024).

    cDPO, :class:`DPOModule` with ``label_smoothing``, only softens the labels; this removes the bias, and its loss may
    fall below 0.

    Args:
        beta: Strength of the pull towards the reference.
        label_smoothing: Probability that a label is wrong.
        reference: See :class:`ReferencePairwiseModule`.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(
        self,
        beta: float = 0.1,
        label_smoothing: float = 0.1,
        reference: Reference = "phase_start",
        **settings: Any,
    ) -> None:
        if not 0 <= label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
        super().__init__(beta, reference, **settings)
        self.label_smoothing = label_smoothing

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"robust DPO: beta {self.beta:g}, label noise {self.label_smoothing:g}, reference {self.reference}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.robust_dpo_loss`."""
        return Comparison(*robust_dpo_loss(*pairs.by_answer, self.beta, self.label_smoothing))


class IPOModule(ReferencePairwiseModule):
    """Preference training by IPO (Azar et al. 2023, eq. 17): a margin of 1 / (2 beta), no more and no less.

    Args:
        beta: Strength of the pull towards the reference; the paper's tau.
        per_token: Compare mean log-ratios per token, as TRL does and says that the authors have confirmed. Otherwise sums
            over tokens: the paper's equation as it is written, and Mitchell's code. Rewards follow this choice.
        reference: See :class:`ReferencePairwiseModule`.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(
        self, beta: float = 0.1, per_token: bool = False, reference: Reference = "phase_start", **settings: Any
    ) -> None:
        super().__init__(beta, reference, **settings)
        self.per_token = per_token

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        of = _PER_TOKEN if self.per_token else "summed log-ratios"
        return f"IPO: beta {self.beta:g}, of {of}, reference {self.reference}"

    def held_out_scale(self, figure: str) -> str:
        """See :meth:`ReferencePairwiseModule.held_out_scale`; of means, another answer may be the likelier one."""
        return _PER_TOKEN if self.per_token and figure == "accuracy" else super().held_out_scale(figure)

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.ipo_loss`."""
        pairs = pairs.per_token() if self.per_token else pairs
        return Comparison(*ipo_loss(*pairs.by_answer, self.beta))


class HingeModule(ReferencePairwiseModule):
    """Preference training by a hinge on the margin: SLiC's loss (Zhao et al. 2023) on log-ratios, as in RSO (Liu et al. 2023).

    Args:
        beta: Inverse of the margin from which on a pair counts for nothing; RSO's gamma.
        reference: See :class:`ReferencePairwiseModule`.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(self, beta: float = 0.1, reference: Reference = "phase_start", **settings: Any) -> None:
        super().__init__(beta, reference, **settings)

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"hinge (SLiC, RSO): beta {self.beta:g}, reference {self.reference}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.hinge_loss`."""
        return Comparison(*hinge_loss(*pairs.by_answer, self.beta))


class RPOModule(ReferencePairwiseModule):
    """DPO with the negative log-likelihood of the chosen answer (Pang et al. 2024, "Iterative RPO").

    The likelihood term is a mean over each chosen answer's own tokens and then over pairs, as in the paper; TRL's ``sft``
    term is a mean over all chosen tokens of a batch, in which long answers weigh more. It is logged as ``nll``.

    Args:
        beta: Strength of the pull towards the reference.
        alpha: Weight of the likelihood term.
        reference: See :class:`ReferencePairwiseModule`.
        settings: See :class:`~hbat_lightning.objectives.base.ObjectiveModule`.
    """

    def __init__(
        self, beta: float = 0.1, alpha: float = 1.0, reference: Reference = "phase_start", **settings: Any
    ) -> None:
        if alpha < 0:
            raise ValueError(f"alpha must not be negative, got {alpha}")
        super().__init__(beta, reference, **settings)
        self.alpha = alpha

    def describe(self) -> str:
        """See :meth:`~hbat_lightning.objectives.base.ObjectiveModule.describe`."""
        return f"RPO: beta {self.beta:g}, weight of the likelihood {self.alpha:g}, reference {self.reference}"

    def compare(self, pairs: Pairs) -> Comparison:
        """See :func:`~hbat_lightning.functional.rpo_loss`."""
        compared = rpo_loss(*pairs.by_answer, pairs.tokens[0], self.beta, self.alpha)
        return Comparison(*compared, {"nll": pairs.chosen_nll})
