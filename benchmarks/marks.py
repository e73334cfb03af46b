"""Says in which of a run's moments it is, for measurements of memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch import Callback

from hbat_lightning.cli import HbatCLI
from hbat_lightning.objectives.rollout import RolloutModule


class Marks(Callback):
    """Says, in the profile too, where a moment begins."""

    moment = "starting"

    def mark(self, name: str) -> None:
        """Begin a moment."""
        Marks.moment = name
        with torch.profiler.record_function(f"moment {name}"):
            pass

    def setup(self, trainer: Any, module: Any, stage: str) -> None:
        """Weights come next. Rollouts are asked for outside of any hook."""
        self.mark("loading")
        for name, objective in module.objectives.items():
            if isinstance(objective, RolloutModule):
                objective.roll_out = self._marked(f"{name}: rollouts", objective.roll_out)

    def _marked(self, moment: str, answer: Callable[..., Any]) -> Callable[..., Any]:
        def marked(*args: Any) -> Any:
            self.mark(moment)
            return answer(*args)

        return marked

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        """See the base class, as for what follows."""
        self.mark(f"{batch.objective}: micro-batch")

    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        """Gradients are there."""
        self.mark("optimizer step")

    def on_validation_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, loader: int = 0) -> None:
        """Held-out rows."""
        self.mark(f"{batch.objective}: validation")

    def on_sanity_check_start(self, trainer: Any, module: Any) -> None:
        """Before the first step."""
        self.mark("validation")

    def on_save_checkpoint(self, trainer: Any, module: Any, checkpoint: dict[str, Any]) -> None:
        """What a checkpoint holds has been gathered."""
        self.mark("checkpoint")

    def on_train_end(self, trainer: Any, module: Any) -> None:
        """Only the export is left."""
        self.mark("export")


class MarkedCLI(HbatCLI):
    """The command as it is, with marks."""

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add them."""
        trainer = super().instantiate_trainer(**kwargs)
        trainer.callbacks.insert(0, Marks())
        return trainer
