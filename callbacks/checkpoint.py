"""Checkpoints from which a run goes on exactly."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.stream import MicroBatch


class WindowCheckpoint(ModelCheckpoint):
    """Saves after every validation (so at every switch), and every few optimizer steps in between.

    Only where nothing is in flight: never inside an accumulation window, whose gradients no file holds, and never
    between the last step of a phase and its validation, which a resumed run would skip.

    Args:
        every_n_train_steps: Optimizer steps between checkpoints inside a phase; only at switches when not given.
        dirpath: Where to save; ``checkpoints/`` in the run folder when not given.
    """

    def __init__(self, every_n_train_steps: int | None = None, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="step={step}",
            auto_insert_metric_name=False,
            every_n_train_steps=every_n_train_steps or 0,
            every_n_epochs=0,
            save_top_k=1,
            save_last="link",
            save_on_train_epoch_end=False,
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Save inside a phase."""
        if not isinstance(pl_module, AlignmentModule) or not isinstance(batch, MicroBatch) or not batch.last:
            return
        stops = trainer.should_stop or trainer.global_step == trainer.max_steps
        validates = (batch_idx + 1) % (trainer.val_check_batch or 1) == 0
        if pl_module.plan.ended_at(trainer.global_step) is not None or (validates and not stops):
            return
        if stops:
            self._save_now(trainer)
        else:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after validation."""
        self._save_now(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of a round that had no validation.

        Not where a limit has cut the round off: Lightning's counters then say that it is over.
        """
        if isinstance(pl_module, AlignmentModule) and pl_module.plan.round_ends_at(trainer.global_step):
            self._save_now(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: what can be gone on from is saved, and Lightning would save in a dry run too."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what an interrupted run can go on from."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt) and trainer.is_global_zero:
            newest = self.best_model_path or "no checkpoint yet, so the beginning"
            print(f"\nstopped at step {trainer.global_step}; --ckpt_path last goes on from {newest}")

    def _save_now(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)
