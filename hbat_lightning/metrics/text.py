"""Metrics of generated text by the text alone; nothing is downloaded."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from rouge_score.rouge_scorer import RougeScorer
from torch import Tensor

from hbat_lightning.completions import Completed
from hbat_lightning.metrics.base import CompletionMetric, MeanScore, joined

_KINDS = ("rouge1", "rouge2", "rougeL")


class Rouge(MeanScore):
    """ROUGE-1, -2 and -L (F1, with stemming) against the data's answer.

    It is that of the package ``rouge-score`` (Lin 2004), per pair, then the mean; rouge-Lsum is left out, since its sentence
    splitter would be downloaded.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(_KINDS, **kwargs)
        self._scorer = RougeScorer(list(_KINDS), use_stemmer=True)

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`; none without a reference."""
        return [self._one(answer) if answer.reference.strip() else {} for answer in answers]

    def _one(self, answer: Completed) -> dict[str, float]:
        scores = self._scorer.score(answer.reference, answer.completion)
        return {kind: scores[kind].fmeasure for kind in _KINDS}


class ExactMatch(MeanScore):
    """Share of completions that are the data's answer, but for white space around it."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["exact_match"], **kwargs)

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`; none without a reference."""
        return [
            {"exact_match": float(answer.completion.strip() == answer.reference.strip())}
            if answer.reference.strip()
            else {}
            for answer in answers
        ]


class Length(MeanScore):
    """Mean ``length`` of completions in tokens, and the share that ``stopped`` by themselves."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(["length", "stopped"], **kwargs)

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`."""
        return [{"length": float(answer.tokens), "stopped": float(answer.stopped)} for answer in answers]


class Repetition(MeanScore):
    """Mean share of a completion's n-grams that it has had before; 0 where it is shorter.

    Args:
        n: Words of an n-gram.
        kwargs: torchmetrics' own.
    """

    def __init__(self, n: int = 4, **kwargs: Any) -> None:
        if n < 1:
            raise ValueError(f"n must be at least 1, got {n}")
        super().__init__(["repetition"], **kwargs)
        self.n = n

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """See :meth:`CompletionMetric.score`."""
        return [{"repetition": repetition(answer.completion, self.n)} for answer in answers]

    def scale(self, name: str) -> str:
        """The n-grams' size."""
        return f"n = {self.n}"


class Distinct(CompletionMetric):
    """Distinct-n (Li et al. 2016): different n-grams of *all* completions over the number of their n-grams.

    It falls with the number of completions, so compare it on the same prompts only.

    Args:
        n: Words of an n-gram, each its own figure ``distinctN``.
        kwargs: torchmetrics' own.
    """

    def __init__(self, n: Sequence[int] = (1, 2), **kwargs: Any) -> None:
        if not n or min(n) < 1:
            raise ValueError(f"n must be numbers from 1 on, got {n}")
        super().__init__(**kwargs)
        self.n = tuple(n)
        self.names = tuple(f"distinct{size}" for size in self.n)
        for size in self.n:
            self.add_state(f"distinct{size}", [], dist_reduce_fx="cat")  # 64 bits of each n-gram's digest

    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """None: it is no mean of scores."""
        return [{} for _ in answers]

    def add(self, answers: Sequence[Completed]) -> None:
        """See :meth:`CompletionMetric.add`."""
        for size in self.n:
            digests = [_digest(gram) for answer in answers for gram in ngrams(answer.completion, size)]
            getattr(self, f"distinct{size}").append(torch.tensor(digests, dtype=torch.int64, device=self.device))

    def compute(self) -> dict[str, Tensor]:
        """See :meth:`CompletionMetric.compute`."""
        found = {}
        for size in self.n:
            seen = joined(getattr(self, f"distinct{size}"))
            if len(seen):
                found[f"distinct{size}"] = torch.tensor(len(set(seen.tolist())) / len(seen), dtype=torch.float64)
        return found


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """N-grams of a text's words, which white space separates."""
    words = text.split()
    return [tuple(words[begin : begin + n]) for begin in range(len(words) - n + 1)]


def repetition(text: str, n: int) -> float:
    """Share of a text's n-grams that it has had before, in [0, 1); 0 where there are none."""
    grams = ngrams(text, n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _digest(gram: tuple[str, ...]) -> int:
    return int.from_bytes(hashlib.blake2b("\x1f".join(gram).encode(), digest_size=8).digest(), "big", signed=True)


def standard_metrics() -> list[CompletionMetric]:
    """What ``hbat test`` reports unless told otherwise."""
    return [Rouge(), ExactMatch(), Length(), Distinct(), Repetition()]
