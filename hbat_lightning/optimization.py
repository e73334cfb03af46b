"""The one optimizer of a run, and its learning rates as functions of the absolute step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from hbat_lightning.errors import UserError
from hbat_lightning.lr import LRSchedule
from hbat_lightning.optimizer_state import require_restorable
from hbat_lightning.phases import BOTH, Plan


def default_optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """AdamW with the official betas, no weight decay."""
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0)


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that train together.

    Attributes:
        parameters: The parameters.
        objective: The objective that they belong to; ``None`` where they are the policy's. Those of an objective, such as a
            value function, have no gradient in the phases of another, and stand still there.
    """

    parameters: Sequence[nn.Parameter]
    objective: str | None


def configure(
    make: OptimizerCallable,
    groups: Sequence[ParameterGroup],
    plan: Plan,
    shape: LRSchedule,
    rates: Mapping[str, float | None],
) -> dict[str, Any]:
    """Make optimizer and schedule, as Lightning wants them.

    Args:
        make: Makes the optimizer.
        groups: What trains.
        plan: The phases of the run.
        shape: Shape of the learning rate.
        rates: Peak learning rate of each objective's phases; the optimizer's own where ``None``.

    Raises:
        UserError: When the optimizer cannot be used, or objectives that share a phase have rates of their own.
    """
    optimizer = make([{"params": list(group.parameters)} for group in groups])
    require_restorable(optimizer)
    base = optimizer.defaults["lr"]
    if base <= 0:
        raise UserError(
            f"optimizer.init_args.lr must be above 0, got {base}: objectives' rates are told relative to it"
        )
    own = [name for name, rate in rates.items() if rate is not None]
    if plan.mixed and own:
        raise UserError(
            f"model.init_args.{own[0]}.init_args.lr: this schedule trains both objectives in one phase, at one rate; set it to "
            "null, and model.init_args.optimizer.init_args.lr to the rate"
        )
    peaks = {BOTH: 1.0} | {name: 1.0 if rate is None else rate / base for name, rate in rates.items()}
    scheduler = LambdaLR(optimizer, _factor(plan, shape, peaks))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def put_in_force(trainer: Any, was: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Have a resumed run train with its own optimizer settings: a checkpoint brings back those that it was saved under.

    Learning rates are functions of the step, so they are set anew in any case. Other options only where they have changed:
    some optimizers keep their state among them.

    Args:
        trainer: The trainer, with its state restored.
        was: Settings in the checkpoint, by dotted name.
        now: Settings of the run.
    """
    (optimizer,), (config,) = trainer.optimizers, trainer.lr_scheduler_configs
    scheduler, base = config.scheduler, optimizer.defaults["lr"]
    named = {name: f"optimizer.{name}" for name in optimizer.defaults if name != "lr"}
    changed = [name for name, key in named.items() if was.get(key) != now.get(key)]
    scheduler.base_lrs = [base] * len(optimizer.param_groups)
    for group, factor in zip(optimizer.param_groups, scheduler.lr_lambdas, strict=True):
        group |= {name: optimizer.defaults[name] for name in changed}
        group["initial_lr"], group["lr"] = base, base * factor(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def _factor(plan: Plan, shape: LRSchedule, peaks: Mapping[str, float]) -> Callable[[int], float]:
    # A closure: a callable object would put its attributes into the checkpoint.
    def factor(step: int) -> float:
        phase, inside = plan.at(step)
        place = (inside, phase.length) if shape.per_phase else (step, plan.total_steps)
        return peaks[phase.objective] * shape.factor(*place)

    return factor
