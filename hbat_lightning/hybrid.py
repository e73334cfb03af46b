"""Hybrid alignment training: two objectives, one policy, one schedule."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch.cli import OptimizerCallable

from hbat_lightning.alignment import AlignmentModule, OptimizerState
from hbat_lightning.generation import GenerationSettings
from hbat_lightning.lr import LRSchedule
from hbat_lightning.metrics import CompletionMetric
from hbat_lightning.objectives import ObjectiveModule
from hbat_lightning.optimization import default_optimizer
from hbat_lightning.policy import Policy
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Rounds, Schedule

_DEFAULT_GENERATION = GenerationSettings()


class HybridAlignmentModule(AlignmentModule):
    """Alternates an instruction and a preference objective on one policy (Hbat, arXiv 2406.15178).

    Args:
        policy: The policy both objectives train.
        instruction: The instruction objective; its own policy, optimizer and schedule are not used.
        preference: The preference objective, likewise.
        schedule: Which objective trains when; 10 rounds of 3 + 1 epochs when not given.
        optimizer: Makes the one optimizer from the trained parameters.
        optimizer_state: At a switch: ``reset`` (as the official code), ``shared``, or ``per_objective``.
        lr_schedule: Shape of the learning rate; a cosine in every phase when not given.
        generation: How ``test`` and ``predict`` complete prompts.
        seed: Seed of row order, held-out rows, adapter weights and dropout; that of ``seed_everything`` when not given.
        metrics: What ``test`` and ``predict`` say of completions; ROUGE, exact match, length and variety when not given.
    """

    def __init__(
        self,
        policy: Policy,
        instruction: ObjectiveModule,
        preference: ObjectiveModule,
        schedule: Schedule | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        optimizer_state: OptimizerState = "reset",
        lr_schedule: LRSchedule | None = None,
        generation: GenerationSettings = _DEFAULT_GENERATION,
        seed: int | None = None,
        metrics: list[CompletionMetric] | None = None,
    ) -> None:
        super().__init__(
            policy, schedule or Rounds(), optimizer, optimizer_state, lr_schedule, generation, seed, metrics
        )
        for name, objective in ((INSTRUCTION, instruction), (PREFERENCE, preference)):
            if objective.slot != name:
                raise ValueError(f"model.init_args.{name}: {type(objective).__name__} trains on {objective.slot} data")
        self.instruction, self.preference = instruction, preference

    @property
    def objectives(self) -> Mapping[str, ObjectiveModule]:
        """Both objectives."""
        return {INSTRUCTION: self.instruction, PREFERENCE: self.preference}
