"""What objects were made with, as a run remembers it."""

from __future__ import annotations

from collections.abc import Iterator
from inspect import isabstract
from typing import Any

import pytest

from hbat_lightning import callbacks, importance, lr, objectives, rewards
from hbat_lightning.callbacks.importance import ImportanceCallback
from hbat_lightning.importance import DriftImportance, Importance, ImportanceWeights, RunningFisher
from hbat_lightning.lr import Cosine, LRSchedule
from hbat_lightning.objectives import DPOModule, ObjectiveModule
from hbat_lightning.rewards import FunctionReward, Reward
from hbat_lightning.settings import flat, parameters, settings_of

NEEDED: dict[str, Any] = {"path": "adapter", "model_name_or_path": "model", "function": len}


def concrete(module: Any, base: type) -> Iterator[type]:
    for made in vars(module).values():
        if isinstance(made, type) and issubclass(made, base) and made is not base and not isabstract(made):
            yield made


def made(kind: type) -> Any:
    if "reward" in parameters(kind):
        return kind(reward=FunctionReward(len))
    return kind(**{name: value for name, value in NEEDED.items() if name in parameters(kind)})


KINDS = [
    *((kind, ObjectiveModule) for kind in concrete(objectives, ObjectiveModule)),
    *((kind, object) for kind in concrete(importance, Importance)),
    *((kind, object) for kind in concrete(importance, ImportanceWeights)),
    *((kind, object) for kind in concrete(lr, LRSchedule)),
    *((kind, object) for kind in concrete(rewards, Reward)),
    *((kind, object) for kind in concrete(callbacks, ImportanceCallback)),
]


@pytest.mark.parametrize(("kind", "until"), KINDS, ids=lambda value: value.__name__)
def test_every_class_keeps_every_parameter_under_its_name(kind: type, until: type) -> None:
    """Or a change of it would not be seen when a run goes on."""
    assert set(settings_of(made(kind), until)) == {"class", *parameters(kind, until)}


def test_all_of_them_are_looked_at() -> None:
    assert len(KINDS) > 25
    assert {kind.__name__ for kind, _ in KINDS} >= {"PPOModule", "ExactFisher", "Linear", "ImportanceFreeze"}


def test_values_are_plain_and_nested_ones_have_dotted_names() -> None:
    ewc = callbacks.ElasticWeightConsolidation(2.0, RunningFisher(decay=0.5))
    assert flat({"callbacks": {"EWC": settings_of(ewc)}}) == {
        "callbacks.EWC": "ElasticWeightConsolidation",
        "callbacks.EWC.strength": 2.0,
        "callbacks.EWC.importance": "RunningFisher",
        "callbacks.EWC.importance.decay": 0.5,
        "callbacks.EWC.importance.per_element": True,
        "callbacks.EWC.weights": "ProportionalWeights",
        "callbacks.EWC.weights.tau": 1.0,
    }
    assert settings_of(Cosine(0.1)) == {"class": "Cosine", "warmup": 0.1, "per_phase": True}
    assert settings_of(DriftImportance())["per_element"] is False
    assert settings_of(DPOModule(beta=0.3), ObjectiveModule)["beta"] == 0.3
    assert settings_of(FunctionReward(len)) == {"class": "FunctionReward", "function": "builtins.len"}
