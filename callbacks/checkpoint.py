"""Checkpoints from which a run goes on exactly."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, cast

from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.files import PARTIAL
from hbat_lightning.metrics_logger import MetricsLogger
from hbat_lightning.run_folder import newest_first
from hbat_lightning.slurm import requeue, take_over_requeueing
from hbat_lightning.stop_signals import StopSignals
from hbat_lightning.trainer_checks import is_dry_run
from hbat_lightning.training_data import MicroBatch


class WindowCheckpoint(ModelCheckpoint):
    """Saves after every validation (so at every switch), and every few optimizer steps in between.

    Only where nothing is in flight: never inside an accumulation window, whose gradients no file holds, and never
    between the last step of a phase and its validation, which a resumed run would skip. The newest file is kept, and the
    one before, should the newest be damaged.

    SIGTERM, as a job scheduler sends it, and Ctrl-C stop the run at the next such place: the window in hand is finished, a
    validation that is due or under way too, and a checkpoint is saved. During the sanity check, before anything is
    trained, they stop it at once; so does a second Ctrl-C, and leaves the checkpoint before. The signal that a job of SLURM has
    asked for with ``--signal`` stops a run as SIGTERM does, and puts the job back into the queue.

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
            save_top_k=-1,  # Lightning removes none: it would remove the one before first
            save_last="link",
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # a file of the same step is damaged, or the same
        )
        self.every_n_train_steps = every_n_train_steps
        self._signals = StopSignals()
        self._for_requeue: signal.Signals | None = None
        self._written: list[Path] = []

    # ---- hooks ----------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget what an earlier run was asked."""
        super().setup(trainer, pl_module, stage)
        self._signals = StopSignals()
        if stage == "fit":
            self._for_requeue = take_over_requeueing(trainer) or self._for_requeue

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Link to what is gone on from: a process may have ended between a file and its link, and none may be saved after it.

        Here and not where training starts, which it does not where nothing is left to train.
        """
        super().on_fit_start(trainer, pl_module)
        came_from, folder = Path(str(trainer.ckpt_path or "")).resolve(), Path(str(self.dirpath)).resolve()
        if trainer.ckpt_path and came_from.parent == folder and not is_dry_run(trainer):
            link = folder / f"{self.CHECKPOINT_NAME_LAST}{self.FILE_EXTENSION}"
            self._link_checkpoint(trainer, str(came_from), str(link))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals: Lightning has set its own handlers by now, which would stop inside a window."""
        self._signals.listen(self._for_requeue)

    def on_validation_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Stop a sanity check; there is nothing to lose yet."""
        if trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen for signals, where there was no sanity check."""
        super().on_train_start(trainer, pl_module)
        self._take_stock(trainer)
        self._signals.listen(self._for_requeue)
        self._stop_if_asked(trainer)

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
        due = bool(self.every_n_train_steps) and trainer.global_step % cast(int, self.every_n_train_steps) == 0
        asked = self._asked_to_stop(trainer)
        if due or stops or asked:
            _log_ahead(trainer)
            self._save_now(trainer)
        if asked:
            self._stop(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after validation."""
        self._save_now(trainer)
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._stop_if_asked(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save at the end of a round that had no validation.

        Not where a limit has cut the round off: Lightning's counters then say that it is over.
        """
        if isinstance(pl_module, AlignmentModule) and pl_module.plan.round_ends_at(trainer.global_step):
            self._save_now(trainer)
            self._stop_if_asked(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save nothing: what can be gone on from is saved, and Lightning would save in a dry run too."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Say what an interrupted run can go on from."""
        super().on_exception(trainer, pl_module, exception)
        if isinstance(exception, KeyboardInterrupt | SystemExit) and trainer.state.fn == "fit":
            newest = self.best_model_path or "no checkpoint yet, so the beginning"
            _say(f"\nstopped at step {trainer.global_step}; --ckpt_path last goes on from {newest}")

    def state_dict(self) -> dict[str, Any]:
        """Nothing: Lightning's would tell paths, and from it how often a run was stopped."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing over; checkpoints of earlier versions hold paths."""

    # ---- stopping -------------------------------------------------------------------------------------------------

    def _asked_to_stop(self, trainer: Trainer) -> bool:
        """Whether any process of the run was asked to stop."""
        return bool(trainer.strategy.reduce_boolean_decision(self._signals.heard, all=False))

    def _stop_if_asked(self, trainer: Trainer) -> None:
        if self._asked_to_stop(trainer):
            self._stop(trainer)

    def _stop(self, trainer: Trainer) -> None:
        if trainer.strategy.reduce_boolean_decision(self._signals.wants_requeue, all=False) and trainer.is_global_zero:
            requeue()
        self._signals.stop()

    # ---- saving ---------------------------------------------------------------------------------------------------

    def _take_stock(self, trainer: Trainer) -> None:
        """What a resumed run has come from is saved; whatever lies beside it in the same folder is this run's too."""
        self._last_global_step_saved = trainer.global_step
        self.best_model_path = came_from = str(trainer.ckpt_path or "")
        folder = Path(str(self.dirpath)).resolve()
        own = bool(came_from) and Path(came_from).resolve().parent == folder
        self._written = newest_first(folder) if own else []
        if trainer.is_global_zero and not is_dry_run(trainer):
            for path in folder.glob(f".step=*{PARTIAL}"):  # a process was killed as it wrote
                path.unlink(missing_ok=True)

    def _save_now(self, trainer: Trainer) -> None:
        if self._should_skip_saving_checkpoint(trainer):
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsLogger):
                logger.sync()
        before, candidates = self.best_model_path, self._monitor_candidates(trainer)
        self._save_topk_checkpoint(trainer, candidates)
        self._save_last_checkpoint(trainer, candidates)
        self._tidy(before)

    @staticmethod
    def _link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
        """Lightning removes the link before it makes the new one; here there is one at any moment."""
        if trainer.is_global_zero:
            made = Path(linkpath).with_name(f".{Path(linkpath).name}{PARTIAL}")
            made.unlink(missing_ok=True)
            made.symlink_to(os.path.relpath(filepath, made.parent))
            os.replace(made, linkpath)
        trainer.strategy.barrier()

    @rank_zero_only
    def _tidy(self, before: str) -> None:
        """Remove this run's older checkpoints, and one that was damaged: not the newest, nor the one before it."""
        keep = {Path(path).resolve() for path in (self.best_model_path, before) if path}
        self._written = [*self._written, Path(self.best_model_path).resolve()]
        for path in set(self._written) - keep:
            path.unlink(missing_ok=True)
        self._written = [path for path in self._written if path in keep]


def _log_ahead(trainer: Trainer) -> None:
    """Have the step's row in ``metrics.csv`` before its checkpoint is there; Lightning logs it after this hook."""
    connector: Any = trainer._logger_connector
    if not connector.should_update_logs or is_dry_run(trainer):
        return
    metrics = convert_tensors_to_scalars(connector.metrics["log"])
    metrics.setdefault("epoch", trainer.current_epoch)
    for logger in trainer.loggers:
        if isinstance(logger, MetricsLogger):
            logger.log_ahead(metrics, trainer.fit_loop.epoch_loop._batches_that_stepped)


@rank_zero_only
def _say(line: str) -> None:
    print(line)
