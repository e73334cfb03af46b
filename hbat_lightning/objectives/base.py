"""An objective: a loss over one kind of data, trainable alone and inside a hybrid by the same code."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from hbat_lightning.alignment import AlignmentModule, OptimizerState
from hbat_lightning.data.kinds import RowKind
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.lr import LRSchedule
from hbat_lightning.metrics import CompletionMetric
from hbat_lightning.optimization import default_optimizer
from hbat_lightning.phases import Progress
from hbat_lightning.policy import Policy, Reference
from hbat_lightning.schedules import Single
from hbat_lightning.scoring import Scorer
from hbat_lightning.sums import Sums

_DEFAULT_GENERATION = GenerationSettings()


class ObjectiveModule(AlignmentModule):
    """Base of the objectives.

    Alone, it is a module whose only objective is itself, on a schedule of a single phase. Inside a
    :class:`~hbat_lightning.HybridAlignmentModule` only ``lr`` and what belongs to the loss count; the rest is the
    hybrid's.

    Args:
        policy: The policy; left out inside a hybrid.
        lr: Peak learning rate of this objective's phases; the optimizer's own when not given.
        epochs: Passes over the data when it trains alone.
        optimizer: Makes the optimizer when it trains alone.
        optimizer_state: See :class:`~hbat_lightning.alignment.AlignmentModule`; without effect when it trains alone.
        lr_schedule: Shape of the learning rate when it trains alone.
        generation: How ``test`` and ``predict`` complete prompts when it trains alone.
        seed: Seed of the run when it trains alone.
        metrics: What ``test`` and ``predict`` say of completions when it trains alone.
    """

    slot: str
    rows: RowKind
    dropout: bool

    def __init__(
        self,
        policy: Policy | None = None,
        lr: float | None = None,
        epochs: int = 1,
        optimizer: OptimizerCallable = default_optimizer,
        optimizer_state: OptimizerState = "reset",
        lr_schedule: LRSchedule | None = None,
        generation: GenerationSettings = _DEFAULT_GENERATION,
        seed: int | None = None,
        metrics: list[CompletionMetric] | None = None,
    ) -> None:
        if lr is not None and lr < 0:
            raise ValueError(f"lr must not be negative, got {lr}")
        super().__init__(
            policy, Single(self.slot, epochs), optimizer, optimizer_state, lr_schedule, generation, seed, metrics
        )
        self.lr = lr

    @property
    def objectives(self) -> Mapping[str, ObjectiveModule]:
        """Itself, by the name of its slot."""
        return {self.slot: self}

    @property
    def references(self) -> tuple[Reference, ...]:
        """None, unless the loss compares with one."""
        return ()

    def describe(self) -> str:
        """What it minimises and with which settings, for the model card."""
        return type(self).__name__

    @abstractmethod
    def loss(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Sums over a micro-batch; ``"loss"`` carries the graph."""

    def evaluate(self, policy: Policy, inputs: dict[str, Tensor]) -> Sums:
        """Sums over held-out rows: those of the loss."""
        return self.loss(policy, inputs)

    def progress(self, means: Mapping[str, float]) -> Progress:
        """Its loss."""
        return Progress(means["loss"])

    def held_out_scale(self, figure: str) -> str:
        """The loss with its settings."""
        return self.describe()

    def prepare_evaluation(self, score: Scorer, batches: Iterable[dict[str, Tensor]]) -> None:
        """Nothing to prepare, unless evaluation compares with the initial policy."""

    def build(self, policy: Policy, device: torch.device) -> None:
        """Nothing, unless the objective needs something beside the policy."""

    def own_parameters(self, policy: Policy) -> Sequence[nn.Parameter]:
        """None, unless something trains beside the policy."""
        return ()

    def identity(self) -> dict[str, tuple[str, str]]:
        """Nothing, unless the objective learns from something beside its data."""
        return {}

    def export(self, folder: Path) -> Sequence[str]:
        """Nothing to add to the exported policy."""
        return ()

    def state(self) -> dict[str, Any]:
        """Nothing, unless the objective keeps something over its phases."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to take over."""
