"""What a run costs: time, speed and memory of every optimizer step."""

from __future__ import annotations

import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT

from hbat_lightning.ranks import Ranks
from hbat_lightning.training_data import MicroBatch


class ResourceMonitor(Callback):
    """Logs seconds, tokens per second and, on a GPU, the peak of allocated memory of each optimizer step.

    Of several devices: the slowest one's seconds, the tokens of all, and the highest peak.

    A step is its whole window, from the arrival of the first micro-batch to the end of the update; the first of a phase
    has the switch in it. Validation and checkpoints are no part of it. Times differ from run to run, and so will
    ``metrics.csv``.

    Logs ``resources/step_seconds``, ``resources/tokens_per_second`` (without padding; chosen and rejected both count) and
    ``resources/peak_gib`` (allocated by tensors, in GiB of 2**30 bytes; without the CUDA context and what the allocator
    keeps in reserve).
    """

    def __init__(self) -> None:
        self._began = 0.0
        self._tokens: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Start the clock with the first micro-batch of a window."""
        if not isinstance(batch, MicroBatch):
            return
        if not self._tokens:
            if pl_module.device.type == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self._began = time.perf_counter()
        self._tokens.append(batch.inputs["attention_mask"].sum())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: Any, batch_idx: int
    ) -> None:
        """Log the window."""
        if not isinstance(batch, MicroBatch) or not batch.last:
            return
        peak = 0.0
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() / 2**30
        own = (time.perf_counter() - self._began, float(torch.stack(self._tokens).sum()), peak)
        seconds, tokens, peaks = zip(*Ranks.of(trainer).gather(own), strict=True)
        values = {
            "resources/step_seconds": max(seconds),
            "resources/tokens_per_second": sum(tokens) / max(seconds),
        }
        if pl_module.device.type == "cuda":
            values["resources/peak_gib"] = max(peaks)
        self._tokens = []
        pl_module.log_dict(values, on_step=True, on_epoch=False, batch_size=1)
