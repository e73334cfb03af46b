"""Writes the result where other libraries find it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.files import share_weights
from hbat_lightning.model_card import Training, describe_method, write_card
from hbat_lightning.trainer_checks import is_dry_run


class PolicyExport(Callback):
    """At the end of training, writes ``adapter/`` (LoRA: a PEFT folder) or ``model/`` (full fine-tune) into the run folder.

    A model card stands beside the weights, and whatever an objective adds to them.
    """

    def __init__(self) -> None:
        self._due = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is something to write."""
        self._due = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, while the weights still are where they were trained."""
        self._write(trainer, pl_module)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it where there was nothing left to train: a run that was stopped behind its last round goes on here."""
        if self._due:
            self._write(trainer, pl_module)

    @rank_zero_only
    def _write(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = False
        if not isinstance(pl_module, AlignmentModule) or is_dry_run(trainer):
            return
        folder, callbacks = self.folder(trainer, pl_module), trainer.callbacks  # type: ignore[attr-defined]
        pl_module.policy.export(folder)
        notes = [note for objective in pl_module.objectives.values() for note in objective.export(folder)]
        share_weights(folder)
        method = describe_method(pl_module, callbacks)
        training = Training(pl_module.origin, trainer.global_step, Path(trainer.default_root_dir), method)
        write_card(folder, pl_module.policy.weights, training, notes)

    @staticmethod
    def folder(trainer: Trainer, module: AlignmentModule) -> Path:
        """Where it goes."""
        return Path(trainer.default_root_dir) / ("model" if module.policy.lora is None else "adapter")
