"""Keeps what ``validate`` and ``test`` have measured row by row."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from hbat_lightning.evaluating import EvaluatingModule
from hbat_lightning.files import replace_text
from hbat_lightning.trainer_checks import is_dry_run

VALIDATED, TESTED = "validated.json", "tested.jsonl"


class EvaluationRows(Callback):
    """Writes what the figures in ``evaluation.csv`` are means of, so that ``hbat compare`` can give intervals.

    ``validated.json`` has the held-out rows of the last ``hbat validate``, and ``tested.jsonl`` a row for each answer of the
    last ``hbat test``, with its scores. They are no ``predictions.jsonl``, which another run may be measured against.
    """

    def __init__(self) -> None:
        self._answers: list[dict[str, Any]] = []

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the held-out rows, where this is no validation of a fit."""
        if trainer.state.fn == "validate" and isinstance(pl_module, EvaluatingModule) and not is_dry_run(trainer):
            kept = {"figures": pl_module.held_out_rows()}
            replace_text(self._path(trainer, VALIDATED), json.dumps(kept) + "\n")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        self._answers = []

    @rank_zero_only
    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the answers of all processes."""
        rows: Sequence[dict[str, Any]] = outputs or []
        self._answers += rows

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write them, whole or not at all: figures of a part would be compared with figures of all."""
        if not is_dry_run(trainer):
            text = "".join(json.dumps(row) + "\n" for row in self._answers)
            replace_text(self._path(trainer, TESTED), text)
        self._answers = []

    @staticmethod
    def _path(trainer: Trainer, name: str) -> Path:
        return Path(trainer.default_root_dir) / name
