"""Optimizer state at a switch, against optimizers that know of one phase or one objective only."""

from __future__ import annotations

import io
import re
from typing import Any

import bitsandbytes as bnb
import pytest
import torch

from hbat_lightning.errors import UserError
from hbat_lightning.optimizer_state import OptimizerStateKeeper, require_restorable

PHASES = ["instruction", "preference", "instruction", "preference", "preference", "instruction"]


def adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.01)


def start() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.arange(3.0)), torch.nn.Parameter(torch.ones(2, 2))]


def steps(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, phase: int) -> None:
    """Two optimizer steps, with gradients that depend on the phase; one tensor has none in the first of them."""
    generator = torch.Generator().manual_seed(phase)
    for step in range(2):
        for number, parameter in enumerate(parameters):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if phase == 0 and step == 0 and number == 1:
                parameter.grad = None
        optimizer.step()


def expected(policy: str) -> list[torch.nn.Parameter]:
    """One optimizer per phase, per objective, or for all."""
    parameters = start()
    made: dict[Any, torch.optim.Optimizer] = {}
    objective = ""
    run = 0
    for phase, entering in enumerate(PHASES):
        run += entering != objective  # two phases of one objective in a row are no switch
        objective = entering
        key = {"reset": run, "shared": 0, "per_objective": objective}[policy]
        if key not in made:
            made[key] = adamw(parameters)
        steps(parameters, made[key], phase)
    return parameters


@pytest.mark.parametrize("policy", ["reset", "shared", "per_objective"])
@pytest.mark.parametrize("interrupted", [False, True])
def test_policies_are_one_optimizer_per_phase_for_all_or_per_objective(policy: Any, interrupted: bool) -> None:
    parameters = start()
    optimizer, keeper = adamw(parameters), OptimizerStateKeeper(policy)
    for phase, objective in enumerate(PHASES):
        if phase:
            keeper.switch(optimizer, PHASES[phase - 1], objective)
        steps(parameters, optimizer, phase)
        if interrupted:  # through a file, as a checkpoint would
            file = io.BytesIO()
            torch.save({"keeper": keeper.state_dict(), "optimizer": optimizer.state_dict()}, file)
            state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
            optimizer, keeper = adamw(parameters), OptimizerStateKeeper(policy)
            optimizer.load_state_dict(state["optimizer"])
            keeper.load_state_dict(state["keeper"])
    for one, other in zip(parameters, expected(policy), strict=True):
        assert torch.equal(one, other)


def test_the_three_policies_differ() -> None:
    ends = [expected(policy)[0].tolist() for policy in ("reset", "shared", "per_objective")]
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_a_learning_rate_set_in_between_is_kept() -> None:
    parameters = start()
    optimizer, keeper = adamw(parameters), OptimizerStateKeeper("per_objective")
    steps(parameters, optimizer, 0)
    keeper.switch(optimizer, "instruction", "preference")
    optimizer.param_groups[0]["lr"] = 0.025
    keeper.switch(optimizer, "preference", "instruction")
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert optimizer.state[parameters[0]]["step"] == 2


def test_it_works_with_several_parameter_groups() -> None:
    parameters = start()
    optimizer = torch.optim.AdamW([{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.5}])
    keeper = OptimizerStateKeeper("per_objective")
    steps(parameters, optimizer, 1)
    kept = [optimizer.state[parameter]["exp_avg"].clone() for parameter in parameters]
    keeper.switch(optimizer, "instruction", "preference")
    assert not optimizer.state
    keeper.switch(optimizer, "preference", "instruction")
    assert all(torch.equal(optimizer.state[p]["exp_avg"], value) for p, value in zip(parameters, kept, strict=True))


@pytest.mark.parametrize("paged", [bnb.optim.PagedAdamW, bnb.optim.PagedAdamW8bit, bnb.optim.PagedLion32bit])
def test_a_paged_optimizer_is_refused_before_it_steps(paged: Any, make_hybrid: Any, fit: Any) -> None:
    module = make_hybrid(optimizer=lambda parameters: paged(parameters, lr=1e-3))
    with pytest.raises(UserError, match=r"pages its state out.*bitsandbytes\.optim\.(AdamW|Lion)") as refused:
        fit(module)
    named = re.search(r"use bitsandbytes\.optim\.(\w+),", str(refused.value))
    assert named is not None
    require_restorable(getattr(bnb.optim, named[1])(start(), lr=1e-3))  # what it names exists, and is accepted
