"""Which of Lightning's strategies a run can have, and what DDP must know of this one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Mapping
from typing import cast

import torch.distributed
from lightning.fabric.plugins import ClusterEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy

from hbat_lightning.errors import UserError
from hbat_lightning.objective import Objective
from hbat_lightning.policy import Policy


def require_strategy(trainer: Trainer) -> None:
    """Refuse what cannot work, before any process is started; of what an outer launcher has started, too few or too many.

    Raises:
        UserError: Says what to use instead.
        ValueError: Lightning's own words on numbers that do not fit.
    """
    strategy = trainer.strategy
    for refused, message in strategy_refusals(strategy):
        if refused:
            raise UserError(message)
    started = max(int(os.environ.get(name, 1)) for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"))
    if isinstance(strategy, DDPStrategy):
        environment = cast(ClusterEnvironment, strategy.cluster_environment)
        environment.validate_settings(num_devices=trainer.num_devices, num_nodes=trainer.num_nodes)
    elif started > 1:
        raise UserError(
            f"{started} processes were started, and each would train by itself, in one run folder: give --trainer.strategy ddp "
            "and --trainer.devices with the number of processes on a node"
        )


def strategy_refusals(strategy: Strategy) -> list[tuple[bool, str]]:
    """Per reason why a strategy cannot be had, whether it applies, and the message."""
    name = type(strategy).__name__
    if type(strategy) is not DDPStrategy:  # subclasses, such as DeepSpeed's, shard or hide what trains
        return [
            (
                not isinstance(strategy, SingleDeviceStrategy),
                f"{name} is not supported: it would take parameters apart that EWC, references and adapters need whole. Use "
                "--trainer.strategy ddp, where every device holds the base (policy.init_args.quantization nf4 makes it small), "
                "or --trainer.devices 1 with --trainer.strategy auto",
            )
        ]
    return [
        (
            strategy._start_method != "popen",
            f"{name} with start_method {strategy._start_method} is not supported: what was trained would end with its "
            "processes; use --trainer.strategy ddp",
        ),
        (
            bool(strategy._ddp_kwargs.get("static_graph")),
            f"{name}(static_graph=True) is not supported: objectives have different graphs; leave it out",
        ),
        (
            strategy._ddp_comm_hook is not None or strategy._model_averaging_period is not None,
            f"{name} with a communication hook or model averaging is not supported: it would change gradients or weights, and "
            "no checkpoint holds its state; leave ddp_comm_hook and model_averaging_period out",
        ),
    ]


def leaves_parameters_unused(policy: Policy, objectives: Mapping[str, Objective]) -> bool:
    """Whether some steps leave trained parameters without a gradient, which DDP must know beforehand.

    What trains beside the policy for one objective is idle in the phases of the other; and where it stands in the place of the
    output layer, as in a reward model, that layer is idle, if it trains.
    """
    own = any(objective.own_parameters(policy) for objective in objectives.values())
    return own and (len(objectives) > 1 or policy.lora is None)


def find_unused_parameters(trainer: Trainer, needed: bool) -> None:
    """Have DDP look for parameters without a gradient where a run has such, and not where that would only cost time.

    Lightning builds DDP from these settings after the model is there, and has no public way to add to them.

    Args:
        trainer: The trainer, before its strategy is set up.
        needed: Whether some steps leave trained parameters unused.

    Raises:
        UserError: The strategy was told not to look for them, and there will be some.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, DDPStrategy):
        return
    if needed and strategy._ddp_kwargs.get("find_unused_parameters") is False:
        raise UserError(
            "find_unused_parameters false would stop at the first step that leaves trained parameters without a gradient, such "
            "as a value function in an instruction phase: use --trainer.strategy ddp, or ddp_find_unused_parameters_true"
        )
    strategy._ddp_kwargs.setdefault("find_unused_parameters", needed)


def leave_group_at_exit() -> None:
    """Have this process leave the group that its strategy may have joined, before the interpreter comes down.

    Threads of a gloo group let go of tensors, for which they need the interpreter. Where one of them comes late, as on a busy
    machine, it finds the interpreter gone and aborts a process that has done all its work. Lightning leaves NCCL groups only.
    """
    atexit.unregister(_leave_group)
    atexit.register(_leave_group)


def stay_in_group_at_exit() -> None:
    """Take that back: whoever leaves waits for what is under way, and after an error others may never come to that."""
    atexit.unregister(_leave_group)


def _leave_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
