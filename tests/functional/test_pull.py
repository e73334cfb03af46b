"""The pull of EWC against autograd of its penalty, as processors and as GPUs do it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hbat_lightning.functional import add_pull, pull

Tensors = dict[str, Tensor]
SHAPES = {
    "longer than a chunk": (3, pull.CHUNK // 2 + 5),
    "small": (7,),
    "none": (0, 4),
    "transposed": (5, 6),
    "held": (4, 4),
}


def draw(seed: int) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    drawn = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES.items()}
    drawn["transposed"] = drawn["transposed"].t().contiguous().t()
    return drawn


def per_tensor() -> dict[str, Any]:
    return {name: 0.5 + number for number, name in enumerate(SHAPES)} | {"small": 0.0}


def per_element() -> dict[str, Any]:
    return {name: value.square() for name, value in draw(3).items()}


@pytest.fixture(params=["chunks", "at once"])
def add(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., pull.Pull]:
    if request.param == "at once":
        monkeypatch.setattr(pull, "_add_by_chunks", pull._add_at_once)
    return add_pull


@pytest.mark.parametrize("factors", [per_tensor(), per_element()], ids=["tensor", "element"])
def test_what_is_added_is_the_gradient_of_the_penalty(add: Callable[..., pull.Pull], factors: dict[str, Any]) -> None:
    parameters = {name: value.requires_grad_() for name, value in draw(0).items()}
    anchors, task = draw(1), draw(2)
    gradients = {name: value.clone(memory_format=torch.preserve_format) for name, value in task.items()}
    done = add(gradients, parameters, anchors, factors)

    terms = [(factors[name] * (parameters[name] - anchors[name]) ** 2).sum() for name in SHAPES]
    penalty = torch.stack(terms).sum()
    truth = dict(zip(SHAPES, torch.autograd.grad(penalty, list(parameters.values())), strict=True))
    for name in SHAPES:
        assert torch.allclose(gradients[name], task[name] + truth[name], rtol=1e-14, atol=1e-14), name
    assert float(done.penalty) == pytest.approx(penalty.item(), rel=1e-6)
    assert float(done.norm) == pytest.approx(norm(truth), rel=1e-6)
    assert float(done.task_norm) == pytest.approx(norm(task), rel=1e-6)


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(value.square().sum()) for value in tensors.values()))


def test_nothing_is_added_at_the_anchor(add: Callable[..., pull.Pull]) -> None:
    parameters, task = draw(0), draw(2)
    gradients = {name: value.clone() for name, value in task.items()}
    done = add(gradients, parameters, draw(0), per_element())
    assert all(torch.equal(gradients[name], task[name]) for name in SHAPES)
    assert float(done.penalty) == float(done.norm) == 0.0


def test_only_what_has_a_gradient_is_pulled(add: Callable[..., pull.Pull]) -> None:
    gradients = {"small": torch.zeros(7, dtype=torch.float64)}
    done = add(gradients, draw(0), draw(1), dict.fromkeys(SHAPES, 2.0))
    moved = draw(0)["small"] - draw(1)["small"]
    assert torch.allclose(gradients["small"], 4 * moved)
    assert float(done.penalty) == pytest.approx(2 * float(moved.square().sum()))
