"""A progress bar that says where in the alternation a run is."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.training_data import MicroBatch


class PhaseProgressBar(TQDMProgressBar):
    """One bar per round, headed ``round 1/3 · instruction · phase 1/6``."""

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Name the round, the objective and the phase."""
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if isinstance(pl_module, AlignmentModule) and isinstance(batch, MicroBatch):
            plan = pl_module.plan
            self.train_progress_bar.set_description(
                f"round {batch.round + 1}/{len(plan.rounds)} · {batch.objective} · phase {batch.phase + 1}/{plan.phase_count}",
                refresh=False,
            )

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Without the version number, which the run folder's own logger does not have."""
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        return metrics
