"""Importances and weights as they are fed from outside, against loops by hand; in training: callbacks/test_ewc.py."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from hbat_lightning.importance import (
    DriftImportance,
    ExactFisher,
    LiteralWeights,
    ProportionalWeights,
    RandomImportance,
    RawWeights,
    RunningFisher,
    UniformImportance,
)

BEFORE = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[0.0], [1.0], [2.0]])}
AFTER = {"a": torch.tensor([1.5, 2.0]), "b": torch.tensor([[1.0], [1.0], [-1.0]])}


def lists(values: Any) -> dict[str, Any]:
    return {name: value.tolist() for name, value in values.items()}


def test_drift_per_tensor_and_per_element() -> None:
    assert lists(DriftImportance().measure(BEFORE, AFTER, iter(()))) == {"a": 0.125, "b": pytest.approx(10 / 3)}
    per_element = DriftImportance(per_element=True).measure(BEFORE, AFTER, iter(()))
    assert lists(per_element) == {"a": [0.25, 0.0], "b": [[1.0], [0.0], [9.0]]}


@pytest.mark.parametrize("decay", [0.0, 0.3, 1.0])
def test_accumulation_decays_what_is_older(decay: float) -> None:
    importance = DriftImportance(decay=decay)
    held = None
    for value in (1.0, 2.0, 4.0):
        held = importance.accumulate(held, {"a": torch.tensor(value)})
    assert held["a"].item() == pytest.approx(4.0 + decay * 2.0 + decay**2 * 1.0)


def test_running_fisher_is_the_mean_of_n_times_squared_gradients() -> None:
    steps = [({"a": torch.tensor([1.0, -2.0])}, 10.0), ({"a": torch.tensor([0.5, 0.0])}, 4.0)]
    importance = RunningFisher()
    for gradients, units in steps:
        importance.observe(gradients, units)
    assert lists(importance.measure({}, {"a": AFTER["a"]}, iter(()))) == {"a": [(10.0 + 4 * 0.25) / 2, 40.0 / 2]}
    assert lists(importance.measure({}, {"a": AFTER["a"]}, iter(()))) == {"a": [0.0, 0.0]}  # it started anew


def test_running_fisher_leaves_out_steps_that_overflowed_and_tensors_without_gradient() -> None:
    importance = RunningFisher(per_element=False)
    importance.observe({"a": torch.tensor([1.0, 3.0])}, 2.0)
    importance.observe({"a": torch.tensor([math.inf, 1.0])}, 2.0)
    importance.observe({"a": torch.tensor([math.nan, 1.0])}, 2.0)
    assert lists(importance.measure({}, AFTER, iter(()))) == {"a": 10.0, "b": 0.0}


def test_exact_fisher_squares_before_the_mean() -> None:
    rows = [{"a": torch.tensor([1.0, -2.0])}, {"a": torch.tensor([-1.0, 0.0]), "b": torch.ones(3, 1)}]
    importance = ExactFisher(samples=2)
    assert importance.samples == 2
    truth = {"a": [1.0, 2.0], "b": [[0.5], [0.5], [0.5]]}
    assert lists(importance.measure(BEFORE, AFTER, iter(rows))) == truth
    assert lists(ExactFisher(2, per_element=False).measure(BEFORE, AFTER, iter(rows))) == {"a": 1.5, "b": 0.5}


def test_controls() -> None:
    assert lists(UniformImportance().measure(BEFORE, AFTER, iter(()))) == {"a": 1.0, "b": 1.0}
    one, other = RandomImportance(seed=3), RandomImportance(seed=3)
    first, second = (one.measure(BEFORE, AFTER, iter(())) for _ in range(2))
    assert lists(first) != lists(second)  # drawn anew at every switch
    other.load_state_dict({"draws": torch.tensor(1)})
    assert lists(other.measure(BEFORE, AFTER, iter(()))) == lists(second)
    assert all(0 <= value < 1 for value in (*lists(first).values(), *lists(second).values()))
    # A control does not add up: what was drawn for an older phase is forgotten.
    assert lists(one.accumulate(first, second)) == lists(second)


def test_weights_by_hand() -> None:
    importance = {"a": torch.tensor(1e-7), "b": torch.tensor(3e-7)}
    shares = [math.exp(0.1), math.exp(0.3)]
    got = LiteralWeights(kappa=1e3, max_weight=50.0).weights(importance, strength=3.0)
    assert lists(got) == pytest.approx(
        {n: 50 * 9 * s / sum(shares) for n, s in zip("ab", shares, strict=True)}, rel=1e-6
    )
    assert lists(ProportionalWeights().weights(importance, 2.0)) == pytest.approx({"a": 1.0, "b": 3.0})
    assert lists(RawWeights().weights(importance, 2.0)) == pytest.approx({"a": 2e-7, "b": 6e-7})


def test_weights_per_element_keep_shapes_and_share_one_mean() -> None:
    importance = DriftImportance(per_element=True).measure(BEFORE, AFTER, iter(()))
    got = ProportionalWeights(tau=2.0).weights(importance, 1.0)
    assert {name: value.shape for name, value in got.items()} == {name: v.shape for name, v in BEFORE.items()}
    roots = {"a": [0.5, 0.0], "b": [[1.0], [0.0], [3.0]]}
    assert got["a"].tolist() == pytest.approx([5 * 0.5 / 4.5, 0.0])
    assert got["b"].flatten().tolist() == pytest.approx([5 * row[0] / 4.5 for row in roots["b"]])
    with pytest.raises(ValueError, match="LiteralWeights are per tensor"):
        LiteralWeights().weights(importance, 1.0)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.1"):
        DriftImportance(decay=1.1)
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        ExactFisher(samples=0)
    with pytest.raises(ValueError, match="tau must be > 0, got 0"):
        ProportionalWeights(tau=0)
