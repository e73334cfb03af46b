"""What held-out rows are compared with: the policy that a run began with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hbat_lightning.scoring import Scorer

ROUNDING = 1e-3  # nats; two passes over the same rows at the same weights differ by less


class InitialScores:
    """Summed log-probabilities of the held-out rows under the initial policy of the run, two sequences to a row.

    They are computed once, so that the figures of a run stay on one scale whatever its reference is in training. Of several
    processes each keeps those of the rows that it evaluates.
    """

    def __init__(self) -> None:
        self._scores = torch.empty(0, 2)

    @torch.no_grad()
    def keep(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Score held-out rows; their ``index`` says which ones."""
        parts = [(inputs["index"].cpu(), score(inputs).row_sums().view(2, -1).T.cpu()) for inputs in batches]
        if not parts:
            return
        index, scores = (torch.cat(part) for part in zip(*parts, strict=True))
        self._scores = scores.new_full((int(index.max()) + 1, 2), torch.nan)
        self._scores[index] = scores

    def of(self, inputs: dict[str, Tensor]) -> Tensor:
        """``(2, B)`` those of a micro-batch: of the first B sequences in it, and of the other B."""
        return self._scores[inputs["index"].cpu()].T.to(inputs["labels"].device)
