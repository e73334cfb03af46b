"""What callbacks share that protect what the other objective needs: measuring it, phase by phase."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.between_steps import row_gradients
from hbat_lightning.errors import UserError
from hbat_lightning.importance import DriftImportance, Importance, Tensors
from hbat_lightning.switches import PhaseCallback, PhaseKey
from hbat_lightning.training_data import MicroBatch


class ImportanceCallback(PhaseCallback):
    """Knows, while one objective trains, how important every trained tensor is to the *other* objective.

    Importance is measured at the end of each phase against the policy's phase-start snapshot, and added up over phases.
    In the first phase there is none: no other objective has trained yet.

    Args:
        importance: Measures what a phase did; drift per tensor when not given.
    """

    def __init__(self, importance: Importance | None = None) -> None:
        self.importance = importance or DriftImportance()
        self._objective: str | None = None
        self._held_for: dict[str, dict[str, Tensor]] = {}
        self._units = 0.0

    @property
    def active(self) -> bool:
        """Whether it does anything; nothing is measured where it does not."""
        return True

    @abstractmethod
    def protect(self, importance: Tensors | None) -> None:
        """Decide what the phase in hand must leave alone, and how much.

        Args:
            importance: Of the other objective's phases so far; ``None`` where there were none.
        """

    @abstractmethod
    def pull(self, module: AlignmentModule) -> dict[str, Tensor]:
        """Show the task's gradients to the importance, then act on them; returns what is logged of it."""

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask for the phase-start snapshot, and forget an earlier run; a checkpoint is loaded after this."""
        if stage != "fit":
            return
        self._objective, self._held_for = None, {}
        self.importance.reset()
        self.owner(pl_module).keep_phase_start()
        if self.active and self.owner(pl_module).plan.mixed:
            raise UserError(
                f"{type(self).__name__} protects what the other objective's phases have moved, and under this schedule both "
                "train in one phase: leave it out of trainer.callbacks, or take the schedule Rounds or Interval"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Move what a checkpoint brought to the device, and decide anew from it."""
        self._held_for = {
            objective: {name: value.to(pl_module.device) for name, value in tensors.items()}
            for objective, tensors in self._held_for.items()
        }
        self.protect(self._held_for.get(self._objective or ""))

    def on_switch(self, trainer: Trainer, module: AlignmentModule, ended: PhaseKey | None, begun: PhaseKey) -> None:
        """Add up what the ended phase did, and weigh what the beginning one must hold."""
        gradients: Iterator[dict[str, Tensor]] = iter(())
        if ended is not None and self.importance.samples:
            gradients = row_gradients(module, ended, self.importance.samples)
        self.weigh(module, None if ended is None else ended.objective, begun.objective, gradients)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: MicroBatch, batch_idx: int
    ) -> None:
        """Note how many units the window has, for Fisher information."""
        self._units = trainer.accumulate_grad_batches * trainer.world_size / batch.scale

    def report(self) -> dict[str, Any]:
        """The importance in force in the ended phase, a mean per tensor."""
        held = self._held_for.get(self._objective or "", {}) if self.active else {}
        return {"importance": {name: float(value.mean()) for name, value in held.items()}} if held else {}

    # ---- measuring ------------------------------------------------------------------------------------------------

    def weigh(
        self, module: AlignmentModule, ended: str | None, begun: str, gradients: Iterator[dict[str, Tensor]]
    ) -> None:
        """Credit the ended phase, and decide what the one that begins must hold.

        Args:
            module: The module that alternates.
            ended: The objective whose phase has ended; ``None`` at the start of the run.
            begun: The objective whose phase begins.
            gradients: Of single rows of the ended phase, where the importance wants them.
        """
        if ended is not None and self.active:
            self._credit(module, ended, gradients)
        self._objective = begun
        self.protect(self._held_for.get(begun))

    @torch.no_grad()
    def _credit(self, module: AlignmentModule, ended: str, gradients: Iterator[dict[str, Tensor]]) -> None:
        """Add what the ended phase moved to what every other objective must hold."""
        trained = {name: parameter.detach() for name, parameter in module.policy.trained_parameters().items()}
        new = self.importance.measure(self.anchors(module), trained, gradients)
        new = module.ranks.first(
            new
        )  # with nondeterministic kernels, ranks' own would drift apart, and then the weights
        for objective in module.objectives:
            if objective != ended:
                self._held_for[objective] = self.importance.accumulate(self._held_for.get(objective), new)

    def observe(self, trained: dict[str, torch.nn.Parameter]) -> dict[str, Tensor]:
        """Show the task's gradients to the importance, and return them."""
        gradients = {name: parameter.grad for name, parameter in trained.items() if parameter.grad is not None}
        self.importance.observe(gradients, self._units)
        return gradients

    # ---- state ----------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Importance per objective, what the phase in hand has shown, and whose phase it is."""
        return {
            "objective": self._objective,
            "held_for": self._held_for,
            "importance": self.importance.state_dict(),
            "kind": self._kind,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a checkpoint's state; :meth:`on_fit_start` moves it to the device.

        Raises:
            UserError: When it was measured by another importance.
        """
        kind = state_dict.get("kind", self._kind)
        if kind != self._kind:
            raise UserError(
                f"{type(self).__name__}.importance: was {kind}, is {self._kind}: what one has measured says nothing to the "
                "other. Restore it, or start a new run in another folder"
            )
        self._objective = state_dict["objective"]
        self._held_for = state_dict["held_for"]
        self.importance.load_state_dict(state_dict["importance"])

    @property
    def _kind(self) -> str:
        each = "element" if self.importance.per_element else "tensor"
        return f"{type(self.importance).__name__} per {each}"

    # ---- whom it serves -------------------------------------------------------------------------------------------

    def owner(self, module: LightningModule) -> AlignmentModule:
        """The module, if it is one that alternates."""
        if not isinstance(module, AlignmentModule):
            raise UserError(f"{type(self).__name__} needs a module of hbat_lightning, not {type(module).__name__}")
        return module

    def anchors(self, module: AlignmentModule) -> dict[str, Tensor]:
        """The parameters at the start of the phase in hand."""
        anchors = module.policy.snapshot("phase_start")
        if anchors is None:
            raise UserError(
                "the policy was built without a phase-start snapshot: give the callback to the first Trainer"
            )
        return anchors
