"""Trainer settings: what is refused because it cannot be honoured, and where validation falls."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.utilities import rank_zero_info

from hbat_lightning.errors import UserError
from hbat_lightning.schedules import Plan
from hbat_lightning.slurm import take_over_requeueing
from hbat_lightning.strategies import strategy_refusals

LIGHTNING_DEFAULT_EPOCHS = 1000  # what Trainer(max_epochs=None) turns into


def is_dry_run(trainer: Any) -> bool:
    """Whether this is a ``fast_dev_run``, which must leave no file."""
    return bool(trainer.fast_dev_run)


def scaler_of(trainer: Trainer) -> torch.amp.GradScaler | None:
    """The gradient scaler of fp16; no other precision has one."""
    plugin = trainer.precision_plugin
    return plugin.scaler if isinstance(plugin, MixedPrecision) else None


def check_trainer(trainer: Trainer, plan: Plan) -> None:
    """Refuse Trainer settings under which phases, windows or precision would not be what was asked for.

    Raises:
        UserError: Says which setting, and what to use instead.
    """
    rounds = len(plan.rounds)
    if is_dry_run(trainer):
        rank_zero_info("fast_dev_run: only the first micro-batches of the first phase; no switch is reached")
    if trainer.max_epochs in (None, -1) or LIGHTNING_DEFAULT_EPOCHS == trainer.max_epochs > rounds:
        trainer.fit_loop.max_epochs = rounds
        rank_zero_info(f"max_epochs follows the schedule: {rounds}")
    if take_over_requeueing(trainer) is not None:
        rank_zero_info("SLURM's requeueing is off: there is no WindowCheckpoint to go on from")
    for refused, message in _refusals(trainer, plan):
        if refused:
            raise UserError(message)


def _refusals(trainer: Any, plan: Plan) -> list[tuple[bool, str]]:
    rounds = len(plan.rounds)
    lengths = {sum(phase.windows for phase in phases) for phases in plan.rounds}
    half = str(trainer.precision) in ("bf16-true", "16-true")
    # A share of the round is rounded to whole windows; given as a time, there is no val_check_interval at all.
    in_batches = trainer._val_check_time_interval is None and isinstance(trainer.val_check_interval, int)
    interval = trainer.val_check_interval if in_batches else None
    accumulation = any(isinstance(c, GradientAccumulationScheduler) for c in trainer.callbacks)
    return [
        (
            trainer.max_epochs is not None and trainer.max_epochs > rounds,
            f"trainer.max_epochs {trainer.max_epochs} is more than the schedule's {rounds} rounds: leave it out, or change "
            "the schedule",
        ),
        *strategy_refusals(trainer.strategy),
        (
            trainer.limit_train_batches != 1.0 and not trainer.fast_dev_run,
            "trainer.limit_train_batches would cut rounds off before their preference phase: use "
            "data.init_args.instruction.limit and .preference.limit, or trainer.max_steps",
        ),
        (
            trainer.overfit_batches != 0,
            "trainer.overfit_batches is not supported: use data.init_args.instruction.limit and .preference.limit",
        ),
        (
            accumulation,
            "GradientAccumulationScheduler would break windows: use a constant trainer.accumulate_grad_batches",
        ),
        (
            half,
            f"trainer.precision {trainer.precision} would cast trained tensors, whose small steps half precision loses: use "
            "bf16-mixed, and policy.init_args.dtype bfloat16 for the frozen base",
        ),
        (
            trainer.check_val_every_n_epoch is None,
            "trainer.check_val_every_n_epoch null is not supported: validation falls at every switch; for more of it set "
            "trainer.val_check_interval to a number of micro-batches",
        ),
        (
            trainer._val_check_time_interval is not None,
            "a trainer.val_check_interval in time is not supported: give a number of micro-batches",
        ),
        (
            interval is not None and interval % trainer.accumulate_grad_batches != 0,
            f"trainer.val_check_interval {interval} would validate, and save, inside a window of "
            f"{trainer.accumulate_grad_batches} micro-batches: give a multiple of trainer.accumulate_grad_batches",
        ),
        (
            len(lengths) > 1 and trainer.reload_dataloaders_every_n_epochs != 1,
            "rounds differ in length: pass reload_dataloaders_every_n_epochs=1 to the Trainer, or it would cut longer ones",
        ),
    ]


def next_validation(trainer: Trainer, plan: Plan, batch_idx: int) -> None:
    """Have Lightning validate at the next end of a phase, or earlier where ``val_check_interval`` says so.

    Lightning validates after micro-batch i when ``(i + 1) % trainer.val_check_batch == 0``; with the next wanted point as
    ``val_check_batch`` that is true at this point and nowhere before it. A share of the round is rounded down to whole windows.

    Args:
        trainer: The running trainer.
        plan: The phases.
        batch_idx: Micro-batch of the current epoch, from 0; -1 before the first.
    """
    if trainer.current_epoch >= len(plan.rounds):
        return
    done, end, window = max(batch_idx, 0) + 1, 0, trainer.accumulate_grad_batches
    for phase in plan.rounds[trainer.current_epoch]:
        end += phase.windows * window
        if end >= done:
            break
    interval = trainer.val_check_interval
    share = int(trainer.num_training_batches * interval) // window * window
    every = interval if isinstance(interval, int) else min(max(window, share), int(trainer.num_training_batches))
    trainer.val_check_batch = min(end, -(-done // every) * every)
