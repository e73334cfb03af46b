"""Strategies that are refused, and what DDP is told of parameters that some steps leave unused."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

from hbat_lightning import PPOModule, strategies
from hbat_lightning.data.conflict_task import preference_reward
from hbat_lightning.errors import UserError
from hbat_lightning.objectives import RewardModule
from hbat_lightning.rewards import FunctionReward
from hbat_lightning.strategies import (
    find_unused_parameters,
    leaves_parameters_unused,
    require_strategy,
    strategy_refusals,
)


def messages(strategy: Strategy) -> list[str]:
    return [message for refused, message in strategy_refusals(strategy) if refused]


@pytest.mark.parametrize("kind", [FSDPStrategy, ModelParallelStrategy, DeepSpeedStrategy])
def test_what_shards_parameters_is_refused_with_a_way_out(kind: Any) -> None:
    (message,) = messages(kind.__new__(kind))  # making one needs GPUs, or a package that is not here
    assert message.startswith(f"{kind.__name__} is not supported")
    assert "--trainer.strategy ddp" in message
    assert "--trainer.devices 1" in message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"static_graph": True}, "static_graph"),
        ({"ddp_comm_hook": default_hooks.bf16_compress_hook}, "communication hook"),
        ({"model_averaging_period": 4}, "model averaging"),
        ({"start_method": "spawn"}, "start_method spawn"),
    ],
)
def test_ddp_that_would_change_gradients_or_weights_is_refused(settings: Any, message: str) -> None:
    (said,) = messages(DDPStrategy(**settings))
    assert message in said


@pytest.mark.parametrize(
    "strategy",
    [
        SingleDeviceStrategy(torch.device("cpu")),
        DDPStrategy(),
        DDPStrategy(process_group_backend="gloo", timeout=timedelta(minutes=1), gradient_as_bucket_view=True),
        DDPStrategy(find_unused_parameters=True),
    ],
    ids=["one device", "ddp", "settings", "unused"],
)
def test_others_are_not(strategy: Strategy) -> None:
    assert not messages(strategy)


def trainer(strategy: Any, devices: int = 2) -> Trainer:
    return Trainer(accelerator="cpu", devices=devices, strategy=strategy, logger=False, enable_checkpointing=False)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "SLURM_STEP_NUM_TASKS"])
def test_processes_that_would_each_train_by_themselves_are_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under torchrun with the configurations' devices 1."""
    alone = trainer("auto", devices=1)
    require_strategy(alone)
    monkeypatch.setenv(name, "4")
    with pytest.raises(
        UserError, match=r"4 processes were started, and each would train by itself, .*--trainer.devices"
    ):
        require_strategy(alone)


def test_a_number_of_devices_other_than_that_of_processes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything else is done; torchrun has started two processes here."""
    variables = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    for variable, value in (variables | {"TORCHELASTIC_RUN_ID": "x", "MASTER_ADDR": "localhost"}).items():
        monkeypatch.setenv(variable, str(value))
    require_strategy(trainer("ddp"))
    with pytest.raises(ValueError, match=r"devices=3.*does not match the world size \(2\)"):
        require_strategy(trainer("ddp", devices=3))


@pytest.mark.parametrize("needed", [True, False])
def test_ddp_looks_for_unused_parameters_where_there_are_some(needed: bool) -> None:
    ours = trainer("ddp")
    find_unused_parameters(ours, needed)
    assert ours.strategy._ddp_kwargs["find_unused_parameters"] is needed  # type: ignore[attr-defined]


def test_what_the_user_says_of_unused_parameters_holds_or_is_refused() -> None:
    told = trainer("ddp_find_unused_parameters_true")
    find_unused_parameters(told, needed=False)
    assert told.strategy._ddp_kwargs["find_unused_parameters"] is True  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"find_unused_parameters false would stop .*--trainer.strategy ddp"):
        find_unused_parameters(trainer("ddp_find_unused_parameters_false"), needed=True)
    find_unused_parameters(trainer("auto", devices=1), needed=True)


def test_lightning_still_builds_ddp_from_the_settings_that_are_added_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are a private field of Lightning's."""
    seen: dict[str, Any] = {}
    name = "lightning.pytorch.strategies.ddp.DistributedDataParallel"
    monkeypatch.setattr(name, lambda module, device_ids, **settings: seen.update(settings))
    ours = trainer("ddp")
    find_unused_parameters(ours, needed=True)
    ours.strategy._setup_model(torch.nn.Linear(1, 1))  # type: ignore[attr-defined]
    assert seen == {"find_unused_parameters": True}


def test_which_runs_leave_parameters_unused(make_hybrid: Any, make_policy: Any) -> None:
    def leaves(module: Any) -> bool:
        module.policy.build(torch.device("cpu"))
        for objective in module.objectives.values():
            objective.build(module.policy, torch.device("cpu"))
        return leaves_parameters_unused(module.policy, module.objectives)

    assert not leaves(make_hybrid())
    assert not leaves(make_hybrid(make_policy(lora=None)))
    assert leaves(make_hybrid(preference=PPOModule(FunctionReward(preference_reward))))
    assert not leaves(RewardModule(policy=make_policy()))  # its head is in every step
    assert leaves(RewardModule(policy=make_policy(lora=None)))  # and takes the output layer's place


class AtExit:
    """What is registered."""

    def __init__(self) -> None:
        self.registered: list[Any] = []

    def register(self, what: Any) -> None:
        self.registered.append(what)

    def unregister(self, what: Any) -> None:
        self.registered = [one for one in self.registered if one != what]


class Fails(Callback):
    """An error in the middle of training."""

    def on_train_batch_end(self, *args: Any) -> None:
        raise RuntimeError("nobody expects this")


def test_a_process_leaves_its_group_at_exit_where_no_error_has_come(
    make_hybrid: Any, fit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an error others may never come to what this one would wait for."""
    at_exit = AtExit()
    monkeypatch.setattr(strategies, "atexit", at_exit)
    for _ in range(2):
        fit(make_hybrid(), max_steps=1)
        assert at_exit.registered == [strategies._leave_group]
    with pytest.raises(RuntimeError, match="nobody expects this"):
        fit(make_hybrid(), Fails(), max_steps=1)
    assert at_exit.registered == []
