"""What all metrics of completions have in common: a score for each answer, and a figure for all of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from hbat_lightning.completions import Completed
from hbat_lightning.metrics.bootstrap import MIN_ROWS, bootstrap

if TYPE_CHECKING:
    from hbat_lightning.policy import Policy


@dataclass(frozen=True)
class Surroundings:
    """Where a metric works.

    Attributes:
        policy: The policy that writes, with its weights.
        device: Where models are.
        folder: The run folder.
        rank: Number of the process.
    """

    policy: Policy
    device: torch.device
    folder: Path
    rank: int = 0


class CompletionMetric(Metric, ABC):
    """Base of the metrics of completions, as ``hbat test`` and ``hbat predict`` apply them.

    ``update`` scores answers and adds them up. Where several processes share the answers, each scores its own, and all add up
    everyone's; so nothing is to be synchronised, and ``sync_on_compute`` is off unless given.
    """

    full_state_update = False
    names: tuple[str, ...] = ()
    """What it gives, as far as that is known before anything is scored: no two metrics of a run may give the same."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**({"sync_on_compute": False} | kwargs))

    def build(self, surroundings: Surroundings) -> None:
        """Load what it needs; nothing. Idempotent."""

    @abstractmethod
    def score(self, answers: Sequence[Completed]) -> list[dict[str, float]]:
        """Scores of every answer by name; fewer, or none, where an answer has not what they need, such as a reference."""

    def scale(self, name: str) -> str:
        """What a score depends on beside the answer: scores of two runs compare where it is the same; nothing.

        Asked after :meth:`build`.
        """
        return ""

    def annotate(self, answers: Sequence[Completed]) -> None:
        """Score answers, and keep the scores in them, with their scales."""
        for answer, scores in zip(answers, self.score(answers), strict=True):
            answer.scores |= scores
            answer.scales |= {name: scale for name in scores if (scale := self.scale(name))}

    @abstractmethod
    def add(self, answers: Sequence[Completed]) -> None:
        """Add up answers that have their scores."""

    @abstractmethod
    def compute(self) -> dict[str, Tensor]:
        """The figures by name; those that nothing was counted for are left out."""

    def update(self, answers: Sequence[Completed], scored: bool = False) -> None:
        """Score answers, keep the scores in them, and add them up; only the latter where they have their scores."""
        if not scored:
            self.annotate(answers)
        self.add(answers)

    def notes(self) -> list[str]:
        """Sentences for the end of an evaluation, on what it did or cost; none."""
        return []


class MeanScore(CompletionMetric):
    """Base of the metrics that are means over answers of scores of their own.

    Args:
        names: The scores' names.
        kwargs: torchmetrics' own.
    """

    with_intervals: tuple[str, ...] = ()
    """Scores that compare two systems: their figures have ``…_low`` and ``…_high`` beside them, a bootstrap's at 95 %.

    Of fewer than :data:`~hbat_lightning.metrics.MIN_ROWS` answers there is no interval.
    """

    def __init__(self, names: Sequence[str], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.names = tuple(names)
        for name in self.names:
            self.add_state(name, torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")  # sum and count
        for name in self.with_intervals:
            self.add_state(f"{name}_of_each", [], dist_reduce_fx="cat")

    def add(self, answers: Sequence[Completed]) -> None:
        """See :meth:`CompletionMetric.add`."""
        for name in self.names:
            values = [answer.scores[name] for answer in answers if name in answer.scores]
            own = torch.tensor([sum(values), len(values)], dtype=torch.float64, device=self.device)
            setattr(self, name, getattr(self, name) + own)
            if name in self.with_intervals:
                each = torch.tensor(values, dtype=torch.float64, device=self.device)
                getattr(self, f"{name}_of_each").append(each)

    def compute(self) -> dict[str, Tensor]:
        """Means over the answers that have the score."""
        sums: Mapping[str, Tensor] = {name: torch.as_tensor(getattr(self, name)) for name in self.names}
        found = {name: total / count for name, (total, count) in sums.items() if count > 0}
        for name in self.with_intervals:
            each = joined(getattr(self, f"{name}_of_each")).tolist()
            if len(each) >= MIN_ROWS:
                spread = bootstrap(each)
                found |= {f"{name}_low": torch.tensor(spread.low), f"{name}_high": torch.tensor(spread.high)}
        return found


def joined(state: list[Tensor] | Tensor) -> Tensor:
    """A list state in one tensor; it is one already where processes have exchanged theirs."""
    return state if isinstance(state, Tensor) else torch.cat(state) if state else torch.empty(0)
