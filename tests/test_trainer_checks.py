"""Trainer settings that are refused, each with a message that names it, and where validation is placed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DDPStrategy

from hbat_lightning.errors import UserError
from hbat_lightning.schedules import INSTRUCTION, PREFERENCE, Interval, Plan, Rounds, Single
from hbat_lightning.trainer_checks import check_trainer, next_validation

EQUAL = Interval(2, 3, 2).plan({INSTRUCTION: [5], PREFERENCE: [5]})
UNEQUAL = Rounds(2, 1, 1).plan({INSTRUCTION: [2, 3], PREFERENCE: [1, 1]})


def trainer(**settings: Any) -> Trainer:
    defaults: dict[str, Any] = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "reload_dataloaders_every_n_epochs": 1}
    return Trainer(**(defaults | settings))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_epochs": 3}, "max_epochs 3 is more than the schedule's 2 rounds"),
        ({"devices": 2, "strategy": DDPStrategy(static_graph=True)}, r"static_graph=True\) is not supported"),
        ({"limit_train_batches": 4}, "limit_train_batches would cut rounds off .*max_steps"),
        ({"limit_train_batches": 0.5}, "limit_train_batches would cut rounds off"),
        ({"overfit_batches": 2}, "(overfit|limit_train)_batches"),
        (
            {"callbacks": [GradientAccumulationScheduler({0: 2})]},
            "GradientAccumulationScheduler would break windows: .*accumulate_grad_batches",
        ),
        ({"precision": "bf16-true"}, "precision bf16-true would cast trained tensors.*bf16-mixed"),
        ({"check_val_every_n_epoch": None, "val_check_interval": 5}, "check_val_every_n_epoch null is not supported"),
        ({"val_check_interval": "00:00:10:00"}, "val_check_interval in time is not supported"),
        (
            {"val_check_interval": 6, "accumulate_grad_batches": 4},
            "val_check_interval 6 would validate, and save, inside a window of 4 micro-batches: give a multiple",
        ),
        ({"reload_dataloaders_every_n_epochs": 0}, "rounds differ in length: pass reload_dataloaders_every_n_epochs=1"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_settings_that_cannot_be_honoured_are_refused(settings: Any, message: str) -> None:
    plan = UNEQUAL if "reload_dataloaders_every_n_epochs" in settings else EQUAL
    with pytest.raises(UserError, match=message):
        check_trainer(trainer(**({"max_epochs": 2} | settings)), plan)


@pytest.mark.parametrize(
    "settings",
    [
        {"max_epochs": 2},
        {"max_epochs": 1},
        {"max_epochs": 2, "max_steps": 3},
        {"max_epochs": -1, "max_steps": 3},
        {"max_epochs": 2, "reload_dataloaders_every_n_epochs": 0},  # rounds of one length need no reload
        {"max_epochs": 2, "precision": "bf16-mixed"},
        {"max_epochs": 2, "val_check_interval": 4, "accumulate_grad_batches": 2},
        {"max_epochs": 2, "val_check_interval": 0.5},
        {"max_epochs": 2, "limit_val_batches": 0},
        {"fast_dev_run": 2},
        {"max_epochs": 2, "devices": 2},
        {"max_epochs": 2, "devices": 2, "strategy": "ddp"},
    ],
    ids=str,
)
def test_other_settings_are_not(settings: Any) -> None:
    check_trainer(trainer(**settings), EQUAL)


def test_epochs_follow_the_schedule_where_none_are_given(make_hybrid: Any, fit: Any) -> None:
    run = fit(make_hybrid(schedule=Interval(3, 1, 1)))
    assert run.trainer.max_epochs == run.trainer.current_epoch == 3


def test_a_refusal_comes_before_weights_are_loaded(make_hybrid: Any, make_data: Any) -> None:
    module = make_hybrid()
    with pytest.raises(UserError, match="limit_train_batches"):
        trainer(limit_train_batches=2).fit(module, make_data())
    assert not module.policy.built


def validations(plan: Plan, interval: float, accumulate: int) -> list[list[int]]:
    """Micro-batches of every round after which Lightning would validate, by its own rule."""
    found = []
    for number, phases in enumerate(plan.rounds):
        total = accumulate * sum(phase.windows for phase in phases)
        fake: Any = SimpleNamespace(
            current_epoch=number,
            accumulate_grad_batches=accumulate,
            val_check_interval=interval,
            num_training_batches=total,
            val_check_batch=None,
        )
        next_validation(fake, plan, -1)
        here = []
        for batch in range(total):
            next_validation(fake, plan, batch)
            if (batch + 1) % fake.val_check_batch == 0:
                here.append(batch + 1)
        found.append(here)
    return found


def test_validation_falls_at_every_end_of_a_phase() -> None:
    assert validations(EQUAL, 1.0, accumulate=4) == [[12, 20], [12, 20]]
    assert validations(UNEQUAL, 1.0, accumulate=2) == [[4, 6], [6, 8]]
    assert validations(Single(INSTRUCTION, 2).plan({INSTRUCTION: [3]}), 1.0, accumulate=2) == [[6], [6]]


def test_validation_falls_between_them_where_an_interval_says_so() -> None:
    assert validations(EQUAL, 8, accumulate=4) == [[8, 12, 16, 20]] * 2
    assert validations(EQUAL, 0.4, accumulate=4) == [[8, 12, 16, 20]] * 2
    for share in (0.25, 0.3, 0.01):  # whole windows, and at least one
        assert validations(EQUAL, share, accumulate=4) == [[4, 8, 12, 16, 20]] * 2
    assert validations(EQUAL, 1, accumulate=1) == [[1, 2, 3, 4, 5]] * 2
    assert validations(EQUAL, 100, accumulate=4) == [[12, 20]] * 2


def test_after_the_last_round_there_is_nothing_to_place() -> None:
    fake: Any = SimpleNamespace(current_epoch=2, val_check_batch="untouched")
    next_validation(fake, EQUAL, 0)
    assert fake.val_check_batch == "untouched"
