"""Metrics of generated text, as torchmetrics classes; nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor
from torchmetrics import Metric

_KINDS = ("rouge1", "rouge2", "rougeL")


class CompletionMetrics(Metric):
    """ROUGE-1, -2 and -L (F1, with stemming), exact match, length, and the share of completions that stop.

    ROUGE is that of the package ``rouge-score`` (Lin 2004), per pair, then the mean; rouge-Lsum is left out, since its
    sentence splitter would be downloaded.
    """

    full_state_update = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._scorer = RougeScorer(list(_KINDS), use_stemmer=True)
        for name in (*_KINDS, "exact_match", "length", "stopped", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, completion: str, reference: str, tokens: int, stopped: bool) -> None:
        """Add one completion.

        Args:
            completion: What the policy wrote.
            reference: What the data says.
            tokens: Length of the completion in tokens, its stop token included.
            stopped: Whether it ended with a stop token.
        """
        scores = self._scorer.score(reference, completion)
        values = {kind: scores[kind].fmeasure for kind in _KINDS}
        values |= {
            "exact_match": completion.strip() == reference.strip(),
            "length": tokens,
            "stopped": stopped,
            "count": 1,
        }
        for name, value in values.items():
            setattr(self, name, getattr(self, name) + float(value))

    def compute(self) -> dict[str, Tensor]:
        """Means over all completions: shares in ``[0, 1]``, ``length`` in tokens."""
        count = torch.as_tensor(self.count).clamp(min=1)
        return {
            name: torch.as_tensor(getattr(self, name)) / count for name in (*_KINDS, "exact_match", "length", "stopped")
        }
