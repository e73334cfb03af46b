"""What the owning module asks of an objective, whatever its loss."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from torch import Tensor

from hbat_lightning.data.kinds import RowKind
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.scoring import Scorer
from hbat_lightning.sums import Sums


class Objective(Protocol):
    """What the owning module asks of an objective."""

    rows: RowKind
    lr: float | None
    dropout: bool

    @property
    def references(self) -> tuple[Reference, ...]:
        """Frozen snapshots of the policy that the loss compares with."""

    def describe(self) -> str:
        """What it minimises and with which settings, for the model card."""

    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Sums over a micro-batch; ``"loss"`` is among them."""

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Sums over held-out rows."""

    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """See the held-out rows once, with the scores of the initial policy."""
