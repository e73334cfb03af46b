"""What held-out rows are compared with: the policy that a run began with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hbat_lightning.scoring import Scorer

ROUNDING = 1e-3  # nats; two passes over the same rows at the same weights differ by less


class InitialScores:
    """Summed log-probabilities of the held-out rows under the initial policy of the run, two sequences to a row.

    They are computed once, so that the figures of a run stay on one scale whatever its reference is in training.
    """

    def __init__(self) -> None:
        self._scores = torch.empty(0, 2)

    @torch.no_grad()
    def keep(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Score all held-out rows, which come in their order."""
        self._scores = torch.cat([score(inputs).row_sums().view(2, -1).T.cpu() for inputs in batches])

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        """``(2, B)`` those of a micro-batch: of the first B sequences in it, and of the other B."""
        return self._scores[inputs["index"].cpu()].T.to(inputs["labels"].device)
