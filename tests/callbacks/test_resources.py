"""Times and tokens of whole windows."""

from __future__ import annotations

import time
from typing import Any

import pytest
from lightning.pytorch import Callback

from hbat_lightning.callbacks import ResourceMonitor
from tests.support import Recorder

PAUSE = 0.02


class Pause(Callback):
    """Makes every micro-batch and every validation batch slow."""

    def on_train_batch_start(self, *_: Any) -> None:
        time.sleep(PAUSE)

    def on_validation_batch_start(self, *_: Any) -> None:
        time.sleep(50 * PAUSE)


def test_a_step_is_its_whole_window_and_nothing_else(make_hybrid: Any, fit: Any) -> None:
    recorder = Recorder()
    run = fit(make_hybrid(), ResourceMonitor(), Pause(), recorder, accumulate_grad_batches=3, limit_val_batches=1)
    seconds, speeds = (run.log.column(f"resources/{name}") for name in ("step_seconds", "tokens_per_second"))
    assert len(seconds) == run.trainer.global_step == len(recorder.windows)
    for took, speed, window in zip(seconds, speeds, recorder.windows, strict=True):
        assert len(window) == 3
        assert 3 * PAUSE <= took < 50 * PAUSE
        tokens = sum(int(batch.inputs["attention_mask"].sum()) for batch in window)
        assert took * speed == pytest.approx(tokens)
