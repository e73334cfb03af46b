"""Writes the result where other libraries find it."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from hbat_lightning.alignment import AlignmentModule
from hbat_lightning.trainer_checks import is_dry_run


class PolicyExport(Callback):
    """At the end of training, writes ``adapter/`` (LoRA: a PEFT folder) or ``model/`` (full fine-tune) into the run folder."""

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, while the weights still are where they were trained."""
        if isinstance(pl_module, AlignmentModule) and not is_dry_run(trainer):
            pl_module.policy.export(self.folder(trainer, pl_module))

    @staticmethod
    def folder(trainer: Trainer, module: AlignmentModule) -> Path:
        """Where it goes."""
        return Path(trainer.default_root_dir) / ("model" if module.policy.lora is None else "adapter")
