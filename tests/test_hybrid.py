"""Alternation end to end, in memory."""

from __future__ import annotations

from typing import Any

import torch


def test_every_trained_tensor_moves_and_no_other(make_hybrid: Any, make_data: Any, make_trainer: Any) -> None:
    module, data = make_hybrid(), make_data()
    trainer = make_trainer()
    module.policy.build(torch.device("cpu"))
    module.policy.add_snapshots(["phase_start"])
    before = {name: p.detach().clone() for name, p in module.policy.named_parameters()}
    trainer.fit(module, data)
    names = {f"model.{name}" for name in module.policy.trained_parameters()}
    snapshots = {name for name in before if ".phase_start." in name}
    for name, parameter in module.policy.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == (name in names or name in snapshots), name
    assert trainer.global_step == module.plan.total_steps
