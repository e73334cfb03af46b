"""A QLoRA run as it is meant for one card: NF4 base, fp32 adapters, checkpointing, bf16 compute."""

from __future__ import annotations

from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor

from hbat_lightning import LoraSettings, Policy
from hbat_lightning.callbacks import ElasticWeightConsolidation
from hbat_lightning.data import embedded
from hbat_lightning.schedules import Interval
from tests.support import Recorder, weights

CPU = torch.device("cpu")


def base_bytes(policy: Policy) -> dict[str, Tensor]:
    """Everything in the model that is no adapter: packed weights with their constants, and what was kept in bf16."""
    values = {name: value for name, value in policy.model.state_dict().items() if ".lora_" not in name}
    return {name: value.clone() for name, value in values.items() if isinstance(value, Tensor)}


@pytest.fixture
def policy() -> Policy:
    return Policy(embedded.TINY_LLAMA, quantization="nf4", lora=LoraSettings(r=4, alpha=8), gradient_checkpointing=True)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_trained_tensor_moves_and_nothing_else_does(
    precision: str, policy: Policy, make_hybrid: Any, fit: Any
) -> None:
    torch.manual_seed(0)
    policy.build(CPU)
    base, start = base_bytes(policy), weights(type("", (), {"policy": policy}))
    assert sum(name.endswith("base_layer.weight") for name in base) == 14
    assert any("absmax" in name for name in base)
    recorder = Recorder()
    ewc = ElasticWeightConsolidation(1.0)
    run = fit(make_hybrid(policy, schedule=Interval(2, 3, 3)), ewc, recorder, precision=precision)
    for name, value in run.weights.items():
        assert value.dtype == torch.float32, name
        assert not torch.equal(value, start[name]), name
    assert {gradient.dtype for step in recorder.gradients for gradient in step.values()} == {torch.float32}
    after = base_bytes(policy)
    assert after.keys() == base.keys()
    assert all(torch.equal(after[name], value) for name, value in base.items())
    # anchors and importance are of what trains; the phase-start reference and the anchor are one tensor
    assert set(policy.snapshot("phase_start")) == set(run.weights)
    assert all(set(held) == set(run.weights) for held in ewc.state_dict()["held_for"].values())
    frozen = [name for name, value in policy.model.named_parameters() if ".phase_start." in name]
    assert len(frozen) == len(run.weights)


@pytest.mark.parametrize("which", [0, 1], ids=["instruction", "preference"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_leaves_quantised_gradients_as_they_are(which: int, precision: torch.dtype, batches: Any) -> None:
    found = []
    for checkpointing in (False, True):
        policy = Policy(
            embedded.TINY_LLAMA, "nf4", LoraSettings(r=4, dropout=0.1), gradient_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        policy.build(CPU)
        policy.set_training(dropout=True)
        policy.score(batches[which])  # finds out about the output layer with a pass of its own
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = -policy.score(batches[which]).log_probs.sum()
        trained = policy.trained_parameters()
        found.append(dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True)))
    assert all(torch.equal(found[1][name], value) for name, value in found[0].items())
    assert sum(bool(value.any()) for value in found[0].values()) == len(found[0]) // 2  # A has none while B is zero


@pytest.mark.parametrize("lora", [LoraSettings(r=4, alpha=8), None], ids=["lora", "full"])
@pytest.mark.parametrize("reference", ["phase_start", "initial", "base"])
def test_a_reference_pass_before_leaves_gradients_under_autocast_as_they_are(
    reference: Any, lora: LoraSettings | None, batches: Any
) -> None:
    """Autocast keeps weights that it has cast; a copy made without a graph would cut the gradient off."""
    policy = Policy(embedded.TINY_LLAMA, lora=lora)
    torch.manual_seed(0)
    policy.build(CPU)
    policy.add_snapshots([reference])
    policy.set_training(dropout=False)
    found = []
    trained = policy.trained_parameters()
    for asked in (False, True):
        with torch.autocast("cpu", torch.bfloat16):
            if asked:
                assert not policy.score_reference(batches[1], reference).log_probs.requires_grad
            loss = -policy.score(batches[1]).log_probs.sum()
        found.append(torch.autograd.grad(loss, list(trained.values())))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_four_bits_are_counted_and_asked_for_in_vain_refused(policy: Policy) -> None:
    policy.build(CPU)
    layers = [module for module in policy.model.modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14
    assert "policy: 14 linear layers are nf4" in policy.describe()
