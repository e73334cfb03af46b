"""What the owning module asks of an objective, whatever its loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from hbat_lightning.data.kinds import RowKind
from hbat_lightning.phases import Progress
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
        """Of held-out rows, each for itself where that can be: intervals are drawn from rows, else from micro-batches."""

    def held_out_scale(self, figure: str) -> str:
        """What a held-out figure depends on beside rows and policy, in words: where they differ, figures do not compare."""

    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """See the held-out rows once, with the scores of the initial policy."""

    def progress(self, means: Mapping[str, float]) -> Progress:
        """How far it has come, by the means over a training window."""

    # ---- what only some objectives have: parameters and state of their own ------------------------------

    def build(self, policy: Policy, device: torch.device) -> None:
        """Make what the objective needs beside the policy, such as a value function. Idempotent."""

    def own_parameters(self, policy: Policy) -> Sequence[nn.Parameter]:
        """What trains beside the policy, in this objective's phases only."""

    def identity(self) -> dict[str, tuple[str, str]]:
        """What tells it from others beside its class, by name: what is compared, and the same in words. After build()."""

    def export(self, folder: Path) -> Sequence[str]:
        """Add to an exported policy what belongs to the result beside it; sentences on it for the model card."""

    def state(self) -> dict[str, Any]:
        """What must survive in a checkpoint beside parameters, in plain types and tensors."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over a checkpoint's state."""
